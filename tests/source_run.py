"""A finished run that trained models, made by hand: what `predictor.trained_by` can name.

Its folder holds what another run reads of it, with the records and the manifest of a real run.
"""

import json
from pathlib import Path
from typing import Any

from kvguard import schema
from kvguard.config import Config, overlay, parse_config
from kvguard.files import RECORD, record_origin
from kvguard.harm_model import DEFAULT, save_harm_model
from kvguard.prompts import load_tasks, prompts_frame
from kvguard.provenance import manifest
from kvguard.rival_settings import RivalSetting, save_rivals
from kvguard.splits import split_prompts

CODE = "0123456789abcdef"
"""Digest of the code that is said to have trained the models."""

SOURCE: dict[str, Any] = {
    "name": "source",
    "seed": 1,
    "models": [
        {
            "name": "tiny",
            "source": "hub",
            "repository": "owner/tiny",
            "revision": "0" * 40,
            "dtype": "float32",
        }
    ],
    "tasks": [{"kind": "recall", "num_prompts": 12, "max_new_tokens": 8}],
    "presses": [
        {
            "name": "snapkv",
            "class": "SnapKVPress",
            "kwargs": {"window_size": 8},
            "ratios": [0.5, 0.75],
            "live_ratios": [0.75],
        }
    ],
    "generation": {"max_new_tokens": 8, "batch_size": 8, "shard_size": 6},
    "live": {"policies": ["none", "guard_price", "clock_or_loop", "always_safe"], "shard_size": 4},
}
"""Configuration of the run that trained."""


def make_source(folder: Path, model_digest: str = "of tiny", **changes: Any) -> Config:
    """Write the run; ``changes`` are laid over `SOURCE`."""
    values = overlay(SOURCE | {"results_dir": "results/source"}, changes)
    config = parse_config(values, check_files=False)
    prompts = prompts_frame(load_tasks(config.tasks, config.seed)[0])
    splits = split_prompts(prompts, config.splits, config.seed)
    record_origin({"rule": "fit_harm_model", "code": CODE})
    schema.write_table(prompts, folder / "prompts/prompts.parquet", schema.PROMPTS)
    schema.write_table(splits, folder / "splits.parquet", schema.SPLITS)
    save_harm_model(DEFAULT, folder / "models/harm_model.json")
    settings = [
        RivalSetting(
            model=model.name,
            press=press,
            ratio=ratio,
            clock_tokens=5,
            gate_threshold=0.5,
            train_harmed=1,
            calibration_harmed=1,
        )
        for model in config.models
        for press, ratio in config.conditions[1:]
    ]
    save_rivals(settings, folder / "models/rivals.json")
    for model in config.models:
        make_record(folder / "checkpoints" / model.name, model_digest)
    texts = {
        "config.json": config.model_dump(mode="json", by_alias=True),
        "provenance.json": {"kvguard": "0.1.0", "commit": "c" * 40, "seed": config.seed},
    }
    for name, value in texts.items():
        with schema.atomic_path(folder / name) as temporary:
            temporary.write_text(json.dumps(value))
    record_origin({})
    finish(folder)
    return config


def make_record(folder: Path, model_digest: str) -> Path:
    """A prepared model's record, which is all that counts of it here."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps({"digest": model_digest, "files": {}}))
    return folder


def finish(folder: Path) -> None:
    """Write the run's manifest."""
    kept = [path for path in folder.rglob("*") if path.suffix in (".json", ".parquet")]
    listed = manifest([path for path in kept if path.name != "manifest.json"], folder)
    (folder / "manifest.json").write_text(json.dumps(listed))
