"""Fitting of a sequence predictor: a small GRU over the signals of an answer, token by token.

HALT's proposal (arXiv 2602.02888): a sequence model over the 20 largest log-probabilities of each
token, here with the entropies, the position and the probes of the request. What it runs while
decoding is `kvguard.gru`, which needs no torch; fitting does.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvguard.config_predictor import SequenceSettings
from kvguard.gru import Gru, clipped, standardised

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def watched_prompts(prompts: Sequence[str], share: float, seed: int) -> Bools:
    """(answers,) whether the prompt of each is among a share drawn from all; at least one is.

    Args:
        prompts: (answers,) the prompt of each.
        share: of the prompts.
        seed: of the draw.
    """
    names = np.asarray(prompts)
    unique = np.unique(names)
    count = min(max(round(share * len(unique)), 1), len(unique) - 1)
    drawn = np.random.default_rng(seed).permutation(unique)[:count]
    return np.asarray(np.isin(names, drawn), np.bool_)


def fit_gru(
    inputs: NDArray[Any],
    lengths: NDArray[np.int64],
    labels: Bools,
    watched: Bools,
    *,
    seed: int = 0,
    settings: SequenceSettings | None = None,
) -> tuple[Gru, int]:
    """Fit a GRU to a question that is asked after every token.

    Every answer weighs the same, whatever its length. The weights of the epoch with the smallest
    loss on the answers that watch are kept. One thread, float32, the same weights for a seed.

    Args:
        inputs: (tokens, features) answer after answer; NaN: missing.
        lengths: (answers,).
        labels: (tokens,).
        watched: (answers,) not fitted: they choose the epoch.
        seed: of weights, order and dropout.
        settings: None takes the defaults.

    Returns:
        The unit, and how many epochs were run.

    Raises:
        ValueError: no positive or no negative token, or no answer that watches or none that does
            not.
    """
    if labels.all() or not labels.any() or watched.all() or not watched.any():
        raise ValueError(
            f"labels: {int(labels.sum())} of {len(labels)} tokens are positive and "
            f"{int(watched.sum())} of {len(watched)} answers watch; both kinds of both are needed"
        )
    settings = settings or SequenceSettings()
    fitted = clipped(inputs[np.repeat(~watched, lengths)])
    known = ~np.isnan(fitted).all(axis=0)
    means, scales = np.zeros(fitted.shape[1]), np.ones(fitted.shape[1])
    means[known] = np.nanmean(fitted[:, known], axis=0)
    scales[known] = np.nanstd(fitted[:, known], axis=0)
    scales[~(scales > 0)] = 1.0
    values = torch.from_numpy(standardised(inputs, means, scales).astype(np.float32))
    torch_state = torch.random.get_rng_state()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        weights, epochs = _train(values, lengths, labels, watched, settings)
    finally:
        torch.random.set_rng_state(torch_state)
        torch.set_num_threads(threads)
    return Gru(weights | {"means": means, "scales": scales}), epochs


def _train(
    values: torch.Tensor,
    lengths: NDArray[np.int64],
    labels: Bools,
    watched: Bools,
    settings: SequenceSettings,
) -> tuple[dict[str, NDArray[Any]], int]:
    """Weights of the epoch with the smallest watched loss, and how many epochs there were."""
    wanted = torch.from_numpy(labels.astype(np.float32))
    starts = torch.from_numpy(np.cumsum(lengths) - lengths)
    sizes = torch.from_numpy(np.asarray(lengths, np.int64))
    gru = torch.nn.GRU(values.shape[1], settings.hidden, batch_first=True)
    head = torch.nn.Linear(settings.hidden, 1)
    dropout = torch.nn.Dropout(settings.dropout)
    modules = torch.nn.ModuleList([gru, head, dropout])
    optimiser = torch.optim.AdamW(
        modules.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )

    steps = torch.arange(int(lengths.max()))

    def loss(rows: torch.Tensor) -> torch.Tensor:
        """Summed over answers (n,) of their mean over tokens."""
        size = sizes[rows, None]
        there = steps < size  # (n, T)
        at = torch.where(there, starts[rows, None] + steps, 0)
        inputs = values[at] * there[..., None]
        odds = head(gru(dropout(inputs))[0])[..., 0]
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            odds, wanted[at], reduction="none"
        )
        return (each * (there / size)).sum()

    fitted = torch.from_numpy(np.flatnonzero(~watched))
    watching = torch.from_numpy(np.flatnonzero(watched))
    best, kept, since, epochs = np.inf, _weights(gru, head), 0, 0
    while epochs < settings.max_epochs and since < settings.patience:
        epochs += 1
        modules.train()
        order = fitted[torch.randperm(len(fitted))]
        for rows in torch.split(order, settings.batch):
            optimiser.zero_grad()
            (loss(rows) / len(rows)).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        modules.eval()
        with torch.inference_mode():
            parts = [float(loss(rows)) for rows in torch.split(watching, 512)]
        now = sum(parts) / len(watching)
        since = 0 if now < best else since + 1
        if now < best:
            best, kept = now, _weights(gru, head)
    return kept, epochs


def _weights(gru: torch.nn.GRU, head: torch.nn.Linear) -> dict[str, NDArray[Any]]:
    own = dict(gru.named_parameters())
    named: dict[str, torch.Tensor] = {
        "input": own["weight_ih_l0"],
        "hidden": own["weight_hh_l0"],
        "input_bias": own["bias_ih_l0"],
        "hidden_bias": own["bias_hh_l0"],
        "head": head.weight[0],
        "head_bias": head.bias[0],
    }
    return {name: tensor.detach().numpy().copy() for name, tensor in named.items()}
