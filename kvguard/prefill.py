"""Prefill one prompt, alone and unpadded, under a press.

Presses read no attention mask, so every prompt is prefilled alone, inside the press's own hooks. A
prefix that the requests share is prefilled once: its keys, values and per-layer attention inputs
are kept, a prompt adds its own tokens, and the press is called on the joined whole.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from kvpress import BasePress
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from kvguard.presses import PressBehind, reads_attention_weights
from kvguard.probes import CacheProbe
from kvguard.replays import Replay

if TYPE_CHECKING:
    from kvguard.cold_cache import ColdRow, ColdStore


class Prefilled(NamedTuple):
    """A sequence after its prefill.

    Attributes:
        cache: batch of 1; compressed if a press was given.
        masked: per layer (heads, length) bool of hidden entries, or None.
        logits: (1, vocabulary) after the last token; attention over the uncompressed cache.
        bytes_before: of the cache before compression.
        bytes_after: after it, hidden entries left out.
        tokens: how many tokens the model really processed (without a reused prefix).
        probes: (24,) float32 in the order of `schema.PROBE_NAMES`, where a probe was given.
        cold: the uncompressed entries outside device memory, where a store was given and had room.
        refusal: why the store had no room; None where it had.
        replay: what the probe left to be run in a decoding step.
        keeps_prefix: the press has left the shared prefix whole, in front.
    """

    cache: DynamicCache
    masked: list[torch.Tensor | None] | None
    logits: torch.Tensor
    bytes_before: int
    bytes_after: int
    tokens: int
    probes: NDArray[np.float32] | None = None
    cold: "ColdRow | None" = None
    refusal: str | None = None
    replay: Replay | None = None
    keeps_prefix: bool = False


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of a cache's keys and values."""
    return sum(keys.nbytes + values.nbytes for keys, values in layer_tensors(cache))


@dataclass(frozen=True)
class Prefix:
    """A prefilled common prefix.

    Attributes:
        token_ids: the shared tokens.
        cache: their uncompressed cache, batch of 1; never written to.
        hidden: per layer the attention input (1, tokens, hidden size).
    """

    token_ids: tuple[int, ...]
    cache: DynamicCache
    hidden: list[torch.Tensor]


def attention_layers(model: PreTrainedModel) -> list[Any]:
    """The model's attention modules, first layer first."""
    return [layer.self_attn for layer in model.model.layers]


def is_pressed(layer: Any) -> bool:
    """Whether a press's hook is registered on an attention module."""
    hooks = layer._forward_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), BasePress) for hook in hooks)


def forget_masks(layers: Iterable[Any]) -> None:
    """Clear what a head-wise press left on the modules; it would hide keys of other sequences."""
    for layer in layers:
        layer.masked_key_indices = None


def layer_tensors(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer, (1, heads, length, head_dim)."""
    pairs = []
    for layer in cache.layers:
        assert layer.keys is not None
        assert layer.values is not None
        pairs.append((layer.keys, layer.values))
    return pairs


@torch.inference_mode()
def prefill_prefix(model: PreTrainedModel, token_ids: Sequence[int]) -> Prefix:
    """Prefill a prefix that many prompts share, without compression.

    Args:
        model: in eval mode.
        token_ids: at least one token.
    """
    hidden: list[torch.Tensor] = []

    def keep(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        hidden.append(kwargs["hidden_states"])

    cache = DynamicCache(config=model.config)
    layers = attention_layers(model)
    forget_masks(layers)
    with ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
            stack.callback(handle.remove)
        ids = torch.tensor([list(token_ids)], device=model.device)
        model.model(input_ids=ids, past_key_values=cache, use_cache=True)
    return Prefix(tuple(token_ids), cache, hidden)


def extend_prefix(prefix: Prefix | None, model: PreTrainedModel) -> DynamicCache:
    """A cache that starts with the prefix's entries, not copied; appending makes new tensors."""
    cache = DynamicCache(config=model.config)
    if prefix is not None:
        for layer, (keys, values) in zip(cache.layers, layer_tensors(prefix.cache), strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
    return cache


def matching_prefix(prefix: Prefix | None, token_ids: Sequence[int]) -> Prefix | None:
    """The prefix if the tokens start with it and go on, else None."""
    if prefix is None or len(prefix.token_ids) >= len(token_ids):
        return None
    same = tuple(token_ids[: len(prefix.token_ids)]) == prefix.token_ids
    return prefix if same else None


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    press: BasePress | None = None,
    *,
    prefix: Prefix | None = None,
    seed: int = 0,
    probe: CacheProbe | None = None,
    store: "ColdStore | None" = None,
) -> Prefilled:
    """Prefill one sequence, alone and unpadded, and compress its cache.

    Args:
        model: in eval mode.
        token_ids: the whole sequence.
        press: compresses at prefill; used as it is, so pass a fresh one. None: no compression.
        prefix: reused where the sequence starts with it and the press allows it.
        seed: of presses that draw random numbers; the global generator is left as it was.
        probe: measures what the press removes; of these ``token_ids``.
        store: takes each layer's entries out of device memory before the press evicts them.

    Raises:
        AssertionError, ValueError, RuntimeError: whatever the press says of this sequence, e.g.
            that it is shorter than its window.
    """
    eager = model.config._attn_implementation == "eager"
    usable = None if eager or reads_attention_weights(press) else matching_prefix(prefix, token_ids)
    reused = 0 if usable is None else len(usable.token_ids)
    layers = attention_layers(model)
    forget_masks(layers)
    cache = extend_prefix(usable, model)
    cold, refusal = _reserve(store, usable, len(token_ids) - reused)
    bytes_before = 0
    last_hidden: list[torch.Tensor] = []

    def measure(layer: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal bytes_before
        number: int = layer.layer_idx
        entry = kwargs["past_key_values"].layers[number]
        bytes_before += entry.keys.nbytes + entry.values.nbytes
        if cold is not None:
            cold.park(number, entry.keys[0, :, reused:], entry.values[0, :, reused:])

    def keep_hidden(_: Any, args: tuple[torch.Tensor]) -> None:
        last_hidden.append(args[0][0, -1])
        if probe is not None and probe.replay == "step":
            probe.hidden = args[0][0].clone()

    ids = torch.tensor([list(token_ids[reused:])], device=model.device)
    positions = torch.arange(reused, len(token_ids), device=model.device)
    with ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_hook(measure, with_kwargs=True)
            stack.callback(handle.remove)
        if cold is not None or (probe is not None and probe.replay == "step"):
            stack.callback(model.lm_head.register_forward_pre_hook(keep_hidden).remove)
        if probe is not None:
            stack.enter_context(probe.before_press(layers))
            stack.enter_context(probe.listening([press, *getattr(press, "presses", [])]))
        if press is not None:
            devices = [model.device] if model.device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices=devices))
            torch.manual_seed(seed)
            if usable is None:
                stack.enter_context(press(model))
            else:
                stack.enter_context(_press_on_whole(model, press, usable, len(token_ids)))
        if probe is not None:
            stack.enter_context(probe.after_press(layers))
        output = model(
            input_ids=ids,
            past_key_values=cache,
            use_cache=True,
            cache_position=positions,
            position_ids=positions[None],
            logits_to_keep=1 if probe is None else max(1, probe.replay_tokens),
        )
    masked = _masked_entries(layers, cache)
    bytes_after = 0
    for number, (keys, values) in enumerate(layer_tensors(cache)):
        held = keys.nbytes + values.nbytes
        hidden = None if masked is None else masked[number]
        bytes_after += held
        if hidden is not None:
            bytes_after -= held // hidden.numel() * int(hidden.sum())
    forget_masks(layers)
    probes = None if probe is None else probe.finish(cache, output.logits[0])
    if cold is not None:
        cold.hidden = cold.prompt_hidden = last_hidden[0].clone()
    return Prefilled(
        cache,
        masked,
        output.logits[:, -1],
        bytes_before,
        bytes_after,
        ids.shape[1],
        probes,
        cold,
        refusal,
        None if probe is None else probe.waiting,
        isinstance(press, PressBehind),
    )


def _reserve(
    store: "ColdStore | None", prefix: Prefix | None, tokens: int
) -> "tuple[ColdRow | None, str | None]":
    """Room outside device memory for a prompt, or why there is none."""
    if store is None:
        return None, None
    try:
        return store.row(prefix, tokens), None
    except (MemoryError, OSError, RuntimeError) as error:
        return None, f"{type(error).__name__}: {error}"


@contextmanager
def _press_on_whole(
    model: PreTrainedModel, press: BasePress, prefix: Prefix, length: int
) -> Iterator[None]:
    """Call a press's forward hook with the whole prompt although only its end is run."""
    press.post_init_from_model(model)
    positions = torch.arange(length, device=model.device)
    embeddings = model.model.rotary_emb(prefix.hidden[0], positions[None])

    def compress(layer: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        hidden = torch.cat([prefix.hidden[layer.layer_idx], kwargs["hidden_states"]], dim=1)
        whole = kwargs | {
            "hidden_states": hidden,
            "position_embeddings": embeddings,
            "cache_position": positions,
            "position_ids": positions[None],
            "attention_mask": None,
        }
        press.forward_hook(layer, args, whole, (None, None))
        return output

    with after_attention(model, compress):
        yield


@contextmanager
def after_attention(model: PreTrainedModel, hook: Callable[..., Any]) -> Iterator[None]:
    """Call a forward hook after each attention layer, which finds the rotary embedding as presses
    look for it."""
    with ExitStack() as stack:
        for layer in attention_layers(model):
            layer.rotary_emb = model.model.rotary_emb
            handle = layer.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _masked_entries(layers: Sequence[Any], cache: DynamicCache) -> list[torch.Tensor | None] | None:
    """Per layer (heads, length) bool of the entries that a head-wise press hides."""
    masks: list[torch.Tensor | None] = []
    for layer, (keys, _) in zip(layers, layer_tensors(cache), strict=True):
        indices = layer.masked_key_indices
        if indices is None:
            masks.append(None)
            continue
        hidden = torch.zeros(keys.shape[1:3], dtype=torch.bool, device=keys.device)
        hidden[indices[1], indices[2]] = True
        masks.append(hidden)
    return None if all(mask is None for mask in masks) else masks
