"""The whole pipeline at its smallest: a copy of the checkout, a random model, a few short answers.

What a test needs to interrupt, damage or move a run: it takes well under two minutes, every rule
runs, and the live experiment does too.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from conftest import make_tiny_model, make_tiny_tokenizer

CHECKOUT = Path(__file__).parent.parent

NOT_COPIED = ("tests", "results", "docs", "shared", "build", "dist", "__pycache__", "*.egg-info")
"""Besides everything whose name starts with a dot."""

RESULTS = "results"

EXPERIMENT = {
    "name": "tiny",
    "results_dir": RESULTS,
    "models": [
        {
            "name": "tiny",
            "source": "local",
            "path": "tiny_model",
            "dtype": "float32",
            "device": "cpu",
        }
    ],
    "tasks": [{"kind": "gsm_symbolic", "num_prompts": 12, "few_shot": 0}],
    "presses": [
        {
            "name": "snapkv",
            "class": "SnapKVPress",
            "kwargs": {"window_size": 8},
            "ratios": [0.5, 0.75],
            "live_ratios": [0.75],
        }
    ],
    "generation": {"max_new_tokens": 32, "batch_size": 8, "shard_size": 6},
    "splits": {"train": 0.5, "calibration": 0.25, "test": 0.25},
    "predictor": {"search_trials": 0, "max_rounds": 10, "bootstrap_samples": 20},
    "guard": {"bus_ratio": 50},
    "live": {
        "policies": ["none", "guard", "verify_all"],
        "shard_size": 2,
        "certify_prices": [100],
    },
    "jobs": {
        kind: {"threads": 1, "mem_mb": 1000, "runtime": 10} for kind in ("model", "train", "small")
    },
}
"""Takes the place of ``config.yaml`` in the copy."""


def make_experiment(folder: Path) -> Path:
    """Copy the checkout into ``folder`` and make the tiny experiment its configuration."""

    def left_out(_: str, names: list[str]) -> set[str]:
        patterns = shutil.ignore_patterns(".*", *NOT_COPIED)
        return patterns("", names)

    shutil.copytree(CHECKOUT, folder, ignore=left_out, dirs_exist_ok=True)
    make_tiny_model("llama").save_pretrained(folder / "tiny_model")
    make_tiny_tokenizer().save_pretrained(folder / "tiny_model")
    (folder / "config.yaml").write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
    return folder


def environment(folder: Path) -> dict[str, str]:
    """The environment in which the copy's library is imported and nothing goes to a hub."""
    return os.environ | {
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
    }


def command(*arguments: str) -> list[str]:
    """This Python's Snakemake with two cores and one GPU."""
    base = [sys.executable, "-m", "snakemake", "--nocolor", "--cores", "2"]
    return [*base, "--resources", "gpu=2", "--show-failed-logs", *arguments]


def run(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the workflow of the copy; arguments are those of Snakemake."""
    done = subprocess.run(
        command(*arguments), cwd=folder, env=environment(folder), capture_output=True, text=True
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done
