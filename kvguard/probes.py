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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from kvpress import ScorerPress
from kvpress.utils import get_prerope_query_states
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from kvguard.replays import Replay, ReplayAt, compare, entropy, replay_length
from kvguard.schema import PROBE_NAMES

WINDOW_TOKENS = 16
"""Last prompt tokens whose queries measure attention."""

SINK_TOKENS = 4
"""First prompt tokens, which draw attention whatever they say (arXiv 2309.17453)."""

LARGEST_HEADS = 20
"""Heads over which `evicted_mass_top20` is a mean."""

_HASH_DIMENSIONS = 8  # of a vector; equal bits in these are taken for the same entry


class _Window(NamedTuple):
    """One layer before its press: uncompressed entries and the last tokens' attention.

    What does not depend on a ratio is computed once, for all of a ladder.

    Attributes:
        keys: (heads, prompt tokens, head_dim).
        values: like keys.
        weights: (heads, query heads per head x window, prompt tokens) float32, rows sum to 1.
        content: (query heads,) mass outside sinks and window, mean over the window.
        mixed: (heads, query heads per head x window, head_dim) float32, the attention's output.
        sizes: (heads, query heads per head x window) norm of ``mixed``.
        norms: (heads, prompt tokens) float32, of the keys.
        window: last tokens whose queries these are.
    """

    keys: torch.Tensor
    values: torch.Tensor
    weights: torch.Tensor
    content: torch.Tensor
    mixed: torch.Tensor
    sizes: torch.Tensor
    norms: torch.Tensor
    window: int


class _Removed(NamedTuple):
    """One layer after its press.

    Attributes:
        places: (heads, kept) prompt position of each kept entry, in the cache's order; -1 unknown.
        kept: (heads, prompt tokens) bool.
        mass: (query heads,) share of attention on evicted entries, mean over the window.
        content_mass: (query heads,) evicted mass over all mass outside sinks and window.
        last_mass: (query heads,) evicted mass of the last token's query.
        error: (query heads,) relative change of the attention output without evicted entries.
        norm_loss: () share of the summed key norms that was evicted.
    """

    places: torch.Tensor
    kept: torch.Tensor
    mass: torch.Tensor
    content_mass: torch.Tensor
    last_mass: torch.Tensor
    error: torch.Tensor
    norm_loss: torch.Tensor


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
        replay: "prefill" runs the replay at once, "step" leaves it to who decodes (`waiting`),
            "none" does without.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        token_ids: Sequence[int],
        marked: NDArray[np.bool_] | None = None,
        replay: ReplayAt = "prefill",
    ) -> None:
        self.replay = replay
        self.hidden: torch.Tensor | None = None  # of the replayed tokens, where they are to wait
        self.waiting: Replay | None = None
        self.model, self.token_ids = model, list(token_ids)
        ids = np.asarray(self.token_ids)
        self.marked = None if marked is None else torch.from_numpy(marked[ids]).to(model.device)
        self.windows: dict[int, _Window] = {}
        self._queries: torch.Tensor | None = None  # of the layer at work, before its rotation
        self._scores: torch.Tensor | None = None  # that the press at work has given its entries
        self.has_marked = marked is not None and bool(marked[ids].any())
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
        with ExitStack() as stack:
            for layer in layers:
                source = _query_source(layer)
                if source is not None:
                    stack.callback(source.register_forward_hook(self._keep_queries).remove)
            stack.enter_context(_hooks(layers, self._before))
            yield

    @contextmanager
    def listening(self, presses: Sequence[object]) -> Iterator[None]:
        """Note the scores that presses give: the kept entries' places follow from them."""
        heard = [press for press in presses if isinstance(press, ScorerPress)]

        def listen(press: Any) -> None:
            own = press.score

            def score(*args: Any, **kwargs: Any) -> torch.Tensor:
                self._scores = own(*args, **kwargs)
                return self._scores

            press.score = score

        for press in heard:
            listen(press)
        try:
            yield
        finally:
            for press in heard:
                del press.score

    def _keep_queries(self, module: Any, args: Any, output: torch.Tensor) -> None:
        self._queries = output[:, -WINDOW_TOKENS:]

    @contextmanager
    def after_press(self, layers: Sequence[Any]) -> Iterator[None]:
        """Hooks that must run after the press's."""
        with _hooks(layers, self._after):
            yield

    def _before(self, layer: Any, _: Any, kwargs: dict[str, Any], __: Any) -> None:
        entry = kwargs["past_key_values"].layers[layer.layer_idx]
        queries = _rotated_queries(layer, kwargs, self._queries)
        self._queries = self._scores = None
        window, entropy = _look(queries, entry.keys[0], entry.values[0], float(layer.scaling))
        self.entropies.append(entropy)
        self.windows[layer.layer_idx] = window

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
        places, replayable = _places(before, entry.keys[0], entry.values[0], self._scores)
        self._scores = None
        removal.replayable &= replayable
        hidden = layer.masked_key_indices
        if places is not None and hidden is not None:
            places = places.clone()
            places[hidden[1], hidden[2]] = -1
        hides = hidden is not None
        removal.layers.append(None if places is None else _measure(before, places, hides))

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
        own = logits[-max(self.replay_tokens, 1) :].float().log_softmax(-1)
        values = self._removal(removal) | self._prompt(own)
        if removal.replayable and self.replay_tokens and all(removal.layers):
            start = len(self.token_ids) - self.replay_tokens
            places = [layer.places for layer in removal.layers if layer is not None]
            usable = [(place >= 0) & (place < start) for place in places]
            replay = Replay(self.token_ids[start:], start, usable, self.hidden)
            if self.replay == "prefill":
                values |= compare(own, replay.run(self.model, cache))
            elif self.replay == "step":
                self.waiting = replay
        numbers = torch.stack(list(values.values())).tolist()  # one transfer
        found = dict(zip(values, numbers, strict=True))
        return np.array([found.get(name, np.nan) for name in PROBE_NAMES], dtype=np.float32)

    def _prompt(self, own: torch.Tensor) -> dict[str, torch.Tensor]:
        values = {
            "attention_entropy": torch.stack(self.entropies).mean(),
            "first_entropy": entropy(own[-1]),
        }
        if len(own) > 1:
            following = torch.tensor(self.token_ids[-(len(own) - 1) :], device=own.device)
            values["prompt_nll"] = -own[:-1].gather(1, following[:, None]).mean()
        return values

    def _removal(self, removal: Removal) -> dict[str, torch.Tensor]:
        layers = [layer for layer in removal.layers if layer is not None]
        if not layers:
            return {}
        mass = torch.stack([layer.mass for layer in layers])  # (layers, query heads)
        content = torch.stack([layer.content_mass for layer in layers])
        last = torch.stack([layer.last_mass for layer in layers])
        error = torch.stack([layer.error for layer in layers])
        thirds = [part.mean() for part in torch.tensor_split(mass.mean(1), 3)]
        kept_somewhere = torch.stack([layer.kept.any(0) for layer in layers])  # (layers, tokens)
        largest = mass.flatten().topk(min(LARGEST_HEADS, mass.numel())).values
        values = {
            "evicted_mass_mean": mass.mean(),
            "evicted_mass_max": mass.max(),
            "evicted_mass_top20": largest.mean(),
            "evicted_mass_std": mass.std(correction=0),
            "evicted_mass_early": thirds[0],
            "evicted_mass_middle": thirds[1],
            "evicted_mass_late": thirds[2],
            "evicted_content_mass": content.nanmean(),
            "evicted_mass_last": last.mean(),
            "evicted_everywhere": 1 - kept_somewhere.any(0).float().mean(),
            "evicted_by_layer": 1 - kept_somewhere.float().mean(),
            "key_norm_loss": torch.stack([layer.norm_loss for layer in layers]).mean(),
            "output_error_mean": error.mean(),
            "output_error_max": error.max(),
        }
        if self.marked is not None and self.has_marked:
            marked = kept_somewhere[:, self.marked]
            shares = torch.stack([layer.kept[:, self.marked].float().mean() for layer in layers])
            values["evicted_marked"] = 1 - shares.mean()
            values["evicted_marked_everywhere"] = 1 - marked.any(0).float().mean()
        return values


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


def _query_source(layer: Any) -> Any:
    """The module whose output are an attention layer's queries before rotation; None: not known."""
    for name in ("q_norm", "q_proj", "qkv_proj"):
        if getattr(layer, name, None) is not None:
            return getattr(layer, name)
    return None


def _rotated_queries(layer: Any, kwargs: dict[str, Any], seen: torch.Tensor | None) -> torch.Tensor:
    """Queries of the last tokens that this pass runs, (query heads, window, head_dim), rotated.

    Args:
        layer: the attention module.
        kwargs: that it was called with.
        seen: what `_query_source` gave for them; None: they are computed again.
    """
    if seen is None:
        queries = get_prerope_query_states(layer, kwargs["hidden_states"][:, -WINDOW_TOKENS:])
    else:  # (1, window, heads x head_dim), perhaps with keys and values behind, or split by heads
        size, heads = layer.head_dim, layer.config.num_attention_heads
        queries = seen.reshape(1, seen.shape[1], -1)[..., : heads * size]
        queries = queries.view(1, -1, heads, size).transpose(1, 2)
    cos, sin = (part[:, -queries.shape[2] :][:, None] for part in kwargs["position_embeddings"])
    rotated, rest = queries[..., : cos.shape[-1]], queries[..., cos.shape[-1] :]
    rotated = rotated * cos + rotate_half(rotated) * sin
    return torch.cat([rotated, rest], dim=-1)[0] if rest.shape[-1] else rotated[0]


def _look(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[_Window, torch.Tensor]:
    """Causal attention of the last tokens before anything is removed, and its mean entropy.

    Args:
        queries: (query heads, window, head_dim).
        keys: (heads, prompt tokens, head_dim).
        values: like keys.
        scale: factor on the scores.
    """
    query_heads, window, size = queries.shape
    heads, tokens = keys.shape[:2]
    grouped = queries.reshape(heads, -1, size) * scale  # query heads of one head lie side by side
    scores = (grouped @ keys.transpose(1, 2)).float()
    newest = scores.view(heads, -1, window, tokens)[..., tokens - window :]
    later = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu(1)
    newest.masked_fill_(later, torch.finfo(torch.float32).min)  # finite: 0 times it is 0
    weights = scores.softmax(-1)
    log_sums = scores.amax(-1) - weights.amax(-1).log()
    entropy = (log_sums - torch.linalg.vecdot(weights, scores)).mean()
    mixed = weights @ values.float()
    content = weights[..., SINK_TOKENS : max(tokens - window, SINK_TOKENS)].sum(-1)
    seen = _Window(
        keys,
        values,
        weights,
        content.reshape(query_heads, window).mean(-1),
        mixed,
        mixed.norm(dim=-1).clamp_min(1e-9),
        keys.float().norm(dim=-1),
        window,
    )
    return seen, entropy


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
    """Place in ``whole`` (heads, n) of each of ``kept`` (heads, m); -1 where it is not there.

    Equal ones, such as values of the same token in the first layer, are matched in order.
    """
    order = whole.argsort(dim=-1, stable=True)
    ordered = whole.gather(1, order)
    arrived = kept.argsort(dim=-1, stable=True)
    sorted_kept = kept.gather(1, arrived)
    first = torch.searchsorted(sorted_kept, sorted_kept)
    rank = torch.arange(kept.shape[1], device=kept.device) - first  # among equal ones
    found = torch.searchsorted(ordered, sorted_kept) + rank
    found = order.gather(1, found.clamp_max(whole.shape[1] - 1))
    found = found.masked_fill(whole.gather(1, found) != sorted_kept, -1)
    return torch.empty_like(found).scatter_(1, arrived, found)


def _places(
    before: _Window, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor | None
) -> tuple[torch.Tensor | None, bool]:
    """Prompt positions of a layer's kept entries, and whether its keys are as they were.

    A press that keeps the entries of the highest scores says itself which those are. Else keys tell
    entries apart, since they carry positions. A press that rotates keys anew still keeps values;
    one that changes those too leaves None.

    Args:
        before: the layer before its press.
        keys: (heads, kept, head_dim) after it.
        values: like keys.
        scores: (1, heads, prompt tokens) of the press; None: it gave none.
    """
    heads, tokens = before.keys.shape[:2]
    if keys.shape[1] == tokens:
        same = torch.arange(tokens, device=keys.device).expand(heads, -1)
        if keys is before.keys or torch.equal(keys, before.keys):
            return same, True
    if scores is not None and scores.shape == (1, heads, tokens):
        places = scores[0].topk(keys.shape[1], dim=-1).indices
        some = places[..., None].expand(-1, -1, _HASH_DIMENSIONS)
        first = before.keys[..., :_HASH_DIMENSIONS].gather(1, some)
        if torch.equal(first, keys[..., :_HASH_DIMENSIONS]):
            return places, True
    places = _match(_digests(before.keys), _digests(keys))
    if bool((places >= 0).all()):
        return places, True
    places = _match(_digests(before.values), _digests(values))
    return (places, False) if bool((places >= 0).all()) else (None, False)


def _measure(before: _Window, places: torch.Tensor, hides: bool) -> _Removed:
    """What is left of a layer's attention on the kept entries.

    Args:
        before: the layer before its press.
        places: (heads, kept) of `_Removed`.
        hides: whether a place may be unknown.
    """
    heads, tokens = before.keys.shape[:2]
    rows, size = before.weights.shape[1], before.values.shape[2]
    index = places.clamp_min(0) if hides else places
    remaining = before.weights.gather(2, index[:, None].expand(-1, rows, -1))
    norms = before.norms.gather(1, index)
    if hides:
        there = places >= 0
        remaining, norms = remaining * there[:, None], norms * there
        index = places.where(there, tokens)
    kept = torch.zeros(heads, tokens + hides, dtype=torch.bool, device=places.device)
    kept = kept.scatter_(1, index, True)[:, :tokens]
    left = remaining.sum(-1)  # (heads, rows)
    inside = (index >= SINK_TOKENS) & (index < tokens - before.window)
    inner = (remaining @ inside[..., None].to(remaining.dtype))[..., 0]
    flat = index.clamp_max(tokens - 1) + tokens * torch.arange(heads, device=index.device)[:, None]
    values = before.values.reshape(-1, size).index_select(0, flat.flatten()).view(heads, -1, size)
    mixed = (remaining @ values.float()) / left.clamp_min(1e-9)[..., None]
    error = (before.mixed - mixed).norm(dim=-1) / before.sizes
    mass, inner, error = (
        each.reshape(-1, before.window) for each in ((1 - left).clamp(0, 1), inner, error)
    )  # (query heads, window)
    lost = before.content - inner.mean(-1)
    return _Removed(
        places=places,
        kept=kept,
        mass=mass.mean(-1),
        content_mass=torch.where(before.content > 0, lost / before.content, torch.nan),
        last_mass=mass[:, -1],
        error=error.mean(-1),
        norm_loss=1 - norms.sum() / before.norms.sum(),
    )
