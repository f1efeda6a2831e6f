"""Certify the prices of harm that ran live on the certifying prompts."""

import json
from pathlib import Path
from typing import Any

import polars as pl

from kvguard import joblog
from kvguard.calibration_ledger import LEDGER, record_certificate
from kvguard.harm_model import load_harm_model
from kvguard.imported_models import trained_by
from kvguard.price_calibration import certify_prices, rows_together
from kvguard.price_certificate import PriceUse, harm_model_digest, save_price_certificate
from kvguard.schema import CERTIFYING_RUNS, read_table, write_table
from kvguard.splits import calibration_parts, read_splits


def main(
    inputs: dict[str, Path],
    run_paths: list[Path],
    uses: list[dict[str, Any]],
    digests: dict[str, str],
    tests: dict[str, Any],
    plan: str,
    probability_share: float,
    target: Path,
) -> None:
    """Write the certificate and its tables; ``digests`` are the models', ``tests`` the levels."""
    splits, model = read_splits(inputs["splits"]), load_harm_model(inputs["harm_model"])
    runs = pl.concat(read_table(path, CERTIFYING_RUNS) for path in run_paths)
    prompts = calibration_parts(splits, probability_share)[1]
    results = target.parents[1]
    rows = {"batch_size": rows_together(runs, uses[0]["batch_size"])}
    made = certify_prices(
        runs,
        splits,
        prompts,
        model,
        [PriceUse(**use | rows, model_digest=digests[use["model"]]) for use in uses],
        **tests,
        prior_use=record_certificate(results / LEDGER, plan, harm_model_digest(model), prompts),
    )
    for name, table in made.tables.items():
        write_table(table, results / "tables" / f"{name}.parquet")
    origin = {"trained_by": trained_by(target.parent)}
    save_price_certificate(made.certificate.model_copy(update=origin), target)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    source, params = snakemake.input, snakemake.params
    records = [Path(path) / "kvguard_model.json" for path in source.checkpoints]
    models = [json.loads(path.read_text()) for path in records]
    main(
        {name: Path(source[name]) for name in ("splits", "harm_model")},
        [Path(path) for path in source.runs],
        params.uses,
        {record["name"]: record["digest"] for record in models},
        dict(params.tests),
        params.plan,
        params.probability_share,
        Path(snakemake.output.certificate),
    )
