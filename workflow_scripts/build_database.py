"""Load prompts, traces, tokens and outcomes into one DuckDB file with views."""

from pathlib import Path

from kvguard import joblog
from kvguard.database import build_database


def main(
    prompts: Path, traces: list[Path], tokens: list[Path], outcomes: Path, target: Path
) -> None:
    """Write the database."""
    build_database(target, prompts, traces, tokens, outcomes)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main(
        Path(snakemake.input.prompts),
        [Path(path) for path in snakemake.input.traces],
        [Path(path) for path in snakemake.input.tokens],
        Path(snakemake.input.outcomes),
        Path(snakemake.output.database),
    )
