"""The wheel in an environment of its own: what it declares is enough, and no more is there.

The environment holds the wheel and, linked from this one, the packages that the wheel's metadata
asks for, with what those ask for in turn. Nothing else can be imported there.
"""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kvguard import __version__

CHECKOUT = Path(__file__).parent.parent
SOURCES = ("kvguard", "rules", "workflow_scripts", "profiles", "envs", "experiments", "reports")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
WORKFLOW = ("Snakefile", "config.yaml", "constraints.txt")

ABSENT = ("sklearn", "matplotlib", "gguf", "duckdb", "snakemake", "statsmodels", "optuna", "mapie")
"""Of the extras; the guard must not need them."""

GUARD = """
import sys

import torch
from kvpress import KnormPress
from transformers import LlamaConfig, LlamaForCausalLM

from kvguard import KVGuard

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, eos_token_id=2, **sizes))
guard = KVGuard(press=KnormPress(0.5), predictor="rules")
ids = torch.arange(3, 43)[None]
answer = model.eval().generate(ids, custom_generate=guard, max_new_tokens=12, do_sample=False)
assert answer.shape[0] == 1 and 40 < answer.shape[1] <= 52, answer.shape
assert len(guard.report) == 1
loaded = {name.split(".")[0] for name in sys.modules}
print(sorted(loaded & set(sys.argv[1:])))
"""


class Installed(NamedTuple):
    """An environment with the wheel."""

    python: Path
    site: Path
    wheel: Path

    def run(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [str(self.python), *arguments],
            cwd=cwd,
            env=kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"},
            capture_output=True,
            text=True,
        )


def needed(requirements: Iterable[str], extra: str = "") -> set[str]:
    """Distributions that satisfy requirements, with all that they require, as this one has them.

    Asserts that the versions here lie in the ranges.
    """
    found: set[str] = set()
    waiting = [(Requirement(text), extra) for text in requirements]
    while waiting:
        requirement, wanted = waiting.pop()
        environment = {**default_environment(), "extra": wanted}
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        name = canonicalize_name(requirement.name)
        if name == "kvguard":
            inner = metadata.requires("kvguard") or []
            waiting.extend((Requirement(text), e) for e in requirement.extras for text in inner)
            continue
        version = metadata.version(name)
        assert requirement.specifier.contains(version, prereleases=True), (
            str(requirement),
            version,
        )
        if name not in found:
            found.add(name)
            extras = requirement.extras or {""}
            for text in metadata.requires(name) or []:
                waiting.extend((Requirement(text), each) for each in extras)
    return found


def link(distributions: Iterable[str], site: Path) -> None:
    """Make distributions of this environment importable in another one."""
    for name in distributions:
        for path in metadata.files(name) or []:
            top = path.parts[0]
            if top in ("..", "__pycache__") or (site / top).exists():
                continue
            (site / top).symlink_to(Path(str(path.locate())).parents[len(path.parts) - 1] / top)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """A fresh environment with the wheel and what its metadata asks for."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__", "figures", "tables")
        shutil.copytree(CHECKOUT / name, source / name, ignore=ignored)
    for name in (*FILES, *WORKFLOW):
        shutil.copy2(CHECKOUT / name, source / name)
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run([*pip, *build], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = next(folder.glob("*.whl"))
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    install = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run([*pip, *install], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    site = next(home.glob("lib/python*/site-packages"))
    link(needed(requirements(wheel)), site)
    return Installed(python, site, wheel)


def requirements(wheel: Path) -> list[str]:
    """What a wheel's metadata asks for."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    return [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-D")]


def test_the_guard_needs_no_extra(installed: Installed, tmp_path: Path) -> None:
    probe = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    assert installed.run("-c", probe, *ABSENT, cwd=tmp_path).stdout == "[]\n"
    done = installed.run("-c", GUARD, *ABSENT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_the_command_works_without_extras(installed: Installed, tmp_path: Path) -> None:
    command = str(installed.python.with_name("kvguard"))
    done = installed.run(command, "--version", cwd=tmp_path)
    assert done.stdout == f"kvguard {__version__}\n", done.stderr
    done = installed.run(command, "run", "--press", "snapk", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean snapkv" in done.stderr
    done = installed.run(command, "sweep", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2
    assert "kvguard[pipeline]" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_workflow_is_in_the_wheel(installed: Installed, tmp_path: Path) -> None:
    link(needed(requirements(installed.wheel), "pipeline"), installed.site)
    command = str(installed.python.with_name("kvguard"))
    arguments = ("sweep", "--dry-run", "--num-prompts", "12", "--config", "experiments/paper.yaml")
    done = installed.run(command, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rule run_live:" in done.stdout
    assert not (tmp_path / "results").exists()


def test_the_wheel_holds_the_library_its_data_and_the_workflow(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        names = set(archive.namelist())
    expected = {"kvguard/py.typed", "kvguard/checkout/Snakefile", "kvguard/checkout/config.yaml"}
    for path in CHECKOUT.glob("kvguard/**/*"):
        if path.is_file() and "__pycache__" not in path.parts:
            expected.add(path.relative_to(CHECKOUT).as_posix())
    for folder in ("rules", "workflow_scripts", "profiles", "reports/captions"):
        for path in (CHECKOUT / folder).rglob("*.*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(f"kvguard/checkout/{path.relative_to(CHECKOUT).as_posix()}")
    assert expected <= names
    assert not {name for name in names if name.startswith(("tests/", "docs/", "setup"))}


def test_importing_kvguard_is_light() -> None:
    probe = (
        "import sys, kvguard, kvguard.config; print(sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("torch", "transformers", "kvpress", "datasets", "pandas", "matplotlib"):
        assert f"'{name}'" not in done.stdout


def test_importing_the_guard_loads_nothing_heavy() -> None:
    """What kvpress and transformers import is loaded where a guard is made."""
    heavy = ("datasets", "sklearn", "pandas", "gguf", "matplotlib", "duckdb", "statsmodels")
    probe = (
        "import sys\n"
        "from kvguard import GuardReport, KVGuard, OperatingPoint\n"
        "print({name.split('.')[0] for name in sys.modules} & set(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", probe, *heavy], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "set()\n"
