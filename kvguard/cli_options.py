"""Options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

Configs = Annotated[
    list[Path] | None,
    typer.Option("--config", "-c", help="Configuration laid over config.yaml; may be repeated."),
]
ResultsDir = Annotated[Path, typer.Option(help="Folder that holds the results of a run.")]
NumPrompts = Annotated[int, typer.Option(min=1, help="Number of prompts.")]
TaskName = Annotated[
    str | None, typer.Option("--task", help="A task of the config; default: its first.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Show the jobs, run none.")]
Cores = Annotated[int, typer.Option(min=1, help="CPU cores that Snakemake may use.")]
