"""Tasks whose questions come from data: GSM-Symbolic's templates, GSM8K, the user's own lines."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from kvguard.answers import canonical_number
from kvguard.config_tasks import Gsm8k, GsmSymbolic, JsonLines
from kvguard.config_types import shortened
from kvguard.tasks import Question, TaskError, canonical_text, hex_digest

MAX_LINE_CHARACTERS = 1_000_000
"""Length of one line of a file of questions; prompts of a million tokens are longer than any
context."""


def gsm_symbolic(task: GsmSymbolic, seed: int) -> tuple[Iterator[Question], list[Question]]:
    """Word problems from the templates of GSM-Symbolic (Mirzadeh et al., 2410.05229).

    The few-shot examples come from templates of their own: a worked answer to the same template
    would give an evaluated question's solution away.
    """
    import reasoning_gym

    def generate(purpose: str, size: int) -> Iterator[tuple[int, Question]]:
        source = reasoning_gym.create_dataset(
            "gsm_symbolic", seed=int(hex_digest(str(seed), purpose)[:8], 16), size=size
        )
        for template, entry in zip(source.task_indices, source, strict=True):
            worked = _worked_answer(entry["metadata"]["answer_cot"], entry["answer"])
            spec = {"answer": _number(entry["answer"], entry["question"])}
            yield (
                template,
                Question(entry["question"], entry["answer"], worked, spec, str(template)),
            )

    examples: dict[int, Question] = {}
    for template, question in generate("few-shot examples", 100 * task.few_shot + 1):
        if len(examples) < task.few_shot:
            examples.setdefault(template, question)
    candidates = generate("questions", 10 * task.num_prompts + 1000)
    questions = (question for template, question in candidates if template not in examples)
    return questions, list(examples.values())


def gsm8k(task: Gsm8k, seed: int) -> tuple[Iterator[Question], list[Question]]:
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


def json_lines(task: JsonLines, seed: int) -> tuple[Iterator[Question], list[Question]]:
    """The user's questions: JSON lines with "question", and "answer" and "template" if they like.

    Few-shot examples are taken from those that have an answer, and are not asked.
    """
    questions = []
    for place, line in _lines(task.path):
        questions.append(_own_question(line, place, task.match))
    ordered = _in_seeded_order(questions, seed)
    examples = [question for question in ordered if question.reference is not None]
    examples = examples[len(examples) - task.few_shot :] if task.few_shot else []
    return iter([question for question in ordered if question not in examples]), examples


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of each line that is not blank, never more than one line in memory.

    Raises:
        TaskError: a line is no UTF-8, or longer than `MAX_LINE_CHARACTERS`; names it.
    """
    number = 1
    with path.open(encoding="utf-8", newline="\n") as file:
        while True:
            try:
                line = file.readline(MAX_LINE_CHARACTERS + 1)
            except UnicodeDecodeError as error:
                raise TaskError(f"{path}:{number} or a line behind it: {error}") from None
            if not line:
                return
            if len(line) > MAX_LINE_CHARACTERS:
                raise TaskError(
                    f"{path}:{number}: a line has at most {MAX_LINE_CHARACTERS:,} characters"
                )
            if line.strip():
                yield f"{path}:{number}", line
            number += 1


def _parsed(line: str, place: str) -> object:
    """What a line of JSON says, in text that can be written as UTF-8."""
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{place}: no JSON object with a question: {error}") from None
    return row


def _own_question(line: str, place: str, match: str) -> Question:
    row = _parsed(line, place)
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        raise TaskError(
            f'{place}: expected a JSON object with a text "question", got {shortened(row)}'
        )
    answer, template = row.get("answer"), row.get("template")
    if answer is not None and (
        isinstance(answer, bool) or not isinstance(answer, str | int | float)
    ):
        raise TaskError(
            f'{place}: "answer" must be a text, a number or null, got {shortened(answer)}'
        )
    if template is not None and not isinstance(template, str):
        raise TaskError(f'{place}: "template" must be a text, got {shortened(template)}')
    reference = None if answer is None else str(answer)
    expected = reference
    if reference is not None:
        expected = canonical_number(reference) if match == "number" else canonical_text(reference)
        if not expected:
            wanted = "number" if match == "number" else "word"
            raise TaskError(f'{place}: "answer" holds no {wanted}: {shortened(answer)}')
    spec = {"answer": expected, "match": match}
    return Question(row["question"], reference, reference or "", spec, template)


def _number(reference: str, question: str) -> str:
    number = canonical_number(reference)
    if number is None:
        raise TaskError(f"reference {reference!r} of {question!r} is no number")
    return number


def _in_seeded_order(questions: list[Question], seed: int) -> list[Question]:
    return sorted(questions, key=lambda q: hex_digest(str(seed), q.question, q.reference or ""))


def _gsm8k_rows(task: Gsm8k, path: Path | None, split: str) -> list[Question]:
    if path is not None:
        rows = [_json_row(line, place) for place, line in _lines(path)]
    else:
        rows = [
            (row["question"], row["answer"], f"{task.repository} {split}")
            for row in _hub_rows(task, split)
        ]
    questions = []
    for question, answer, place in rows:
        reference = answer.rpartition("####")[2].strip()
        number = canonical_number(reference)
        if number is None:
            raise TaskError(f"{place}: the answer ends in no number: {answer[-80:]!r}")
        worked = _worked_answer(re.sub(r"<<[^<>]*>>", "", answer), reference)
        questions.append(Question(question.strip(), reference, worked, {"answer": number}))
    return questions


def _json_row(line: str, place: str) -> tuple[str, str, str]:
    try:
        row: Any = _parsed(line, place)
        question, answer = row["question"], row["answer"]
    except (KeyError, TypeError, IndexError) as error:
        raise TaskError(
            f'{place}: expected one JSON object with "question" and "answer" a line: {error!r}'
        ) from None
    if not (isinstance(question, str) and isinstance(answer, str) and question.strip()):
        raise TaskError(f'{place}: "question" and "answer" must be texts, got {shortened(row)}')
    return question, answer, place


def _hub_rows(task: Gsm8k, split: str) -> list[dict[str, str]]:
    import datasets

    try:
        return list(
            datasets.load_dataset(task.repository, "main", revision=task.revision, split=split)
        )
    except (OSError, ValueError) as error:
        raise TaskError(
            f"tasks.{task.name}.repository: {task.repository!r} at {task.revision} cannot be read "
            f"from the hub; without the hub, give test_path and train_path: {error}"
        ) from error


def _worked_answer(text: str, reference: str) -> str:
    """The worked answer with one last line ``#### <reference>``."""
    steps = text.rpartition("####")[0] if "####" in text else ""
    return f"{steps.rstrip()}\n#### {reference}".strip()
