"""What a task is, and how an answer to it is judged.

A task's kind names a generator (`prompts.GENERATORS`), which makes questions with a ``spec`` each,
and a verifier here, which judges any text by that ``spec`` alone. The spec is plain JSON, so that a
table of prompts is all that judging an answer takes.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kvguard.answers import extract_answer

Spec = Mapping[str, Any]
"""What a verifier needs to know of one prompt; built-ins only."""


class TaskError(ValueError):
    """A task that cannot give what was asked; the message names the field and the value."""


class Question(NamedTuple):
    """One question of a task.

    Attributes:
        question: the user's turn.
        reference: the right answer as people read it; None where there is no right answer.
        worked: the answer that a few-shot example shows.
        spec: what the kind's verifier needs.
        template: what the question was drawn from; None where no other question shares it.
    """

    question: str
    reference: str | None
    worked: str
    spec: Spec
    template: str | None = None


class Verdict(NamedTuple):
    """What a verifier says of a text.

    Attributes:
        score: share of the items that are right, in [0, 1]; higher is better. None where the task
            has no right answer.
        right: the whole answer is right; None where the task has no right answer.
        answer: what the text answers, so written that equal answers compare equal; None: nothing.
        first_wrong_item: number of the first item that is wrong or missing, from 0; None when right
            or where there are no items.
        first_wrong_character: where in the text that item starts, or the text's length where it is
            missing; None as for ``first_wrong_item``.
    """

    score: float | None
    right: bool | None
    answer: str | None
    first_wrong_item: int | None = None
    first_wrong_character: int | None = None


def verify(kind: str, spec: Spec | str, text: str) -> Verdict:
    """Judge a text by its prompt's spec. Never raises because of the text.

    Args:
        kind: a task's kind, see `config.Task`.
        spec: the prompt's spec, or its JSON.
        text: any text.
    """
    return VERIFIERS[kind](json.loads(spec) if isinstance(spec, str) else spec, text)


def hex_digest(*parts: str) -> str:
    """SHA-256 over texts, as 64 hex digits."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


def _marked_number(spec: Spec, text: str) -> Verdict:
    """A number after ``####`` or in a box; none found counts as wrong."""
    answer = extract_answer(text)
    right = answer == spec["answer"]
    return Verdict(float(right), right, answer)


VERIFIERS: dict[str, Callable[[Spec, str], Verdict]] = {
    "gsm8k": _marked_number,
    "gsm_symbolic": _marked_number,
}
"""Every kind of task and how its answers are judged."""
