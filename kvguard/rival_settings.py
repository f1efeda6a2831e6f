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
from kvguard.rivals import choose_rung
from kvguard.schema import CONDITION, PROBE_NAMES, TRACE_KEYS

NO_GATE = "no gate was trained on probes: its score is the entropy of the first token"
"""Note of a run of ``gate`` that does without them."""

NO_LADDER = "no gate was trained on probes: every request starts at the heaviest ratio"
"""Note of a run of ``ladder`` that does without them."""


NEVER_RELAX = 2.0
"""A ladder's threshold above every risk: each request starts at the heaviest ratio."""


class RivalSetting(BaseModel):
    """One condition's numbers.

    Attributes:
        model, press, ratio: the condition.
        clock_tokens: `clock_or_loop` alarms at so many tokens.
        gate_threshold: `gate` promotes above this score.
        ladder_threshold: `ladder` starts at the heaviest ratio of the press, this one at most,
            whose risk is below it; None: files from before it.
        train_harmed, calibration_harmed: harmed requests that the choice saw; without any a clock
            never alarms by itself and a gate promotes nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    press: str
    ratio: str
    clock_tokens: int
    gate_threshold: float
    ladder_threshold: float | None = None
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


def best_ladder_threshold(
    risk: NDArray[np.float64], harmed: NDArray[np.bool_], ratios: NDArray[np.float64]
) -> float:
    """The threshold with the largest Youden index, as a gate's: of a ladder it is a mean.

    Gained is the harm that the chosen ratios remove, as a share of the requests that the heaviest
    harms; lost is the share of the heaviest ratio's compression that is given up, mean over the
    requests that it does not harm. With one ratio this is `best_cutoff`'s index.

    Args:
        risk: (n, ratios) of harm, heaviest ratio first; NaN: not known, too high.
        harmed: (n, ratios) what happened at each.
        ratios: (ratios,) descending.

    Returns:
        The highest of equal ones, half way to the next risk; 2, which no risk reaches, where the
        heaviest ratio harms nobody.
    """
    if not harmed[:, :1].any():
        return NEVER_RELAX
    known = np.unique(risk[np.isfinite(risk)])
    between = (known[1:] + known[:-1]) / 2
    candidates = np.array([NEVER_RELAX, *between[::-1], 0.0])
    kept = np.append(ratios, 0.0) / ratios[0]
    hurt = np.column_stack([harmed, np.zeros(len(harmed), np.bool_)])
    own = np.arange(len(harmed))
    at_risk = harmed[:, 0]
    found = []
    for threshold in candidates:
        chosen = choose_rung(risk, threshold)
        removed = (at_risk.sum() - hurt[own, chosen].sum()) / at_risk.sum()
        given_up = (1 - kept[chosen])[~at_risk]
        found.append(removed - (given_up.mean() if len(given_up) else 0.0))
    return float(candidates[int(np.argmax(found))])


def load_gate(path: str | Path) -> Predictor | None:
    """The trained gate out of baselines.json, that of harm; None where there is none."""
    gates = json.loads(Path(path).read_text()).get("gate", {})
    return parse_predictor(gates["harm"], str(path)) if "harm" in gates else None


def gate_scores(
    gate: Predictor,
    probes: NDArray[np.floating],
    press: str | ArrayLike = "",
    ratio: ArrayLike = np.nan,
) -> NDArray[np.float32]:
    """What a gate says of requests, live and of stored traces alike.

    Args:
        gate: from `load_gate`.
        probes: (n, probes) in the order of schema.PROBE_NAMES; NaN: undefined.
        press: of the requests, one for all or (n,); for a gate with a scale of the press's own.
        ratio: that the probes are of, one for all or (n,); for a gate that reads it.

    Returns:
        (n,) the probability of harm, rounded so that it does not depend on the batch; NaN where
        nothing was measured.
    """
    probes = np.where(np.isfinite(probes), probes, np.nan)
    features = np.full((len(probes), len(schema.FEATURE_NAMES)), np.nan, np.float32)
    features[:, [schema.FEATURE_NAMES.index(name) for name in PROBE_NAMES]] = probes
    features[:, schema.FEATURE_NAMES.index("compression_ratio")] = ratio
    scores = np.round(gate.predict(features, press), 5)
    return np.where(np.isnan(probes).all(axis=1), np.nan, scores).astype(np.float32)


def gate_risk(gate: Predictor, press: str, probes: NDArray[np.float32], ratio: float) -> float:
    """`gate_scores` of one request, its probes (probes,)."""
    return float(gate_scores(gate, probes[None], press, ratio)[0])


def trace_probes(traces: pl.DataFrame) -> NDArray[np.float32]:
    """(n, probes) of TRACES rows; NaN: undefined or not measured."""
    columns = traces.select(pl.col(list(PROBE_NAMES)).cast(pl.Float32).fill_null(np.nan))
    return columns.to_numpy()


def trace_scores(gate: Predictor, traces: pl.DataFrame) -> pl.DataFrame:
    """What a gate says of stored traces: `schema.TRACE_KEYS` and ``score``, as `gate_scores`."""
    of = (traces["press"].to_numpy(), traces["ratio"].cast(pl.Float64).to_numpy())
    score = pl.Series(gate_scores(gate, trace_probes(traces), *of))
    return traces.select(schema.TRACE_KEYS).with_columns(score=score)


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
    ladders = _ladder_thresholds(table.filter(pl.col("split") == "calibration"))
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
                ladder_threshold=ladders.get(tuple(map(str, key)), NEVER_RELAX),
                train_harmed=int(train["harmed"].sum()),
                calibration_harmed=int(held_out["harmed"].sum()),
            )
        )
    return settings


def _ladder_thresholds(held_out: pl.DataFrame) -> dict[tuple[str, ...], float]:
    """By condition: the threshold of the ladder of all ratios of its press up to its own."""
    found: dict[tuple[str, ...], float] = {}
    for (model, press), part in held_out.group_by("model", "press", maintain_order=True):
        ratios = part["ratio"].unique().sort(descending=True).to_list()
        for first, ratio in enumerate(ratios):
            rungs = ratios[first:]
            wide = {
                name: part.filter(pl.col("ratio").is_in(rungs))
                .pivot("ratio", index="prompt_id", values=name)
                .drop_nulls(rungs if name == "harmed" else None)
                for name in ("harmed", "score")
            }
            both = wide["harmed"].join(
                wide["score"], on="prompt_id", how="left", suffix="_score", maintain_order="left"
            )
            if both.is_empty():
                continue
            risk = both.select(pl.col([f"{rung}_score" for rung in rungs]).cast(pl.Float64))
            found[str(model), str(press), ratio] = best_ladder_threshold(
                risk.fill_null(np.nan).to_numpy(),
                both.select(rungs).to_numpy().astype(np.bool_),
                np.array([float(rung) for rung in rungs]),
            )
    return found


def save_rivals(settings: list[RivalSetting], path: str | Path) -> None:
    """Write the settings as JSON, all or nothing."""
    entries = [one.model_dump(mode="json") for one in settings]
    with schema.atomic_path(path) as temporary:
        temporary.write_text(json.dumps(entries, indent=1))


def load_rivals(path: str | Path) -> dict[tuple[str, str, str], RivalSetting]:
    """Read what `save_rivals` wrote, by (model, press, ratio)."""
    entries = [RivalSetting.model_validate(entry) for entry in json.loads(Path(path).read_text())]
    return {(entry.model, entry.press, entry.ratio): entry for entry in entries}
