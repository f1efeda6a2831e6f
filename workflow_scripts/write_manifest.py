"""Record size and SHA-256 of every file of the run, for `kvguard verify`."""

import json
from pathlib import Path

from kvguard import joblog
from kvguard.files import RECORD
from kvguard.provenance import manifest
from kvguard.schema import atomic_path


def main(paths: list[Path], target: Path) -> None:
    """Write the manifest; its names are relative to its own folder.

    Of a prepared model its record counts, which has the digests of the other files.
    """
    paths = [path / RECORD if path.is_dir() else path for path in paths]
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(manifest(paths, target.parent), indent=1) + "\n")


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main([Path(path) for path in snakemake.input], Path(snakemake.output.manifest))
