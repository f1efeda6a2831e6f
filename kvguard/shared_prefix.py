"""A prefix that prompts share, held once on the device by all rows that keep it whole.

Rows with the full cache whose prompts begin alike hold the same entries. Here they refer to one
copy of them, the one that admissions start from, and hold what is behind it themselves. A step
reads the copy once for all these rows, and its softmax is joined with that of a row's own entries.
vLLM (arXiv 2309.06180, section 4.4) shares the pages of a prefix between requests; Hydragen (arXiv
2402.05099) and FlashInfer's cascade attention also read it once for all of them.

A press evicts other entries in every row, so what it leaves of a prefix cannot be shared. But it
can be told to leave the prefix whole and to work on what follows it (`presses.PressBehind`): with
n rows behind a prefix of P of their L tokens, a ratio r keeps P / n + (1 - r)(L - P) tokens a row
instead of (1 - r) L, which is less wherever n (1 - r) > 1, and evicts less of what the answer hangs
on.
"""

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
import torch
from kvpress import BasePress
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from kvguard.prefill import Prefix, layer_tensors, prefill_prefix
from kvguard.presses import PressBehind, drops_lowest

LEAST_TOKENS = 16
"""A prefix shorter than a page is not worth a pass of its own and a second part of attention."""


class HeldPrefix:
    """The prefix of a batch's rows.

    Attributes:
        tokens: its length; 0: the rows share nothing.
        rows: (rows,) bool, which rows begin with it and hold only what follows.
    """

    def __init__(self, prefix: Prefix | None, rows: int) -> None:
        self.tokens = 0 if prefix is None else len(prefix.token_ids)
        self.rows: NDArray[np.bool_] = np.zeros(rows, dtype=bool)
        pairs = [] if prefix is None else layer_tensors(prefix.cache)
        self._layers = [(keys[0], values[0]) for keys, values in pairs]

    @property
    def nbytes(self) -> int:
        """Bytes of its entries while a row refers to them, else 0."""
        return self.whole_bytes if self.rows.any() else 0

    @property
    def whole_bytes(self) -> int:
        """Bytes of its entries."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._layers)

    def row_bytes(self, active: int) -> NDArray[np.int64]:
        """(active,) equal parts of `nbytes` for the rows that refer to it, 0 for the others."""
        own = self.rows[:active]
        sharing = max(1, int(own.sum()))
        parts = np.where(own, self.nbytes // sharing, 0).astype(np.int64)
        parts[np.flatnonzero(own)[: self.nbytes % sharing]] += 1
        return parts

    def entries(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, (heads, tokens, head_dim); not to be written to."""
        return self._layers[layer]

    def attend(
        self, layer: int, query: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of queries of any rows over the prefix alone.

        Args:
            layer: number.
            query: (heads, queries, head_dim).
            scale: factor on the scores.

        Returns:
            (heads, queries, head_dim) and (heads, queries, 1), the logarithm of the softmax's
            denominator; float32.
        """
        keys, values = self._layers[layer]
        scores = torch.matmul(query * scale, keys.transpose(1, 2)).float()
        peak = scores.amax(dim=2, keepdim=True)
        weights = scores.sub_(peak).exp_()
        total = weights.sum(dim=2, keepdim=True)
        mixed = torch.matmul(weights.to(values.dtype), values).float() / total
        return mixed, peak + total.log()

    def join(
        self,
        layer: int,
        query: torch.Tensor,
        mixed: torch.Tensor,
        log_sum: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attention over the prefix and, of each row, what it holds itself.

        Args:
            layer: number.
            query: (rows, heads, groups, head_dim) of rows that begin with the prefix.
            mixed: like ``query``, their attention over their own entries.
            log_sum: (rows, heads, groups, 1) the logarithm of its denominator, float32.
            scale: factor on the scores.

        Returns:
            like ``mixed``.
        """
        rows, heads, groups, size = query.shape
        by_head = query.transpose(0, 1).reshape(heads, rows * groups, size)
        common, common_sum = (
            each.view(heads, rows, groups, -1).transpose(0, 1)
            for each in self.attend(layer, by_head, scale)
        )
        joined = torch.lerp(common, mixed.float(), torch.sigmoid(log_sum - common_sum))
        return joined.to(mixed.dtype)


def compress_behind(press: BasePress | None, tokens: int) -> BasePress | None:
    """A press that leaves the first tokens whole, where it can be told to; else the press."""
    return PressBehind(press, tokens) if drops_lowest(press) else press


def behind(cache: DynamicCache, tokens: int) -> DynamicCache:
    """A cache of what stands behind its first tokens in every layer; shares the entries."""
    if tokens == 0:
        return cache
    rest = DynamicCache()
    for layer, (keys, values) in enumerate(layer_tensors(cache)):
        rest.update(keys[:, :, tokens:], values[:, :, tokens:], layer)
    return rest


def shared_prefix_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share, leaving each at least one token of its own.

    Args:
        prompts: token ids of each prompt; fewer than two share nothing.
    """
    if len(prompts) < 2:
        return 0
    ordered = sorted(map(list, prompts))  # what the extremes share, all share
    pairs = zip(ordered[0], ordered[-1], strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return max(0, min(common, min(map(len, prompts)) - 1))


def common_prefix(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], least: int = LEAST_TOKENS
) -> Prefix | None:
    """What all prompts begin with, prefilled.

    Args:
        model: in eval mode.
        prompts: token ids of each.
        least: None where they share fewer tokens.
    """
    shared = shared_prefix_tokens(prompts)
    if shared < least or model.config._attn_implementation == "eager":
        return None
    return prefill_prefix(model, prompts[0][:shared])
