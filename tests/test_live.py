"""The live experiment: policies through the engine, with the simulation's own columns."""

import polars as pl
import pytest
import torch
from test_experiment import EXAMPLES, configured, press, shard, some_prompts
from test_guard import POINT, Threshold
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kvguard.config import POLICY_NAMES
from kvguard.detectors import detect_outcomes
from kvguard.live import run_policy_shard
from kvguard.models import LoadedModel
from kvguard.prompts import prompts_frame
from kvguard.schema import RUNS, check


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
    )


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_policy_runs_live(tiny: LoadedModel, baseline: pl.DataFrame, policy: str) -> None:
    runs = check(live(tiny, baseline, policy), RUNS, "runs")
    assert runs["prompt_id"].to_list() == [prompt.prompt_id for prompt in some_prompts()]
    assert runs["source"].unique().to_list() == ["live"]
    assert (runs["status"] == "ok").all()
    assert (runs["tokens_prefilled"] > 0).all()


@pytest.mark.parametrize("policy", ["verify_all", "always_safe"])
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
