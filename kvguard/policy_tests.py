"""Policies against each other on the same requests: who harms less, who costs less.

Each pair of policies in a condition is compared on the prompts that both answered with a known
outcome: harm by the exact McNemar test, device byte-steps by a paired bootstrap over prompts. The
p-values of a condition are one family, adjusted by Holm. A pair with no discordant prompt has no
difference to show; its interval is the exact one of the share of harmed requests that could have
been missed, never a bare 0.
"""

from collections.abc import Sequence
from itertools import combinations

import polars as pl
from scipy import stats

from kvguard import config
from kvguard.compare_policies import pool_conditions, with_references
from kvguard.metrics import exact_reach
from kvguard.paired_tests import Estimate, holm, mcnemar_exact, paired_bootstrap
from kvguard.schema import CONDITION, TRACE_KEYS

COLUMNS: dict[str, type[pl.DataType]] = {
    **dict.fromkeys(("model", "press", "ratio", "source", "policy", "other"), pl.String),
    **dict.fromkeys(("prompts", "harmed", "other_harmed", "only_harmed", "only_other"), pl.Int64),
    **dict.fromkeys(
        (
            *("harm_difference", "harm_p_value", "harm_p_adjusted", "discordant_high"),
            *("byte_steps_difference", "byte_steps_low", "byte_steps_high"),
        ),
        pl.Float64,
    ),
}
"""``harm_difference`` and ``byte_steps_difference``: policy minus other, negative is better.

``discordant_high``: exact upper bound (95 %) on the share of prompts on which the two differ in
harm; of use where ``only_harmed`` and ``only_other`` are both 0."""


def compare_pairs(runs: pl.DataFrame, *, samples: int = 500, seed: int = 0) -> pl.DataFrame:
    """Compare every two policies in each condition.

    Args:
        runs: RUNS of one or several sources; policies are compared within a source.
        samples: bootstrap samples.
        seed: of the resampling.

    Returns:
        One row per condition, source and pair, with `COLUMNS`; null where undefined.
    """
    ran = runs.filter((pl.col("status") == "ok") & (pl.col("press") != config.BASELINE))
    rows = []
    for key, part in ran.group_by(*CONDITION, "source", maintain_order=True):
        policies = {
            str(name[0]): frame.select("prompt_id", "harmed", "device_byte_steps")
            for name, frame in part.group_by("policy", maintain_order=True)
        }
        names = [name for name in config.POLICIES if name in policies]
        family = [
            dict(zip((*CONDITION, "source"), key, strict=True))
            | {"policy": one, "other": other}
            | _pair(policies[one], policies[other], samples, seed)
            for one, other in combinations(names, 2)
        ]
        adjusted = holm([row["harm_p_value"] for row in family])
        rows += [
            row | {"harm_p_adjusted": value} for row, value in zip(family, adjusted, strict=True)
        ]
    return pl.DataFrame(rows, schema=COLUMNS)


def _pair(one: pl.DataFrame, other: pl.DataFrame, samples: int, seed: int) -> dict[str, object]:
    both = _pairs(one, other, ["prompt_id"])
    first, second = both["harmed"].to_numpy(), both["harmed_other"].to_numpy()
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    priced = both.drop_nulls(["device_byte_steps", "device_byte_steps_other"])
    # A difference over some of the prompts is not that of all: null unless all are known.
    whole = priced.height == both.height > 0
    cost = paired_bootstrap(
        priced["device_byte_steps_other"].to_numpy(),
        priced["device_byte_steps"].to_numpy(),
        priced["prompt_id"].to_list(),
        samples=samples,
        seed=seed,
    )
    count, discordant = both.height, only_first + only_second
    high = None
    if count:
        bound = stats.beta.ppf(0.95, discordant + 1, count - discordant)
        high = 1.0 if discordant == count else float(bound)
    return {
        "prompts": count,
        "harmed": int(first.sum()),
        "other_harmed": int(second.sum()),
        "only_harmed": only_first,
        "only_other": only_second,
        "harm_difference": (only_first - only_second) / count if count else None,
        "harm_p_value": mcnemar_exact(first, second),
        "discordant_high": high,
        "byte_steps_difference": cost.value if whole else None,
        "byte_steps_low": cost.low if whole else None,
        "byte_steps_high": cost.high if whole else None,
    }


def _pairs(one: pl.DataFrame, other: pl.DataFrame, on: Sequence[str]) -> pl.DataFrame:
    """Requests that both policies answered with a known outcome."""
    both = one.join(other, on=list(on), suffix="_other", maintain_order="left")
    return both.drop_nulls(["harmed", "harmed_other"])


RIVALS = (
    *("none", "verify_on_failure", "lossless", "lossless_auto", "gate", "ladder"),
    *("guard_promote", "always_safe"),
)
"""What `compare_with_guard` compares the guard with, of those that ran."""

GUARD_COLUMNS: dict[str, type[pl.DataType]] = {
    **dict.fromkeys((*CONDITION, "source", "policy", "other"), pl.String),
    **dict.fromkeys(
        ("requests", "prompts", "harmed", "other_harmed", "only_harmed", "only_other"), pl.Int64
    ),
    **dict.fromkeys(
        (
            *("harm_difference", "harm_low", "harm_high", "harm_p_value", "harm_p_adjusted"),
            *("byte_steps_difference", "byte_steps_low", "byte_steps_high"),
            *("byte_steps_p_value", "byte_steps_p_adjusted"),
            *("bus_traffic_difference", "bus_traffic_low", "bus_traffic_high"),
            *("bus_traffic_p_value", "bus_traffic_p_adjusted"),
        ),
        pl.Float64,
    ),
}
"""``byte_steps_*`` are shares of the full KV cache's device byte-steps on the same requests,
``bus_traffic_*`` of the bytes that offloading it would move."""


def compare_with_guard(
    runs: pl.DataFrame,
    *,
    guard: str = "guard",
    rivals: Sequence[str] = RIVALS,
    samples: int = 500,
    seed: int = 0,
) -> pl.DataFrame:
    """The guard against each rival: in every condition, and over all of them together.

    Args:
        runs: RUNS of one source, ``always_safe`` among them (else byte-steps are null).
        guard: the policy that is compared.
        rivals: with what; those that did not run are left out.
        samples: bootstrap samples.
        seed: of the resampling.

    Returns:
        As `compare_listed`; differences below 0 are better for the guard.
    """
    ran = set(runs.filter(pl.col("status") == "ok")["policy"])
    pairs = [(guard, rival) for rival in rivals if {guard, rival} <= ran and rival != guard]
    table = compare_listed(runs, pairs, samples=samples, seed=seed)
    return table.filter(pl.col("requests") > 0)


def compare_listed(
    runs: pl.DataFrame,
    pairs: Sequence[tuple[str, str]],
    *,
    samples: int = 500,
    seed: int = 0,
) -> pl.DataFrame:
    """A list of pairs of policies: in every condition, and over all of them together.

    Harm by the exact McNemar test, its difference and those of the device byte-steps and the bytes
    moved by a paired bootstrap that resamples prompts. Holm adjusts over the list, each measure
    apart. Over all conditions a prompt makes one pair per condition; McNemar's test takes the pairs
    as independent, the intervals do not.

    Args:
        runs: RUNS of one source, ``always_safe`` among them (else byte-steps are null).
        pairs: (policy, other).
        samples: bootstrap samples.
        seed: of the resampling.

    Returns:
        `GUARD_COLUMNS`, a row for each pair whether both ran or not; undefined is null.
        Differences are policy minus other. Model, press and ratio are null in the rows over all
        conditions.
    """
    ran = runs.filter((pl.col("status") == "ok") & (pl.col("press") != config.BASELINE))
    costs = ("device_byte_steps", "traffic", "full_byte_steps", "offloaded_bytes")
    ran = with_references(ran).select(*CONDITION, "prompt_id", "source", "policy", "harmed", *costs)
    groups: list[tuple[tuple[object, ...], pl.DataFrame]] = [((None, None, None), ran)]
    groups += list(ran.group_by(*CONDITION, maintain_order=True))
    rows: list[dict[str, object]] = []
    for key, part in groups:
        family = []
        for policy, other in pairs:
            named = dict(zip(CONDITION, key, strict=True)) | {"policy": policy, "other": other}
            named["source"] = None if part.is_empty() else part["source"][0]
            first, second = (part.filter(pl.col("policy") == name) for name in (policy, other))
            family.append(named | _paired_row(_pairs(first, second, TRACE_KEYS), samples, seed))
        for name in ("harm", "byte_steps", "bus_traffic"):
            p_values = [row[f"{name}_p_value"] for row in family]
            for row, value in zip(family, holm(p_values), strict=True):  # type: ignore[arg-type]
                row[f"{name}_p_adjusted"] = value
        rows += family
    return pl.DataFrame(rows, schema=GUARD_COLUMNS)


def _paired_row(pairs: pl.DataFrame, samples: int, seed: int) -> dict[str, object]:
    if pairs.is_empty():
        known = {"requests": 0, "prompts": 0}
        return dict.fromkeys(list(GUARD_COLUMNS)[len(CONDITION) + 3 :]) | known
    first, second = pairs["harmed"].to_numpy(), pairs["harmed_other"].to_numpy()
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    prompts = pairs["prompt_id"].n_unique()
    harm = paired_bootstrap(
        second.astype(float),
        first.astype(float),
        pairs["prompt_id"].to_list(),
        samples=samples,
        seed=seed,
    )
    if prompts and only_first + only_second == 0:
        reach = exact_reach(prompts)
        harm = Estimate(0.0, -reach, reach)
    cost = _cost_difference(pairs, "device_byte_steps", "full_byte_steps", samples, seed)
    traffic = _cost_difference(pairs, "traffic", "offloaded_bytes", samples, seed)
    return {
        "requests": pairs.height,
        "prompts": prompts,
        "harmed": int(first.sum()),
        "other_harmed": int(second.sum()),
        "only_harmed": only_first,
        "only_other": only_second,
        "harm_difference": harm.value,
        "harm_low": None if harm.low is None else max(harm.low, -1.0),
        "harm_high": None if harm.high is None else min(harm.high, 1.0),
        "harm_p_value": mcnemar_exact(first, second),
        "byte_steps_difference": cost.value,
        "byte_steps_low": cost.low,
        "byte_steps_high": cost.high,
        "byte_steps_p_value": p_of_interval(cost, prompts),
        "bus_traffic_difference": traffic.value,
        "bus_traffic_low": traffic.low,
        "bus_traffic_high": traffic.high,
        "bus_traffic_p_value": p_of_interval(traffic, prompts),
    }


def _cost_difference(
    pairs: pl.DataFrame, cost: str, reference: str, samples: int, seed: int
) -> Estimate:
    """Difference of a cost as a share of its reference's mean; null unless all are known."""
    priced = pairs.drop_nulls([cost, f"{cost}_other", reference])
    if not priced.height == pairs.height > 0:
        return Estimate(None, None, None)
    whole = priced[reference].to_numpy().mean()
    return paired_bootstrap(
        priced[f"{cost}_other"].to_numpy() / whole,
        priced[cost].to_numpy() / whole,
        priced["prompt_id"].to_list(),
        samples=samples,
        seed=seed,
    )


def live_tables(
    live: pl.DataFrame,
    simulated: pl.DataFrame,
    samples: int,
    seed: int,
    planned: Sequence[tuple[str, str]] = (),
) -> dict[str, pl.DataFrame]:
    """``policies_pooled``, ``guard_tests`` and ``planned_tests`` of a run.

    Args:
        live: RUNS with source "live".
        simulated: RUNS with source "simulation"; of the requests that ran live, the policies.
        samples: bootstrap samples.
        seed: of the resampling.
        planned: ``live.planned_tests`` as pairs (policy, other).
    """
    requests = live.select(TRACE_KEYS).unique()
    simulated = simulated.join(requests, on=TRACE_KEYS, how="semi", maintain_order="left")
    pooled = pool_conditions(pl.concat([live, simulated]), bootstrap_samples=samples, seed=seed)
    return {
        "policies_pooled": pooled,
        "guard_tests": compare_with_guard(live, samples=samples, seed=seed),
        "planned_tests": compare_listed(live, planned, samples=samples, seed=seed),
    }


def p_of_interval(estimate: Estimate, units: int) -> float | None:
    """Two-sided p-value against 0 of an estimate with a symmetric 95 % interval of Student's t.

    Args:
        estimate: the number and its interval, as `metrics.bootstrap_interval` makes it.
        units: prompts behind it; one less are the degrees of freedom.
    """
    if estimate.value is None or estimate.low is None or estimate.high is None or units < 2:
        return None
    error = (estimate.high - estimate.low) / 2 / stats.t.ppf(0.975, units - 1)
    if error <= 0:
        return None
    return float(2 * stats.t.sf(abs(estimate.value) / error, units - 1))
