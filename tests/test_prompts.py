"""Tasks, chat formatting and answers."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from decimal import Decimal
from difflib import SequenceMatcher
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from kvguard.answers import canonical_number, extract_answer
from kvguard.config import Gsm8k, GsmSymbolic
from kvguard.models import LoadedModel
from kvguard.prompts import (
    Example,
    PromptError,
    format_prompt,
    load_task,
    load_tasks,
    make_prompt_id,
    prompts_frame,
    read_examples,
    read_prompts,
    write_examples,
)
from kvguard.schema import PROMPTS, check, write_table
from kvguard.shared_prefix import shared_prefix_tokens
from kvguard.tasks import TaskError, Verdict, verify

REVISION = "0123456789abcdef0123456789abcdef01234567"


# Answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("18", "18"),
        ("1,000", "1000"),
        ("1000.00", "1000"),
        ("$1000", "1000"),
        ("$1,234,567.50", "2469135/2"),
        ("US$ 40", "40"),
        ("USD 40", "40"),
        ("£7", "7"),
        ("-5", "-5"),
        ("+5", "5"),
        ("- 5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("\N{MINUS SIGN}5", "-5"),
        ("-0", "0"),
        ("007", "7"),
        (".5", "1/2"),
        ("0.125", "1/8"),
        ("18.", "18"),
        ("18 dollars", "18"),
        ("18kg", "18"),
        ("50%", "50"),
        (r"50\%", "50"),
        ("3/4", "3/4"),
        ("6/8 of the cake", "3/4"),
        ("18/3", "6"),
        ("1 1/2 cups", "3/2"),
        ("-1 1/2", "-3/2"),
        ("5 -3/4", "5"),
        ("½", "1/2"),
        ("2½ cups", "5/2"),
        (r"\frac{3}{4}", "3/4"),
        (r"-\dfrac{3}{4}", "-3/4"),
        (r"\frac{-3}{4}", "-3/4"),
        (r"1\frac{1}{2}", "3/2"),
        (r"\text{18 dollars}", "18"),
        (r"18\text{ dollars}", "18"),
        (r"\$18.00", "18"),
        ("$18$", "18"),
        ("1{,}000", "1000"),
        (r"1\,000\,000", "1000000"),
        ("1\N{NARROW NO-BREAK SPACE}000", "1000"),
        ("**18**", "18"),
        ("(18)", "18"),
        ("x = 18", "18"),
        ("2 + 3 = 5 apples", "5"),
        ("The answer is 18", "18"),
        ("Answer: 18", "18"),
        ("1e3", "1000"),
        ("1,23", "1"),  # no thousands separator: the number ends at the comma
        ("3-4", "3"),  # a range: its start
    ],
)
def test_canonical_number(text: str, answer: str) -> None:
    assert canonical_number(text) == answer


@pytest.mark.parametrize(
    "text",
    ["", " ", "apples", "about ten", "x", "/3", "3/0", "$", "-", r"\frac{a}{b}", "9" * 5000],
)
def test_no_number(text: str) -> None:
    assert canonical_number(text) is None


@given(st.integers(-(10**12), 10**12))
def test_integers_compare_equal_however_written(number: int) -> None:
    sign, size = ("-" if number < 0 else ""), abs(number)
    ways = [f"{sign}{size}", f"{sign}{size:,}", f"{sign}${size:,}.00", f"{sign}{size}.0 apples"]
    ways += [f"**{sign}{size}**", f"$ {sign}{size:,}", f" {sign}{size:,}.", f"{sign}{size}%"]
    ways += [
        f"x = {sign}{size}",
        rf"\${sign}{size}\text{{ dollars}}",
        rf"{sign}\frac{{{size}}}{{1}}",
    ]
    assert {canonical_number(way) for way in ways} == {str(number)}


@given(st.integers(-999, 999), st.integers(1, 999))
def test_fractions_are_reduced(upper: int, lower: int) -> None:
    expected = str(Fraction(upper, lower))
    assert canonical_number(f"{upper}/{lower}") == expected
    assert canonical_number(rf"\frac{{{upper}}}{{{lower}}}") == expected
    assert canonical_number(expected) == expected  # a canonical form stays as it is


@given(
    st.decimals(-(10**6), 10**6, places=3),
    st.decimals(-(10**6), 10**6, places=3),
)
def test_decimals_agree_exactly_when_equal(one: Decimal, other: Decimal) -> None:
    assert (canonical_number(f"{one:f}") == canonical_number(f"{other:,f}")) == (one == other)
    assert canonical_number(f"{one:f}") == canonical_number(f"{one:f}000")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 5\nNo wait.\n#### 6", "6"),
        ("#### 6\n\nQuestion: more\n####", "6"),  # cut off: the last one that holds a number
        ("so it is\n####18", "18"),
        ("####\n18", "18"),
        (r"first \boxed{5}, then \boxed{\frac{3}{4}}", "3/4"),
        (r"\boxed{7} but #### 8", "8"),  # the marker that the task asks for wins
        (r"#### 8, checked: \boxed{7}", "8"),
        (r"#### Step 2: add" + "\n" + r"\boxed{7}", "7"),  # a heading is not an answer
        (r"#### \boxed{7}", "7"),
        (r"\boxed{x = \$1{,}000}", "1000"),
        (r"\boxed{\text{18 dollars}}", "18"),
    ],
)
def test_extract_answer(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    ["", "The answer is 18.", "##### 5", "### 5", r"\boxed{", r"\boxed{5", r"\boxed{x}", "#### ?"],
)
def test_no_answer_found_is_none(text: str) -> None:
    assert extract_answer(text) is None


@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=5),
    st.text(st.characters(codec="utf-8", exclude_characters="#\\"), max_size=40),
)
def test_the_last_marker_counts(numbers: list[int], between: str) -> None:
    text = "".join(f"{between}\n#### {number:,}\n" for number in numbers)
    assert extract_answer(text + between) == str(numbers[-1])


@given(st.text(st.sampled_from("#$%&\\{}()[]boxedfrac 0123456789.,/+-−½eE=\n"), max_size=80))
def test_any_text_is_read_or_not_but_never_an_error(text: str) -> None:
    answer = extract_answer(text)
    assert answer is None or str(Fraction(answer)) == answer


def test_a_marked_number_is_right_or_wrong_and_no_answer_is_wrong() -> None:
    assert verify("gsm8k", {"answer": "1000"}, "#### 1,000") == Verdict(1.0, True, "1000")
    assert verify("gsm8k", '{"answer": "1000"}', "#### 999") == Verdict(0.0, False, "999")
    assert verify("gsm_symbolic", {"answer": "3"}, "no idea") == Verdict(0.0, False, None)


# GSM8K


def gsm8k_rows(names: list[str]) -> list[dict[str, str]]:
    """Questions with worked answers as GSM8K writes them, calculator annotation included."""
    rows = []
    for left, name in enumerate(names, start=999):
        question = f"{name} has {left + 1} apples and eats 1. How many are left?"
        answer = f"{left + 1}-1 = <<{left + 1}-1={left}>>{left} apples\n#### {left}"
        rows.append({"question": question, "answer": answer})
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gsm8k(tmp_path: Path, **changes: Any) -> Gsm8k:
    test_path, train_path = tmp_path / "test.jsonl", tmp_path / "train.jsonl"
    if not test_path.exists():
        write_rows(test_path, gsm8k_rows([f"Test{number}" for number in range(30)]))
    if not train_path.exists():
        write_rows(train_path, gsm8k_rows([f"Train{number}" for number in range(20)]))
    values: dict[str, Any] = {
        "num_prompts": 10,
        "test_path": test_path,
        "train_path": train_path,
    } | changes
    return Gsm8k(kind="gsm8k", **values)


def test_gsm8k_prompts_and_examples(tmp_path: Path) -> None:
    prompts, examples = load_task(gsm8k(tmp_path), seed=0)
    assert [prompt.index for prompt in prompts] == list(range(10))
    for prompt in prompts:
        number = int(re.findall(r"has (\d+)", prompt.question)[0])
        assert prompt.reference == str(number - 1)
        assert verify(prompt.kind, prompt.spec, f"So #### {number - 1}").right
        assert not verify(prompt.kind, prompt.spec, f"So #### {number}").right
        assert "Test" in prompt.question
    assert len(examples) == 3
    for example in examples:
        number = int(re.findall(r"has (\d+)", example.question)[0])
        assert "Train" in example.question
        assert example.answer == f"{number}-1 = {number - 1} apples\n#### {number - 1}"


def test_prompt_ids_depend_on_content_alone(tmp_path: Path) -> None:
    few, _ = load_task(gsm8k(tmp_path, num_prompts=4), seed=0)
    many, _ = load_task(gsm8k(tmp_path, num_prompts=30), seed=0)
    other, _ = load_task(gsm8k(tmp_path, num_prompts=30, few_shot=0), seed=1)
    assert few == many[:4]
    assert {p.prompt_id for p in many} == {p.prompt_id for p in other}
    assert [p.prompt_id for p in many] != [p.prompt_id for p in other]
    text = json.dumps(["gsm8k", few[0].question, few[0].reference])
    by_hand = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert few[0].prompt_id == by_hand == make_prompt_id("gsm8k", few[0].question, few[0].reference)


def test_order_of_the_file_does_not_matter(tmp_path: Path) -> None:
    before = load_task(gsm8k(tmp_path), seed=3)
    for name in ("test", "train"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines(keepends=True)
        random.Random(0).shuffle(lines)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    assert load_task(gsm8k(tmp_path), seed=3) == before


def test_an_example_is_never_asked(tmp_path: Path) -> None:
    rows = gsm8k_rows([f"Both{number}" for number in range(8)])
    write_rows(tmp_path / "test.jsonl", rows[:5])
    write_rows(tmp_path / "train.jsonl", rows)
    prompts, examples = load_task(gsm8k(tmp_path, num_prompts=5), seed=0)
    assert not {p.question for p in prompts} & {e.question for e in examples}


def test_a_question_twice_in_the_data_is_asked_once(tmp_path: Path) -> None:
    rows = gsm8k_rows(["Ann", "Ben"])
    write_rows(tmp_path / "test.jsonl", rows + rows)
    assert len(load_task(gsm8k(tmp_path, num_prompts=2), seed=0)[0]) == 2
    with pytest.raises(TaskError, match=r"tasks\.gsm8k\.num_prompts: 3 asked, there are 2"):
        load_task(gsm8k(tmp_path, num_prompts=3), seed=0)


def test_more_examples_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"tasks\.gsm8k\.few_shot: 25 asked, there are 20"):
        load_task(gsm8k(tmp_path, few_shot=25), seed=0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "question"),
        ('{"question": "Why?"}', "answer"),
        ('["Why?", "#### 5"]', "question"),
        ('{"question": "Why?", "answer": 5}', "texts"),
        ('{"question": "Why?", "answer": "because"}', "no number"),
    ],
)
def test_a_bad_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    rows = [json.dumps(row) for row in gsm8k_rows(["Ann"])]
    (tmp_path / "test.jsonl").write_text("\n".join([*rows, "", line]) + "\n")
    with pytest.raises(TaskError, match=said) as error:
        load_task(gsm8k(tmp_path, num_prompts=2), seed=0)
    assert f"{tmp_path / 'test.jsonl'}:3" in str(error.value)


def test_hub_data_comes_from_the_pinned_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = load_task(gsm8k(tmp_path), seed=0)
    asked = []

    def load_dataset(repository: str, name: str, *, revision: str, split: str) -> list[Any]:
        asked.append((repository, name, revision, split))
        lines = (tmp_path / f"{split}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = Gsm8k(kind="gsm8k", num_prompts=10, revision=REVISION)
    assert load_task(hub, seed=0) == local
    assert asked == [("openai/gsm8k", "main", REVISION, split) for split in ("test", "train")]


def test_no_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(TaskError, match=r"tasks\.gsm8k\.repository: 'openai/gsm8k'.*test_path"):
        load_task(Gsm8k(kind="gsm8k", num_prompts=10, revision=REVISION), seed=0)


# GSM-Symbolic


def test_gsm_symbolic_is_a_prefix_of_a_larger_run() -> None:
    few = load_task(GsmSymbolic(kind="gsm_symbolic", num_prompts=6), seed=0)
    many = load_task(GsmSymbolic(kind="gsm_symbolic", num_prompts=40), seed=0)
    assert (few[0], few[1]) == (many[0][:6], many[1])
    other = load_task(GsmSymbolic(kind="gsm_symbolic", num_prompts=40), seed=1)
    shared = {p.prompt_id for p in many[0]} & {p.prompt_id for p in other[0]}
    assert len(shared) <= 2  # seeds do not overlap like neighbouring streams would


def test_gsm_symbolic_is_the_same_in_every_process() -> None:
    script = (
        "from kvguard.config import GsmSymbolic; from kvguard.prompts import load_task; "
        "prompts, examples = load_task(GsmSymbolic(kind='gsm_symbolic', num_prompts=60), 0); "
        "print([p.prompt_id for p in prompts], [e.answer for e in examples])"
    )
    other = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONHASHSEED": str(1 + (os.environ.get("PYTHONHASHSEED") == "1"))},
        capture_output=True,
        text=True,
        check=True,
    )
    prompts, examples = load_task(GsmSymbolic(kind="gsm_symbolic", num_prompts=60), 0)
    mine = f"{[p.prompt_id for p in prompts]} {[e.answer for e in examples]}\n"
    assert other.stdout == mine


def skeleton(question: str) -> list[str]:
    """The words of a question without numbers and names: what a template leaves unchanged."""
    return [word for word in question.split() if word.islower()]


def test_gsm_symbolic_examples_come_from_other_templates() -> None:
    prompts, examples = load_task(GsmSymbolic(kind="gsm_symbolic", num_prompts=200), seed=0)

    def likeness(one: str, other: str) -> float:
        return SequenceMatcher(None, skeleton(one), skeleton(other), autojunk=False).ratio()

    asked = [prompt.question for prompt in prompts]
    siblings = [
        max(likeness(question, other) for other in asked if other != question)
        for question in asked[:10]
    ]
    assert max(siblings) > 0.8  # two questions of one template are recognised as such
    closest = max(likeness(e.question, question) for e in examples for question in asked)
    assert closest < 0.7


def test_gsm_symbolic_examples_end_in_their_answer() -> None:
    for seed in range(4):
        task = GsmSymbolic(kind="gsm_symbolic", num_prompts=5, few_shot=8)
        prompts, examples = load_task(task, seed)
        assert len({example.question for example in examples}) == 8
        for example in examples:
            *steps, last = example.answer.split("\n")
            assert re.fullmatch(r"#### -?\d+(\.\d+)?", last)
            assert "".join(steps).strip()
            assert "####" not in "".join(steps)
        for prompt in prompts:
            assert Fraction(json.loads(prompt.spec)["answer"]) == Fraction(prompt.reference)


def test_no_examples_when_none_are_asked() -> None:
    task = GsmSymbolic(kind="gsm_symbolic", num_prompts=3, few_shot=0)
    assert load_task(task, seed=0)[1] == []


# Chat formatting


def test_examples_are_chat_turns(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [
        Example(question="1+1?", answer="#### 2"),
        Example(question="2+2?", answer="#### 4"),
    ]
    ids = format_prompt(tiny_tokenizer, "3+3?", examples)
    text = (
        "<s>user\n1+1?</s>\n<s>assistant\n#### 2</s>\n"
        "<s>user\n2+2?</s>\n<s>assistant\n#### 4</s>\n"
        "<s>user\n3+3?</s>\n<s>assistant\n"
    )
    vocabulary = tiny_tokenizer.get_vocab()  # one entry a character or special token
    by_hand = [vocabulary[piece] for piece in re.findall(r"</?s>|.|\n", text)]
    assert ids == by_hand


def test_a_date_in_the_template_is_always_the_same(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}{{ date_string }} {{ messages[-1]['content'] }}"
    )
    monkeypatch.setattr(tiny_tokenizer, "chat_template", dated)
    assert tiny_tokenizer.decode(format_prompt(tiny_tokenizer, "Why?")) == "26 Jul 2024 Why?"


def test_a_tokenizer_without_template_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    with pytest.raises(PromptError, match="no chat template"):
        format_prompt(tiny_tokenizer, "Why?")


def test_smollm2_prompt_has_one_begin_token_a_turn(smollm2: LoadedModel) -> None:
    ids = format_prompt(smollm2.tokenizer, "2+2?", [Example(question="1+1?", answer="#### 2")])
    assert ids[0] == 1
    assert ids[1] != 1
    assert ids.count(1) == 5  # system, user, assistant, user, assistant
    assert ids.count(2) == 4  # the last turn is open
    assert str(smollm2.tokenizer.decode(ids)).endswith("<|im_start|>assistant\n")


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=5))
def test_shared_prefix_is_the_longest_that_leaves_a_token(prompts: list[list[int]]) -> None:
    lengths = range(min((len(prompt) for prompt in prompts), default=1))
    shared = [n for n in lengths if len({tuple(prompt[:n]) for prompt in prompts}) == 1]
    assert shared_prefix_tokens(prompts) == (max(shared) if len(prompts) > 1 else 0)


# Files


def test_tables_and_examples_come_back(tmp_path: Path) -> None:
    prompts, examples = load_task(gsm8k(tmp_path), seed=0)
    frame = prompts_frame(prompts)
    check(frame, PROMPTS, "prompts")
    write_table(frame, tmp_path / "prompts.parquet", PROMPTS)
    assert read_prompts(tmp_path / "prompts.parquet") == prompts
    odd = [*examples, Example(question="½ of “é”?", answer="a\nb\n#### 1")]
    by_task = {"gsm8k": odd, "bare": []}
    write_examples(tmp_path / "few_shot.json", by_task)
    assert read_examples(tmp_path / "few_shot.json") == by_task


def test_tasks_come_one_after_the_other(tmp_path: Path) -> None:
    again = gsm8k(tmp_path, name="again", num_prompts=4, few_shot=0)
    prompts, examples = load_tasks([gsm8k(tmp_path), again], seed=0)
    assert [prompt.index for prompt in prompts] == list(range(14))
    assert [prompt.task for prompt in prompts] == ["gsm8k"] * 10 + ["again"] * 4
    assert {task: len(turns) for task, turns in examples.items()} == {"gsm8k": 3, "again": 0}
    # The same questions are other prompts of another task.
    assert {prompt.question for prompt in prompts[10:]} <= {p.question for p in prompts[:10]}
    assert len({prompt.prompt_id for prompt in prompts}) == 14


def test_no_prompts_is_an_empty_table() -> None:
    check(prompts_frame([]), PROMPTS, "prompts")
