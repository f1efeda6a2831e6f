"""Find where harm begins in the harmed requests of one shard."""

from pathlib import Path

import polars as pl
from tokenizers import Tokenizer

from kvguard import joblog
from kvguard.config import Config, parse_config
from kvguard.harm_onsets import find_harm_onsets
from kvguard.models import LoadedModel, load_model
from kvguard.prompts import read_examples, read_prompts
from kvguard.schema import HARM_ONSETS, TRACES, read_table, write_table


def main(config: Config, model: str, shard: int, inputs: dict[str, Path], target: Path) -> None:
    """Write one row per trace; ``inputs`` go by the rule's names."""
    spec, places = config.model(model), config.shards[shard]
    prompts = read_prompts(inputs["prompts"])[places.start : places.stop]
    columns = ["prompt_id", "position", "token_id", "audit_gap"]

    def load() -> LoadedModel:
        return load_model(
            inputs["checkpoint"], dtype=spec.dtype, device=spec.device, attention=spec.attention
        )

    onsets = find_harm_onsets(
        prompts,
        read_examples(inputs["examples"])[prompts[0].task],
        read_table(inputs["traces"], TRACES),
        pl.read_parquet(inputs["tokens"], columns=columns, hive_partitioning=False),
        read_table(inputs["baseline"], TRACES),
        load=load,
        decode=Tokenizer.from_file(str(inputs["checkpoint"] / "tokenizer.json")).decode,
        experiment=config,
    )
    write_table(onsets, target, HARM_ONSETS)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main(
        parse_config(snakemake.config),
        snakemake.wildcards.model,
        int(snakemake.wildcards.shard),
        {name: Path(path) for name, path in snakemake.input.items()},
        Path(snakemake.output.onsets),
    )
