"""docs/findings.md says what the tables say, and nothing that they do not."""

import json
import shutil
from pathlib import Path

import planted
import polars as pl
import pytest

from kvguard import config, schema
from kvguard.ablation import ablate
from kvguard.calibration import calibrate
from kvguard.certificate import save_certificate
from kvguard.compare_policies import constant_frontier, summarize_runs
from kvguard.evaluate_predictor import evaluate_predictors
from kvguard.findings import (
    DERIVED,
    RESULTS_BEGIN,
    RESULTS_END,
    write_findings,
    write_results,
)
from kvguard.findings_policies import observed, policy_table
from kvguard.findings_tests import planned_section
from kvguard.imported_models import ImportedFile, Origin
from kvguard.policy_tests import compare_listed, live_tables
from kvguard.predictor import rules_predictor
from kvguard.splits import split_prompts
from kvguard.train import predict_tokens, train_predictors
from kvguard.trainer import make_trainer
from kvguard.transfer import leave_one_out

SETTINGS = config.Predictor(
    targets=["any", "looping"],
    search_trials=0,
    search_folds=2,
    max_rounds=12,
    bootstrap_samples=100,
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables of a small run with planted truth; looping never happens in it."""
    folder = tmp_path_factory.mktemp("results")
    run = planted.planted_hazard(prompts=48, seed=4)
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
    live, simulated = _runs("live"), _runs("simulation")
    experiment = _experiment()
    for key, part in live.group_by("press", "ratio", "policy", "task"):
        shard = ("recall", "copy").index(str(key[3]))
        place = folder / "live" / "m" / str(key[0]) / str(key[1]) / str(key[2])
        schema.write_table(part, place / f"{shard:02d}.parquet", schema.RUNS)
    schema.write_table(simulated, folder / "simulation.parquet", schema.RUNS)
    policies = [
        summarize_runs(runs, _outcomes(runs), bootstrap_samples=50).with_columns(
            source=pl.lit(source)
        )
        for source, runs in (("live", live), ("simulation", simulated))
    ]
    frontier = constant_frontier(pl.concat(policies), measured=policies[1])
    schema.write_table(frontier, folder / "tables" / "policies.parquet")
    schema.write_table(_harm(), folder / "tables" / "harm.parquet")
    schema.write_table(_harm_metrics(), folder / "tables" / "harm_metrics.parquet")
    reasons = pl.DataFrame({"reason": ["same", "not simulated"], "requests": [38, 2]})
    schema.write_table(reasons, folder / "tables" / "simulation_reasons.parquet")
    save_certificate(made.certificate, folder / "models" / "certificate.json")
    described = experiment.model_dump(mode="json", by_alias=True, exclude={"jobs"})
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def _experiment() -> config.Config:
    """Two tasks, a press at two ratios, five policies live."""
    tasks = [{"kind": kind, "num_prompts": 50, "max_new_tokens": 60} for kind in TASKS]
    presses = [{"name": "snapkv", "class": "SnapKVPress", "ratios": list(map(float, COSTS_OF))}]
    return config.load_config(
        Path(__file__).parents[1] / "config.yaml",
        overrides={
            "name": "planted",
            "models": [{"name": "m", "source": "hub", "repository": "a/b", "revision": 40 * "0"}],
            "tasks": tasks,
            "presses": presses,
            "splits": {"train": 0.4, "calibration": 0.4, "test": 0.2},
            "predictor": {"bootstrap_samples": 50},
            "live": {"policies": ["none", "guard", "lossless", "always_safe"], "shard_size": 24},
        },
    )


TASKS = ("recall", "copy")
COSTS_OF = {"0.500": 0.5, "0.750": 0.25}
"""Device byte-steps of compression alone at each ratio, as shares of the full cache's."""


MOVED = {"guard": 890, "lossless": 5340}
"""Bytes of entries; 0.2 and 1.2 of what offloading moves."""


def _runs(source: str) -> pl.DataFrame:
    """20 test prompts, two tasks, two ratios; who is harmed is planted.

    Compression alone harms 8 prompts of a task at 0.750 and 4 at 0.500, all but one silently; the
    guard repairs half of them and costs 1.2 times the full cache at 0.500. A check of visible
    failures is simulated only and repairs the one that is visible.
    """
    rows: list[dict[str, object]] = []
    for ratio, cheap in COSTS_OF.items():
        harmed = 8 if ratio == "0.750" else 4
        spent = {"none": cheap, "guard": 1.2 if ratio == "0.500" else 0.8, "always_safe": 1.0}
        left = {"none": harmed, "guard": harmed // 2, "always_safe": 0}
        if source == "live":
            spent["lossless"], left["lossless"] = 1.5, 0
        else:
            spent["verify_on_failure"], left["verify_on_failure"] = cheap + 0.1, harmed - 1
        for policy, cost in spent.items():
            for number, task in enumerate(10 * TASKS):
                hurt = number // 2 < left[policy]
                visible = number // 2 == harmed - 1
                row: dict[str, object] = {"model": "m", "press": "snapkv", "ratio": ratio}
                row |= {"prompt_id": f"{number:016d}", "task": task, "policy": policy}
                row |= {"source": source, "status": "ok", "stop_reason": "eos", "shard": 0}
                row |= {"alarmed": policy == "guard" and hurt, "harmed": hurt, "rescued": False}
                row |= {"silent_harm": hurt and not visible, "right": not hurt, "agrees": not hurt}
                row |= {"looping": hurt and visible, "catastrophe": hurt and visible}
                row |= {"device_byte_steps": round(1000 * cost * (10 + number))}
                if policy != "always_safe":  # costs vary: up and down by a prompt's place
                    row["device_byte_steps"] += (-1) ** (number // 2) * 100
                row |= {"device_bytes_peak": 3 * 2**20, "tokens_prefilled": 40, "tokens_wasted": 7}
                row |= {"checks": 1, "seconds": 0.25, "decode_steps": 9, "host_byte_steps": 0}
                # Offloading moves 4450: 400, then 410 to 490 in 9 steps.
                row |= {"prompt_tokens": 40, "cache_bytes_before": 400}
                rows.append(row | {"bytes_moved": MOVED.get(policy, 0)})
    if source == "simulation":  # the uncompressed run of the same prompts
        for number, task in enumerate(10 * TASKS):
            row = rows[number] | {"press": "none", "ratio": "0.000", "policy": "none"}
            row |= {"prompt_id": f"{number:016d}", "task": task, "harmed": False, "right": True}
            row |= {"silent_harm": False, "looping": False, "catastrophe": False}
            rows.append(row | {"device_byte_steps": 1000 * (10 + number)})
    return pl.DataFrame(rows, schema=schema.RUNS)


def _outcomes(runs: pl.DataFrame) -> pl.DataFrame:
    """The uncompressed run of each prompt: right, no failure."""
    return (
        runs.select("prompt_id")
        .unique()
        .with_columns(model=pl.lit("m"), press=pl.lit("none"), right=True, catastrophe=False)
    )


def _spans(**values: float | None) -> dict[str, float | None]:
    """Each value with an interval of 0.1 on either side."""
    return {
        f"{name}{end}": None if value is None else round(value + reach, 3)
        for name, value in values.items()
        for end, reach in (("", 0.0), ("_low", -0.1), ("_high", 0.1))
    }


def _harm() -> pl.DataFrame:
    keys = {"task": "recall", "model": "m", "press": "snapkv", "ratio": "0.500"}
    counts = {"requests": 80, "baseline_right": 70}
    return pl.DataFrame([keys | counts | _spans(harmed=0.4, silent_harm=0.3, rescued=0.02)])


def _harm_metrics() -> pl.DataFrame:
    """The predictor beats the clock, over all conditions and for one task, and not the entropy."""
    rows = []
    for task in (None, "recall"):
        for compared, difference in (("clock_repetition", 0.2), ("mean_entropy", 0.05)):
            row = {"metric": "same_position", "target": "harm", "predictor": "hazard"}
            row |= {"task": task, "press": None, "ratio": None, "compared_with": compared}
            row |= {"prompts": 30, "requests": 60, "harmed": 20}
            row |= {"value": 0.8, "low": 0.7, "high": 0.9}
            rows.append(row | _spans(difference=difference))
    few = _spans(difference=0.3) | {"difference_low": None, "difference_high": None}
    rows.append(rows[-1] | few | {"task": "copy"})
    texts = dict.fromkeys(("task", "press", "ratio"), pl.String)
    return pl.DataFrame(rows, schema_overrides=texts)


def _section(text: str, title: str) -> str:
    return text.partition(f"### {title}")[2].partition("\n###")[0]


def _written(results: Path, tmp_path: Path) -> str:
    write_findings([results], tmp_path / "findings.md")
    return (tmp_path / "findings.md").read_text()


def test_what_checking_only_loops_and_overruns_would_have_got(
    results: Path, tmp_path: Path
) -> None:
    """One table: also of a policy that was only simulated."""
    text = _written(results, tmp_path)
    section = _section(text, "In short")
    assert "alone 24 of 40 live test requests (20 prompts under 2 conditions) are" in section
    assert "harmed, 20 of them silently" in section
    assert "*check visible failures (simulated)* leaves 20 of 40 harmed, at least 0.47" in (section)
    assert "*guard* leaves 12 of 40 harmed, at 1.00 of" in section
    assert "In 1 of 2 conditions the guard costs **more** device byte-steps" in section
    assert "there: snapkv 0.500 (1.20)" in section
    section = _section(text, "What checking only loops and overruns")
    first = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| ")]
    assert first[2:] == [
        "| compression alone",
        "| check visible failures (simulated)",
        "| guard",
        "| lossless",
        "| full KV cache",
    ]
    assert "| 0 of 40 [0%, 18%] |" in _line(section, "| lossless |")
    assert "| **1.50 [1.50, 1.50]** | **1.20 [1.20, 1.20]** |" in _line(section, "| lossless |")
    assert "| 0.20 [0.20, 0.20] |" in _line(section, "| guard |")
    assert "| 1 (reference) | 0 |" in _line(section, "| full KV cache |")
    assert "**" not in _line(section, "| full KV cache |")


def test_every_policy_stands_beside_a_constant_ratio_of_equal_cost(
    results: Path, tmp_path: Path
) -> None:
    text = _written(results, tmp_path)
    section = _section(text, "Every policy")
    # At 0.8 of the full cache's byte-steps, between (0.5, 40 % harmed) and (1, 0): 16 %.
    cells = _line(section, "| snapkv 0.750 | guard |").split(" | ")
    assert cells[2].startswith("8 of 20 [")
    assert cells[8] == "16%"
    assert _line(section, "| snapkv 0.500 | guard |").split(" | ")[8] == "-"
    assert "38 of 38 had the simulated alarm step and final tokens; of 2 more" in text
    by_task = _section(text, "By task")
    assert _line(by_task, "| copy | guard |").startswith("| copy | guard | 6 of 20 [")


def test_a_condition_without_a_full_cache_run_has_no_relative_cost(results: Path) -> None:
    rows = pl.read_parquet(results / "tables/policies.parquet").filter(policy="guard")
    alone = rows.with_columns(
        pl.lit(None, pl.Float64).alias(name) for name in rows.columns if "relative" in name
    )
    line = _line(policy_table(alone.to_dicts()), "| snapkv 0.750 | guard |")
    assert line.split(" | ")[6] == "undefined"


def test_planned_comparisons_are_a_table_of_their_own(results: Path, tmp_path: Path) -> None:
    assert "Planned comparisons" not in _written(results, tmp_path)
    tests = compare_listed(_runs("live"), [("lossless", "guard"), ("ladder", "gate")])
    section = planned_section(tests)
    cells = _line(section, "| lossless against guard |").split(" | ")
    assert cells[1:3] == ["0 and 12 of 40", "0 / 12"]
    # One of two pairs ran: nothing to adjust. 12 discordant pairs, all of one kind.
    assert cells[4] == "< 0.001"
    assert cells[7] == "1.00 (the same in every pair)"
    missing = _line(section, "| ladder of ratios against gate at prefill |")
    assert missing.count("undefined") == 6


def test_three_tests_say_what_is_supported(results: Path, tmp_path: Path) -> None:
    section = _section(_written(results, tmp_path), "Three tests")
    assert "1 of 1 presses do silent harm whose interval lies above 5%" in section
    harm = _section(_written(results, tmp_path), "What compression breaks")
    assert "| 32 of 80 [30%, 51%] | 24 of 80 [21%, 41%] | yes | 2 |" in harm
    # 20 harmed requests, two per prompt: at least 10 prompts. 2 * t.sf(2 * t.ppf(0.975, 9), 9)
    assert "Minus clock repetition: 0.20 [0.10, 0.30], adjusted p 0.003: supported." in section
    assert "Minus mean entropy: 0.05 [-0.05, 0.15], adjusted p 0.287: not supported." in section
    # 12 pairs differ, all for the same side: 2 * 0.5 ** 12, times 3 rivals.
    alone = _line(section, "| all | compression alone |")
    assert "| 12 and 24 of 40 | 0 / 12 | -30% [" in alone
    assert alone.split(" | ")[5] == "0.001"
    assert "| all | full KV cache | 12 and 0 of 40 | 12 / 0 | 30% [" in section
    assert "| all | check visible failures |" not in section


def test_older_runs_get_the_tables_that_they_lack(results: Path, tmp_path: Path) -> None:
    """As `summarize_live` would write them."""
    before = _written(results, tmp_path)
    made = live_tables(_runs("live"), _runs("simulation"), 50, 0)
    assert tuple(made) == (*DERIVED, "planned_tests")
    assert made["planned_tests"].is_empty()
    paths = [results / "tables" / f"{name}.parquet" for name in DERIVED]
    for name, path in zip(DERIVED, paths, strict=True):
        schema.write_table(made[name], path)
    assert _written(results, tmp_path) == before
    for path in paths:
        path.unlink()


def test_a_certificate_is_a_table_with_bounds(results: Path, tmp_path: Path) -> None:
    section = _section(_written(results, tmp_path), "What is certified")
    assert "on which the settings were chosen: in sample" in section
    assert "primary statements are certified" in section
    table = schema.read_table(results / "tables" / "certificate.parquet")
    uses = table.select("press", "ratio", "task").n_unique()
    assert section.count("[at most ") >= uses
    row = {"observed": 0.0, "units": 5, "requests": 5, "delta": 0.1}
    assert observed(row) == "0% of 5 [at most 37%]"  # 1 - 0.1 ** (1 / 5)
    assert observed(row | {"observed": 1.0}) == "100% of 5 [at most 100%]"
    assert observed(row | {"requests": 10}) == "0% of 5"
    assert observed(row | {"observed": None}) == "no such request"


def test_what_foresees_harm_is_said_by_the_interval_of_the_difference(
    results: Path, tmp_path: Path
) -> None:
    text = _written(results, tmp_path)
    start = "same position | harm | 20 of 60 | 30 | 0.80 [0.70, 0.90] |"
    section = _section(text, "What foresees harm")
    assert f"| all | {start} clock repetition | 0.20 [0.10, 0.30] | better |" in section
    assert f"| all | {start} mean entropy | 0.05 [-0.05, 0.15] | interval includes no" in section
    assert f"| recall | {start} clock repetition |" in section  # its own group, and named
    assert "1 of 5 comparisons are left out: undefined, or too few prompts" in section
    assert "| copy |" not in section
    assert "Right uncompressed: recall 70 of 80." in text
    assert "| snapkv 0.500 | 32 of 80 [30%, 50%], 24 |" in text


def test_a_run_is_read_in_minutes(results: Path, tmp_path: Path) -> None:
    text = _written(results, tmp_path)
    section = text.partition("## Run `planted`")[2]
    assert len(section.splitlines()) <= 150
    points = _section(text, "In short").splitlines()[2:]
    assert 3 <= len(points) <= 6
    assert all(point.startswith("- ") for point in points)


def test_why_compression_alone_can_cost_more(results: Path, tmp_path: Path) -> None:
    path = results / "tables" / "policies.parquet"
    table = schema.read_table(path)
    dear = pl.when(policy=pl.lit("none"), source=pl.lit("live"), ratio=pl.lit("0.500"))
    shaken = table.with_columns(
        relative_byte_steps=dear.then(1.1).otherwise("relative_byte_steps"),
        decode_steps=dear.then(21.0).otherwise("decode_steps"),
    )
    schema.write_table(shaken, path)
    section = _section(_written(results, tmp_path), "Every policy")
    schema.write_table(table, path)
    assert "snapkv 0.500 (21 decode steps against 9)." in section
    assert "decode steps against" not in _section(_written(results, tmp_path), "Every policy")


def test_no_number_stands_without_an_interval_or_a_reason(results: Path, tmp_path: Path) -> None:
    """Where nothing varied an exact interval stands."""
    text = _written(results, tmp_path)
    for title in ("What checking only", "By task", "Three tests"):
        for line in _section(text, title).splitlines():
            for cell in line.split(" | "):
                assert " of " not in cell or "[" in cell or " and " in cell or "." in cell, line
    assert "0.00 [0.00, 0.00]" not in text
    assert "0% [0%, 0%]" not in text


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
    controls = schema.read_table(results / "tables" / "controls.parquet")
    wrong = controls.drop_nulls("expected").filter(as_expected=False)
    section = _section(text, "Controls that must fail")
    assert "*permuted requests*" in section
    assert section.count("\n| permuted") == wrong.filter(control="permuted requests").height
    assert "What is certified" in text

    shaken = metrics.with_columns(low=pl.lit(0.45), low_pointwise=pl.lit(0.45))
    path = results / "tables" / "predictor_metrics.parquet"
    schema.write_table(shaken, path)
    write_findings([results], target)
    schema.write_table(metrics, path)
    assert _line(target.read_text(), "| any |").endswith("| interval includes chance |")


def test_a_run_with_another_one_s_models_says_where_they_come_from(
    results: Path, tmp_path: Path
) -> None:
    origin = Origin(
        run="before",
        results_dir="results/before",
        manifest_sha256="a" * 64,
        kvguard="0.1.0",
        commit=None,
        seed=3,
        files={"harm_model.json": ImportedFile(sha256="b" * 64, code=None)},
        train_prompts=20,
        calibration_prompts=10,
        tested_there=0,
        shared_templates=0,
        transfer=("model larger (trained on small)",),
    )
    (tmp_path / "models").mkdir()
    (tmp_path / "models/origin.json").write_text(origin.model_dump_json())
    live = _runs("live")
    tables = live_tables(live, live.clear(), 50, 0, [("guard", "none")])
    tables["policies"] = constant_frontier(
        summarize_runs(live, _outcomes(live), bootstrap_samples=50).with_columns(
            source=pl.lit("live")
        )
    )
    for name, table in tables.items():
        schema.write_table(table, tmp_path / f"tables/{name}.parquet")
    shutil.copy(results / "config.json", tmp_path)
    text = _written(tmp_path, tmp_path)
    told = _section(text, "Where the models come from")
    assert "the run `before` (manifest aaaaaaaaaaaaaaaa, seed 3)" in told
    assert (
        "trained on 20 prompts and calibrated on 10; none of them is a prompt of this run" in told
    )
    assert "**Transfer**, not what they were trained on: model larger (trained on small)." in told
    assert "### Every policy" in text
    assert "What foresees harm" not in text


def test_a_missing_table_is_named(results: Path, tmp_path: Path) -> None:
    path = results / "tables" / "controls.parquet"
    table = schema.read_table(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no table at .*controls\.parquet"):
        write_findings([results], tmp_path / "findings.md")
    schema.write_table(table, path)
    assert not (tmp_path / "findings.md").exists()
