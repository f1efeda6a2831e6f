"""Choose the controller's operating points on calibration prompts and certify them."""

import json
from pathlib import Path
from typing import Any

from kvguard import joblog
from kvguard.calibration import calibrate, certifying_prompts
from kvguard.calibration_ledger import LEDGER, record_certificate
from kvguard.certificate import Use, save_certificate
from kvguard.config import CertificateSettings, Controller
from kvguard.predictor import load_predictor
from kvguard.schema import write_table
from kvguard.splits import read_splits


def main(
    inputs: dict[str, Path],
    controller: Controller,
    certificate: CertificateSettings,
    uses: list[dict[str, Any]],
    digests: dict[str, str],
    plan: str,
    results: Path,
    targets: dict[str, Path],
) -> None:
    """Write the certificate and its tables; ``digests`` are the models' by name."""
    predictor = load_predictor(inputs["predictor"])
    prompts = certifying_prompts(predictor, read_splits(inputs["splits"]))
    calibration = calibrate(
        predictor,
        inputs["predictions"],
        inputs["outcomes"],
        inputs["splits"],
        controller=controller,
        certificate=certificate,
        uses=[Use(**use, model_digest=digests[use["model"]]) for use in uses],
        prior_use=record_certificate(results / LEDGER, plan, predictor.digest, prompts),
    )
    for name, table in calibration.tables.items():
        write_table(table, targets["certificate"].parents[1] / "tables" / f"{name}.parquet")
    save_certificate(calibration.certificate, targets["certificate"])


if __name__ == "__main__":
    snakemake = joblog.start_job()
    source, params = snakemake.input, snakemake.params
    names = ("predictor", "predictions", "outcomes", "splits")
    records = [Path(path) / "kvguard_model.json" for path in source.checkpoints]
    models = [json.loads(path.read_text()) for path in records]
    main(
        {name: Path(source[name]) for name in names},
        Controller.model_validate(params.controller),
        CertificateSettings.model_validate(params.certificate),
        params.uses,
        {record["name"]: record["digest"] for record in models},
        params.plan,
        Path(snakemake.output.certificate).parents[1],
        {name: Path(path) for name, path in snakemake.output.items()},
    )
