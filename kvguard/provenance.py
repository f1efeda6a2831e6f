"""What a result was made by: the configuration, the versions, the machine, the files."""

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import kvguard
from kvguard.config import Config, digest
from kvguard.files import file_sha256

PACKAGE = Path(__file__).parent

PACKAGES = (
    "torch",
    "transformers",
    "kvpress",
    "numpy",
    "polars",
    "duckdb",
    "xgboost",
    "scikit-learn",
    "scipy",
    "statsmodels",
    "MAPIE",
    "optuna",
    "matplotlib",
    "snakemake",
    "reasoning-gym",
    "gguf",
    "safetensors",
    "datasets",
)
"""Packages whose versions a result carries."""


def manifest(paths: Iterable[str | Path], root: str | Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of files, by their path below ``root``."""
    return {
        Path(path).relative_to(root).as_posix(): {
            "bytes": Path(path).stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in sorted(map(str, paths))
    }


def describe_run(config: Config) -> dict[str, Any]:
    """What a reader needs to repeat a run: code, configuration, versions, machine and time."""
    return {
        "kvguard": kvguard.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "config_digest": digest(config.model_dump(mode="json", by_alias=True)),
        "seed": config.seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerators": _accelerators(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(PACKAGE.parent), *arguments)


def _accelerators() -> list[str]:
    listed = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv")
    return listed.splitlines()[1:] if listed else []


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
