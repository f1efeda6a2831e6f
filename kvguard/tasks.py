"""What a task is, and how an answer to it is judged.

A task's kind names a generator (`prompts.GENERATORS`), which makes questions with a ``spec`` each,
and a verifier here, which judges any text by that ``spec`` alone. The spec is plain JSON, so that
an answer can be judged from the table of prompts alone.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kvguard.answers import canonical_number, extract_answer

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


def words(text: str, separator: str | None = None) -> list[str]:
    """The parts of a text, as a list."""
    return text.split(separator)


NOUNS = words(
    "anchor apple basket blanket bottle bridge bucket candle carpet castle chair clock cloud coin "
    "compass curtain diamond drawer engine feather fence flower fountain garden glove hammer "
    "helmet island jacket kettle ladder lantern lemon magnet marble mirror mountain needle "
    "orchard paddle pepper pillow planet pocket pumpkin ribbon river rocket saddle scarf shovel "
    "spoon statue sugar table ticket tunnel umbrella valley wagon whistle window winter yarn"
)
"""Words that generated tasks list and hide; no other text of theirs holds one."""


class Found(NamedTuple):
    """An item read out of a text, and the character at which it starts."""

    item: str
    start: int


def _marked_number(spec: Spec, text: str) -> Verdict:
    """A number after ``####`` or in a box; none found counts as wrong."""
    answer = extract_answer(text)
    right = answer == spec["answer"]
    return Verdict(float(right), right, answer)


def _codes(spec: Spec, text: str) -> Verdict:
    """Numbers of several digits, each counted where it stands first, in the asked order."""
    found: dict[str, Found] = {}
    for number in re.finditer(r"[0-9]+(?:,[0-9]{3})*", text):
        code = number[0].replace(",", "")
        if len(code) > 1:
            found.setdefault(code, Found(code, number.start()))
    return _compare(spec["items"], list(found.values()), text)


def _list(spec: Spec, text: str) -> Verdict:
    """The items of a list: comma-separated, numbered or bulleted, labels allowed."""
    return _compare(spec["items"], _listed(text, spec["items"]), text)


def _compare(expected: list[str], found: list[Found], text: str) -> Verdict:
    """Compare items place by place; one that is missing is wrong where the text ends."""
    wanted = [item.casefold() for item in expected]
    got = [entry.item.casefold() for entry in found]
    same = [a == b for a, b in zip(wanted, got, strict=False)]
    score = sum(same) / max(len(wanted), len(got))
    answer = ", ".join(got) or None
    if wanted == got:
        return Verdict(1.0, True, answer)
    wrong = same.index(False) if False in same else len(same)
    start = found[wrong].start if wrong < len(found) else len(text)
    return Verdict(score, False, answer, wrong, start)


_MARKS = re.compile(r"(^|[\n,;:])([^\S\n]*+(?:[-*•]|\(?[0-9]{1,2}[.)])(?=\s))")
_SEPARATOR = re.compile(r"[,;\n]|\.(?=\s|$)|\band\b")
_LABEL = re.compile(r"[^\W\d][\w ]{0,24}:\s+")
_DECORATION = " \t\r\"'`*_[](){}.!“”‘’"
_PROSE_WORDS = 4


def _listed(text: str, expected: list[str]) -> list[Found]:
    """Items of a list in a text; an introduction and pieces of more than 4 words are not items."""
    text = _MARKS.sub(lambda mark: mark[1] + " " * len(mark[2]), text)
    head = text.partition(":")[0]
    words = set(re.findall(r"\w+", head.casefold()))
    named = any(set(item.casefold().split()) <= words for item in expected)
    start = len(head) + 1 if len(head) < len(text) and not named else 0
    found, bounds = [], [*(match.span() for match in _SEPARATOR.finditer(text, start))]
    for stop, following in [*bounds, (len(text), len(text))]:
        piece = text[start:stop]
        label = _LABEL.match(piece.lstrip(_DECORATION))
        skipped = len(piece) - len(piece.lstrip(_DECORATION)) + (label.end() if label else 0)
        item = piece[skipped:].strip(_DECORATION)
        if item and len(item.split()) <= _PROSE_WORDS:
            found.append(Found(item, start + piece.index(item, skipped)))
        start = following
    return found


def _tool_call(spec: Spec, text: str) -> Verdict:
    """A JSON object with the tool's name and its arguments; text around it is ignored.

    Item 0 is the name, the arguments follow in the order of the spec. A value that is written as
    text where a number is meant counts as right, and the other way round.
    """
    opening = text.find("{")
    try:
        call, _ = json.JSONDecoder().raw_decode(text, max(opening, 0))
    except (ValueError, RecursionError):
        call = None
    expected = [("name", spec["name"]), *spec["arguments"].items()]
    same, starts = [], []
    for key, value in expected:
        pattern = rf'"{re.escape(key)}"\s*:\s*("(?:[^"\\]|\\.)*"|[-+0-9.eE]+|\w+)'
        leaf = re.compile(pattern).search(text, max(opening, 0))
        same.append(leaf is not None and _leaf(leaf[1].strip('"')) == _leaf(value))
        starts.append(len(text) if leaf is None else leaf.start(1))
    arguments = call.get("arguments") if isinstance(call, dict) else None
    right = (
        isinstance(call, dict)
        and isinstance(arguments, dict)
        and set(call) == {"name", "arguments"}
        and _leaf(call["name"]) == _leaf(spec["name"])
        and {key: _leaf(value) for key, value in arguments.items()}
        == {key: _leaf(value) for key, value in spec["arguments"].items()}
    )
    answer = json.dumps(call, sort_keys=True) if isinstance(call, dict) else None
    if right:
        return Verdict(1.0, True, answer)
    score = sum(same) / len(same)
    if all(same):  # every value stands there, but not in an object of the form that was asked for
        return Verdict(score * (1 - 1 / (len(same) + 1)), False, answer, 0, max(opening, 0))
    wrong = same.index(False)
    return Verdict(score, False, answer, wrong, starts[wrong])


def _leaf(value: object) -> str:
    return " ".join(str(value).casefold().split())


def _fact(spec: Spec, text: str) -> Verdict:
    """One hidden word; naming another one as well is wrong."""
    found: dict[str, Found] = {}
    for word in re.finditer(r"[^\W\d_]+", text):
        if word[0].casefold() in _NOUN_SET:
            found.setdefault(word[0].casefold(), Found(word[0].casefold(), word.start()))
    return _compare([spec["answer"]], list(found.values()), text)


_NOUN_SET = frozenset(NOUNS)


def constraint_text(constraint: Mapping[str, Any]) -> str:
    """A constraint as the user says it."""
    return {
        "uppercase": "Write in capital letters only.",
        "lowercase": "Write in lowercase letters only.",
        "no_commas": "Do not use any commas.",
        "start": 'Begin your answer with "{text}"',
        "end": 'End your answer with "{text}"',
        "include": 'Use the word "{text}" in your answer.',
        "quotes": "Put your whole answer in double quotation marks.",
        "max_words": "Use at most {words} words.",
    }[constraint["type"]].format(**constraint)


def _violation(constraint: Mapping[str, Any], text: str) -> int | None:
    """The character at which a constraint is first violated; None where it is obeyed.

    A text without a word violates everything. What is missing counts as violated at the text's end.
    """
    kind, stripped = constraint["type"], text.strip()
    if not re.search(r"\w", text):
        return len(text)
    first: re.Match[str] | None = None
    if kind in ("uppercase", "lowercase"):
        for index, character in enumerate(text):
            if character.islower() if kind == "uppercase" else character.isupper():
                return index
    elif kind == "no_commas":
        first = re.search(",", text)
    elif kind == "start":
        begins = stripped.lstrip(_DECORATION).casefold().startswith(constraint["text"].casefold())
        return None if begins else len(text) - len(text.lstrip())
    elif kind == "end":
        ending = constraint["text"].casefold().rstrip(_DECORATION)
        return None if stripped.casefold().rstrip(_DECORATION).endswith(ending) else len(text)
    elif kind == "include":
        named = re.search(rf"\b{re.escape(constraint['text'])}\b", text, re.IGNORECASE)
        return None if named else len(text)
    elif kind == "quotes":
        if not stripped.startswith('"'):
            return len(text) - len(text.lstrip())
        return None if len(stripped) > 1 and stripped.endswith('"') else len(text)
    else:
        words = list(re.finditer(r"\S+", text))
        return words[constraint["words"]].start() if len(words) > constraint["words"] else None
    return first.start() if first else None


def _obeyed(spec: Spec, text: str) -> Verdict:
    """Constraints on the form of the answer, as IFEval checks them (2311.07911).

    Right is obeying all of them. The answer also says whether the fact that was asked for is
    there, so that agreement is about both.
    """
    violations = [_violation(constraint, text) for constraint in spec["constraints"]]
    fact = re.search(rf"\b{re.escape(spec['fact'])}\b", text, re.IGNORECASE)
    obeyed = "".join("0" if place is not None else "1" for place in violations)
    answer = f"{spec['fact'] if fact else 'no fact'}, obeyed {obeyed}"
    broken = [(place, item) for item, place in enumerate(violations) if place is not None]
    score = 1 - len(broken) / len(violations)
    if not broken:
        return Verdict(score, True, answer)
    place, item = min(broken)
    return Verdict(score, False, answer, item, place)


def _plain(spec: Spec, text: str) -> Verdict:
    """The user's own questions: an exact text, a number, or no right answer at all."""
    if spec["match"] == "number":
        answer = extract_answer(text) or _last_number(text)
    else:
        lines = [_leaf(line).strip(_DECORATION) for line in text.splitlines()]
        answer = next((line for line in reversed(lines) if line), None)
    if spec["answer"] is None:
        return Verdict(None, None, answer)
    right = answer == spec["answer"]
    if spec["match"] == "exact":
        right = right or _leaf(text).strip(_DECORATION) == spec["answer"]
    return Verdict(float(right), right, spec["answer"] if right else answer)


def canonical_text(text: str) -> str:
    """A text so written that answers that differ in case, spaces and full stops are equal."""
    return _leaf(text).strip(_DECORATION)


def _last_number(text: str) -> str | None:
    numbers = re.findall(r"[-+]?[$€£]?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?", text)
    return next((n for n in map(canonical_number, reversed(numbers)) if n is not None), None)


VERIFIERS: dict[str, Callable[[Spec, str], Verdict]] = {
    "gsm8k": _marked_number,
    "gsm_symbolic": _marked_number,
    "recall": _codes,
    "copy": _list,
    "records": _list,
    "tool_call": _tool_call,
    "needle": _fact,
    "instructions": _obeyed,
    "json_lines": _plain,
}
"""Every kind of task and how its answers are judged."""

INSTRUCTION_KINDS = ("instructions",)
"""Kinds whose right answers are those that obey what was asked: their failure is amnesia."""
