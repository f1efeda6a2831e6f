"""Policies against each other on the same requests: who harms less, who costs less.

Each pair of policies in a condition is compared on the prompts that both answered with a known
outcome: harm by the exact McNemar test, device byte-steps by a paired bootstrap over prompts. The
p-values of a condition are one family, adjusted by Holm. A pair with no discordant prompt has no
difference to show; its interval is the exact one of the share of harmed requests that could have
been missed, never a bare 0.
"""

from itertools import combinations

import polars as pl
from scipy import stats

from kvguard import config
from kvguard.paired_tests import holm, mcnemar_exact, paired_bootstrap
from kvguard.schema import CONDITION

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
    both = one.join(other, on="prompt_id", suffix="_other").drop_nulls(["harmed", "harmed_other"])
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
