"""What deciding on a score of silent harm buys: harm left and device byte-steps.

Scores of `signal_study` act on stored requests where the traces prove the result: those above a
threshold are checked once at their end, or decoded on the full cache from the first token. A gate
also chooses between the ratios of a press. Policies of the run, live and simulated, and the oracles
stand beside them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard.config import BASELINE
from kvguard.metrics import Measured, resample_weights
from kvguard.oracles import oracle_ending
from kvguard.paired_tests import holm
from kvguard.rivals import choose_rung
from kvguard.schema import TRACE_KEYS
from kvguard.signal_models import GATE_MODELS, fit_and_score
from kvguard.signal_study import SELECTED, SELECTED_GATE, Study, p_value
from kvguard.simulation import ending_runs
from kvguard.stored_requests import StoredRequests, tied_requests
from kvguard.trainer import Refusal

FLAGGED_SHARE = 0.9
"""Share of the silently harmed fit requests that a threshold flags."""

BUDGET = 0.6
"""Device byte-steps, of the full cache's, at which the goal asks for 90 % of harm removed."""

LADDER_THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
RIVALS = ("lossless", "verify_on_failure", "probation", "gate", "constant")
SHOWN = (
    *("none", "guard", "guard_promote", "always_safe", *RIVALS[:-1]),
    *("oracle_gate", "oracle_onset", "oracle_end", "oracle_ratio"),
)

_NUMBERS = dict.fromkeys(
    (
        *("harmed", "harmed_low", "harmed_high", "silent", "harm_removed"),
        *("harm_removed_low", "harm_removed_high"),
        *("relative_byte_steps", "relative_low", "relative_high", "flagged"),
    ),
    pl.Float64,
)
POLICY_TYPES: dict[str, Any] = (
    dict.fromkeys(("source", "policy", "score", "press", "ratio"), pl.String)
    | {"requests": pl.Int64, "excluded": pl.Int64}
    | _NUMBERS
    | {"threshold": pl.Float64, "within_budget": pl.Boolean}
)
PAIR_TYPES: dict[str, Any] = dict.fromkeys(
    ("source", "policy", "other"), pl.String
) | dict.fromkeys(
    (
        *("requests", "prompts"),
        *("harm_difference", "harm_low", "harm_high", "harm_p", "harm_p_adjusted"),
        *("cost_difference", "cost_low", "cost_high", "cost_p", "cost_p_adjusted"),
    ),
    pl.Float64,
)
LADDER_TYPES: dict[str, Any] = (
    dict.fromkeys(("sample", "press", "choice"), pl.String)
    | {"threshold": pl.Float64, "requests": pl.Int64}
    | {"mean_ratio": pl.Float64, "full_cache": pl.Float64}
    | {name: kind for name, kind in _NUMBERS.items() if name != "flagged"}
)


def summarize(
    runs: pl.DataFrame, baseline: pl.DataFrame, samples: int, seed: int
) -> dict[str, Any]:
    """Harm and cost of some requests under one policy, with intervals that resample prompts.

    Args:
        runs: ``prompt_id``, ``harmed``, ``silent_harm``, ``device_byte_steps``; and
            ``none_harmed``, whether compression alone harms the request.
        baseline: ``prompt_id`` and ``full_byte_steps``, of the full cache.
        samples: bootstrap samples.
        seed: of the resampling.

    Returns:
        Shares harmed and silently harmed, ``harm_removed`` (one minus harm over compression
        alone's; a rescue counts for nothing), ``relative_byte_steps`` (sum over the full cache's);
        None where a request's outcome or cost is unknown, or nothing was there to remove.
    """
    frame = runs.join(baseline, on="prompt_id", how="left", maintain_order="left")
    prompts, codes = np.unique(frame["prompt_id"].to_numpy(), return_inverse=True)
    weights = resample_weights(len(prompts), samples, seed)

    def ratio(top: str, bottom: str | None, bounds: Any) -> Measured:
        upper = frame[top].cast(pl.Float64)
        lower = pl.Series(np.ones(len(frame))) if bottom is None else frame[bottom]
        lower = lower.cast(pl.Float64)
        nothing = Measured(None, np.full(samples, np.nan), 0)
        if upper.null_count() or lower.null_count() or not lower.sum():
            return nothing
        sums, counts = (
            np.bincount(codes, weights=part.to_numpy(), minlength=len(prompts))
            for part in (upper, lower)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = (weights @ sums) / (weights @ counts)
        units = int((counts > 0).sum())
        return Measured(float(sums.sum() / counts.sum()), drawn, units, bounds)

    harmed = ratio("harmed", None, (0.0, 1.0))
    left = ratio("harmed", "none_harmed", None)
    cost = ratio("device_byte_steps", "full_byte_steps", None)
    found: dict[str, Any] = {"requests": len(frame), "harmed": harmed.value}
    found["silent"] = ratio("silent_harm", None, (0.0, 1.0)).value
    found["harm_removed"] = None if left.value is None else 1 - left.value
    found["relative_byte_steps"] = cost.value
    low, high = left.interval()
    found["harm_removed_low"] = None if high is None else 1 - high
    found["harm_removed_high"] = None if low is None else 1 - low
    for name, measured in (("harmed", harmed), ("relative", cost)):
        found |= dict(zip((f"{name}_low", f"{name}_high"), measured.interval(), strict=True))
    return found


def full_cache(requests: StoredRequests) -> pl.DataFrame:
    """``prompt_id`` and ``full_byte_steps`` of every prompt's uncompressed trace."""
    own = requests.table.filter(pl.col("press") == BASELINE)
    return own.select("prompt_id", full_byte_steps="device_byte_steps").unique("prompt_id")


def flagged_runs(
    name: str, requests: StoredRequests, flagged: pl.DataFrame, holdback_tokens: int
) -> pl.DataFrame:
    """RUNS columns of compressed requests when those flagged are acted upon.

    Args:
        name: ``oracle_gate`` (full cache from the start) or ``oracle_end`` (checked at the end).
        requests: stored traces.
        flagged: `TRACE_KEYS` of the requests to act on.
        holdback_tokens: of the guard.
    """
    marked = requests.table.select(TRACE_KEYS).join(
        flagged.select(TRACE_KEYS).unique().with_columns(flag=pl.lit(True)),
        on=TRACE_KEYS,
        how="left",
        maintain_order="left",
    )
    mask = marked["flag"].fill_null(False).to_numpy().astype(np.bool_)
    ending = oracle_ending(name, requests, mask)
    runs = ending_runs(name, requests, ending, holdback_tokens)
    return runs.with_columns(flag=pl.Series(mask)).filter(pl.col("press") != BASELINE)


def policy_table(
    study: Study,
    requests: StoredRequests,
    runs: Mapping[str, pl.DataFrame],
    conditions: Sequence[tuple[str, str]],
    *,
    holdback_tokens: int = 16,
    samples: int = 2000,
    seed: int = 0,
) -> pl.DataFrame:
    """Harm and cost on the test prompts: scores that act, the run's policies, oracles.

    Args:
        study: with its choice; scores of the sample ``test`` act.
        requests: stored traces of the test prompts, all conditions.
        runs: RUNS of the test prompts by source, "live" and "simulation".
        conditions: (press, ratio) of the live experiment; everything here is restricted to them.
        holdback_tokens: of the guard.
        samples: bootstrap samples.
        seed: of the resampling.

    Returns:
        One row per source, policy, score and condition, and pooled (``press`` null). Requests whose
        ending no trace proves (`tied_requests`) are left out of every row, and counted in
        ``excluded``.
    """
    sample = next(one for one in study.samples if one.name == "test")
    baseline = full_cache(requests)
    alone = requests.table.select(*TRACE_KEYS, none_harmed="harmed")
    tied = tied_requests(requests)
    frames: list[tuple[dict[str, Any], pl.DataFrame]] = []
    for source, table in runs.items():
        shown = table.filter((pl.col("status") == "ok") & pl.col("policy").is_in(SHOWN))
        for (policy,), part in shown.group_by("policy", maintain_order=True):
            frames.append(({"source": source, "policy": str(policy)}, part))
    for score, policy in (
        (SELECTED, "oracle_end"),
        ("mean_entropy", "oracle_end"),
        (SELECTED_GATE, "oracle_gate"),
    ):
        threshold, values = _threshold(study, sample, score)
        if values is None:
            continue
        answers = study.answers
        flags = answers.table.filter(sample.everyone & (values >= threshold))
        acted = flagged_runs(policy, requests, flags, holdback_tokens)
        named = "check at the end" if policy == "oracle_end" else "full cache from the start"
        described = {"source": "replay", "policy": named, "score": score, "threshold": threshold}
        frames.append((described, acted))
    rows: list[dict[str, Any]] = []
    for described, frame in frames:
        joined = frame.filter(pl.col("press") != BASELINE).join(
            alone, on=TRACE_KEYS, how="left", maintain_order="left"
        )
        wanted = pl.struct("press", "ratio").is_in(
            [{"press": press, "ratio": ratio} for press, ratio in conditions]
        )
        joined = joined.filter(wanted).with_columns(
            tied=pl.struct(TRACE_KEYS).is_in(
                tied.select(pl.struct(TRACE_KEYS)).to_series().implode()
            )
        )
        groups: list[tuple[dict[str, Any], pl.DataFrame]] = [
            ({"press": None, "ratio": None}, joined)
        ]
        groups += [
            ({"press": str(press), "ratio": str(ratio)}, part)
            for (press, ratio), part in joined.group_by("press", "ratio", maintain_order=True)
        ]
        for group, part in groups:
            excluded = int(part["tied"].sum())
            part = part.filter(~pl.col("tied"))
            if part.is_empty():
                continue
            found = summarize(part, baseline, samples, seed) | {"excluded": excluded}
            cost = found["relative_byte_steps"]
            found["within_budget"] = None if cost is None else cost <= BUDGET
            if "flag" in part.columns:
                found["flagged"] = float(part["flag"].to_numpy().mean())
            rows.append(described | group | found)
    return pl.DataFrame(rows, schema=POLICY_TYPES)


def _threshold(study: Study, sample: Any, score: str) -> tuple[float, NDArray[np.float64] | None]:
    """The score that 90 % of silently harmed fit requests reach, and every request's score."""
    answers = study.answers
    gate = score == SELECTED_GATE
    last = np.cumsum(answers.lengths) - 1
    values = (sample.gates if gate else sample.scores).get(score)
    held_out = values if score == "mean_entropy" else study.choice.out_of_fold.get(score)
    if values is None or held_out is None:
        return np.nan, None
    known = held_out if gate else held_out[last]
    harmed = known[~sample.everyone & answers.silent]
    harmed = harmed[np.isfinite(harmed)]
    if not len(harmed):
        return np.nan, None
    threshold = float(np.quantile(harmed, 1 - FLAGGED_SHARE, method="lower"))
    return threshold, values if gate else values[last]


def pair_table(
    runs: Mapping[str, pl.DataFrame],
    requests: StoredRequests,
    conditions: Sequence[tuple[str, str]],
    *,
    policy: str = "guard",
    samples: int = 2000,
    seed: int = 0,
) -> pl.DataFrame:
    """A policy against its rivals over all live conditions: harm and relative byte-steps.

    Differences are policy minus rival, negative is better; bootstrap over prompts, Holm over the
    rivals of one source, harm and cost apart. ``constant`` is a mixture of compression alone and
    the full cache that costs as much as the policy does in that condition, never more than all of
    it on the full cache: its harm is the mixture's share of compression alone's. ``probation`` and
    others that no live run has are simulated; requests whose ending no trace proves
    (`tied_requests`) are then left out.
    """
    baseline = full_cache(requests)
    alone = requests.table.filter(pl.col("press") != BASELINE).select(
        *TRACE_KEYS, none_harmed="harmed", none_byte_steps="device_byte_steps"
    )
    wanted = pl.struct("press", "ratio").is_in(
        [{"press": press, "ratio": ratio} for press, ratio in conditions]
    )
    rows: list[dict[str, Any]] = []
    for source, table in runs.items():
        usable = table.filter((pl.col("status") == "ok") & wanted)
        if source == "simulation":
            usable = usable.join(tied_requests(requests), on=TRACE_KEYS, how="anti")
        base = _costed(usable.filter(pl.col("policy") == policy), baseline)
        if base.is_empty():
            continue
        family: list[dict[str, Any]] = []
        for rival in RIVALS:
            if rival == "constant":
                other = _constant(base, alone, baseline)
            else:
                other = _costed(usable.filter(pl.col("policy") == rival), baseline)
                if other.is_empty() and source == "live" and "simulation" in runs:
                    simulated = runs["simulation"].filter(
                        (pl.col("status") == "ok") & wanted & (pl.col("policy") == rival)
                    )
                    other = _costed(
                        simulated.join(tied_requests(requests), on=TRACE_KEYS, how="anti"), baseline
                    )
            if other.is_empty():
                continue
            family.append(
                {"source": source, "policy": policy, "other": rival}
                | _paired(base, other, samples, seed)
            )
        for kind in ("harm", "cost"):
            adjusted = holm([row[f"{kind}_p"] for row in family])
            for row, value in zip(family, adjusted, strict=True):
                row[f"{kind}_p_adjusted"] = value
        rows += family
    return pl.DataFrame(rows, schema=PAIR_TYPES)


def _costed(runs: pl.DataFrame, baseline: pl.DataFrame) -> pl.DataFrame:
    """``harmed`` and ``relative``: byte-steps over the full cache's mean over the same requests."""
    frame = runs.join(baseline, on="prompt_id", how="inner", maintain_order="left")
    mean = frame["full_byte_steps"].mean()
    return frame.select(
        *TRACE_KEYS,
        pl.col("harmed").cast(pl.Float64),
        relative=pl.col("device_byte_steps") / (mean if isinstance(mean, float) else 1.0),
        full=pl.col("full_byte_steps") / (mean if isinstance(mean, float) else 1.0),
    )


def _constant(base: pl.DataFrame, alone: pl.DataFrame, baseline: pl.DataFrame) -> pl.DataFrame:
    mean = base.join(baseline, on="prompt_id")["full_byte_steps"].mean()
    own = base.join(alone, on=TRACE_KEYS, how="inner", maintain_order="left").with_columns(
        none=pl.col("none_byte_steps") / (mean if isinstance(mean, float) else 1.0)
    )
    spared = pl.col("full") - pl.col("none")
    share = (pl.col("full") - pl.col("relative")).mean() / spared.mean()
    mixed = own.with_columns(share=share.clip(0, 1).over("press", "ratio"))
    return mixed.select(
        *TRACE_KEYS,
        harmed=pl.col("share") * pl.col("none_harmed").cast(pl.Float64),
        relative=pl.col("full") - pl.col("share") * spared,
    )


def _paired(base: pl.DataFrame, other: pl.DataFrame, samples: int, seed: int) -> dict[str, Any]:
    both = base.join(other, on=TRACE_KEYS, suffix="_other", maintain_order="left")
    prompts, codes = np.unique(both["prompt_id"].to_numpy(), return_inverse=True)
    weights = resample_weights(len(prompts), samples, seed)
    row: dict[str, Any] = {"requests": both.height, "prompts": len(prompts)}
    for kind, column in (("harm", "harmed"), ("cost", "relative")):
        difference = both[column] - both[f"{column}_other"]
        measured = Measured(None, np.full(samples, np.nan), 0, None)
        if both.height and not difference.null_count():
            sums = np.bincount(codes, weights=difference.to_numpy(), minlength=len(prompts))
            counts = np.bincount(codes, minlength=len(prompts))
            drawn = (weights @ sums) / (weights @ counts)
            measured = Measured(float(difference.to_numpy().mean()), drawn, len(prompts), None, 1.0)
        low, high = measured.interval()
        row |= {f"{kind}_difference": measured.value, f"{kind}_p": p_value(measured)}
        row |= {f"{kind}_low": low, f"{kind}_high": high}
    return row


# --- a ladder of ratios --------------------------------------------------------------------------


def ladder_choice(risk: Mapping[str, NDArray[np.float64]], threshold: float) -> NDArray[np.str_]:
    """For each request the heaviest ratio whose risk is below a threshold.

    A risk that is not known counts as too high. A heavier ratio may be chosen although a milder one
    is not: the gate was asked about each.

    Args:
        risk: by ratio as text, (n,) probability of harm.
        threshold: a ratio is taken where the risk is below it.

    Returns:
        (n,) the ratio; "0.000", the full cache, where every ratio is too risky.
    """
    ratios = sorted(risk, reverse=True)
    chosen = choose_rung(np.column_stack([risk[ratio] for ratio in ratios]), threshold)
    return np.array([*ratios, "0.000"])[chosen]


def ladder_table(
    study: Study,
    requests: StoredRequests,
    splits: pl.DataFrame,
    gate: str = "gate_logistic_normalised",
    *,
    samples: int = 2000,
    seed: int = 0,
) -> pl.DataFrame:
    """What choosing each request's ratio at prefill leaves, for presses that ran at several ratios.

    The gate is fitted on train and calibration prompts and asked for every ratio of a press; each
    request then ends as its trace at the chosen ratio did. ``choice``: "ladder", "constant" (one
    ratio for all), "oracle_ratio" (the heaviest ratio that does not harm), "full cache".
    """
    answers = study.answers
    split_of = dict(splits.select("prompt_id", "split").iter_rows())
    test = np.array([split_of[prompt] == "test" for prompt in answers.prompts.tolist()])
    try:
        assert gate in GATE_MODELS
        risk = 1 / (1 + np.exp(-fit_and_score(gate, answers, ~test, seed)))
    except Refusal:
        return pl.DataFrame(schema=LADDER_TYPES)
    scored = answers.table.with_columns(risk=pl.Series(risk)).filter(test)
    baseline = full_cache(requests)
    stored = requests.table.select(*TRACE_KEYS, "harmed", "silent_harm", "device_byte_steps").join(
        baseline.select("prompt_id"), on="prompt_id", how="semi", maintain_order="left"
    )
    whole = stored.filter(pl.col("press") == BASELINE).with_columns(harmed=False, silent_harm=False)
    rows: list[dict[str, Any]] = []
    for (press,), part in scored.group_by("press", maintain_order=True):
        ratios = part["ratio"].unique().sort().to_list()
        if len(ratios) < 2:
            continue
        wide = part.pivot("ratio", index="prompt_id", values="risk", aggregate_function="first")
        prompts = wide["prompt_id"]
        own = stored.filter(
            (pl.col("press") == press) & pl.col("prompt_id").is_in(prompts.implode())
        )
        risks = {ratio: wide[ratio].fill_null(np.nan).to_numpy() for ratio in ratios}
        heaviest = own.filter(pl.col("ratio") == ratios[-1])
        picks: list[tuple[str, float | None, NDArray[np.str_]]] = [
            ("ladder", threshold, ladder_choice(risks, threshold))
            for threshold in LADDER_THRESHOLDS
        ]
        picks += [("constant", None, np.full(len(prompts), ratio)) for ratio in ratios]
        picks.append(("full cache", None, np.full(len(prompts), "0.000")))
        fine = own.filter(~pl.col("harmed")).group_by("prompt_id").agg(pl.col("ratio").max())
        best = pl.DataFrame({"prompt_id": prompts}).join(
            fine, on="prompt_id", how="left", maintain_order="left"
        )
        picks.append(("oracle_ratio", None, best["ratio"].fill_null("0.000").to_numpy()))
        for choice, threshold, ratio in picks:
            picked = pl.DataFrame({"prompt_id": prompts, "ratio": ratio.astype(str).tolist()})
            ran = pl.concat(
                [
                    picked.join(own, on=["prompt_id", "ratio"], how="inner"),
                    picked.filter(pl.col("ratio") == "0.000").join(
                        whole.drop("ratio"), on="prompt_id", how="inner"
                    ),
                ],
                how="diagonal",
            )
            ran = ran.join(
                heaviest.select("prompt_id", none_harmed="harmed"), on="prompt_id", how="inner"
            )
            kept = picked.join(ran.select("prompt_id"), on="prompt_id", how="semi")
            found = summarize(ran, baseline, samples, seed)
            rows.append(
                {"sample": "test", "press": press, "choice": choice, "threshold": threshold}
                | {"mean_ratio": float(kept["ratio"].cast(pl.Float64).to_numpy().mean())}
                | {"full_cache": float((kept["ratio"] == "0.000").to_numpy().mean())}
                | found
            )
    return pl.DataFrame(rows, schema=LADDER_TYPES)
