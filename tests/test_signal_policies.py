"""What deciding on scores buys: by hand, and a whole results folder through the study."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import make_tiny_tokenizer
from test_signal_study import make_run

from kvguard import config, schema
from kvguard.answer_signals import answer_signals, entropy_levels, mark_tokens
from kvguard.oracles import oracle_ending
from kvguard.signal_policies import flagged_runs, full_cache, ladder_choice, pair_table, summarize
from kvguard.signal_report import TABLES, study_run, target_rows
from kvguard.simulation import simulate_policies
from kvguard.stored_requests import StoredRequests, load_requests

PROMPTS = 60
FEW = ("clock_repetition", "logistic_normalised", "gate_logistic_normalised")


def _write_run(folder: Path) -> config.Config:
    """A results folder of a planted run: what `study_run` reads, made without a model."""
    run = make_run(PROMPTS, seed=2)
    names = [name for name in schema.SIGNALS if name != "chosen_rank"]
    harmed = run.outcomes.select(*schema.TRACE_KEYS, "harmed")
    keyed = run.tokens.join(harmed, on=schema.TRACE_KEYS, how="left", maintain_order="left")
    # uncompressed answers hold token 1, a harmed one leaves them at its third token
    wrong = pl.col("harmed") & (pl.col("position") >= 2)
    tokens = keyed.join(
        run.features.select(*schema.TOKEN_KEYS, *names), on=schema.TOKEN_KEYS, maintain_order="left"
    ).with_columns(
        token_id=pl.when(wrong).then(7).otherwise(1).cast(pl.Int32),
        chosen_rank=pl.lit(0, pl.Int32),
        audit_logprob=pl.lit(-0.1, pl.Float32),
        audit_is_argmax=~wrong,
        audit_gap=pl.when(wrong).then(1.0).otherwise(0.0).cast(pl.Float32),
    )
    lengths = tokens.group_by(schema.TRACE_KEYS, maintain_order=True).agg(
        generated_tokens=pl.len().cast(pl.Int32)
    )
    traces = run.outcomes.select(*schema.TRACE_KEYS, "task").join(
        lengths, on=schema.TRACE_KEYS, maintain_order="left"
    )
    kept = 1 - pl.col("ratio").cast(pl.Float64)
    known = {
        "shard": pl.lit(0),
        "seed": pl.lit(0),
        "status": pl.lit("ok"),
        "prompt_tokens": pl.lit(100),
        "max_new_tokens": pl.lit(16),
        "stop_reason": pl.lit("eos"),
        "text": pl.lit("x"),
        "cache_bytes_before": pl.lit(100_000),
        "cache_bytes_after": (100_000 * kept).cast(pl.Int64),
        "kv_kept_bytes_mean": 100_000 * kept,
        "kv_masked_bytes_mean": pl.lit(0.0),
        "kv_padding_bytes_mean": pl.lit(0.0),
        "kv_allocated_bytes_peak": pl.lit(100_000),
        "device_byte_steps": (100_000 * kept * pl.col("generated_tokens")).cast(pl.Int64),
        "device_bytes_peak": pl.lit(100_000),
        "decode_steps": pl.col("generated_tokens"),
    }
    traces = traces.with_columns(**known)
    traces = traces.with_columns(
        pl.lit(None, kind).alias(name)
        for name, kind in schema.TRACES.items()
        if name not in traces.columns
    )
    experiment = config.load_config(
        Path(__file__).parent.parent / "config.yaml",
        overrides={
            "models": [{"name": "m", "source": "hub", "repository": "a/b", "revision": "0" * 40}],
            "tasks": [
                {"kind": kind, "num_prompts": PROMPTS // 2, "max_new_tokens": 16}
                for kind in ("copy", "recall")
            ],
            "presses": [
                {"name": "snapkv", "class": "SnapKVPress", "ratios": [0.15, 0.3]},
                {"name": "knorm", "class": "KnormPress", "ratios": [0.3]},
            ],
            "generation": {"shard_size": PROMPTS // 2, "max_new_tokens": 16},
            "live": {"conditions": []},
        },
    )
    record = experiment.model_dump(mode="json", by_alias=True)
    (folder / "config.json").write_text(json.dumps(record))
    traces, tokens = schema.conform(traces, schema.TRACES), schema.conform(tokens, schema.TOKENS)
    tasks = [task.name for task in experiment.tasks]
    for (press, ratio, task), part in traces.group_by("press", "ratio", "task"):
        place = Path("m", str(press), str(ratio), f"{tasks.index(str(task)):02d}.parquet")
        own = tokens.join(part.select(schema.TRACE_KEYS), on=schema.TRACE_KEYS, how="semi")
        schema.write_table(part, folder / "traces" / place, schema.TRACES)
        schema.write_table(own, folder / "tokens" / place, schema.TOKENS)
    prompts = run.splits.select(
        "prompt_id",
        "task",
        kind="task",
        template=pl.lit(None, pl.String),
        index=pl.lit(0, pl.Int32),
        question=pl.lit("a b c"),
        reference=pl.lit("x"),
        spec=pl.lit("{}"),
    )
    outcomes = run.outcomes.with_columns(
        non_termination=pl.lit(False), amnesia=pl.lit(False), agrees=~pl.col("harmed")
    )
    schema.write_table(prompts, folder / "prompts/prompts.parquet", schema.PROMPTS)
    for name, frame, declared in (
        ("outcomes", outcomes, schema.OUTCOMES),
        ("splits", run.splits, schema.SPLITS),
        ("features", run.features, schema.FEATURES),
        ("labels", run.labels, schema.LABELS),
    ):
        schema.write_table(frame, folder / f"{name}.parquet", declared)
    requests = load_requests(traces, tokens, outcomes)
    simulated = simulate_policies(
        requests,
        ["none", "always_safe", "lossless", "verify_on_failure", "probation", "oracle_end"],
        prompts=prompts,
        live=experiment.live,
        detection=experiment.detection,
    )
    schema.write_table(simulated, folder / "simulation.parquet", schema.RUNS)
    live = simulated.filter(pl.col("policy").is_in(["none", "always_safe", "lossless"]))
    guard = simulated.filter(policy="none").with_columns(policy=pl.lit("guard"))
    live = pl.concat([live, guard.filter(pl.col("press") != "none")])
    live = live.with_columns(source=pl.lit("live"))
    schema.write_table(live, folder / "live/m/all/0.000/all/00.parquet", schema.RUNS)
    (folder / "models").mkdir()
    (folder / "models/baselines.json").write_text("{}")
    make_tiny_tokenizer().save_pretrained(folder / "checkpoints/m")
    return experiment


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, config.Config]:
    folder = tmp_path_factory.mktemp("results")
    return folder, _write_run(folder)


@pytest.fixture(scope="module")
def tables(results: tuple[Path, config.Config]) -> dict[str, pl.DataFrame]:
    return study_run(*results, folds=2, bootstrap_samples=60, names=FEW)


def test_a_results_folder_gives_every_table(tables: dict[str, pl.DataFrame]) -> None:
    assert tuple(tables) == TABLES
    rows = target_rows(tables)
    assert all(not frame.is_empty() for frame in rows.values()), rows
    policies = tables["signal_policies"]
    pooled = policies.filter(pl.col("press").is_null())
    alone = pooled.filter(source="simulation", policy="none").row(0, named=True)
    full = pooled.filter(source="simulation", policy="always_safe").row(0, named=True)
    assert alone["harm_removed"] == pytest.approx(0)
    assert (full["harm_removed"], full["relative_byte_steps"]) == (pytest.approx(1),) * 2
    # removed shares 0.15 and 0.3 of equal prompts: the cost of compression alone is their mean
    assert alone["relative_byte_steps"] == pytest.approx(0.75, abs=0.15)
    assert not alone["within_budget"]
    acted = pooled.filter(source="replay", score="selected").row(0, named=True)
    assert acted["harm_removed"] > 0.6, "the threshold flags nine in ten of the harmed"
    assert 0.2 < acted["flagged"] < 0.95
    gate = pooled.filter(source="replay", score="selected_gate").row(0, named=True)
    assert gate["harmed"] < alone["harmed"]
    assert gate["relative_byte_steps"] > alone["relative_byte_steps"]


def test_the_guard_is_paired_with_each_rival(tables: dict[str, pl.DataFrame]) -> None:
    pairs = tables["signal_pairs"].filter(source="live")
    assert set(pairs["other"]) == {"lossless", "verify_on_failure", "probation", "constant"}
    lossless = pairs.filter(other="lossless").row(0, named=True)
    assert lossless["harm_difference"] > 0.2, "this guard does nothing and lossless repairs"
    assert lossless["harm_p_adjusted"] < 0.01
    # a mixture that costs as much as doing nothing is doing nothing
    constant = pairs.filter(other="constant").row(0, named=True)
    assert constant["harm_difference"] == pytest.approx(0, abs=1e-9)
    assert constant["cost_difference"] == pytest.approx(0, abs=1e-9)
    assert constant["harm_p"] == 1.0


def test_the_ladder_lies_between_its_ends(tables: dict[str, pl.DataFrame]) -> None:
    ladder = tables["signal_ladder"]
    assert ladder["press"].unique().to_list() == ["snapkv"], "knorm ran at one ratio"
    found = {
        (
            row["choice"],
            row["threshold"],
            row["mean_ratio"] if row["choice"] == "constant" else 0,
        ): row
        for row in ladder.iter_rows(named=True)
    }
    oracle = found["oracle_ratio", None, 0]
    assert oracle["harmed"] == 0
    assert found["full cache", None, 0]["relative_byte_steps"] == pytest.approx(1)
    heavy = ladder.filter(choice="constant").sort("mean_ratio").row(-1, named=True)
    assert heavy["harm_removed"] == pytest.approx(0)
    steps = ladder.filter(choice="ladder").sort("threshold")
    assert (np.diff(steps["mean_ratio"].to_numpy()) >= 0).all(), "a laxer threshold goes heavier"
    assert steps["harmed"][0] <= heavy["harmed"]


def test_a_ladder_takes_the_heaviest_ratio_that_is_safe_enough() -> None:
    risk = {
        "0.500": np.array([0.1, 0.3, 0.9, np.nan, 0.01]),
        "0.250": np.array([0.05, 0.1, 0.8, 0.1, 0.4]),
    }
    chosen = ladder_choice(risk, 0.2)
    assert chosen.tolist() == ["0.500", "0.250", "0.000", "0.250", "0.500"]


def _stored(results: tuple[Path, config.Config]) -> StoredRequests:
    folder, _ = results
    parts = {
        name: pl.concat(
            pl.read_parquet(path) for path in sorted((folder / name).rglob("*.parquet"))
        )
        for name in ("traces", "tokens")
    }
    return load_requests(
        parts["traces"], parts["tokens"], pl.read_parquet(folder / "outcomes.parquet")
    )


def test_flagging_what_is_harmed_is_the_oracle(results: tuple[Path, config.Config]) -> None:
    requests = _stored(results)
    harmed = requests.table.filter("harmed")
    for name in ("oracle_gate", "oracle_end"):
        acted = flagged_runs(name, requests, harmed, 16)
        assert not acted["harmed"].any(), name
        nothing = flagged_runs(name, requests, harmed.head(0), 16)
        alone = summarize(
            nothing.with_columns(none_harmed="harmed"), full_cache(requests), samples=20, seed=0
        )
        assert alone["harm_removed"] == pytest.approx(0)
        assert alone["harmed"] == pytest.approx(
            requests.table.filter(pl.col("press") != "none")["harmed"].mean()
        )
    with pytest.raises(ValueError, match="for oracle_gate and oracle_end, got 'oracle_onset'"):
        oracle_ending("oracle_onset", requests, np.zeros(len(requests.lengths), np.bool_))


def test_an_unknown_outcome_leaves_the_sum_unknown(results: tuple[Path, config.Config]) -> None:
    requests = _stored(results)
    runs = flagged_runs("oracle_end", requests, requests.table.head(0), 16)
    unknown = runs.with_columns(
        none_harmed="harmed", harmed=pl.when(pl.int_range(pl.len()) > 0).then("harmed")
    )
    found = summarize(unknown, full_cache(requests), samples=20, seed=0)
    assert found["harm_removed"] is None
    assert found["relative_byte_steps"] is not None
    empty = pair_table({"live": runs.head(0).with_columns(policy=pl.lit("x"))}, requests, [])
    assert empty.is_empty()


def test_levels_lines_and_copies_by_hand() -> None:
    keys = {"model": "m", "press": "knorm", "ratio": "0.300", "prompt_id": "p", "task": "t"}
    own = pl.DataFrame(
        {
            "position": [0, 1, 2, 3],
            "token_id": [5, 6, 9, 6],
            "entropy": [1.0, 2.0, 3.0, 5.0],
            "top_logprob_01": np.log([0.5, 0.25, 0.125, 0.5]),
        },
        schema_overrides={"token_id": pl.Int32, "position": pl.Int32},
    ).with_columns(pl.lit(value).alias(name) for name, value in keys.items())
    texts = {5: "a", 6: "b", 9: ".\n"}
    marked = mark_tokens(own, lambda ids: texts[ids[0]], lambda text: [4, 5, 6], {"p": "a b"})
    assert marked["line_break"].to_list() == [False, False, True, False]
    assert marked["copied"].to_list() == [False, True, False, False], "6 behind 5, not behind 9"
    plain = pl.DataFrame(
        {"press": ["none"] * 7, "task": "t", "position": [0, 0, 0, 1, 1, 1, 2]}
    ).with_columns(entropy=pl.Series([0.5, 1.0, 1.5, 1.0, 1.0, 4.0, 9.0]))
    levels = entropy_levels(plain)
    assert levels["entropy_level"].to_list() == [1.0, 2.0], "one answer makes no level"
    excess, mean, line, second, second_mean, copied = answer_signals(marked, levels).T
    assert excess[:2].tolist() == [0.0, 0.0]
    assert np.isnan(excess[2:]).all()
    assert mean.tolist() == [0.0, 0.0, 0.0, 0.0]
    assert line.tolist() == [1.0, 1.5, 2.0, 5.0]
    assert second == pytest.approx([0.5, 0.25, 0.125, 0.5])
    assert second_mean == pytest.approx([0.5, 0.375, 0.875 / 3, 1.375 / 4])
    assert np.isnan(copied[0])
    assert copied[1:].tolist() == [2.0, 2.0, 2.0]
