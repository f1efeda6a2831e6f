"""Tasks: questions with reference answers, few-shot examples, and answers read out of a text.

A task is two functions in `TASKS`: one that yields questions and worked examples, one that reads
the answer out of a generated text. Everything else here is shared by all of them.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict

from kvguard import config
from kvguard.schema import PROMPTS, atomic_path, conform, read_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = "26 Jul 2024"
"""The date that chat templates with a date show, so that a prompt is the same on every day."""


class PromptError(ValueError):
    """A task that cannot give what was asked; the message names the field and the value."""


class Example(BaseModel):
    """A worked example: a question and an answer whose last line is ``#### <number>``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str
    answer: str


class Prompt(BaseModel):
    """One question of a task.

    Attributes:
        prompt_id: 16 hex digits over task, question and reference: independent of seed and order.
        task: name of the task.
        index: place in this run's order, from 0.
        question: the user's turn.
        reference: the right answer as the data set writes it.
        reference_answer: the same in canonical form, see `canonical_number`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_id: str
    task: str
    index: int
    question: str
    reference: str
    reference_answer: str


class Question(NamedTuple):
    """A question, its right answer as the data set writes it, and the worked answer."""

    question: str
    reference: str
    worked: str


class TaskFunctions(NamedTuple):
    """What a task is made of.

    Attributes:
        questions: (task section, seed) -> (questions in order, few-shot examples). At least
            ``num_prompts`` questions where there are as many; the first n do not depend on n.
        read_answer: text -> canonical answer, or None when the text has none.
    """

    questions: Callable[[Any, int], tuple[Iterator[Question], list[Question]]]
    read_answer: Callable[[str], str | None]


def load_task(task: config.Task, seed: int) -> tuple[list[Prompt], list[Example]]:
    """The prompts and the few-shot examples of a task.

    The same seed gives the same prompts in the same order, and a smaller ``num_prompts`` gives the
    first of them. No example's question is among the prompts.

    Args:
        task: a task section of the configuration.
        seed: the experiment's seed.

    Raises:
        PromptError: the task has fewer questions or examples than asked, its data cannot be read,
            or a reference answer is not a number.
    """
    questions, examples = TASKS[task.name].questions(task, seed)
    if len(examples) < task.few_shot:
        raise PromptError(f"task.few_shot: {task.few_shot} asked, there are {len(examples)}")
    prompts: dict[str, Prompt] = {}
    taken = {example.question for example in examples}
    for question, reference, _ in questions:
        if len(prompts) == task.num_prompts:
            break
        answer = canonical_number(reference)
        if answer is None:
            raise PromptError(
                f"task {task.name}: reference {reference!r} of {question!r} is no number"
            )
        prompt_id = make_prompt_id(task.name, question, reference)
        if question not in taken and prompt_id not in prompts:
            prompts[prompt_id] = Prompt(
                prompt_id=prompt_id,
                task=task.name,
                index=len(prompts),
                question=question,
                reference=reference,
                reference_answer=answer,
            )
    if len(prompts) < task.num_prompts:
        raise PromptError(
            f"task.num_prompts: {task.num_prompts} asked, {task.name} has {len(prompts)} different "
            "questions that are not few-shot examples"
        )
    turns = [Example(question=entry.question, answer=entry.worked) for entry in examples]
    return list(prompts.values()), turns


def read_answer(task: str, text: str) -> str | None:
    """The canonical answer of a generated text under that task, or None when it has none."""
    return TASKS[task].read_answer(text)


def make_prompt_id(task: str, question: str, reference: str) -> str:
    """First 16 hex digits of the SHA-256 over task, question and reference answer."""
    return _hex_digest(task, question, reference)[:16]


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


def shared_prefix_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share, leaving each at least one token of its own.

    Args:
        prompts: token ids of each prompt; fewer than two share nothing.
    """
    if len(prompts) < 2:
        return 0
    ordered = sorted(map(list, prompts))  # what the extremes share, all share
    pairs = zip(ordered[0], ordered[-1], strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return max(0, min(common, min(map(len, prompts)) - 1))


def prompts_frame(prompts: Sequence[Prompt]) -> pl.DataFrame:
    """The prompts as a table, see `schema.PROMPTS`."""
    rows = [prompt.model_dump() for prompt in prompts]
    return conform(pl.DataFrame(rows, schema=PROMPTS), PROMPTS)


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a table (PROMPTS), in the run's order."""
    rows = read_table(path, PROMPTS).sort("index").iter_rows(named=True)
    return [Prompt.model_validate(row) for row in rows]


def write_examples(path: str | Path, examples: Sequence[Example]) -> None:
    """Write few-shot examples as a JSON list, all or nothing."""
    with atomic_path(path) as temporary:
        rows = [example.model_dump() for example in examples]
        temporary.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_examples(path: str | Path) -> list[Example]:
    """Few-shot examples that `write_examples` wrote."""
    return [Example.model_validate(row) for row in json.loads(Path(path).read_text("utf-8"))]


_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,2}}(?![0-9]))?"
_NUMBER = re.compile(
    rf"""
    [\s(\[{{:≈]* (?:(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*:?\s*)?
    (?P<sign>[-+]?) \s*
    (?:
        (?:(?P<whole>{_INTEGER})\s+(?=[0-9.]))?
        (?P<over>[-+]?{_DECIMAL}) \s*/\s* (?P<under>[-+]?{_DECIMAL})
      | (?P<plain>{_DECIMAL})
    )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013\u2010\u2011\ufe63\uff0d", "-"),
        **{
            character: " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")
            for character in map(chr, (0xBC, 0xBD, 0xBE, *range(0x2153, 0x215F)))
        },
    }
)
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2"),
        (r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r" \1 "),
        (r"(?<=[0-9])(?:\{,\}|,?\\[,!;]|[\u00a0\u2009\u202f])(?=[0-9]{3})", ","),
        (r"\\(?:left|right|boxed|quad|[()\[\],!;: ])", " "),
        (r"\b(?:USD|EUR|GBP|INR|CAD|AUD|US(?=\s?\\?\$)|Rs\.?)\s*(?=[-+.0-9\\$£€₹])", ""),
        (r"[\\$£€¥₹₩*_`~]", ""),
    )
]
_MARKER = re.compile(r"(?<!#)####(?!#)\s*([^\n]*)")
_BOXED = re.compile(r"\\boxed\s*\{")


def canonical_number(text: str) -> str | None:
    """The number that a text starts with, written so that equal values compare equal.

    Signs, thousands separators, currency, LaTeX, decimals, fractions and mixed numbers are read;
    what follows the number (units, a percent sign, a full stop) is not. After "a = b", b counts.

    Args:
        text: e.g. "$1,000.00", "-3 apples", r"\\frac{1}{2}", "1 1/2 cups", "50%".

    Returns:
        An integer ("1000") or a fraction in lowest terms ("3/2"); None where no number is.
    """
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.translate(_CHARACTERS)
    found = _NUMBER.match(text.rpartition("=")[2]) or _NUMBER.match(text)
    if found is None:
        return None
    parts = {name: part.replace(",", "") for name, part in found.groupdict().items() if part}
    try:
        if "plain" in parts:
            value = Fraction(parts["plain"])
        else:
            value = Fraction(parts["over"]) / Fraction(parts["under"])
            value += int(parts.get("whole", "0"))
        return str(-value if parts.get("sign") == "-" else value)
    except (ValueError, ZeroDivisionError):  # more digits than Python converts, or a zero below
        return None


def extract_answer(text: str) -> str | None:
    """The final answer of a text, in canonical form: the last ``#### number``, else the last box.

    Args:
        text: a generated text.

    Returns:
        See `canonical_number`; None when neither ``####`` nor ``\\boxed{}`` holds a number, which
        is not the same as a wrong answer.
    """
    for content in reversed(_MARKER.findall(text)):
        if (answer := canonical_number(content)) is not None:
            return answer
    for opening in reversed(list(_BOXED.finditer(text))):
        content = _braced(text, opening.end())
        if content is not None and (answer := canonical_number(content)) is not None:
            return answer
    return None


def _braced(text: str, start: int) -> str | None:
    """The text from ``start`` to the brace that closes it; None when nothing does."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : start + brace.start()]
    return None


# Tasks


def _gsm_symbolic(task: config.GsmSymbolic, seed: int) -> tuple[Iterator[Question], list[Question]]:
    """Word problems from the templates of GSM-Symbolic (Mirzadeh et al., 2410.05229).

    The few-shot examples come from templates of their own: a worked answer to the same template
    would give an evaluated question's solution away.
    """
    import reasoning_gym

    def generate(purpose: str, size: int) -> Iterator[tuple[int, Question]]:
        source = reasoning_gym.create_dataset(
            "gsm_symbolic", seed=int(_hex_digest(str(seed), purpose)[:8], 16), size=size
        )
        for template, entry in zip(source.task_indices, source, strict=True):
            worked = _worked_answer(entry["metadata"]["answer_cot"], entry["answer"])
            yield template, Question(entry["question"], entry["answer"], worked)

    examples: dict[int, Question] = {}
    for template, question in generate("few-shot examples", 100 * task.few_shot + 1):
        if len(examples) < task.few_shot:
            examples.setdefault(template, question)
    candidates = generate("questions", 10 * task.num_prompts + 1000)
    questions = (question for template, question in candidates if template not in examples)
    return questions, list(examples.values())


def _gsm8k(task: config.Gsm8k, seed: int) -> tuple[Iterator[Question], list[Question]]:
    """GSM8K (Cobbe et al., 2110.14168): test questions, few-shot examples from train.

    Both are ordered by a hash of seed and content, so that neither the file's order nor the number
    of prompts decides which come first. Calculator annotations (``<<1+1=2>>``) are taken out of
    the examples: they were meant for models that call a calculator.
    """
    test = _in_seeded_order(_gsm8k_rows(task, task.test_path, "test"), seed)
    asked = {question.question for question in test}
    examples: list[Question] = []
    if task.few_shot:
        train = _in_seeded_order(_gsm8k_rows(task, task.train_path, "train"), seed)
        unseen = (question for question in train if question.question not in asked)
        examples = list(islice(unseen, task.few_shot))
    return iter(test), examples


def _in_seeded_order(questions: list[Question], seed: int) -> list[Question]:
    return sorted(questions, key=lambda q: _hex_digest(str(seed), q.question, q.reference))


def _gsm8k_rows(task: config.Gsm8k, path: Path | None, split: str) -> list[Question]:
    if path is not None:
        rows = [
            _json_row(line, f"{path}:{number}")
            for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1)
            if line.strip()
        ]
    else:
        rows = [
            (row["question"], row["answer"], f"{task.repository} {split}")
            for row in _hub_rows(task.repository, task.revision, split)
        ]
    questions = []
    for question, answer, place in rows:
        reference = answer.rpartition("####")[2].strip()
        if canonical_number(reference) is None:
            raise PromptError(f"{place}: the answer ends in no number: {answer[-80:]!r}")
        worked = _worked_answer(re.sub(r"<<[^<>]*>>", "", answer), reference)
        questions.append(Question(question.strip(), reference, worked))
    return questions


def _json_row(line: str, place: str) -> tuple[str, str, str]:
    try:
        row = json.loads(line)
        question, answer = row["question"], row["answer"]
    except (ValueError, KeyError, TypeError) as error:
        raise PromptError(
            f'{place}: expected one JSON object with "question" and "answer" a line: {error!r}'
        ) from None
    if not (isinstance(question, str) and isinstance(answer, str) and question.strip()):
        raise PromptError(f'{place}: "question" and "answer" must be texts, got {row!r}')
    return question, answer, place


def _hub_rows(repository: str, revision: str | None, split: str) -> list[dict[str, str]]:
    import datasets

    try:
        return list(datasets.load_dataset(repository, "main", revision=revision, split=split))
    except (OSError, ValueError) as error:
        raise PromptError(
            f"task.repository: {repository!r} at {revision} could not be read from the hub; "
            f"without the hub, give test_path and train_path: {error}"
        ) from error


def _worked_answer(text: str, reference: str) -> str:
    """The worked answer with one last line ``#### <reference>``."""
    steps = text.rpartition("####")[0] if "####" in text else ""
    return f"{steps.rstrip()}\n#### {reference}".strip()


def _hex_digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


TASKS: dict[str, TaskFunctions] = {
    "gsm8k": TaskFunctions(_gsm8k, extract_answer),
    "gsm_symbolic": TaskFunctions(_gsm_symbolic, extract_answer),
}
"""Every task by the name that it has in the configuration; its fields are a section there."""
