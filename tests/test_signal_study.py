"""The study of signals against planted truth: who ranks, who is chosen, what carries over."""

import dataclasses
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.stats import norm

from kvguard import config, schema
from kvguard.metrics import Measured
from kvguard.signal_answers import Answers, deal_folds, load_answers
from kvguard.signal_models import CLOCK, fit_and_score, out_of_fold
from kvguard.signal_study import (
    ANSWER,
    SELECTED,
    SELECTED_GATE,
    Study,
    build_study,
    difference_table,
    measure_sample,
    p_value,
    score_table,
    transfer_table,
)
from kvguard.splits import split_prompts
from kvguard.trainer import Refusal

TASKS = ("copy", "recall")
PRESSES = (("knorm", "0.300", 0.0), ("snapkv", "0.150", 1000.0), ("snapkv", "0.300", 1000.0))
"""Conditions, and the level of the probe that tells harm under that press."""

NAMES = (
    *(CLOCK, "logistic_entropy", "logistic_normalised"),
    *("gate_logistic_raw", "gate_logistic_normalised", "gate_press_normalised"),
)
QUICK: dict[str, Any] = {
    "names": NAMES,
    "folds": 3,
    "inner_folds": 2,
    "choice_folds": 2,
    "bootstrap_samples": 200,
}
SIGNAL = 0.8
PROBE = 1.2


@dataclasses.dataclass
class Run:
    """Tables of one planted run."""

    features: pl.DataFrame
    labels: pl.DataFrame
    tokens: pl.DataFrame
    outcomes: pl.DataFrame
    splits: pl.DataFrame


def make_run(prompts: int, seed: int, signal: float = SIGNAL, probe: float = PROBE) -> Run:
    """Requests harmed by a coin: each token's entropy tells it, and one probe on its press's scale.

    The task sets the level of the entropy, too. Every onset stands at the third token.
    """
    rng = np.random.default_rng(seed)
    features, labels, tokens, outcomes = [], [], [], []
    ids, tasks = [], []
    for prompt in range(prompts):
        task = TASKS[prompt % 2]
        prompt_id = f"{prompt:016x}"
        ids.append(prompt_id)
        tasks.append(task)
        length = int(rng.integers(6, 12))
        for press, ratio, level in (("none", "0.000", 0.0), *PRESSES):
            harmed = press != "none" and rng.random() < 0.5
            keys = {"model": "m", "press": press, "ratio": ratio, "prompt_id": prompt_id}
            values = {name: rng.normal(size=length) for name in schema.FEATURE_NAMES}
            values |= {name: np.full(length, rng.normal()) for name in schema.PROBE_NAMES}
            base = 3.0 * (task == "copy")
            entropy = rng.normal(size=length) + signal * harmed + base
            values["entropy"] = entropy
            values["entropy_mean"] = np.cumsum(entropy) / np.arange(1, length + 1)
            values["relative_position"] = np.arange(length) / 12
            values["evicted_mass_mean"] = np.full(
                length, level + (rng.normal() + probe * harmed) if press != "none" else np.nan
            )
            values["compression_ratio"] = np.full(length, float(keys["ratio"]))
            position = np.arange(length)
            frame = pl.DataFrame({"position": position}).with_columns(
                pl.lit(value).alias(name) for name, value in keys.items()
            )
            features.append(
                frame.with_columns(pl.Series(name, one) for name, one in values.items())
            )
            steps = pl.Series(2 - position if harmed else [None] * length, dtype=pl.Int32)
            ahead = (position <= 2) & harmed
            named = {}
            for target in schema.TARGETS:
                named[f"steps_to_{target}"] = steps
                named[f"hazard_{target}"] = pl.Series(ahead)
                named[f"post_onset_{target}"] = pl.Series((position >= 2) & harmed)
            labels.append(frame.with_columns(one.alias(name) for name, one in named.items()))
            llr = rng.normal(size=length) + 3 * harmed
            tokens.append(
                frame.with_columns(
                    token_id=pl.Series(rng.integers(0, 20, length), dtype=pl.Int32),
                    llr=pl.Series(llr, dtype=pl.Float32),
                )
            )
            outcomes.append(
                keys
                | {"task": task, "right": not harmed, "baseline_right": True, "harmed": harmed}
                | {"rescued": False, "silent_harm": harmed, "catastrophe": False, "looping": False}
                | {"harm_onset": 2 if harmed else None}
            )
    frame = pl.DataFrame({"prompt_id": ids, "task": tasks}).with_columns(
        template=pl.lit(None, pl.String)
    )
    return Run(
        schema.conform(pl.concat(features), schema.FEATURES),
        schema.conform(pl.concat(labels), schema.LABELS),
        pl.concat(tokens).cast({"position": pl.Int32}),
        pl.DataFrame(outcomes, schema=schema.OUTCOMES),
        split_prompts(frame, config.Splits(train=0.4, calibration=0.3, test=0.3), 0),
    )


def _load(run: Run, **changes: Any) -> Answers:
    given = dataclasses.asdict(run) | changes
    return load_answers(**given)


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run(100, seed=0)


@pytest.fixture(scope="module")
def study(run: Run) -> Study:
    return build_study(_load(run), run.splits, **QUICK)


def test_the_study_finds_what_was_planted(run: Run, study: Study) -> None:
    measured = {sample.name: measure_sample(sample, study.answers) for sample in study.samples}
    table = score_table(study, measured)
    pooled = table.filter(pl.col("task").is_null(), pl.col("press").is_null())
    for sample in ("test", "crossfit"):
        own = {
            row["score"]: row
            for row in pooled.filter(sample=sample, metric=ANSWER).iter_rows(named=True)
        }
        # six to eleven tokens that both have, each shifted by SIGNAL
        expected = norm.cdf(SIGNAL * np.sqrt(7.2 / 2))
        mean = own["mean_entropy"]
        assert mean["low"] <= expected <= mean["high"], sample
        assert own["gate_logistic_normalised"]["value"] > (0.55 if sample == "test" else 0.65)
        assert own["evicted_mass_mean"]["low"] <= norm.cdf(PROBE / np.sqrt(2)), sample
        assert own["oracle_llr"]["value"] > 0.98, "the oracle's line lies above all"
        assert own[SELECTED]["value"] > 0.85, sample
        assert own[SELECTED]["goal"] == 0.95
        assert own["gate_press_normalised"]["moment"] == "first token"
        clock = pooled.filter(sample=sample, metric=ANSWER, score=CLOCK).row(0, named=True)
        assert clock["low"] <= 0.6
    crossfit = pooled.filter(sample="crossfit", metric=ANSWER, score="mean_entropy").row(
        0, named=True
    )
    assert (crossfit["prompts"], crossfit["conditions"]) == (100, 6)
    chosen = study.choice.models
    assert set(chosen) == {SELECTED, SELECTED_GATE}
    assert chosen[SELECTED] != CLOCK
    tests = difference_table(study, measured)
    assert set(tests["family"]) == {"A", "B", "-"}
    clock = tests.filter(family="A", sample="crossfit", other=CLOCK).row(0, named=True)
    assert clock["difference"] > 0.15
    assert clock["low"] > 0
    assert clock["p_adjusted"] < 0.01
    assert clock["goal"] == 0.15
    probe = tests.filter(family="B", sample="crossfit", other="gate_logistic_raw").row(
        0, named=True
    )
    assert probe["difference"] > 0, "raw values of two presses are on different scales"


def test_what_is_left_out_is_fitted_without_it(run: Run, study: Study) -> None:
    table = transfer_table(study, run.splits, folds=3)
    assert set(table["left_out"]) == {"task", "press"}
    assert table.height == 2 * 3 * 4  # samples, scores, two tasks and two presses
    gate = table.filter(score="fixed gate", sample="crossfit", left_out="press")
    assert gate["reason"].null_count() == 2
    # the press's own scale needs no outcome of it, so the probe carries over
    assert (gate["value"] > 0.6).all(), gate
    known = table.filter(pl.col("reason").is_null())
    assert known["with_it"].null_count() == 0
    by_press = table.filter(left_out="press", **{"is": "gate_press_normalised"})
    assert (by_press["value"].is_null()).all(), "a model of each press knows nothing of another"


def test_no_signal_is_no_finding() -> None:
    run = make_run(48, seed=5, signal=0.0, probe=0.0)
    made = build_study(_load(run), run.splits, **QUICK)
    measured = {sample.name: measure_sample(sample, made.answers) for sample in made.samples}
    tests = difference_table(made, measured).filter(pl.col("family") == "A")
    assert (tests["p_adjusted"].fill_null(1.0) > 0.01).all(), tests
    table = score_table(made, measured).filter(
        pl.col("task").is_null(), pl.col("press").is_null(), sample="crossfit", metric=ANSWER
    )
    for row in table.filter(pl.col("score") != "oracle_llr").iter_rows(named=True):
        assert row["low"] - 0.03 <= 0.5 <= row["high"] + 0.03, row


def test_scores_of_a_prompt_never_come_from_it(run: Run) -> None:
    """Labels of one fold turned round: its own scores, from the other folds, stay as they were."""
    answers = _load(run)
    everyone = np.ones(len(answers.lengths), np.bool_)
    before = out_of_fold(["logistic_normalised"], answers, everyone, run.splits, 3, 0)
    fold = deal_folds(run.splits, 3, "signals 3")
    turned = np.array([fold[prompt] == 1 for prompt in answers.prompts.tolist()])
    other = answers._replace(silent=answers.silent ^ turned)
    after = out_of_fold(["logistic_normalised"], other, everyone, run.splits, 3, 0)
    same = turned[answers.owner]
    name = "logistic_normalised"
    assert np.array_equal(before[name][same], after[name][same])
    assert not np.array_equal(before[name][~same], after[name][~same])


def test_requests_that_cannot_be_harmed_are_scored_and_not_ranked(run: Run) -> None:
    wrong = run.splits["prompt_id"][0]
    mine = pl.col("prompt_id") == wrong
    outcomes = run.outcomes.with_columns(
        baseline_right=pl.when(mine).then(False).otherwise("baseline_right"),
        harmed=pl.when(mine).then(False).otherwise("harmed"),
        silent_harm=pl.when(mine).then(False).otherwise("silent_harm"),
    )
    answers = _load(run, outcomes=outcomes)
    own = answers.prompts == wrong
    assert own.sum() == 3
    assert not answers.ranked[own].any()
    assert answers.ranked[~own].all()
    scores = fit_and_score("logistic_entropy", answers, ~own, 0)
    assert np.isfinite(scores).all()


def test_folds_are_even_within_tasks_and_too_few_prompts_are_refused(run: Run) -> None:
    dealt = deal_folds(run.splits, 5, "a")
    table = run.splits.with_columns(fold=pl.col("prompt_id").replace_strict(dealt))
    sizes = table.group_by("task", "fold").len()["len"]
    assert sizes.max() - sizes.min() <= 1  # type: ignore[operator]
    with pytest.raises(ValueError, match="100 prompts cannot fill 101"):
        deal_folds(run.splits, 101, "a")
    answers = _load(run)
    with pytest.raises(Refusal, match="0 prompts with a request that is silently harmed"):
        fit_and_score("gru", answers._replace(silent=~answers.ranked), answers.ranked, 0)


def test_a_p_value_belongs_to_its_interval() -> None:
    rng = np.random.default_rng(0)
    for value in (0.01, 0.05, 0.1):
        found = Measured(value, value + rng.normal(scale=0.03, size=4000), 40, None)
        low, _ = found.interval()
        p = p_value(found)
        assert p is not None
        assert low is not None
        assert (p < 0.05) == (low > 0)
    assert p_value(Measured(0.0, np.zeros(100), 20, None)) == 1.0
    assert p_value(Measured(None, np.zeros(100), 20, None)) is None
