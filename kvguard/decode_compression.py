"""Compression while decoding: a press's own steps, on one row of a batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from kvpress import BasePress, CompressionRatioDecodingPress
from transformers import PreTrainedModel

from kvguard.prefill import after_attention
from kvguard.presses import fresh
from kvguard.slots import Slots

if TYPE_CHECKING:
    from kvguard.requests import Row


class DecodeState:
    """One row's compression while decoding: kvpress's DecodingPress, on that row alone.

    It counts steps and keeps hidden states per layer as the press's own hook does for a batch of
    one, and calls the press's ``compress`` on the row's unpadded slice. A press that fails there
    ends its own row with an error.
    """

    def __init__(self, model: PreTrainedModel, slots: Slots, press: BasePress, seed: int) -> None:
        self.slots, self.seed = slots, seed
        self.error: str | None = None
        copied: Any = fresh(press)
        self.press = copied
        self.press.post_init_from_model(model)
        self.steps = self.seen = 0
        self.due = False
        self.hidden: list[list[torch.Tensor]] = [[] for _ in range(self.slots.layers)]

    def begin(self, seen: int) -> None:
        """A step starts; with its token the row has seen ``seen`` tokens, the prompt's too."""
        self.seen = seen
        self.steps += 1
        if isinstance(self.press, CompressionRatioDecodingPress):
            target = max(1, int(seen * (1 - self.press.target_compression_ratio)))
        else:
            target = self.press.target_size
        self.due = self.steps >= self.press.compression_interval or target <= 1
        if self.due:
            self.steps = 0

    def after_layer(self, row: int, layer: Any, kwargs: dict[str, Any]) -> None:
        """Record the row's hidden state; compress its slice of this layer when it is due."""
        if self.error is not None:
            return
        number: int = layer.layer_idx
        own = _row_arguments(kwargs, row)
        buffer = self.hidden[number]
        buffer.append(own["hidden_states"])
        if self.due:
            keys, values = self.slots.entries(number, row)
            device = keys.device
            try:
                with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                    torch.manual_seed((self.seed * 1_000_003 + self.seen * 1_009 + number) % 2**63)
                    keys, values = self.press.compress(
                        layer, torch.cat(buffer, dim=1), keys, values, None, own
                    )
                self.slots.write(number, row, keys[0].clone(), values[0].clone())
            except (AssertionError, IndexError, RuntimeError, ValueError) as error:
                name = type(self.press.base_press).__name__
                self.error = f"{name} while decoding: {type(error).__name__}: {error}"
            buffer.clear()
        size = self.press.hidden_states_buffer_size
        del buffer[: max(len(buffer) - size, 0)]

    def replace_tail(self, dropped: int, inputs: list[torch.Tensor], start: int, end: int) -> None:
        """A check has replaced the row's newest entries, all of them newer than any compression.

        Args:
            dropped: entries that went.
            inputs: per layer (1, tokens, hidden size) what the check gave to the attention.
            start: first of those tokens whose entry came in their place.
            end: behind the last one.
        """
        self.steps += end - start - dropped
        for buffer, given in zip(self.hidden, inputs, strict=True):
            del buffer[max(len(buffer) - dropped, 0) :]
            buffer += [given[:, token : token + 1] for token in range(start, end)]
            del buffer[: max(len(buffer) - self.press.hidden_states_buffer_size, 0)]


@contextmanager
def compressing(model: PreTrainedModel, rows: "Sequence[Row]") -> Iterator[None]:
    """Hooks that let each row's own press see its own slice after each attention layer."""

    def compress(layer: Any, _: Any, kwargs: dict[str, Any], output: Any) -> Any:
        for number, row in enumerate(rows):
            if row.decode is not None and not row.sits_out:
                row.decode.after_layer(number, layer, kwargs)
                row.completion.error = row.completion.error or row.decode.error
        return output

    with after_attention(model, compress):
        yield


def _row_arguments(kwargs: dict[str, Any], row: int) -> dict[str, Any]:
    """An attention layer's keyword arguments as a batch of this row alone would see them."""
    one = slice(row, row + 1)
    cos, sin = kwargs["position_embeddings"]
    return kwargs | {
        "hidden_states": kwargs["hidden_states"][one],
        "position_embeddings": (cos[one], sin[one]),
        "position_ids": kwargs["position_ids"][one],
        "cache_position": kwargs["position_ids"][row],
        "attention_mask": None,
    }
