"""Probes against brute force: attention weights and explicit passes over hand-made caches."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from kvpress import (
    AdaKVPress,
    BasePress,
    ExpectedAttentionPress,
    KeyRerotationPress,
    KnormPress,
    SnapKVPress,
    StreamingLLMPress,
)
from transformers import DynamicCache

from kvguard.engine import Session, generate
from kvguard.prefill import prefill, prefill_prefix
from kvguard.probes import WINDOW_TOKENS, CacheProbe, marked_tokens
from kvguard.requests import Request
from kvguard.sampling import Decoding
from kvguard.schema import PROBE_NAMES, REPLAY_TOKENS


def probe(model, token_ids, press, marked=None):
    """Prefill by hand with the probe's hooks around the press's."""
    layers = [layer.self_attn for layer in model.model.layers]
    for layer in layers:
        layer.masked_key_indices = None
    cache = DynamicCache(config=model.config)
    measured = CacheProbe(model, token_ids, marked)
    with torch.inference_mode(), ExitStack() as stack:
        stack.enter_context(measured.before_press(layers))
        if press is not None:
            stack.enter_context(press(model))
        stack.enter_context(measured.after_press(layers))
        logits = model(
            torch.tensor([token_ids]),
            past_key_values=cache,
            logits_to_keep=max(measured.replay_tokens, 1),
        ).logits[0]
    values = measured.finish(cache, logits)
    for layer in layers:
        layer.masked_key_indices = None
    return dict(zip(PROBE_NAMES, values.tolist(), strict=True)), cache


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(4, 100, length).tolist()


def test_nothing_is_removed_without_a_press(tiny_llama):
    values, _ = probe(tiny_llama, prompt(60), None)
    for name in PROBE_NAMES[:16]:
        if "marked" not in name:
            assert values[name] == pytest.approx(0, abs=1e-5), name
    assert values["replay_kl_max"] == pytest.approx(0, abs=1e-5)
    assert values["replay_agreement"] == 1


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_evicted_mass_is_that_of_the_models_own_attention(tiny_model, family):
    """StreamingLLM keeps 4 first and the last tokens, so what it evicts is known by hand."""
    model, ids = tiny_model(family), prompt(80)
    marked = np.zeros(160, np.bool_)
    marked[50:] = True
    values, cache = probe(model, ids, StreamingLLMPress(0.5), marked)
    kept = cache.layers[0].keys.shape[2]
    evicted = np.arange(80)
    evicted = (evicted >= 4) & (evicted < 80 - (kept - 4))
    eager = tiny_model(family, "eager")
    with torch.inference_mode():
        output = eager(torch.tensor([ids]), output_attentions=True)
    weights = torch.stack(output.attentions)[:, 0, :, -WINDOW_TOKENS:].numpy()
    mass = weights[..., evicted].sum(-1).mean(-1)  # (layers, heads)
    assert values["evicted_mass_mean"] == pytest.approx(mass.mean(), abs=1e-5)
    assert values["evicted_mass_max"] == pytest.approx(mass.max(), abs=1e-5)
    last = weights[:, :, -1, evicted].sum(-1).mean()
    assert values["evicted_mass_last"] == pytest.approx(last, abs=1e-5)
    content = weights[..., 4 : 80 - WINDOW_TOKENS].sum(-1).mean(-1)
    assert values["evicted_content_mass"] == pytest.approx((mass / content).mean(), abs=1e-5)
    assert values["evicted_everywhere"] == pytest.approx(evicted.mean())
    facts = np.asarray(ids) >= 50
    assert values["evicted_marked"] == pytest.approx((evicted & facts).sum() / facts.sum())
    logits = output.logits[0, -1].softmax(-1)
    entropy = float(-(logits * logits.log()).sum())
    assert values["first_entropy"] == pytest.approx(entropy, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_replay_is_a_pass_over_the_kept_entries(tiny_model, family):
    """The replay's own tokens are not in the cache it reads; the rest keeps its positions."""
    model, ids = tiny_model(family), prompt(70, seed=3)
    values, cache = probe(model, ids, StreamingLLMPress(0.4))
    whole_cache, by_hand = (DynamicCache(config=model.config) for _ in range(2))
    kept = cache.layers[0].keys.shape[2]
    places = [*range(4), *range(70 - (kept - 4), 70 - REPLAY_TOKENS)]
    with torch.inference_mode():
        model(torch.tensor([ids]), past_key_values=whole_cache)
    for number, layer in enumerate(whole_cache.layers):
        by_hand.update(layer.keys[:, :, places], layer.values[:, :, places], number)
    positions = torch.arange(70 - REPLAY_TOKENS, 70)
    with torch.inference_mode():
        whole = model(torch.tensor([ids])).logits[0, -REPLAY_TOKENS:].log_softmax(-1)
        replayed = torch.stack(  # token by token
            [
                model(
                    torch.tensor([[ids[at]]]),
                    past_key_values=by_hand,
                    position_ids=at[None, None],
                ).logits[0, -1]
                for at in positions
            ]
        ).log_softmax(-1)
    divergence = (whole.exp() * (whole - replayed)).sum(-1)
    assert divergence.max() > 1e-3
    assert values["replay_kl_last"] == pytest.approx(float(divergence[-1]), rel=1e-3, abs=1e-5)
    assert values["replay_kl_mean"] == pytest.approx(float(divergence.mean()), rel=1e-3, abs=1e-5)
    agreement = (whole.argmax(-1) == replayed.argmax(-1)).float().mean()
    assert values["replay_agreement"] == pytest.approx(float(agreement))


@pytest.mark.parametrize(
    "press",
    [
        SnapKVPress(0.5, window_size=8),
        KnormPress(0.5),
        ExpectedAttentionPress(0.5),
        AdaKVPress(ExpectedAttentionPress(0.5)),
    ],
    ids=lambda press: type(press).__name__,
)
def test_every_kind_of_eviction_is_seen(tiny_llama, press: BasePress):
    values, _ = probe(tiny_llama, prompt(90, seed=1), press)
    assert all(np.isfinite(value) for name, value in values.items() if "marked" not in name)
    assert 0 < values["evicted_mass_mean"] <= values["evicted_mass_max"] <= 1
    assert 0 <= values["evicted_everywhere"] <= values["evicted_by_layer"] <= 0.75
    assert 0 < values["key_norm_loss"] < 1
    assert values["replay_kl_max"] > 0


def test_keys_that_were_rotated_anew_are_measured_but_not_replayed(tiny_llama):
    values, _ = probe(tiny_llama, prompt(90, seed=1), KeyRerotationPress(SnapKVPress(0.5, 8)))
    assert 0 < values["evicted_mass_mean"] < 1
    assert np.isnan(values["replay_kl_last"])


@examples(25)
@given(length=st.integers(2, 40), ratio=st.sampled_from([0.1, 0.5, 0.9]), seed=st.integers(0, 99))
def test_short_prompts_have_probes_too(tiny_llama, length, ratio, seed):
    values, _ = probe(tiny_llama, prompt(length, seed), KnormPress(ratio))
    assert 0 <= values["evicted_mass_mean"] <= 1
    assert np.isfinite(values["first_entropy"])


def test_a_probe_changes_nothing(tiny_llama):
    ids = prompt(64, seed=5)
    _, probed = probe(tiny_llama, ids, SnapKVPress(0.5, window_size=8))
    plain = DynamicCache(config=tiny_llama.config)
    with torch.inference_mode(), SnapKVPress(0.5, window_size=8)(tiny_llama):
        tiny_llama(torch.tensor([ids]), past_key_values=plain)
    for one, other in zip(probed.layers, plain.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


def test_marked_tokens_are_digits_and_capitals(tiny_tokenizer):
    marked = marked_tokens(tiny_tokenizer, 160)
    assert marked.shape == (160,)
    for text, expected in (("7", True), ("Q", True), ("q", False), ("-", False)):
        (token,) = tiny_tokenizer.encode(text, add_special_tokens=False)
        assert marked[token] == expected, text
    assert not marked[tiny_tokenizer.eos_token_id]


@pytest.mark.parametrize("share", [False, True])
def test_the_engine_measures_every_request_and_decodes_the_same(tiny_llama, share):
    start = prompt(40, seed=8)
    requests = [Request(str(i), start + prompt(20 + i, seed=i)) for i in range(3)]
    prefix = prefill_prefix(tiny_llama, start) if share else None
    decoding = Decoding(max_new_tokens=6, end_token_ids=())
    answers = {}
    for probes in (False, True):
        session = Session(
            tiny_llama,
            decoding,
            press=SnapKVPress(0.5, window_size=8),
            rows=2,
            prefix=prefix,
            probes=probes,
        )
        done = {each.request.key: each for each in generate(session, requests)}
        answers[probes] = {key: each.token_ids for key, each in done.items()}
    assert answers[True] == answers[False]
    for request in requests:
        alone, _ = probe(tiny_llama, request.prompt_ids, SnapKVPress(0.5, window_size=8))
        expected = np.array(list(alone.values()), np.float32)
        np.testing.assert_allclose(done[request.key].probes, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize(
    "press",
    [
        SnapKVPress(0.5, window_size=8),
        ExpectedAttentionPress(0.3),
        KeyRerotationPress(KnormPress(0.4)),
    ],
    ids=lambda press: type(press).__name__,
)
def test_places_are_those_of_the_kept_entries(tiny_model, family, press):
    """Found from the press's scores, from keys or from values; equal values in order."""
    model, ids = tiny_model(family), [7, 7, 9, *prompt(60, seed=2), 7, 9, 9]
    whole = prefill(model, ids)
    measured = CacheProbe(model, ids)
    kept = prefill(model, ids, press, probe=measured)
    for number, layer in enumerate(measured.removal.layers):
        index = layer.places[None, :, :, None].expand(-1, -1, -1, 16)
        own, compressed = (each.cache.layers[number] for each in (whole, kept))
        assert torch.equal(own.values.gather(2, index), compressed.values)
        if measured.removal.replayable:
            assert torch.equal(own.keys.gather(2, index), compressed.keys)
        assert all(len(set(places)) == len(places) for places in layer.places.tolist())
    assert measured.removal.replayable == (not isinstance(press, KeyRerotationPress))
    assert "score" not in vars(press)
