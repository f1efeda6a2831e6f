"""A recurrent predictor of harm: a small GRU over the signals of an answer, token by token.

The rival that HALT proposes (arXiv 2602.02888): a sequence model over the 20 largest
log-probabilities of each token, here with the entropies, the position and the probes of the
request. `SequencePredictor.predict` scores whole answers, `SequencePredictor.advance` the next
token of each row with a state that it hands on; both run the same recurrence in NumPy, float64, one
token at a time. Fitting needs torch. The file is safetensors for the weights and JSON for the rest.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.special import expit

from kvguard import schema
from kvguard.predictor import PredictorError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

SEQUENCE_SIGNALS: tuple[str, ...] = (
    *("entropy", "alternatives_entropy", "chosen_logprob", "entropy_delta", "relative_position"),
    *(f"top_logprob_{rank:02d}" for rank in range(schema.TOP_LOGPROBS)),
)
"""What the GRU reads beside probes, names of `schema.FEATURE_NAMES`."""

LOWEST = -20.0
"""Nats; a smaller log-probability counts as this."""

DECIMALS = 5
"""Scores are rounded so: a batch of another size may differ in the last bits of a product."""

_WEIGHTS = ("input", "hidden", "input_bias", "hidden_bias", "head", "head_bias", "means", "scales")


class SequenceSettings(BaseModel):
    """How a `SequencePredictor` is fitted; nothing of it is searched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.2, ge=0, lt=1, description="of the inputs, while fitting")
    learning_rate: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=1e-3, ge=0)
    max_epochs: int = Field(default=40, ge=1)
    patience: int = Field(default=6, ge=1, description="epochs without a smaller watched loss")
    batch: int = Field(default=64, ge=1)
    watched_share: float = Field(default=0.25, gt=0, lt=1, description="of the prompts")


class SequencePredictor:
    """A GRU with a linear head; make it with `fit_sequence_predictor` or `load_sequence_predictor`.

    Attributes:
        feature_names: the columns that it reads, in order.
        feature_version: of the features that it was fitted on.
        target: what it forecasts.
        weights: arrays by name, see `save_sequence_predictor`.
        provenance: seeds, settings, counts.
    """

    def __init__(
        self,
        feature_names: Sequence[str],
        target: str,
        weights: dict[str, NDArray[Any]],
        provenance: dict[str, Any],
        feature_version: int = schema.FEATURE_VERSION,
    ) -> None:
        self.feature_names, self.target = tuple(feature_names), target
        self.feature_version = feature_version
        self.weights = {name: np.asarray(weights[name], np.float64) for name in _WEIGHTS}
        self.provenance = provenance

    @property
    def hidden(self) -> int:
        """Size of the state."""
        return int(self.weights["hidden"].shape[1])

    def start(self, rows: int) -> Floats:
        """The state (rows, hidden) before the first token."""
        return np.zeros((rows, self.hidden))

    def advance(self, state: Floats, inputs: NDArray[Any]) -> tuple[Floats, Floats]:
        """Take the next token of each row.

        Args:
            state: (n, hidden) of `start` or the last call.
            inputs: (n, features) in the order of ``feature_names``; NaN: missing.

        Returns:
            The new state, and the log-odds (n,) that the request is harmed; higher is riskier.
        """
        own = self.weights
        values = _standardised(inputs, own["means"], own["scales"])
        size = self.hidden
        from_input = values @ own["input"].T + own["input_bias"]  # reset, update, new
        from_state = state @ own["hidden"].T + own["hidden_bias"]
        reset = expit(from_input[:, :size] + from_state[:, :size])
        update = expit(from_input[:, size : 2 * size] + from_state[:, size : 2 * size])
        new = np.tanh(from_input[:, 2 * size :] + reset * from_state[:, 2 * size :])
        state = (1 - update) * new + update * state
        return state, np.round(state @ own["head"] + own["head_bias"], DECIMALS)

    def predict(self, inputs: NDArray[Any], lengths: NDArray[np.int64]) -> Floats:
        """Log-odds of every token of whole answers: (tokens,).

        Args:
            inputs: (tokens, features) answer after answer.
            lengths: (answers,) tokens of each; they sum to ``tokens``.

        Raises:
            ValueError: another number of columns or of tokens.
        """
        if inputs.ndim != 2 or inputs.shape != (int(lengths.sum()), len(self.feature_names)):
            raise ValueError(
                f"inputs have shape ({int(lengths.sum())}, {len(self.feature_names)}): one row a "
                f"token, columns {self.feature_names}; got {inputs.shape}"
            )
        starts = np.cumsum(lengths) - lengths
        scores = np.empty(len(inputs))
        state = self.start(len(lengths))
        for position in range(int(lengths.max(initial=0))):
            rows = np.flatnonzero(lengths > position)
            at = starts[rows] + position
            state[rows], scores[at] = self.advance(state[rows], inputs[at])
        return scores


def fit_sequence_predictor(
    inputs: NDArray[Any],
    lengths: NDArray[np.int64],
    harmed: Bools,
    prompts: Sequence[str],
    feature_names: Sequence[str],
    *,
    target: str = "harm",
    seed: int = 0,
    settings: SequenceSettings | None = None,
) -> SequencePredictor:
    """Fit a GRU to "this request is harmed", asked after every token.

    Every request weighs the same, whatever its length. A share of the prompts watches: the epoch
    with the smallest loss on them is kept. One thread, float32, the same weights for a seed.

    Args:
        inputs: (tokens, features) answer after answer; NaN: missing.
        lengths: (answers,).
        harmed: (answers,).
        prompts: (answers,) the prompt of each: a prompt is fitted or watches, never both.
        feature_names: the columns.
        target: kept in the predictor.
        seed: of weights, order and dropout.
        settings: None takes the defaults.

    Raises:
        ValueError: no harmed or no unharmed answer, or fewer than two prompts.
    """
    settings = settings or SequenceSettings()
    names = np.asarray(prompts)
    unique = np.unique(names)
    if harmed.all() or not harmed.any() or len(unique) < 2:
        raise ValueError(
            f"prompts: {int(harmed.sum())} of {len(harmed)} answers of {len(unique)} prompts are "
            "harmed; both kinds and two prompts are needed"
        )
    rng = np.random.default_rng(seed)
    count = min(max(round(settings.watched_share * len(unique)), 1), len(unique) - 1)
    watched = np.isin(names, rng.permutation(unique)[:count])
    owner = np.repeat(np.arange(len(lengths)), lengths)
    clipped = _clipped(inputs)
    fitted = clipped[~watched[owner]]
    known = ~np.isnan(fitted).all(axis=0)
    means, scales = np.zeros(fitted.shape[1]), np.ones(fitted.shape[1])
    means[known] = np.nanmean(fitted[:, known], axis=0)
    scales[known] = np.nanstd(fitted[:, known], axis=0)
    scales[~(scales > 0)] = 1.0
    values, mask = _padded(_standardised(inputs, means, scales), lengths)
    torch_state = torch.random.get_rng_state()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        weights, epochs = _train(values, mask, harmed, watched, settings)
    finally:
        torch.random.set_rng_state(torch_state)
        torch.set_num_threads(threads)
    provenance = {
        "seed": seed,
        "settings": settings.model_dump(mode="json"),
        "epochs": epochs,
        "prompts": len(unique),
        "requests": len(lengths),
        "harmed": int(harmed.sum()),
    }
    weights |= {"means": means, "scales": scales}
    return SequencePredictor(feature_names, target, weights, provenance)


def _train(
    values: torch.Tensor,
    mask: torch.Tensor,
    harmed: Bools,
    watched: Bools,
    settings: SequenceSettings,
) -> tuple[dict[str, NDArray[Any]], int]:
    """Weights of the epoch with the smallest watched loss, and how many epochs there were."""
    labels = torch.from_numpy(harmed.astype(np.float32))
    token_weights = mask / mask.sum(dim=1, keepdim=True)
    gru = torch.nn.GRU(values.shape[2], settings.hidden, batch_first=True)
    head = torch.nn.Linear(settings.hidden, 1)
    dropout = torch.nn.Dropout(settings.dropout)
    modules = torch.nn.ModuleList([gru, head, dropout])
    optimiser = torch.optim.AdamW(
        modules.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )

    def loss(rows: torch.Tensor) -> torch.Tensor:
        states = gru(dropout(values[rows]))[0]  # (n, T, hidden)
        odds = head(states)[..., 0]
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            odds, labels[rows, None].expand_as(odds), reduction="none"
        )
        return (each * token_weights[rows]).sum() / len(rows)

    fitted = torch.from_numpy(np.flatnonzero(~watched))
    watching = torch.from_numpy(np.flatnonzero(watched))
    best, kept, since, epochs = np.inf, _weights(gru, head), 0, 0
    while epochs < settings.max_epochs and since < settings.patience:
        epochs += 1
        modules.train()
        order = fitted[torch.randperm(len(fitted))]
        for first in range(0, len(order), settings.batch):
            rows = order[first : first + settings.batch]
            optimiser.zero_grad()
            loss(rows).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        modules.eval()
        with torch.inference_mode():
            now = float(loss(watching))
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


def _clipped(inputs: NDArray[Any]) -> Floats:
    return np.asarray(np.maximum(np.asarray(inputs, np.float64), LOWEST), np.float64)


def _standardised(inputs: NDArray[Any], means: Floats, scales: Floats) -> Floats:
    """Standard deviations from the mean; a missing value counts as the mean."""
    return np.asarray(np.nan_to_num((_clipped(inputs) - means) / scales), np.float64)


def _padded(values: Floats, lengths: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """(answers, T, features) float32 and the mask (answers, T) of tokens that are there."""
    mask = np.arange(int(lengths.max())) < lengths[:, None]
    grid = np.zeros((*mask.shape, values.shape[1]), np.float32)
    grid[mask] = values
    return torch.from_numpy(grid), torch.from_numpy(mask.astype(np.float32))


def save_sequence_predictor(predictor: SequencePredictor, path: str | Path) -> None:
    """Write ``path`` (safetensors) and, beside it, the same name with ``.json``; all or nothing."""
    path = Path(path)
    content = {
        "feature_names": list(predictor.feature_names),
        "feature_version": predictor.feature_version,
        "target": predictor.target,
        "provenance": predictor.provenance,
    }
    weights = {name: np.ascontiguousarray(value) for name, value in predictor.weights.items()}
    with schema.atomic_path(path) as temporary:
        save_file({name: np.atleast_1d(value) for name, value in weights.items()}, temporary)
    with schema.atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def load_sequence_predictor(path: str | Path) -> SequencePredictor:
    """Read what `save_sequence_predictor` wrote.

    Raises:
        FileNotFoundError: one of the two files is missing; names it.
        PredictorError: another feature version, missing weights, or shapes that do not fit.
    """
    path = Path(path)
    beside = path.with_suffix(".json")
    for file in (path, beside):
        if not file.is_file():
            raise FileNotFoundError(f"no sequence predictor at {file}")
    try:
        content, weights = json.loads(beside.read_text()), dict(load_file(path))
    except (ValueError, SafetensorError) as error:
        raise PredictorError(f"{path} or {beside} cannot be read: {error}") from None
    if not isinstance(content, dict) or not {"feature_names", "target"} <= set(content):
        raise PredictorError(f"{beside} does not describe a sequence predictor")
    version = content.get("feature_version")
    if version != schema.FEATURE_VERSION:
        raise PredictorError(
            f"{path} was trained on feature version {version!r}, this package computes feature "
            f"version {schema.FEATURE_VERSION}: fit it again"
        )
    missing = [name for name in _WEIGHTS if name not in weights]
    if missing:
        raise PredictorError(f"{path} lacks the weights {missing}")
    names = content["feature_names"]
    size = weights["hidden"].shape[-1]
    expected = {"input": (3 * size, len(names)), "hidden": (3 * size, size), "head": (size,)}
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise PredictorError(f"{path}: {name} has shape {weights[name].shape}, not {shape}")
    weights["head_bias"] = weights["head_bias"].reshape(())
    return SequencePredictor(
        names, content["target"], weights, content.get("provenance", {}), version
    )
