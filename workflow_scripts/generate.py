"""Answer one shard of prompts under one press at one ratio, with signals and audit."""

from pathlib import Path
from typing import Any

from kvguard import blocks
from kvguard.config import Config, Press, config_part
from kvguard.experiment import run_shard
from kvguard.models import load_once
from kvguard.prompts import read_examples, read_prompts
from kvguard.schema import TOKENS, TRACES, write_table


def main(
    experiment: Config,
    model: dict[str, str],
    press: Press | None,
    places: slice,
    condition: tuple[str, int],
    inputs: dict[str, Path],
    targets: dict[str, Path],
) -> None:
    """Run the shard; ``model`` says how to load it, ``condition`` is (ratio, shard)."""
    ratio, shard = condition
    if press is not None and press.attention is not None:
        model = model | {"attention": press.attention}
    prompts = read_prompts(inputs["prompts"])[places]
    result = run_shard(
        load_once(inputs["checkpoint"], **model),
        prompts,
        read_examples(inputs["examples"])[prompts[0].task],
        press=press,
        ratio=ratio,
        shard=shard,
        experiment=experiment,
    )
    write_table(result.traces, targets["traces"], TRACES)
    write_table(result.tokens, targets["tokens"], TOKENS)


def start(job: Any) -> None:
    """Run the shard of one of Snakemake's jobs."""
    params = job.params
    main(
        config_part(params.experiment),
        params.model,
        None if params.press is None else Press.model_validate(params.press),
        slice(*params.places[:2]),
        (job.wildcards.ratio, int(job.wildcards.shard)),
        {name: Path(path) for name, path in job.input.items()},
        {name: Path(path) for name, path in job.output.items()},
    )


if __name__ == "__main__":
    blocks.run_shards(start)
