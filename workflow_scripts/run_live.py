"""Run one policy live on one shard of the test prompts, under one press at one ratio."""

import json
from pathlib import Path
from typing import Any

from kvguard import blocks
from kvguard.config import Config, Press, config_part
from kvguard.live import repeat_full_cache, run_policy_shard
from kvguard.live_inputs import policy_needs
from kvguard.models import load_once
from kvguard.price_certificate import at_certified_price
from kvguard.prompts import read_examples, read_prompts
from kvguard.schema import OUTCOMES, RUNS, read_table, write_table
from kvguard.splits import prompts_of, read_splits


def main(experiment: Config, params: Any, inputs: Any, target: Path, job: Any) -> None:
    """Run the shard; params and inputs go by the rule's names, ``job`` are its wildcards."""
    if "full_cache" in inputs:
        layers = json.loads((Path(inputs["checkpoint"]) / "config.json").read_text())
        runs = read_table(inputs["full_cache"], RUNS)
        repeated = (job.press, job.ratio, job.policy, layers["num_hidden_layers"])
        write_table(repeat_full_cache(runs, *repeated), target, RUNS)
        return
    press = Press.model_validate(params["press"])
    attention = {} if press.attention is None else {"attention": press.attention}
    task, part, parts = params["places"]
    test = set(prompts_of(read_splits(inputs["splits"]), "test"))
    prompts = [p for p in read_prompts(inputs["prompts"]) if p.task == task and p.prompt_id in test]
    experiment = at_certified_price(experiment, inputs.get("price_certificate"), job.model)
    condition = {"press": job.press, "ratio": job.ratio}
    point = experiment.live.operating_point
    runs = run_policy_shard(
        load_once(inputs["checkpoint"], **params["model"] | attention),
        prompts[part::parts],
        read_examples(inputs["examples"])[task],
        press=press,
        experiment=experiment,
        baseline=read_table(inputs["outcomes"], OUTCOMES),
        policy=job.policy,
        ratio=job.ratio,
        shard=int(job.shard),
        **policy_needs(inputs, job.policy, point, model=job.model, **condition),
    )
    write_table(runs, target, RUNS)


def start(job: Any) -> None:
    """Run the shard of one of Snakemake's jobs."""
    params, inputs = dict(job.params.items()), dict(job.input.items())
    part = config_part(params["experiment"])
    main(part, params, inputs, Path(job.output.runs), job.wildcards)


if __name__ == "__main__":
    blocks.run_shards(start)
