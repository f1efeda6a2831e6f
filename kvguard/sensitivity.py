"""How much the catastrophic failure rate depends on the definitions: one parameter at a time."""

from collections.abc import Mapping, Sequence

import polars as pl

from kvguard import schema
from kvguard.config import Detection
from kvguard.detectors import DETECTION_COLUMNS, detect_outcomes
from kvguard.metrics import wilson_interval

SWEEPS: dict[str, tuple[float, ...]] = {
    "amnesia_llr": (0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
    "loop_window_tokens": (10, 15, 20, 30, 40),
    "loop_repeats": (2, 3, 4, 5),
}
"""Parameters of `config.Detection` that decide the rate, and the values that are tried."""

SENSITIVITY: dict[str, pl.DataType] = {
    "parameter": pl.String(),
    "value": pl.Float64(),
    "configured": pl.Boolean(),  # is it the configuration's own value?
    "model": pl.String(),
    "press": pl.String(),
    "ratio": pl.String(),
    "requests": pl.Int64(),  # generated without an error
    "catastrophes": pl.Int64(),
    "cfr": pl.Float64(),
    "cfr_low": pl.Float64(),  # Wilson, 95 %
    "cfr_high": pl.Float64(),
}


def sensitivity_table(
    prompts: pl.DataFrame,
    traces: pl.DataFrame,
    tokens: pl.DataFrame,
    detection: Detection,
    sweeps: Mapping[str, Sequence[float]] = SWEEPS,
) -> pl.DataFrame:
    """CFR by condition for every value of every parameter, the others as configured.

    Args:
        prompts: `schema.PROMPTS`.
        traces: `schema.TRACES`; traces with an error are left out of the rate.
        tokens: at least `detectors.DETECTION_COLUMNS` of `schema.TOKENS`.
        detection: the configured definitions; their own values are always among those tried.
        sweeps: values by field of `config.Detection`.

    Returns:
        a table with the columns of `SENSITIVITY`; a condition whose traces all failed has a null
        rate.

    Raises:
        ValueError: a parameter that `config.Detection` does not have, or a value out of its range.
    """
    unknown = set(sweeps) - set(Detection.model_fields)
    if unknown:
        raise ValueError(
            f"sweeps: {sorted(unknown)} are not detection parameters; known: "
            f"{', '.join(Detection.model_fields)}"
        )
    tokens = tokens.select(DETECTION_COLUMNS)
    parts = []
    for parameter, values in sweeps.items():
        configured = getattr(detection, parameter)
        for value in sorted({*values, configured}):
            changed = Detection.model_validate(detection.model_dump() | {parameter: value})
            outcomes = detect_outcomes(prompts, traces, tokens, changed)
            counts = outcomes.group_by("model", "press", "ratio", maintain_order=True).agg(
                requests=pl.col("catastrophe").count().cast(pl.Int64),
                catastrophes=pl.col("catastrophe").sum().cast(pl.Int64),
            )
            parts.append(
                counts.with_columns(
                    parameter=pl.lit(parameter),
                    value=pl.lit(float(value)),
                    configured=pl.lit(value == configured),
                )
            )
    table = pl.concat(parts)
    intervals = [
        wilson_interval(found, requests)
        for found, requests in table.select("catastrophes", "requests").iter_rows()
    ]
    table = table.with_columns(
        cfr=pl.when(pl.col("requests") > 0).then(pl.col("catastrophes") / pl.col("requests")),
        cfr_low=pl.Series([interval.low for interval in intervals], dtype=pl.Float64),
        cfr_high=pl.Series([interval.high for interval in intervals], dtype=pl.Float64),
    )
    return schema.check(table, SENSITIVITY, "sensitivity")
