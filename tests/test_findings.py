"""docs/findings.md says what the tables say, and nothing that they do not."""

import json
from pathlib import Path

import planted
import polars as pl
import pytest

from kvguard import config, schema
from kvguard.ablation import ablate
from kvguard.calibration import calibrate
from kvguard.certificate import save_certificate
from kvguard.evaluate_predictor import evaluate_predictors
from kvguard.findings import RESULTS_BEGIN, RESULTS_END, write_findings, write_results
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
    failed = run.labels.group_by(schema.TRACE_KEYS).agg(
        harmed=pl.col("steps_to_any").is_not_null().any(), baseline_right=pl.lit(True)
    )
    judged = run.outcomes.drop("harmed", "baseline_right").join(failed, on=schema.TRACE_KEYS)
    judged = judged.with_columns(task=pl.lit("planted"))
    made = calibrate(
        rules,
        predict_tokens({"any": rules}, run.features, splits),
        judged,
        splits,
        controller=config.Controller(),
        certificate=config.CertificateSettings(),
    )
    for name, table in (tables | made.tables).items():
        schema.write_table(table, folder / "tables" / f"{name}.parquet")
    schema.write_table(_policies(), folder / "tables" / "policies.parquet")
    schema.write_table(_harm(), folder / "tables" / "harm.parquet")
    schema.write_table(_harm_metrics(), folder / "tables" / "harm_metrics.parquet")
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
        "live": {"operating_point": "balanced"},
    }
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def _spans(**values: float | None) -> dict[str, float | None]:
    """Each value with an interval of 0.1 on either side."""
    return {
        f"{name}{end}": None if value is None else round(value + reach, 3)
        for name, value in values.items()
        for end, reach in (("", 0.0), ("_low", -0.1), ("_high", 0.1))
    }


def _policies() -> pl.DataFrame:
    """Compression alone, a check of visible failures, a guard and the full cache, all live."""
    one = {"model": "m", "press": "snapkv", "ratio": "0.500", "source": "live", "requests": 20}
    one |= {"device_bytes_peak": 3.0 * 2**20, "tokens_prefilled": 40.0, "tokens_wasted": 7.0}
    one |= {"checks": 1.5, "seconds": 0.25}
    rows = []
    for policy, harmed, silent, cost in (
        ("none", 0.4, 0.3, 0.5),
        ("verify_on_failure", 0.3, 0.3, 0.55),
        ("guard", 0.1, 0.05, 1.2),
        ("always_safe", 0.0, 0.0, 1.0),
    ):
        spans = _spans(harmed=harmed, silent_harm=silent, rescued=0.0, alarmed=0.4)
        rows.append(one | {"policy": policy} | spans | _spans(relative_byte_steps=cost))
    rows.append(rows[2] | {"ratio": "0.750", "relative_byte_steps": 0.8})
    rows.append(rows[2] | {"source": "simulation", "harmed": 0.9})
    return pl.DataFrame(rows)


def _harm() -> pl.DataFrame:
    keys = {"task": "recall", "model": "m", "press": "snapkv", "ratio": "0.500"}
    counts = {"requests": 80, "baseline_right": 70}
    return pl.DataFrame([keys | counts | _spans(harmed=0.4, silent_harm=0.3, rescued=0.02)])


def _harm_metrics() -> pl.DataFrame:
    rows = []
    for compared, difference in (("clock_repetition", 0.2), ("mean_entropy", 0.05)):
        row = {"metric": "same_position", "target": "harm", "predictor": "hazard"}
        row |= {"press": None, "ratio": None, "prompts": 30, "compared_with": compared}
        row |= {"value": 0.8, "low": 0.7, "high": 0.9}
        rows.append(row | _spans(difference=difference))
    return pl.DataFrame(rows, schema_overrides={"press": pl.String, "ratio": pl.String})


def test_what_checking_only_loops_and_overruns_would_have_got(
    results: Path, tmp_path: Path
) -> None:
    write_findings([results], tmp_path / "findings.md")
    text = (tmp_path / "findings.md").read_text()
    section = text.partition("### What checking only loops and overruns")[2].partition("###")[0]
    assert "alone 8 of 20 live test requests are harmed, 6 of them silently" in section
    assert "*check visible failures* leaves 6 of 20 harmed, at 0.55 to 0.55 of" in section
    assert "*guard* leaves 4 of 40 harmed, at 0.80 to 1.20 of" in section
    assert "In 1 of 2 conditions the guard costs **more** device byte-steps" in section
    assert "there: snapkv 0.500 (1.20)" in section
    guard = _line(section, "| snapkv 0.500 | guard |")
    assert guard.endswith(
        "| 10% [0%, 20%] | 5% [-5%, 15%] | 0% [-10%, 10%] | 40% [30%, 50%] "
        "| **1.20 [1.10, 1.30]** | 3.0 | 40 | 7 | 1.5 | 0.25 |"
    )
    assert "**" not in _line(section, "| snapkv 0.500 | full KV cache |")
    assert "38 of 38 had the simulated alarm step and final tokens; of 2 more" in text


def test_what_foresees_harm_is_said_by_the_interval_of_the_difference(
    results: Path, tmp_path: Path
) -> None:
    write_findings([results], tmp_path / "findings.md")
    text = (tmp_path / "findings.md").read_text()
    start = "| same position | harm | 30 | 0.80 [0.70, 0.90] |"
    assert f"{start} clock repetition | 0.20 [0.10, 0.30] | better |" in text
    assert f"{start} mean entropy | 0.05 [-0.05, 0.15] | interval includes no change |" in text
    harm = "| recall | snapkv 0.500 | 70 of 80 | 40% [30%, 50%] | 30% [20%, 40%] |"
    assert harm in text


def test_results_replace_what_lies_between_the_markers(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{RESULTS_BEGIN}\nold\n{RESULTS_END}\nafter\n")
    write_results(results, page)
    write_results(results, page)
    text = page.read_text()
    assert text.startswith(f"before\n{RESULTS_BEGIN}\n\nModel m; ")
    assert text.endswith(f"\n\n{RESULTS_END}\nafter\n")
    assert "old" not in text
    assert text.count("| full KV cache |") == 1
    page.write_text("no marker")
    with pytest.raises(ValueError, match=r"README\.md: no line"):
        write_results(results, page)


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
    assert "What is certified" in text

    shaken = metrics.with_columns(low=pl.lit(0.45), low_pointwise=pl.lit(0.45))
    path = results / "tables" / "predictor_metrics.parquet"
    schema.write_table(shaken, path)
    write_findings([results], target)
    schema.write_table(metrics, path)
    assert _line(target.read_text(), "| any |").endswith("| interval includes chance |")


def test_a_missing_table_is_named(results: Path, tmp_path: Path) -> None:
    path = results / "tables" / "controls.parquet"
    table = schema.read_table(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no table at .*controls\.parquet"):
        write_findings([results], tmp_path / "findings.md")
    schema.write_table(table, path)
    assert not (tmp_path / "findings.md").exists()
