import itertools
import json

import numpy as np
import polars as pl
import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from synthetic import make_run

from kvguard import schema
from kvguard.config import Detection
from kvguard.detectors import (
    DETECTION_COLUMNS,
    agreement,
    detect_all,
    detect_outcomes,
    loop_onsets,
    windowed_means,
)

DEFAULT = Detection()


def brute_force_loop(token_ids: list[int], window: int, repeats: int) -> int:
    """Compare every window with every other one."""
    onsets = []
    starts = range(len(token_ids) - window + 1)
    for start in starts:
        text = token_ids[start : start + window]
        same = [other for other in starts if token_ids[other : other + window] == text]
        if len(same) >= repeats:
            onsets.append(same[1])
    return min(onsets, default=-1)


@examples(300)
@given(
    traces=st.lists(st.lists(st.integers(0, 2), max_size=40), min_size=1, max_size=5),
    window=st.integers(1, 9),
    repeats=st.integers(2, 4),
)
def test_loops_equal_brute_force_whatever_the_neighbouring_traces(traces, window, repeats):
    offsets = np.cumsum([0, *map(len, traces)])
    token_ids = np.array(list(itertools.chain(*traces)), dtype=np.int64)
    found = loop_onsets(token_ids, offsets, window, repeats)
    assert found.tolist() == [brute_force_loop(trace, window, repeats) for trace in traces]


@pytest.mark.parametrize(("count", "onset"), [(21, None), (22, 1), (60, 1)])
def test_one_token_again_and_again_is_a_loop_from_three_overlapping_windows_on(count, onset):
    found = detect_all(
        [7] * count, stop_reason="eos", max_new_tokens=160, llr=None, detection=DEFAULT
    )
    assert (found.looping, found.looping_onset) == (onset is not None, onset)


def test_the_onset_of_a_sentence_said_three_times_is_its_second_time():
    preface, sentence = list(range(100, 111)), list(range(25))
    twice = preface + 2 * sentence
    thrice = preface + 3 * sentence
    kwargs = {"stop_reason": "eos", "max_new_tokens": 160, "llr": None, "detection": DEFAULT}
    assert not detect_all(twice, **kwargs).looping
    assert detect_all(thrice, **kwargs).looping_onset == 11 + 25


@pytest.mark.parametrize(
    ("share", "max_new_tokens", "onset"), [(0.75, 160, 120), (0.7, 10, 7), (0.75, 50, 38)]
)
def test_non_termination_starts_at_its_share_of_the_token_limit(share, max_new_tokens, onset):
    detection = Detection(non_termination_onset=share)
    tokens = list(range(max_new_tokens))
    kwargs = {"max_new_tokens": max_new_tokens, "llr": None, "detection": detection}
    ran_out = detect_all(tokens, stop_reason="length", **kwargs)
    ended = detect_all(tokens, stop_reason="eos", **kwargs)
    assert (ran_out.non_termination, ran_out.non_termination_onset) == (True, onset)
    assert (ran_out.catastrophe, ran_out.onset) == (True, onset)
    assert (ended.non_termination, ended.non_termination_onset) == (False, None)
    assert (ended.catastrophe, ended.onset) == (False, None)


def judge(llr, **changes):
    kwargs = {"stop_reason": "eos", "max_new_tokens": 160, "detection": DEFAULT} | changes
    return detect_all(range(len(llr)), llr=llr, **kwargs)


def test_amnesia_needs_a_whole_window_that_reaches_the_threshold():
    reaches = judge([0.0] * 5 + [1.0] * 16 + [0.0] * 9)
    assert (reaches.amnesia, reaches.amnesia_onset, reaches.max_windowed_llr) == (True, 5, 1.0)
    # 5 of 16 tokens at 1.0 average 0.3125 nats: the quiet failure starts 11 tokens sooner.
    assert (reaches.divergence, reaches.divergence_onset) == (True, 0)
    falls_short = judge([0.0] * 5 + [1.0] * 15 + [0.9] + [0.0] * 9)
    assert (falls_short.amnesia, falls_short.amnesia_onset) == (False, None)
    too_short = judge([5.0] * 15)
    assert (too_short.amnesia, too_short.max_windowed_llr) == (False, None)


def test_the_first_window_counts_and_not_the_worst():
    found = judge([0.0] * 20 + [1.0] * 16 + [0.0] * 20 + [3.0] * 16)
    assert (found.amnesia_onset, found.max_windowed_llr) == (20, 3.0)


def test_divergence_is_not_a_catastrophe():
    found = judge([0.4] * 40)
    assert (found.divergence, found.divergence_onset, found.catastrophe) == (True, 0, False)


def test_without_an_audit_what_it_would_say_is_unknown():
    blind = detect_all([7] * 40, stop_reason="eos", max_new_tokens=160, llr=None, detection=DEFAULT)
    assert blind.amnesia is None
    assert blind.divergence is None
    assert blind.max_windowed_llr is None
    assert blind.first_rejected is None
    assert (blind.catastrophe, blind.onset) == (True, 1)


def test_a_rejected_token_lies_beyond_the_numeric_margin():
    gap = [0.0, 0.5e-4, 1e-4, 2e-4, 5.0]
    found = judge([0.0] * 5, audit_gap=gap)
    assert found.first_rejected == 3
    assert judge([0.0] * 5, audit_gap=[0.0] * 5).first_rejected is None


def test_an_audit_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"llr must have shape \(3,\).*\(2,\)"):
        detect_all([1, 2, 3], stop_reason="eos", max_new_tokens=9, llr=[0, 0], detection=DEFAULT)


def test_an_answer_without_tokens_has_no_failure_to_show():
    found = judge([])
    assert (found.looping, found.amnesia, found.catastrophe) == (False, False, False)


@examples(50)
@given(
    st.lists(st.floats(-5, 5, width=32), max_size=30),
    st.integers(1, 18),
)
def test_windowed_means_equal_one_mean_per_window(values, window):
    expected = [np.mean(values[i : i + window]) for i in range(len(values) - window + 1)]
    np.testing.assert_allclose(windowed_means(np.array(values), window), expected, atol=1e-12)


@pytest.mark.parametrize("max_new_tokens", [64, 160])
def test_a_run_with_planted_failures_gives_back_every_kind_and_onset(max_new_tokens):
    run = make_run(30, seed=3, max_new_tokens=max_new_tokens)
    found = detect_outcomes(run.prompts, run.traces, run.tokens, DEFAULT)
    assert_frame_equal(found, run.outcomes)
    kinds = found.select("looping", "non_termination", "amnesia", "divergence").sum()
    assert min(kinds.row(0)) > 0
    assert found["catastrophe"].null_count() > 0  # the error rows


def test_the_order_of_rows_and_further_columns_do_not_matter():
    run = make_run(8, seed=1)
    shuffled = run.tokens.select(DETECTION_COLUMNS).sample(fraction=1, shuffle=True, seed=2)
    assert_frame_equal(
        detect_outcomes(run.prompts, run.traces.reverse(), shuffled, DEFAULT),
        run.outcomes.reverse(),
    )


def test_many_traces_at_once_equal_one_at_a_time():
    run = make_run(12, seed=5)
    detection = Detection(loop_window_tokens=7, amnesia_llr=0.31, divergence_window_tokens=5)
    outcomes = detect_outcomes(run.prompts, run.traces, run.tokens, detection)
    ok = run.traces.filter(pl.col("status") == "ok")
    for trace in ok.iter_rows(named=True):
        own = pl.all_horizontal(pl.col(key) == trace[key] for key in schema.TRACE_KEYS)
        tokens = run.tokens.filter(own)
        alone = detect_all(
            tokens["token_id"].to_list(),
            stop_reason=trace["stop_reason"],
            max_new_tokens=trace["max_new_tokens"],
            llr=tokens["llr"].to_numpy(),
            audit_gap=tokens["audit_gap"].to_numpy(),
            detection=detection,
        ).model_dump()
        together = outcomes.filter(own).row(0, named=True)
        assert alone == {name: together[name] for name in alone}


def test_a_run_without_the_baseline_has_no_agreement():
    run = make_run(6, conditions=[("snapkv", "0.500")])
    found = detect_outcomes(run.prompts, run.traces, run.tokens, DEFAULT)
    assert found["agrees"].null_count() == found.height


@pytest.mark.parametrize(
    ("answer", "broken", "baseline_answer", "baseline_broken", "expected"),
    [
        ("4", False, "4", False, True),
        ("4", True, "4", True, True),
        ("4", False, "5", False, False),
        ("4", False, None, False, False),
        (None, False, "4", False, False),
        (None, False, None, False, True),
        (None, True, None, False, False),
        (None, False, None, True, False),
        ("4", None, "4", False, None),
        ("4", False, "4", None, None),
    ],
)
@pytest.mark.parametrize("kind", ["looping", "non_termination"])
def test_agreement_with_the_uncompressed_answer(
    answer, broken, baseline_answer, baseline_broken, expected, kind
):
    other = {"looping": "non_termination", "non_termination": "looping"}[kind]
    rows = pl.DataFrame(
        [
            {"press": press, "answer": text, kind: failed, other: None if failed is None else False}
            for press, text, failed in (
                ("none", baseline_answer, baseline_broken),
                ("snapkv", answer, broken),
            )
        ],
        schema_overrides={
            "looping": pl.Boolean,
            "non_termination": pl.Boolean,
            "answer": pl.String,
        },
    ).with_columns(model=pl.lit("m"), prompt_id=pl.lit("p"))
    verdict = agreement(rows, rows)
    assert verdict[1] == expected
    assert verdict[0] is (None if baseline_broken is None else True)


def test_tokens_and_traces_that_do_not_belong_together_are_refused():
    run = make_run(6, error_rate=0)
    first = run.traces.row(0, named=True)
    with pytest.raises(ValueError, match="token rows") as error:
        detect_outcomes(
            run.prompts, run.traces, run.tokens.slice(first["generated_tokens"]), DEFAULT
        )
    assert first["prompt_id"] in str(error.value)
    with pytest.raises(ValueError, match="without a trace"):
        detect_outcomes(run.prompts, run.traces[1:], run.tokens, DEFAULT)
    with pytest.raises(ValueError, match="not among the prompts"):
        detect_outcomes(run.prompts[1:], run.traces, run.tokens, DEFAULT)
    with pytest.raises(ValueError, match="must count 0, 1, 2"):
        detect_outcomes(
            run.prompts, run.traces, run.tokens.filter(pl.col("position") != 5), DEFAULT
        )


def test_an_instruction_that_is_forgotten_is_amnesia_whatever_the_likelihood_says():
    spec = json.dumps({"constraints": [{"type": "uppercase"}], "fact": "anchor"})
    prompts = pl.DataFrame(
        {
            "prompt_id": ["a", "b"],
            "task": "instructions",
            "kind": "instructions",
            "template": None,
            "index": [0, 1],
            "question": "?",
            "reference": "ANCHOR",
            "spec": spec,
        },
        schema=schema.PROMPTS,
    )
    said = {
        ("none", "a"): "ANCHOR",
        ("snapkv", "a"): "Anchor",
        ("none", "b"): "x",
        ("snapkv", "b"): "x",
    }
    keys = [
        {"model": "m", "press": press, "ratio": "0.500", "prompt_id": prompt_id}
        for press, prompt_id in said
    ]
    ended = {"status": "ok", "stop_reason": "eos", "max_new_tokens": 9, "generated_tokens": 1}
    traces = pl.DataFrame(
        [key | ended | {"text": text} for key, text in zip(keys, said.values(), strict=True)],
        schema=schema.TRACES,
    )
    tokens = pl.DataFrame(
        [key | {"position": 0, "token_id": 5, "llr": 9.0, "audit_gap": 0.0} for key in keys],
        schema={name: schema.TOKENS[name] for name in DETECTION_COLUMNS},
    )
    onsets = pl.DataFrame([keys[1] | {"harm_onset": 0}], schema=schema.HARM_ONSETS)
    found = detect_outcomes(prompts, traces, tokens, Detection(amnesia_window_tokens=1), onsets)
    # "b" disobeys without compression too, so nothing was forgotten.
    assert found["amnesia"].to_list() == [False, True, False, False]
    assert found["amnesia_onset"].to_list() == [None, 0, None, None]
    assert found["onset"].to_list() == [None, 0, None, None]
    assert found["catastrophe"].to_list() == [False, True, False, False]
    assert found["silent_harm"].to_list() == [False, True, False, False]
