"""Render one HTML page that shows the requests token by token."""

from pathlib import Path

import polars as pl

from kvguard import joblog
from kvguard.certificate import load_certificate
from kvguard.config import OperatingPoint
from kvguard.schema import OUTCOMES, PROMPTS, TIMELINE, atomic_path, read_table
from kvguard.viewer import render_viewer


def main(
    tables: dict[str, Path],
    traces: list[Path],
    controller: OperatingPoint,
    title: str,
    target: Path,
) -> None:
    """Write the page; ``tables`` are timeline, outcomes and prompts."""
    page = render_viewer(
        read_table(tables["timeline"], TIMELINE),
        pl.read_parquet(traces, hive_partitioning=False),
        read_table(tables["outcomes"], OUTCOMES),
        read_table(tables["prompts"], PROMPTS),
        controller=controller,
        title=title,
    )
    with atomic_path(target) as temporary:
        temporary.write_text(page)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    source, params = snakemake.input, snakemake.params
    main(
        {name: Path(source[name]) for name in ("timeline", "outcomes", "prompts")},
        [Path(path) for path in source.traces],
        load_certificate(Path(source.certificate)).operating_point(params.operating_point),
        params.title,
        Path(snakemake.output.viewer),
    )
