"""What the full KV cache costs where rows share what their prompts begin with.

Runs `shared_prefix` on the test prompts of a finished run, in its batches, and puts it beside the
stored live runs: device byte-steps over those of the full KV cache with a copy in every row, with
95 % intervals (a bootstrap over prompts), as in the run's own tables; peak and seconds an answer.
Writes results/bench/prefix_once.json.
"""

import json
from pathlib import Path
from typing import Any

import polars as pl
from price_costs import live_runs
from ranking import run

from kvguard.compare_policies import RELATIVE, pool_conditions
from kvguard.config import Config
from kvguard.experiment import prepare_requests
from kvguard.live import repeat_full_cache, run_policy_shard
from kvguard.models import load_model
from kvguard.prompts import read_examples, read_prompts
from kvguard.schema import OUTCOMES, read_table
from kvguard.splits import prompts_of, read_splits


def held_once(folder: Path, experiment: Config) -> tuple[pl.DataFrame, dict[str, Any]]:
    """`shared_prefix` under the run's first live condition, and how long the prefixes are."""
    spec = experiment.models[0]
    model = load_model(
        folder / "checkpoints" / spec.name, dtype=spec.dtype, device="cpu", attention="sdpa"
    )
    test = set(prompts_of(read_splits(folder / "splits.parquet"), "test"))
    (stored,) = folder.glob("prompts/*.parquet")
    prompts = [prompt for prompt in read_prompts(stored) if prompt.prompt_id in test]
    (listed,) = folder.glob("prompts/*.json")
    examples = read_examples(listed)
    press = experiment.presses[0]
    parts, sizes = [], {}
    for shard, task in enumerate(experiment.tasks):
        own = [prompt for prompt in prompts if prompt.task == task.name]
        ready = prepare_requests(model, own, examples[task.name], experiment)
        sizes[task.name] = {
            "prefix_tokens": 0 if ready.prefix is None else len(ready.prefix.token_ids),
            "prompt_tokens": sum(len(one.prompt_ids) for one in ready.requests) / len(own),
            "rows": ready.rows,
        }
        parts.append(
            run_policy_shard(
                model,
                own,
                examples[task.name],
                press=press,
                ratio=str(press.ratios[0]),
                policy="shared_prefix",
                shard=shard,
                experiment=experiment,
                baseline=read_table(folder / "outcomes.parquet", OUTCOMES),
            )
        )
    return pl.concat(parts), sizes


def study(folder: Path, draws: int) -> dict[str, object]:
    """The policy beside those that ran: costs, peak, seconds, whether its answers are theirs."""
    experiment = Config.model_validate(json.loads((folder / "config.json").read_text()))
    stored = live_runs(folder)
    once, sizes = held_once(folder, experiment)
    conditions = stored.select("press", "ratio").unique(maintain_order=True).rows()
    repeated = [
        repeat_full_cache(once, press, ratio, "shared_prefix", 1) for press, ratio in conditions
    ]
    runs = pl.concat([stored, *repeated], how="diagonal_relaxed")
    pooled = pool_conditions(runs, bootstrap_samples=draws).filter(pl.col("task").is_null())
    spent = runs.group_by("policy").agg(pl.col("device_bytes_peak").max(), pl.col("seconds").mean())
    shown = ("policy", "requests", "harmed", *(RELATIVE + end for end in ("", "_low", "_high")))
    table = pooled.select(shown).join(spent, on="policy", maintain_order="left")
    full = pl.concat([stored.filter(policy="always_safe"), once], how="diagonal_relaxed")
    answers = full.group_by("prompt_id").agg(pl.col("token_ids").n_unique())["token_ids"].to_list()
    return {
        "tasks": sizes,
        "same_answers": sum(count == 1 for count in answers) / len(answers),
        "policies": table.to_dicts(),
    }


if __name__ == "__main__":
    run(__doc__, "results/silent_harm_3", "prefix_once", study)
