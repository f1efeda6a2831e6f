"""Pages against tensors kept one row at a time: entries, attention, and what is allocated."""

import numpy as np
import pytest
import torch
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig

from kvguard.pages import PAGE_ENTRIES
from kvguard.prefill import Prefix
from kvguard.slots import Slots

LAYERS, HEADS, GROUPS, SIZE = 2, 2, 3, 4
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS * GROUPS,
    num_key_value_heads=HEADS,
    hidden_size=HEADS * GROUPS * SIZE,
    head_dim=SIZE,
    intermediate_size=8,
    vocab_size=16,
)

Row = list[tuple[torch.Tensor, ...]]
"""Per layer keys, values (heads, length, head_dim) and hidden (heads, length) of one row."""


PREFIX_TOKENS = 21


class Reference:
    """The same operations on one list of tensors a row, a prefix that it shares included."""

    def __init__(self, rows: int, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.rows: list[Row] = []
        self.shares: list[bool] = []
        self.prefix = [self.layer(PREFIX_TOKENS) for _ in range(LAYERS)]
        cache = DynamicCache()
        for number, (keys, values, _) in enumerate(self.prefix):
            cache.update(keys[None], values[None], number)
        prefix = Prefix(tuple(range(PREFIX_TOKENS)), cache, [])
        self.slots = Slots(
            CONFIG, rows, device=torch.device("cpu"), dtype=torch.float32, prefix=prefix
        )

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)

    def layer(self, length: int, *, hides: bool = False) -> tuple[torch.Tensor, ...]:
        hidden = self.draw(HEADS, length) > (0.5 if hides else torch.inf)
        hidden[:, 0] = False
        return self.draw(HEADS, length, SIZE), self.draw(HEADS, length, SIZE), hidden

    def insert(self, row: int, lengths: list[int], *, hides: bool, shares: bool = False) -> None:
        layers = [self.layer(length, hides=hides) for length in lengths]
        cache = DynamicCache()
        for number, (keys, values, _) in enumerate(layers):
            cache.update(keys[None], values[None], number)
        masked = [hidden for _, _, hidden in layers] if hides else None
        self.slots.insert(row, cache, masked, shares=shares)
        if shares:
            pairs = zip(self.prefix, layers, strict=True)
            layers = [
                tuple(torch.cat(both, 1) for both in zip(*pair, strict=True)) for pair in pairs
            ]
        self.rows[row : row + 1] = [layers]
        self.shares[row : row + 1] = [shares]

    def write(self, row: int, layer: int, length: int) -> None:
        self.rows[row][layer] = self.layer(length)
        keys, values, _ = self.rows[row][layer]
        self.slots.write(layer, row, keys, values)

    def cut(self, row: int, entries: int) -> None:
        if entries:
            self.rows[row] = [tuple(x[:, :-entries] for x in layer) for layer in self.rows[row]]

    def drop_tail(self, row: int, entries: int) -> None:
        dropped = max(0, min(entries, int(self.slots.appended[row])))
        self.slots.drop_tail(row, entries)
        self.cut(row, dropped)

    def replace_tail(self, row: int, dropped: int, count: int) -> None:
        dropped = max(0, min(dropped, int(self.slots.appended[row])))
        if self.slots.appended[row] < 0:
            return
        new = self.draw(LAYERS, 2, HEADS, count, SIZE)
        self.slots.replace_tail(row, dropped, new)
        self.cut(row, dropped)
        shown = torch.zeros(HEADS, count, dtype=torch.bool)
        self.rows[row] = [
            tuple(
                torch.cat([old, added], 1) for old, added in zip(layer, (*pair, shown), strict=True)
            )
            for layer, pair in zip(self.rows[row], new, strict=True)
        ]

    def remove(self, row: int) -> None:
        assert self.slots.remove(row) == len(self.rows) - 1
        self.rows[row], self.shares[row] = self.rows[-1], self.shares[-1]
        self.rows.pop()
        self.shares.pop()

    def step(self) -> None:
        """One decoding step; attention equals the softmax over each row's own entries."""
        active = len(self.rows)
        self.slots.begin_step()
        for number in range(LAYERS):
            keys, values = self.draw(active, HEADS, 1, SIZE), self.draw(active, HEADS, 1, SIZE)
            query = self.draw(active, HEADS * GROUPS, 1, SIZE)
            self.slots.update(keys, values, number)
            found = self.slots.attend(number, query, 0.7)
            for row, layers in enumerate(self.rows):
                before = layers[number]
                shown = torch.zeros(HEADS, 1, dtype=torch.bool)
                new = (keys[row], values[row], shown)
                own = tuple(torch.cat(pair, 1) for pair in zip(before, new, strict=True))
                layers[number] = own
                scores = torch.einsum(
                    "hgd,hld->hgl", query[row].view(HEADS, GROUPS, SIZE) * 0.7, own[0]
                ).masked_fill(own[2][:, None], -torch.inf)
                mixed = torch.einsum("hgl,hld->hgd", scores.softmax(-1), own[1])
                expected = mixed.reshape(1, HEADS * GROUPS, SIZE)
                torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)
        self.slots.end_step()

    def check(self) -> None:
        """Entries are the row's own, and bytes are what an independent count of storages says."""
        for row, layers in enumerate(self.rows):
            for number, (keys, values, _) in enumerate(layers):
                found = self.slots.entries(number, row)
                torch.testing.assert_close(found[0][0], keys, atol=0, rtol=0)
                torch.testing.assert_close(found[1][0], values, atol=0, rtol=0)
        kept, masked, padding = self.slots.row_bytes()
        entries = sum(x.numel() for row in self.rows for layer in row for x in layer[:2])
        hidden = sum(int(layer[2].sum()) for row in self.rows for layer in row)
        alike = LAYERS * HEADS * PREFIX_TOKENS * 2 * SIZE * 4
        shared = sum(self.shares)
        assert masked.sum() == hidden * 2 * SIZE * 4
        assert (kept + masked).sum() == entries * 4 - max(0, shared - 1) * alike
        assert (padding >= 0).all()
        if self.rows:
            here = allocated(self.slots) + alike * (shared > 0)
            assert (kept + masked + padding).sum() == here == self.slots.allocated_bytes
            own = [
                sum(x.numel() for layer in row for x in layer[:2]) * 4 - alike * shares
                for row, shares in zip(self.rows, self.shares, strict=True)
            ]
            parts = (kept + masked - own)[self.shares]
            assert shared == 0 or parts.max() - parts.min() <= 1


def allocated(slots: Slots) -> int:
    """Bytes of the tensors that pools refer to, by their storages."""
    storages = {}
    for pool in slots.pools:
        for value in vars(pool).values():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr(), id(tensor)] = storage.nbytes()
    return sum(storages.values())


ACTION = st.tuples(
    st.sampled_from(
        ["insert", "refill", "whole", "step", "step", "write", "drop", "replace", "remove"]
    ),
    st.integers(0, 4),
    st.integers(1, 70),
    st.integers(0, 40),
    st.booleans(),
)


@examples(60)
@given(actions=st.lists(ACTION, max_size=25), seed=st.integers(0, 9))
def test_pages_hold_what_was_put_in(
    actions: list[tuple[str, int, int, int, bool]], seed: int
) -> None:
    """Any sequence of what the engine does to rows, layers of different lengths, hidden entries."""
    them = Reference(5, seed)
    for action, number, length, other, flag in actions:
        active = len(them.rows)
        lengths = [length, length if flag else other + 1]
        if action == "insert" and active < 5:
            them.insert(active, lengths, hides=bool(number % 2))
        elif active == 0:
            continue
        elif action == "refill":
            them.insert(number % active, lengths, hides=flag)
        elif action == "whole":
            them.insert(number % active, [length, length], hides=False, shares=True)
        elif action == "step":
            them.step()
        elif action == "write" and not them.shares[number % active]:
            them.write(number % active, int(flag), length)
        elif action == "drop":
            them.drop_tail(number % active, other)
        elif action == "replace":
            them.replace_tail(number % active, other, length % 7)
        elif action == "remove":
            them.remove(number % active)
        them.check()


def test_nothing_leaks_from_a_row_that_broke() -> None:
    """Not-a-number entries of a row that has left do not reach the row that takes its pages."""
    them = Reference(2, 0)
    them.insert(0, [20, 20], hides=False)
    them.insert(1, [20, 20], hides=False)
    for pool in them.slots.pools:
        for block in (*pool.keys, *pool.values):
            block[them.slots.tables[0][1]] = torch.nan
    them.remove(1)
    them.insert(1, [3, 3], hides=False)
    them.step()
    them.check()


def test_dropping_more_than_stands_last_is_refused() -> None:
    them = Reference(1, 0)
    them.insert(0, [20, 20], hides=False)
    them.step()
    with pytest.raises(ValueError, match=r"0\.\.1, got 2"):
        them.slots.replace_tail(0, 2, torch.zeros(LAYERS, 2, HEADS, 1, SIZE))


def test_a_long_row_makes_no_padding_in_the_others() -> None:
    """12 rows of 100 entries, 7 of which are given 400: never 1.10 times what is kept."""
    them = Reference(12, 0)
    for row in range(12):
        them.insert(row, [100 + row, 100 + row], hides=False)
    ratios = []
    for step in range(80):
        if step in range(10, 24, 2):
            them.insert(step // 2 - 5, [400 + step, 400 + step], hides=False)
        them.step()
        kept, masked, _ = them.slots.row_bytes()
        ratios.append(them.slots.allocated_bytes / (kept + masked).sum())
    assert max(ratios) <= 1.10
    for _ in range(6):
        them.remove(0)
        them.step()
        kept, masked, _ = them.slots.row_bytes()
        assert them.slots.allocated_bytes <= 1.10 * (kept + masked).sum()
    assert them.slots.take_peak() >= them.slots.allocated_bytes
    assert np.mean(ratios) < 1 + PAGE_ENTRIES / 300
