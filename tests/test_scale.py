"""The synthetic sweep that benchmarks/scale.py measures on is a run as the workflow leaves it."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest

from kvguard import schema
from kvguard.config import Labels, load_config
from kvguard.database import build_database, read_view
from kvguard.harm import HARM_COLUMNS, judge_harm
from kvguard.labeling import label_tokens
from kvguard.progress import plan_digest, read_plan

ROOT = Path(__file__).parents[1]
CONDITIONS = (("none", "0.000"), ("snapkv", "0.500"), ("snapkv", "0.875"))


def benchmark(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    return benchmark("scale")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("sweep")
    return benchmark("synthetic_sweep").make_sweep(
        folder, 6000, conditions=CONDITIONS, max_new_tokens=64, prompts_per_shard=20
    )


@pytest.fixture(scope="module")
def tokens(sweep) -> pl.DataFrame:
    return pl.concat(schema.read_table(path, schema.TOKENS) for path in sweep.tokens)


@pytest.fixture(scope="module")
def outcomes(sweep) -> pl.DataFrame:
    return schema.read_table(sweep.outcomes, schema.OUTCOMES)


def test_every_table_belongs_to_the_others(sweep, tokens: pl.DataFrame, tmp_path: Path) -> None:
    assert tokens.height == sweep.rows >= 6000
    assert len(sweep.traces) == len(sweep.tokens) > len(CONDITIONS)
    target = tmp_path / "run.duckdb"
    build_database(target, sweep.prompts, sweep.traces, sweep.tokens, sweep.outcomes, sweep.splits)
    traces = read_view(target, "traces")
    lengths = tokens.group_by(schema.TRACE_KEYS).agg(
        rows=pl.len(), last=pl.col("position").max() + 1
    )
    joined = traces.join(lengths, on=schema.TRACE_KEYS)
    assert joined.height == traces.height == len(CONDITIONS) * read_view(target, "prompts").height
    assert (joined["generated_tokens"] == joined["rows"]).all()
    assert (joined["generated_tokens"] == joined["last"]).all()
    assert set(read_view(target, "splits")["split"]) == set(schema.SPLIT_NAMES)


def test_planted_harm_is_harm_and_makes_labels(
    tokens: pl.DataFrame, outcomes: pl.DataFrame
) -> None:
    judged = judge_harm(outcomes, outcomes)
    for name in HARM_COLUMNS:
        assert outcomes[name].to_list() == judged[name].to_list(), name
    harmed = outcomes.filter("harmed")
    assert 10 < harmed.height < outcomes.height / 2
    assert harmed["harm_onset"].null_count() == 0
    assert outcomes.filter(~pl.col("harmed"))["harm_onset"].null_count() == (
        outcomes.height - harmed.height
    )
    labels = label_tokens(tokens, outcomes, Labels(horizon_tokens=8))
    onsets = labels.filter(pl.col("steps_to_harm") == 0)
    assert onsets.height == harmed.height  # each lies inside its answer
    assert labels["hazard_harm"].sum() > harmed.height
    assert labels["hazard_looping"].sum() > 0


def test_a_compressed_answer_leaves_the_uncompressed_one_where_its_audit_rejects(
    tokens: pl.DataFrame, outcomes: pl.DataFrame
) -> None:
    answers = tokens.group_by(schema.TRACE_KEYS, maintain_order=True).agg("token_id", "audit_gap")
    rows = {row[:4]: row[4:] for row in answers.iter_rows()}
    seen = 0
    for model, press, ratio, prompt, first in outcomes.select(
        *schema.TRACE_KEYS, "first_rejected"
    ).iter_rows():
        ids, gaps = rows[model, press, ratio, prompt]
        base, _ = rows[model, "none", "0.000", prompt]
        rejected = np.flatnonzero(gaps).tolist()
        assert rejected == ([] if first is None else [first])
        if first is None:
            assert ids == base
        else:
            assert ids[:first] == base[:first]
            assert ids[first] != base[first]
            seen += 1
    assert seen > 20


def test_growth_compares_the_largest_size_with_the_smallest(scale: ModuleType) -> None:
    def stage(name: str, rows: int, seconds: float) -> dict[str, object]:
        used = {"seconds": seconds, "cpu_seconds": 2 * seconds, "peak_rss_bytes": 100}
        return {"stage": name, "rows": rows} | used

    stages = [stage("a", 10, 1.0), stage("b", 10, 1.0), stage("a", 100, 8.0), stage("a", 50, 9.0)]
    assert scale.growth(stages) == [
        {
            "stage": "a",
            "rows_ratio": 10.0,
            "seconds_ratio": 8.0,
            "cpu_ratio": 8.0,
            "peak_rss_ratio": 1.0,
        }
    ]


def test_the_large_plan_holds_as_many_jobs_as_asked_and_half_of_them_are_done(
    scale: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper = [ROOT / "config.yaml", ROOT / "experiments" / "paper.yaml"]
    overlay = tmp_path / "large.yaml"
    overlay.write_text(json.dumps(scale.large_overlay(paper, 500)))
    experiment = load_config(*paper, overlay)
    jobs = len(experiment.models) * len(experiment.conditions) * len(experiment.shards)
    assert 500 <= jobs < 500 + 32
    assert not experiment.jobs.list_shards
    overlay.write_text(json.dumps(scale.large_overlay(paper, 500, shards_per_job=16)))
    listed = load_config(*paper, overlay)
    assert listed.jobs.list_shards
    assert len(listed.shards) == len(experiment.shards)
    assert scale.record_half_done(experiment, tmp_path) == jobs
    monkeypatch.chdir(tmp_path)
    plan = read_plan(experiment.results_dir, plan_digest(experiment))
    assert plan is not None
    assert [(stage.rule, stage.done, stage.left) for stage in plan.stages] == [
        ("generate", jobs // 2, jobs - jobs // 2)
    ]


def test_the_sweep_on_paper_counts_the_configurations_jobs() -> None:
    sweep = benchmark("sweep")
    paper = load_config(ROOT / "config.yaml", ROOT / "experiments" / "paper.yaml")
    found = sweep.phases(paper, 200)
    # 2 models, 16 conditions (15 compressed), 2 shards; 6 live conditions of 17 policies
    assert [(phase.name, phase.jobs) for phase in found] == [
        ("generation", 2 * 16 * 2),
        ("harm onsets", 2 * 15 * 2),
        ("live policies", 2 * 6 * 17),
    ]
    # 250 answers of 200 tokens, 64 at a time, and a drain of 512 steps, at 20 ms each; 250 prompts
    # of 600 tokens and an audit of 800, at 16.06 GFLOP a token and 495 TFLOP/s
    by_hand = (250 * 200 / 64 + 512) * 0.020 + 250 * (600 + 800) * 16.06e9 / 495e12
    assert found[0].seconds == pytest.approx(by_hand)


def test_waves_and_the_share_of_starting() -> None:
    sweep = benchmark("sweep")
    start = 10 + 16.06 / 2  # seconds: imports, and the weights at 2 GB/s
    found = sweep.on_gpus([sweep.Phase("generation", 3, 60.0)], 2)
    assert found["start_s"] == pytest.approx(start)
    assert found["generation minutes"] == pytest.approx(2 * (start + 60) / 60)
    assert found["gpu_hours"] == pytest.approx(3 * (start + 60) / 3600)
    assert found["start_share"] == pytest.approx(start / (start + 60))
    # 5 shards of either of two ways to load the model, at most 3 a job: 2 + 2 jobs on 2 GPUs
    found = sweep.on_gpus([sweep.Phase("generation", 10, 60.0, loads=2)], 2, 3)
    assert found["generation minutes"] == pytest.approx(2 * (start + 2.5 * 60) / 60)
    assert found["start_share"] == pytest.approx(4 * start / (4 * start + 10 * 60))
    # 64 at once: 10 GB/s for all of them
    assert sweep.start_seconds(64) == pytest.approx(10 + 64 * 16.06 / 10)
