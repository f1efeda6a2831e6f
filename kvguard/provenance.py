"""What a result was made by: the library code behind it, the versions, the machine, the inputs.

Snakemake compares a rule's script and its ``params``; it does not look into the library that the
script imports. `library_digest` closes that gap: it follows the imports from the script and sums up
the code that it finds, so that each rule's ``params`` change exactly when its code does.
"""

import ast
import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil

import kvguard
from kvguard import schema
from kvguard.config import Config, digest

PACKAGE = Path(__file__).parent

NOT_RESULTS = frozenset({"config", "joblog", "provenance", "workflow", "integrity", "cli"})
"""Modules that change no stored value: what the configuration says reaches a job in its params."""

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


def library_modules(script: str | Path, package: Path = PACKAGE) -> tuple[str, ...]:
    """Modules of kvguard whose code a script runs, found through imports, sorted.

    Args:
        script: a Python file; imports inside functions count.
        package: the folder of the library.
    """
    found: set[str] = set()
    waiting = _imports(Path(script), package)
    while waiting:
        module = waiting.pop()
        if module not in found and module not in NOT_RESULTS:
            found.add(module)
            waiting |= _imports(package / f"{module}.py", package)
    return tuple(sorted(found))


def library_digest(script: str | Path, package: Path = PACKAGE) -> str:
    """First 16 hex digits of a SHA-256 over the library code that a script runs.

    Comments, docstrings and formatting do not count. Of `kvguard.schema` only the definitions that
    the script or its modules name count, by value: a new column in the table of another stage
    leaves the digest as it is. Modules in `NOT_RESULTS` never count.
    """
    modules = library_modules(script, package)
    files = [package / f"{module}.py" for module in modules if module != "schema"]
    used = set().union(*(_source(path).schema_names for path in [Path(script), *files]))
    tables = {
        name: repr(getattr(schema, name))
        for name in sorted(used)
        if not callable(getattr(schema, name, len))
    }
    return digest({"modules": {path.stem: _source(path).code for path in files}, "schema": tables})


def definition_digest(module: str, name: str, package: Path = PACKAGE) -> str:
    """First 16 hex digits of a SHA-256 over one definition of a module and all that it uses.

    Names are followed through the module's own definitions and through imports from kvguard. Of
    other packages nothing counts, nor do comments, docstrings, formatting and the modules in
    `NOT_RESULTS`.

    Args:
        module: a module of the library, e.g. "plot_failures".
        name: a function, class or constant at its top level.
        package: the folder of the library.

    Raises:
        KeyError: the module defines no such name.
    """
    if name not in _definitions(package / f"{module}.py"):
        raise KeyError(f"module {module!r} defines no {name!r}")
    found: dict[str, str] = {}
    waiting = [(module, name)]
    while waiting:
        module, name = waiting.pop()
        path = package / f"{module}.py"
        if f"{module}.{name}" in found or module in NOT_RESULTS or not path.is_file():
            continue
        definition = _definitions(path).get(name)
        if definition is None:
            continue
        found[f"{module}.{name}"] = definition.code
        waiting.extend((other or module, used) for other, used in definition.uses)
    return digest(dict(sorted(found.items())))


def data_digest(name: str) -> str:
    """SHA-256 of a file that the package carries in ``kvguard/data``."""
    return file_sha256(PACKAGE / "data" / name)


class _Definition(NamedTuple):
    """One name at the top level of a module."""

    code: str  # without comments, docstrings and formatting; "" for an import
    uses: frozenset[tuple[str | None, str]]  # (module of the library, None for its own; name)


def _definitions(path: Path) -> dict[str, _Definition]:
    status = path.stat()
    return _read_definitions(path, status.st_mtime_ns, status.st_size)


@cache
def _read_definitions(path: Path, _time: int, _size: int) -> dict[str, _Definition]:
    found: dict[str, _Definition] = {}
    modules: dict[str, str] = {}  # local name -> module of the library
    definitions: list[tuple[list[str], ast.stmt]] = []
    tree = ast.parse(path.read_text(), filename=str(path))
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module="kvguard"):
                modules.update({alias.asname or alias.name: alias.name for alias in node.names})
            case ast.ImportFrom(module=str(name)) if name.startswith("kvguard."):
                for alias in node.names:
                    uses = frozenset({(name.removeprefix("kvguard."), alias.name)})
                    found[alias.asname or alias.name] = _Definition("", uses)
    for statement in tree.body:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                definitions.append(([statement.name], statement))
            case ast.Assign(targets=targets):
                names = [part.id for target in targets for part in _names(target)]
                definitions.append((names, statement))
            case ast.AnnAssign(target=target):
                definitions.append(([part.id for part in _names(target)], statement))
    for names, statement in definitions:
        used: set[tuple[str | None, str]] = set()
        for part in ast.walk(statement):
            if isinstance(part, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                part.body = [line for line in part.body if not _is_text(line)] or [ast.Pass()]
            elif isinstance(part, ast.Name):
                used.add((None, part.id))
            elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                used.update(
                    [(modules[part.value.id], part.attr)] if part.value.id in modules else []
                )
        definition = _Definition(ast.unparse(statement), frozenset(used))
        found.update(dict.fromkeys(names, definition))
    return found


def _names(node: ast.expr) -> list[ast.Name]:
    return [part for part in ast.walk(node) if isinstance(part, ast.Name)]


class _Source(NamedTuple):
    """What one file contributes to a digest."""

    imports: frozenset[str]  # dotted names
    schema_names: frozenset[str]  # of `kvguard.schema`
    code: str  # without comments, docstrings and formatting


def _source(path: Path) -> _Source:
    status = path.stat()
    return _read_source(path, status.st_mtime_ns, status.st_size)


@cache
def _read_source(path: Path, _time: int, _size: int) -> _Source:
    tree = ast.parse(path.read_text(), filename=str(path))
    imports: set[str] = set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            imports.add(node.module)
            imports.update(f"{node.module}.{alias.name}" for alias in node.names)
            if node.module == "kvguard":
                lazy = (kvguard._PUBLIC.get(alias.name) for alias in node.names)
                imports.update(f"kvguard.{module}" for module in lazy if module)
            if node.module == "kvguard.schema":
                names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names.update([node.attr] if node.value.id == "schema" else [])
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [part for part in node.body if not _is_text(part)] or [ast.Pass()]
    return _Source(frozenset(imports), frozenset(names), ast.unparse(tree))


def _is_text(node: ast.stmt) -> bool:
    """Whether a statement is a docstring: a constant that nothing uses."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _imports(path: Path, package: Path) -> set[str]:
    """Modules of the library that one file imports, at any depth of its code."""
    parts = [name.split(".") for name in _source(path).imports]
    modules = {part[1] for part in parts if part[0] == "kvguard" and len(part) > 1}
    return {module for module in modules if (package / f"{module}.py").is_file()}


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
