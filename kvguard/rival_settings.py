"""What the rivals learn before the test: when a clock alarms, above which score a gate promotes.

Each is chosen per condition, which is the strongest form of the rival: the number that best parts
harmed requests from the others (Youden's index: the share of harmed requests that it catches minus
the share of the others that it alarms). Clocks are chosen on train prompts, gates on calibration
prompts; test prompts play no part.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict

from kvguard import schema
from kvguard.config import BASELINE
from kvguard.predictor import Predictor, parse_predictor
from kvguard.schema import CONDITION, PROBE_NAMES, TRACE_KEYS

NO_GATE = "no gate was trained on probes: its score is the entropy of the first token"
"""Note of a run of ``gate`` that does without them."""


class RivalSetting(BaseModel):
    """One condition's numbers.

    Attributes:
        model, press, ratio: the condition.
        clock_tokens: `clock_or_loop` alarms at so many tokens.
        gate_threshold: `gate` promotes above this score.
        train_harmed, calibration_harmed: harmed requests that the choice saw; without any a clock
            never alarms by itself and a gate promotes nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    press: str
    ratio: str
    clock_tokens: int
    gate_threshold: float
    train_harmed: int
    calibration_harmed: int


class Cutoff(NamedTuple):
    """A number above or at which a rival alarms, and Youden's index that it reached."""

    value: float
    youden: float


def best_cutoff(scores: NDArray[np.float64], harmed: NDArray[np.bool_]) -> Cutoff | None:
    """The cutoff, alarm at or above it, with the largest Youden index; the highest of equal ones.

    Args:
        scores: (n,) NaN: no score, never an alarm.
        harmed: (n,).

    Returns:
        None where no cutoff does better than chance.
    """
    known = np.isfinite(scores)
    if not harmed.any() or harmed.all() or not known.any():
        return None
    cutoffs = np.unique(scores[known])[::-1]
    alarms = scores >= cutoffs[:, None]  # (cutoffs, n)
    youden = alarms[:, harmed].mean(axis=1) - alarms[:, ~harmed].mean(axis=1)
    best = int(youden.argmax())
    return Cutoff(float(cutoffs[best]), float(youden[best])) if youden[best] > 0 else None


def load_gate(path: str | Path) -> Predictor | None:
    """The trained gate out of baselines.json, that of harm; None where there is none."""
    gates = json.loads(Path(path).read_text()).get("gate", {})
    return parse_predictor(gates["harm"], str(path)) if "harm" in gates else None


def gate_scores(
    gate: Predictor, probes: NDArray[np.floating], press: str | ArrayLike = ""
) -> NDArray[np.float32]:
    """What a gate says of requests, live and of stored traces alike.

    Args:
        gate: from `load_gate`.
        probes: (n, probes) in the order of schema.PROBE_NAMES; NaN: undefined.
        press: of the requests, one for all or (n,); for a gate with a scale of the press's own.

    Returns:
        (n,) the probability of harm, rounded so that it does not depend on the batch; NaN where
        nothing was measured.
    """
    probes = np.where(np.isfinite(probes), probes, np.nan)
    features = np.full((len(probes), len(schema.FEATURE_NAMES)), np.nan, np.float32)
    features[:, [schema.FEATURE_NAMES.index(name) for name in PROBE_NAMES]] = probes
    scores = np.round(gate.predict(features, press), 5)
    return np.where(np.isnan(probes).all(axis=1), np.nan, scores).astype(np.float32)


def trace_probes(traces: pl.DataFrame) -> NDArray[np.float32]:
    """(n, probes) of TRACES rows; NaN: undefined or not measured."""
    columns = traces.select(pl.col(list(PROBE_NAMES)).cast(pl.Float32).fill_null(np.nan))
    return columns.to_numpy()


def fit_rivals(
    traces: pl.DataFrame,
    scores: pl.DataFrame,
    outcomes: pl.DataFrame,
    splits: pl.DataFrame,
) -> list[RivalSetting]:
    """Choose each condition's clock on train prompts and its gate on calibration prompts.

    Args:
        traces: TRACES; their lengths are what a clock sees.
        scores: `TRACE_KEYS` and ``score``, what the gate goes by: `gate_scores`, or the entropy of
            each request's first token where no gate was trained.
        outcomes: OUTCOMES; ``harmed`` is what both want to catch.
        splits: SPLITS.
    """
    table = (
        traces.filter((pl.col("status") == "ok") & (pl.col("press") != BASELINE))
        .select(*TRACE_KEYS, "generated_tokens", "max_new_tokens")
        .join(outcomes.select(*TRACE_KEYS, "harmed"), on=TRACE_KEYS, how="inner")
        .join(scores.select(*TRACE_KEYS, "score"), on=TRACE_KEYS, how="left")
        .join(splits.select("prompt_id", "split"), on="prompt_id", how="inner")
        .filter(pl.col("harmed").is_not_null())
    )
    settings = []
    for key, part in table.group_by(CONDITION, maintain_order=True):
        train, held_out = (
            part.filter(pl.col("split") == name) for name in ("train", "calibration")
        )
        clock = best_cutoff(
            train["generated_tokens"].cast(pl.Float64).to_numpy(), train["harmed"].to_numpy()
        )
        known = held_out["score"].cast(pl.Float64).fill_null(np.nan).to_numpy()
        gate = best_cutoff(known, held_out["harmed"].to_numpy())
        longest = int(part["max_new_tokens"].to_numpy().max())
        settings.append(
            RivalSetting(
                **dict(zip(CONDITION, map(str, key), strict=True)),
                clock_tokens=longest if clock is None else max(int(clock.value), 1),
                # A gate promotes above its threshold, the cutoff included.
                gate_threshold=np.finfo(np.float32).max.item()
                if gate is None
                else float(np.nextafter(np.float32(gate.value), np.float32(-np.inf))),
                train_harmed=int(train["harmed"].sum()),
                calibration_harmed=int(held_out["harmed"].sum()),
            )
        )
    return settings


def save_rivals(settings: list[RivalSetting], path: str | Path) -> None:
    """Write the settings as JSON, all or nothing."""
    entries = [one.model_dump(mode="json") for one in settings]
    with schema.atomic_path(path) as temporary:
        temporary.write_text(json.dumps(entries, indent=1))


def load_rivals(path: str | Path) -> dict[tuple[str, str, str], RivalSetting]:
    """Read what `save_rivals` wrote, by (model, press, ratio)."""
    entries = [RivalSetting.model_validate(entry) for entry in json.loads(Path(path).read_text())]
    return {(entry.model, entry.press, entry.ratio): entry for entry in entries}
