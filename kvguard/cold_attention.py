"""Attention of drafted tokens over parked entries: one row in one piece, or rows where they lie."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from kvguard.cold_cache import Part

SHORT_TOKENS = 128
"""Shorter parts are copied in front of the drafted tokens; a call of their own costs more."""

CHUNK_TOKENS = 256
"""A part is cut for several threads into chunks of so many tokens at least."""

BLOCK_QUERIES = 32
"""Queries that the kernel gives one thread at a time."""

Partial = tuple[torch.Tensor, torch.Tensor]
"""Attention over some entries alone, (pieces, heads, queries, head_dim), and the logarithm of the
sum of its weights, (pieces, heads, queries)."""

flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _beyond(count: int, device: torch.device) -> torch.Tensor:
    """(count, count) bool: which of its own draft's tokens a query must not see."""
    return torch.ones(count, count, dtype=torch.bool, device=device).triu(1)


def attend_whole(query: torch.Tensor, whole: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of one row's last tokens over all its entries, in one call.

    Args:
        query: (query heads, n, head_dim).
        whole: (2, heads, tokens, head_dim), the last n of them the queries' own.
        scale: factor on the scores.

    Returns:
        (query heads, n, head_dim).
    """
    count = query.shape[1]
    grouped = query.reshape(whole.shape[1], -1, query.shape[2])
    mask = torch.zeros(grouped.shape[1], whole.shape[2], dtype=query.dtype, device=query.device)
    beyond = _beyond(count, query.device).repeat(len(mask) // count, 1)
    mask[:, -count:].masked_fill_(beyond, -torch.inf)
    mixed = torch.nn.functional.scaled_dot_product_attention(
        grouped[None], whole[0][None], whole[1][None], attn_mask=mask, scale=scale
    )
    return mixed[0].reshape(query.shape)


class _Cut(NamedTuple):
    """A part in equal chunks, where it lies.

    Attributes:
        chunks: how many.
        tensors: of every layer the keys, then the values; (chunks, heads, tokens, head_dim) views.
        rest: of every layer the entries that are left over, (2, tokens, heads, head_dim) views.
    """

    chunks: int
    tensors: Sequence[torch.Tensor]
    rest: Sequence[torch.Tensor]


def _cut(part: "Part", chunks: int) -> _Cut:
    size = part.tokens // chunks
    layers, _, _, heads, head_dim = part.entries.shape
    whole = part.entries[:, :, : chunks * size].view(layers, 2, chunks, size, heads, head_dim)
    rest = part.entries[:, :, chunks * size : part.tokens]
    tensors = whole.transpose(3, 4).flatten(0, 1).unbind()
    return _Cut(chunks, tensors, rest.unbind() if rest.shape[2] else ())


class HostAttention:
    """Causal attention of several rows' last tokens over their parts, in host memory.

    Long parts are read where they lie, each by one call of the processor's flash kernel; what all
    rows begin with by one call for all of them. That kernel gives a thread one head and up to
    `BLOCK_QUERIES` queries, so a part is cut into as many chunks as keep the threads equally busy.
    Short parts, what is left over of the cuts, and the drafted tokens are copied into one. The
    softmaxes are joined as flash attention (arXiv 2205.14135) joins its blocks. Scores are never
    stored; the query heads that share a key head are on the query axis, so that grouped keys and
    values are never repeated.

    Args:
        parts: of each row, in the order of the tokens.
        counts: drafted tokens of each row.
        heads: of keys and values.
        groups: query heads for each of them.
        dtype: of the entries.
    """

    def __init__(
        self,
        parts: Sequence[Sequence["Part"]],
        counts: Sequence[int],
        *,
        heads: int,
        groups: int,
        dtype: torch.dtype,
    ) -> None:
        self.counts, self.heads, self.groups = list(counts), heads, groups
        self.queries = [groups * count for count in counts]
        long = [[part for part in own if part.tokens >= SHORT_TOKENS] for own in parts]
        self._shared = _same_beginning(long)
        self._tails: list[list[Sequence[torch.Tensor]]] = [
            [part.entries[:, :, : part.tokens].unbind() for part in own if part not in listed]
            for own, listed in zip(parts, long, strict=True)
        ]
        most = max(len(listed) for listed in long)
        self._long = [
            self._cut_all([own[place] if place < len(own) else None for own in long], place)
            for place in range(most)
        ]
        masks: dict[tuple[int, int], torch.Tensor | None] = {}
        self._masks = []
        for count, tail in zip(self.counts, self._tails, strict=True):
            before = sum(each[0].shape[1] for each in tail)
            if (count, before) not in masks:
                masks[count, before] = self._mask(count, before, dtype)
            self._masks.append(masks[count, before])

    def _mask(self, count: int, before: int, dtype: torch.dtype) -> torch.Tensor | None:
        """(queries, tail) of a row; None: every query sees all."""
        if count == 1:
            return None
        mask = torch.zeros(count, before + count, dtype=dtype)
        mask[:, before:].masked_fill_(_beyond(count, mask.device), -torch.inf)
        return mask.repeat_interleave(self.groups, dim=0)

    def _cut_all(self, listed: Sequence["Part | None"], place: int) -> list[_Cut | None]:
        """The rows' parts at one place, in as many chunks each; what is left over goes to tails."""
        once = place == 0 and self._shared
        queries = sum(self.queries) if once else min(self.queries)
        shortest = min(part.tokens for part in listed if part is not None)
        chunks = _chunks(self.heads, queries, shortest)
        found = [None if part is None else _cut(part, chunks) for part in listed]
        for cut, tail in zip(found, self._tails, strict=True):
            if cut is not None and cut.rest:
                tail.append(cut.rest)
        return found

    def attend(
        self, layer: int, query: torch.Tensor, new: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention in one layer.

        Args:
            layer: number.
            query: (query heads, tokens, head_dim), one row behind the other.
            new: (2, heads, tokens, head_dim), the same tokens' keys and values.
            scale: factor on the scores.

        Returns:
            (tokens, query heads, head_dim).
        """
        tokens, size = query.shape[1:]
        asked = (
            query.view(self.heads, self.groups, tokens, size).transpose(1, 2).flatten(1, 2)[None]
        )
        by_row = torch.split(asked, self.queries, dim=2)  # (1, heads, n x groups, head_dim) each
        found = []
        for place, cuts in enumerate(self._long):
            if place == 0 and self._shared:
                assert cuts[0] is not None
                found.append(_over(asked, cuts[0], layer, scale))
            else:
                chunks = max(cut.chunks for cut in cuts if cut is not None)
                found.append(
                    _behind(
                        [
                            _nothing(queries, chunks)
                            if cut is None
                            else _over(queries, cut, layer, scale)
                            for queries, cut in zip(by_row, cuts, strict=True)
                        ]
                    )
                )
        tails = []
        split = torch.split(new.transpose(1, 2), self.counts, dim=1)
        for queries, own, tail, mask in zip(by_row, split, self._tails, self._masks, strict=True):
            whole = torch.cat([*(each[layer] for each in tail), own], dim=1) if tail else own
            keys, values = whole.transpose(1, 2)[:, None].unbind()
            tails.append(flash_attention(queries, keys, values, attn_mask=mask, scale=scale))
        found.append(_behind(tails))
        mixed = _join(found).to(query.dtype).view(self.heads, tokens, self.groups, size)
        return mixed.transpose(0, 1).flatten(1, 2)


def _same_beginning(rows: Sequence[Sequence["Part"]]) -> bool:
    """Whether several rows all have the same first part."""
    first = rows[0][0] if rows[0] else None
    return len(rows) > 1 and all(bool(row) and row[0] is first for row in rows)


def _chunks(heads: int, queries: int, tokens: int) -> int:
    """Into how many chunks a part is cut so that the threads get equally many heads of them.

    Blocks of queries are not counted on, the last one is shorter; many of them even out.
    """
    threads = torch.get_num_threads()
    if heads * -(-queries // BLOCK_QUERIES) >= 4 * threads:
        return 1
    return max(1, min(threads // math.gcd(threads, heads), tokens // CHUNK_TOKENS))


def _over(query: torch.Tensor, cut: _Cut, layer: int, scale: float) -> Partial:
    """Attention over each chunk."""
    keys, values = cut.tensors[2 * layer], cut.tensors[2 * layer + 1]
    mixed, total = flash_attention(query.expand(cut.chunks, -1, -1, -1), keys, values, scale=scale)
    return mixed, total


def _nothing(query: torch.Tensor, chunks: int) -> Partial:
    """Of a row that has no such part."""
    shape = (chunks, *query.shape[1:])
    exact = torch.promote_types(query.dtype, torch.float32)
    return query.new_zeros(shape), query.new_full(shape[:3], -torch.inf, dtype=exact)


def _behind(rows: Sequence[Partial]) -> Partial:
    """Rows' queries one behind the other."""
    if len(rows) == 1:
        return rows[0]
    mixed, totals = zip(*rows, strict=True)
    return torch.cat(mixed, dim=2), torch.cat(totals, dim=2)


def _join(found: Sequence[Partial]) -> torch.Tensor:
    """(heads, queries, head_dim) attention over all pieces together."""
    if len(found) == 1 and len(found[0][0]) == 1:
        return found[0][0][0]
    mixed, totals = (torch.cat(each) for each in zip(*found, strict=True))
    return (mixed * totals.softmax(dim=0)[..., None]).sum(dim=0)
