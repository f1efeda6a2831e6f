"""Metrics against brute force, whole evaluations against planted truth and against none."""

from itertools import product
from typing import NamedTuple

import numpy as np
import planted
import polars as pl
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from kvguard import config, plot_predictor, schema
from kvguard.ablation import FEATURE_GROUPS, ablate
from kvguard.controls import deal_by_coin, permute_requests
from kvguard.evaluate_predictor import (
    RUN_TOKENS,
    alarm_threshold,
    evaluate_predictors,
    first_alarms,
    score_requests,
)
from kvguard.features import FEATURE_SETS
from kvguard.harm_metrics import HARM_METRICS
from kvguard.leakage import LeakageError
from kvguard.metrics import (
    LEVELS,
    Measured,
    Sample,
    auroc,
    auroc_within,
    matched_auroc,
    pr_auc,
    quantile,
    recall_on_roc,
    resample_weights,
    share,
    with_intervals,
)
from kvguard.rows import Rows
from kvguard.splits import prompts_of, split_prompts
from kvguard.train import Models, train_predictors
from kvguard.trainer import BASELINE_KINDS, Trainer, make_trainer
from kvguard.transfer import leave_one_out

AUROCS = ("auroc", "auroc_within", "request_auroc", "request_auroc_early")


# --- metrics -------------------------------------------------------------------------------------


def _sample(rows: int = 400, prompts: int = 7, seed: int = 0, digits: int = 2) -> Sample:
    rng = np.random.default_rng(seed)
    labels = rng.random(rows) < 0.3
    scores = np.round(rng.normal(size=rows) + labels, digits)
    return Sample(scores, labels, rng.integers(0, prompts, rows), resample_weights(prompts, 40, 1))


@pytest.mark.parametrize("digits", [1, 6])
def test_estimates_and_replicates_are_sklearns_weighted(digits: int) -> None:
    sample = _sample(digits=digits)
    for metric, reference in ((auroc, roc_auc_score), (pr_auc, average_precision_score)):
        measured = metric(sample)
        assert measured.value == pytest.approx(reference(sample.labels, sample.scores))
        for row in range(5):
            weights = sample.weights[row][sample.prompts]
            expected = reference(sample.labels, sample.scores, sample_weight=weights)
            assert measured.replicates[row] == pytest.approx(expected, abs=1e-9)


def test_many_levels_cost_replicates_next_to_nothing() -> None:
    sample = _sample(rows=20 * LEVELS, digits=9)
    measured = auroc(sample)
    assert measured.value == pytest.approx(roc_auc_score(sample.labels, sample.scores), abs=1e-12)
    weights = sample.weights[0][sample.prompts]
    expected = roc_auc_score(sample.labels, sample.scores, sample_weight=weights)
    assert measured.replicates[0] == pytest.approx(expected, abs=1e-5)


def test_auroc_within_counts_pairs_of_one_condition() -> None:
    sample = _sample(rows=60, digits=1)
    conditions = np.random.default_rng(3).integers(0, 3, 60)
    wins = pairs = 0.0
    for one, other in product(range(60), repeat=2):
        if conditions[one] == conditions[other] and sample.labels[one] and not sample.labels[other]:
            pairs += 1
            a, b = sample.scores[one], sample.scores[other]
            wins += (a > b) + 0.5 * (a == b)
    assert auroc_within(sample, conditions).value == pytest.approx(wins / pairs)


def test_knowing_the_condition_earns_nothing_within() -> None:
    rng = np.random.default_rng(4)
    conditions = rng.integers(0, 4, 4000)
    labels = rng.random(4000) < 0.1 + 0.2 * conditions
    sample = Sample(
        conditions.astype(float), labels, rng.integers(0, 9, 4000), resample_weights(9, 20, 0)
    )
    pooled, within = auroc(sample).value, auroc_within(sample, conditions).value
    assert pooled is not None
    assert pooled > 0.7
    assert within == 0.5


def test_matched_auroc_compares_pairs_at_equal_length() -> None:
    rng = np.random.default_rng(5)
    count, tokens = 14, 12
    lengths, onset = rng.integers(3, tokens, count), rng.integers(0, tokens, count)
    harmed = rng.random(count) < 0.5
    running = np.maximum.accumulate(np.round(rng.random((count, tokens)), 1), axis=1)
    prompts = rng.integers(0, 4, count)
    weights = resample_weights(4, 30, 2)
    for cap in (None, 5):
        total = np.zeros(31)
        wins = np.zeros(31)
        for i, j in product(np.flatnonzero(harmed), np.flatnonzero(~harmed)):
            seen = min(onset[i], lengths[j], cap or tokens)
            win = 0.5
            if seen:
                a, b = running[i, seen - 1], running[j, seen - 1]
                win = float(a > b) + 0.5 * float(a == b)
            pair = np.r_[1, weights[:, prompts[i]] * weights[:, prompts[j]]]
            wins, total = wins + pair * win, total + pair
        got = matched_auroc(running, onset, lengths, harmed, prompts, weights, cap)
        assert got.value == pytest.approx(wins[0] / total[0])
        defined = total[1:] > 0
        assert got.replicates[defined] == pytest.approx(wins[1:][defined] / total[1:][defined])


def test_being_long_earns_nothing() -> None:
    """Harmed requests run three times as long and score the same: the plain maximum would win."""
    rng = np.random.default_rng(6)
    harmed = np.arange(300) < 150
    lengths = np.where(harmed, 60, 20)
    running = np.maximum.accumulate(rng.random((300, 60)), axis=1)
    prompts, weights = np.arange(300) % 30, resample_weights(30, 200, 0)
    plain = roc_auc_score(harmed, running[np.arange(300), lengths - 1])
    measured = matched_auroc(running, lengths, lengths, harmed, prompts, weights)
    low, high = measured.interval()
    assert plain > 0.7
    assert low is not None
    assert high is not None
    assert low <= 0.5 <= high


def test_quantiles_and_shares_by_hand() -> None:
    prompts, weights = np.array([0, 0, 1]), np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    events = np.array([True, False, False])
    assert share(events, prompts, weights).value == pytest.approx(1 / 3)
    assert share(events, prompts, weights).replicates == pytest.approx([1 / 2, 0, 1 / 3])
    values = np.array([5.0, 1.0, 3.0])
    assert quantile(values, prompts, weights, 0.5).value == 3.0
    assert quantile(values, prompts, weights, 0.5).replicates.tolist() == [1.0, 3.0, 3.0]


def test_recall_on_the_roc_curve_by_hand() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    labels = np.array([True, False, True, True, False, False])
    sample = Sample(scores, labels, np.zeros(6, np.int64), np.ones((1, 1)))
    assert recall_on_roc(sample, 0.0).value == pytest.approx(1 / 3)
    assert recall_on_roc(sample, 0.34).value == 1.0


def test_undefined_metrics_are_none() -> None:
    sample = _sample()._replace(labels=np.zeros(400, np.bool_))
    for measured in (auroc(sample), pr_auc(sample), recall_on_roc(sample, 0.1)):
        assert measured.value is None
        assert measured.interval() == (None, None)
    nobody = np.zeros(0)
    assert share(nobody, nobody.astype(int), sample.weights).value is None
    assert quantile(nobody, nobody.astype(int), sample.weights, 0.5).value is None


def test_a_family_of_rows_shares_the_error() -> None:
    rng = np.random.default_rng(0)
    measured = Measured(0.7, 0.7 + 0.05 * rng.normal(size=500), 10)
    undefined = Measured(None, np.zeros(0), 0)
    rows = [({"name": name}, measured) for name in ("headline", "a", "b", "c")]
    rows.append(({"name": "undefined"}, undefined))
    finished = with_intervals(rows, lambda _: 0, lambda row: row["name"] == "headline")
    by_name = {row["name"]: row for row in finished}
    assert by_name["headline"]["low"] == measured.interval(0.975)[0]
    assert by_name["a"]["high"] == measured.interval(1 - 0.025 / 3)[1]
    assert by_name["a"]["low_pointwise"] == measured.interval(0.95)[0]
    assert by_name["undefined"]["low"] is None


# --- requests ------------------------------------------------------------------------------------


def _rows(lengths: dict[str, tuple[int, int | None]]) -> Rows:
    """Tokens of one condition; prompt -> (tokens, onset)."""
    frames = []
    for prompt, (length, onset) in lengths.items():
        steps = pl.lit(None, pl.Int32) if onset is None else onset - pl.col("position")
        frames.append(
            pl.DataFrame({"position": np.arange(length)}).with_columns(
                pl.lit("m").alias("model"),
                pl.lit("snapkv").alias("press"),
                pl.lit("0.500").alias("ratio"),
                pl.lit(prompt).alias("prompt_id"),
                *(
                    column
                    for target in schema.TARGETS
                    for column in (
                        steps.cast(pl.Int32).alias(f"steps_to_{target}"),
                        steps.is_between(0, 31).fill_null(False).alias(f"hazard_{target}"),
                        (steps <= 0).fill_null(False).alias(f"post_onset_{target}"),
                    )
                ),
            )
        )
    keys = schema.conform(pl.concat(frames), schema.LABELS)
    return Rows(
        keys.with_columns(task=pl.lit("synthetic")),
        np.zeros((len(keys), len(schema.FEATURE_NAMES)), np.float32),
    )


def test_the_worst_run_of_a_request() -> None:
    rows = _rows({"a": (20, 12), "b": (5, None), "c": (30, 3), "d": (16, None)})
    hazard = np.concatenate(
        [np.r_[np.zeros(4), np.full(8, 0.5), np.ones(8)], np.ones(5), np.ones(30), np.zeros(16)]
    )
    requests = score_requests(rows, hazard, "any")
    table = {row["prompt_id"]: row for row in requests.table.iter_rows(named=True)}
    assert table["a"]["forecast"] == pytest.approx(0.5)  # tokens 4 to 11
    assert table["a"]["any_time"] == pytest.approx(1.0)
    assert table["b"]["any_time"] == -1, "shorter than a run"
    assert (table["c"]["forecast"], table["c"]["any_time"]) == (-1, 1)
    assert not table["d"]["harmed"]
    alarms = dict(first_alarms(requests, 0.7).select("prompt_id", "alarm").rows())
    # the run that ends at token t holds t - 11 ones and 19 - t halves: above 0.7 from t = 15 on
    assert alarms == {"a": 15, "b": None, "c": RUN_TOKENS - 1, "d": None}


def test_thresholds_let_no_more_than_the_rate_alarm() -> None:
    scores = np.random.default_rng(0).random(37)
    for rate in (0.0, 0.05, 0.2, 0.5):
        threshold = alarm_threshold(scores, rate)
        assert (scores > threshold).mean() <= rate
        below = scores[scores < threshold]
        if len(below):
            assert (scores > below.max()).mean() > rate, "a lower threshold would be too low"
    assert alarm_threshold(np.zeros(0), 0.05) == float("inf")


# --- whole evaluations ---------------------------------------------------------------------------

QUICK = config.Predictor(
    targets=["any", "looping"],
    search_trials=0,
    search_folds=2,
    max_rounds=60,
    bootstrap_samples=300,
)


def _trainer(splits: pl.DataFrame) -> Trainer:
    return make_trainer(splits, QUICK, horizon_tokens=planted.HORIZON_TOKENS, seed=0)


@pytest.fixture(scope="module")
def run() -> planted.Planted:
    return planted.planted_hazard(prompts=100, seed=1)


@pytest.fixture(scope="module")
def splits(run: planted.Planted) -> pl.DataFrame:
    return split_prompts(run.features["prompt_id"].unique(), config.Splits(), 0)


@pytest.fixture(scope="module")
def models(run: planted.Planted, splits: pl.DataFrame) -> Models:
    return train_predictors(run.features, run.labels, _trainer(splits))


@pytest.fixture(scope="module")
def tables(run: planted.Planted, splits: pl.DataFrame, models: Models) -> dict[str, pl.DataFrame]:
    rejected = run.outcomes.with_columns(first_rejected=pl.lit(3, pl.Int32))
    return evaluate_predictors(models, run.features, run.labels, splits, rejected, QUICK, seed=0)


def test_headline_metrics_are_those_of_tokens_before_the_onset(
    run: planted.Planted, splits: pl.DataFrame, models: Models, tables: dict[str, pl.DataFrame]
) -> None:
    tokens = run.features.join(run.labels, on=schema.TOKEN_KEYS).filter(
        pl.col("prompt_id").is_in(prompts_of(splits, "test")),
        pl.col("press") != "none",
        ~pl.col("post_onset_any"),
    )
    hazard = models.predictors["any"].predict(
        tokens.select(schema.FEATURE_NAMES).to_numpy().astype(np.float32)
    )
    label = tokens["hazard_any"].to_numpy()
    row = tables["predictor_metrics"].filter(target="any", predictor="hazard", group_by="all")
    found = dict(row.select("metric", "value").rows())
    assert found["auroc"] == pytest.approx(roc_auc_score(label, hazard))
    assert found["pr_auc"] == pytest.approx(average_precision_score(label, hazard))
    assert found["brier"] == pytest.approx(np.mean((hazard - label) ** 2))
    assert found["prevalence"] == pytest.approx(label.mean())
    counts = row.row(0, named=True)
    assert (counts["tokens"], counts["positive_tokens"]) == (len(label), label.sum())
    headline = row.filter(metric="auroc").row(0, named=True)
    assert headline["low"] < headline["low_pointwise"] < headline["value"]
    assert headline["value"] < headline["high_pointwise"] < headline["high"]


def test_groups_and_baselines_are_all_there(tables: dict[str, pl.DataFrame]) -> None:
    metrics = tables["predictor_metrics"].filter(metric="auroc", target="any")
    kinds = metrics.filter(group_by="all")["predictor"].to_list()
    assert kinds == ["hazard", *BASELINE_KINDS, "rules"]
    sizes = dict(metrics.filter(predictor="hazard").group_by("group_by").len().rows())
    expected = {"all": 1, "press": 3, "model": 1, "ratio": 2, "condition": 4, "kind": 3}
    assert sizes == expected
    best = metrics.filter(group_by="all").sort("value")["predictor"].to_list()
    assert best[-1] in ("hazard", "logistic")
    alone = metrics.filter(group_by="ratio")["ratio"].to_list()
    assert "0.000" not in alone, "the baseline is in no pooled group"


def test_lead_times_have_their_sign(tables: dict[str, pl.DataFrame]) -> None:
    lead = tables["lead_times"].filter(target="any")
    assert (lead["press"] != "none").all()
    alarmed = lead.drop_nulls("alarm")
    assert len(alarmed) > 5
    assert (alarmed["onset"] - alarmed["alarm"] == alarmed["lead_time_tokens"]).all()
    assert (alarmed["alarm"] - 3 == alarmed["detection_delay_tokens"]).all()
    assert (alarmed["wasted_tokens"] == alarmed["alarm"] - 3 + 1).all()
    detection = tables["detection"].filter(target="any", group_by="all")
    found = dict(detection.select("metric", "value").rows())
    assert found["share_detected"] == pytest.approx(len(alarmed) / len(lead))
    early = (lead["lead_time_tokens"] > 0).fill_null(False)
    assert found["share_detected_before_onset"] == pytest.approx(early.mean())
    recall = tables["predictor_metrics"].filter(
        target="any", predictor="hazard", group_by="all", metric="recall"
    )
    assert recall["value"].item() == pytest.approx(early.mean())


def test_figures_take_the_tables(tables: dict[str, pl.DataFrame]) -> None:
    plot_predictor.plot_predictor(tables["predictor_curves"])
    plot_predictor.plot_lead_time(tables["lead_times"].filter(target="any"))
    curves = tables["predictor_curves"].filter(target="any", predictor="hazard", curve="roc")
    assert curves["y"].is_sorted()
    assert (curves["y"].first(), curves["y"].last()) == (pytest.approx(0, abs=0.1), 1.0)
    area = np.trapezoid(curves["y"].to_numpy(), curves["x"].to_numpy())
    assert area == pytest.approx(curves["score"].first(), abs=0.01)


def test_models_of_other_splits_are_refused(run: planted.Planted, models: Models) -> None:
    others = split_prompts(run.features["prompt_id"].unique(), config.Splits(), 7)
    with pytest.raises(LeakageError, match="trained on splits"):
        evaluate_predictors(models, run.features, run.labels, others, run.outcomes, QUICK, seed=0)


@pytest.mark.matrix
def test_ablations_and_controls_on_planted_truth(
    run: planted.Planted, splits: pl.DataFrame
) -> None:
    made = ablate(run.features, run.labels, _trainer(splits))
    sets = made["ablation"].filter(metric="auroc", target="any")
    assert set(sets["feature_set"]) == {
        *FEATURE_SETS, "no_position", "without_evidence",
    }  # fmt: skip
    assert sets.filter("configured")["difference"].to_list() == [None]
    importance = dict(made["feature_importance"].select("group", "value").rows())
    assert set(importance) == set(FEATURE_GROUPS)
    top = sorted(importance, key=lambda group: -importance[group])[:2]
    assert set(top) == {"entropy", "confidence"}, "the two planted signals"
    assert abs(importance["repetition"]) < 0.02
    formulation = made["formulation"].filter(metric="auroc", target="any")
    assert set(formulation["sample"]) == {"train_out_of_fold", "test"}
    assert formulation["value"].null_count() == 0
    controls = made["controls"]
    judged = controls.drop_nulls("as_expected")
    assert set(judged["control"]) == {"permuted requests", "harm by a coin", "random alarm"}
    assert set(judged["predictor"].drop_nulls()) == {"hazard", "clock_repetition"}
    assert judged["as_expected"].all()
    random = controls.filter(control="random alarm", metric="recall").row(0, named=True)
    predictor = controls.filter(control="predictor", metric="recall").row(0, named=True)
    assert random["value"] < predictor["value"]
    assert set(made["leakage_check_ablation"]["split"]) == {"train", "calibration", "test"}


@pytest.mark.matrix
def test_leaving_out_presses_ratios_and_models(run: planted.Planted, splits: pl.DataFrame) -> None:
    made = leave_one_out(run.features, run.labels, _trainer(splits))
    left = made["leave_one_out"].filter(metric="auroc")
    assert left.select("left_out", "value_left_out", "trained_on").rows() == [
        ("press", "knorm", "others"),
        ("press", "knorm", "itself"),
        ("press", "snapkv", "others"),
        ("press", "snapkv", "itself"),
        ("ratio", "0.500", "others"),
        ("ratio", "0.500", "itself"),
        ("ratio", "0.750", "others"),
        ("ratio", "0.750", "itself"),
    ]
    assert (left["value"] > 0.7).all(), "the planted hazard is the same everywhere"
    only = made["transfer"].row(0, named=True)
    assert only["value"] is None
    assert only["reason"] == "m is the only model"

    def both(frame: pl.DataFrame) -> pl.DataFrame:
        twin = pl.when(pl.col("press") == "knorm").then(pl.lit("n")).otherwise(pl.col("model"))
        return frame.with_columns(model=twin)

    made = leave_one_out(both(run.features), both(run.labels), _trainer(splits))
    transfer = made["transfer"].filter(metric="auroc")
    pairs = transfer.select("trained_on", "tested_on").rows()
    assert pairs == [("m", "m"), ("n", "m"), ("m", "n"), ("n", "n")]
    own = transfer.filter(pl.col("trained_on") == pl.col("tested_on"))
    assert own["difference"].null_count() == 2
    assert transfer["difference"].null_count() == 2


class LeftOut(NamedTuple):
    """Tables of a leave-one-out over two tasks, and the presses of each fit's rows."""

    tables: dict[str, pl.DataFrame]
    presses: list[set[str]]


@pytest.fixture(scope="module")
def left_out(run: planted.Planted, splits: pl.DataFrame) -> LeftOut:
    seen: list[set[str]] = []
    fit = Trainer.fit

    def watched(self: Trainer, rows: Rows, *args: object, **kwargs: object) -> object:
        seen.append(set(rows.keys["press"]))
        return fit(self, rows, *args, **kwargs)  # type: ignore[arg-type]

    second = pl.int_range(pl.len()).over("split") % 2 == 1
    tasks = splits.with_columns(task=pl.when(second).then(pl.lit("b")).otherwise(pl.lit("a")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", watched)
        return LeftOut(leave_one_out(run.features, run.labels, _trainer(tasks)), seen)


def test_leaving_out_each_of_several_tasks(left_out: LeftOut) -> None:
    left = left_out.tables["leave_one_out"].filter(metric="auroc", left_out="task")
    assert left.select("value_left_out", "trained_on").rows() == [
        ("a", "others"),
        ("a", "itself"),
        ("b", "others"),
        ("b", "itself"),
    ]
    assert (left["value"] > 0.7).all(), "the planted hazard is the same in both"


def test_what_tests_on_a_press_was_not_trained_on_it(left_out: LeftOut) -> None:
    assert {"none", "snapkv"} in left_out.presses
    assert {"none", "knorm"} in left_out.presses


def test_permuted_requests_keep_the_harm_of_each_condition() -> None:
    data = planted.planted_hazard(prompts=12, seed=2)
    rows = Rows(data.labels, np.zeros((len(data.labels), len(schema.FEATURE_NAMES)), np.float32))
    permuted = permute_requests(rows, "any", planted.HORIZON_TOKENS, seed=0)
    condition = ["model", "press", "ratio"]

    def onsets(frame: pl.DataFrame) -> pl.DataFrame:
        onset = (pl.col("steps_to_any") + pl.col("position")).first().alias("onset")
        return frame.group_by(schema.TRACE_KEYS).agg(onset).sort(*condition, "onset", "prompt_id")

    before, after = onsets(rows.keys), onsets(permuted.keys)
    assert before.select(*condition, "onset").equals(after.select(*condition, "onset"))
    assert not before["prompt_id"].equals(after["prompt_id"])


def test_a_coin_harms_half_of_the_compressed_requests_at_one_token() -> None:
    data = planted.planted_hazard(prompts=60, seed=2)
    rows = Rows(data.labels, np.zeros((len(data.labels), len(schema.FEATURE_NAMES)), np.float32))
    keys = deal_by_coin(rows, "any", planted.HORIZON_TOKENS, seed=0).keys
    onset = (pl.col("steps_to_any") + pl.col("position")).first().alias("onset")
    dealt = keys.group_by(schema.TRACE_KEYS).agg(onset)
    assert dealt.filter(press="none")["onset"].null_count() == 60
    harmed = dealt.filter(pl.col("press") != "none")["onset"].drop_nulls()
    assert harmed.n_unique() == 1
    assert 0.4 < len(harmed) / 180 < 0.6
    assert keys["hazard_any"].sum() == len(harmed) * planted.HORIZON_TOKENS


def test_feature_groups_divide_the_features() -> None:
    grouped = [name for names in FEATURE_GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(schema.FEATURE_NAMES)


@pytest.mark.matrix
def test_with_independent_labels_every_interval_covers_one_half() -> None:
    """The simultaneous intervals of all tables; the pointwise ones miss about as they may."""
    data = planted.independent_labels(prompts=48, seed=0)
    splits = split_prompts(data.features["prompt_id"].unique(), config.Splits(), 0)
    models = train_predictors(data.features, data.labels, _trainer(splits))
    tables = evaluate_predictors(
        models, data.features, data.labels, splits, data.outcomes, QUICK, seed=0
    )
    tables |= ablate(data.features, data.labels, _trainer(splits))
    tables |= leave_one_out(data.features, data.labels, _trainer(splits))
    names = ("predictor_metrics", "harm_metrics", "ablation", "formulation")
    names += ("leave_one_out", "controls")
    wanted = (*AUROCS, *HARM_METRICS)
    pointwise = []
    for name in names:
        rows = tables[name].filter(pl.col("metric").is_in(wanted), pl.col("low").is_not_null())
        assert len(rows) >= 2
        missed = rows.filter(~pl.lit(0.5).is_between(pl.col("low"), pl.col("high")))
        assert missed.is_empty(), missed
        covered = pl.lit(0.5).is_between(pl.col("low_pointwise"), pl.col("high_pointwise"))
        pointwise += rows.select(covered).to_series().to_list()
    assert np.mean(pointwise) > 0.85
