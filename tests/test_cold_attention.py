"""Attention over parked parts beside plain attention in float64, a query and a head at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvguard import cold_attention
from kvguard.cold_attention import HostAttention
from kvguard.cold_cache import Part

LAYERS, HEADS, GROUPS, SIZE = 2, 2, 3, 4
SCALE = 0.7


def filled(draw: torch.Generator, tokens: int, dtype: torch.dtype) -> Part:
    """A part with room behind its entries; what is in it must never be read."""
    entries = torch.randn(LAYERS, 2, tokens + 3, HEADS, SIZE, generator=draw).to(dtype)
    entries[:, :, tokens:] = torch.nan
    return Part(entries, tokens)


def plain(query: torch.Tensor, parts: list[Part], new: torch.Tensor, layer: int) -> torch.Tensor:
    """(n, query heads, head_dim) of one row, float64."""
    count = query.shape[1]
    found = torch.empty(count, HEADS * GROUPS, SIZE, dtype=torch.float64)
    for head in range(HEADS * GROUPS):
        keys, values = (
            torch.cat(
                [
                    *(part.entries[layer, kind, : part.tokens, head // GROUPS] for part in parts),
                    new[kind, head // GROUPS],
                ]
            ).double()
            for kind in range(2)
        )
        for token in range(count):
            seen = len(keys) - count + token + 1
            scores = keys[:seen] @ query[head, token].double() * SCALE
            found[token, head] = scores.softmax(0) @ values[:seen]
    return found


@st.composite
def passes(draw: st.DrawFn) -> tuple[list[list[int]], list[int], int]:
    """Tokens of each row's parts, of its draft, and of a part that all begin with (0: none)."""
    rows = draw(st.integers(1, 4))
    parts = [draw(st.lists(st.integers(1, 60), max_size=2)) for _ in range(rows)]
    return parts, [draw(st.integers(1, 9)) for _ in range(rows)], draw(st.integers(0, 60))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(case=passes(), threads=st.integers(1, 5), short=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_attention_is_that_of_every_row_alone(
    case: tuple[list[list[int]], list[int], int], threads: int, short: int, dtype: torch.dtype
) -> None:
    lengths, counts, common = case
    draw = torch.Generator().manual_seed(sum(counts) + common)
    shared = [filled(draw, common, dtype)] if common else []
    parts = [[*shared, *(filled(draw, tokens, dtype) for tokens in own)] for own in lengths]
    query = 3 * torch.randn(HEADS * GROUPS, sum(counts), SIZE, generator=draw)
    new = torch.randn(2, HEADS, sum(counts), SIZE, generator=draw)
    query, new = query.to(dtype), new.to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        patch.setattr(cold_attention, "SHORT_TOKENS", short)
        patch.setattr(cold_attention, "CHUNK_TOKENS", 7)
        attention = HostAttention(parts, counts, heads=HEADS, groups=GROUPS, dtype=dtype)
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (5e-2, 5e-2)
    for layer in range(LAYERS):
        found = attention.attend(layer, query, new, SCALE)
        start = 0
        for own, count in zip(parts, counts, strict=True):
            row = slice(start, start + count)
            start += count
            expected = plain(query[:, row], own, new[:, :, row], layer)
            torch.testing.assert_close(found[row].double(), expected, rtol=rtol, atol=atol)
