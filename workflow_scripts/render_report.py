"""Put figures, tables and the run's statistics into one HTML file, with Snakemake's own report."""

import logging
import subprocess
import sys
from pathlib import Path

from kvguard import joblog
from kvguard.schema import atomic_path

logger = logging.getLogger(__name__)


def main(snakefile: Path, config: Path, shown: list[str], target: Path) -> None:
    """Write the report of finished rules.

    Args:
        snakefile: of this workflow.
        config: the resolved configuration of the run.
        shown: rules whose inputs or outputs the report shows.
        target: the HTML file.

    Raises:
        RuntimeError: Snakemake could not make it; the message is Snakemake's.
    """
    with atomic_path(target) as temporary:
        page = temporary.with_suffix(".html")
        command = [sys.executable, "-m", "snakemake", *shown, "--nolock", "--cores", "1"]
        command += ["--snakefile", str(snakefile), "--configfile", str(config)]
        command += ["--report", str(page)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            page.unlink(missing_ok=True)
            raise RuntimeError(f"Snakemake made no report:\n{done.stdout}{done.stderr}")
        logger.info("report of %s, %d bytes", ", ".join(shown), page.stat().st_size)
        page.replace(temporary)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main(
        Path(snakemake.params.snakefile),
        Path(snakemake.input.config),
        list(snakemake.params.shown),
        Path(snakemake.output.report),
    )
