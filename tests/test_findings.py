"""docs/findings.md says what the tables say, and nothing that they do not."""

import json
from pathlib import Path

import planted
import polars as pl
import pytest

from kvguard import config, schema
from kvguard.ablation import ablate
from kvguard.calibration import calibrate, save_certificate
from kvguard.evaluate_predictor import evaluate_predictors
from kvguard.findings import write_findings
from kvguard.predictor import rules_predictor
from kvguard.splits import split_prompts
from kvguard.train import predict_tokens, train_predictors
from kvguard.trainer import make_trainer
from kvguard.transfer import leave_one_out

SETTINGS = config.Predictor(
    targets=["any", "looping"],
    search_trials=0,
    search_folds=2,
    max_rounds=40,
    bootstrap_samples=200,
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables of a small run with planted truth; looping never happens in it."""
    folder = tmp_path_factory.mktemp("results")
    run = planted.planted_hazard(prompts=80, seed=4)
    labels = run.labels.with_columns(
        pl.lit(None, pl.Int32).alias("steps_to_looping"),
        pl.lit(False).alias("hazard_looping"),
        pl.lit(False).alias("post_onset_looping"),
    )
    splits = split_prompts(run.features["prompt_id"].unique(), config.Splits(), 0)
    horizon = planted.HORIZON_TOKENS
    data = (run.features, labels, splits)
    trainer = make_trainer(splits, SETTINGS, horizon_tokens=horizon, seed=0)
    models = train_predictors(run.features, labels, trainer)
    tables = models.tables | evaluate_predictors(models, *data, run.outcomes, SETTINGS, seed=0)
    tables |= ablate(run.features, labels, trainer)
    tables |= leave_one_out(run.features, labels, trainer)
    rules = rules_predictor()
    made = calibrate(
        rules,
        predict_tokens({"any": rules}, run.features, splits),
        labels,
        splits,
        config.Controller(),
        config.CertificateSettings(),
    )
    for name, table in (tables | made.tables).items():
        schema.write_table(table, folder / "tables" / f"{name}.parquet")
    schema.write_table(_policies(), folder / "tables" / "policies.parquet")
    reasons = pl.DataFrame({"reason": ["same", "not simulated"], "requests": [38, 2]})
    schema.write_table(reasons, folder / "tables" / "simulation_reasons.parquet")
    save_certificate(made.certificate, folder / "models" / "certificate.json")
    described = {
        "name": "planted",
        "seed": 0,
        "results_dir": "results",
        "models": [{"name": "m"}],
        "tasks": [{"name": "none", "num_prompts": 80}],
        "presses": [{"name": "snapkv", "ratios": ["0.500", "0.750"]}],
        "generation": {"max_new_tokens": 60},
        "guard": {"check_every_tokens": 8},
    }
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def _policies() -> pl.DataFrame:
    """A guard live and simulated, and a rival whose outcome the simulation does not know."""
    costs = {"kv_bytes_mean": 3.0 * 2**20, "tokens_prefilled": 40.0, "tokens_wasted": 7.0}
    one = {"model": "m", "press": "snapkv", "ratio": "0.500", "requests": 20, **costs}
    one |= {"alarmed": 0.4, "alarmed_low": 0.2, "alarmed_high": 0.6}
    one |= {"excess_error": 0.0, "excess_error_low": None, "excess_error_high": None}
    spans = [("live", "guard_promote", 0.1, 1.0), ("simulation", "guard_promote", 0.2, 1.0)]
    spans += [("live", "loopguard", 0.3, 1.0), ("simulation", "loopguard", 0.4, 0.5)]
    return pl.DataFrame(
        one
        | {"source": source, "policy": policy, "known": known}
        | {"excess_cfr": cfr, "excess_cfr_low": cfr - 0.1, "excess_cfr_high": cfr + 0.1}
        for source, policy, cfr, known in spans
    )


def test_policies_stand_beside_their_simulation(results: Path, tmp_path: Path) -> None:
    write_findings([results], tmp_path / "findings.md")
    text = (tmp_path / "findings.md").read_text()
    guard = "| guard_promote | 0.40 [0.20, 0.60] | 0.10 [0.00, 0.20] | 0.00 | 0.20 [0.10, 0.30] |"
    assert f"| snapkv 0.500 {guard} 3.0 | 40 | 7 |" in text
    assert "| loopguard | 0.40 [0.20, 0.60] | 0.30 [0.20, 0.40] | 0.00 | unknown |" in text
    assert "38 of 38 had the simulated alarm step and final tokens; of 2 more" in text


def _line(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_claims_follow_the_intervals(results: Path, tmp_path: Path) -> None:
    target = tmp_path / "findings.md"
    write_findings([results], target)
    text = target.read_text()
    metrics = schema.read_table(results / "tables" / "predictor_metrics.parquet")
    headline = metrics.filter(target="any", predictor="hazard", group_by="all", metric="auroc").row(
        0, named=True
    )
    line = _line(text, "| any |")
    assert f"{headline['value']:.2f} [{headline['low']:.2f}, {headline['high']:.2f}]" in line
    assert headline["low"] > 0.5
    assert line.endswith("| above chance |")
    assert "No predictor was trained for `looping`: 0 train prompts" in text
    assert "Transfer between models: m is the only model." in text
    assert "permuted requests | hazard | request | 0.50" in text
    assert "The unit is the prompt" in text

    shaken = metrics.with_columns(low=pl.lit(0.45), low_pointwise=pl.lit(0.45))
    path = results / "tables" / "predictor_metrics.parquet"
    schema.write_table(shaken, path)
    write_findings([results], target)
    schema.write_table(metrics, path)
    assert _line(target.read_text(), "| any |").endswith("| not told from chance |")


def test_a_missing_table_is_named(results: Path, tmp_path: Path) -> None:
    path = results / "tables" / "controls.parquet"
    table = schema.read_table(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no table at .*controls\.parquet"):
        write_findings([results], tmp_path / "findings.md")
    schema.write_table(table, path)
    assert not (tmp_path / "findings.md").exists()
