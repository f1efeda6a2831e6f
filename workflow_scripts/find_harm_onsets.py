"""Find where harm begins in the harmed requests of one shard."""

from pathlib import Path
from typing import Any

import polars as pl
from tokenizers import Tokenizer

from kvguard import blocks
from kvguard.config import Config, config_part
from kvguard.harm_onsets import find_harm_onsets
from kvguard.models import LoadedModel, load_once
from kvguard.prompts import read_examples, read_prompts
from kvguard.schema import HARM_ONSETS, TRACES, read_table, write_table


def main(
    experiment: Config,
    model: dict[str, str],
    places: slice,
    inputs: dict[str, Path],
    target: Path,
) -> None:
    """Write one row per trace; ``model`` says how to load it, inputs go by the rule's names."""
    prompts = read_prompts(inputs["prompts"])[places]
    columns = ["prompt_id", "position", "token_id", "audit_gap"]

    def load() -> LoadedModel:
        return load_once(inputs["checkpoint"], **model)

    onsets = find_harm_onsets(
        prompts,
        read_examples(inputs["examples"])[prompts[0].task],
        read_table(inputs["traces"], TRACES),
        pl.read_parquet(inputs["tokens"], columns=columns, hive_partitioning=False),
        read_table(inputs["baseline"], TRACES),
        load=load,
        decode=Tokenizer.from_file(str(inputs["checkpoint"] / "tokenizer.json")).decode,
        experiment=experiment,
    )
    write_table(onsets, target, HARM_ONSETS)


def start(job: Any) -> None:
    """Search the shard of one of Snakemake's jobs."""
    main(
        config_part(job.params.experiment),
        job.params.model,
        slice(*job.params.places[:2]),
        {name: Path(path) for name, path in job.input.items()},
        Path(job.output.onsets),
    )


if __name__ == "__main__":
    blocks.run_shards(start)
