"""Run one policy live on one shard of the test prompts, under one press at one ratio."""

import json
from pathlib import Path
from typing import Any

import polars as pl

from kvguard import blocks
from kvguard.certificate import load_certificate
from kvguard.config import Config, Press, config_part
from kvguard.harm_model import load_harm_model
from kvguard.live import match_guard, repeat_full_cache, run_policy_shard
from kvguard.models import load_once
from kvguard.predictor import load_predictor
from kvguard.price_certificate import at_certified_price
from kvguard.prompts import read_examples, read_prompts
from kvguard.rival_settings import load_gate, load_rivals
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
    needs: dict[str, Any] = {"policy": job.policy, "ratio": job.ratio, "shard": int(job.shard)}
    if "predictor" in inputs:
        certificate = load_certificate(inputs["certificate"])
        needs["predictor"] = load_predictor(inputs["predictor"])
        needs["controller"] = certificate.operating_point(experiment.live.operating_point)
    if "simulation" in inputs:
        matched = [inputs["simulation"], *inputs.get("guard_runs", [])]
        runs = pl.concat(read_table(path, RUNS) for path in matched)
        needs |= match_guard(runs, job.policy, model=job.model, press=job.press, ratio=job.ratio)
    if "rivals" in inputs:
        fitted = load_rivals(inputs["rivals"])[job.model, job.press, job.ratio]
        needs |= fitted.model_dump(include={"clock_tokens", "gate_threshold", "ladder_threshold"})
    experiment = at_certified_price(experiment, inputs.get("price_certificate"), job.model)
    needs |= {"harm_model": load_harm_model(inputs["harm_model"])} if "harm_model" in inputs else {}
    needs |= {"gate": load_gate(inputs["baselines"])} if "baselines" in inputs else {}
    runs = run_policy_shard(
        load_once(inputs["checkpoint"], **params["model"] | attention),
        prompts[part::parts],
        read_examples(inputs["examples"])[task],
        press=press,
        experiment=experiment,
        baseline=read_table(inputs["outcomes"], OUTCOMES),
        **needs,
    )
    write_table(runs, target, RUNS)


def start(job: Any) -> None:
    """Run the shard of one of Snakemake's jobs."""
    params, inputs = dict(job.params.items()), dict(job.input.items())
    part = config_part(params["experiment"])
    main(part, params, inputs, Path(job.output.runs), job.wildcards)


if __name__ == "__main__":
    blocks.run_shards(start)
