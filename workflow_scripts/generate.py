"""Answer one shard of prompts under one press at one ratio, with signals and audit."""

from pathlib import Path

from kvguard import joblog
from kvguard.config import BASELINE, Config, parse_config
from kvguard.experiment import run_shard
from kvguard.models import load_model
from kvguard.prompts import read_examples, read_prompts
from kvguard.schema import TOKENS, TRACES, write_table


def main(
    config: Config,
    checkpoint: Path,
    prompts_path: Path,
    examples_path: Path,
    condition: tuple[str, str, str, int],
    traces_path: Path,
    tokens_path: Path,
) -> None:
    """Run the shard; ``condition`` is (model, press, ratio, shard)."""
    name, press_name, ratio, shard = condition
    spec, places = config.model(name), config.shards[shard]
    prompts = read_prompts(prompts_path)[places.start : places.stop]
    press = None if press_name == BASELINE else config.press(press_name)
    attention = (press and press.attention) or spec.attention
    result = run_shard(
        load_model(checkpoint, dtype=spec.dtype, device=spec.device, attention=attention),
        prompts,
        read_examples(examples_path)[prompts[0].task],
        press=press,
        ratio=ratio,
        shard=shard,
        experiment=config,
    )
    write_table(result.traces, traces_path, TRACES)
    write_table(result.tokens, tokens_path, TOKENS)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    wildcards = snakemake.wildcards
    main(
        parse_config(snakemake.config),
        Path(snakemake.input.checkpoint),
        Path(snakemake.input.prompts),
        Path(snakemake.input.examples),
        (wildcards.model, wildcards.press, wildcards.ratio, int(wildcards.shard)),
        Path(snakemake.output.traces),
        Path(snakemake.output.tokens),
    )
