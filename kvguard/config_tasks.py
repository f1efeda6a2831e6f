"""What is asked of a model: sections of ``tasks``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from kvguard.config_types import Commit, Count, ExistingFile, Name, Repository, Section


class TaskSection(Section):
    """What every task has, whatever its kind."""

    name: Name = Field(default="", description="unique in the experiment; empty: the kind")
    num_prompts: Count
    few_shot: int = Field(default=0, ge=0)
    max_new_tokens: Count | None = Field(
        default=None, description="longest answer; null: generation.max_new_tokens"
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and not values.get("name") and "kind" in values:
            return {**values, "name": values["kind"]}
        return values

    @property
    def files(self) -> list[Path]:
        """Files outside the results that the task reads."""
        return []


class GsmSymbolic(TaskSection):
    """Grade-school word problems made by the reasoning-gym package; no download."""

    kind: Literal["gsm_symbolic"]
    few_shot: int = Field(default=3, ge=0)


class Gsm8k(TaskSection):
    """GSM8K from the hub, or from local JSON lines with "question" and "answer"."""

    kind: Literal["gsm8k"]
    few_shot: int = Field(default=3, ge=0)
    test_path: ExistingFile | None = Field(default=None, description="null: from the hub")
    train_path: ExistingFile | None = Field(
        default=None, description="where few-shot examples are drawn; null: from the hub"
    )
    repository: Repository = "openai/gsm8k"
    revision: Commit | None = None

    @model_validator(mode="after")
    def _sources(self) -> Self:
        from_hub = self.test_path is None or (self.train_path is None and self.few_shot > 0)
        if from_hub and self.revision is None:
            raise ValueError(
                "revision: data from the hub needs a full commit hash (or give test_path and "
                "train_path), got None"
            )
        return self

    @property
    def files(self) -> list[Path]:
        return [path for path in (self.test_path, self.train_path) if path is not None]


class GeneratedTask(TaskSection):
    """A task whose questions are drawn from the seed; no download."""

    question: Literal["first", "last"] = Field(
        default="last", description="the question's place: before the context or after it"
    )


class Recall(GeneratedTask):
    """Codes of named things, one line each; the code of one of them, or of several, is asked."""

    kind: Literal["recall"]
    items: int = Field(default=12, ge=1, le=500)
    asked: Count = Field(default=1, description="keys that are asked for")
    distance: float | None = Field(
        default=None, ge=0, le=1, description="1: the context starts with what is asked; null: any"
    )

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.asked > self.items:
            raise ValueError(f"asked: at most items={self.items}, got {self.asked}")
        return self


class Copy(GeneratedTask):
    """A list of words to be repeated."""

    kind: Literal["copy"]
    items: int = Field(default=8, ge=1, le=60)
    order: Literal["verbatim", "reversed", "every_second"] = "verbatim"
    filler_sentences: int = Field(default=0, ge=0, le=1000)


class Records(GeneratedTask):
    """Fields of a paragraph about a person, to be listed in a given order."""

    kind: Literal["records"]
    items: int = Field(default=4, ge=1, le=8)
    filler_sentences: int = Field(default=0, ge=0, le=1000)


class ToolCall(GeneratedTask):
    """A call of a tool as JSON whose arguments stand in a message."""

    kind: Literal["tool_call"]
    items: int = Field(default=4, ge=1, le=6, description="arguments that are asked for")
    filler_sentences: int = Field(default=0, ge=0, le=1000)


class Needle(GeneratedTask):
    """A fact in a longer text, among other facts of its kind."""

    kind: Literal["needle"]
    items: int = Field(default=3, ge=1, le=25, description="facts, one of which is asked for")
    sentences: int = Field(default=10, ge=0, le=1000, description="that say nothing of it")
    distance: float | None = Field(
        default=None, ge=0, le=1, description="1: the text starts with the fact; null: anywhere"
    )


class Instructions(GeneratedTask):
    """Constraints on an answer's form, before a passage and a question; obeyed by code."""

    kind: Literal["instructions"]
    items: int = Field(default=2, ge=1, le=3, description="constraints that are asked for at once")
    sentences: int = Field(default=8, ge=0, le=1000, description="of the passage")
    constraints: list[
        Literal[
            "uppercase",
            "lowercase",
            "no_commas",
            "start",
            "end",
            "include",
            "quotes",
            "max_words",
        ]
    ] = Field(
        default=["uppercase", "lowercase", "no_commas", "start", "end", "include", "max_words"],
        min_length=1,
    )

    @model_validator(mode="after")
    def _different(self) -> Self:
        if len(set(self.constraints)) != len(self.constraints):
            raise ValueError(f"constraints: every one is listed once, got {self.constraints}")
        return self


class JsonLines(TaskSection):
    """The user's own questions: JSON lines with "question" and, where there is one, "answer"."""

    kind: Literal["json_lines"]
    path: ExistingFile
    match: Literal["exact", "number"] = Field(
        default="exact",
        description="exact: the text or its last line is the answer; number: its final number is",
    )

    @property
    def files(self) -> list[Path]:
        return [self.path]


Task = Annotated[
    GsmSymbolic | Gsm8k | Recall | Copy | Records | ToolCall | Needle | Instructions | JsonLines,
    Field(discriminator="kind"),
]
