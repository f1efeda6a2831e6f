"""Generated tasks and verifiers: right answers pass, damaged ones fail where they were damaged."""

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from kvguard.config import Task
from kvguard.prompts import GENERATORS, Prompt, load_task
from kvguard.tasks import NOUNS, VERIFIERS, TaskError, Verdict, constraint_text, verify

SECTIONS: list[dict[str, Any]] = [
    {"kind": "recall", "items": 6},
    {"kind": "recall", "items": 7, "asked": 3, "question": "first", "distance": 0.5},
    {"kind": "copy", "items": 7},
    {"kind": "copy", "items": 7, "order": "reversed", "filler_sentences": 2},
    {"kind": "copy", "items": 7, "order": "every_second"},
    {"kind": "records", "items": 5, "filler_sentences": 1},
    {"kind": "tool_call", "items": 4, "question": "first"},
    {"kind": "needle", "items": 4, "sentences": 6},
    {"kind": "instructions", "items": 3, "sentences": 3},
    {"kind": "instructions", "items": 2, "constraints": ["quotes", "no_commas", "max_words"]},
]
GENERATED = st.sampled_from(SECTIONS)
LISTS = st.sampled_from([section for section in SECTIONS if section["kind"] in ("copy", "records")])


def made(section: dict[str, Any], num_prompts: int = 3, **more: Any) -> Task:
    task: Task = TypeAdapter(Task).validate_python(section | {"num_prompts": num_prompts} | more)
    return task


def draw(section: dict[str, Any], seed: int) -> Prompt:
    return load_task(made(section, 1), seed)[0][0]


def spec_of(prompt: Prompt) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(prompt.spec)
    return spec


# Generators


def test_every_kind_has_a_generator_and_a_verifier() -> None:
    assert set(GENERATORS) == set(VERIFIERS)


@given(GENERATED, st.integers(0, 1000))
@examples(60)
def test_the_first_prompts_do_not_depend_on_how_many_are_asked(
    section: dict[str, Any], seed: int
) -> None:
    few, examples = load_task(made(section, 2, few_shot=1), seed)
    many, same = load_task(made(section, 5, few_shot=1), seed)
    assert few == many[:2]
    assert examples == same
    assert load_task(made(section, 5), seed + 1)[0] != many
    assert len({prompt.prompt_id for prompt in many}) == 5


@given(GENERATED, st.integers(0, 1000))
@examples(60)
def test_a_right_answer_stands_in_the_prompt_and_verifies(
    section: dict[str, Any], seed: int
) -> None:
    prompts, examples = load_task(made(section, 2, few_shot=1), seed)
    for prompt in prompts:
        assert prompt.reference is not None
        verdict = verify(prompt.kind, prompt.spec, prompt.reference)
        assert verdict == Verdict(1.0, True, verdict.answer)
        spec = spec_of(prompt)
        for item in map(str, spec.get("items", [])):
            assert item in prompt.question
        for value in spec.get("arguments", {}).values():
            assert str(value) in prompt.question
    assert examples[0].answer


@given(GENERATED, st.integers(0, 1000))
@examples(60)
def test_the_answer_to_another_prompt_is_wrong(section: dict[str, Any], seed: int) -> None:
    one, other = draw(section, seed), draw(section, seed + 1)
    if one.kind == "instructions" or one.spec == other.spec:
        return  # another answer may obey the same constraints
    if one.reference == other.reference:
        return  # two prompts may ask for the same word
    assert not verify(one.kind, one.spec, other.reference or "").right


@pytest.mark.parametrize("distance", [0.0, 1.0])
@pytest.mark.parametrize("question", ["first", "last"])
def test_knobs_place_what_is_asked_for(distance: float, question: str) -> None:
    for seed in range(5):
        recall = draw(
            {"kind": "recall", "items": 9, "distance": distance, "question": question}, seed
        )
        lines = [line for line in recall.question.splitlines() if line.startswith("The code")]
        asked = lines[-1 if distance == 0 else 0]
        assert spec_of(recall)["items"][0] in asked
        assert recall.question.startswith("What") == (question == "first")
        needle = {"kind": "needle", "items": 3, "sentences": 5, "distance": distance}
        hidden = draw(needle | {"question": question}, seed)
        told = re.findall(r"In \w+ the secret word is (\w+)\.", hidden.question)
        assert told[-1 if distance == 0 else 0] == spec_of(hidden)["answer"]
        assert len(told) == 3


def test_instructions_stand_before_the_passage_and_the_question_after_it() -> None:
    prompt = draw({"kind": "instructions", "items": 3}, 0)
    rules, passage, question = prompt.question.split("\n\n")
    assert rules.count(". ") >= 3
    for constraint in spec_of(prompt)["constraints"]:
        assert constraint_text(constraint) in rules
    assert passage.startswith("Text: ")
    assert question.startswith("Question: ")


def test_hidden_words_are_in_no_other_text() -> None:
    needle = draw({"kind": "needle", "items": 1, "sentences": 400}, 0)
    words = set(re.findall(r"\w+", needle.question.lower()))
    assert words & set(NOUNS) == {spec_of(needle)["answer"]}


# Corruption: wrong exactly where it was done


@given(LISTS, st.integers(0, 1000), st.data())
@examples(80)
def test_a_changed_item_is_the_first_wrong_one(
    section: dict[str, Any], seed: int, data: st.DataObject
) -> None:
    prompt = draw(section, seed)
    items = spec_of(prompt)["items"]
    place = data.draw(st.integers(0, len(items) - 1))
    joint = data.draw(st.sampled_from([", ", "\n", "; ", "\n- ", "\n* "]))
    head = data.draw(st.sampled_from(["", "Here is the list: ", "Sure, the values are:\n"]))
    damaged = [*items[:place], "zeppelin", *items[place + 1 :]]
    lead = joint.lstrip() if joint.startswith("\n") else ""
    text = head + lead + joint.join(damaged)
    verdict = verify(prompt.kind, prompt.spec, text)
    assert verdict.right is False
    assert verdict.first_wrong_item == place
    assert verdict.first_wrong_character == text.index("zeppelin")
    assert verdict.score == pytest.approx(1 - 1 / len(items))
    assert verify(prompt.kind, prompt.spec, head + lead + joint.join(items)).right


@given(LISTS, st.integers(0, 1000), st.data())
@examples(60)
def test_a_list_that_stops_early_or_goes_on_is_wrong_there(
    section: dict[str, Any], seed: int, data: st.DataObject
) -> None:
    prompt = draw(section, seed)
    items = spec_of(prompt)["items"]
    kept = data.draw(st.integers(1, len(items) - 1))
    short = ", ".join(items[:kept])
    verdict = verify(prompt.kind, prompt.spec, short)
    assert (verdict.right, verdict.first_wrong_item) == (False, kept)
    assert verdict.first_wrong_character == len(short)
    long = ", ".join([*items, "zeppelin"])
    verdict = verify(prompt.kind, prompt.spec, long)
    assert (verdict.right, verdict.first_wrong_item) == (False, len(items))
    assert verdict.first_wrong_character == long.index("zeppelin")


@given(st.integers(0, 1000), st.data())
@examples(60)
def test_a_changed_code_is_the_first_wrong_one(seed: int, data: st.DataObject) -> None:
    prompt = draw({"kind": "recall", "items": 8, "asked": 4}, seed)
    items = spec_of(prompt)["items"]
    place = data.draw(st.integers(0, 3))
    other = str(int(items[place]) + 10_000)
    text = "The codes are " + ", ".join([*items[:place], other, *items[place + 1 :]]) + "."
    verdict = verify("recall", prompt.spec, text)
    assert (verdict.right, verdict.first_wrong_item) == (False, place)
    assert verdict.first_wrong_character == text.index(other)
    numbered = "\n".join(f"{i}. the {i}th code: {code}" for i, code in enumerate(items, 1))
    assert verify("recall", prompt.spec, numbered).right


def test_a_code_said_twice_counts_once_and_a_second_code_is_wrong() -> None:
    spec = {"items": ["4821"]}
    assert verify("recall", spec, "It is 4821. The code is 4,821.").right
    verdict = verify("recall", spec, "It is 4821 or 1234.")
    assert verdict == Verdict(0.5, False, "4821, 1234", 1, 14)
    assert verify("recall", spec, "The code is 482") == Verdict(0.0, False, "482", 0, 12)
    assert verify("recall", spec, "I do not know.") == Verdict(0.0, False, None, 0, 14)


@given(st.integers(0, 1000), st.data())
@examples(60)
def test_a_changed_argument_is_the_first_wrong_one(seed: int, data: st.DataObject) -> None:
    prompt = draw({"kind": "tool_call", "items": 4}, seed)
    spec = spec_of(prompt)
    keys = ["name", *spec["arguments"]]
    place = data.draw(st.integers(0, len(keys) - 1))
    call = json.loads(prompt.spec)
    if place == 0:
        call["name"] = "zeppelin"
    else:
        call["arguments"][keys[place]] = "zeppelin"
    text = f"```json\n{json.dumps(call, indent=data.draw(st.sampled_from([None, 2])))}\n```"
    verdict = verify("tool_call", prompt.spec, text)
    assert (verdict.right, verdict.first_wrong_item) == (False, place)
    assert verdict.first_wrong_character == text.index('"zeppelin"')
    assert verdict.score == pytest.approx(1 - 1 / len(keys))


def test_a_call_must_be_the_object_that_was_asked_for() -> None:
    spec = {"name": "rent_car", "arguments": {"city": "Oslo", "days": 3}}
    right = '{"arguments": {"days": "3", "city": "Oslo"}, "name": "rent_car"}'
    assert verify("tool_call", spec, f"Here it is:\n{right} Anything else?").right
    flat = 'Ok {"name": "rent_car", "city": "Oslo", "days": 3}'
    verdict = verify("tool_call", spec, flat)
    assert (verdict.right, verdict.first_wrong_item) == (False, 0)
    assert verdict.first_wrong_character == flat.index("{")
    cut = '{"name": "rent_car", "arguments": {"city": "Oslo", "da'
    verdict = verify("tool_call", spec, cut)
    assert (verdict.right, verdict.first_wrong_item) == (False, 2)
    assert verdict.first_wrong_character == len(cut)
    more = '{"name": "rent_car", "arguments": {"city": "Oslo", "days": 3, "fast": true}}'
    assert verify("tool_call", spec, more).right is False


def test_a_hidden_word_and_no_other() -> None:
    spec = {"answer": "anchor", "others": ["river"]}
    assert verify("needle", spec, "The secret word is 'Anchor'.") == Verdict(1.0, True, "anchor")
    wrong = verify("needle", spec, "The secret word is river.")
    assert wrong == Verdict(0.0, False, "river", 0, 19)
    both = verify("needle", spec, "It is anchor, or river.")
    assert (both.right, both.first_wrong_item, both.first_wrong_character) == (False, 1, 17)


@pytest.mark.parametrize(
    ("constraint", "obeyed", "violated", "place"),
    [
        ({"type": "uppercase"}, "ALL OF IT 12!", "ALL of it", 4),
        ({"type": "lowercase"}, "all of it.", "all of It", 7),
        ({"type": "no_commas"}, "one and two", "one, two", 3),
        ({"type": "start", "text": "Answer:"}, ' "answer: yes"', " Yes. Answer: yes", 1),
        ({"type": "end", "text": "Over and out."}, "Yes. OVER AND OUT!", "Over and out. Bye", 17),
        ({"type": "include", "text": "proud"}, "A Proud one", "proudly", 7),
        ({"type": "quotes"}, '"yes"', '"yes', 4),
        ({"type": "quotes"}, ' "yes" ', "yes", 0),
        ({"type": "max_words", "words": 3}, "one two three", "one two three four", 14),
    ],
)
def test_constraints_by_hand(
    constraint: dict[str, Any], obeyed: str, violated: str, place: int
) -> None:
    spec = {"constraints": [constraint], "fact": "anchor"}
    assert verify("instructions", spec, obeyed).right
    assert verify("instructions", spec, violated) == Verdict(
        0.0, False, "no fact, obeyed 0", 0, place
    )
    assert not verify("instructions", spec, "").right


def test_the_earliest_violation_counts() -> None:
    constraints = [
        {"type": "end", "text": "That is all."},
        {"type": "uppercase"},
        {"type": "no_commas"},
    ]
    spec = {"constraints": constraints, "fact": "anchor"}
    verdict = verify("instructions", spec, "THE anchor")
    assert verdict == Verdict(pytest.approx(1 / 3), False, "anchor, obeyed 001", 1, 4)


@given(st.sampled_from(SECTIONS), st.integers(0, 50), st.text())
@examples(300)
def test_verifiers_never_fail_on_any_text(section: dict[str, Any], seed: int, text: str) -> None:
    prompt = draw(section, seed)
    for judged in (text, text + (prompt.reference or "") + text, '{"name": ' + text, "{" * 9000):
        verdict = verify(prompt.kind, prompt.spec, judged)
        assert verdict.right in (True, False)
        assert verdict.score is not None
        assert 0 <= verdict.score <= 1
        assert (verdict.score == 1) == verdict.right
        assert (verdict.first_wrong_item is None) == verdict.right
        if verdict.first_wrong_character is not None:
            assert 0 <= verdict.first_wrong_character <= len(judged)


# The user's own lines


def lines(tmp_path: Path, *rows: object) -> dict[str, Any]:
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return {"kind": "json_lines", "path": str(path)}


def test_own_questions_with_text_numbers_or_no_answer(tmp_path: Path) -> None:
    rows = [
        {"question": "Capital of Norway?", "answer": "Oslo", "template": "capitals"},
        {"question": "Tell me a joke."},
    ]
    prompts, _ = load_task(made(lines(tmp_path, *rows), 2), seed=0)
    capital, joke = sorted(prompts, key=lambda prompt: prompt.question)
    assert (capital.template, joke.template) == ("capitals", None)
    assert verify(capital.kind, capital.spec, "Let me think.\n**oslo.**").right
    assert not verify(capital.kind, capital.spec, "It is Oslo, I think.").right
    assert joke.reference is None
    verdict = verify(joke.kind, joke.spec, "Why not?")
    assert verdict == Verdict(None, None, "why not?")
    numeric = lines(tmp_path, {"question": "3 x 4?", "answer": 12}) | {"match": "number"}
    (product,), _ = load_task(made(numeric, 1), seed=0)
    for right in ("12", "3 times 4 is 12.", "#### 12", "It is $12.00"):
        assert verify(product.kind, product.spec, right).right, right
    assert not verify(product.kind, product.spec, "12 or 13").right
    assert not verify(product.kind, product.spec, "twelve").right


def test_own_examples_are_not_asked(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(6)] + [{"question": "Why?"}]
    prompts, examples = load_task(made(lines(tmp_path, *rows), 4, few_shot=3), seed=1)
    assert len(examples) == 3
    assert not {prompt.question for prompt in prompts} & {turn.question for turn in examples}
    assert all(turn.answer == turn.question[0] for turn in examples)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": "x"}, 'a text "question"'),
        (["question"], 'a text "question"'),
        ({"question": "?", "answer": [1]}, '"answer" must be'),
        ({"question": "?", "answer": "..."}, "holds no word"),
        ({"question": "?", "template": 3}, '"template" must be a text'),
    ],
)
def test_a_bad_line_of_ones_own_is_named(row: object, said: str, tmp_path: Path) -> None:
    section = lines(tmp_path, {"question": "ok?", "answer": "1"}, row)
    with pytest.raises(TaskError, match=said) as error:
        load_task(made(section, 1), seed=0)
    assert f"{section['path']}:2: " in str(error.value)


def test_draws_are_as_different_as_they_can_be() -> None:
    """A seed decides everything; prompts of one task have no template in common."""
    prompts, _ = load_task(made({"kind": "recall"}, 200), seed=3)
    answers = [spec_of(prompt)["items"][0] for prompt in prompts]
    assert len(set(answers)) > 190
    assert {prompt.template for prompt in prompts} == {None}
    questions, _ = GENERATORS["recall"](made({"kind": "recall"}), 3)
    assert [entry.question for entry in islice(questions, 3)] == [
        prompt.question for prompt in prompts[:3]
    ]
