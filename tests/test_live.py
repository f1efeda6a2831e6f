"""The live experiment: policies through the engine, with the simulation's own columns."""

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from test_experiment import EXAMPLES, configured, press, shard, some_prompts
from test_guard import POINT, Threshold
from test_ladder import gate_predictor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kvguard.config import POLICY_NAMES, Press
from kvguard.detectors import detect_outcomes
from kvguard.experiment import prepare_requests, run_shard
from kvguard.live import repeat_full_cache, run_policy_shard
from kvguard.models import LoadedModel
from kvguard.prompts import prompts_frame
from kvguard.rival_settings import gate_scores, trace_probes
from kvguard.schema import RUNS, check
from kvguard.simulation import simulate_policies
from kvguard.stored_requests import load_requests


@pytest.fixture(scope="module")
def tiny(tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    return LoadedModel(
        tiny_llama, tiny_tokenizer, (2,), torch.device("cpu"), "tiny", digest="0" * 16
    )


@pytest.fixture(scope="module")
def baseline(tiny: LoadedModel) -> pl.DataFrame:
    run = shard(tiny)
    return detect_outcomes(
        prompts_frame(some_prompts()), run.traces, run.tokens, configured().detection
    )


def live(tiny: LoadedModel, baseline: pl.DataFrame, policy: str) -> pl.DataFrame:
    return run_policy_shard(
        tiny,
        some_prompts(),
        EXAMPLES,
        press=press(),
        ratio="0.500",
        policy=policy,
        shard=0,
        experiment=configured(),
        baseline=baseline,
        predictor=Threshold(4),
        controller=POINT,
        alarm_rate=0.5,
        constant_ratio="0.250",
        clock_tokens=5,
        gate_threshold=1.0,
        ladder_threshold=0.5,
    )


QUICK = ("none", "gate", "guard", "guard_promote", "ladder", "lossless", "periodic_refresh")
"""One of each kind: does nothing, decides before the first token, checks and goes on, checks and
promotes, changes the ratio, checks everything, prefills again. `make test-quick` runs these."""


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.matrix)
        for name in POLICY_NAMES
    ],
)
def test_every_policy_runs_live(tiny: LoadedModel, baseline: pl.DataFrame, policy: str) -> None:
    runs = check(live(tiny, baseline, policy), RUNS, "runs")
    assert runs["prompt_id"].to_list() == [prompt.prompt_id for prompt in some_prompts()]
    assert runs["source"].unique().to_list() == ["live"]
    assert (runs["status"] == "ok").all()
    assert (runs["tokens_prefilled"] > 0).all()


@pytest.mark.parametrize("policy", ["verify_all", "always_safe", "offload", "shared_prefix"])
def test_exact_policies_answer_as_the_uncompressed_model(
    tiny: LoadedModel, baseline: pl.DataFrame, policy: str
) -> None:
    runs = live(tiny, baseline, policy)
    own = shard(tiny).tokens.group_by("prompt_id", maintain_order=True).agg("token_id")
    assert runs["token_ids"].to_list() == own["token_id"].to_list()
    # Without an answer, agreement asks that neither run looped nor ran out.
    broken = runs["looping"] | runs["non_termination"]
    assert runs["agrees"].to_list() == (runs["answer"].is_not_null() | ~broken).to_list()
    for column in ("looping", "non_termination", "catastrophe"):
        assert runs[column].to_list() == baseline[column].to_list()


def test_doing_nothing_is_the_compressed_run(tiny: LoadedModel, baseline: pl.DataFrame) -> None:
    runs = live(tiny, baseline, "none")
    own = shard(tiny, press())
    grouped = own.tokens.group_by("prompt_id", maintain_order=True).agg("token_id")
    assert runs["token_ids"].to_list() == grouped["token_id"].to_list()
    assert not runs["alarmed"].any()
    assert runs["device_byte_steps"].to_list() == own.traces["device_byte_steps"].to_list()


def test_promoting_costs_more_memory_than_compression(
    tiny: LoadedModel, baseline: pl.DataFrame
) -> None:
    spent = {
        policy: live(tiny, baseline, policy)["device_byte_steps"].sum()
        for policy in ("none", "guard_promote")
    }
    assert spent["none"] < spent["guard_promote"]


ALONE = {"batch_size": 1, "max_new_tokens": 8}


def two_ratios() -> Press:
    return Press.model_validate(
        {"name": "press", "class": "KnormPress", "kwargs": {}, "ratios": ["0.250", "0.500"]}
    )


def one_by_one(
    tiny: LoadedModel, baseline: pl.DataFrame, policy: str, **given: Any
) -> pl.DataFrame:
    return run_policy_shard(
        tiny,
        some_prompts(),
        EXAMPLES,
        press=two_ratios(),
        ratio="0.500",
        policy=policy,
        shard=0,
        experiment=configured(**ALONE),
        baseline=baseline,
        **given,
    )


def test_a_ladder_runs_as_it_is_simulated(tiny: LoadedModel, baseline: pl.DataFrame) -> None:
    """Thresholds between the risks of the two ratios: every rung is somebody's."""
    parts = [shard(tiny, **ALONE)]
    for ratio in ("0.500", "0.250"):
        one = two_ratios().model_copy(update={"ratios": [ratio]})
        parts.append(
            run_shard(
                tiny,
                some_prompts(),
                EXAMPLES,
                press=one,
                ratio=ratio,
                shard=4,
                experiment=configured(**ALONE),
            )
        )
    traces = pl.concat(part.traces for part in parts)
    tokens = pl.concat(part.tokens for part in parts)
    prompts, detection = prompts_frame(some_prompts()), configured().detection
    outcomes = detect_outcomes(prompts, traces, tokens, detection)
    requests = load_requests(traces, tokens, outcomes)
    gate = gate_predictor(weight=4.0, intercept=-2.0)
    conditions = traces.filter(press="press").select("press", pl.col("ratio").cast(pl.Float64))
    risks = gate_scores(
        gate,
        trace_probes(traces.filter(press="press")),
        *(column.to_numpy() for column in conditions),
    )
    started = set()
    for threshold in [risks.min(), np.median(risks), np.quantile(risks, 0.8), 1.0]:
        simulated = simulate_policies(
            requests,
            ["ladder", "gate"],
            prompts=prompts,
            live=configured().live,
            detection=detection,
            ladder_threshold=float(threshold),
            gate_threshold=float(threshold),
            gate=gate,
        ).filter(ratio="0.500")
        for policy in ("ladder", "gate") if threshold == np.median(risks) else ("ladder",):
            live = one_by_one(
                tiny,
                baseline,
                policy,
                gate=gate,
                ladder_threshold=float(threshold),
                gate_threshold=float(threshold),
            )
            own = live.join(
                simulated.filter(policy=policy), on="prompt_id", maintain_order="left", suffix="_s"
            )
            assert own.height == live.height
            for column in ("token_ids", "alarm_steps", "start_ratio", "tokens_prefilled"):
                assert own[column].to_list() == own[f"{column}_s"].to_list(), (policy, column)
            if policy == "ladder":  # alone: only padding differs, by who was there before
                started |= set(live["start_ratio"])
                share = own["device_byte_steps_s"] / own["device_byte_steps"]
                assert share.is_between(0.8, 1.2).all()
                assert (live["alarmed"] == (live["start_ratio"] != "0.500")).all()
    assert started == {"0.500", "0.250", "0.000"}


@pytest.mark.parametrize("policy", ["always_safe", "offload", "shared_prefix"])
def test_the_full_cache_run_of_one_condition_is_that_of_every_condition(
    tiny: LoadedModel, baseline: pl.DataFrame, policy: str
) -> None:
    first = live(tiny, baseline, policy if policy == "shared_prefix" else "always_safe")
    layers = tiny.model.config.num_hidden_layers
    repeated = repeat_full_cache(first, "knorm", "0.250", policy, layers)
    ran = run_policy_shard(
        tiny,
        some_prompts(),
        EXAMPLES,
        press=Press.model_validate({"name": "knorm", "class": "KnormPress", "ratios": [0.25]}),
        ratio="0.250",
        policy=policy,
        shard=0,
        experiment=configured(),
        baseline=baseline,
    )
    assert_frame_equal(repeated.drop("seconds"), ran.drop("seconds"))
    assert repeated["seconds"].is_null().all() == (policy == "offload")


def test_a_prefix_held_once_is_the_uncompressed_run_in_less_memory(
    tiny: LoadedModel, baseline: pl.DataFrame
) -> None:
    """A prefix of P tokens that all rows refer to, as long as so many decode."""
    full, runs = (live(tiny, baseline, name) for name in ("always_safe", "shared_prefix"))
    assert runs["token_ids"].to_list() == full["token_ids"].to_list()
    assert runs["bytes_moved"].unique().to_list() == [0]
    ready = prepare_requests(tiny, some_prompts(), EXAMPLES, configured())
    assert ready.prefix is not None
    shared, rows = len(ready.prefix.token_ids), min(ready.rows, full.height)
    entry = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head size, float32
    spared = full["device_byte_steps"].sum() - runs["device_byte_steps"].sum()
    steps = full["decode_steps"].sum()
    # Each step of n rows holds one prefix for n; pages of 16 round the rest.
    most = shared * entry * steps
    assert (1 - 1 / rows) * most * 0.7 < spared < most
    assert runs["device_bytes_peak"].max() < full["device_bytes_peak"].max()

    own = [shard(tiny), shard(tiny, press())]
    traces = pl.concat(part.traces for part in own)
    tokens = pl.concat(part.tokens for part in own)
    prompts, detection = prompts_frame(some_prompts()), configured().detection
    outcomes = detect_outcomes(prompts, traces, tokens, detection)
    requests = load_requests(traces, tokens, outcomes)
    given = {"prompts": prompts, "live": configured().live, "detection": detection}
    simulated = simulate_policies(requests, ["none", "shared_prefix"], **given)
    simulated = simulated.filter(policy="shared_prefix")
    assert simulated["device_byte_steps"].null_count() == simulated.height > 0
    both = runs.join(simulated, on="prompt_id", maintain_order="left", suffix="_s")
    for column in ("token_ids", "bytes_moved", "decode_steps", "answer", "harmed"):
        assert both[column].to_list() == both[f"{column}_s"].to_list(), column


def test_offloading_is_the_uncompressed_run_with_its_own_costs(
    tiny: LoadedModel, baseline: pl.DataFrame
) -> None:
    """Three layers, two of them on the device; bytes counted token by token."""
    full, runs = (live(tiny, baseline, name) for name in ("always_safe", "offload"))
    assert runs["token_ids"].to_list() == full["token_ids"].to_list()
    assert runs["seconds"].null_count() == runs.height
    entry = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head size, float32
    for row, other in zip(runs.to_dicts(), full.to_dicts(), strict=True):
        assert row["device_byte_steps"] == pytest.approx(other["device_byte_steps"] * 2 / 3, abs=1)
        assert row["device_bytes_peak"] == other["device_bytes_peak"] * 2 // 3
        prompt, steps = other["prompt_tokens"], len(other["token_ids"]) - 1
        crossed = prompt + sum(prompt + done + 1 for done in range(steps))
        assert row["bytes_moved"] == crossed * entry
        assert row["host_byte_steps"] == (crossed - prompt) * entry
        assert other["bytes_moved"] == other["host_byte_steps"] == 0

    own = [shard(tiny), shard(tiny, press())]
    traces = pl.concat(part.traces for part in own)
    tokens = pl.concat(part.tokens for part in own)
    prompts, detection = prompts_frame(some_prompts()), configured().detection
    outcomes = detect_outcomes(prompts, traces, tokens, detection)
    given = {"prompts": prompts, "live": configured().live, "detection": detection, "layers": 3}
    requests = load_requests(traces, tokens, outcomes)
    simulated = simulate_policies(requests, ["none", "always_safe", "offload"], **given)
    both = runs.join(simulated, on=["prompt_id", "policy"], maintain_order="left", suffix="_s")
    columns = ("token_ids", "prompt_tokens", "cache_bytes_before", "bytes_moved", "decode_steps")
    for column in (*columns, "host_byte_steps", "device_byte_steps", "answer", "harmed"):
        assert both[column].to_list() == both[f"{column}_s"].to_list(), column
    for name in ("none", "always_safe"):
        assert simulated.filter(policy=name)["bytes_moved"].unique().to_list() == [0]
    assert live(tiny, baseline, "none")["bytes_moved"].unique().to_list() == [0]
