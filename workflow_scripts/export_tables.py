"""Write every table again as CSV, for readers and for the report."""

from pathlib import Path

from kvguard import joblog
from kvguard.schema import atomic_path, read_table


def main(tables: list[Path], targets: list[Path]) -> None:
    """Write one CSV per table, numbers in full precision."""
    for table, target in zip(tables, targets, strict=True):
        with atomic_path(target) as temporary:
            read_table(table).write_csv(temporary)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main(
        [Path(path) for path in snakemake.input.tables],
        [Path(path) for path in snakemake.output.tables],
    )
