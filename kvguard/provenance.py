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
from kvguard.files import DamagedFile, content_digest, file_sha256, origin_of

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

LISTED_INPUTS = 64
"""Inputs of one job that are listed one by one in what it writes; a sweep has thousands."""


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


def describe_job(job: Any) -> dict[str, Any]:
    """What made the files of one job of the pipeline.

    Args:
        job: the object that Snakemake gives a script.

    Returns:
        - ``rule``, ``wildcards``, ``seed``
        - ``configuration``: digest of the whole, without the section `jobs`; ``parameters``: digest
          of what the job was given of it
        - ``code``: digest of the script and the library code that it reaches
        - ``data``: by input file (below the results folder) its `content_digest`; of a list longer
          than `LISTED_INPUTS` one digest of all
        - ``kvguard``, ``python``, ``packages``: versions; ``device`` and ``dtype``, of a job that
          runs the language model those of the model.
    """
    settings = dict(job.params.items()).get("model") or {}
    return {
        "rule": job.rule,
        "wildcards": dict(job.wildcards.items()),
        "configuration": digest({k: v for k, v in job.config.items() if k != "jobs"}),
        **made_by(job.params),
        "seed": _setting(job, "seed"),
        "data": _input_digests(job),
        "kvguard": kvguard.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": _device(settings.get("device", "cpu")),
        "dtype": settings.get("dtype"),
    }


def made_by(params: Any) -> dict[str, str | None]:
    """Digests of a job's parameters and of its code, as `describe_job` records them.

    Args:
        params: of the job; ``library`` is the digest of its code.
    """
    parameters = {name: value for name, value in params.items() if name != "library"}
    return {"parameters": digest(parameters), "code": params.get("library")}


def made_otherwise(path: str | Path, params: Any) -> bool:
    """Whether a file says that other parameters or other code made it than a job has now.

    False where the file does not say it: `kvguard verify` names a record that is damaged.
    """
    try:
        origin = origin_of(path)
    except DamagedFile:
        return False
    now = made_by(params)
    return all(name in origin for name in now) and any(origin[name] != now[name] for name in now)


def _setting(job: Any, name: str) -> Any:
    """A field of the configuration that a job was started with, or its default."""
    return job.config.get(name, Config.model_fields[name].default)


def _input_digests(job: Any) -> dict[str, str | None]:
    """Recorded digests of a job's inputs, those of a long list as one."""
    root = Path(_setting(job, "results_dir"))
    found: dict[str, str | None] = {}
    listed = list(job.input)
    if len(listed) <= LISTED_INPUTS:
        return {_below(path, root): content_digest(path) for path in listed}
    for name, given in job.input.items():
        paths = [given] if isinstance(given, str) else list(given)
        if len(paths) <= LISTED_INPUTS:
            found |= {_below(path, root): content_digest(path) for path in paths}
        else:
            digests = {_below(path, root): content_digest(path) for path in paths}
            found[f"{name} ({len(paths)} files)"] = digest(digests)
    return found


def _below(path: str, root: Path) -> str:
    """A path as it is named below the results folder; one outside stays as it is."""
    return Path(path).relative_to(root).as_posix() if Path(path).is_relative_to(root) else path


def _device(name: str) -> str:
    """The device of that name on this machine; of a GPU also what it is called.

    One that is not on this machine, such as a login node that only prepares a model, stays a name.
    """
    if name == "cpu":
        return name
    import torch

    from kvguard.models import ModelError, resolve_device

    try:
        device = resolve_device(name)
    except ModelError:
        return name
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


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
