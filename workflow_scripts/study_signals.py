"""Which signals see silent harm, and what deciding on them buys: the tables of experiment 003."""

from pathlib import Path

from kvguard import joblog
from kvguard.config import load_config
from kvguard.schema import write_table
from kvguard.signal_report import study_run


def main(config: Path, targets: dict[str, Path]) -> None:
    """Write the tables of `kvguard.signal_report.TABLES` of the run that ``config`` lies in."""
    tables = study_run(config.parent, load_config(config, check_files=False))
    for name, target in targets.items():
        write_table(tables[name], target)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main(
        Path(snakemake.input.config),
        {name: Path(path) for name, path in snakemake.output.items()},
    )
