"""The replay among the probes: a prompt's last tokens, run again over the compressed cache.

Their own entries are left out, and what the model then says of them is compared with the prefill's
own logits. In a pass of its own a replay costs as much device memory over time as any pass: what
the whole batch holds waits for a few tokens. Where the reader can wait for one token, as
`guard_price` can, they ride in the next decoding step instead: to the model each is one more row of
one token, which sees its request's prompt entries and the replayed tokens before it.
"""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from kvguard.schema import PROBE_NAMES, REPLAY_TOKENS

if TYPE_CHECKING:
    from kvguard.engine import Session

ATTENTION_NAME = "kvguard_replay"

ReplayAt = Literal["prefill", "step", "none"]
"""When the prompt's last tokens are replayed: in a pass of their own at prefill, as riders of the
next decoding step, or not at all."""


class Replay(NamedTuple):
    """A prompt's last tokens, to be run again over the cache as its press left it.

    Attributes:
        token_ids: the prompt's last tokens, which run again.
        start: position of the first.
        usable: per layer (heads, kept) bool of the cache's entries that they may see.
        hidden: (tokens or more, hidden size) the prefill's own last states before ``lm_head``; None
            where they were not kept.
    """

    token_ids: list[int]
    start: int
    usable: list[torch.Tensor]
    hidden: torch.Tensor | None

    def run(self, model: PreTrainedModel, cache: DynamicCache) -> torch.Tensor:
        """A pass of its own: (tokens, vocabulary) log-probabilities."""
        device = model.device
        positions = torch.arange(self.start, self.start + len(self.token_ids), device=device)
        before = model.config._attn_implementation
        model.config._attn_implementation = ATTENTION_NAME
        try:
            logits = model(
                input_ids=torch.tensor([self.token_ids], device=device),
                position_ids=positions[None],
                cache_position=positions,
                use_cache=False,
                kvguard_replay=(cache, self.usable),
            ).logits[0]
        finally:
            model.config._attn_implementation = before
        return torch.as_tensor(logits).float().log_softmax(-1)

    def complete(
        self, model: PreTrainedModel, probes: NDArray[np.float32], hidden: torch.Tensor
    ) -> NDArray[np.float32]:
        """The request's probes with those of the replay among them.

        Args:
            model: whose ``lm_head`` makes logits of hidden states.
            probes: of `CacheProbe.finish`.
            hidden: (tokens, hidden size) what the replay came to.
        """
        assert self.hidden is not None
        own, other = (
            model.lm_head(states).float().log_softmax(-1)
            for states in (self.hidden[-len(hidden) :], hidden)
        )
        found, numbers = probes.copy(), compare(own, other)
        places = [PROBE_NAMES.index(name) for name in numbers]
        found[places] = torch.stack(list(numbers.values())).cpu().numpy()
        return found


def compare(own: torch.Tensor, other: torch.Tensor) -> dict[str, torch.Tensor]:
    """A replay's log-probabilities (tokens, vocabulary) beside the prefill's own."""
    divergence = (own.exp() * (own - other)).sum(-1)
    agree = (own.argmax(-1) == other.argmax(-1)).float()
    return {
        "replay_kl_last": divergence[-1],
        "replay_kl_mean": divergence.mean(),
        "replay_kl_max": divergence.max(),
        "replay_agreement": agree.mean(),
        "replay_entropy_shift": entropy(other[-1]) - entropy(own[-1]),
    }


def entropy(scores: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of log-probabilities (vocabulary,)."""
    return -(scores.exp() * scores).sum()


def replay_length(prompt_tokens: int) -> int:
    """How many tokens of a prompt a replay runs."""
    return min(REPLAY_TOKENS, prompt_tokens - 1)


def replay_ran(probes: NDArray[np.floating]) -> bool:
    """Whether the probes of a request, in the order of `PROBE_NAMES`, took a replay."""
    return bool(np.isfinite(probes[PROBE_NAMES.index("replay_kl_last")]))


def replay_for(reader: object, *, waits: bool) -> ReplayAt:
    """Where the replay of who reads the probes is run.

    Args:
        reader: names its features; a predictor, a harm model.
        waits: it can do without the replay until the first decoding step is over.
    """
    names = getattr(reader, "feature_names", ())
    if not any(name.startswith("replay_") for name in names):
        return "none"
    return "step" if waits else "prefill"


def step_with_riders(
    session: "Session",
    tokens: torch.Tensor,
    positions: torch.Tensor,
    riders: dict[int, Replay],
    shared: dict[str, Any],
) -> dict[int, int]:
    """A decoding step in which prompts' last tokens are replayed beside the rows' own.

    The requests' probes are complete afterwards, and the tokens counted.

    Args:
        session: gets the logits of its rows.
        tokens: (rows,) that its rows are fed.
        positions: (rows,) theirs.
        riders: by row.
        shared: further arguments of the model.

    Returns:
        By row, the device bytes that its replay took: a copy of its entries of one layer.
    """
    model, slots, active = session.model, session.slots, session.active
    ids = [torch.tensor(replay.token_ids) for replay in riders.values()]
    at = [torch.arange(len(r.token_ids)) + r.start for r in riders.values()]
    slots.riders = riders
    output = model.model(
        input_ids=torch.cat([tokens, *(each.to(tokens) for each in ids)])[:, None],
        position_ids=torch.cat([positions, *(each.to(positions) for each in at)])[:, None],
        cache_position=positions[:1],
        **shared,
    )
    slots.riders = {}
    hidden = output.last_hidden_state[:, -1]
    session.logits[:active] = model.lm_head(hidden[:active])
    found = hidden[active:].split([len(own) for own in ids])
    taken = {}
    for (number, replay), states in zip(riders.items(), found, strict=True):
        row = session.rows[number]
        row.replay = None
        assert row.completion.probes is not None
        row.completion.probes = replay.complete(model, row.completion.probes, states)
        row.completion.tokens_prefilled += len(replay.token_ids)
        longest = max(each.shape[1] for each in replay.usable)
        taken[number] = longest * slots.bytes_per_entry
    return taken


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
    size = query.shape[-1]
    scale = 1.0 if scaling is None else scaling
    held = (entry.keys[0], entry.values[0])
    mixed = attend_replay(query[0], key[0], value[0], held, visible, scale)
    return mixed.reshape(1, -1, query.shape[2], size).transpose(1, 2), None


def attend_replay(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    held: tuple[torch.Tensor, torch.Tensor],
    visible: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Causal attention of replayed tokens over a compressed cache and each other.

    Args:
        query: (query heads, replayed, head_dim).
        key: (heads, replayed, head_dim), the replayed tokens' own.
        value: like key.
        held: keys and values of the cache, (heads, kept, head_dim).
        visible: (heads, kept) bool of the entries that the replayed tokens may see.
        scale: factor on the scores.

    Returns:
        (query heads, replayed, head_dim).
    """
    heads, count, size = key.shape
    grouped = query.reshape(heads, -1, size)  # (heads, query heads per head x replayed, head_dim)
    grouped = grouped * scale
    old = grouped @ held[0].transpose(1, 2)
    old.masked_fill_(~visible[:, None], -torch.inf)
    new = (grouped @ key.transpose(1, 2)).view(heads, -1, count, count)
    new.masked_fill_(torch.ones_like(new[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    scores = torch.cat([old, new.view(heads, -1, count)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    kept = old.shape[2]
    mixed = weights[..., :kept] @ held[1] + weights[..., kept:] @ value
    return mixed.reshape(query.shape)


AttentionInterface.register(ATTENTION_NAME, replay_attention)
