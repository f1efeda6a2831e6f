"""Metrics that a clock cannot win: against brute force, planted truth, and a coin."""

from itertools import product

import numpy as np
import planted
import polars as pl
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from kvguard import config, schema
from kvguard.evaluate_predictor import evaluate_predictors
from kvguard.harm_metrics import HARM_METRICS, Panel, build_panel, mean_over, measure_panel
from kvguard.metrics import Measured
from kvguard.rows import Rows, load_rows
from kvguard.splits import prompts_of, split_prompts
from kvguard.train import train_predictors
from kvguard.trainer import make_trainer

SHIFT = 0.6


def _rows(run: planted.Planted, prompts: int | None = None) -> tuple[Rows, pl.DataFrame]:
    splits = split_prompts(run.features["prompt_id"].unique(), config.Splits(), 0)
    ids = splits["prompt_id"].to_list()
    return load_rows(run.features, run.labels, splits, ids[:prompts]), splits


def _feature(rows: Rows, name: str) -> np.ndarray:
    return rows.features[:, schema.FEATURE_NAMES.index(name)]


def _everything(panel: Panel, found: dict[int, Measured]) -> Measured:
    return mean_over(panel, found, np.unique(panel.condition))


def test_every_metric_is_brute_force() -> None:
    rows, splits = _rows(planted.planted_harm(8, seed=5), 8)
    panel = build_panel(rows, "harm", splits, samples=40, seed=1)
    # halves: sums are exact, so that ties are ties
    scores = np.round(2 * np.random.default_rng(0).normal(size=len(rows.keys))) / 2
    requests = []
    keyed = rows.keys.with_columns(pl.Series("score", scores)).filter(pl.col("press") != "none")
    for key, part in keyed.group_by(schema.TRACE_KEYS, maintain_order=True):
        steps = part["steps_to_harm"][0]
        requests.append((key, part["score"].to_list(), steps))

    def mean(values: list[float], seen: int) -> float:
        return float(np.mean(values[:seen]))

    def worst(values: list[float], seen: int) -> float:
        runs = [np.mean(values[i : i + 8]) for i in range(seen - 7)]
        return max([0.0, *runs]) if seen >= 8 else 0.0

    by_metric: dict[str, dict[tuple[str, ...], list[float]]] = {name: {} for name in HARM_METRICS}
    for (one, first, onset), (two, second, other_onset) in product(requests, requests):
        if onset is None or one == two:
            continue
        where = one[:3]
        if one[:3] == two[:3]:
            for at in range(max(0, onset - planted.HORIZON_TOKENS + 1), onset):
                if at >= len(second) or (other_onset is not None and other_onset <= at):
                    continue
                if other_onset is not None and other_onset - at < planted.HORIZON_TOKENS:
                    continue
                win = (first[at] > second[at]) + 0.5 * (first[at] == second[at])
                by_metric["same_position"].setdefault(where, []).append(win)
        if other_onset is not None:
            continue
        short = min(len(first), len(second))
        for metric, seen, score in (
            ("request", min(short, onset), mean),
            ("request_any_time", short, mean),
            ("request_worst_run", min(short, onset), worst),
            ("within_prompt", min(short, onset), mean),
            ("within_prompt_any_time", short, mean),
        ):
            same = one[3] == two[3] if metric.startswith("within") else one[:3] == two[:3]
            if same:
                a, b = score(first, seen), score(second, seen)
                win = (a > b) + 0.5 * (a == b)
                by_metric[metric].setdefault(where, []).append(win)
    found = measure_panel(panel, scores)
    for metric, pairs in by_metric.items():
        expected = np.mean([np.mean(wins) for wins in pairs.values()])
        assert _everything(panel, found[metric]).value == pytest.approx(expected), metric


@pytest.fixture(scope="module")
def study() -> tuple[Rows, Panel]:
    rows, splits = _rows(planted.planted_harm(150, seed=1, shift=SHIFT))
    return rows, build_panel(rows, "harm", splits, samples=200, seed=0)


def test_every_metric_recovers_the_planted_truth(study: tuple[Rows, Panel]) -> None:
    """A shift d in each of m independent tokens: the mean of m ranks with Phi(d sqrt(m / 2))."""
    rows, panel = study
    found = measure_panel(panel, _feature(rows, "entropy"))
    for metric, before in (
        ("request", True),
        ("within_prompt", True),
        ("request_any_time", False),
        ("within_prompt_any_time", False),
    ):
        same = panel.prompt if metric.startswith("within") else panel.condition
        truth = []
        for row in np.flatnonzero(panel.harmed):
            others = np.flatnonzero((same == same[row]) & ~panel.harmed)
            seen = np.minimum(panel.lengths[row], panel.lengths[others])
            seen = np.minimum(seen, panel.onset[row]) if before else seen
            truth += norm.cdf(SHIFT * np.sqrt(seen / 2)).tolist()
        measured = _everything(panel, found[metric])
        low, high = measured.interval(0.999)
        assert low is not None
        assert high is not None
        assert low <= np.mean(truth) <= high, metric
        assert low > 0.6, metric
    # one token: the planted shift against requests at risk, of which some are harmed later
    at = _everything(panel, found["same_position"])
    assert at.value == pytest.approx(norm.cdf(SHIFT / np.sqrt(2)), abs=0.06)
    assert _everything(panel, found["request_worst_run"]).interval()[0] > 0.6  # type: ignore[operator]


def test_the_clock_gets_exactly_nothing(study: tuple[Rows, Panel]) -> None:
    rows, panel = study
    for metric, found in measure_panel(panel, _feature(rows, "relative_position")).items():
        assert _everything(panel, found).value == pytest.approx(0.5, abs=1e-9), metric
    for metric, found in measure_panel(panel, _feature(rows, "repetition_sum")).items():
        low, high = _everything(panel, found).interval(0.999)
        assert low is not None
        assert high is not None
        assert low <= 0.5 <= high, metric


def test_position_wins_over_tokens_and_not_here() -> None:
    """Harm by a coin at one fixed token: position foretells labels, and not a single request."""
    run = planted.planted_harm(80, seed=2, shift=0.0, onset_at=24)
    rows, splits = _rows(run)
    used = rows.take(rows.compressed() & rows.before_onset("harm"))
    position = _feature(used, "relative_position")
    assert roc_auc_score(used.label("harm"), -np.abs(position - 20 / 48)) > 0.7
    settings = config.Predictor(
        targets=["harm"], search_trials=0, max_rounds=60, bootstrap_samples=300
    )
    trainer = make_trainer(splits, settings, horizon_tokens=planted.HORIZON_TOKENS, seed=0)
    models = train_predictors(run.features, run.labels, trainer)
    tables = evaluate_predictors(
        models, run.features, run.labels, splits, run.outcomes, settings, seed=0
    )
    token = tables["predictor_metrics"].filter(
        predictor="clock_repetition", group_by="all", metric="auroc"
    )
    assert token["value"].item() > 0.65, "over tokens, the clock looks like a predictor"
    pooled = tables["harm_metrics"].filter(pl.col("press").is_null(), pl.col("task").is_null())
    assert set(pooled["metric"]) == set(HARM_METRICS)
    for row in pooled.filter(compared_with="clock_repetition").iter_rows(named=True):
        assert row["low"] <= 0.5 <= row["high"], row
        if row["predictor"] != "clock_repetition":
            assert row["difference_low"] <= 0 <= row["difference_high"], row


def test_a_trained_predictor_is_told_from_the_clock() -> None:
    run = planted.planted_harm(120, seed=3, shift=SHIFT)
    running = (
        run.features.sort(schema.TOKEN_KEYS)
        .with_columns(
            entropy_mean=(pl.col("entropy").cum_sum() / (pl.col("position") + 1)).over(
                schema.TRACE_KEYS
            )
        )
        .cast({"entropy_mean": pl.Float32})
    )
    _, splits = _rows(run)
    settings = config.Predictor(
        targets=["harm"], search_trials=0, max_rounds=80, bootstrap_samples=300
    )
    trainer = make_trainer(splits, settings, horizon_tokens=planted.HORIZON_TOKENS, seed=0)
    models = train_predictors(running, run.labels, trainer)
    tables = evaluate_predictors(
        models, running, run.labels, splits, run.outcomes, settings, seed=0
    )
    pooled = tables["harm_metrics"].filter(
        pl.col("press").is_null(),
        pl.col("task").is_null(),
        predictor="hazard",
        compared_with="clock_repetition",
    )
    for row in pooled.filter(pl.col("metric") != "same_position").iter_rows(named=True):
        assert row["difference_low"] > 0.1, row
    assert pooled["prompts"].unique().to_list() == [len(prompts_of(splits, "test"))]


def test_a_difference_that_never_varies_has_an_exact_interval() -> None:
    same = Measured(0.5, np.full(100, 0.5), 20)
    difference = same.minus(same)
    low, high = difference.interval()
    assert difference.value == 0
    assert high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert low == pytest.approx(-high)
