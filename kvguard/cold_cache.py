"""The cold cache: uncompressed entries outside device memory, and the pass that reads them.

A press evicts entries from the device, not from the machine. Before it does, each layer's keys and
values are copied to host memory, pinned where the model is on CUDA, or to a memory-mapped file. A
check runs drafted tokens over them, layer by layer: the layer at work and the next one are on the
device (`kvguard.cold_layers`), and the entries of the tokens that were run leave it as they are
made. They are appended, so that the next check starts behind them. Drafts of several rows, of any
lengths, are one pass. VeriCache (arXiv 2605.17613) verifies drafts of a compressed cache the same
way.
"""

import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import torch
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig

from kvguard.cold_attention import HostAttention, attend_whole
from kvguard.cold_layers import ColdLayers, layer_bytes, moved_bytes
from kvguard.prefill import Prefix, attention_layers, forget_masks, layer_tensors

ColdKind = Literal["host", "disk"]

ATTENTION_NAME = "kvguard_cold"

FIRST_BLOCK_TOKENS = 64
"""Capacity of a row's generated entries at first; doubled whenever it is full."""

REFUSALS = (MemoryError, OSError, RuntimeError)
"""What a refused allocation raises: host memory, pinned memory, a full disk."""


class ColdCacheError(RuntimeError):
    """Entries could not be parked, or are not there; the message says why."""


class Part:
    """Entries of consecutive tokens in every layer, outside device memory.

    Attributes:
        entries: (layers, 2, capacity, heads, head_dim), keys before values. Tokens come before
            heads, so that the filled ones of a layer lie in one piece and parts can be put one
            behind the other without a further copy.
        tokens: how many of the capacity are filled.
    """

    def __init__(self, entries: torch.Tensor, tokens: int) -> None:
        self.entries, self.tokens = entries, tokens

    @property
    def nbytes(self) -> int:
        """Bytes allocated, filled or not."""
        return int(self.entries.nbytes)

    def copy_layer(self, number: int, target: torch.Tensor) -> None:
        """Copy one layer's filled entries, to the device beside what it is doing.

        Args:
            number: of the layer.
            target: (2, tokens, heads, head_dim); keys and values each in one piece.
        """
        for kind in range(2):
            source = self.entries[number, kind, : self.tokens]
            target[kind].copy_(source, non_blocking=True)


@dataclass
class ColdRow:
    """What one request has outside device memory.

    Attributes:
        store: allocates its memory.
        prefix: entries of the prefix that the prompts share, one copy for all rows; or None.
        prompt: entries of the rest of the prompt.
        answer: entries of generated tokens, None before the first check.
        prompt_hidden: (hidden size,) after the final norm, at the prompt's last token.
        hidden: the same at the last token parked; it predicts generated token number `tokens`.
    """

    store: "ColdStore"
    prefix: Part | None
    prompt: Part
    answer: Part | None = None
    prompt_hidden: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Generated tokens whose entries are parked."""
        return 0 if self.answer is None else self.answer.tokens

    @property
    def length(self) -> int:
        """Tokens parked, those of the prompt included."""
        return sum(part.tokens for part in self.parts)

    @property
    def parts(self) -> list[Part]:
        """What is parked, in the order of the tokens."""
        parts = [self.prefix, self.prompt, self.answer]
        return [part for part in parts if part is not None and part.tokens > 0]

    @property
    def nbytes(self) -> int:
        """Bytes of this row alone, without the shared prefix."""
        return self.prompt.nbytes + (0 if self.answer is None else self.answer.nbytes)

    def prompt_only(self) -> "ColdRow":
        """The same without what was generated; shares the entries."""
        return replace(self, answer=None, hidden=self.prompt_hidden)

    def park(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy out one layer's entries of the prompt, (heads, prompt tokens, head_dim) each."""
        self.store.copy_out(self.prompt.entries[layer, 0], keys.transpose(0, 1))
        self.store.copy_out(self.prompt.entries[layer, 1], values.transpose(0, 1))

    def append(self, entries: torch.Tensor, hidden: torch.Tensor) -> None:
        """Park further generated tokens.

        Args:
            entries: (layers, 2, heads, tokens, head_dim) on any device.
            hidden: (hidden size,) after the final norm, at the last of them.

        Raises:
            MemoryError, OSError, RuntimeError: there is no room; nothing has changed then.
        """
        count, start = entries.shape[3], self.tokens
        if count > 0:
            self._reserve(start + count)
            assert self.answer is not None
            new = entries.transpose(2, 3).to(self.answer.entries.device)
            self.answer.entries[:, :, start : start + count] = new
            self.answer.tokens = start + count
        self.hidden = hidden

    def _reserve(self, tokens: int) -> None:
        capacity = 0 if self.answer is None else self.answer.entries.shape[2]
        if tokens <= capacity:
            return
        wider = self.store.allocate(max(tokens, 2 * capacity, FIRST_BLOCK_TOKENS))
        if self.answer is not None:
            wider.entries[:, :, : self.tokens] = self.answer.entries[:, :, : self.tokens]
            wider.tokens = self.tokens
        self.answer = wider

    def load(self, further: torch.Tensor | None = None, *, behind: int = 0) -> DynamicCache:
        """The uncompressed cache, on the device.

        Args:
            further: (layers, 2, heads, n, head_dim) entries behind those parked, on any device.
            behind: leave out so many of the first tokens; a shared prefix is not read for it.
        """
        self.store.wait()
        spared = self.prefix is not None and self.prefix.tokens == behind
        parked, skipped = (replace(self, prefix=None), 0) if spared else (self, behind)
        cache, length = DynamicCache(), parked.length
        for layer in range(self.store.layers):
            whole = parked._layer(layer, 0 if further is None else further.shape[3])
            if further is not None:
                whole[:, length:] = further[layer].transpose(1, 2).to(self.store.device)
            keys, values = whole[:, skipped:].transpose(1, 2)
            cache.update(keys[None], values[None], layer)
        return cache

    def gather(self, places: Sequence[torch.Tensor]) -> DynamicCache:
        """A cache, on the device, of some of the entries; one whole layer is there at a time.

        Args:
            places: per layer (heads, kept) which tokens' entries, in the order that they get.
        """
        self.store.wait()
        cache = DynamicCache()
        for layer, kept in enumerate(places):
            index = kept.T[None, :, :, None].expand(2, -1, -1, self.store.head_dim)
            keys, values = self._layer(layer).gather(1, index).transpose(1, 2)
            cache.update(keys[None], values[None], layer)
        return cache

    def _layer(self, layer: int, room: int = 0) -> torch.Tensor:
        """One layer on the device, (2, tokens + room, heads, head_dim); the room is not filled."""
        whole, start = self.store.on_device(self.length + room), 0
        for part in self.parts:
            part.copy_layer(layer, whole[:, start : start + part.tokens])
            start += part.tokens
        return whole


class ColdStore:
    """Allocates the cold cache of a session's rows.

    Args:
        config: of the model.
        device: where the model is.
        dtype: of its entries.
        kind: "host" memory, or "disk": an unnamed file in ``folder``, deleted with its row.
        folder: for "disk"; None takes the system's folder of temporary files.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        kind: ColdKind = "host",
        folder: Path | None = None,
    ) -> None:
        if kind not in ("host", "disk"):
            raise ColdCacheError(f"the cold cache is on 'host' or 'disk', got {kind!r}")
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.layers, self.heads, self.head_dim = config.num_hidden_layers, int(heads), int(size)
        self.groups = config.num_attention_heads // self.heads
        self.device, self.dtype, self.kind, self.folder = device, dtype, kind, folder
        self._prefix: tuple[Prefix, Part] | None = None
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's entries in all layers."""
        return int(2 * self.layers * self.heads * self.head_dim * self.dtype.itemsize)

    def allocate(self, tokens: int) -> Part:
        """Room for some tokens, none of them filled.

        Raises:
            MemoryError, OSError, RuntimeError: there is no room.
        """
        shape = (self.layers, 2, tokens, self.heads, self.head_dim)
        wanted = tokens * self.bytes_per_token
        if self.kind == "disk":
            return Part(self._map_file(wanted).view(self.dtype).view(shape), 0)
        free = psutil.virtual_memory().available
        if wanted > free:
            raise MemoryError(f"{wanted} bytes of host memory wanted, {free} are free")
        pinned = self.device.type == "cuda"
        return Part(torch.empty(shape, dtype=self.dtype, pin_memory=pinned), 0)

    def on_device(self, tokens: int) -> torch.Tensor:
        """Uninitialised room for one layer's entries, (2, tokens, heads, head_dim)."""
        shape = (2, tokens, self.heads, self.head_dim)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def stage(self, tokens: int) -> Part | None:
        """Pinned memory that drafted tokens' entries leave the device for; None: they stay.

        They stay where the model is on the host already, or where there is no room.
        """
        if self.stream is None:
            return None
        shape = (self.layers, 2, tokens, self.heads, self.head_dim)
        try:
            return Part(torch.empty(shape, dtype=self.dtype, pin_memory=True), tokens)
        except REFUSALS:
            return None

    def _map_file(self, wanted: int) -> torch.Tensor:
        """Bytes of a new file; its disk blocks are allocated now, so no later write fails."""
        with tempfile.TemporaryFile(dir=self.folder, prefix="kvguard-") as file:
            os.posix_fallocate(file.fileno(), 0, wanted)
            return torch.frombuffer(mmap.mmap(file.fileno(), wanted), dtype=torch.uint8)

    def row(self, prefix: Prefix | None, tokens: int) -> ColdRow:
        """Room for a request: the prefix that it reuses, and the other tokens of its prompt.

        Raises:
            MemoryError, OSError, RuntimeError: there is no room.
        """
        shared = None if prefix is None else self.prefix(prefix)
        prompt = self.allocate(tokens)
        prompt.tokens = tokens
        return ColdRow(self, shared, prompt)

    def prefix(self, prefix: Prefix) -> Part:
        """The entries of a shared prefix, parked once."""
        if self._prefix is None or self._prefix[0] is not prefix:
            part = self.allocate(len(prefix.token_ids))
            part.tokens = len(prefix.token_ids)
            for layer, (keys, values) in enumerate(layer_tensors(prefix.cache)):
                self.copy_out(part.entries[layer, 0], keys[0].transpose(0, 1))
                self.copy_out(part.entries[layer, 1], values[0].transpose(0, 1))
            self._prefix = (prefix, part)
        return self._prefix[1]

    def copy_out(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy from the device without waiting for it; call `wait` before reading the copy."""
        if self.stream is None:
            target.copy_(source)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        source.record_stream(self.stream)

    def wait(self) -> None:
        """Wait until all copies from the device are complete."""
        if self.stream is not None:
            self.stream.synchronize()


class Draft(NamedTuple):
    """Tokens to run over a row's cold cache.

    Attributes:
        row: the cold cache; the tokens follow everything parked.
        token_ids: at least one.
    """

    row: ColdRow
    token_ids: Sequence[int]


class Run(NamedTuple):
    """What the pass says of one draft of n tokens.

    Attributes:
        hidden: (n, hidden size) after the final norm.
        entries: (layers, 2, heads, n, head_dim) of the tokens; in host memory where there was room.
        inputs: per layer (1, n, hidden size) what the attention was given; None where not asked.
        device_bytes: that the pass needed for this draft beyond what is kept: two layers of the
            row's cold cache with its tokens, and whatever of the tokens stays on the device.
        bytes_moved: of parked entries that the pass read, parts that rows share in equal parts, and
            of the tokens' own entries where they left the device.
        off_device: whether the tokens' entries left the device; on the host as if it were one.
    """

    hidden: torch.Tensor
    entries: torch.Tensor
    inputs: list[torch.Tensor] | None
    device_bytes: int
    bytes_moved: int
    off_device: bool


class _Pass:
    """Stands in for ``past_key_values``: the drafts of several rows, one behind the other.

    Args:
        store: of the rows.
        rows: their cold caches.
        counts: tokens of each row's draft.
        buffered: read the cold caches through `ColdLayers`, as a device that is not the host must.
    """

    is_compileable = False

    def __init__(
        self, store: ColdStore, rows: list[ColdRow], counts: list[int], *, buffered: bool
    ) -> None:
        self.store, self.rows, self.counts = store, rows, counts
        parts = [row.parts for row in rows]
        self.layers = ColdLayers(store, parts, counts) if buffered else None
        self.in_place = None
        if not buffered:
            self.in_place = HostAttention(
                parts, counts, heads=store.heads, groups=store.groups, dtype=store.dtype
            )
        self.staged = store.stage(sum(counts))
        self._kept: list[torch.Tensor] = []  # per layer, where they are not staged
        self.off_device = self.staged is not None or store.device.type == "cpu"

    def bytes_moved(self) -> list[int]:
        """Of each row, see `Run`; counted on the host as on a device of its own."""
        parts = [row.parts for row in self.rows]
        return moved_bytes(self.store, parts, [count * self.off_device for count in self.counts])

    def get_seq_length(self, layer: int = 0) -> int:
        """Part of the interface that models expect of a cache."""
        return 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, _: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the drafted tokens' entries, (1, heads, tokens, head_dim) each."""
        if self.staged is None:
            self._kept.append(torch.cat([keys, values]))
        else:
            self.store.copy_out(self.staged.entries[layer, 0], keys[0].transpose(0, 1))
            self.store.copy_out(self.staged.entries[layer, 1], values[0].transpose(0, 1))
        return keys, values

    def entries(self) -> torch.Tensor:
        """(layers, 2, heads, tokens, head_dim) of all drafted tokens, after the pass."""
        if self.staged is None:
            return torch.stack(self._kept)
        self.store.wait()
        return self.staged.entries.transpose(2, 3)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of each row's drafted tokens over its cold cache and themselves.

        Args:
            layer: number.
            query: (1, query heads, tokens, head_dim), all rows' tokens.
            key: (1, heads, tokens, head_dim).
            value: like key.
            scale: factor on the scores.

        Returns:
            (1, tokens, query heads, head_dim).
        """
        if self.in_place is not None:
            return self.in_place.attend(layer, query[0], self._kept[layer], scale)[None]
        assert self.layers is not None
        self.layers.begin(layer)
        mixed, start = [], 0
        for number, count in enumerate(self.counts):
            part = slice(start, start + count)
            start += count
            entries = self.layers.row(number, torch.stack([key[0, :, part], value[0, :, part]]))
            mixed.append(attend_whole(query[0, :, part], entries, scale))
        self.layers.end(layer)
        return torch.cat(mixed, dim=1).transpose(0, 1)[None]


def cold_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`_Pass.attend` as transformers calls attention; ``kvguard_cold`` is the pass."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return kwargs["kvguard_cold"].attend(module.layer_idx, query, key, value, scale), None


AttentionInterface.register(ATTENTION_NAME, cold_attention)


@contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run the model with another attention implementation."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


@torch.inference_mode()
def run_drafts(
    model: PreTrainedModel, drafts: Sequence[Draft], *, keep_inputs: bool = False
) -> list[Run]:
    """One pass of the uncompressed model over the drafts of several rows; parks nothing.

    Args:
        model: in eval mode.
        drafts: at least one; their cold caches come from one store.
        keep_inputs: keep what each attention layer was given, for presses that work on it later.

    Returns:
        One run a draft, in their order.
    """
    store = drafts[0].row.store
    store.wait()
    counts = [len(draft.token_ids) for draft in drafts]
    tokens = [token for draft in drafts for token in draft.token_ids]
    positions = torch.cat(
        [
            torch.arange(draft.row.length, draft.row.length + count)
            for draft, count in zip(drafts, counts, strict=True)
        ]
    ).to(model.device)
    layers = attention_layers(model)
    forget_masks(layers)
    inputs: list[torch.Tensor] = []

    def keep(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        inputs.append(kwargs["hidden_states"])

    buffered = store.device.type != "cpu"
    running = _Pass(store, [draft.row for draft in drafts], counts, buffered=buffered)
    with ExitStack() as stack:
        stack.enter_context(attention_of(model, ATTENTION_NAME))
        if keep_inputs:
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        output = model.model(
            input_ids=torch.tensor([tokens], device=model.device),
            position_ids=positions[None],
            cache_position=positions,
            past_key_values=running,
            use_cache=True,
            kvguard_cold=running,
        )
    entries = running.entries()  # (layers, 2, heads, tokens, head_dim)
    stays = running.staged is None and buffered
    needed = layer_bytes(store, [draft.row.parts for draft in drafts], counts)
    runs, start = [], 0
    for count, size, moved in zip(counts, needed, running.bytes_moved(), strict=True):
        part = slice(start, start + count)
        start += count
        own = [each[:, part] for each in inputs] if keep_inputs else None
        size += store.bytes_per_token * count if stays else 0
        size += sum(each.nbytes for each in own or ())
        hidden = output.last_hidden_state[0, part]
        new = entries[:, :, :, part]
        runs.append(Run(hidden, new, own, size, moved, running.off_device))
    return runs
