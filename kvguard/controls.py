"""Controls that must fail: predictors of labels that nothing can tell, alarms at random."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from kvguard import schema
from kvguard.config import BASELINE
from kvguard.evaluate_predictor import request_threshold, score
from kvguard.features import FEATURE_SETS
from kvguard.metrics import (
    INTERVAL_TYPES,
    Measured,
    Sample,
    auroc,
    share,
    undefined,
    with_intervals,
)
from kvguard.rows import Rows, as_bools
from kvguard.schema import CONDITION
from kvguard.trainer import Refusal
from kvguard.variants import Study, pooled

_CONTROL_TYPES: dict[str, Any] = (
    {"control": pl.String, "predictor": pl.String, "target": pl.String, "metric": pl.String}
    | {"expected": pl.Float64}
    | INTERVAL_TYPES
    | {"as_expected": pl.Boolean, "prompts": pl.Int64, "reason": pl.String}
)


def measure_controls(study: Study, calibration: Rows, target: str) -> pl.DataFrame:
    settings, seed = study.trainer.settings, study.trainer.seed
    prompts = study.weights.shape[1]
    rows: list[tuple[dict[str, Any], Measured]] = []

    def add(
        control: str,
        metric: str,
        expected: float | None,
        measured: Measured | str,
        predictor: str | None = None,
    ) -> None:
        described: dict[str, Any] = {"control": control, "target": target, "metric": metric}
        described["predictor"] = predictor
        described |= {"expected": expected, "prompts": prompts, "reason": None}
        if isinstance(measured, str):
            described["reason"] = measured
            measured = undefined(study.weights)
        rows.append((described, measured))

    windowed = settings.model_copy(update={"include_post_onset": False, "formulation": "windowed"})
    trainer = replace(study.trainer, settings=windowed)
    relabelled: dict[str, Callable[[Rows, int], Rows]] = {
        "permuted requests": lambda rows, salt: permute_requests(
            rows, target, trainer.horizon_tokens, seed + salt
        ),
        "harm by a coin": lambda rows, salt: deal_by_coin(
            rows, target, trainer.horizon_tokens, seed + salt
        ),
    }
    for control, relabel in relabelled.items():
        train, test = relabel(study.train, 0), relabel(study.test, 1)
        panel = study.panel(test, target)
        for predictor_name in ("hazard", "clock_repetition"):
            try:
                purpose = f"control: {control}, {predictor_name}"
                if predictor_name == "hazard":
                    fitted = trainer.fit_kind(settings.kind, train, target, purpose)
                else:
                    fitted = trainer.fit(train, target, FEATURE_SETS[predictor_name], purpose)
            except Refusal as refusal:
                for metric in ("same_position", "request"):
                    add(control, metric, 0.5, str(refusal), predictor_name)
                continue
            found = pooled(panel, fitted.log_odds(test.features, test.press))
            for metric in ("same_position", "request"):
                add(control, metric, 0.5, found[metric], predictor_name)

    try:
        predictor = study.fit_configured(target, "control: matched rate")
    except Refusal as refusal:
        add("random alarm", "recall", None, str(refusal))
    else:
        study.trainer.leakage.check(
            "thresholds", calibration.keys["prompt_id"], "control: matched rate"
        )
        threshold = request_threshold(calibration, predictor, target, settings.false_alarm_rate)
        hazard = predictor.predict(study.test.features, study.test.press)
        scored = score(study.test, hazard, target, study.weights)
        requests = scored.requests.table.filter(pl.col("press") != BASELINE)
        codes, harmed = scored.codes(requests["prompt_id"]), requests["harmed"].to_numpy()
        alarmed = requests["any_time"].to_numpy() > threshold
        rate = float(alarmed.mean()) if len(alarmed) else 0.0
        chance = np.random.default_rng(seed).random(len(alarmed))
        drawn = chance < rate
        add("predictor", "alarm_rate", None, share(alarmed, codes, study.weights))
        add("predictor", "recall", None, share(alarmed[harmed], codes[harmed], study.weights))
        recall = share(drawn[harmed], codes[harmed], study.weights)
        add("random alarm", "recall", rate, recall)
        add(
            "random alarm",
            "request_auroc",
            0.5,
            auroc(Sample(-chance, harmed, codes, study.weights)),
        )
    finished = with_intervals(rows, lambda _: "controls")
    for row in finished:
        defined = row["expected"] is not None and row["low"] is not None
        row["as_expected"] = row["low"] <= row["expected"] <= row["high"] if defined else None
    return pl.DataFrame(finished, schema=_CONTROL_TYPES)


def permute_requests(rows: Rows, target: str, horizon_tokens: int, seed: int) -> Rows:
    """Every request gets the onset, or the health, of another of its model, press and ratio.

    How many are harmed, and where harm begins, stays as it is; any tie to the request goes. An
    onset past a request's end still labels the tokens before it.
    """
    judged = rows.take(as_bools(rows.keys[f"hazard_{target}"].is_not_null()))
    known = pl.col(f"steps_to_{target}") + pl.col("position")
    requests = judged.keys.group_by(schema.TRACE_KEYS, maintain_order=True).agg(onset=known.first())
    dealt = requests.with_columns(pl.col("onset").shuffle(seed=seed).over(CONDITION))
    return _relabel(judged, dealt, target, horizon_tokens)


def deal_by_coin(rows: Rows, target: str, horizon_tokens: int, seed: int) -> Rows:
    """A coin harms every other compressed request, always at the same token.

    That token is the median onset, or half of the median length where nothing is harmed. The
    position then foretells a token's label, and nothing foretells which request is harmed.
    """
    judged = rows.take(as_bools(rows.keys[f"hazard_{target}"].is_not_null()))
    known = pl.col(f"steps_to_{target}") + pl.col("position")
    requests = judged.keys.group_by(schema.TRACE_KEYS, maintain_order=True).agg(
        onset=known.first(), length=pl.len()
    )
    middle = requests["onset"].median() or requests["length"].median() or 0.0
    coin = np.random.default_rng(seed).random(len(requests)) < 0.5
    at = max(int(float(str(middle))), 1)
    dealt = requests.with_columns(
        onset=pl.when(pl.Series(coin) & (pl.col("press") != BASELINE)).then(pl.lit(at, pl.Int32))
    )
    return _relabel(judged, dealt, target, horizon_tokens)


def _relabel(rows: Rows, dealt: pl.DataFrame, target: str, horizon_tokens: int) -> Rows:
    """Labels as `kvguard.labeling` writes them, from an onset for each request."""
    onsets = dealt.select(*schema.TRACE_KEYS, "onset")
    joined = rows.keys.join(onsets, on=schema.TRACE_KEYS, how="left", maintain_order="left")
    steps = pl.col("onset") - pl.col("position")
    keys = joined.with_columns(
        steps.alias(f"steps_to_{target}"),
        steps.is_between(0, horizon_tokens, closed="left")
        .fill_null(False)
        .alias(f"hazard_{target}"),
        (steps <= 0).fill_null(False).alias(f"post_onset_{target}"),
    ).drop("onset")
    return Rows(keys, rows.features)
