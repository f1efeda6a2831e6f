"""Fetch a model, check it, and leave safetensors, tokenizer and record in one folder."""

from pathlib import Path

from pydantic import TypeAdapter

from kvguard import joblog
from kvguard.checkpoints import prepare_model
from kvguard.config import Model


def main(model: Model, checkpoint: Path) -> None:
    """Make ``checkpoint`` hold the model."""
    prepare_model(model, checkpoint)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main(
        TypeAdapter(Model).validate_python(snakemake.params.model),
        Path(snakemake.output.checkpoint),
    )
