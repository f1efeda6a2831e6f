"""Replay the controller and every rival on the stored requests of the test prompts."""

import json
from pathlib import Path

import polars as pl
from tokenizers import Tokenizer

from kvguard import joblog
from kvguard.certificate import load_certificate
from kvguard.config import Config, config_part
from kvguard.evaluate_controller import Frames, simulate_model
from kvguard.harm_model import load_harm_model
from kvguard.rival_settings import load_gate, load_rivals
from kvguard.schema import PROMPTS, RUNS, read_table, write_table
from kvguard.splits import prompts_of, read_splits


def main(
    experiment: Config, models: list[str], inputs: dict[str, list[Path]], target: Path
) -> None:
    """Write the simulated runs; inputs go by the rule's names."""
    test = prompts_of(read_splits(inputs["splits"][0]), "test")
    prompts = read_table(inputs["prompts"][0], PROMPTS)
    certificate = load_certificate(inputs["certificate"][0])
    controller = certificate.operating_point(experiment.live.operating_point)
    rivals, gate = load_rivals(inputs["rivals"][0]), load_gate(inputs["baselines"][0])
    harm_model = load_harm_model(inputs["harm_model"][0])
    runs = []
    for model, checkpoint in zip(models, inputs["checkpoints"], strict=True):
        wanted = (pl.col("model") == model) & pl.col("prompt_id").is_in(test)
        frames = Frames(
            *(
                pl.scan_parquet(inputs[name], hive_partitioning=False).filter(wanted).collect()
                for name in Frames._fields
            )
        )
        decode = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).decode
        fitted = (controller, decode, rivals, gate, harm_model)
        layers = json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"]
        about = {"target": certificate.target, "layers": layers}
        runs.append(simulate_model(frames, prompts, experiment, *fitted, **about))
    write_table(pl.concat(runs), target, RUNS)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    given = snakemake.input
    main(
        config_part(snakemake.params.experiment),
        snakemake.params.models,
        {
            name: [Path(path) for path in ([entry] if isinstance(entry, str) else entry)]
            for name, entry in given.items()
        },
        Path(snakemake.output.simulation),
    )
