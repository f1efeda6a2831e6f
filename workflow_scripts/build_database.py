"""Load prompts, traces, tokens, outcomes and splits into one DuckDB file with views."""

from pathlib import Path

from kvguard import joblog
from kvguard.database import build_database


def main(tables: dict[str, Path], traces: list[Path], tokens: list[Path], target: Path) -> None:
    """Write the database; ``tables`` are prompts, outcomes and splits."""
    build_database(target, tables["prompts"], traces, tokens, tables["outcomes"], tables["splits"])


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main(
        {name: Path(snakemake.input[name]) for name in ("prompts", "outcomes", "splits")},
        [Path(path) for path in snakemake.input.traces],
        [Path(path) for path in snakemake.input.tokens],
        Path(snakemake.output.database),
    )
