"""The key-value caches of the rows that decode together.

Each row owns one right-padded slot per layer and writes its next entry behind its last one. Rotary
positions are part of the keys, so the place of an entry does not matter. Rewinding a row lowers a
length, refilling a slot overwrites it, and a step writes one entry a row. Buffers grow by blocks,
which copies them once in 64 steps, and shrink when the longest row leaves; they are rectangular, so
one long row makes padding in the others, which is counted. Layers may hold different lengths
(PyramidKV, SimLayerKV), heads may hide entries (AdaKV).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface, DynamicCache
from transformers.configuration_utils import PretrainedConfig

BLOCK_ENTRIES = 64
"""Buffers grow by this many entries a row."""

ATTENTION_NAME = "kvguard_slots"


class SlotBytes(NamedTuple):
    """Bytes that one row's slot takes: in use, hidden by a head-wise press, and empty."""

    kept: int
    masked: int
    padding: int

    @property
    def allocated(self) -> int:
        return self.kept + self.masked + self.padding


class Slots:
    """Caches of up to ``rows`` rows; stands in for ``past_key_values`` during decoding.

    Rows 0 .. ``active - 1`` are in use.

    Attributes:
        lengths: (layers, rows) int64, entries of each row in each layer.
        appended: (rows,) int64, newest entries that stand last in every layer: those written one by
            one since the row was filled or compressed.
    """

    is_compileable = False

    def __init__(
        self, config: PretrainedConfig, rows: int, *, device: torch.device, dtype: torch.dtype
    ):
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.layers = config.num_hidden_layers
        self.groups = config.num_attention_heads // heads
        self.rows, self.heads, self.head_dim = rows, int(heads), int(size)
        self.device, self.dtype = device, dtype
        self.active = 0
        self.lengths: NDArray[np.int64] = np.zeros((self.layers, rows), dtype=np.int64)
        self.appended: NDArray[np.int64] = np.zeros(rows, dtype=np.int64)
        empty = (rows, heads, 0, size)
        self.keys = [torch.zeros(empty, device=device, dtype=dtype) for _ in range(self.layers)]
        self.values = [torch.zeros(empty, device=device, dtype=dtype) for _ in range(self.layers)]
        # (rows, heads, capacity) bool, True = hidden; None while no row of the layer hides any.
        self.hidden: list[torch.Tensor | None] = [None] * self.layers
        self.hidden_entries: NDArray[np.int64] = np.zeros((self.layers, rows), dtype=np.int64)
        self._plans: dict[bytes, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of one key and one value of one layer, all heads."""
        return 2 * self.heads * self.head_dim * self.dtype.itemsize

    def capacity(self, layer: int) -> int:
        """Entries a row of this layer can hold before its buffer grows."""
        return self.keys[layer].shape[2]

    def insert(
        self, row: int, cache: DynamicCache, masked: Sequence[torch.Tensor | None] | None = None
    ) -> None:
        """Put one sequence's cache into a slot; the slot's old content is lost.

        Args:
            row: slot number; the first unused slot becomes active.
            cache: batch of 1, (1, heads, length, head_dim) per layer.
            masked: per layer (heads, length) bool, True where the press hides an entry.
        """
        for layer in range(self.layers):  # whatever runs out of memory does so before any change
            keys = cache.layers[layer].keys
            assert keys is not None
            self._reserve(layer, keys.shape[2] + 1)
        self.active = max(self.active, row + 1)
        for layer in range(self.layers):
            keys, values = cache.layers[layer].keys, cache.layers[layer].values
            assert keys is not None
            assert values is not None
            self.write(layer, row, keys[0], values[0], None if masked is None else masked[layer])
        self.appended[row] = 0

    def write(
        self,
        layer: int,
        row: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        masked: torch.Tensor | None = None,
    ) -> None:
        """Replace a row's entries of one layer: keys and values (heads, length, head_dim)."""
        length = keys.shape[1]
        self._reserve(layer, length + 1)
        self.keys[layer][row, :, :length] = keys
        self.values[layer][row, :, :length] = values
        self.lengths[layer, row] = length
        self.appended[row] = -1  # the entry of the step that is under way is among those written
        hidden = self.hidden[layer]
        self.hidden_entries[layer, row] = 0
        if masked is not None and bool(masked.any()):
            if hidden is None:
                shape = (self.rows, self.heads, self.capacity(layer))
                hidden = self.hidden[layer] = torch.zeros(
                    shape, dtype=torch.bool, device=self.device
                )
            hidden[row] = False
            hidden[row, :, :length] = masked
            self.hidden_entries[layer, row] = int(masked.sum())
        elif hidden is not None:
            hidden[row] = False

    def drop_tail(self, row: int, entries: int) -> None:
        """Forget a row's newest entries, as many of ``entries`` as stand last in every layer."""
        dropped = min(entries, int(self.appended[row]))
        self.lengths[:, row] -= dropped
        self.appended[row] -= dropped

    def install(
        self, row: int, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Replace a row's entries of one layer from ``start`` on; what stood behind is lost.

        Entries before ``start`` stay as they are, hidden ones too; none of the new ones is hidden.
        The layers of a row may have different lengths: ``start`` is this layer's own. Whoever
        installs entries in every layer tells how many are newest with `set_appended`.

        Args:
            row: which.
            layer: layer number.
            start: entries that stay, at most the row's length in this layer.
            keys: (heads, entries, head_dim), on any device; 0 entries truncate.
            values: like keys.

        Raises:
            ValueError: ``start`` lies behind the row's last entry.
        """
        length = int(self.lengths[layer, row])
        if not 0 <= start <= length:
            raise ValueError(f"start lies in 0..{length}, the row's entries, got {start}")
        end = start + keys.shape[1]
        self._reserve(layer, end + 1)
        self.keys[layer][row, :, start:end] = keys
        self.values[layer][row, :, start:end] = values
        hidden = self.hidden[layer]
        if hidden is not None:
            hidden[row, :, start:] = False
            self.hidden_entries[layer, row] = int(hidden[row, :, :start].sum())
        self.lengths[layer, row] = end

    def truncate(self, row: int, layer: int, length: int) -> None:
        """Keep a row's first ``length`` entries of one layer; see `install`."""
        nothing = self.keys[layer][row, :, :0]
        self.install(row, layer, length, nothing, nothing)

    def set_appended(self, row: int, entries: int) -> None:
        """Say how many of a row's newest entries stand last in every layer, one a token."""
        self.appended[row] = entries

    def end_step(self) -> None:
        """Every active row has one entry more."""
        self.appended[: self.active] += 1

    def remove(self, row: int) -> int:
        """Free a row: the last active row moves into its slot.

        Returns:
            The number that the moved row had before, ``active - 1``.
        """
        last = self.active - 1
        if row != last:
            for layer in range(self.layers):
                length = int(self.lengths[layer, last])
                self.keys[layer][row, :, :length] = self.keys[layer][last, :, :length]
                self.values[layer][row, :, :length] = self.values[layer][last, :, :length]
                hidden = self.hidden[layer]
                if hidden is not None:
                    hidden[row] = hidden[last]
            self.lengths[:, row] = self.lengths[:, last]
            self.hidden_entries[:, row] = self.hidden_entries[:, last]
            self.appended[row] = self.appended[last]
        self.lengths[:, last] = 0
        self.hidden_entries[:, last] = 0
        for hidden in self.hidden:
            if hidden is not None:
                hidden[last] = False
        self.active = last
        self._shrink()
        return last

    def _shrink(self) -> None:
        """Give back what only a row that has left needed, when it is several blocks."""
        for layer in range(self.layers):
            longest = int(self.lengths[layer, : self.active].max(initial=0)) + 1
            wanted = -(-longest // BLOCK_ENTRIES) * BLOCK_ENTRIES
            if self.capacity(layer) < wanted + 4 * BLOCK_ENTRIES:
                continue
            for buffers in (self.keys, self.values):
                buffers[layer] = buffers[layer][:, :, :wanted].clone()
            hidden = self.hidden[layer]
            if hidden is not None:
                self.hidden[layer] = hidden[:, :, :wanted].clone()

    def entries(self, layer: int, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A row's keys and values, (1, heads, length, head_dim) views without padding."""
        length = int(self.lengths[layer, row])
        return self.keys[layer][row : row + 1, :, :length], self.values[layer][
            row : row + 1, :, :length
        ]

    def row_bytes(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Kept, masked and padding bytes of each active row, three (active,) arrays."""
        per_head = self.bytes_per_entry // self.heads
        lengths = self.lengths[:, : self.active].sum(axis=0)
        masked = self.hidden_entries[:, : self.active].sum(axis=0) * per_head
        capacity = sum(self.capacity(layer) for layer in range(self.layers))
        used = lengths * self.bytes_per_entry
        return used - masked, masked, capacity * self.bytes_per_entry - used

    def _reserve(self, layer: int, entries: int) -> None:
        """Grow a layer's buffer to hold ``entries`` entries a row."""
        capacity = self.capacity(layer)
        if entries <= capacity:
            return
        grown = -(-entries // BLOCK_ENTRIES) * BLOCK_ENTRIES
        shape = (self.rows, self.heads, grown, self.head_dim)
        wider = [torch.empty(shape, device=self.device, dtype=self.dtype) for _ in range(2)]
        hidden = self.hidden[layer]
        if hidden is not None:
            hidden = torch.nn.functional.pad(hidden, (0, grown - capacity))
        for buffers, buffer in zip((self.keys, self.values), wider, strict=True):
            # Padding has no weight in the attention, but 0 times NaN would still be NaN.
            buffer[:, :, capacity:] = 0
            buffer[self.active :, :, :capacity] = 0
            buffer[: self.active, :, :capacity] = buffers[layer][: self.active]
            buffers[layer] = buffer
        self.hidden[layer] = hidden

    # --- one decoding step: the model calls `update` per layer, the attention asks for `mask` ---

    def begin_step(self) -> None:
        """Prepare for one token per active row."""
        self._plans = {}
        for layer in range(self.layers):
            self._reserve(layer, int(self.lengths[layer, : self.active].max()) + 1)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, _: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one new entry per active row; return the layer's entries up to the longest row.

        Args:
            keys: (active, heads, 1, head_dim), rotary positions applied.
            values: like keys.
            layer: layer number.

        Returns:
            Views (active, heads, longest, head_dim); entries behind a row's own are padding.
        """
        rows, places, _mask = self._plan(layer)
        active = self.active
        longest = int(self.lengths[layer, :active].max()) + 1
        self.keys[layer][rows, :, places] = keys[:, :, 0]
        self.values[layer][rows, :, places] = values[:, :, 0]
        self.lengths[layer, :active] += 1
        return self.keys[layer][:active, :, :longest], self.values[layer][:active, :, :longest]

    def _plan(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Row numbers, places to write, and the additive mask; layers of equal lengths share it."""
        lengths = self.lengths[layer, : self.active]
        plan = self._plans.get(key := lengths.tobytes())
        if plan is None:
            places = torch.from_numpy(lengths.copy()).to(self.device)
            longest = int(lengths.max()) + 1
            mask = None
            if (lengths != lengths[0]).any():
                beyond = torch.arange(longest, device=self.device) > places[:, None]
                mask = torch.zeros(beyond.shape, dtype=self.dtype, device=self.device)
                mask = mask.masked_fill_(beyond, -torch.inf)[
                    :, None, None
                ]  # (active, 1, 1, longest)
            rows = torch.arange(self.active, device=self.device)
            plan = self._plans[key] = (rows, places, mask)
        return plan

    def mask(self, layer: int) -> torch.Tensor | None:
        """Additive mask (active, 1 or heads, 1, longest) after `update`; None: nothing to hide."""
        before = self.lengths[layer, : self.active] - 1
        mask = self._plans[before.tobytes()][2]
        hidden = self.hidden[layer]
        if hidden is None or not self.hidden_entries[layer, : self.active].any():
            return mask
        longest = int(before.max()) + 1
        extra = torch.zeros((), dtype=self.dtype, device=self.device).masked_fill(
            hidden[: self.active, :, None, :longest], -torch.inf
        )
        return extra if mask is None else extra + mask

    def get_seq_length(self, layer: int = 0) -> int:
        """Longest row; part of the interface that models expect of a cache."""
        return int(self.lengths[layer, : self.active].max(initial=0))


def slot_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one query per row over its slot.

    The query heads that share a key head become the query axis, so grouped keys and values are
    read once and never repeated.

    Args:
        module: the attention layer; names its number.
        query: (rows, query heads, 1, head_dim).
        key: (rows, heads, longest, head_dim), a view of the slots.
        value: like key.
        attention_mask: unused; the slots know their own padding.
        dropout: unused; decoding has none.
        scaling: factor on the scores.
        kwargs: ``kvguard_slots`` is the `Slots`.

    Returns:
        (rows, 1, query heads, head_dim), None.
    """
    slots: Slots = kwargs["kvguard_slots"]
    rows, heads, _, size = key.shape
    scale = size**-0.5 if scaling is None else scaling
    mask = slots.mask(module.layer_idx)
    grouped = query.reshape(rows, heads, slots.groups, size)
    if query.device.type == "cpu":
        scores = torch.matmul(grouped * scale, key.transpose(2, 3))
        if mask is not None:
            scores += mask
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
        mixed = torch.matmul(weights, value)
    else:
        mixed = torch.nn.functional.scaled_dot_product_attention(
            grouped, key, value, attn_mask=mask, scale=scale
        )
    return mixed.reshape(rows, 1, heads * slots.groups, size), None


AttentionInterface.register(ATTENTION_NAME, slot_attention)
