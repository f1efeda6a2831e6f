"""Record the resolved configuration, and the code and machine that the run started on."""

import json
from pathlib import Path
from typing import Any

from kvguard import joblog
from kvguard.config import Config, parse_config
from kvguard.provenance import describe_run
from kvguard.schema import atomic_path


def main(config: Config, config_path: Path, provenance_path: Path) -> None:
    """Write both files as indented JSON."""
    values: dict[Path, Any] = {
        config_path: config.model_dump(mode="json", by_alias=True),
        provenance_path: describe_run(config),
    }
    for path, value in values.items():
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main(
        parse_config(snakemake.config),
        Path(snakemake.output.config),
        Path(snakemake.output.provenance),
    )
