"""The command line: run one press, run a whole experiment, read and check what it left.

Libraries that are slow to import are imported where a command needs them, so that ``--help`` is
quick. A wrong value ends a command with one message and the exit status 2.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvguard import __version__, cli_tables, cli_train, joblog, progress
from kvguard.cli_options import Configs, Cores, DryRun, NumPrompts, ResultsDir, TaskName
from kvguard.cli_tables import (
    SHOWN_POLICIES,
    print_answers,
    print_frame,
    read_policies,
)
from kvguard.cli_train import predictor_and_points
from kvguard.config import (
    BASELINE,
    BASELINE_RATIO,
    Config,
    ConfigError,
    Press,
    load_config,
    overlay,
    parse_config,
    ratio_text,
)
from kvguard.workflow import (
    config_layers,
    press_experiment,
    recorded_config,
    run_status,
    snakemake_command,
    stale_lock,
    sweep_overlay,
    workflow_profile,
)

if TYPE_CHECKING:
    from kvguard.models import LoadedModel

commands = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def app() -> None:
    """Run a command; an error ends it with one message and status 2, never with a traceback.

    ``KVGUARD_TRACEBACK=1`` shows the traceback of an error that is not the user's.
    """
    try:
        commands(prog_name="kvguard")
    except Exception as error:
        message = _message(error)
        if message is None:
            if os.environ.get("KVGUARD_TRACEBACK"):
                raise
            kind = type(error).__name__
            message = f"{kind}: {error}\nKVGUARD_TRACEBACK=1 kvguard ... shows where it happened"
        Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
        sys.exit(2)


def _message(error: Exception) -> str | None:
    """What to tell a user; None for an error that is not of the user's making."""
    if isinstance(error, ModuleNotFoundError) and error.name and "kvguard" not in error.name:
        package = error.name.split(".")[0]
        extra = "gguf" if package == "gguf" else "pipeline"
        return f"this needs {package}, which is not installed: pip install 'kvguard[{extra}]'"
    if type(error).__module__.startswith("kvguard.") or isinstance(error, OSError):
        return str(error)
    return None


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvguard {__version__}")
        raise typer.Exit


@commands.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version."),
    ] = False,
) -> None:
    """Guard compressed key-value caches: measure, predict, verify and rewind."""


# --- one press on a few prompts ------------------------------------------------------------------


@commands.command()
def run(
    press: Annotated[str, typer.Option(help="A press of the config, or e.g. snapkv, knorm, tova.")],
    compression_ratio: Annotated[
        str, typer.Option(help="Share of cache entries to remove, 0 <= r < 1.")
    ] = "0.5",
    num_prompts: NumPrompts = 10,
    task: TaskName = None,
    model: Annotated[str | None, typer.Option(help="A model of the config.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Draws other prompts.")] = None,
    config: Configs = None,
    results_dir: Annotated[
        Path | None,
        typer.Option(help="Results that hold the prepared model, or will."),
    ] = None,
) -> None:
    """Answer a few prompts under one press and show what happened to each."""
    experiment = press_experiment(
        config_layers(config), press, compression_ratio, num_prompts, task, max_new_tokens, seed
    )
    entry = _model_entry(experiment, model)
    joblog.configure_logging()

    from kvguard.detectors import detect_outcomes
    from kvguard.experiment import run_shard
    from kvguard.prompts import load_task, prompts_frame
    from kvguard.schema import TRACE_KEYS

    prompts, examples = load_task(experiment.tasks[0], experiment.seed)
    ratio = ratio_text(compression_ratio)
    chosen = experiment.presses[0] if ratio != BASELINE_RATIO else None
    loaded = _prepared_model(experiment, entry, results_dir, chosen)
    result = run_shard(
        loaded, prompts, examples, press=chosen, ratio=ratio, shard=0, experiment=experiment
    )
    outcomes = detect_outcomes(
        prompts_frame(prompts), result.traces, result.tokens, experiment.detection
    )
    rows = result.traces.join(outcomes, on=TRACE_KEYS, how="left", maintain_order="left").join(
        prompts_frame(prompts).select("prompt_id", "reference"),
        on="prompt_id",
        how="left",
        maintain_order="left",
    )
    print_answers(rows, f"{entry}, {chosen.name if chosen else BASELINE} {ratio}")


# --- a whole experiment --------------------------------------------------------------------------


@commands.command()
def sweep(
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Number of prompts of each task.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model of the config, or a hub id such as owner/name.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit of a hub model that no configuration pins.")
    ] = None,
    config: Configs = None,
    results_dir: Annotated[
        str | None, typer.Option(help="Default: results, or results/sweeps/... of its own.")
    ] = None,
    cores: Cores = 2,
    profile: Annotated[
        str | None, typer.Option(help="Snakemake workflow profile, e.g. profiles/slurm.")
    ] = None,
    target: Annotated[str, typer.Option(help="all, figures, or a file that a rule makes.")] = "all",
    dry_run: DryRun = False,
) -> None:
    """Run the whole pipeline through Snakemake, going on from the results that exist."""
    layers = config_layers(config)
    over = sweep_overlay(layers, num_prompts, model, revision, results_dir)
    experiment = load_config(*layers, overrides=over)
    results = Path(experiment.results_dir)
    arguments = [target, "--cores", str(cores), "--resources", "gpu=1"]
    arguments += ["--workflow-profile", str(workflow_profile(profile))] if profile else []
    arguments += ["--dry-run"] if dry_run else []
    cli_tables.console.print(
        f"{len(experiment.models)} model(s), {experiment.num_prompts} prompts, "
        f"{len(experiment.conditions)} conditions; results in {results}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if dry_run else results
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / "sweep.yaml"
        written.write_text(yaml.safe_dump(over, sort_keys=False))
        _snakemake([*layers, written], *arguments)


@commands.command()
def figures(
    config: Configs = None,
    results_dir: Annotated[str | None, typer.Option(help="Folder of the results.")] = None,
    cores: Cores = 2,
    dry_run: DryRun = False,
) -> None:
    """Bring the figures and all that they need up to date through Snakemake."""
    arguments = ["figures", "--cores", str(cores), "--resources", "gpu=1"]
    arguments += ["--dry-run"] if dry_run else []
    _snakemake(
        config_layers(config),
        *arguments,
        overrides=[f"results_dir={results_dir}"] if results_dir else [],
    )


@commands.command()
def status(
    config: Configs = None,
    results_dir: Annotated[str | None, typer.Option(help="Folder of the results.")] = None,
    plan: Annotated[
        bool,
        typer.Option(help="Have Snakemake plan anew, instead of reading what the run planned."),
    ] = False,
) -> None:
    """Show jobs done and left of each stage, how fast they go and how long the rest takes.

    A results folder is read with the configuration that its run recorded, unless --config is given.
    """
    recorded_in = Path(results_dir or "") / "config.json"
    layers = config_layers(config)
    if results_dir and not config and recorded_in.is_file():
        layers = [recorded_in]
    given = {"results_dir": results_dir} if results_dir else {}
    experiment = load_config(*layers, overrides=given, check_files=False)
    overrides = [f"results_dir={results_dir}"] if results_dir else []
    locked = stale_lock(layers, overrides)
    if locked is not None:
        cli_tables.console.print(escape(locked), soft_wrap=True, highlight=False)
    content = progress.plan_digest(experiment)
    recorded = None if plan else progress.read_plan(experiment.results_dir, content)
    stages = run_status(layers, overrides) if recorded is None else recorded.stages
    cli_tables.print_stages(stages, experiment.results_dir, recorded and recorded.started)


# --- what a run left -----------------------------------------------------------------------------


@commands.command()
def verify(
    results_dir: ResultsDir = Path("results"),
    config: Configs = None,
    discard: Annotated[
        bool, typer.Option(help="Remove damaged files first; the next run makes them again.")
    ] = False,
) -> None:
    """Check the integrity of a results folder; the exit status is 1 when something is wrong."""
    from kvguard.integrity import LISTED, discard_damaged, verify_results

    experiment = load_config(*config_layers(config)) if config else recorded_config(results_dir)
    if discard:
        for path in discard_damaged(experiment, results_dir):
            cli_tables.console.print(f"removed {path}", soft_wrap=True)
    checks = verify_results(experiment, results_dir)
    table = Table(title=f"integrity of {results_dir}", title_justify="left")
    table.add_column("check")
    for name in ("examined", "wrong"):
        table.add_column(name, justify="right")
    for check in checks:
        style = "red" if check.problems else "green" if check.examined else None
        table.add_row(check.name, str(check.examined), str(len(check.problems)), style=style)
    cli_tables.console.print(table)
    for check in checks:
        for problem in check.problems[:LISTED]:
            cli_tables.console.print(f"[red]{check.name}[/]: {escape(problem)}", soft_wrap=True)
        if len(check.problems) > LISTED:
            cli_tables.console.print(
                f"[red]{check.name}[/]: and {len(check.problems) - LISTED} more"
            )
    if any(check.problems for check in checks):
        cli_tables.console.print(
            "`kvguard verify --discard` removes what is damaged; the next run makes it again"
        )
        raise typer.Exit(1)
    cli_tables.console.print("nothing is wrong")


class Format(StrEnum):
    """How `analyze` prints."""

    table = "table"
    csv = "csv"
    json = "json"


@commands.command()
def analyze(
    results_dir: ResultsDir = Path("results"),
    view: Annotated[
        str | None,
        typer.Option(help="`policies`, or a view of the database, e.g. failure_kinds, errors."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Print at most this many rows.")] = None,
    written: Annotated[
        Format, typer.Option("--format", help="Format of the output.")
    ] = Format.table,
) -> None:
    """Print what each press and ratio did, with 95 % intervals, or what each policy did."""
    from kvguard.database import analyze as condition_table
    from kvguard.database import read_view

    database = results_dir / "kvguard.duckdb"
    title = f"{database}: shares of requests, excess paired with the same prompt uncompressed"
    if view is None:
        frame = condition_table(database)
    elif view == "policies":
        frame, title = read_policies(results_dir), "policies on test prompts, costs per request"
    else:
        try:
            frame, title = read_view(database, view), view
        except ValueError as error:
            raise ConfigError(f"--view: {error}") from None
    frame = frame.head(frame.height if limit is None else limit)
    if written is Format.csv:
        typer.echo(frame.write_csv(), nl=False)
    elif written is Format.json:
        typer.echo(frame.write_json())
    else:
        print_frame(frame, title)


commands.command()(cli_train.train)
commands.command()(cli_train.calibrate)
commands.command()(cli_train.eval_controller)
commands.command()(cli_train.signals)


@commands.command()
def live(
    num_prompts: NumPrompts = 4,
    task: TaskName = None,
    press: Annotated[str, typer.Option(help="A press of the config, or e.g. snapkv.")] = "snapkv",
    compression_ratio: Annotated[str, typer.Option(help="Share of entries to remove.")] = "0.75",
    policy: Annotated[
        list[str] | None, typer.Option(help="A policy; may be repeated. Default: the config's.")
    ] = None,
    alarm_rate: Annotated[
        float, typer.Option(min=0, max=1, help="Share of requests that `random` alarms.")
    ] = 0.5,
    constant_ratio: Annotated[
        str | None, typer.Option(help="Ratio of `constant`; default: half of the press's.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model of the config.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Draws other prompts.")] = None,
    config: Configs = None,
    results_dir: Annotated[
        Path | None, typer.Option(help="Where the model and the predictor are.")
    ] = None,
) -> None:
    """Run policies live on a few prompts, and show what each does and costs.

    Where the results hold a run, its test prompts are taken; with --seed new prompts are drawn.
    """
    import polars as pl

    experiment = press_experiment(
        config_layers(config), press, compression_ratio, num_prompts, task, max_new_tokens, seed
    )
    policies = policy or experiment.live.policies
    values = experiment.model_dump(mode="json", by_alias=True)
    experiment = parse_config(overlay(values, {"live": {"policies": policies}}))
    if ratio_text(compression_ratio) == BASELINE_RATIO:
        raise ConfigError(
            "--compression-ratio: at 0 nothing is compressed, so nothing to guard; give 0 < r < 1"
        )
    entry = _model_entry(experiment, model)
    joblog.configure_logging()

    from kvguard.compare_policies import summarize_runs
    from kvguard.detectors import detect_outcomes
    from kvguard.experiment import run_shard
    from kvguard.live import live_prompts, run_policy_shard
    from kvguard.prompts import prompts_frame

    folder = results_dir or Path(experiment.results_dir)
    prompts, examples = live_prompts(experiment, num_prompts, None if seed is not None else folder)
    chosen = experiment.presses[0]
    loaded = _prepared_model(experiment, entry, results_dir, chosen)
    trained = folder / "models/hazard_predictor.json"
    predictor, points = predictor_and_points(
        trained if trained.is_file() else None,
        press_class=chosen.press_class,
        phase=chosen.phase,
        ratio=ratio_text(compression_ratio),
        task=experiment.tasks[0].name,
        max_new_tokens=experiment.max_new_tokens(experiment.tasks[0].name),
    )
    baseline = run_shard(
        loaded,
        prompts,
        examples,
        press=None,
        ratio=BASELINE_RATIO,
        shard=0,
        experiment=experiment,
    )
    outcomes = detect_outcomes(
        prompts_frame(prompts), baseline.traces, baseline.tokens, experiment.detection
    )
    runs = [
        run_policy_shard(
            loaded,
            prompts,
            examples,
            press=chosen,
            ratio=ratio_text(compression_ratio),
            policy=name,
            shard=0,
            experiment=experiment,
            baseline=outcomes,
            predictor=predictor,
            controller=points[experiment.live.operating_point],
            alarm_rate=alarm_rate,
            constant_ratio=ratio_text(constant_ratio or round(float(compression_ratio) / 2, 3)),
        )
        for name in policies
    ]
    summary = summarize_runs(pl.concat(runs), outcomes, seed=experiment.seed)
    print_frame(
        summary,
        f"{entry}, {chosen.name} {ratio_text(compression_ratio)}, {num_prompts} "
        f"prompts; hazard from {trained if trained.is_file() else 'rules'}",
        SHOWN_POLICIES,
    )


@commands.command()
def findings(
    results_dir: Annotated[
        list[Path] | None, typer.Option(help="A finished run; may be repeated.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The Markdown file.")] = Path("docs/findings.md"),
    readme: Annotated[
        Path | None,
        typer.Option(help="A page whose results, between two markers, become the first run's."),
    ] = None,
) -> None:
    """Write a Markdown page that states the results of finished runs in sentences."""
    from kvguard.findings import write_findings, write_results

    folders = results_dir or [Path("results")]
    write_findings(folders, output)
    cli_tables.console.print(f"wrote {output}")
    if readme is not None:
        write_results(folders[0], readme)
        cli_tables.console.print(f"wrote the results in {readme}")


@commands.command()
def presses() -> None:
    """Print which kvpress presses are supported, and why others are not, as Markdown."""
    from kvguard.presses import support_table

    typer.echo(support_table(), nl=False)


# --- shared --------------------------------------------------------------------------------------


def _model_entry(experiment: Config, model: str | None) -> str:
    names = [entry.name for entry in experiment.models]
    if model is not None and model not in names:
        raise ConfigError(f"--model: no model {model!r} in the configuration: {', '.join(names)}")
    return model or names[0]


def _prepared_model(
    experiment: Config, name: str, results_dir: Path | None, press: Press | None
) -> "LoadedModel":
    """Load a model, preparing it where the pipeline would if it is not there."""
    from kvguard.checkpoints import check_source, prepare_model
    from kvguard.models import RECORD, load_model

    if results_dir is not None and not results_dir.is_dir():
        raise ConfigError(
            f"--results-dir: no folder {results_dir}; make it first if the model is to be prepared "
            "there, or leave the option out"
        )
    spec = experiment.model(name)
    folder = (results_dir or Path(experiment.results_dir)) / "checkpoints" / name
    if (folder / RECORD).is_file():
        check_source(spec, folder)
    else:
        cli_tables.console.print(f"preparing {name} in {folder} (once)")
        prepare_model(spec, folder)
    attention = (press and press.attention) or spec.attention
    return load_model(folder, dtype=spec.dtype, device=spec.device, attention=attention)


def _snakemake(files: Sequence[Path], *arguments: str, overrides: Sequence[str] = ()) -> None:
    """Run Snakemake in the foreground and end with its exit status."""
    locked = None if "--dry-run" in arguments else stale_lock(files, overrides)
    if locked is not None:
        raise ConfigError(locked)
    command = snakemake_command(files, *arguments, overrides=overrides)
    done = subprocess.run(command)
    if done.returncode != 0:
        raise typer.Exit(done.returncode)
