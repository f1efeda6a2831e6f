"""Run one policy live on one shard of the test prompts, under one press at one ratio."""

from pathlib import Path
from typing import Any

from kvguard import joblog
from kvguard.certificate import load_certificate
from kvguard.config import Config, parse_config
from kvguard.live import match_guard, run_policy_shard
from kvguard.models import load_model
from kvguard.predictor import load_predictor
from kvguard.prompts import read_examples, read_prompts
from kvguard.rival_settings import load_rivals
from kvguard.schema import OUTCOMES, RUNS, read_table, write_table
from kvguard.splits import prompts_of, read_splits


def main(config: Config, inputs: dict[str, Path], place: dict[str, str], target: Path) -> None:
    """Run the shard; ``inputs`` and ``place`` go by the rule's names of inputs and wildcards."""
    spec, press = config.model(place["model"]), config.press(place["press"])
    ratio, policy, shard = place["ratio"], place["policy"], int(place["shard"])
    task, part, parts = config.live_shards[shard]
    test = set(prompts_of(read_splits(inputs["splits"]), "test"))
    prompts = [
        prompt
        for prompt in read_prompts(inputs["prompts"])
        if prompt.task == task and prompt.prompt_id in test
    ][part::parts]
    needs: dict[str, Any] = {}
    if "predictor" in inputs:
        certificate = load_certificate(inputs["certificate"])
        needs["predictor"] = load_predictor(inputs["predictor"])
        needs["controller"] = certificate.operating_point(config.live.operating_point)
    if "simulation" in inputs:
        simulated = read_table(inputs["simulation"], RUNS)
        needs |= match_guard(simulated, policy, model=spec.name, press=press.name, ratio=ratio)
    if "rivals" in inputs:
        learned = load_rivals(inputs["rivals"])[spec.name, press.name, ratio]
        needs |= learned.model_dump(include={"clock_tokens", "gate_threshold"})
    attention = press.attention or spec.attention
    runs = run_policy_shard(
        load_model(inputs["checkpoint"], dtype=spec.dtype, device=spec.device, attention=attention),
        prompts,
        read_examples(inputs["examples"])[task],
        press=press,
        ratio=ratio,
        policy=policy,
        shard=shard,
        experiment=config,
        baseline=read_table(inputs["outcomes"], OUTCOMES),
        **needs,
    )
    write_table(runs, target, RUNS)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    inputs = {name: Path(path) for name, path in snakemake.input.items()}
    place = dict(snakemake.wildcards.items())
    main(parse_config(snakemake.config), inputs, place, Path(snakemake.output.runs))
