"""Say in sentences, from the run's tables, what the predictor knows before a failure begins."""

from pathlib import Path

from kvguard import joblog
from kvguard.findings import write_findings


def main(results: Path, target: Path) -> None:
    """Write the findings of one run; `kvguard findings` writes those of several."""
    write_findings([results], target)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main(Path(snakemake.input.config).parent, Path(snakemake.output.findings))
