"""Write the database's views about conditions as tables."""

from pathlib import Path

from kvguard import joblog
from kvguard.database import read_view
from kvguard.schema import write_table


def main(database: Path, targets: dict[str, Path]) -> None:
    """Write one table per view; ``targets`` go by the views' names."""
    for view, target in targets.items():
        write_table(read_view(database, view), target)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main(
        Path(snakemake.input.database),
        {name: Path(path) for name, path in snakemake.output.items()},
    )
