"""The same configuration gives the same tables and models, byte for byte after sorting.

At tiny size and without Snakemake, once in this process and once in another one, whose sets and
dicts of strings have another order. ``test_interruptions`` compares two runs of the whole workflow.
"""

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import torch
from conftest import make_tiny_model, make_tiny_tokenizer
from same_results import assert_same_results, files
from synthetic import make_run, write_run

from kvguard import config, schema
from kvguard.detectors import detect_outcomes
from kvguard.experiment import run_shard
from kvguard.feature_files import build_features
from kvguard.labeling import build_labels
from kvguard.models import LoadedModel
from kvguard.prompts import load_tasks, prompts_frame
from kvguard.splits import split_prompts
from kvguard.train import save_models, train_predictors, write_predictions
from kvguard.trainer import make_trainer

EXPERIMENT = {
    "tasks": [{"kind": "gsm_symbolic", "num_prompts": 4, "few_shot": 0}],
    "presses": [
        {
            "name": "snapkv",
            "class": "SnapKVPress",
            "kwargs": {"window_size": 8},
            "ratios": ["0.500"],
        }
    ],
    "generation": {"max_new_tokens": 16, "batch_size": 3, "shard_size": 4},
}

FITTED = config.Predictor(targets=["any", "looping"], search_trials=2, search_folds=2, max_rounds=8)


def write_results(results: Path) -> None:
    """Answers of a tiny model and their judgement; labels to predictions of a synthetic run."""
    experiment = config.load_config("config.yaml", overrides=EXPERIMENT)
    prompts, examples = load_tasks(experiment.tasks, experiment.seed)
    model = LoadedModel(
        make_tiny_model("llama"), make_tiny_tokenizer(), (2,), torch.device("cpu"), "tiny", "0" * 16
    )
    shards = []
    for press, ratio in ((None, "0.000"), (experiment.presses[0], "0.500")):
        shard = run_shard(
            model,
            prompts,
            examples[prompts[0].task],
            press=press,
            ratio=ratio,
            shard=0,
            experiment=experiment,
        )
        schema.write_table(shard.traces, results / f"traces/{ratio}.parquet", schema.TRACES)
        schema.write_table(shard.tokens, results / f"tokens/{ratio}.parquet", schema.TOKENS)
        shards.append(shard)
    traces, tokens = (pl.concat(each[i] for each in shards) for i in range(2))
    outcomes = detect_outcomes(prompts_frame(prompts), traces, tokens, experiment.detection)
    schema.write_table(outcomes, results / "outcomes.parquet", schema.OUTCOMES)

    run = make_run(num_prompts=24, shard_size=12)
    written = write_run(run, results / "synthetic")
    labels, features = results / "labels.parquet", results / "features.parquet"
    build_labels(written.tokens, run.outcomes, experiment.labels, labels)
    build_features(written.tokens, written.traces, features)
    splits = split_prompts(run.prompts["prompt_id"], experiment.splits, experiment.seed)
    horizon = experiment.labels.horizon_tokens
    trainer = make_trainer(splits, FITTED, horizon_tokens=horizon, seed=experiment.seed)
    models = train_predictors(features, labels, trainer)
    assert models.predictors, "something has to be fitted"
    for name, table in models.tables.items():
        schema.write_table(table, results / f"tables/{name}.parquet")
    save_models(models, results / "models")
    write_predictions(models.predictors, features, splits, results / "predictions.parquet")


def test_another_process_writes_the_same(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    write_results(here)
    code = f"from test_repetition import write_results, Path; write_results(Path({str(there)!r}))"
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests.parent), str(tests)])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tests.parent, env=environment, check=True)
    assert {"outcomes.parquet", "predictions.parquet", "models/hazard_predictor.json"} <= files(
        here
    )
    assert_same_results(here, there)
