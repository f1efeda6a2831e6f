"""Onsets of harm from a tiny model, against continuations of every prefix."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import polars as pl
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kvguard import schema, tasks
from kvguard.config import BASELINE, Config, Press, load_config
from kvguard.engine import Session, generate
from kvguard.experiment import prepare_requests, run_shard
from kvguard.harm_onsets import find_harm_onsets
from kvguard.models import LoadedModel
from kvguard.prompts import Prompt, make_prompt_id
from kvguard.requests import Request
from kvguard.tasks import Verdict

TASKS = [{"kind": "gsm_symbolic", "num_prompts": 9}]

TOKENS = 24


@pytest.fixture(scope="module")
def tiny(tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    return LoadedModel(
        tiny_llama, tiny_tokenizer, (2,), torch.device("cpu"), "tiny", digest="0" * 16
    )


def _ends_alike(spec: Any, text: str) -> Verdict:
    """Right: the last character is the wanted one, as a final answer would be."""
    right = text[-1:] == spec["end"]
    return Verdict(float(right), right, text[-1:])


def _items(spec: Any, text: str) -> Verdict:
    """A list of characters: the first one that differs is the first wrong item."""
    wanted = spec["text"]
    first = next((i for i, (a, b) in enumerate(zip(text, wanted, strict=False)) if a != b), None)
    return Verdict(float(first is None), first is None, text, first, first)


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.VERIFIERS, "ends", _ends_alike)
    monkeypatch.setitem(tasks.VERIFIERS, "items", _items)


def _prompts(count: int, kind: str, specs: Sequence[Any] | None = None) -> list[Prompt]:
    return [
        Prompt(
            prompt_id=make_prompt_id("t", f"question {i}", "x"),
            task="gsm_symbolic",
            kind=kind,
            index=i,
            question=f"{i} pears and {3 * i} apples?",
            reference="x",
            spec=json.dumps(specs[i] if specs else {}),
        )
        for i in range(count)
    ]


def _run(tiny: LoadedModel, config: Config, prompts: list[Prompt], ratio: str) -> Any:
    press = Press.model_validate({"name": "p", "class": "KnormPress", "ratios": ["0.500"]})
    return run_shard(
        tiny,
        prompts,
        [],
        press=None if ratio == "0.000" else press,
        ratio=ratio,
        shard=0,
        experiment=config,
    )


def _decode(tiny: LoadedModel) -> Callable[[Sequence[int]], str]:
    return lambda ids: str(tiny.tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.matrix
@pytest.mark.parametrize("sampled", [False, True])
def test_bisection_finds_what_brute_force_finds(tiny: LoadedModel, sampled: bool) -> None:
    settings = {"max_new_tokens": TOKENS, "batch_size": 4, "do_sample": sampled}
    config = load_config("config.yaml", overrides={"generation": settings, "tasks": TASKS})
    plain = _run(tiny, config, _prompts(12, "ends", [{"end": ""}] * 12), "0.000")
    specs = [{"end": text[-1:]} for text in plain.traces["text"]]
    prompts = _prompts(12, "ends", specs)
    pressed = _run(tiny, config, prompts, "0.500")
    onsets = find_harm_onsets(
        prompts,
        [],
        pressed.traces,
        pressed.tokens,
        plain.traces,
        load=lambda: tiny,
        decode=_decode(tiny),
        experiment=config,
    )
    schema.check(onsets, schema.HARM_ONSETS, "harm_onsets")
    ready = prepare_requests(tiny, prompts, [], config)
    session = Session(tiny.model, ready.decoding, press=None, rows=1, prefix=ready.prefix)
    harmed = 0
    for prompt, request, trace, onset in zip(
        prompts,
        ready.requests,
        pressed.traces.iter_rows(named=True),
        onsets["harm_onset"],
        strict=True,
    ):
        end = json.loads(prompt.spec)["end"]
        if trace["text"][-1:] == end:
            assert onset is None
            continue
        harmed += 1
        ids = pressed.tokens.filter(prompt_id=prompt.prompt_id)["token_id"].to_list()

        def right(kept: int, ids=ids, request=request, end=end) -> bool:  # type: ignore[no-untyped-def]
            whole = [*request.prompt_ids, *ids[:kept]]
            one = Request("x", whole, request.seed, TOKENS - kept, first_position=kept)
            (done,) = generate(session, [one])
            return _decode(tiny)(ids[:kept] + done.token_ids)[-1:] == end

        verdicts = [right(kept) for kept in range(len(ids))] + [False]
        assert verdicts[onset]
        assert not verdicts[onset + 1]
        if sorted(verdicts, reverse=True) == verdicts:
            assert onset == sum(verdicts) - 1
    assert harmed >= 3


def test_a_verifier_that_names_the_item_needs_no_model(tiny: LoadedModel) -> None:
    config = load_config(
        "config.yaml", overrides={"generation": {"max_new_tokens": TOKENS}, "tasks": TASKS}
    )
    plain = _run(tiny, config, _prompts(6, "items", [{"text": ""}] * 6), "0.000")
    prompts = _prompts(6, "items", [{"text": text} for text in plain.traces["text"]])
    pressed = _run(tiny, config, prompts, "0.500")

    def refuse() -> LoadedModel:
        raise AssertionError("no model is needed")

    onsets = find_harm_onsets(
        prompts,
        [],
        pressed.traces,
        pressed.tokens,
        plain.traces,
        load=refuse,
        decode=_decode(tiny),
        experiment=config,
    )
    assert onsets["harm_onset"].null_count() < 6
    for row in onsets.filter(pl.col("harm_onset").is_not_null()).iter_rows(named=True):
        key = pl.col("prompt_id") == row["prompt_id"]
        wanted, got = (run.traces.filter(key)["text"][0] for run in (plain, pressed))
        ids = pressed.tokens.filter(key)["token_id"].to_list()
        at = row["harm_onset"]
        assert wanted.startswith(_decode(tiny)(ids[:at])), "right up to the onset"
        assert got != wanted
        if at < len(ids) - 1:
            assert not wanted.startswith(_decode(tiny)(ids[: at + 1]))


def test_what_is_wrong_uncompressed_is_not_searched(tiny: LoadedModel) -> None:
    config = load_config(
        "config.yaml", overrides={"generation": {"max_new_tokens": TOKENS}, "tasks": TASKS}
    )
    prompts = _prompts(3, "ends", [{"end": "nothing"}] * 3)
    plain, pressed = (_run(tiny, config, prompts, ratio) for ratio in ("0.000", "0.500"))
    assert plain.traces["press"].unique().to_list() == [BASELINE]
    onsets = find_harm_onsets(
        prompts,
        [],
        pressed.traces,
        pressed.tokens,
        plain.traces,
        load=lambda: pytest.fail("no request is harmed"),
        decode=_decode(tiny),
        experiment=config,
    )
    assert onsets["harm_onset"].null_count() == 3
