"""Commands that train a predictor on a run, calibrate it, and replay its operating points."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from kvguard import cli_tables, joblog
from kvguard.cli_options import Configs, ResultsDir
from kvguard.cli_tables import SHOWN_METRICS, SHOWN_SETTINGS, print_frame, spread_metrics
from kvguard.config import ConfigError, OperatingPoint, digest, load_config
from kvguard.workflow import certificate_uses, config_layers, recorded_config

if TYPE_CHECKING:
    from kvguard.predictor import Predictor


def train(
    results_dir: ResultsDir = Path("results"),
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Train on the first N prompts alone; default: all.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Default: models of the results, or a folder beside it.")
    ] = None,
    config: Configs = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads that training uses.")] = 2,
) -> None:
    """Train the hazard predictors on a run's tables, and print their metrics on test prompts."""
    import polars as pl

    from kvguard.evaluate_predictor import evaluate_predictors
    from kvguard.integrity import expected_shards
    from kvguard.prompts import read_prompts
    from kvguard.schema import SPLIT_NAMES, SPLITS, read_table
    from kvguard.supposed_checks import evidence_of
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
    empty = [name for name in SPLIT_NAMES if name not in set(kept["split"])]
    if empty:
        first = {p.prompt_id: number for number, p in enumerate(prompts, start=1)}
        needed = max(
            min(first[one] for one in splits.filter(split=name)["prompt_id"])
            for name in SPLIT_NAMES
        )
        raise ConfigError(
            f"--num-prompts: the first {wanted} prompts of {results_dir} leave no prompt for "
            f"{', '.join(empty)}; give at least {needed}"
        )
    tables = {name: results_dir / f"{name}.parquet" for name in ("features", "labels", "outcomes")}
    settings, labels, seed = experiment.predictor, experiment.labels, experiment.seed
    read = expected_shards(experiment) if settings.feature_set == "with_evidence" else []
    trainer = make_trainer(
        kept,
        settings,
        horizon_tokens=labels.horizon_tokens,
        seed=seed,
        threads=threads,
        evidence=evidence_of(
            [shard.path(results_dir, "tokens") for shard in read],
            experiment.guard.model_dump(mode="json"),
            seed,
        ),
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
    trained = ("target", "predictor", "kind", "status", "train_prompts", "harmed_prompts", "reason")
    print_frame(models.tables["training"], "training", trained)
    print_frame(
        spread_metrics(metrics.filter(pl.col("group_by") == "all"), SHOWN_METRICS),
        "test prompts, tokens before the onset; higher is better but for brier",
    )
    cli_tables.console.print(f"{target}: {len(changed)} of the models' files are new or changed")


def _replace_changed(source: Path, target: Path) -> list[str]:
    """Move files whose content differs; equal ones keep their time, so nothing reruns."""
    from kvguard.schema import atomic_path

    changed = []
    for path in sorted(source.iterdir()):
        old = target / path.name
        if not old.is_file() or old.read_bytes() != path.read_bytes():
            with atomic_path(old) as temporary:
                temporary.write_bytes(path.read_bytes())
            changed.append(path.name)
    return changed


def calibrate(
    results_dir: ResultsDir = Path("results"),
    model_path: Annotated[
        Path | None, typer.Option(help="A predictor; default: the one in the results.")
    ] = None,
    config: Configs = None,
) -> None:
    """Choose a predictor's operating points on calibration prompts; needed after training again.

    The certificate is written beside the predictor. It counts as another use of these prompts.
    """
    from kvguard import calibration
    from kvguard.calibration_ledger import LEDGER, record_certificate
    from kvguard.certificate import Use, save_certificate
    from kvguard.files import RECORD, check_inputs
    from kvguard.predictor import load_predictor
    from kvguard.splits import read_splits
    from kvguard.train import predict_tokens

    experiment = load_config(*config_layers(config)) if config else recorded_config(results_dir)
    path = model_path or results_dir / "models/hazard_predictor.json"
    tables = {name: results_dir / f"{name}.parquet" for name in ("features", "outcomes", "splits")}
    for needed in (path, *tables.values()):
        if not needed.is_file():
            raise FileNotFoundError(f"no {needed}; `snakemake` makes it")
    check_inputs(tables.values())
    predictor = load_predictor(path)
    splits = read_splits(tables["splits"])
    digests = {}
    for model in experiment.models:
        record = results_dir / "checkpoints" / model.name / RECORD
        digests[model.name] = json.loads(record.read_text())["digest"] if record.is_file() else None
    plan = digest([experiment.model_dump(mode="json", by_alias=True), predictor.digest])
    prompts = calibration.certifying_prompts(predictor, splits)
    predictions = predict_tokens({predictor.target: predictor}, tables["features"], splits)
    made = calibration.calibrate(
        predictor,
        predictions,
        tables["outcomes"],
        splits,
        controller=experiment.controller,
        certificate=experiment.certificate,
        uses=[
            Use(**use, model_digest=digests[use["model"]]) for use in certificate_uses(experiment)
        ],
        prior_use=record_certificate(results_dir / LEDGER, plan, predictor.digest, prompts),
    )
    beside = path.with_name("certificate.json")
    save_certificate(made.certificate, beside)
    cli_tables.console.print(f"wrote {beside}", soft_wrap=True)
    cli_tables.console.print(escape(made.certificate.text), soft_wrap=True, highlight=False)


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
    from kvguard.files import check_inputs
    from kvguard.integrity import expected_shards
    from kvguard.splits import prompts_of, read_splits
    from kvguard.stored_requests import load_requests
    from kvguard.train import predict_tokens

    experiment = load_config(*config_layers(config)) if config else recorded_config(results_dir)
    path = model_path or results_dir / "models/hazard_predictor.json"
    if not path.is_file():
        raise FileNotFoundError(f"no predictor at {path}; `snakemake` or `kvguard train` makes one")
    predictor, points = predictor_and_points(path)
    splits = read_splits(results_dir / "splits.parquet")
    test = pl.col("prompt_id").is_in(prompts_of(splits, "test"))

    def rows(*paths: Path) -> pl.DataFrame:
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"no table at {missing[0]}; `snakemake` makes it")
        check_inputs(paths)
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


def signals(
    results_dir: ResultsDir = Path("results"),
    output_dir: Annotated[Path | None, typer.Option(help="Default: tables of the results.")] = None,
    config: Configs = None,
    folds: Annotated[
        int,
        typer.Option(min=2, help="Folds of what is cross-fitted over all prompts."),
    ] = 5,
    bootstrap_samples: Annotated[
        int, typer.Option(min=10, help="Draws of prompts behind each 95 % interval.")
    ] = 2000,
) -> None:
    """Compare signals of silent harm on a finished run, and what deciding on them buys.

    Fits models on train and calibration prompts, reads test prompts, writes tables/signal_*.
    """
    from kvguard.schema import write_table
    from kvguard.signal_report import study_run, target_rows

    experiment = load_config(*config_layers(config)) if config else recorded_config(results_dir)
    joblog.configure_logging()
    tables = study_run(results_dir, experiment, folds=folds, bootstrap_samples=bootstrap_samples)
    target = output_dir or results_dir / "tables"
    for name, table in tables.items():
        write_table(table, target / f"{name}.parquet")
    for title, rows in target_rows(tables).items():
        print_frame(rows, title)
    cli_tables.console.print(f"wrote {', '.join(tables)} to {target}", soft_wrap=True)


def predictor_and_points(
    path: Path | None, **use: object
) -> "tuple[Predictor, dict[str, OperatingPoint]]":
    """A predictor and its operating points: the certificate's where one belongs to it.

    Without a path it is the rule-based risk; without a certificate the built-in thresholds. Fields
    of `certificate.Use` say what the points are for; a line says where the certificate was made on
    something else.
    """
    from kvguard.certificate import CertificateError, load_certificate
    from kvguard.guard_predictor import RULES_POINTS
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
            cli_tables.console.print(
                f"[yellow]{escape(str(error))}; until then built-in thresholds[/]"
            )
        else:
            made = sum(statement.certified for statement in certificate.statements)
            cli_tables.console.print(
                f"{beside}: {made} of {len(certificate.statements)} statements certified",
                soft_wrap=True,
                highlight=False,
            )
            try:
                for name in certificate.points if use else ():
                    certificate.statements_about(name, **use)
            except CertificateError as error:
                cli_tables.console.print(f"[yellow]{escape(str(error))}[/]", soft_wrap=True)
            return predictor, {
                str(name): p.operating_point for name, p in certificate.points.items()
            }
    return predictor, dict(RULES_POINTS)
