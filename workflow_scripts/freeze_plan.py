"""Record what the certificate will depend on, before any prompt is generated."""

from pathlib import Path

from kvguard import joblog
from kvguard.calibration_ledger import LEDGER, record_plan
from kvguard.schema import atomic_path


def main(plan: str, results: Path, target: Path) -> None:
    """Write the plan's digest and note it in the ledger."""
    generated = any((results / "traces").rglob("*.parquet"))
    record_plan(results / LEDGER, plan, generated)
    with atomic_path(target) as temporary:
        temporary.write_text(plan + "\n")


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main(
        snakemake.params.plan,
        Path(snakemake.output.plan).parents[1],
        Path(snakemake.output.plan),
    )
