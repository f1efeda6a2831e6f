"""The raw logits of a small batch's last steps, until their signals are computed together.

In a small batch the signals cost little more than the calls that compute them, so those of several
steps are computed in one.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from kvguard.signals import SIGNAL_INDEX, extract_signals

DEFERRED_ROWS = 16
"""Rows of logits, over all buffers, that wait for their signals at most."""


class LogitsBuffers:
    """Buffers of one step's logits each; those of a batch above 8 rows are one buffer.

    Args:
        rows: of the batch.
        vocabulary: entries of a row.
        device: of the model.
        dtype: of the model's logits.
    """

    def __init__(
        self, rows: int, vocabulary: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        count = max(1, DEFERRED_ROWS // max(1, rows))
        self._buffers = torch.zeros((count, rows, vocabulary), dtype=dtype, device=device)
        self._index = 0
        # Buffer, positions and tokens of the steps that have no signals yet.
        self._waiting: list[tuple[int, NDArray[np.int64], NDArray[np.int64]]] = []

    @property
    def current(self) -> torch.Tensor:
        """(rows, vocabulary) of the step at work, to be written and read."""
        return self._buffers[self._index]

    @property
    def defer(self) -> bool:
        """Whether there is room for several steps, so that signals may wait."""
        return len(self._buffers) > 1

    @property
    def full(self) -> bool:
        """Whether the signals must be computed before the next step."""
        return len(self._waiting) == len(self._buffers)

    def add(self, positions: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        """Keep the current logits until `compute_signals`.

        Args:
            positions: (active,) of the tokens among the generated ones.
            tokens: (active,) chosen from the current logits.
        """
        self._waiting.append((self._index, positions, tokens))

    def next(self) -> None:
        """Move to a buffer whose signals are computed; there must be one."""
        assert not self.full
        self._index = (self._index + 1) % len(self._buffers) if self._waiting else 0

    def compute_signals(self, signals: NDArray[np.float32]) -> None:
        """Compute the signals of all steps that have none, and write them.

        Args:
            signals: (rows, tokens, 28); the entropy of earlier tokens is read from it.
        """
        if not self._waiting:
            return
        rows = np.concatenate([np.arange(len(tokens)) for _, _, tokens in self._waiting])
        positions = np.concatenate([positions for _, positions, _ in self._waiting])
        tokens = torch.from_numpy(np.concatenate([tokens for _, _, tokens in self._waiting]))
        logits = self._logits()
        table = extract_signals(logits, tokens.to(logits.device)).table.cpu().numpy()
        self._waiting.clear()
        entropy, delta = SIGNAL_INDEX["entropy"], SIGNAL_INDEX["entropy_delta"]
        signals[rows, positions] = table
        before = np.maximum(positions - 1, 0)
        previous = np.where(positions > 0, signals[rows, before, entropy], np.nan)
        signals[rows, positions, delta] = table[:, entropy] - previous

    def _logits(self) -> torch.Tensor:
        """(waiting rows, vocabulary) of the waiting steps, in order.

        The buffers themselves, without a copy, where they are consecutive and full.
        """
        buffers = [buffer for buffer, _, _ in self._waiting]
        rows = self._buffers.shape[1]
        full = all(len(tokens) == rows for _, _, tokens in self._waiting)
        if full and buffers == list(range(buffers[0], buffers[0] + len(buffers))):
            return self._buffers[buffers[0] : buffers[-1] + 1].flatten(0, 1)
        return torch.cat(
            [self._buffers[buffer, : len(tokens)] for buffer, _, tokens in self._waiting]
        )
