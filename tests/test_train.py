"""Splits, the leakage check, training with planted truth, and predictor files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import planted
import polars as pl
import pytest
import xgboost
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from kvguard import config, schema, train, trainer
from kvguard.config import Splits
from kvguard.leakage import LeakageCheck, LeakageError, assert_disjoint, check_trained_on
from kvguard.predictor import (
    CalibrationMap,
    Predictor,
    PredictorError,
    load_predictor,
    rules_predictor,
    save_predictor,
    survival_log_odds,
)
from kvguard.probability_maps import fit_calibration_map
from kvguard.rows import Rows, load_rows
from kvguard.splits import calibration_parts, prompts_of, split_prompts
from kvguard.train import (
    Models,
    load_models,
    predict_tokens,
    save_models,
    train_predictors,
    write_predictions,
)
from kvguard.trainer import Formulation, Refusal, Trainer, make_trainer

WIDTH = len(schema.FEATURE_NAMES)

QUICK = config.Predictor(
    targets=["any", "looping"], search_trials=3, search_folds=2, max_rounds=150
)

ONE_FIT = QUICK.model_copy(update={"targets": ["any"], "search_trials": 0, "max_rounds": 20})
"""For what does not depend on how good the predictor is."""


def _trainer(splits: pl.DataFrame, settings: config.Predictor) -> Trainer:
    return make_trainer(splits, settings, horizon_tokens=planted.HORIZON_TOKENS, seed=0)


def _some(splits: pl.DataFrame, train_prompts: int, calibration_prompts: int) -> pl.DataFrame:
    """Only the first prompts of these splits."""
    few = prompts_of(splits, "train")[:train_prompts]
    few += prompts_of(splits, "calibration")[:calibration_prompts]
    return splits.filter(pl.col("prompt_id").is_in(few))


# --- splits --------------------------------------------------------------------------------------


@given(st.integers(3, 300), st.integers(0, 5))
@examples(40)
def test_splits_have_exact_shares_whatever_the_order(count: int, seed: int) -> None:
    ids = [f"p{index}" for index in range(count)]
    splits = split_prompts(ids, Splits(), seed)
    sizes = dict(splits.group_by("split").len().rows())
    for name, share in zip(schema.SPLIT_NAMES, (0.5, 0.25, 0.25), strict=True):
        assert abs(sizes[name] - share * count) < 1
        assert sizes[name] >= 1
    shuffled = np.random.default_rng(seed).permutation(ids * 2)
    assert splits.equals(split_prompts(shuffled.tolist(), Splits(), seed))


def test_another_seed_splits_otherwise() -> None:
    ids = [f"p{index}" for index in range(40)]
    assert not split_prompts(ids, Splits(), 0).equals(split_prompts(ids, Splits(), 1))


def test_a_prompt_more_moves_few_others() -> None:
    ids = [f"p{index}" for index in range(100)]
    before = split_prompts(ids, Splits(), 0)
    after = split_prompts([*ids, "new"], Splits(), 0)
    both = before.join(after, on="prompt_id", suffix="_after")
    assert (both["split"] != both["split_after"]).sum() <= 3


@pytest.mark.parametrize(("count", "needed"), [(0, 3), (1, 3), (2, 3)])
def test_too_few_prompts_say_how_many_are_needed(count: int, needed: int) -> None:
    with pytest.raises(ValueError, match=f"at least {needed} prompts are needed"):
        split_prompts([f"p{index}" for index in range(count)], Splits(), 0)


def test_parts_of_calibration_are_disjoint_and_complete() -> None:
    splits = split_prompts([f"p{index}" for index in range(80)], Splits(), 0)
    fit, certify = calibration_parts(splits, 0.34)
    assert sorted(fit + certify) == prompts_of(splits, "calibration")
    assert len(fit) == round(0.34 * 20)
    single = split_prompts(["a", "b", "c"], Splits(), 0)
    assert calibration_parts(single, 0.34) == ([], prompts_of(single, "calibration"))


# --- leakage -------------------------------------------------------------------------------------


def test_a_foreign_prompt_in_a_matrix_ends_the_run() -> None:
    splits = split_prompts([f"p{index}" for index in range(12)], Splits(), 0)
    leakage = LeakageCheck(splits)
    mine, test = prompts_of(splits, "train"), prompts_of(splits, "test")
    leakage.check("fit", mine * 3, "a model")
    with pytest.raises(LeakageError, match=f"fit .* holds 1 others, such as {test[0]} of test"):
        leakage.check("fit", [*mine, test[0]])
    with pytest.raises(LeakageError, match="of no split at all"):
        leakage.check("certificate", ["stranger"])
    record = leakage.table().row(0, named=True)
    assert (record["rows"], record["prompts"], record["foreign_prompts"]) == (18, 6, 0)


def test_a_prompt_in_two_splits_is_found() -> None:
    twice = pl.DataFrame({"prompt_id": ["a", "a"], "split": ["train", "test"]})
    with pytest.raises(LeakageError, match="prompt a is listed more than once"):
        LeakageCheck(twice)
    with pytest.raises(LeakageError, match="unknown"):
        LeakageCheck(pl.DataFrame({"prompt_id": ["a"], "split": ["validation"]}))
    with pytest.raises(LeakageError, match="prompt b is in 'fit' and in 'stopping'"):
        assert_disjoint({"fit": ["a", "b"], "stopping": ["b"]})


@pytest.mark.parametrize("leak", ["test", "calibration"])
def test_a_planted_leak_fails_the_training(
    run: planted.Planted, splits: pl.DataFrame, leak: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader that lets one prompt of another split slip into train is caught."""
    intruder = prompts_of(splits, leak)[0]

    def careless(features: Any, labels: Any, known: pl.DataFrame, split: Any) -> Rows:
        wanted = [*prompts_of(known, "train"), intruder] if split == "train" else split
        return load_rows(features, labels, known, wanted)

    monkeypatch.setattr(train, "load_rows", careless)
    with pytest.raises(LeakageError, match=f"{intruder} of {leak}"):
        train_predictors(run.features, run.labels, _trainer(splits, ONE_FIT))


def test_every_stage_of_training_is_on_record(trained: Models, splits: pl.DataFrame) -> None:
    check = trained.tables["leakage_check"]
    assert set(check["stage"]) == {
        "fit",
        "early_stopping",
        "search",
        "out_of_fold",
        "probability_calibration",
    }
    assert check["foreign_prompts"].sum() == 0
    by_stage = dict(check.select("stage", "split").unique().rows())
    assert by_stage.pop("probability_calibration") == "calibration"
    assert set(by_stage.values()) == {"train"}
    fits = check.filter(pl.col("stage") == "fit")["prompts_digest"].unique().to_list()
    assert fits == [config.digest(prompts_of(splits, "train"))]


def test_predictors_remember_their_splits(trained: Models, splits: pl.DataFrame) -> None:
    check_trained_on(splits, trained.predictors["any"].provenance)
    others = split_prompts(splits["prompt_id"], Splits(), 99)
    with pytest.raises(LeakageError, match="trained on splits"):
        check_trained_on(others, trained.predictors["any"].provenance)


# --- training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run() -> planted.Planted:
    return planted.planted_hazard(prompts=260, seed=0)


@pytest.fixture(scope="module")
def splits(run: planted.Planted) -> pl.DataFrame:
    return split_prompts(run.features["prompt_id"].unique(), Splits(), 0)


@pytest.fixture(scope="module")
def trained(run: planted.Planted, splits: pl.DataFrame) -> Models:
    return train_predictors(run.features, run.labels, _trainer(splits, QUICK), "abc")


def _test_tokens(
    run: planted.Planted, splits: pl.DataFrame, predictor: Predictor
) -> tuple[pl.DataFrame, np.ndarray]:
    rows = load_rows(run.features, run.labels, splits, "test")
    used = rows.take(rows.before_onset("any") & rows.compressed())
    keys = used.keys.join(run.truth, on=schema.TOKEN_KEYS, how="left", maintain_order="left")
    return keys, predictor.predict(used.features)


def test_the_predictor_nearly_reaches_the_oracle(
    run: planted.Planted, splits: pl.DataFrame, trained: Models
) -> None:
    keys, hazard = _test_tokens(run, splits, trained.predictors["any"])
    label = keys["hazard_any"].to_numpy()
    oracle = roc_auc_score(label, keys["truth"].to_numpy())
    assert oracle > 0.75, "the planted truth must be worth finding"
    assert roc_auc_score(label, hazard) >= 0.98 * oracle


def test_probabilities_are_calibrated(
    run: planted.Planted, splits: pl.DataFrame, trained: Models
) -> None:
    keys, hazard = _test_tokens(run, splits, trained.predictors["any"])
    truth = keys["truth"].to_numpy()
    for low, high in ((0.0, 0.1), (0.1, 0.3), (0.3, 1.0)):
        inside = (hazard >= low) & (hazard < high)
        assert hazard[inside].mean() == pytest.approx(truth[inside].mean(), abs=0.08)


@pytest.mark.parametrize("formulation", ["windowed", "discrete_time"])
def test_both_formulations_reach_the_oracle(
    run: planted.Planted, splits: pl.DataFrame, formulation: Formulation
) -> None:
    predictor = _trainer(splits, QUICK).fit(
        load_rows(run.features, run.labels, splits, "train"),
        "any",
        ("entropy", "top1_probability", "relative_position"),
        "both formulations",
        formulation=formulation,
        parameters={"max_depth": 3, "learning_rate": 0.1},
    )
    keys, hazard = _test_tokens(run, splits, predictor)
    label = keys["hazard_any"].to_numpy()
    oracle = roc_auc_score(label, keys["truth"].to_numpy())
    assert roc_auc_score(label, hazard) >= 0.98 * oracle
    # class weights are undone, so the uncalibrated probability has the right size already
    assert hazard.mean() == pytest.approx(label.mean(), abs=0.06)


def test_compact_rows_teach_the_same_predictor(run: planted.Planted, splits: pl.DataFrame) -> None:
    rows = load_rows(run.features, run.labels, splits, "train")
    small = rows.compact()
    assert pl.String not in small.keys.dtypes
    plain, compact = (
        _trainer(splits, QUICK).fit(each, "any", ("entropy", "relative_position"), "memory")
        for each in (rows, small)
    )
    assert compact == plain


def test_survival_multiplies_over_the_stretches() -> None:
    hazards = np.array([[0.1, 0.2, 0.3], [0.5, 1e-9, 0.9]])
    risk = 1 - (1 - hazards).prod(axis=1)
    got = survival_log_odds(np.log(hazards) - np.log1p(-hazards))
    assert 1 / (1 + np.exp(-got)) == pytest.approx(risk)


def test_discrete_time_rows_are_at_risk_until_the_onset() -> None:
    """Horizon 8 in 4 stretches of 2 tokens, onset 5 tokens ahead: no, no, yes, not at risk."""
    keys = pl.DataFrame(
        {
            "steps_to_any": pl.Series([5, None, 9], dtype=pl.Int32),
            "hazard_any": [True, False, False],
            "post_onset_any": [False] * 3,
        }
    )
    rows = Rows(keys, np.zeros((3, WIDTH), np.float32))
    at_risk, event = trainer._expand(rows, trainer._Layout("any", [], 4, 8))
    assert at_risk.tolist() == [True, True, True, False] + [True] * 8
    assert event.tolist() == [False, False, True] + [False] * 8


def test_targets_without_enough_harm_are_refused_with_a_row(splits: pl.DataFrame) -> None:
    data = planted.planted_hazard(prompts=24, seed=3)
    small = split_prompts(data.features["prompt_id"].unique(), Splits(), 0)
    harmless = data.labels.with_columns(
        pl.lit(None, pl.Int32).alias("steps_to_looping"),
        pl.lit(False).alias("hazard_looping"),
        pl.lit(False).alias("post_onset_looping"),
        # never judged, as without an audit
        pl.lit(None, pl.Boolean).alias("hazard_amnesia"),
        pl.lit(None, pl.Boolean).alias("post_onset_amnesia"),
    )
    wanted = QUICK.model_copy(update={"targets": ["looping", "any", "amnesia"]})
    made = train_predictors(data.features, harmless, _trainer(small, wanted))
    assert set(made.predictors) == {"any"}
    assert made.refusals["looping"].startswith(
        "0 train prompts have a token within the horizon of an onset of looping"
    )
    rows = made.tables["training"].filter(predictor="hazard")
    assert dict(rows.select("target", "status").rows()) == {
        "any": "trained",
        "looping": "refused",
        "amnesia": "refused",
    }


def test_a_default_that_cannot_be_trained_falls_back_to_rules(tmp_path: Path) -> None:
    data = planted.planted_hazard(prompts=6, seed=0)
    small = split_prompts(data.features["prompt_id"].unique(), Splits(), 0)
    made = train_predictors(data.features, data.labels, _trainer(small, QUICK))
    assert made.tables["training"].filter(target="any")["status"].unique().to_list() == ["refused"]
    assert made.predictors["any"].kind == "rules"
    save_models(made, tmp_path)
    assert load_predictor(tmp_path / "hazard_predictor.json").kind == "rules"
    with pytest.raises(PredictorError, match=r"no predictor for target 'looping': .* are needed"):
        load_predictor(tmp_path / "hazard_looping.json")
    assert load_models(tmp_path).refusals == made.refusals


def test_training_repeats_itself(run: planted.Planted, splits: pl.DataFrame) -> None:
    part = _some(splits, 24, 8)
    quick = QUICK.model_copy(update={"targets": ["any"], "max_rounds": 20})
    digests = [
        train_predictors(run.features, run.labels, _trainer(part, quick)).predictors["any"].digest
        for _ in range(2)
    ]
    assert digests[0] == digests[1]


def test_the_search_keeps_its_best_trial(trained: Models) -> None:
    trials = trained.tables["search_trials"]
    assert len(trials) == QUICK.search_trials
    best = trials.filter("best").row(0, named=True)
    assert best["auroc"] == trials["auroc"].max()
    assert json.loads(best["parameters"]) == trained.predictors["any"].provenance["parameters"]


def test_rows_of_files_and_frames_agree(
    run: planted.Planted, splits: pl.DataFrame, tmp_path: Path
) -> None:
    schema.write_table(run.features, tmp_path / "features.parquet", schema.FEATURES)
    schema.write_table(run.labels.reverse(), tmp_path / "labels.parquet", schema.LABELS)
    frames = load_rows(run.features, run.labels, splits, "test")
    files = load_rows(tmp_path / "features.parquet", tmp_path / "labels.parquet", splits, "test")
    assert frames.keys.equals(files.keys)
    assert np.array_equal(frames.features, files.features, equal_nan=True)
    assert set(frames.keys["prompt_id"]) == set(prompts_of(splits, "test"))
    with pytest.raises(ValueError, match="features and labels do not belong together"):
        load_rows(run.features, run.labels.head(-3000), splits, "test")


# --- predictor files -----------------------------------------------------------------------------


def test_a_predictor_survives_its_file_bit_for_bit(
    run: planted.Planted, trained: Models, tmp_path: Path
) -> None:
    features = run.features.select(schema.FEATURE_NAMES).to_numpy()[:500].astype(np.float32)
    save_models(trained, tmp_path)
    loaded = load_models(tmp_path)
    for target, predictor in trained.predictors.items():
        again = loaded.predictors[target]
        assert again.digest == predictor.digest
        assert np.array_equal(again.predict(features), predictor.predict(features))
        for kind, baseline in trained.baselines.items():
            twin = loaded.baselines[kind][target]
            assert np.array_equal(twin.predict(features), baseline[target].predict(features))
    default = load_predictor(tmp_path / "hazard_predictor.json")
    assert default.target == "any"
    origin = default.provenance
    assert origin["config_digest"] == "abc"
    assert {"seed", "data_digest", "splits_digest", "versions", "settings"} <= set(origin)
    assert origin["versions"]["xgboost"] == xgboost.__version__


def test_a_saved_booster_is_xgboosts_own(
    run: planted.Planted, trained: Models, tmp_path: Path
) -> None:
    """What is in the file, loaded by XGBoost alone, gives the same margin."""
    predictor = trained.predictors["any"]
    save_predictor(predictor, tmp_path / "p.json")
    content = json.loads((tmp_path / "p.json").read_text())
    booster = xgboost.Booster()
    booster.load_model(bytearray(json.dumps(content["model"]["booster"]).encode()))
    features = run.features.head(200)
    columns = features.select(content["feature_names"]).to_numpy().astype(np.float32)
    margin = booster.predict(xgboost.DMatrix(columns), output_margin=True)
    expected = margin - np.log(content["model"]["class_weight"])
    full = features.select(schema.FEATURE_NAMES).to_numpy().astype(np.float32)
    assert predictor.log_odds(full) == pytest.approx(expected, abs=1e-5)


def test_other_features_are_refused_by_name(trained: Models, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    content = trained.predictors["any"].model_dump(mode="json")

    def write(**changes: Any) -> None:
        path.write_text(json.dumps(content | changes))

    write(feature_version=schema.FEATURE_VERSION + 1)
    with pytest.raises(PredictorError, match=r"feature version 3, .* computes feature version 2"):
        load_predictor(path)
    write(feature_names=["entropy", "mood"])
    with pytest.raises(PredictorError, match=r"\['mood'\], .* it computes \['entropy', "):
        load_predictor(path)
    write(target="boredom")
    with pytest.raises(PredictorError, match="forecasts 'boredom'; known targets"):
        load_predictor(path)
    write(colour="green")
    with pytest.raises(PredictorError, match="colour"):
        load_predictor(path)
    path.write_text("not json")
    with pytest.raises(PredictorError, match="is not JSON"):
        load_predictor(path)
    with pytest.raises(FileNotFoundError, match="no predictor at"):
        load_predictor(tmp_path / "nowhere.json")


def test_predict_wants_all_columns(trained: Models) -> None:
    with pytest.raises(ValueError, match=rf"\(n, {WIDTH}\).*got \(2, 39\)"):
        trained.predictors["any"].predict(np.zeros((2, 39), np.float32))
    assert trained.predictors["any"].predict(np.zeros((0, WIDTH), np.float32)).shape == (0,)


def test_predictions_written_out_of_core_are_the_same(
    run: planted.Planted, splits: pl.DataFrame, trained: Models, tmp_path: Path
) -> None:
    schema.write_table(run.features, tmp_path / "features.parquet", schema.FEATURES)
    write_predictions(
        trained.predictors, tmp_path / "features.parquet", splits, tmp_path / "predictions.parquet"
    )
    written = schema.read_table(tmp_path / "predictions.parquet", schema.PREDICTIONS)
    keys = ["target", *schema.TOKEN_KEYS]
    expected = predict_tokens(trained.predictors, run.features, splits)
    assert written.sort(keys).equals(expected.sort(keys))
    assert written["hazard"].is_between(0, 1).all()
    assert set(written["split"]) == set(schema.SPLIT_NAMES)


# --- maps and rules ------------------------------------------------------------------------------


def test_calibration_maps() -> None:
    odds = np.array([-2.0, 0.0, 3.0])
    platt = CalibrationMap(method="platt", slope=2.0, intercept=1.0)
    assert platt.apply(odds) == pytest.approx(1 / (1 + np.exp(-(2 * odds + 1))))
    isotonic = CalibrationMap(method="isotonic", x=[-1.0, 1.0], y=[0.2, 0.6])
    assert isotonic.apply(odds) == pytest.approx([0.2, 0.4, 0.6])
    assert CalibrationMap().apply(odds) == pytest.approx(1 / (1 + np.exp(-odds)))


@pytest.mark.parametrize("method", ["platt", "isotonic", "none"])
def test_every_calibration_keeps_the_ranking(
    run: planted.Planted, splits: pl.DataFrame, method: Any
) -> None:
    wanted = ONE_FIT.model_copy(update={"probability_calibration": method})
    part = _some(splits, 50, 30)
    made = train_predictors(run.features, run.labels, _trainer(part, wanted))
    predictor = made.predictors["any"]
    assert predictor.calibration.method == method
    features = run.features.select(schema.FEATURE_NAMES).to_numpy()[:400].astype(np.float32)
    order = np.argsort(predictor.log_odds(features), kind="stable")
    assert (np.diff(predictor.predict(features)[order]) >= -1e-7).all()


def test_an_anti_predictive_score_is_not_turned_around() -> None:
    rng = np.random.default_rng(0)
    odds = rng.normal(size=400)
    labels = rng.random(400) < 1 / (1 + np.exp(2 * odds))
    assert fit_calibration_map(odds, labels, "platt").slope > 0


def test_rules_rise_with_repetition_and_entropy() -> None:
    rules = rules_predictor()

    def risk(repetition: float, entropy: float) -> float:
        features = np.zeros((1, WIDTH), np.float32)
        features[0, schema.FEATURE_NAMES.index("repetition_sum")] = repetition
        features[0, schema.FEATURE_NAMES.index("entropy_mean_8")] = entropy
        return float(rules.predict(features)[0])

    assert risk(0, 0.5) < 0.02
    assert risk(12, 0) == pytest.approx(0.5, abs=0.01)
    assert risk(0, 4) == pytest.approx(0.5, abs=0.01)
    assert risk(24, 6) > 0.99
    assert 0 <= risk(float("nan"), float("nan")) < 0.02


def test_refusals_name_target_and_numbers(run: planted.Planted, splits: pl.DataFrame) -> None:
    rows = load_rows(run.features, run.labels, splits, prompts_of(splits, "train")[:2])
    with pytest.raises(
        Refusal, match="train prompts have a token within the horizon of an onset of any"
    ):
        _trainer(splits, QUICK).fit(rows, "any", schema.FEATURE_NAMES, "too few")


def test_a_gate_learns_from_probes_which_request_is_harmed() -> None:
    data = planted.planted_harm(80, seed=4, shift=0.0)
    known = data.labels.group_by(schema.TRACE_KEYS, maintain_order=True).agg(
        harmed=pl.col("steps_to_harm").first().is_not_null()
    )
    noise = pl.Series(np.random.default_rng(0).normal(size=len(known)), dtype=pl.Float32)
    probe = (pl.col("harmed").cast(pl.Float32) + noise).alias("evicted_mass_mean")
    features = (
        data.features.drop("evicted_mass_mean")
        .join(known.with_columns(probe), on=schema.TRACE_KEYS, how="left", maintain_order="left")
        .select(list(schema.FEATURES))
    )
    splits = split_prompts(features["prompt_id"].unique(), Splits(), 0)
    train_rows = load_rows(features, data.labels, splits, "train")
    gate = _trainer(splits, QUICK).fit_baseline(train_rows, "harm", "gate", ())
    test = load_rows(features, data.labels, splits, "test")
    first = test.take((test.keys["position"] == 0).to_numpy() & test.compressed())
    harmed = first.keys["steps_to_harm"].is_not_null().to_numpy()
    oracle = roc_auc_score(
        harmed, first.features[:, schema.FEATURE_NAMES.index("evicted_mass_mean")]
    )
    risks = gate.predict(first.features, first.press)
    assert roc_auc_score(harmed, risks) > oracle - 0.1 > 0.55
    assert risks.mean() == pytest.approx(harmed.mean(), abs=0.12)
    bare = features.with_columns(
        pl.lit(None, pl.Float32).alias(name) for name in schema.PROBE_NAMES
    )
    unprobed = load_rows(bare, data.labels, splits, "train")
    with pytest.raises(Refusal, match="no compressed train request has probes"):
        _trainer(splits, QUICK).fit_baseline(unprobed, "harm", "gate", ())


def test_a_gates_probabilities_are_of_whole_requests() -> None:
    """One more ratio, other harm: the ratio is read, and the map is fitted on requests."""
    data = planted.planted_harm(240, seed=8)
    known = data.labels.group_by(schema.TRACE_KEYS, maintain_order=True).agg(
        harmed=pl.col("steps_to_harm").first().is_not_null()
    )
    rng = np.random.default_rng(1)
    ratio = pl.Series(rng.choice([0.2, 0.8], len(known)), dtype=pl.Float32)
    noise = pl.Series(rng.normal(size=len(known)), dtype=pl.Float32)
    known = known.with_columns(
        noise.alias("evicted_mass_mean"),
        # harmed requests ran at the heavier ratio four times in five
        compression_ratio=pl.when(pl.Series(rng.random(len(known)) < 0.8))
        .then(0.2 + 0.6 * pl.col("harmed").cast(pl.Float32))
        .otherwise(ratio)
        .cast(pl.Float32),
    )
    features = (
        data.features.drop("evicted_mass_mean", "compression_ratio")
        .join(known.drop("harmed"), on=schema.TRACE_KEYS, how="left", maintain_order="left")
        .select(list(schema.FEATURES))
    )
    splits = split_prompts(features["prompt_id"].unique(), Splits(), 0)
    trainer = _trainer(splits, QUICK)
    gate = trainer.fit_baseline(
        load_rows(features, data.labels, splits, "train"), "harm", "gate", ()
    )
    assert gate.feature_names == schema.GATE_FEATURES
    held_out = load_rows(features, data.labels, splits, "calibration")
    fitted = trainer.calibrate(gate, held_out, "platt", "gate harm")
    assert fitted.calibration.method == "platt"
    assert set(fitted.provenance["probability_prompts"]) <= set(held_out.keys["prompt_id"])
    test = load_rows(features, data.labels, splits, "test")
    first = test.take((test.keys["position"] == 0).to_numpy() & test.compressed())
    harmed = first.keys["steps_to_harm"].is_not_null().to_numpy()
    risks = fitted.predict(first.features, first.press)
    heavy = first.features[:, schema.FEATURE_NAMES.index("compression_ratio")] > 0.5
    for part in (heavy, ~heavy):
        assert risks[part].mean() == pytest.approx(harmed[part].mean(), abs=0.12)
    assert risks[heavy].mean() > risks[~heavy].mean() + 0.3
