"""The page pool of one layer: memory that rows of different lengths share."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

PAGE_ENTRIES = 16
"""Entries per page; on average half of each row's last page is empty, in each layer."""

SLACK = 50
"""A pool that grows adds 1 / SLACK of its pages as free ones, so that it seldom grows again."""

TAIL_SHARE = 4
"""A pool grows in a second block, merged into the first at 1 / TAIL_SHARE of its size.
Until then growing copies the second block only."""


class Pool:
    """The pages of one layer: keys and values in one block or two, and a list of free pages.

    A page is (heads, `PAGE_ENTRIES`, head_dim). Page numbers count through both blocks. Pages that
    no row uses hold finite numbers: attention gives them no weight, but 0 times NaN would be NaN.
    """

    def __init__(
        self, heads: int, head_dim: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.page_shape = (heads, PAGE_ENTRIES, head_dim)
        self.device, self.dtype = device, dtype
        self.keys: list[torch.Tensor] = [self._block(0)]
        self.values: list[torch.Tensor] = [self._block(0)]
        # (pages, heads, PAGE_ENTRIES) bool, True = hidden; None while no row of the layer hides any
        self.hidden: torch.Tensor | None = None
        self.free: list[int] = []
        self.transient_bytes = 0  # largest that a change of the blocks needed beside them

    def _block(self, pages: int, written: int = 0) -> torch.Tensor:
        """Pages of zeros, but for the first ``written``, which the caller fills."""
        block = torch.empty((pages, *self.page_shape), device=self.device, dtype=self.dtype)
        block[written:].zero_()
        return block

    def _hidden(self, pages: int) -> torch.Tensor:
        return torch.zeros((pages, *self.page_shape[:2]), device=self.device, dtype=torch.bool)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Pages of each block."""
        return tuple(len(block) for block in self.keys)

    @property
    def pages(self) -> int:
        """Pages that exist, free ones too."""
        return sum(self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is allocated for the layer."""
        hidden = 0 if self.hidden is None else self.hidden.nbytes
        return hidden + sum(block.nbytes for block in (*self.keys, *self.values))

    def reserve(self, pages: int, *, in_one_block: bool) -> None:
        """Grow until so many pages are free."""
        missing = pages - len(self.free)
        if missing <= 0:
            return
        before = self.pages
        total = before + missing
        total += total // SLACK
        first = self.sizes[0]
        joins = in_one_block or (total - first) * TAIL_SHARE > first
        # Both before any change: the device may have no room for them.
        copied = before if joins else before - first
        wider = [self._block(total if joins else total - first, copied) for _ in range(2)]
        self.transient_bytes = max(self.transient_bytes, 2 * wider[0].nbytes)
        for blocks, grown in zip((self.keys, self.values), wider, strict=True):
            done = 0
            for block in blocks if joins else blocks[1:]:
                grown[done : done + len(block)] = block
                done += len(block)
            blocks[:] = [grown] if joins else [blocks[0], grown]
        if self.hidden is not None:
            hidden = self._hidden(total)
            hidden[:before] = self.hidden
            self.hidden = hidden
        self.free += range(before, total)

    def compact(self, used: Sequence[int]) -> None:
        """Keep the used pages alone, in this order, and a little slack, in one block."""
        total = len(used) + len(used) // SLACK
        sources = self.by_block(np.asarray(used, dtype=np.int64))
        for blocks in (self.keys, self.values):
            kept = self._block(total, len(used))
            for block, (targets, pages) in zip(blocks, sources, strict=True):
                moved = block.index_select(0, pages)
                self.transient_bytes = max(self.transient_bytes, kept.nbytes + moved.nbytes)
                kept.index_copy_(0, targets, moved)
            blocks[:] = [kept]
        if self.hidden is not None:
            hidden = self._hidden(total)
            hidden[: len(used)] = self.hidden[list(used)]
            self.hidden = hidden
        self.free = list(range(len(used), total))

    def by_block(self, pages: NDArray[np.int64]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each block: which of ``pages`` lie in it, and their numbers within the block."""
        found, first = [], 0
        for size in self.sizes:
            inside = np.flatnonzero((pages >= first) & (pages < first + size))
            places = (
                torch.from_numpy(inside).to(self.device),
                torch.from_numpy(pages[inside] - first).to(self.device),
            )
            found.append(places)
            first += size
        return found

    def release(self, pages: Sequence[int]) -> None:
        """Return pages to the free list and zero their contents."""
        if not pages:
            return
        sources = self.by_block(np.asarray(pages, dtype=np.int64))
        for blocks in (self.keys, self.values):
            for block, (_, places) in zip(blocks, sources, strict=True):
                block.index_fill_(0, places, 0)
        if self.hidden is not None:
            self.hidden[list(pages)] = False
        self.free += pages

    def read(self, pages: Sequence[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first entries of pages, (heads, length, head_dim), copied."""
        sources = self.by_block(np.asarray(pages, dtype=np.int64))
        heads, _, size = self.page_shape
        parts = []
        for blocks in (self.keys, self.values):
            whole = self._block(len(pages), len(pages))
            for block, (targets, places) in zip(blocks, sources, strict=True):
                whole.index_copy_(0, targets, block.index_select(0, places))
            entries = whole.transpose(0, 1).reshape(heads, len(pages) * PAGE_ENTRIES, size)
            parts.append(entries[:, :length])
        return parts[0], parts[1]

    def write(
        self,
        pages: Sequence[int],
        start: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        hidden: torch.Tensor | None,
    ) -> None:
        """Put entries (heads, n, head_dim) behind the first ``start`` ones of pages."""
        heads, _, size = self.page_shape
        at = start + np.arange(keys.shape[1])
        owners = np.asarray(pages, dtype=np.int64)[at // PAGE_ENTRIES]
        offsets = torch.from_numpy(at % PAGE_ENTRIES).to(self.device)
        head = torch.arange(heads, device=self.device)[:, None]
        for block, values_block, (which, places) in zip(
            self.keys, self.values, self.by_block(owners), strict=True
        ):
            if len(which):
                flat = (places * heads + head) * PAGE_ENTRIES + offsets[which]  # (heads, n)
                for target, source in ((block, keys), (values_block, values)):
                    own = source.to(self.device, self.dtype)[:, which].reshape(-1, size)
                    target.view(-1, size).index_copy_(0, flat.view(-1), own)
        if hidden is not None and self.hidden is None:
            self.hidden = self._hidden(self.pages)
        if self.hidden is not None:
            numbers = torch.from_numpy(owners).to(self.device)
            if hidden is None:
                self.hidden[numbers, :, offsets] = False
            else:
                self.hidden[numbers, :, offsets] = hidden.to(self.device).t()
