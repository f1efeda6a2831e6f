"""A finished run's study of signals: reads its files, makes the tables, says them in rows.

The tables and the plan they answer: docs/experiments/003-signals.md.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from kvguard import config, schema
from kvguard.integrity import expected_shards
from kvguard.signal_answers import load_answers
from kvguard.signal_policies import ladder_table, pair_table, policy_table
from kvguard.signal_study import (
    ANSWER,
    MODEL_NAMES,
    build_study,
    difference_table,
    measure_sample,
    score_table,
    transfer_table,
)
from kvguard.splits import prompts_of
from kvguard.stored_requests import load_requests
from kvguard.train import Models, load_models

logger = logging.getLogger(__name__)

TABLES = (
    "signal_scores",
    "signal_tests",
    "signal_policies",
    "signal_pairs",
    "signal_ladder",
    "signal_transfer",
)


class RunTables(NamedTuple):
    """What the study reads of a run; ``live`` may be empty."""

    traces: pl.DataFrame
    tokens: pl.DataFrame
    outcomes: pl.DataFrame
    splits: pl.DataFrame
    prompts: pl.DataFrame
    simulation: pl.DataFrame
    live: pl.DataFrame


def read_run(results: Path, experiment: config.Config) -> RunTables:
    """Read the tables of a finished run.

    Raises:
        FileNotFoundError: one is missing; names it.
    """
    shards = expected_shards(experiment)
    parts = {
        name: pl.concat(schema.read_table(shard.path(results, name), declared) for shard in shards)
        for name, declared in (("traces", schema.TRACES), ("tokens", schema.TOKENS))
    }
    live = [
        schema.read_table(path, schema.RUNS) for path in sorted(results.glob("live/**/*.parquet"))
    ]
    return RunTables(
        **parts,
        outcomes=schema.read_table(results / "outcomes.parquet", schema.OUTCOMES),
        splits=schema.read_table(results / "splits.parquet", schema.SPLITS),
        prompts=schema.read_table(results / "prompts/prompts.parquet", schema.PROMPTS),
        simulation=schema.read_table(results / "simulation.parquet", schema.RUNS),
        live=pl.concat(live) if live else pl.DataFrame(schema=schema.RUNS),
    )


def study_run(
    results: Path,
    experiment: config.Config,
    *,
    folds: int = 5,
    bootstrap_samples: int = 2000,
    names: Sequence[str] = MODEL_NAMES,
) -> dict[str, pl.DataFrame]:
    """All tables of `TABLES` for a results folder; nothing in it is changed.

    Args:
        results: of a finished run.
        experiment: its configuration.
        folds: of the cross-fitted sample.
        bootstrap_samples: resamples of prompts.
        names: models to fit, of `MODEL_NAMES`.

    Raises:
        FileNotFoundError: the run is not finished; names the missing file.
        ValueError: several models, whose tokens need several tokenizers; or nothing was judged.
    """
    if len(experiment.models) != 1:
        names = [model.name for model in experiment.models]
        raise ValueError(f"models: the study reads runs of one model, got {names}")
    run, seed = read_run(results, experiment), experiment.seed
    decode, encode = _tokenizer(results / "checkpoints" / experiment.models[0].name)
    answers = load_answers(
        results / "features.parquet",
        results / "labels.parquet",
        run.tokens,
        run.outcomes,
        run.splits,
        dict(run.prompts.select("prompt_id", "question").iter_rows()),
        decode,
        encode,
    )
    models: Models | None = load_models(results / "models")
    study = build_study(
        answers,
        run.splits,
        models=models,
        names=names,
        folds=folds,
        bootstrap_samples=bootstrap_samples,
        seed=seed,
    )
    logger.info("chosen on train and calibration prompts: %s", study.choice.models)
    measured = {sample.name: measure_sample(sample, answers) for sample in study.samples}
    test = prompts_of(run.splits, "test")
    requests = load_requests(
        run.traces, run.tokens, run.outcomes, guard=experiment.guard, prompt_ids=test
    )
    runs = {
        name: table.filter(pl.col("prompt_id").is_in(test))
        for name, table in (("live", run.live), ("simulation", run.simulation))
        if table.height
    }
    conditions = experiment.live_conditions
    chosen: dict[str, Any] = {"samples": bootstrap_samples, "seed": seed}
    holdback = experiment.guard.holdback_tokens
    return {
        "signal_scores": score_table(study, measured),
        "signal_tests": difference_table(study, measured),
        "signal_policies": policy_table(
            study, requests, runs, conditions, holdback_tokens=holdback, **chosen
        ),
        "signal_pairs": pair_table(runs, requests, conditions, **chosen),
        "signal_ladder": ladder_table(study, requests, run.splits, **chosen),
        "signal_transfer": transfer_table(study, run.splits, folds=folds, seed=seed),
    }


def _tokenizer(checkpoint: Path) -> tuple[Any, Any]:
    from tokenizers import Tokenizer

    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}; `snakemake` makes it")
    own = Tokenizer.from_file(str(path))
    return own.decode, lambda text: own.encode(text, add_special_tokens=False).ids


def target_rows(tables: dict[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
    """The rows that answer the plan, by title: what a reader looks at first."""
    scores = tables["signal_scores"].filter(
        *(pl.col(name).is_null() for name in ("task", "press", "ratio"))
    )
    shown = ("sample", "score", "value", "low", "high", "goal", "conditions", "silent", "is")

    def ranked(moment: str, metric: str) -> pl.DataFrame:
        found = scores.filter(pl.col("moment") == moment, pl.col("metric") == metric)
        ordered = found.sort("sample", "value", descending=[True, True], nulls_last=True)
        return _interval(ordered.select(shown), "value")

    tests = tables["signal_tests"]
    ladder, policies = tables["signal_ladder"], tables["signal_policies"]
    return {
        "1. Silent harm of an answer: AUROC within condition": ranked("token", ANSWER),
        "1b. At each answer's own end": ranked("token", "request_end"),
        "1c. Before the onset": ranked("token", "request"),
        "2. Before the first token": ranked("first token", ANSWER),
        "3. Minus the clock, same position": _interval(
            tests.filter(pl.col("family") == "-").drop("family", "p_value", "p_adjusted", "metric"),
            "difference",
        ),
        "Families of tests": _interval(tests.filter(pl.col("family") != "-"), "difference"),
        "4. Harm removed and cost, all live conditions": _interval(
            policies.filter(pl.col("press").is_null())
            .drop("press", "ratio", "harmed_low", "harmed_high", "within_budget")
            .rename({"relative_low": "relative_byte_steps_low"})
            .rename({"relative_high": "relative_byte_steps_high"}),
            "",
        ),
        "4b. By condition": policies.filter(pl.col("press").is_not_null()).select(
            "source",
            "policy",
            "score",
            "press",
            "ratio",
            "harmed",
            "harm_removed",
            "relative_byte_steps",
            "within_budget",
        ),
        "5. guard against its rivals": tables["signal_pairs"].rename(
            {
                f"{kind}_{end}": f"{kind}_difference_{end}"
                for kind in ("harm", "cost")
                for end in ("low", "high")
            }
        ),
        "Ladder of ratios": ladder.select(
            "press",
            "choice",
            "threshold",
            "mean_ratio",
            "full_cache",
            "harmed",
            "harm_removed",
            "relative_byte_steps",
        ),
        "Transfer": _interval(tables["signal_transfer"], "value"),
    }


def _interval(frame: pl.DataFrame, name: str) -> pl.DataFrame:
    """``low`` and ``high`` named after the number that they belong to, as the printer wants."""
    return frame.rename(
        {end: f"{name}_{end}" for end in ("low", "high") if end in frame.columns and name}
    )
