"""Find where harm begins in the harmed requests of one shard."""

from pathlib import Path

import polars as pl
from tokenizers import Tokenizer

from kvguard import joblog
from kvguard.config import Config, config_part
from kvguard.harm_onsets import find_harm_onsets
from kvguard.models import LoadedModel, load_model
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
        return load_model(inputs["checkpoint"], **model)

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


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main(
        config_part(snakemake.params.experiment),
        snakemake.params.model,
        slice(*snakemake.params.places[:2]),
        {name: Path(path) for name, path in snakemake.input.items()},
        Path(snakemake.output.onsets),
    )
