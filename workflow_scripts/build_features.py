"""Turn signals into the predictor's features."""

from pathlib import Path

from kvguard import joblog
from kvguard.feature_files import build_features


def main(tokens: list[Path], traces: list[Path], target: Path) -> None:
    """Write one row per token."""
    build_features(tokens, traces, target)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main(
        [Path(path) for path in snakemake.input.tokens],
        [Path(path) for path in snakemake.input.traces],
        Path(snakemake.output.features),
    )
