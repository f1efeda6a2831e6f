"""What the raw logits of one decoding step say, for a whole batch on its device.

One pass over the vocabulary finds the largest logits, one computes the exponentials; everything
else is read off those. Nothing is copied to the host but the finished (rows, 28) table.
"""

import threading
from typing import NamedTuple

import numpy as np
import torch

from kvguard.schema import SIGNALS, TOP_LOGPROBS

SIGNAL_NAMES = tuple(SIGNALS)
"""Column order of `Signals.table`."""

SIGNAL_INDEX = {name: column for column, name in enumerate(SIGNAL_NAMES)}

_CHUNK = 256
"""Vocabulary entries per chunk when searching the largest logits."""

_BLOCK_ENTRIES = 1 << 19
"""Logits that a CPU works on at once: what it makes of them stays in its caches."""

_workspace = threading.local()


class Signals(NamedTuple):
    """Signals of one step.

    Attributes:
        table: (rows, 28) float32 on the logits' device, columns `SIGNAL_NAMES`; NaN where a signal
            is undefined (``entropy_delta`` of the first token, alternatives without any mass).
        chosen: (rows,) int64, the tokens whose log-probability and rank the table holds.
    """

    table: torch.Tensor
    chosen: torch.Tensor

    @property
    def finite(self) -> torch.Tensor:
        """(rows,) bool; False where the logits hold NaN or +Inf, or nothing above -Inf."""
        return self.table[:, SIGNAL_INDEX["entropy"]].isfinite()


@torch.no_grad()
def extract_signals(
    logits: torch.Tensor,
    chosen: torch.Tensor | None = None,
    previous_entropy: torch.Tensor | None = None,
) -> Signals:
    """Compute all signals of one decoding step from raw logits.

    Entropies are in nats. The entropy of the alternatives is that of the distribution without its
    top token, renormalised; it is computed from the alternatives' own mass, so it stays accurate
    when the top token has nearly all of it.

    Args:
        logits: (rows, vocabulary), before any processor, any float type; computed in float32.
        chosen: (rows,) integer, the token that was taken; None: the argmax, found on the way (of
            tied tokens the first, as `torch.argmax` has it).
        previous_entropy: (rows,) entropy of each row's previous token, NaN where there is none;
            None: no row has one.

    Returns:
        The table, and the tokens that were taken.

    Raises:
        ValueError: the shapes do not fit, or the vocabulary has fewer than 20 entries.
    """
    if logits.ndim != 2 or (chosen is not None and chosen.shape != logits.shape[:1]):
        raise ValueError(
            f"logits must be (rows, vocabulary) and chosen (rows,), got {tuple(logits.shape)} "
            f"and {None if chosen is None else tuple(chosen.shape)}"
        )
    vocabulary = logits.shape[1]
    if vocabulary < TOP_LOGPROBS:
        raise ValueError(f"logits: need {TOP_LOGPROBS} vocabulary entries, got {vocabulary}")
    logits = logits.float()
    top, top_ids = largest(logits, TOP_LOGPROBS)  # (rows, 20), descending
    peak = top[:, :1]
    mean_shifted, alternatives, weighted = _masses(logits, peak, top_ids[:, :1])
    if logits.device.type == "cpu" and np.isnan(weighted.numpy()).any():
        mean_shifted, alternatives, weighted = _masses(logits, peak, top_ids[:, :1], floor=True)
    total = alternatives + 1.0
    log_total = total.log()
    entropy = log_total - weighted / total
    alternatives_entropy = alternatives.log() - weighted / alternatives  # NaN without any mass
    top_logprobs = top - peak - log_total[:, None]
    if chosen is None:
        chosen = _argmax(logits, top, top_ids)
        rank = torch.zeros_like(entropy)
        chosen_logprob = -log_total
    else:
        chosen_logit = logits.gather(1, chosen[:, None])
        rank = _rank(logits, top, chosen_logit)
        chosen_logprob = (chosen_logit - peak).squeeze(1) - log_total
    if previous_entropy is None:
        delta = torch.full_like(entropy, float("nan"))
    else:
        delta = entropy - previous_entropy.to(entropy)
    top5 = top_logprobs[:, :5].exp()
    columns = {
        "entropy": entropy,
        "alternatives_entropy": alternatives_entropy,
        "top1_probability": top5[:, 0],
        "top5_probability": top5.sum(dim=1),
        "mean_logprob": mean_shifted - log_total,
        "entropy_delta": delta,
        "chosen_logprob": chosen_logprob,
        "chosen_rank": rank,
    }
    leading = [columns[name] for name in SIGNAL_NAMES[: len(columns)]]
    return Signals(torch.cat([torch.stack(leading, dim=1), top_logprobs], dim=1), chosen)


def _masses(
    logits: torch.Tensor, peak: torch.Tensor, peak_ids: torch.Tensor, *, floor: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sums over the vocabulary, with y = logit - peak, so that the top token has mass 1.

    On a CPU a few rows are worked on at a time, in memory that stays: fresh pages would cost more
    than the arithmetic.

    Args:
        logits: (rows, vocabulary) float32.
        peak: (rows, 1) the largest.
        peak_ids: (rows, 1) where it is.
        floor: a forbidden token (-inf) has no mass, but 0 times -inf is NaN: bound y where it is
            weighted. Elsewhere than on a CPU always done, so that the host need not ask.

    Returns:
        Mean of y over the vocabulary; sums of exp(y) and of y exp(y) over the alternatives to the
        top token; (rows,) each.
    """
    rows, vocabulary = logits.shape
    on_host = logits.device.type == "cpu"
    block = min(rows, max(1, _BLOCK_ENTRIES // vocabulary)) if on_host else rows
    held = _scratch(block, vocabulary) if on_host else logits.new_empty(2, rows, vocabulary)
    sums = []
    for start in range(0, max(rows, 1), max(block, 1)):
        part = slice(start, min(start + block, rows))
        shifted, mass = held[:, : part.stop - part.start]
        torch.sub(logits[part], peak[part], out=shifted)
        mean = shifted.mean(dim=1)
        torch.exp(shifted, out=mass)
        mass.scatter_(1, peak_ids[part], 0.0)
        if floor or not on_host:
            shifted.clamp_(min=-1e4)
        sums.append((mean, mass.sum(dim=1), shifted.mul_(mass).sum(dim=1)))
    if len(sums) == 1:
        return sums[0]
    mean, alternatives, weighted = (torch.cat(parts) for parts in zip(*sums, strict=True))
    return mean, alternatives, weighted


def log_total(logits: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """Logarithm of the sum of exp(logit - peak) over the vocabulary.

    On a CPU in memory that stays, a few rows at a time.

    Args:
        logits: (rows, vocabulary) float32.
        peak: (rows,) the largest of each row.

    Returns:
        (rows,) at least 0; a token's log-probability is its logit less its row's peak and this.
    """
    rows, vocabulary = logits.shape
    if logits.device.type != "cpu":
        return logits.logsumexp(dim=1) - peak
    block = max(1, min(rows, _BLOCK_ENTRIES // vocabulary))
    shifted = _scratch(block, vocabulary)[0]
    sums = []
    for start in range(0, rows, block):
        part = logits[start : start + block]
        held = shifted[: len(part)]
        torch.sub(part, peak[start : start + block, None], out=held)
        sums.append(held.exp_().sum(dim=1))
    return torch.cat(sums).log()


def _scratch(rows: int, vocabulary: int) -> torch.Tensor:
    """Uninitialised (2, rows, vocabulary) memory of this thread."""
    wanted = 2 * rows * vocabulary
    held: torch.Tensor | None = getattr(_workspace, "held", None)
    if held is None or len(held) < wanted:
        with torch.inference_mode(False):  # of use in and out of that mode
            held = _workspace.held = torch.empty(wanted, dtype=torch.float32)
    return held[:wanted].view(2, rows, vocabulary)


def largest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest entries of each row, exactly, in descending order.

    The ``count`` largest entries lie in the ``count`` chunks with the largest maxima; searching
    there alone is several times faster on a CPU than a top-k over the whole vocabulary.

    Args:
        logits: (rows, vocabulary).
        count: how many.

    Returns:
        Values and vocabulary indices, (rows, count) each.
    """
    rows, vocabulary = logits.shape
    chunks = vocabulary // _CHUNK
    if logits.device.type != "cpu" or chunks <= 2 * count:
        values, indices = logits.topk(count, dim=1)
        return values, indices
    body = logits[:, : chunks * _CHUNK].view(rows, chunks, _CHUNK)
    best = body.amax(dim=2).topk(count, dim=1).indices  # (rows, count) chunk numbers
    found = body[torch.arange(rows)[:, None], best].view(rows, count * _CHUNK)
    if chunks * _CHUNK < vocabulary:
        found = torch.cat([found, logits[:, chunks * _CHUNK :]], dim=1)
    values, within = found.topk(count, dim=1)
    chunk = within.div(_CHUNK, rounding_mode="floor")
    if chunks * _CHUNK == vocabulary:
        return values, within + (best.gather(1, chunk) - chunk) * _CHUNK
    shift = (best.gather(1, chunk.clamp(max=count - 1)) - chunk) * _CHUNK
    tail = (chunks - count) * _CHUNK  # what stands behind the chunks comes after those found
    return values, within + torch.where(chunk < count, shift, tail)


def peaks(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest value of each row and where it stands first, NaN above all: `torch.max`, but faster.

    On a CPU NumPy's argmax takes a tenth of the time.

    Args:
        logits: (rows, vocabulary).

    Returns:
        Values and vocabulary indices, (rows,) each.
    """
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        host = logits.numpy()
        best = host.argmax(axis=1)
        return torch.from_numpy(host[np.arange(len(host)), best]), torch.from_numpy(best)
    found = logits.max(dim=1)
    return found.values, found.indices


def _argmax(logits: torch.Tensor, top: torch.Tensor, top_ids: torch.Tensor) -> torch.Tensor:
    """(rows,) the first of each row's largest entries, from the largest ones already found."""
    tied = top == top[:, :1]
    if logits.device.type != "cpu" or bool(tied[:, -1].any()):  # perhaps more ties than were kept
        return peaks(logits)[1]
    beyond = logits.shape[1] - 1  # of a row of NaN, where nothing equals anything
    return torch.where(tied, top_ids, beyond).amin(dim=1)


def _rank(logits: torch.Tensor, top: torch.Tensor, chosen_logit: torch.Tensor) -> torch.Tensor:
    """How many entries lie strictly above the chosen one, (rows,) float32.

    On a CPU the stored ones usually tell; elsewhere asking would make the host wait for the device.
    """
    rank = (top > chosen_logit).sum(dim=1)
    if logits.device.type != "cpu" or (rank.numpy() == top.shape[1]).any():
        rank = (logits > chosen_logit).sum(dim=1)
    return rank.float()
