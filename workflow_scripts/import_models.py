"""Take the models that another run trained, if this run may use them."""

import logging
from pathlib import Path

from kvguard import joblog
from kvguard.config import Config, config_part
from kvguard.imported_models import import_models, origin_table
from kvguard.schema import PROMPTS, read_table, write_table


def main(
    experiment: Config, prompts: Path, checkpoints: dict[str, Path], models: Path, table: Path
) -> None:
    """Write the copies with their record, and the table of where they come from."""
    origin = import_models(experiment, read_table(prompts, PROMPTS), checkpoints, models)
    logging.log(logging.WARNING if origin.transfer else logging.INFO, "%s", origin.text)
    write_table(origin_table(origin), table)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    source, params = snakemake.input, snakemake.params
    main(
        config_part(params.experiment),
        Path(source.prompts),
        {name: Path(path) for name, path in zip(params.models, source.checkpoints, strict=True)},
        Path(snakemake.output.origin).parent,
        Path(snakemake.output.table),
    )
