"""One shard, from prompts to tables: keys, audit, failures, and independence of the batch."""

import contextlib
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_series_equal
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kvguard import experiment
from kvguard.audit import Answer, audit_answers
from kvguard.config import BASELINE, Config, Press, load_config
from kvguard.experiment import RunResult, ShardError, run_shard
from kvguard.models import LoadedModel
from kvguard.presses import build_press
from kvguard.prompts import Example, Prompt, format_prompt, load_task, make_prompt_id
from kvguard.schema import TOKENS, TRACES, check

EXAMPLES = [Example(question="What is 1 + 1?", answer="One and one is two.\n#### 2")]


@pytest.fixture(scope="module")
def tiny(tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    return LoadedModel(
        tiny_llama, tiny_tokenizer, (2,), torch.device("cpu"), "tiny", digest="0" * 16
    )


def some_prompts(count: int = 5) -> list[Prompt]:
    questions = ["How many?", "Ann has 4 pears and eats 1. How many are left?", "2 x 3?"] * 3
    return [
        Prompt(
            prompt_id=make_prompt_id("gsm8k", f"{i} {question}", "3"),
            task="gsm_symbolic",
            kind="gsm_symbolic",
            index=i,
            question=f"{i} {question}",
            reference="3",
            spec='{"answer": "3"}',
        )
        for i, question in enumerate(questions[:count])
    ]


def configured(**generation: object) -> Config:
    settings = {"max_new_tokens": 24, "batch_size": 3} | generation
    overrides = {"generation": settings, "tasks": [{"kind": "gsm_symbolic", "num_prompts": 9}]}
    return load_config("config.yaml", overrides=overrides)


def press(name: str = "KnormPress", **kwargs: object) -> Press:
    return Press.model_validate(
        {"name": "press", "class": name, "kwargs": kwargs, "ratios": ["0.500"]}
    )


def shard(tiny: LoadedModel, one: Press | None = None, **generation: object) -> RunResult:
    ratio = "0.000" if one is None else "0.500"
    return run_shard(
        tiny,
        some_prompts(),
        EXAMPLES,
        press=one,
        ratio=ratio,
        shard=4,
        experiment=configured(**generation),
    )


def test_a_shard_is_one_row_a_prompt_and_one_row_a_token(tiny: LoadedModel) -> None:
    result = shard(tiny, press())
    traces = check(result.traces, TRACES, "traces")
    tokens = check(result.tokens, TOKENS, "tokens")
    assert traces["prompt_id"].to_list() == [prompt.prompt_id for prompt in some_prompts()]
    assert traces["shard"].unique().to_list() == [4]
    assert (traces["cache_bytes_after"] / traces["cache_bytes_before"]).is_between(0.45, 0.5).all()
    counted = tokens.group_by("prompt_id").agg(
        pl.len().cast(pl.Int32).alias("rows"), pl.col("position").max() + 1
    )
    joined = traces.join(counted, on="prompt_id")
    assert joined["rows"].equals(joined["generated_tokens"], check_names=False)
    assert joined["position"].equals(joined["generated_tokens"], check_names=False)
    numbers = tokens.select(pl.selectors.float())
    assert not numbers.select(pl.all().is_nan().any()).row(0).count(True)
    assert tokens.filter(pl.col("entropy_delta").is_null())["position"].unique().to_list() == [0]


def test_the_audit_is_the_uncompressed_models_opinion(tiny: LoadedModel) -> None:
    result = shard(tiny, press())
    prompt = some_prompts()[1]
    rows = result.tokens.filter(pl.col("prompt_id") == prompt.prompt_id)
    ids = format_prompt(tiny.tokenizer, prompt.question, EXAMPLES)
    whole = torch.tensor([[*ids, *rows["token_id"].to_list()]])
    with torch.inference_mode():
        logprobs = tiny.model(whole).logits[0].log_softmax(dim=-1)
    judged = logprobs[len(ids) - 1 : -1].double()
    chosen = torch.tensor(rows["token_id"].to_list())[:, None]
    expected = judged.gather(1, chosen)[:, 0].numpy()
    np.testing.assert_allclose(rows["audit_logprob"], expected, atol=1e-4)
    np.testing.assert_allclose(
        rows["audit_gap"], judged.max(dim=1).values.numpy() - expected, atol=1e-4
    )
    assert rows["audit_is_argmax"].to_list() == (judged.argmax(1) == chosen[:, 0]).tolist()
    np.testing.assert_allclose(
        rows["llr"], rows["chosen_logprob"] - rows["audit_logprob"], atol=1e-6
    )


def test_the_baseline_audits_itself(tiny: LoadedModel) -> None:
    tokens = shard(tiny).tokens
    assert (tokens["audit_gap"] == 0).all()
    assert (tokens["llr"] == 0).all()
    assert tokens["audit_is_argmax"].all()


def test_without_an_audit_its_columns_are_null(tiny: LoadedModel) -> None:
    tokens = shard(tiny, press(), audit=False).tokens
    assert tokens["audit_logprob"].null_count() == tokens.height
    assert tokens["llr"].null_count() == tokens.height


@pytest.mark.parametrize("change", [{"batch_size": 1}, {"share_prefix": False}])
def test_batch_and_prefix_change_no_token(tiny: LoadedModel, change: dict[str, object]) -> None:
    columns = ["prompt_id", "position", "token_id"]
    assert (
        shard(tiny, press(), **change)
        .tokens.select(columns)
        .equals(shard(tiny, press()).tokens.select(columns))
    )


def test_a_prompt_that_fails_is_a_row(tiny: LoadedModel) -> None:
    lengths = [len(format_prompt(tiny.tokenizer, p.question, EXAMPLES)) for p in some_prompts()]
    window = sorted(lengths)[2]  # SnapKV wants more tokens than its window: three prompts have not
    result = shard(tiny, press("SnapKVPress", window_size=window))
    status = dict(result.traces.select("prompt_id", "status").iter_rows())
    for prompt, length in zip(some_prompts(), lengths, strict=True):
        assert status[prompt.prompt_id] == ("ok" if length > window else "error")
    failed = result.traces.filter(pl.col("status") == "error")
    assert failed["error"].str.contains("window size").all()
    assert failed["stop_reason"].null_count() == failed.height
    assert not set(failed["prompt_id"]) & set(result.tokens["prompt_id"])


def test_a_shard_of_failures_fails(tiny: LoadedModel) -> None:
    with pytest.raises(
        ShardError, match=r"all 5 prompts of press 0\.500 failed; the first: .*window"
    ):
        shard(tiny, press("SnapKVPress", window_size=5000))


def test_sampling_is_reproducible_prompt_by_prompt(tiny: LoadedModel) -> None:
    sampled = {"do_sample": True, "temperature": 1.5}
    one = shard(tiny, press(), **sampled).tokens.select("prompt_id", "token_id")
    assert one.equals(shard(tiny, press(), batch_size=2, **sampled).tokens.select(one.columns))
    assert not one.equals(shard(tiny, press()).tokens.select(one.columns))


def test_automatic_batch_size_runs(tiny: LoadedModel) -> None:
    columns = ["prompt_id", "position", "token_id"]
    automatic = shard(tiny, press(), batch_size="auto").tokens
    assert automatic.select(columns).equals(shard(tiny, press()).tokens.select(columns))


def test_the_default_experiment_equals_generate(smollm2: LoadedModel) -> None:
    """Every (press, ratio) of config.yaml, on prompts of its own, alone and in a batch."""
    copy = load_config("config.yaml").tasks[1].model_dump(mode="json") | {"max_new_tokens": 10}
    experiment = load_config("config.yaml", overrides={"tasks": [copy]})
    prompts, examples = load_task(experiment.tasks[0], experiment.seed)
    for name, ratio in experiment.conditions:
        press_ = None if name == BASELINE else experiment.press(name)
        answers = []
        for some in (prompts[:2], prompts[:1]):
            tokens = run_shard(
                smollm2, some, examples, press=press_, ratio=ratio, shard=0, experiment=experiment
            ).tokens
            rows = tokens.filter(pl.col("prompt_id") == prompts[0].prompt_id)
            answers.append(rows["token_id"].to_list())
        ids = torch.tensor([format_prompt(smollm2.tokenizer, prompts[0].question, examples)])
        built = None if press_ is None else build_press(press_, ratio)
        with (
            torch.inference_mode(),
            contextlib.nullcontext() if built is None else built(smollm2.model),
        ):
            output = smollm2.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=10,
                do_sample=False,
                eos_token_id=list(smollm2.end_token_ids),
                pad_token_id=0,
            )
        expected = output[0, ids.shape[1] :].tolist()
        assert answers == [expected, expected], (name, ratio)


@pytest.mark.parametrize("cold", ["host", "none"])
@pytest.mark.parametrize("change", [{}, {"do_sample": True, "temperature": 1.5}])
def test_answers_are_audited_together_as_each_alone(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, cold: str, change: dict[str, object]
) -> None:
    settings = {"cold": cold, "share_prefix": cold == "host", **change}
    together = shard(tiny, press(), **settings).tokens
    monkeypatch.setattr(experiment, "AUDIT_TOKENS", 1)
    alone = shard(tiny, press(), **settings).tokens
    for name in together.columns:
        exact = name not in ("audit_logprob", "audit_gap", "llr")
        assert_series_equal(together[name], alone[name], check_exact=exact, abs_tol=1e-4)


@pytest.mark.parametrize(("limit", "value"), [("AUDIT_TOKENS", 60), ("AUDIT_PARKED_BYTES", 1)])
def test_what_waits_for_its_audit_is_bounded(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(experiment, limit, value)
    held: list[int] = []
    sizes: list[list[int]] = []

    def noted(model: PreTrainedModel, answers: list[Answer], *args: Any, **options: Any) -> Any:
        sizes.append([len(answer.token_ids) for answer in answers])
        held.append(sum(answer.cold is not None for answer in answers))
        return audit_answers(model, answers, *args, **options)

    monkeypatch.setattr(experiment, "audit_answers", noted)
    traces = shard(tiny, press()).traces
    audited = [size for each in sizes for size in each]
    assert sorted(audited) == sorted(traces["generated_tokens"].to_list())
    assert held == [len(each) for each in sizes]  # whatever is audited still has its cold cache
    for each in sizes:  # the last answer of a pass is the one that reaches the limit
        assert sum(each[:-1]) < value if limit == "AUDIT_TOKENS" else len(each) <= 1
