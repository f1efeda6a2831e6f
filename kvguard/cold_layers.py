"""How a check's cold cache comes to the device: two layers of it, one at work, one on its way.

A layer is copied from host memory beside the work on the layer before. Every row's parts lie one
behind the other, with room for its drafted tokens behind them, so that attention reads them without
a further copy. A part that several rows share comes once; each row that has it is put together, for
as long as its attention takes, in one buffer for all of them.

The buffers are made before the pass and used in turn. Blocks taken from the allocator anew for each
layer could be given back only when the device is done with them, which the host, far ahead, does
not wait for: many layers would be there at once.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from kvguard.cold_cache import ColdStore, Part

DEPTH = 2
"""Layers on the device."""


def _uses(parts: Sequence[Sequence["Part"]]) -> Counter[int]:
    """How many rows have each part, by its identity."""
    return Counter(id(part) for listed in parts for part in listed)


def layer_bytes(
    store: "ColdStore", parts: Sequence[Sequence["Part"]], counts: Sequence[int]
) -> list[int]:
    """Device bytes that a pass needs for each row: its share of the buffers.

    Args:
        store: of the rows.
        parts: of each row, in the order of the tokens.
        counts: drafted tokens of each row.
    """
    uses, depth = _uses(parts), min(DEPTH, store.layers)
    per_token = store.bytes_per_token // store.layers
    joint = [
        sum(part.tokens for part in listed) + count
        for listed, count in zip(parts, counts, strict=True)
        if any(uses[id(part)] > 1 for part in listed)
    ]
    found = []
    for listed, count in zip(parts, counts, strict=True):
        tokens: float = sum(part.tokens / uses[id(part)] for part in listed)
        if any(uses[id(part)] > 1 for part in listed):
            found.append(int((depth * tokens + max(joint) / len(joint)) * per_token))
        else:
            found.append(int(depth * (tokens + count) * per_token))
    return found


def moved_bytes(
    store: "ColdStore", parts: Sequence[Sequence["Part"]], counts: Sequence[int]
) -> list[int]:
    """Bytes that a pass moves for each row; less than a byte a row is rounded off.

    Args:
        store: of the rows.
        parts: of each row; one that several have is read once, each row's share of it is equal.
        counts: tokens of each row whose entries leave the device.
    """
    uses = _uses(parts)
    tokens = [
        sum(part.tokens / uses[id(part)] for part in listed) + count
        for listed, count in zip(parts, counts, strict=True)
    ]
    return [int(number * store.bytes_per_token) for number in tokens]


class _Set(NamedTuple):
    """Buffers of one layer."""

    shared: dict[int, torch.Tensor]  # by the part's identity (2, tokens, heads, head_dim)
    own: list[torch.Tensor]  # per row (2, tokens of its other parts [and its draft], ...)


class ColdLayers:
    """The buffers of one pass.

    Args:
        store: of the rows.
        parts: of each row, in the order of the tokens.
        counts: drafted tokens of each row.
    """

    def __init__(
        self, store: "ColdStore", parts: Sequence[Sequence["Part"]], counts: Sequence[int]
    ) -> None:
        self.store, self.parts = store, parts
        uses = _uses(parts)
        self._shared = {id(p): p for listed in parts for p in listed if uses[id(p)] > 1}
        self._own = [[p for p in listed if id(p) not in self._shared] for listed in parts]
        self._joins = [len(own) < len(all_) for own, all_ in zip(self._own, parts, strict=True)]
        room = [
            sum(part.tokens for part in own) + (0 if joins else count)
            for own, count, joins in zip(self._own, counts, self._joins, strict=True)
        ]
        self._sets = [
            _Set(
                {key: store.on_device(part.tokens) for key, part in self._shared.items()},
                [store.on_device(tokens) for tokens in room],
            )
            for _ in range(min(DEPTH, store.layers))
        ]
        whole = [
            sum(part.tokens for part in listed) + count
            for listed, count, joins in zip(parts, counts, self._joins, strict=True)
            if joins
        ]
        self._joint = store.on_device(max(whole)) if whole else None
        self._lengths = [
            sum(part.tokens for part in listed) + count
            for listed, count in zip(parts, counts, strict=True)
        ]
        self._arrived: list[torch.cuda.Event | None] = [None] * len(self._sets)
        self._released: list[torch.cuda.Event | None] = [None] * len(self._sets)
        self._layer = 0
        if store.stream is not None:  # what had the buffers' memory before is done with it first
            store.stream.wait_stream(torch.cuda.current_stream(store.device))
        self._fetch(0)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        held = [] if self._joint is None else [self._joint]
        for one in self._sets:
            held += [*one.shared.values(), *one.own]
        return sum(buffer.nbytes for buffer in held)

    def _fetch(self, layer: int) -> None:
        """Start copying a layer, once the one that had its buffers is done with."""
        number, stream = layer % len(self._sets), self.store.stream
        into = self._sets[number]
        with ExitStack() as stack:
            released = self._released[number]
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
                if released is not None:
                    stream.wait_event(released)
            for key, part in self._shared.items():
                part.copy_layer(layer, into.shared[key])
            for target, own in zip(into.own, self._own, strict=True):
                start = 0
                for part in own:
                    part.copy_layer(layer, target[:, start : start + part.tokens])
                    start += part.tokens
            if stream is not None:
                self._arrived[number] = self._event(stream)
                for buffer in (*into.shared.values(), *into.own):
                    buffer.record_stream(stream)  # a pass that fails frees them under the copy

    def _event(self, stream: "torch.cuda.Stream") -> "torch.cuda.Event":
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def begin(self, layer: int) -> None:
        """Wait for a layer, and send for the next one."""
        arrived = self._arrived[layer % len(self._sets)]
        if arrived is not None:
            torch.cuda.current_stream(self.store.device).wait_event(arrived)
        self._layer = layer
        if layer + 1 < self.store.layers:
            self._fetch(layer + 1)

    def row(self, number: int, new: torch.Tensor) -> torch.Tensor:
        """A row's entries of the layer at work, the drafted tokens' behind the cold ones.

        Args:
            number: of the row.
            new: (2, heads, n, head_dim) the drafted tokens' entries.

        Returns:
            (2, heads, tokens, head_dim), a view; valid until the next row is asked for.
        """
        at_work, length = self._sets[self._layer % len(self._sets)], self._lengths[number]
        whole = at_work.own[number]
        if self._joins[number]:
            assert self._joint is not None
            own, whole = whole, self._joint[:, :length]
            start = taken = 0
            for part in self.parts[number]:
                source = at_work.shared.get(id(part))
                if source is None:
                    source = own[:, taken : taken + part.tokens]
                    taken += part.tokens
                whole[:, start : start + part.tokens] = source
                start += part.tokens
        whole[:, length - new.shape[2] :] = new.transpose(1, 2)
        return whole.transpose(1, 2)

    def end(self, layer: int) -> None:
        """The layer's attention is on its way: its buffers may be written when it is done."""
        if self.store.stream is not None:
            current = torch.cuda.current_stream(self.store.device)
            self._released[layer % len(self._sets)] = self._event(current)
