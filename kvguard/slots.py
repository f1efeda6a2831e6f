"""The key-value caches of the rows that decode together, in pages.

Each layer has a pool of pages of 16 entries, and each row a list of the pages that hold its
entries, in order. Keys are stored after rotation, so the physical place of an entry does not
matter. Rewinding a row lowers its length, a row that leaves frees its pages, a step writes one
entry per row, and a long row causes no padding in the others: the allocation beyond the entries is
the end of each row's last page and a few free pages. Layers may hold different lengths (PyramidKV,
SimLayerKV), heads may hide entries (AdaKV).

Attention needs no kernel of its own: one batched product of every page of the pool with the query
of the row that owns it, a softmax over each row's pages, one batched product with the values, and a
sum over each row's pages. Keys and values are read once, where they lie, on any device; the number
of calls does not grow with the rows. Compared with one call a row and with rectangular buffers in
``docs/performance.md``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig

from kvguard.pages import PAGE_ENTRIES, SLACK, Pool
from kvguard.prefill import Prefix
from kvguard.replays import Replay, attend_replay
from kvguard.shared_prefix import HeldPrefix

ATTENTION_NAME = "kvguard_slots"


class Plan(NamedTuple):
    """Where the entries of one step lie; layers whose rows have the same pages share it.

    Attributes:
        writes: per block (source rows of the new entries, flat places (heads x rows)).
        owner: (pages,) the row whose query meets each page.
        table: (rows x most pages) page of each row, a free place behind the row's own is page 0;
            None where the pages lie in order, every row with as many: then nothing is gathered.
        sums: like ``table``, but free places are the page behind the last, which is 0.
        inverse: (pages,) place of each page in ``table``.
        mask: (rows, 1, 1, entries) additive; None: every place is taken.
        scores: (pages x heads, groups, PAGE_ENTRIES), overwritten in each layer.
        mixed: ((pages + 1) x heads, groups, head_dim), overwritten in each layer.
        parts: per block its share of the first axis of ``scores`` and ``mixed``.
    """

    writes: list[tuple[torch.Tensor | None, torch.Tensor]]
    owner: torch.Tensor
    table: torch.Tensor | None
    sums: torch.Tensor
    inverse: torch.Tensor
    mask: torch.Tensor | None
    scores: torch.Tensor
    mixed: torch.Tensor
    parts: list[slice]


class Slots:
    """Caches of up to ``rows`` rows; stands in for ``past_key_values`` during decoding.

    Rows 0 .. ``active - 1`` are in use.

    Args:
        config: of the model.
        rows: at most.
        device: where the model is.
        dtype: of its entries.
        prefix: what rows with the full cache may begin with, without a copy of their own.

    Attributes:
        lengths: (layers, rows) int64, entries of each row in each layer, the prefix not counted.
        prefix: the prefix, and which rows begin with it.
        appended: (rows,) int64, newest entries that stand last in every layer: those written one by
            one since the row was filled or compressed.
    """

    is_compileable = False

    def __init__(
        self,
        config: PretrainedConfig,
        rows: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        prefix: Prefix | None = None,
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
        self.hidden_entries: NDArray[np.int64] = np.zeros((self.layers, rows), dtype=np.int64)
        self.pools = [
            Pool(self.heads, self.head_dim, device=device, dtype=dtype) for _ in range(self.layers)
        ]
        self.tables: list[list[list[int]]] = [[[] for _ in range(rows)] for _ in range(self.layers)]
        self.prefix = HeldPrefix(prefix, rows)
        self._plans: list[Plan] = []
        self._sharing: torch.Tensor | None = None  # rows of the step that begin with the prefix
        self.riders: dict[int, Replay] = {}  # by row, in the step at work
        self._peak_bytes = 0

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of one key and one value of one layer, all heads."""
        return 2 * self.heads * self.head_dim * self.dtype.itemsize

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all pages of all layers, of the masks of head-wise presses, of a held prefix."""
        return self.prefix.nbytes + sum(pool.nbytes for pool in self.pools)

    def take_peak(self) -> int:
        """The most bytes allocated at once since the last call, copies while growing included."""
        peak = max(self._peak_bytes, self.allocated_bytes)
        self._peak_bytes = 0
        return peak

    # --- rows come, change and go ---

    def insert(
        self,
        row: int,
        cache: DynamicCache,
        masked: Sequence[torch.Tensor | None] | None = None,
        *,
        shares: bool = False,
    ) -> None:
        """Put one sequence's cache into a slot; the slot's old content is lost.

        Args:
            row: slot number; the first unused slot becomes active.
            cache: batch of 1, (1, heads, length, head_dim) per layer.
            masked: per layer (heads, length) bool, True where the press hides an entry.
            shares: the sequence is the prefix and what is in the cache.
        """
        for layer in range(self.layers):  # whatever runs out of memory does so before any change
            keys = cache.layers[layer].keys
            assert keys is not None
            self._reserve(layer, {row: keys.shape[2]})
        self.active = max(self.active, row + 1)
        for layer in range(self.layers):
            keys, values = cache.layers[layer].keys, cache.layers[layer].values
            assert keys is not None
            assert values is not None
            self.write(layer, row, keys[0], values[0], None if masked is None else masked[layer])
        self.appended[row] = 0
        self.prefix.rows[row] = shares

    def write(
        self,
        layer: int,
        row: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        masked: torch.Tensor | None = None,
    ) -> None:
        """Replace a row's entries of one layer: keys and values (heads, length, head_dim)."""
        self._reserve(layer, {row: keys.shape[1]})
        self._fit(layer, row, 0)
        hides = masked is not None and bool(masked.any())
        self._append(layer, row, keys, values, masked if hides else None)
        self.hidden_entries[layer, row] = int(masked.sum()) if hides and masked is not None else 0
        self.appended[row] = -1  # the entry of the step that is under way is among those written

    def replace_tail(self, row: int, dropped: int, entries: torch.Tensor) -> None:
        """Forget a row's newest entries in every layer and put others in their place.

        Args:
            row: which.
            dropped: entries to forget, at most `appended` of the row.
            entries: (layers, 2, heads, n, head_dim) keys and values, none of them hidden; on any
                device.

        Raises:
            ValueError: so many do not stand last in every layer.
        """
        if not 0 <= dropped <= self.appended[row]:
            raise ValueError(f"dropped lies in 0..{self.appended[row]}, got {dropped}")
        kept = self.lengths[:, row] - dropped
        for layer in range(self.layers):
            self._reserve(layer, {row: int(kept[layer]) + entries.shape[3]})
        for layer in range(self.layers):
            self._fit(layer, row, int(kept[layer]))
            keys, values = entries[layer]
            self._append(layer, row, keys, values, None)
        self.appended[row] += entries.shape[3] - dropped

    def drop_tail(self, row: int, entries: int) -> None:
        """Forget a row's newest entries, as many of ``entries`` as stand last in every layer."""
        dropped = max(0, min(entries, int(self.appended[row])))
        if dropped > 1:
            for layer in range(self.layers):
                self._fit(layer, row, int(self.lengths[layer, row]) - dropped)
        else:  # of one entry the next step takes the place
            self.lengths[:, row] -= dropped
        self.appended[row] -= dropped

    def remove(self, row: int) -> int:
        """Free a row: the last active row takes its number.

        Returns:
            The number that the moved row had before, ``active - 1``.
        """
        last = self.active - 1
        for layer, table in enumerate(self.tables):
            self._fit(layer, row, 0)
            table[row], table[last] = table[last], table[row]
        for array in (self.lengths, self.hidden_entries):
            array[:, row] = array[:, last]
            array[:, last] = 0
        self.appended[row] = self.appended[last]
        self.prefix.rows[row] = self.prefix.rows[last]
        self.prefix.rows[last] = False
        self.active = last
        return last

    def entries(self, layer: int, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A row's keys and values, copies (1, heads, length, head_dim) without padding."""
        length = int(self.lengths[layer, row])
        own = self.pools[layer].read(self.tables[layer][row], length)
        if self.prefix.rows[row]:
            pairs = zip(self.prefix.entries(layer), own, strict=True)
            keys, values = (torch.cat(pair, dim=1) for pair in pairs)
        else:
            keys, values = own
        return keys[None], values[None]

    def row_bytes(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Kept, masked and padding bytes of each active row, three (active,) arrays.

        A prefix that rows begin with is kept by them in equal parts. Padding is what is left of the
        row's pages and its share of what no row uses: over the rows the three sum to
        `allocated_bytes`.
        """
        per_head = self.bytes_per_entry // self.heads
        masked = self.hidden_entries[:, : self.active].sum(axis=0) * per_head
        used = self.lengths[:, : self.active].sum(axis=0) * self.bytes_per_entry
        pages = np.array(
            [sum(len(table[row]) for table in self.tables) for row in range(self.active)],
            dtype=np.int64,
        )
        own = pages * PAGE_ENTRIES * self.bytes_per_entry
        unused = self.allocated_bytes - self.prefix.nbytes - int(own.sum())
        shares = np.full(self.active, unused // max(self.active, 1), dtype=np.int64)
        shares[: unused - int(shares.sum())] += 1
        kept = used - masked + self.prefix.row_bytes(self.active)
        return kept, masked, own + shares - used

    # --- pages ---

    def _reserve(self, layer: int, lengths: dict[int, int]) -> None:
        """Have pages for rows to grow to these lengths; what they use stays as it is."""
        pool, table = self.pools[layer], self.tables[layer]
        missing = sum(
            max(0, -(-length // PAGE_ENTRIES) - len(table[row])) for row, length in lengths.items()
        )
        if missing > len(pool.free):
            # A pool of one or two rows grows once in many steps and is quicker in one block.
            pool.reserve(missing, in_one_block=self.active <= 2)
            self._note_peak(pool)

    def _note_peak(self, pool: Pool) -> None:
        self._peak_bytes = max(self._peak_bytes, self.allocated_bytes + pool.transient_bytes)
        pool.transient_bytes = 0

    def _fit(self, layer: int, row: int, length: int) -> None:
        """Shorten a row to ``length`` entries; what stood behind them is wiped."""
        pool, table = self.pools[layer], self.tables[layer][row]
        pages = -(-length // PAGE_ENTRIES)
        pool.release(table[pages:])
        del table[pages:]
        if length % PAGE_ENTRIES and length < self.lengths[layer, row]:
            stale = pages * PAGE_ENTRIES - length
            wiped = torch.zeros(self.heads, stale, self.head_dim, device=self.device)
            pool.write(table, length, wiped, wiped, None)
        if pool.hidden is not None and self.hidden_entries[layer, row]:
            hidden = 0 if not table else int(pool.hidden[table].sum())
            self.hidden_entries[layer, row] = hidden
        self.lengths[layer, row] = length

    def _append(
        self,
        layer: int,
        row: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        hidden: torch.Tensor | None,
    ) -> None:
        """Put entries behind a row's last one of a layer; their pages are reserved."""
        pool, table = self.pools[layer], self.tables[layer][row]
        start = int(self.lengths[layer, row])
        end = start + keys.shape[1]
        while len(table) * PAGE_ENTRIES < end:
            table.append(pool.free.pop(0))
        pool.write(table, start, keys, values, hidden)
        self.lengths[layer, row] = end

    def _compact(self, layer: int) -> None:
        """Give pages back that only rows needed which have left."""
        pool, table = self.pools[layer], self.tables[layer]
        if len(pool.free) <= 1 + 2 * ((pool.pages - len(pool.free)) // SLACK):
            return
        used = [page for row in table[: self.active] for page in row]
        pool.compact(used)
        self._note_peak(pool)
        first = 0
        for row in table[: self.active]:
            row[:] = range(first, first + len(row))
            first += len(row)

    # --- one decoding step: the model calls `update` per layer, the attention calls `attend` ---

    def begin_step(self) -> None:
        """Prepare for one token per active row."""
        active = self.active
        for layer in range(self.layers):
            self._compact(layer)
            table = self.tables[layer]
            for_new = {
                row: int(length) + 1
                for row, length in enumerate(self.lengths[layer, :active].tolist())
                if length == len(table[row]) * PAGE_ENTRIES
            }
            if for_new:
                self._reserve(layer, for_new)
                for row in for_new:
                    table[row].append(self.pools[layer].free.pop(0))
        self._plans = []
        for layer in range(self.layers):
            same = (
                layer > 0
                and self.pools[layer].sizes == self.pools[layer - 1].sizes
                and bool((self.lengths[layer] == self.lengths[layer - 1]).all())
                and self.tables[layer] == self.tables[layer - 1]
            )
            self._plans.append(self._plans[-1] if same else self._plan(layer))
        sharing = np.flatnonzero(self.prefix.rows[:active])
        self._sharing = torch.from_numpy(sharing).to(self.device) if len(sharing) else None

    def end_step(self) -> None:
        """Every active row has one entry more."""
        self.appended[: self.active] += 1

    def _plan(self, layer: int) -> Plan:
        pool, active, heads = self.pools[layer], self.active, self.heads
        table = self.tables[layer][:active]
        lengths = self.lengths[layer, :active]
        pages = pool.pages
        counts = np.array([len(row) for row in table])
        most = int(counts.max())
        places = np.full((active, most), -1, dtype=np.int64)
        for row, own in enumerate(table):
            places[row, : len(own)] = own
        taken = places >= 0
        owner = np.zeros(pages, dtype=np.int64)
        owner[places[taken]] = np.nonzero(taken)[0]
        inverse = np.zeros(pages, dtype=np.int64)
        inverse[places[taken]] = np.flatnonzero(taken)
        ordered = places.size == pages and np.array_equal(places.ravel(), np.arange(pages))
        last = np.array([row[-1] for row in table], dtype=np.int64)
        offsets = torch.from_numpy(lengths % PAGE_ENTRIES).to(self.device)
        head = torch.arange(heads, device=self.device)[:, None]
        writes: list[tuple[torch.Tensor | None, torch.Tensor]] = []
        for which, inside in pool.by_block(last):
            flat = (inside * heads + head) * PAGE_ENTRIES + offsets[which]  # (heads, n)
            writes.append((None if len(which) == active else which, flat.view(-1)))
        mask = None
        if (lengths + 1 < most * PAGE_ENTRIES).any():
            after = torch.from_numpy(lengths + 1).to(self.device)
            beyond = torch.arange(most * PAGE_ENTRIES, device=self.device) >= after[:, None]
            mask = torch.zeros(beyond.shape, dtype=self.dtype, device=self.device)
            mask = mask.masked_fill_(beyond, -torch.inf)[:, None, None]
        parts, first = [], 0
        for size in pool.sizes:
            parts.append(slice(first * heads, (first + size) * heads))
            first += size

        def on_device(values: NDArray[np.int64]) -> torch.Tensor:
            return torch.from_numpy(values).to(self.device)

        scores = torch.empty(
            (pages * heads, self.groups, PAGE_ENTRIES), device=self.device, dtype=self.dtype
        )
        mixed = torch.zeros(
            ((pages + 1) * heads, self.groups, self.head_dim), device=self.device, dtype=self.dtype
        )
        return Plan(
            writes,
            on_device(owner),
            None if ordered else on_device(np.where(taken, places, 0).ravel()),
            on_device(np.where(taken, places, pages).ravel()),
            on_device(inverse),
            mask,
            scores,
            mixed,
            parts,
        )

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, _: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one new entry per active row.

        Args:
            keys: (active, heads, 1, head_dim), rotary positions applied; those of riders may
                follow, which are not kept.
            values: like keys.
            layer: layer number.

        Returns:
            What it was given: `attend` reads the pages.
        """
        pool, size = self.pools[layer], self.head_dim
        for blocks, new in ((pool.keys, keys), (pool.values, values)):
            entries = new[: self.active, :, 0].transpose(0, 1)  # (heads, active, head_dim)
            for block, (rows, places) in zip(blocks, self._plans[layer].writes, strict=True):
                own = entries if rows is None else entries[:, rows]
                block.view(-1, size).index_copy_(0, places, own.reshape(-1, size))
        self.lengths[layer, : self.active] += 1
        return keys, values

    def attend(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of one query per row over its entries.

        The query heads that share a key head become the query axis, so grouped keys and values are
        never repeated.

        Args:
            layer: layer number.
            query: (active, query heads, 1, head_dim).
            scale: factor on the scores.

        Returns:
            (active, 1, query heads, head_dim).
        """
        pool, plan = self.pools[layer], self._plans[layer]
        active, heads, groups, size = self.active, self.heads, self.groups, self.head_dim
        pages = pool.pages
        grouped = query.reshape(active, heads, groups, size)
        by_page = grouped.index_select(0, plan.owner).reshape(pages * heads, groups, size)
        for block, part in zip(pool.keys, plan.parts, strict=True):
            keys = block.view(-1, PAGE_ENTRIES, size).transpose(1, 2)
            target = plan.scores[part]
            torch.baddbmm(target, by_page[part], keys, beta=0, alpha=scale, out=target)
        scores = plan.scores.view(pages, heads, groups, PAGE_ENTRIES)
        if pool.hidden is not None:
            scores.masked_fill_(pool.hidden[:, :, None], -torch.inf)
        if plan.table is not None:
            scores = scores.index_select(0, plan.table)
        most = len(scores) // active
        shape = (active, most, heads, groups, PAGE_ENTRIES)
        scores = scores.reshape(shape).permute(0, 2, 3, 1, 4).reshape(active, heads, groups, -1)
        if plan.mask is not None:
            scores += plan.mask
        sharing = self._sharing
        if sharing is not None:
            log_sum = scores.index_select(0, sharing).float().logsumexp(dim=-1, keepdim=True)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(self.dtype)
        weights = weights.reshape(active, heads, groups, most, PAGE_ENTRIES).permute(0, 3, 1, 2, 4)
        weights = weights.reshape(active * most, heads, groups, PAGE_ENTRIES)
        if plan.table is not None:
            weights = weights.index_select(0, plan.inverse)
        weights = weights.reshape(pages * heads, groups, PAGE_ENTRIES)
        for block, part in zip(pool.values, plan.parts, strict=True):
            torch.bmm(weights[part], block.view(-1, PAGE_ENTRIES, size), out=plan.mixed[part])
        mixed = plan.mixed.view(pages + 1, -1)
        mixed = mixed[:pages] if plan.table is None else mixed.index_select(0, plan.sums)
        mixed = mixed.view(active, most, -1).sum(dim=1).view(active, heads, groups, size)
        if sharing is not None:
            asked, own = (each.index_select(0, sharing) for each in (grouped, mixed))
            whole = self.prefix.join(layer, asked, own, log_sum, scale)
            mixed.index_copy_(0, sharing, whole)
        return mixed.view(active, 1, heads * groups, size)

    def attend_riders(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attention of the tokens that `riders` replay over their rows' prompt entries.

        Args:
            layer: layer number.
            query: (tokens of all riders, query heads, 1, head_dim).
            key: (tokens, heads, 1, head_dim) their own.
            value: like key.
            scale: factor on the scores.

        Returns:
            (tokens, 1, query heads, head_dim).
        """
        parts, first = [], 0
        for row, replay in self.riders.items():
            end, visible = first + len(replay.token_ids), replay.usable[layer]
            keys, values = (each[0, :, : visible.shape[1]] for each in self.entries(layer, row))
            q, k, v = (each[first:end, :, 0].transpose(0, 1) for each in (query, key, value))
            parts.append(attend_replay(q, k, v, (keys, values), visible, scale))
            first = end
        return torch.cat(parts, dim=1).transpose(0, 1)[:, None]

    def get_seq_length(self, layer: int = 0) -> int:
        """Longest row; part of the interface that models expect of a cache."""
        lengths = self.lengths[layer] + self.prefix.tokens * self.prefix.rows
        return int(lengths[: self.active].max(initial=0))


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
    """Attention of one query per row over its slot, and of riders; see `Slots.attend`.

    Args:
        module: the attention layer; names its number.
        query: (rows, query heads, 1, head_dim).
        key: (rows, heads, 1, head_dim); the slots have the rows' own.
        value: like key.
        attention_mask: unused; the slots know what is a row's own.
        dropout: unused; decoding has none.
        scaling: factor on the scores.
        kwargs: ``kvguard_slots`` is the `Slots`.

    Returns:
        (rows, 1, query heads, head_dim), None.
    """
    slots: Slots = kwargs["kvguard_slots"]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    active = slots.active
    mixed = slots.attend(module.layer_idx, query[:active], scale)
    if slots.riders:
        q, k, v = (each[active:] for each in (query, key, value))
        mixed = torch.cat([mixed, slots.attend_riders(module.layer_idx, q, k, v, scale)])
    return mixed, None


AttentionInterface.register(ATTENTION_NAME, slot_attention)


def batch_size_for(
    model: PreTrainedModel, tokens_per_row: int, *, share: float = 0.5, limit: int = 256
) -> int:
    """How many rows fit in the memory that is free now.

    Args:
        model: its config says what an entry takes.
        tokens_per_row: longest prompt plus the new tokens, uncompressed.
        share: of the free memory to plan with.
        limit: never more than this.
    """
    slots = Slots(model.config, 0, device=model.device, dtype=model.dtype)
    row: int = slots.bytes_per_entry * slots.layers * tokens_per_row
    row += 6 * 4 * model.config.vocab_size  # logits and what the signals make of them
    if model.device.type == "cuda":
        free = int(torch.cuda.mem_get_info(model.device)[0])
    else:
        free = int(psutil.virtual_memory().available)
    return max(1, min(limit, int(free * share) // row))
