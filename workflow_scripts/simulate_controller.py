"""Replay the controller and every rival on the stored requests of the test prompts."""

from pathlib import Path

import polars as pl
from tokenizers import Tokenizer

from kvguard import joblog
from kvguard.certificate import load_certificate
from kvguard.config import Config, parse_config
from kvguard.evaluate_controller import Frames, simulate_model
from kvguard.schema import PROMPTS, RUNS, read_table, write_table
from kvguard.splits import prompts_of, read_splits


def main(config: Config, inputs: dict[str, list[Path]], targets: dict[str, Path]) -> None:
    """Write simulated runs and their tables; inputs and targets go by the rule's names."""
    test = prompts_of(read_splits(inputs["splits"][0]), "test")
    prompts = read_table(inputs["prompts"][0], PROMPTS)
    certificate = load_certificate(inputs["certificate"][0])
    points = {str(name): point.operating_point for name, point in certificate.points.items()}
    results = []
    for model, checkpoint in zip(config.models, inputs["checkpoints"], strict=True):
        wanted = (pl.col("model") == model.name) & pl.col("prompt_id").is_in(test)
        frames = Frames(
            *(
                pl.scan_parquet(inputs[name], hive_partitioning=False).filter(wanted).collect()
                for name in Frames._fields
            )
        )
        decode = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).decode
        results.append(simulate_model(frames, prompts, config, points, decode))
    for name, target in targets.items():
        table = pl.concat([result[name] for result in results])
        write_table(table, target, RUNS if name == "simulation" else None)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    given = snakemake.input
    main(
        parse_config(snakemake.config),
        {
            name: [Path(path) for path in ([entry] if isinstance(entry, str) else entry)]
            for name, entry in given.items()
        },
        {name: Path(path) for name, path in snakemake.output.items()},
    )
