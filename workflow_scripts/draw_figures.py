"""Draw every figure of the run from its tables, as PDF and PNG."""

from pathlib import Path

from kvguard import joblog
from kvguard.certificate import Certificate, load_certificate
from kvguard.figures import save_figure
from kvguard.gallery import draw_run
from kvguard.schema import read_table


def main(
    tables: dict[str, Path],
    certificate: Certificate,
    watched: str,
    presses: list[str],
    folder: Path,
) -> None:
    """Write the figures; ``watched`` is the operating point whose modes the timeline holds."""
    frames = {name: read_table(path) for name, path in tables.items()}
    points = {str(name): point.setting for name, point in certificate.points.items()}
    for name, figure in draw_run(frames, points, watched, presses).items():
        save_figure(figure, folder / name)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    inputs = {name: Path(path) for name, path in snakemake.input.items()}
    certificate = load_certificate(inputs.pop("certificate"))
    params, folder = snakemake.params, Path(snakemake.output.rates).parent
    main(inputs, certificate, params.operating_point, params.presses, folder)
