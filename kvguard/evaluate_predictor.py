"""Metrics of the predictors on the test prompts.

The headline is the table ``harm_metrics`` (`kvguard.harm_metrics`), whose main metrics compare
requests after equal numbers of tokens, so that position alone scores 0.5. The further metrics, in
``predictor_metrics``, are described here.

**What is counted.** Tokens before the onset only, of compressed requests only. A token is positive
when the onset lies within the horizon. ``auroc_within`` compares tokens of the same model, press
and ratio only, so that knowing which condition is hard does not raise it. Position alone scores
high in every metric over tokens.

**A request's score** is the worst run of the request: the largest mean hazard over `RUN_TOKENS`
successive tokens. For a forecast (``recall``) runs must end before the onset; a request whose onset
comes sooner cannot be forecast and counts as missed. For verifying and rewinding
(``recall_any_time``) every run counts, because a late alarm recovers the request too, at the price
of more wasted tokens. ``request_auroc`` compares requests over the same number of tokens, so that
length does not raise it (`metrics.matched_auroc`); ``request_auroc_early`` does so within the first
`EARLY_TOKENS` tokens. Alarm thresholds keep the configured false-alarm rate on calibration prompts;
the rate that they have on test prompts is reported beside the recall.

**Intervals** resample prompts (`kvguard.metrics.bootstrap_interval`). ``low`` and ``high`` hold
for all rows of a metric at once with 95 %: half of the error goes to the headline (the predictor of
the first target, all compressed requests), the other half is shared by the remaining rows
(Bonferroni). ``low_pointwise`` and ``high_pointwise`` hold with 95 % for one row alone.
"""

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard import config, schema
from kvguard.config import BASELINE
from kvguard.harm_metrics import HARM_TYPES, NO_HEADLINE, build_panel, harm_table
from kvguard.leakage import LeakageCheck, check_trained_on
from kvguard.metrics import (
    INTERVAL_TYPES,
    Floats,
    Measured,
    Sample,
    auroc,
    auroc_within,
    matched_auroc,
    pr_auc,
    quantile,
    recall_on_roc,
    resample_weights,
    share,
    tally_levels,
    with_intervals,
)
from kvguard.predictor import Predictor, rules_predictor
from kvguard.predictor_curves import predictor_curves
from kvguard.rows import Rows, load_rows
from kvguard.splits import Table, read_splits, scan_table
from kvguard.train import Models

logger = logging.getLogger(__name__)

RUN_TOKENS = 8
EARLY_TOKENS = 32
CONDITION = ("model", "press", "ratio")

IN_SAMPLE = ("recall_on_roc", "recall_any_time_on_roc")
"""Metrics whose threshold is read off the test prompts themselves: what a ranking could give."""

_NEVER = -1.0  # score of a request without a run, below every hazard

# --- requests ------------------------------------------------------------------------------------


class Requests(NamedTuple):
    """Requests, in the order of `schema.TRACE_KEYS`, and their worst run so far.

    ``table``: `schema.TRACE_KEYS`, ``task``, ``onset``, ``harmed``, ``generated_tokens``, and the
    worst run ``forecast`` (before the onset) and ``any_time``; -1 where there is none. ``running``
    (n, T) float32: the worst run up to each token.
    """

    table: pl.DataFrame
    running: NDArray[np.float32]


def score_requests(rows: Rows, hazard: NDArray[np.floating[Any]], target: str) -> Requests:
    """The worst run of each request: the largest mean hazard over `RUN_TOKENS` tokens.

    Args:
        rows: all tokens of whole requests, sorted by `schema.TOKEN_KEYS`.
        hazard: (n,) score of each token, in [0, 1].
        target: whose onset makes a request harmed. Requests that nobody judged are left out.
    """
    tokens = rows.keys.select(
        *schema.TOKEN_KEYS,
        "task",
        onset=pl.col(f"steps_to_{target}") + pl.col("position"),
        judged=pl.col(f"hazard_{target}").is_not_null(),
    )
    mean = pl.col("hazard").rolling_mean(RUN_TOKENS).over(schema.TRACE_KEYS)
    tokens = tokens.with_columns(pl.Series("hazard", hazard, dtype=pl.Float64))
    tokens = tokens.with_columns(run=mean).filter("judged")
    table = tokens.group_by(schema.TRACE_KEYS, maintain_order=True).agg(
        task=pl.col("task").first(),
        onset=pl.col("onset").first(),
        harmed=pl.col("onset").first().is_not_null(),
        generated_tokens=pl.len().cast(pl.Int32),
    )
    lengths = table["generated_tokens"].to_numpy()
    running = np.full((len(table), int(lengths.max(initial=1))), _NEVER, np.float32)
    row = np.repeat(np.arange(len(table)), lengths)
    run = tokens["run"].fill_null(_NEVER).to_numpy()
    running[row, tokens["position"].to_numpy()] = run
    running = np.maximum.accumulate(running, axis=1)
    before = np.minimum(table["onset"].fill_null(np.iinfo(np.int32).max).to_numpy(), lengths)
    forecast = np.where(before > 0, running[np.arange(len(table)), before - 1], _NEVER)
    table = table.with_columns(
        pl.Series("forecast", forecast, dtype=pl.Float64),
        pl.Series("any_time", running[:, -1], dtype=pl.Float64),
    )
    return Requests(table, running)


def first_alarms(requests: Requests, threshold: float) -> pl.DataFrame:
    """Where each request's run first lies above a threshold.

    Returns:
        The requests' table with ``alarm``, the position of that token; null: never.
    """
    above = requests.running > threshold
    alarm = np.where(above.any(axis=1), above.argmax(axis=1), -1)
    column = pl.Series("alarm", alarm, dtype=pl.Int32)
    return requests.table.with_columns(column.set(column < 0, None))


def alarm_threshold(scores: Floats, false_alarm_rate: float) -> float:
    """Smallest threshold above which at most that share of harmless requests scores.

    Args:
        scores: (n,) ``any_time`` of harmless calibration requests.
        false_alarm_rate: the share that may alarm; an alarm is a score *above* the threshold.

    Returns:
        One of the scores; infinity without any.
    """
    if not len(scores):
        return float("inf")
    ordered = np.sort(scores)
    return float(
        ordered[min(int(np.ceil((1 - false_alarm_rate) * len(ordered))), len(ordered)) - 1]
    )


# --- one predictor on one sample -----------------------------------------------------------------


class Scored(NamedTuple):
    """Rows, a hazard for each, the requests, and what the bootstrap needs."""

    rows: Rows
    hazard: Floats
    requests: Requests
    target: str
    prompt_ids: pl.Series
    weights: Floats

    def codes(self, prompts: pl.Series) -> NDArray[np.int64]:
        """Column of ``weights`` of each prompt."""
        return np.searchsorted(self.prompt_ids.to_numpy(), prompts.to_numpy()).astype(np.int64)


def score(rows: Rows, hazard: NDArray[np.floating[Any]], target: str, weights: Floats) -> Scored:
    """Score requests; ``weights`` (B, prompts) are of the sorted prompts of ``rows``."""
    scores = np.asarray(hazard, dtype=np.float64)
    prompt_ids = rows.keys["prompt_id"].unique().sort()
    return Scored(rows, scores, score_requests(rows, scores, target), target, prompt_ids, weights)


def bootstrap_weights(rows: Rows, samples: int, seed: int) -> Floats:
    """Resamples of the prompts of ``rows``: (samples, prompts), prompts sorted."""
    return resample_weights(rows.keys["prompt_id"].n_unique(), samples, seed)


def measure(
    scored: Scored, where: pl.Expr, *, false_alarm_rate: float, threshold: float | None = None
) -> dict[str, Measured]:
    """All metrics of the tokens and requests that ``where`` (on the label columns) selects.

    Args:
        scored: hazards of test tokens, with their requests.
        where: a predicate on `schema.TRACE_KEYS` and ``task``.
        false_alarm_rate: for ``recall_on_roc``.
        threshold: of alarms, from calibration prompts; None leaves out what depends on it.
    """
    rows, weights, target = scored.rows, scored.weights, scored.target
    used = _mask(rows.keys, where) & rows.before_onset(target)
    keys = rows.keys.filter(used)
    sample = Sample(
        scored.hazard[used], rows.label(target)[used], scored.codes(keys["prompt_id"]), weights
    )
    levels = tally_levels(sample) if sample.ranks_something else None
    metrics = {
        "auroc": auroc(sample, levels),
        "auroc_within": auroc_within(sample, condition_codes(keys)),
        "pr_auc": pr_auc(sample, levels),
        "prevalence": share(sample.labels, sample.prompts, weights),
        "brier": share((sample.scores - sample.labels) ** 2, sample.prompts, weights),
    }
    member = _mask(scored.requests.table, where)
    requests, running = scored.requests.table.filter(member), scored.requests.running[member]
    harmed, codes = requests["harmed"].to_numpy(), scored.codes(requests["prompt_id"])
    onset, lengths = (
        requests[name].fill_null(0).to_numpy().astype(np.int64)
        for name in ("onset", "generated_tokens")
    )

    def ranked(column: str) -> Sample:
        return Sample(requests[column].to_numpy(), harmed, codes, weights)

    exposure = (running, onset, lengths, harmed, codes, weights)
    metrics |= {
        "request_auroc": matched_auroc(*exposure),
        "request_auroc_early": matched_auroc(*exposure, first_tokens=EARLY_TOKENS),
        "recall_on_roc": recall_on_roc(ranked("forecast"), false_alarm_rate),
        "recall_any_time_on_roc": recall_on_roc(ranked("any_time"), false_alarm_rate),
    }
    if threshold is not None:
        alarmed = {name: requests[name].to_numpy() > threshold for name in ("forecast", "any_time")}
        metrics |= {
            "recall": share(alarmed["forecast"][harmed], codes[harmed], weights),
            "recall_any_time": share(alarmed["any_time"][harmed], codes[harmed], weights),
            "false_alarm_rate": share(alarmed["any_time"][~harmed], codes[~harmed], weights),
        }
    return metrics


def _mask(frame: pl.DataFrame, where: pl.Expr) -> NDArray[np.bool_]:
    return np.asarray(frame.select(where).to_series().to_numpy(), dtype=np.bool_)


def condition_codes(keys: pl.DataFrame) -> NDArray[np.int64]:
    """An integer for each (model, press, ratio), one per row."""
    names = keys.select(pl.concat_str(CONDITION, separator=" ")).to_series().to_numpy()
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def counts(scored: Scored, where: pl.Expr) -> dict[str, int]:
    """How much a group of requests holds: prompts, requests, harmed, tokens, positive tokens."""
    rows, requests = scored.rows, scored.requests.table.filter(where)
    used = _mask(rows.keys, where) & rows.before_onset(scored.target)
    return {
        "prompts": requests["prompt_id"].n_unique(),
        "requests": len(requests),
        "harmed": int(requests["harmed"].sum()),
        "tokens": int(used.sum()),
        "positive_tokens": int((used & rows.label(scored.target)).sum()),
    }


_COUNTS = ("prompts", "requests", "harmed", "tokens", "positive_tokens")
COUNT_TYPES: dict[str, Any] = dict.fromkeys(_COUNTS, pl.Int64)

# --- the evaluation ------------------------------------------------------------------------------

_METRIC_TYPES: dict[str, Any] = (
    {
        "target": pl.String,
        "predictor": pl.String,
        "group_by": pl.String,
        "model": pl.String,
        "press": pl.String,
        "ratio": pl.String,
        "kind": pl.String,
        "metric": pl.String,
        "in_sample": pl.Boolean,
    }
    | INTERVAL_TYPES
    | COUNT_TYPES
)

_LEAD_TYPES: dict[str, Any] = {
    "target": pl.String,
    "model": pl.String,
    "press": pl.String,
    "ratio": pl.String,
    "prompt_id": pl.String,
    "kind": pl.String,
    "onset": pl.Int32,
    "generated_tokens": pl.Int32,
    "first_rejected": pl.Int32,
    "threshold": pl.Float64,
    "alarm": pl.Int32,
    "lead_time_tokens": pl.Int32,
    "detection_delay_tokens": pl.Int32,
    "wasted_tokens": pl.Int32,
}


def evaluate_predictors(
    models: Models,
    features: Table,
    labels: Table,
    splits: Table,
    outcomes: Table,
    settings: config.Predictor,
    *,
    seed: int,
) -> dict[str, pl.DataFrame]:
    """Everything that the test prompts say about the predictors and what was trained beside them.

    Args:
        models: as trained or loaded.
        features: `schema.FEATURES`, a frame or its file.
        labels: `schema.LABELS`.
        splits: `schema.SPLITS`, those of the training.
        outcomes: `schema.OUTCOMES`, for the first rejected token.
        settings: false-alarm rate and bootstrap samples.
        seed: of the bootstrap.

    Returns:
        - ``predictor_metrics``: one row per target, predictor (``hazard``, its baselines and
          ``rules``), group of requests and metric; see `measure`. Group ``kind`` holds the harmless
          requests and those whose first failure is of that kind.
        - ``harm_metrics``: metrics that position cannot win, see `kvguard.harm_metrics`; the
          headline. Targets whose onset is a proxy have none.
        - ``predictor_curves``: points of ROC, precision-recall and calibration curves.
        - ``lead_times``: one row per harmed compressed request and target; ``lead_time_tokens`` =
          onset - alarm (negative: after the onset; null: no alarm), ``detection_delay_tokens`` =
          alarm - first rejected token, ``wasted_tokens`` = tokens that a rewind would drop.
        - ``detection``: shares and quantiles of those, with intervals.
        - ``leakage_check_evaluation``.

    Raises:
        LeakageError: a model was trained on other splits.
    """
    known = read_splits(splits)
    leakage = LeakageCheck(known)
    for model in models.predictors.values():
        check_trained_on(known, model.provenance)
    test = load_rows(features, labels, known, "test")
    calibration = load_rows(features, labels, known, "calibration")
    leakage.check("evaluate", test.keys["prompt_id"], "metrics")
    leakage.check("thresholds", calibration.keys["prompt_id"], "alarm thresholds")
    weights = bootstrap_weights(test, settings.bootstrap_samples, seed)
    rejected = scan_table(outcomes).select(*schema.TRACE_KEYS, "first_rejected").collect()

    measured: list[tuple[dict[str, Any], Measured]] = []
    detected: list[tuple[dict[str, Any], Measured]] = []
    leads: list[pl.DataFrame] = []
    harm: list[pl.DataFrame] = []
    everyone = {target: _candidates(models, target) for target in models.predictors}
    for target, candidates in everyone.items():
        hazards = {
            name: model.predict(test.features, test.press) for name, model in candidates.items()
        }
        if target not in NO_HEADLINE:
            panel = build_panel(test, target, known, settings.bootstrap_samples, seed)
            if len(panel.table):
                harm.append(harm_table(panel, target, hazards))
        for name, model in candidates.items():
            scored = score(test, hazards[name], target, weights)
            threshold = request_threshold(calibration, model, target, settings.false_alarm_rate)
            for group, where in _groups(scored, everything=name == "hazard"):
                described = {"target": target, "predictor": name} | group
                size = counts(scored, where)
                found = measure(
                    scored,
                    where,
                    false_alarm_rate=settings.false_alarm_rate,
                    threshold=threshold,
                )
                measured += [
                    (described | {"metric": metric, "in_sample": metric in IN_SAMPLE} | size, value)
                    for metric, value in found.items()
                ]
            if name == "hazard":
                lead = _lead_times(scored, threshold, rejected)
                leads.append(lead)
                detected += _detection(lead, scored)
        logger.info("evaluated %s", target)

    first = next(iter(models.predictors), None)
    metrics = pl.DataFrame(
        with_intervals(
            measured,
            lambda row: row["metric"],
            lambda row: (
                (row["predictor"], row["group_by"], row["target"]) == ("hazard", "all", first)
            ),
        ),
        schema=_METRIC_TYPES,
    )
    detection = with_intervals(
        detected,
        lambda row: row["metric"],
        lambda row: row["group_by"] == "all" and row["target"] == first,
    )
    return {
        "predictor_metrics": metrics,
        "harm_metrics": pl.concat(harm) if harm else pl.DataFrame(schema=HARM_TYPES),
        "predictor_curves": predictor_curves(everyone, test, weights, metrics),
        "lead_times": pl.concat(leads) if leads else pl.DataFrame(schema=_LEAD_TYPES),
        "detection": pl.DataFrame(detection, schema=_DETECTION_TYPES),
        "leakage_check_evaluation": leakage.table(),
    }


def _candidates(models: Models, target: str) -> dict[str, Predictor]:
    """The predictor of a target and all that it is compared with, by name."""
    predictor = models.predictors[target]
    found = {"hazard": predictor} | {
        kind: by_target[target]
        for kind, by_target in models.baselines.items()
        if target in by_target
    }
    if predictor.kind != "rules":
        found["rules"] = rules_predictor(target)
    return found


def request_threshold(
    calibration: Rows, model: Predictor, target: str, false_alarm_rate: float
) -> float:
    rows = calibration.take(calibration.compressed())
    requests = score_requests(rows, model.predict(rows.features, rows.press), target)
    harmless = requests.table.filter(~pl.col("harmed"))["any_time"].to_numpy()
    return alarm_threshold(harmless, false_alarm_rate)


def _groups(scored: Scored, *, everything: bool) -> Iterable[tuple[dict[str, Any], pl.Expr]]:
    """Groups of requests with a predicate each; the baseline is in no pooled group."""
    compressed = pl.col("press") != BASELINE
    nothing: dict[str, Any] = {"model": None, "press": None, "ratio": None, "kind": None}
    yield {"group_by": "all"} | nothing, compressed
    groupings: dict[str, tuple[str, ...]] = {"press": ("press",)}
    if everything:
        groupings |= {"model": ("model",), "ratio": ("ratio",), "condition": CONDITION}
    for group_by, columns in groupings.items():
        alone = group_by in ("press", "condition")  # where the uncompressed run is its own group
        requests = scored.requests.table
        requests = requests if alone else requests.filter(compressed)
        for values in requests.select(columns).unique().sort(columns).iter_rows(named=True):
            where = pl.all_horizontal(pl.col(name) == value for name, value in values.items())
            yield (
                {"group_by": group_by} | nothing | values,
                where if alone else where & compressed,
            )
    if everything and scored.target == "any":
        for kind, members in _kinds(scored.rows).items():
            where = compressed & pl.struct(schema.TRACE_KEYS).is_in(members.implode())
            yield {"group_by": "kind"} | nothing | {"kind": kind}, where


def _kinds(rows: Rows) -> dict[str, pl.Series]:
    """Per kind of failure: harmless requests, and those whose first failure is of that kind."""
    first = rows.keys.group_by(schema.TRACE_KEYS, maintain_order=True).agg(
        pl.col("^steps_to_.*$").first()
    )
    kinds = {}
    for kind in ("looping", "non_termination", "amnesia"):
        same = (pl.col(f"steps_to_{kind}") == pl.col("steps_to_any")).fill_null(False)
        chosen = first.filter(pl.col("steps_to_any").is_null() | same)
        kinds[kind] = chosen.select(pl.struct(schema.TRACE_KEYS)).to_series()
    return kinds


def _lead_times(scored: Scored, threshold: float, rejected: pl.DataFrame) -> pl.DataFrame:
    target = scored.target
    alarms = first_alarms(scored.requests, threshold)
    first = scored.rows.keys.group_by(schema.TRACE_KEYS, maintain_order=True).agg(
        pl.col("^steps_to_.*$").first()
    )
    kind = pl.lit(target) if target != "any" else pl.lit(None, pl.String)
    if target == "any":
        for name in ("amnesia", "non_termination", "looping"):  # the earlier listed wins a tie
            same = pl.col(f"steps_to_{name}") == pl.col("steps_to_any")
            kind = pl.when(same).then(pl.lit(name)).otherwise(kind)
    delay = pl.col("alarm") - pl.col("first_rejected")
    return (
        alarms.filter(pl.col("onset").is_not_null(), pl.col("press") != BASELINE)
        .join(first, on=schema.TRACE_KEYS, how="left", maintain_order="left")
        .join(rejected, on=schema.TRACE_KEYS, how="left", maintain_order="left")
        .select(
            pl.lit(target).alias("target"),
            *schema.TRACE_KEYS,
            kind.alias("kind"),
            "onset",
            "generated_tokens",
            "first_rejected",
            pl.lit(threshold, pl.Float64).alias("threshold"),
            "alarm",
            (pl.col("onset") - pl.col("alarm")).alias("lead_time_tokens"),
            delay.alias("detection_delay_tokens"),
            pl.when(delay.is_not_null()).then((delay + 1).clip(0)).alias("wasted_tokens"),
        )
        .cast(pl.Schema(_LEAD_TYPES))
    )


_DETECTION_TYPES: dict[str, Any] = (
    {"target": pl.String, "group_by": pl.String, "press": pl.String, "kind": pl.String}
    | {"metric": pl.String}
    | INTERVAL_TYPES
    | {"prompts": pl.Int64, "requests": pl.Int64}
)


def _detection(lead: pl.DataFrame, scored: Scored) -> list[tuple[dict[str, Any], Measured]]:
    """When alarms come, over the harmed requests: all, per press, per kind."""
    found: list[tuple[dict[str, Any], Measured]] = []
    groups: list[tuple[str, str | None]] = [("all", None)]
    groups += [("press", press) for press in lead["press"].unique().sort()]
    if scored.target == "any":
        groups += [("kind", kind) for kind in lead["kind"].drop_nulls().unique().sort()]
    for group_by, value in groups:
        part = lead if value is None else lead.filter(pl.col(group_by) == value)
        described = {"target": scored.target, "group_by": group_by, "press": None, "kind": None}
        if value is not None:
            described[group_by] = value
        size = {"prompts": part["prompt_id"].n_unique(), "requests": len(part)}
        codes = scored.codes(part["prompt_id"])
        lead_time = part["lead_time_tokens"]
        events = {
            "detected": lead_time.is_not_null(),
            "detected_before_onset": (lead_time > 0).fill_null(False),
            "lead_at_least_8": (lead_time >= 8).fill_null(False),
            "lead_at_least_16": (lead_time >= 16).fill_null(False),
            "lead_at_least_32": (lead_time >= 32).fill_null(False),
        }
        for metric, event in events.items():
            measured = share(event.to_numpy(), codes, scored.weights)
            found.append((described | {"metric": f"share_{metric}"} | size, measured))
        for column in ("lead_time_tokens", "detection_delay_tokens", "wasted_tokens"):
            values = part[column].cast(pl.Float64)
            known = values.is_not_null().to_numpy()
            for level, name in ((0.25, "quartile_1"), (0.5, "median"), (0.75, "quartile_3")):
                measured = quantile(
                    values.drop_nulls().to_numpy(), codes[known], scored.weights, level
                )
                found.append((described | {"metric": f"{column}_{name}"} | size, measured))
    return found
