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
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from kvguard import __version__, joblog
from kvguard.config import (
    BASELINE,
    BASELINE_RATIO,
    Config,
    ConfigError,
    OperatingPoint,
    Press,
    digest,
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
    sweep_overlay,
    workflow_profile,
)

if TYPE_CHECKING:
    import polars as pl

    from kvguard.models import LoadedModel
    from kvguard.predictor import Predictor

commands = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140)

SHOWN_METRICS = ("auroc", "pr_auc", "brier", "recall_on_roc", "request_auroc")
"""What `train` prints of the evaluation; the pipeline's tables hold the rest."""

SHOWN_SETTINGS = (
    "operating_point",
    "model",
    "press",
    "ratio",
    "requests",
    "false_alarm_rate",
    "detection_rate",
    "lead_tokens",
    "excess_cfr",
    "tokens_prefilled",
    "tokens_wasted",
)
SHOWN_POLICIES = (
    "policy",
    "requests",
    "alarmed",
    "cfr",
    "agreement",
    "excess_cfr",
    "excess_error",
    "tokens_prefilled",
    "tokens_wasted",
    "decode_steps",
)
"""What `eval-controller` and `live` print of their tables."""

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
        Console(stderr=True).print(f"[bold red]error:[/] {_escape(message)}", soft_wrap=True)
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
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show it.")
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
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    config: Configs = None,
    results_dir: Annotated[
        Path | None, typer.Option(help="Where the prepared model is, or will be.")
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
    _print_answers(rows, f"{entry}, {chosen.name if chosen else BASELINE} {ratio}")


def _print_answers(rows: "pl.DataFrame", title: str) -> None:
    import polars as pl

    from kvguard.schema import CATASTROPHES

    table = Table(title=title, title_justify="left", caption_justify="left")
    for name in ("prompt", "reference", "answer"):
        table.add_column(name)
    for name in ("tokens", "first rejected", "KiB before", "KiB after"):
        table.add_column(name, justify="right")
    for name in ("stop", "failures"):
        table.add_column(name)
    for row in rows.iter_rows(named=True):
        kinds = [kind for kind in CATASTROPHES if row[kind]]
        failed = row["status"] != "ok"
        table.add_row(
            row["prompt_id"],
            "-" if row["reference"] is None else row["reference"],
            "-" if row["answer"] is None else row["answer"],
            _whole(row["generated_tokens"]),
            _whole(row["first_rejected"]),
            _kibibytes(row["cache_bytes_before"]),
            _kibibytes(row["cache_bytes_after"]),
            row["stop_reason"] or "-",
            f"[red]{_escape(row['error'])}[/]" if failed else ", ".join(kinds) or "none",
        )
    ok = rows.filter(pl.col("status") == "ok")
    before, after = int(ok["cache_bytes_before"].sum()), int(ok["cache_bytes_after"].sum())
    table.caption = (
        f"{ok.height} of {rows.height} prompts ran, {int(ok['right'].sum())} right, "
        f"{int(ok['catastrophe'].sum())} with a catastrophe; cache after the press: "
        f"{after / before:.1%} of {before / 2**20:.1f} MiB; "
        f"{int(ok['generated_tokens'].sum())} tokens in {ok['decode_seconds'].sum():.1f} s"
    )
    console.print(table)


def _whole(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _kibibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1024:,.0f}"


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
    target: Annotated[str, typer.Option(help="all, figures, or a file.")] = "all",
    dry_run: DryRun = False,
) -> None:
    """Run the whole pipeline through Snakemake, resuming what is there."""
    layers = config_layers(config)
    over = sweep_overlay(layers, num_prompts, model, revision, results_dir)
    experiment = load_config(*layers, overrides=over)
    results = Path(experiment.results_dir)
    arguments = [target, "--cores", str(cores), "--resources", "gpu=1"]
    arguments += ["--workflow-profile", str(workflow_profile(profile))] if profile else []
    arguments += ["--dry-run"] if dry_run else []
    console.print(
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
    """Bring the figures up to date through Snakemake, with everything that they need."""
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
) -> None:
    """What is done and what is left, per stage."""
    layers = config_layers(config)
    load_config(*layers)
    stages = run_status(
        layers,
        [f"results_dir={results_dir}"] if results_dir else [],
    )
    table = Table(title="jobs", title_justify="left")
    table.add_column("stage")
    for name in ("done", "left"):
        table.add_column(name, justify="right")
    for stage in stages:
        style = "green" if stage.left == 0 else "yellow" if stage.done else None
        table.add_row(stage.rule, str(stage.done), str(stage.left), style=style)
    table.add_section()
    done, left = sum(stage.done for stage in stages), sum(stage.left for stage in stages)
    table.add_row("all", str(done), str(left))
    console.print(table)


# --- what a run left -----------------------------------------------------------------------------


@commands.command()
def verify(
    results_dir: ResultsDir = Path("results"),
    config: Configs = None,
    discard: Annotated[
        bool, typer.Option(help="First remove what is damaged, so that the next run makes it anew.")
    ] = False,
) -> None:
    """Check the integrity of a results folder; the exit status is 1 when something is wrong."""
    from kvguard.integrity import LISTED, discard_damaged, verify_results

    experiment = load_config(*config_layers(config)) if config else recorded_config(results_dir)
    if discard:
        for path in discard_damaged(experiment, results_dir):
            console.print(f"removed {path}", soft_wrap=True)
    checks = verify_results(experiment, results_dir)
    table = Table(title=f"integrity of {results_dir}", title_justify="left")
    table.add_column("check")
    for name in ("examined", "wrong"):
        table.add_column(name, justify="right")
    for check in checks:
        style = "red" if check.problems else "green" if check.examined else None
        table.add_row(check.name, str(check.examined), str(len(check.problems)), style=style)
    console.print(table)
    for check in checks:
        for problem in check.problems[:LISTED]:
            console.print(f"[red]{check.name}[/]: {_escape(problem)}", soft_wrap=True)
        if len(check.problems) > LISTED:
            console.print(f"[red]{check.name}[/]: and {len(check.problems) - LISTED} more")
    if any(check.problems for check in checks):
        console.print(
            "`kvguard verify --discard` removes what is damaged; the next run makes it anew"
        )
        raise typer.Exit(1)
    console.print("nothing is wrong")


class Format(StrEnum):
    """How `analyze` prints."""

    table = "table"
    csv = "csv"
    json = "json"


@commands.command()
def analyze(
    results_dir: ResultsDir = Path("results"),
    view: Annotated[
        str | None, typer.Option(help="Another view of the database, e.g. failure_kinds, errors.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Show the first so many rows.")] = None,
    written: Annotated[Format, typer.Option("--format", help="How to print it.")] = Format.table,
) -> None:
    """Print what each press and ratio did, with 95 % intervals."""
    from kvguard.database import analyze as condition_table
    from kvguard.database import read_view

    database = results_dir / "kvguard.duckdb"
    title = f"{database}: shares of requests, excess paired with the same prompt uncompressed"
    if view is None:
        frame = condition_table(database)
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


@commands.command()
def train(
    results_dir: ResultsDir = Path("results"),
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Use the first so many prompts; default: all.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Default: models of the results, or a folder beside it.")
    ] = None,
    config: Configs = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Train the hazard predictors on what a run generated, and say what they are worth."""
    import polars as pl

    from kvguard.evaluate_predictor import evaluate_predictors
    from kvguard.prompts import read_prompts
    from kvguard.schema import SPLITS, read_table
    from kvguard.train import save_models, train_predictors
    from kvguard.trainer import make_trainer

    experiment = load_config(*config_layers(config)) if config else recorded_config(results_dir)
    joblog.configure_logging()
    prompts = read_prompts(results_dir / "prompts/prompts.parquet")
    splits = read_table(results_dir / "splits.parquet", SPLITS)
    wanted = num_prompts or len(prompts)
    if wanted > len(prompts):
        raise ConfigError(
            f"--num-prompts: {results_dir} holds {len(prompts)} prompts, got {wanted}; "
            "`kvguard sweep --num-prompts` generates more"
        )
    kept = splits.filter(pl.col("prompt_id").is_in([p.prompt_id for p in prompts[:wanted]]))
    tables = {name: results_dir / f"{name}.parquet" for name in ("features", "labels", "outcomes")}
    settings, labels, seed = experiment.predictor, experiment.labels, experiment.seed
    trainer = make_trainer(
        kept, settings, horizon_tokens=labels.horizon_tokens, seed=seed, threads=threads
    )
    parts = [settings.model_dump(mode="json"), labels.model_dump(mode="json"), seed]
    models = train_predictors(tables["features"], tables["labels"], trainer, digest(parts))
    whole = wanted == len(prompts)
    target = output_dir or results_dir / ("models" if whole else f"models_{wanted}_prompts")
    with tempfile.TemporaryDirectory() as scratch:
        save_models(models, scratch)
        changed = _replace_changed(Path(scratch), target)
    metrics = evaluate_predictors(
        models,
        tables["features"],
        tables["labels"],
        kept,
        tables["outcomes"],
        settings,
        seed=seed,
    )["predictor_metrics"]
    trained = ("target", "predictor", "status", "train_prompts", "harmed_prompts", "reason")
    print_frame(models.tables["training"], "training", trained)
    print_frame(
        spread_metrics(metrics.filter(pl.col("group_by") == "all"), SHOWN_METRICS),
        "test prompts, tokens before the onset; higher is better but for brier",
    )
    console.print(f"{target}: {len(changed)} of the models' files are new or changed")


def spread_metrics(metrics: "pl.DataFrame", names: Sequence[str]) -> "pl.DataFrame":
    """From one row per metric to one row per predictor, with the metrics' intervals."""
    import polars as pl

    keys = ["target", "predictor"]
    wide = metrics.select(keys).unique(maintain_order=True)
    for name in names:
        own = metrics.filter(pl.col("metric") == name).select(
            *keys,
            pl.col("value").alias(name),
            pl.col("low").alias(f"{name}_low"),
            pl.col("high").alias(f"{name}_high"),
        )
        wide = wide.join(own, on=keys, how="left", maintain_order="left")
    return wide


def _replace_changed(source: Path, target: Path) -> list[str]:
    """Move files whose content differs; what is the same keeps its time, so nothing reruns."""
    from kvguard.schema import atomic_path

    changed = []
    for path in sorted(source.iterdir()):
        old = target / path.name
        if not old.is_file() or old.read_bytes() != path.read_bytes():
            with atomic_path(old) as temporary:
                temporary.write_bytes(path.read_bytes())
            changed.append(path.name)
    return changed


@commands.command()
def eval_controller(
    results_dir: ResultsDir = Path("results"),
    model_path: Annotated[
        Path | None, typer.Option(help="A predictor; default: the one in the results.")
    ] = None,
    config: Configs = None,
) -> None:
    """Replay the controller's operating points on the test prompts of a run."""
    import polars as pl

    from kvguard.evaluate_controller import simulate_controller
    from kvguard.integrity import expected_shards
    from kvguard.splits import prompts_of, read_splits
    from kvguard.stored_requests import load_requests
    from kvguard.train import predict_tokens

    experiment = load_config(*config_layers(config)) if config else recorded_config(results_dir)
    path = model_path or results_dir / "models/hazard_predictor.json"
    if not path.is_file():
        raise FileNotFoundError(f"no predictor at {path}; `snakemake` or `kvguard train` makes one")
    predictor, points = _predictor_and_points(path)
    splits = read_splits(results_dir / "splits.parquet")
    test = pl.col("prompt_id").is_in(prompts_of(splits, "test"))

    def rows(*paths: Path) -> pl.DataFrame:
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"no table at {missing[0]}; `snakemake` makes it")
        return pl.scan_parquet(list(paths), hive_partitioning=False).filter(test).collect()

    shards = expected_shards(experiment)
    features = rows(results_dir / "features.parquet")
    requests = load_requests(
        rows(*(shard.path(results_dir, "traces") for shard in shards)),
        rows(*(shard.path(results_dir, "tokens") for shard in shards)),
        rows(results_dir / "outcomes.parquet"),
        predict_tokens({predictor.target: predictor}, features, splits),
        target=predictor.target,
        guard=experiment.guard,
    )
    table = simulate_controller(
        requests,
        points,
        check_every_tokens=experiment.guard.check_every_tokens,
        bootstrap_samples=experiment.predictor.bootstrap_samples,
        seed=experiment.seed,
    )
    print_frame(table, f"guard_promote with {path}, simulated on the test prompts", SHOWN_SETTINGS)


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
    config: Configs = None,
    results_dir: Annotated[
        Path | None, typer.Option(help="Where the model and the predictor are.")
    ] = None,
) -> None:
    """Run policies live on a few prompts, and show what each does and costs."""
    import polars as pl

    experiment = press_experiment(
        config_layers(config), press, compression_ratio, num_prompts, task, max_new_tokens
    )
    policies = policy or experiment.live.policies
    values = experiment.model_dump(mode="json", by_alias=True)
    experiment = parse_config(overlay(values, {"live": {"policies": policies}}))
    if ratio_text(compression_ratio) == BASELINE_RATIO:
        raise ConfigError("--compression-ratio: a guard needs something to guard, give 0 < r < 1")
    entry = _model_entry(experiment, model)
    joblog.configure_logging()

    from kvguard.compare_policies import summarize_runs
    from kvguard.detectors import detect_outcomes
    from kvguard.experiment import run_shard
    from kvguard.live import run_policy_shard
    from kvguard.prompts import load_task, prompts_frame

    prompts, examples = load_task(experiment.tasks[0], experiment.seed)
    loaded = _prepared_model(experiment, entry, results_dir, experiment.presses[0])
    folder = results_dir or Path(experiment.results_dir)
    trained = folder / "models/hazard_predictor.json"
    predictor, points = _predictor_and_points(trained if trained.is_file() else None)
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
            press=experiment.presses[0],
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
        f"{entry}, {experiment.presses[0].name} {ratio_text(compression_ratio)}, {num_prompts} "
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
    """Write in sentences what the tables of finished runs say about the predictor."""
    from kvguard.findings import write_findings, write_results

    folders = results_dir or [Path("results")]
    write_findings(folders, output)
    console.print(f"wrote {output}")
    if readme is not None:
        write_results(folders[0], readme)
        console.print(f"wrote the results in {readme}")


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
        console.print(f"preparing {name} in {folder} (once)")
        prepare_model(spec, folder)
    attention = (press and press.attention) or spec.attention
    return load_model(folder, dtype=spec.dtype, device=spec.device, attention=attention)


def _predictor_and_points(path: Path | None) -> "tuple[Predictor, dict[str, OperatingPoint]]":
    """A predictor and its operating points: the certificate's where one belongs to it.

    Without a path it is the rule-based risk; without a certificate the built-in thresholds.
    """
    from kvguard.certificate import CertificateError, load_certificate
    from kvguard.guard import RULES_POINTS
    from kvguard.predictor import load_predictor, rules_predictor

    if path is None:
        return rules_predictor(), dict(RULES_POINTS)
    predictor = load_predictor(path)
    beside = path.with_name("certificate.json")
    if beside.is_file():
        certificate = load_certificate(beside)
        try:
            certificate.check_predictor(predictor)
        except CertificateError as error:
            console.print(f"[yellow]{_escape(str(error))}; until then built-in thresholds[/]")
        else:
            console.print(_escape(certificate.text), soft_wrap=True, highlight=False)
            return predictor, {
                str(name): p.operating_point for name, p in certificate.points.items()
            }
    return predictor, dict(RULES_POINTS)


def _snakemake(files: Sequence[Path], *arguments: str, overrides: Sequence[str] = ()) -> None:
    """Run Snakemake in the foreground and end with its exit status."""
    command = snakemake_command(files, *arguments, overrides=overrides)
    done = subprocess.run(command)
    if done.returncode != 0:
        raise typer.Exit(done.returncode)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def print_frame(frame: "pl.DataFrame", title: str, columns: Sequence[str] | None = None) -> None:
    """Print a table; a value with its interval becomes one cell, an undefined one a dash.

    Args:
        frame: any table; ``x_low`` and ``x_high`` are shown inside the cell of ``x``.
        title: above the table.
        columns: those to show; None shows all.
    """
    names = [
        name
        for name in columns or frame.columns
        if name.removesuffix("_low").removesuffix("_high") == name or f"{name}_low" in frame.columns
    ]
    rows = [[_cell(row, name) for name in names] for row in frame.iter_rows(named=True)]
    widths = [
        max(len(part) for part in (name.replace("_", " "), *(row[index] for row in rows))) + 3
        for index, name in enumerate(names)
    ]
    for number, chosen in enumerate(_fitting(frame, names, widths)):
        table = Table(title=_escape(title) if number == 0 else None, title_justify="left")
        for index in chosen:
            numeric = frame.schema[names[index]].is_numeric()
            heading = names[index].replace("_", " ")
            table.add_column(heading, justify="right" if numeric else "left")
        for row in rows:
            table.add_row(*(row[index] for index in chosen))
        console.print(table)


def _fitting(frame: "pl.DataFrame", names: Sequence[str], widths: Sequence[int]) -> list[list[int]]:
    """Columns of each of the tables that together show a frame in the terminal's width.

    The leading columns of text say what a row is about, and begin every table.
    """
    keys: list[int] = []
    for index, name in enumerate(names):
        if frame.schema[name].is_numeric():
            break
        keys.append(index)
    tables, room = [list(keys)], console.width - 1 - sum(widths[index] for index in keys)
    left = room
    for index in range(len(keys), len(names)):
        if widths[index] > left and len(tables[-1]) > len(keys):
            tables.append(list(keys))
            left = room
        tables[-1].append(index)
        left -= widths[index]
    return tables


def _cell(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if value is None:
        return "-"
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if isinstance(value, float):
        text = _number(value)
        return text if low is None or high is None else f"{text} [{_number(low)}, {_number(high)}]"
    return (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else _escape(str(value))
    )


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"
