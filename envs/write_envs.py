"""Write envs/kvguard.yaml: what pyproject.toml names, at the versions that constraints.txt pins.

The environment is for `snakemake --sdm conda`; without it, jobs run in the one that runs Snakemake.
"""

import re
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


def pins(root: Path = ROOT) -> list[str]:
    """Every direct dependency of the package and its pipeline as ``name==version``, in order."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    versions = dict(
        line.split("==") for line in (root / "constraints.txt").read_text().split() if "==" in line
    )
    normal = {_normal(name): version for name, version in versions.items()}
    extras = project["optional-dependencies"]
    entries = [*project["dependencies"], *extras["gguf"], *extras["pipeline"]]
    names = [re.split(r"[=<>!~ \[]", entry)[0] for entry in entries]
    names = [name for name in names if name != project["name"]]
    missing = [name for name in names if _normal(name) not in normal]
    if missing:
        raise KeyError(f"constraints.txt pins no version of {', '.join(missing)}")
    return [f"{name}=={normal[_normal(name)]}" for name in names]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def environment(root: Path = ROOT) -> str:
    """The conda environment as YAML text."""
    packages = ["python=3.11", "pip", {"pip": pins(root)}]
    heading = "# Written by `make envs` from pyproject.toml and constraints.txt.\n"
    return heading + yaml.safe_dump(
        {"channels": ["conda-forge", "nodefaults"], "dependencies": packages}, sort_keys=False
    )


if __name__ == "__main__":
    target = ROOT / "envs" / "kvguard.yaml"
    target.write_text(environment())
    sys.stdout.write(f"{target.relative_to(ROOT)}\n")
