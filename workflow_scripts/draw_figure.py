"""Draw one figure of the run from its tables, as PDF and PNG."""

from pathlib import Path

from kvguard import joblog
from kvguard.certificate import Certificate, load_certificate
from kvguard.figures import draw_figure
from kvguard.plot_style import save_figure
from kvguard.schema import read_table


def main(
    name: str,
    tables: dict[str, Path],
    certificate: Certificate | None,
    operating_point: str,
    presses: list[str],
    stem: Path,
) -> None:
    """Write ``stem``.pdf and ``stem``.png; the certificate is None for figures that need none."""
    frames = {table: read_table(path) for table, path in tables.items()}
    points = {}
    if certificate is not None:
        points = {
            str(point): chosen.operating_point for point, chosen in certificate.points.items()
        }
    figure = draw_figure(
        name,
        frames,
        presses=presses,
        operating_points=points,
        operating_point=points.get(operating_point),
    )
    save_figure(figure, stem)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    inputs = {name: Path(path) for name, path in snakemake.input.items()}
    certificate = inputs.pop("points", None)  # not "certificate", which is a table
    params = snakemake.params
    main(
        snakemake.wildcards.figure,
        inputs,
        None if certificate is None else load_certificate(certificate),
        params.operating_point,
        params.presses,
        Path(snakemake.output.png).with_suffix(""),
    )
