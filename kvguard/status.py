"""What of an experiment is done and what is left, per rule: Snakemake's own view of it.

Nothing about the layout of the results is repeated here: Snakemake plans the whole run twice, once
as if nothing existed and once for what is missing or out of date.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kvguard.config import ConfigError

TARGETS = ("all", "figures", "paper")
"""Rules that only gather files."""


class StageStatus(NamedTuple):
    """Jobs of one rule."""

    rule: str
    done: int
    left: int


def snakemake_command(
    configs: Sequence[str | Path], *arguments: str, overrides: Sequence[str] = ()
) -> list[str]:
    """The command line that runs this Python's Snakemake on a stack of configuration files.

    Args:
        configs: configuration files, later ones laid over earlier ones.
        arguments: targets first, then options: some of Snakemake's take every word that follows.
        overrides: ``key=value`` pairs, laid over all files.
    """
    command = [sys.executable, "-m", "snakemake", *arguments]
    command += ["--configfile", *map(str, configs)] if configs else []
    return command + (["--config", *overrides] if overrides else [])


def run_status(configs: Sequence[str | Path], overrides: Sequence[str] = ()) -> list[StageStatus]:
    """Done and left jobs per rule, in the order in which they run.

    Args:
        configs: configuration files, as `snakemake_command` takes them.
        overrides: ``key=value`` pairs, laid over all files.

    Raises:
        ConfigError: Snakemake cannot plan the run; the message is Snakemake's.
    """
    every = _planned_jobs(configs, overrides, "--forceall")
    left = _planned_jobs(configs, overrides)
    return [
        StageStatus(rule, count - left.get(rule, 0), left.get(rule, 0))
        for rule, count in every.items()
        if rule not in TARGETS
    ]


def _planned_jobs(
    configs: Sequence[str | Path], overrides: Sequence[str], *arguments: str
) -> dict[str, int]:
    """Number of jobs per rule that Snakemake would run, by first appearance in its plan."""
    command = snakemake_command(
        configs, "--dry-run", "--nolock", "--cores", "1", *arguments, overrides=overrides
    )
    done = subprocess.run(command, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise ConfigError(output.strip())
    table = re.search(r"^Job stats:\njob .*\n-+ .*\n((?:\S+ +\d+\n)+)", output, re.MULTILINE)
    if table is None:
        return {}
    counts = {name: int(count) for name, count in map(str.split, table[1].splitlines())}
    order = dict.fromkeys(re.findall(r"^(?:local)?rule (\w+):", output, re.MULTILINE))
    return {rule: counts[rule] for rule in order if rule in counts}
