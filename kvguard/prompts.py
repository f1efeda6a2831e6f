"""Prompts of an experiment's tasks: drawn once, written as a table, formatted as chats."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from pydantic import BaseModel, ConfigDict

from kvguard import config
from kvguard.schema import PROMPTS, atomic_path, conform, read_table
from kvguard.task_data import gsm8k, gsm_symbolic, json_lines
from kvguard.task_generators import copy, instructions, needle, recall, records, tool_call
from kvguard.tasks import Question, TaskError, hex_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = "26 Jul 2024"
"""The date that chat templates with a date show, so that a prompt is the same on every day."""


class PromptError(ValueError):
    """A question that cannot be made into a prompt."""


class Example(BaseModel):
    """A worked example: a question and its answer, shown as an earlier turn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str
    answer: str


class Prompt(BaseModel):
    """One question of a task.

    Attributes:
        prompt_id: 16 hex digits over task, question and reference: independent of seed and order.
        task: name of the task.
        kind: the task's kind, which names the verifier.
        template: what the question was drawn from; None where no other prompt shares it.
        index: place in this run's order, from 0.
        question: the user's turn.
        reference: the right answer as people read it; None where there is no right answer.
        spec: JSON, what `tasks.verify` needs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_id: str
    task: str
    kind: str
    template: str | None = None
    index: int
    question: str
    reference: str | None
    spec: str


Generator = Callable[[Any, int], tuple[Iterator[Question], list[Question]]]
"""(task section, seed) -> (questions in order, few-shot examples). At least ``num_prompts``
questions where there are as many; the first n do not depend on n."""

GENERATORS: dict[str, Generator] = {
    "gsm8k": gsm8k,
    "gsm_symbolic": gsm_symbolic,
    "recall": recall,
    "copy": copy,
    "records": records,
    "tool_call": tool_call,
    "needle": needle,
    "instructions": instructions,
    "json_lines": json_lines,
}
"""Every kind of task and where its questions come from."""


def load_tasks(
    tasks: Sequence[config.Task], seed: int
) -> tuple[list[Prompt], dict[str, list[Example]]]:
    """The prompts of all tasks, task by task, and each task's few-shot examples.

    Raises:
        TaskError: as `load_task`.
    """
    prompts: list[Prompt] = []
    examples = {}
    for task in tasks:
        drawn, examples[task.name] = load_task(task, seed)
        start = len(prompts)
        prompts += [prompt.model_copy(update={"index": start + prompt.index}) for prompt in drawn]
    return prompts, examples


def load_task(task: config.Task, seed: int) -> tuple[list[Prompt], list[Example]]:
    """The prompts and the few-shot examples of a task.

    The same seed gives the same prompts in the same order, and a smaller ``num_prompts`` gives the
    first of them. No example's question is among the prompts.

    Args:
        task: a task section of the configuration.
        seed: the experiment's seed.

    Raises:
        TaskError: the task has fewer questions or examples than asked, its data cannot be read, or
            a reference answer cannot be verified.
    """
    questions, examples = GENERATORS[task.kind](task, seed)
    if len(examples) < task.few_shot:
        raise TaskError(
            f"tasks.{task.name}.few_shot: {task.few_shot} asked, there are {len(examples)}"
        )
    prompts: dict[str, Prompt] = {}
    taken = {example.question for example in examples}
    for entry in questions:
        if len(prompts) == task.num_prompts:
            break
        prompt_id = make_prompt_id(task.name, entry.question, entry.reference or "")
        if entry.question not in taken and prompt_id not in prompts:
            prompts[prompt_id] = Prompt(
                prompt_id=prompt_id,
                task=task.name,
                kind=task.kind,
                template=entry.template,
                index=len(prompts),
                question=entry.question,
                reference=entry.reference,
                spec=json.dumps(entry.spec, ensure_ascii=False),
            )
    if len(prompts) < task.num_prompts:
        raise TaskError(
            f"tasks.{task.name}.num_prompts: {task.num_prompts} asked, there are {len(prompts)} "
            "different questions that are not few-shot examples"
        )
    turns = [Example(question=entry.question, answer=entry.worked) for entry in examples]
    return list(prompts.values()), turns


def make_prompt_id(task: str, question: str, reference: str) -> str:
    """First 16 hex digits of the SHA-256 over task, question and reference answer."""
    return hex_digest(task, question, reference)[:16]


def format_prompt(
    tokenizer: "PreTrainedTokenizerBase", question: str, examples: Sequence[Example] = ()
) -> list[int]:
    """Token ids of a question as a chat: the examples as earlier turns, then the open answer.

    The template's own text is tokenized without added special tokens: some tokenizers would put a
    second begin token in front of it.

    Args:
        tokenizer: with a chat template.
        question: the last user turn.
        examples: earlier turns, user question and assistant answer.

    Returns:
        (T,) token ids, ending where the assistant's answer starts.

    Raises:
        PromptError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise PromptError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; an instruct model "
            "has one"
        )
    messages = []
    for example in examples:
        messages.append({"role": "user", "content": example.question})
        messages.append({"role": "assistant", "content": example.answer})
    messages.append({"role": "user", "content": question})
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, date_string=TEMPLATE_DATE
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompts_frame(prompts: Sequence[Prompt]) -> pl.DataFrame:
    """The prompts as a table, see `schema.PROMPTS`."""
    rows = [prompt.model_dump() for prompt in prompts]
    return conform(pl.DataFrame(rows, schema=PROMPTS), PROMPTS)


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a table (PROMPTS), in the run's order."""
    rows = read_table(path, PROMPTS).sort("index").iter_rows(named=True)
    return [Prompt.model_validate(row) for row in rows]


def write_examples(path: str | Path, examples: Mapping[str, Sequence[Example]]) -> None:
    """Write each task's few-shot examples as JSON, all or nothing."""
    with atomic_path(path) as temporary:
        rows = {task: [turn.model_dump() for turn in turns] for task, turns in examples.items()}
        temporary.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_examples(path: str | Path) -> dict[str, list[Example]]:
    """Few-shot examples that `write_examples` wrote, by task."""
    written = json.loads(Path(path).read_text("utf-8"))
    return {task: [Example.model_validate(row) for row in rows] for task, rows in written.items()}
