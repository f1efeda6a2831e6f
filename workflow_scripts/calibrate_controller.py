"""Choose the controller's operating points on calibration prompts and certify them."""

from pathlib import Path

from kvguard import joblog
from kvguard.calibration import calibrate, save_certificate
from kvguard.config import CertificateSettings, Controller
from kvguard.predictor import load_predictor
from kvguard.schema import write_table


def main(
    predictor: Path,
    predictions: Path,
    labels: Path,
    splits: Path,
    controller: Controller,
    certificate: CertificateSettings,
    certificate_path: Path,
    tables_folder: Path,
) -> None:
    """Write the certificate and its tables."""
    calibration = calibrate(
        load_predictor(predictor), predictions, labels, splits, controller, certificate
    )
    for name, table in calibration.tables.items():
        write_table(table, tables_folder / f"{name}.parquet")
    save_certificate(calibration.certificate, certificate_path)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    source, output, params = snakemake.input, snakemake.output, snakemake.params
    main(
        Path(source.predictor),
        Path(source.predictions),
        Path(source.labels),
        Path(source.splits),
        Controller.model_validate(params.controller),
        CertificateSettings.model_validate(params.certificate),
        Path(output.certificate),
        Path(output.summary).parent,
    )
