"""What a press removes from a cache, measured at prefill, before a token is generated.

Two questions are asked of each request. *What was removed*: how much of the attention of the last
prompt tokens falls on entries that the press evicts, and how much the attention's output changes
without them. *What it does to the model*: the last prompt tokens are run again over the compressed
cache, without their own entries, and compared with the prefill's own logits, which are uncompressed
and free (the replay). A third group, the prompt's own difficulty, does not depend on the press.

All probes are numbers per request, `PROBE_NAMES`, NaN where undefined: a press that changes keys
and values instead of removing entries (merging, quantisation) leaves nothing to compare, and one
that rotates keys anew cannot be replayed at the prompt's positions.

Sources: eviction risk from what a press removes, CompilerKV (arXiv 2602.08686) and the Global
Eviction Ratio (arXiv 2603.01426); the attention window is SnapKV's (arXiv 2404.14469).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from kvpress.utils import get_prerope_query_states
from numpy.typing import NDArray
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from kvguard.schema import PROBE_NAMES, REPLAY_TOKENS

WINDOW_TOKENS = 16
"""Last prompt tokens whose queries measure attention."""

SINK_TOKENS = 4
"""First prompt tokens, which draw attention whatever they say (arXiv 2309.17453)."""

LARGEST_HEADS = 20
"""Heads over which `evicted_mass_top20` is a mean."""

ATTENTION_NAME = "kvguard_replay"

_HASH_DIMENSIONS = 8  # of a vector; equal bits in these are taken for the same entry


class _Window(NamedTuple):
    """One layer before its press: uncompressed entries and the last tokens' attention.

    Attributes:
        keys: (heads, prompt tokens, head_dim).
        values: like keys.
        weights: (query heads, window, prompt tokens) float32, rows sum to 1.
    """

    keys: torch.Tensor
    values: torch.Tensor
    weights: torch.Tensor


class _Removed(NamedTuple):
    """One layer after its press.

    Attributes:
        places: (heads, kept) prompt position of each kept entry, in the cache's order; -1 unknown.
        kept: (heads, prompt tokens) bool.
        mass: (query heads,) share of attention on evicted entries, mean over the window.
        content_mass: (query heads,) evicted mass over all mass outside sinks and window.
        last_mass: (query heads,) evicted mass of the last token's query.
        error: (query heads,) relative change of the attention output without evicted entries.
        norm_loss: share of the summed key norms that was evicted.
    """

    places: torch.Tensor
    kept: torch.Tensor
    mass: torch.Tensor
    content_mass: torch.Tensor
    last_mass: torch.Tensor
    error: torch.Tensor
    norm_loss: float


@dataclass
class Removal:
    """What one press, at one ratio, removes from a prompt's cache.

    Attributes:
        layers: first layer first; None where a layer's entries are not some of the prompt's own.
        replayable: the kept keys are as they were, so the prompt's positions still hold.
    """

    layers: list[_Removed | None] = field(default_factory=list)
    replayable: bool = True

    @property
    def places(self) -> list[torch.Tensor] | None:
        """Per layer (heads, kept) prompt position of each entry, in the cache's order.

        None where a layer holds something else than entries of the prompt.
        """
        found = [layer.places for layer in self.layers if layer is not None]
        whole = self.replayable and len(found) == len(self.layers)
        return found if whole and all(bool((each >= 0).all()) for each in found) else None


class CacheProbe:
    """Measures one prompt's prefill; its hooks run before and after the press's hooks.

    What further ratios would remove is measured with `note`, between the two (`kvguard.ladder`).

    Args:
        model: in eval mode.
        token_ids: the whole prompt.
        marked: (vocabulary,) bool, tokens that carry facts (digits, names), or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        token_ids: Sequence[int],
        marked: NDArray[np.bool_] | None = None,
    ) -> None:
        self.model, self.token_ids = model, list(token_ids)
        ids = np.asarray(self.token_ids)
        self.marked = None if marked is None else torch.from_numpy(marked[ids]).to(model.device)
        self.windows: dict[int, _Window] = {}
        self.removal = Removal()
        self.entropies: list[torch.Tensor] = []
        self.logits: torch.Tensor | None = None  # what `finish` was given

    @property
    def replay_tokens(self) -> int:
        """How many positions' logits the prefill must keep for `finish`."""
        return replay_length(len(self.token_ids))

    @contextmanager
    def before_press(self, layers: Sequence[Any]) -> Iterator[None]:
        """Hooks that must run before the press's."""
        with _hooks(layers, self._before):
            yield

    @contextmanager
    def after_press(self, layers: Sequence[Any]) -> Iterator[None]:
        """Hooks that must run after the press's."""
        with _hooks(layers, self._after):
            yield

    def _before(self, layer: Any, _: Any, kwargs: dict[str, Any], __: Any) -> None:
        entry = kwargs["past_key_values"].layers[layer.layer_idx]
        keys, values = entry.keys[0], entry.values[0]
        queries = _queries(layer, kwargs)
        weights = _window_attention(queries, keys, float(layer.scaling))
        clamped = weights.clamp_min(1e-30)
        self.entropies.append(-(weights * clamped.log()).sum(-1).mean())
        self.windows[layer.layer_idx] = _Window(keys, values, weights)

    def _after(self, layer: Any, _: Any, kwargs: dict[str, Any], __: Any) -> None:
        self.note(layer, kwargs["past_key_values"].layers[layer.layer_idx], self.removal)
        self.windows.pop(layer.layer_idx)

    def note(self, layer: Any, entry: Any, removal: Removal) -> None:
        """Measure what a press has removed from a layer's cache, before the next layer runs.

        Args:
            layer: the attention module.
            entry: its cache, as the press left it.
            removal: gets the numbers.
        """
        before = self.windows[layer.layer_idx]
        places, replayable = _places(before, entry.keys[0], entry.values[0])
        removal.replayable &= replayable
        hidden = layer.masked_key_indices
        if places is not None and hidden is not None:
            places = places.clone()
            places[hidden[1], hidden[2]] = -1
        removal.layers.append(None if places is None else _measure(before, places))

    @torch.inference_mode()
    def finish(
        self, cache: DynamicCache, logits: torch.Tensor, removal: Removal | None = None
    ) -> NDArray[np.float32]:
        """All probes of the request, in the order of `PROBE_NAMES`; call it without the hooks.

        Args:
            cache: as the press left it; not changed.
            logits: (`replay_tokens` or more, vocabulary), the prefill's own of the last positions.
            removal: of the press that left the cache; None: of the one that the hooks saw.
        """
        self.logits = logits
        removal = self.removal if removal is None else removal
        values = self._removal(removal) | self._prompt(logits)
        if removal.replayable and self.replay_tokens and all(removal.layers):
            values |= self._replay(cache, logits, removal)
        return np.array([values.get(name, np.nan) for name in PROBE_NAMES], dtype=np.float32)

    def _prompt(self, logits: torch.Tensor) -> dict[str, float]:
        count = min(len(logits), self.replay_tokens)
        values = {
            "attention_entropy": float(torch.stack(self.entropies).mean()),
            "first_entropy": float(_entropy(logits[-1:])[0]),
        }
        if count > 1:
            following = torch.tensor(self.token_ids[-(count - 1) :], device=logits.device)
            scores = logits[-count:-1].float().log_softmax(-1)
            values["prompt_nll"] = float(-scores.gather(1, following[:, None]).mean())
        return values

    def _removal(self, removal: Removal) -> dict[str, float]:
        layers = [layer for layer in removal.layers if layer is not None]
        if not layers:
            return {}
        mass = torch.stack([layer.mass for layer in layers])  # (layers, query heads)
        content = torch.stack([layer.content_mass for layer in layers])
        last = torch.stack([layer.last_mass for layer in layers])
        error = torch.stack([layer.error for layer in layers])
        thirds = [part.mean().item() for part in torch.tensor_split(mass.mean(1), 3)]
        kept_somewhere = torch.stack([layer.kept.any(0) for layer in layers])  # (layers, tokens)
        largest = mass.flatten().topk(min(LARGEST_HEADS, mass.numel())).values
        values = {
            "evicted_mass_mean": mass.mean().item(),
            "evicted_mass_max": mass.max().item(),
            "evicted_mass_top20": largest.mean().item(),
            "evicted_mass_std": mass.std(correction=0).item(),
            "evicted_mass_early": thirds[0],
            "evicted_mass_middle": thirds[1],
            "evicted_mass_late": thirds[2],
            "evicted_content_mass": content.nanmean().item(),
            "evicted_mass_last": last.mean().item(),
            "evicted_everywhere": 1 - kept_somewhere.any(0).float().mean().item(),
            "evicted_by_layer": 1 - kept_somewhere.float().mean().item(),
            "key_norm_loss": float(np.mean([layer.norm_loss for layer in layers])),
            "output_error_mean": error.mean().item(),
            "output_error_max": error.max().item(),
        }
        if self.marked is not None and bool(self.marked.any()):
            marked = kept_somewhere[:, self.marked]
            shares = torch.stack([layer.kept[:, self.marked].float().mean() for layer in layers])
            values["evicted_marked"] = 1 - shares.mean().item()
            values["evicted_marked_everywhere"] = 1 - marked.any(0).float().mean().item()
        return values

    def _replay(
        self, cache: DynamicCache, logits: torch.Tensor, removal: Removal
    ) -> dict[str, float]:
        count, length = self.replay_tokens, len(self.token_ids)
        device = self.model.device
        places = [layer.places for layer in removal.layers if layer is not None]
        usable = [(place >= 0) & (place < length - count) for place in places]
        positions = torch.arange(length - count, length, device=device)
        before = self.model.config._attn_implementation
        self.model.config._attn_implementation = ATTENTION_NAME
        try:
            replayed = self.model(
                input_ids=torch.tensor([self.token_ids[-count:]], device=device),
                position_ids=positions[None],
                cache_position=positions,
                use_cache=False,
                kvguard_replay=(cache, usable),
            ).logits[0]
        finally:
            self.model.config._attn_implementation = before
        own, other = (part.float().log_softmax(-1) for part in (logits[-count:], replayed))
        divergence = (own.exp() * (own - other)).sum(-1)
        agree = (own.argmax(-1) == other.argmax(-1)).float()
        shift = _entropy(replayed) - _entropy(logits[-count:])
        return {
            "replay_kl_last": divergence[-1].item(),
            "replay_kl_mean": divergence.mean().item(),
            "replay_kl_max": divergence.max().item(),
            "replay_agreement": agree.mean().item(),
            "replay_entropy_shift": shift[-1].item(),
        }


def replay_length(prompt_tokens: int) -> int:
    """How many tokens of a prompt a replay runs."""
    return min(REPLAY_TOKENS, prompt_tokens - 1)


def replay_ran(probes: NDArray[np.floating]) -> bool:
    """Whether the probes of a request, in the order of `PROBE_NAMES`, took a replay."""
    return bool(np.isfinite(probes[PROBE_NAMES.index("replay_kl_last")]))


def reads_probes(predictor: object) -> bool:
    """Whether a predictor's features include probes, so that prefills must measure them."""
    return any(name in PROBE_NAMES for name in getattr(predictor, "feature_names", ()))


def marked_tokens(tokenizer: Any, size: int) -> NDArray[np.bool_]:
    """Tokens of a vocabulary that carry facts: numbers, codes and names.

    Args:
        tokenizer: a transformers tokenizer.
        size: the model's vocabulary; embeddings behind the tokenizer's tokens are not marked.

    Returns:
        (size,) bool. A token is marked where its text holds a digit or begins, after white space,
        with a capital letter.
    """
    marked = np.zeros(size, np.bool_)
    known = min(size, len(tokenizer))
    special = set(tokenizer.all_special_ids)
    for token, text in enumerate(tokenizer.batch_decode([[token] for token in range(known)])):
        word = text.strip()
        fact = word[:1].isupper() or any(letter.isdigit() for letter in word)
        marked[token] = fact and token not in special
    return marked


@contextmanager
def _hooks(layers: Sequence[Any], hook: Any) -> Iterator[None]:
    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _queries(layer: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """Queries of the last tokens that this pass runs, (query heads, window, head_dim), rotated."""
    hidden = kwargs["hidden_states"][:, -WINDOW_TOKENS:]
    cos, sin = (part[:, -hidden.shape[1] :, :][:, None] for part in kwargs["position_embeddings"])
    queries = get_prerope_query_states(layer, hidden)
    rotated, rest = queries[..., : cos.shape[-1]], queries[..., cos.shape[-1] :]
    rotated = rotated * cos + rotate_half(rotated) * sin
    return torch.cat([rotated, rest], dim=-1)[0]


def _window_attention(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention (query heads, window, tokens) float32 of the last tokens."""
    heads, window, size = queries.shape
    groups, tokens = heads // len(keys), keys.shape[1]
    grouped = queries.reshape(len(keys), groups * window, size)
    scores = (grouped @ keys.transpose(1, 2)).reshape(heads, window, tokens).float() * scale
    beyond = torch.ones(window, tokens, dtype=torch.bool, device=keys.device)
    return scores.masked_fill(beyond.triu(tokens - window + 1), -torch.inf).softmax(-1)


def _digests(vectors: torch.Tensor) -> torch.Tensor:
    """(heads, n) int64 that are equal where the vectors (heads, n, size) are, bit for bit."""
    kind = torch.int32 if vectors.element_size() == 4 else torch.int16
    part = vectors[..., :_HASH_DIMENSIONS].contiguous().view(kind).to(torch.int64)
    mix = torch.tensor(
        [0x9E3779B97F4A7C1 + 0x5851F42D4C957F2 * i | 1 for i in range(part.shape[-1])],
        dtype=torch.int64,
        device=vectors.device,
    )
    return (part * mix).sum(-1)


def _match(whole: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Place in ``whole`` (heads, n) of each of ``kept`` (heads, m); -1 where it is not there."""
    order = whole.argsort(dim=-1, stable=True)
    ordered = whole.gather(1, order)
    found = torch.searchsorted(ordered, kept.contiguous()).clamp_max(whole.shape[1] - 1)
    places = order.gather(1, found)
    return places.masked_fill(whole.gather(1, places) != kept, -1)


def _places(
    before: _Window, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor | None, bool]:
    """Prompt positions of a layer's kept entries, and whether its keys are as they were.

    Keys tell entries apart, since they carry positions. A press that rotates keys anew still keeps
    values; one that changes those too leaves None.
    """
    if keys.shape[1] == before.keys.shape[1]:
        same = torch.arange(keys.shape[1], device=keys.device).expand(keys.shape[0], -1)
        if torch.equal(keys, before.keys):
            return same, True
    places = _match(_digests(before.keys), _digests(keys))
    if bool((places >= 0).all()):
        return places, True
    places = _match(_digests(before.values), _digests(values))
    return (places, False) if bool((places >= 0).all()) else (None, False)


def _measure(before: _Window, places: torch.Tensor) -> _Removed:
    heads, tokens = before.keys.shape[:2]
    kept = torch.zeros(heads, tokens + 1, dtype=torch.bool, device=places.device)
    kept.scatter_(1, places.where(places >= 0, tokens), True)
    kept = kept[:, :tokens]
    weights = before.weights  # (query heads, window, tokens)
    query_heads, window = weights.shape[:2]
    groups = query_heads // heads
    remaining = weights * kept.repeat_interleave(groups, 0)[:, None]
    mass = (1 - remaining.sum(-1)).clamp(0, 1)
    content = slice(SINK_TOKENS, tokens - window)
    outside = weights[..., content].sum(-1).mean(-1)
    lost = outside - remaining[..., content].sum(-1).mean(-1)
    values = before.values.float()

    def mixed(part: torch.Tensor) -> torch.Tensor:
        grouped = part.reshape(heads, groups * window, tokens) @ values
        return grouped.reshape(query_heads, window, -1)

    full = mixed(weights)
    left = mixed(remaining) / remaining.sum(-1, keepdim=True).clamp_min(1e-9)
    error = (full - left).norm(dim=-1) / full.norm(dim=-1).clamp_min(1e-9)
    norms = before.keys.float().norm(dim=-1)
    return _Removed(
        places=places,
        kept=kept,
        mass=mass.mean(-1),
        content_mass=torch.where(outside > 0, lost / outside, torch.nan),
        last_mass=mass[:, -1],
        error=error.mean(-1),
        norm_loss=1 - float((norms * kept).sum() / norms.sum()),
    )


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of each row of logits (n, vocabulary)."""
    scores = logits.float().log_softmax(-1)
    return -(scores.exp() * scores).sum(-1)


def replay_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the replayed tokens over a compressed cache and each other, causal.

    Args:
        module: the attention layer; names its number.
        query: (1, query heads, replayed, head_dim).
        key: (1, heads, replayed, head_dim), the replayed tokens' own.
        value: like key.
        attention_mask: unused.
        dropout: unused.
        scaling: factor on the scores.
        kwargs: ``kvguard_replay`` is the compressed cache and, per layer, (heads, kept) bool of
            the entries that the replayed tokens may see.

    Returns:
        (1, replayed, query heads, head_dim), None.
    """
    cache, usable = kwargs["kvguard_replay"]
    entry, visible = cache.layers[module.layer_idx], usable[module.layer_idx]
    heads, count = key.shape[1:3]
    keys, values = (
        torch.cat([old, new], dim=2) for old, new in ((entry.keys, key), (entry.values, value))
    )
    own = torch.ones(count, count, dtype=torch.bool, device=key.device).tril()
    seen = torch.cat(
        [visible[:, None].expand(-1, count, -1), own[None].expand(heads, -1, -1)], dim=-1
    )
    groups = query.shape[1] // heads
    mixed = torch.nn.functional.scaled_dot_product_attention(
        query,
        keys.repeat_interleave(groups, 1),
        values.repeat_interleave(groups, 1),
        attn_mask=seen.repeat_interleave(groups, 0)[None],
        scale=scaling,
    )
    return mixed.transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, replay_attention)
