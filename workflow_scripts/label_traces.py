"""Label every token: does a failure begin within the horizon?"""

from pathlib import Path

from kvguard import joblog
from kvguard.config import Labels
from kvguard.labeling import build_labels
from kvguard.schema import OUTCOMES, read_table


def main(tokens: list[Path], outcomes: Path, labels: Labels, target: Path) -> None:
    """Write one row per token."""
    build_labels(tokens, read_table(outcomes, OUTCOMES), labels, target)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main(
        [Path(path) for path in snakemake.input.tokens],
        Path(snakemake.input.outcomes),
        Labels.model_validate(snakemake.params.labels),
        Path(snakemake.output.labels),
    )
