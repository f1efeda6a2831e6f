"""Run `guard_price` at one price on one shard of the certifying prompts, under one condition."""

from pathlib import Path
from typing import Any

import polars as pl

from kvguard import blocks
from kvguard.config import Config, Live, Press, config_part
from kvguard.harm_model import load_harm_model
from kvguard.live import run_policy_shard
from kvguard.models import load_once
from kvguard.prompts import read_examples, read_prompts
from kvguard.schema import CERTIFYING_RUNS, OUTCOMES, RUNS, read_table, write_table
from kvguard.splits import calibration_parts, read_splits


def main(experiment: Config, params: Any, inputs: Any, target: Path, job: Any) -> None:
    """Run the shard; params and inputs go by the rule's names, ``job`` are its wildcards."""
    press, price = Press.model_validate(params["press"]), float(params["harm_price"])
    attention = {} if press.attention is None else {"attention": press.attention}
    task, part, parts = params["places"]
    known = read_splits(inputs["splits"])
    certifying = set(calibration_parts(known, params["probability_share"])[1])
    prompts = [prompt for prompt in read_prompts(inputs["prompts"]) if prompt.task == task]
    mine = [prompt for prompt in prompts if prompt.prompt_id in certifying][part::parts]
    runs = pl.DataFrame(schema=RUNS)
    if mine:
        runs = run_policy_shard(
            load_once(inputs["checkpoint"], **params["model"] | attention),
            mine,
            read_examples(inputs["examples"])[task],
            press=press,
            ratio=job.ratio,
            policy="guard_price",
            shard=int(job.shard),
            experiment=experiment.model_copy(update={"live": Live(harm_price=price)}),
            baseline=read_table(inputs["outcomes"], OUTCOMES),
            harm_model=load_harm_model(inputs["harm_model"]),
        )
    write_table(runs.with_columns(harm_price=pl.lit(price)), target, CERTIFYING_RUNS)


def start(job: Any) -> None:
    """Run the shard of one of Snakemake's jobs."""
    params = dict(job.params.items())
    experiment = config_part(params["experiment"])
    main(experiment, params, dict(job.input.items()), Path(job.output.runs), job.wildcards)


if __name__ == "__main__":
    blocks.run_shards(start)
