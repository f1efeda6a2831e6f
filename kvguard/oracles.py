"""Oracles: what could be had by knowing, before a request is decoded, whether it will be harmed.

Every plot of benefit against cost shows them: no policy of that recovery can do better. They act on
harmed requests alone, so they raise no false alarm and leave no harm; what differs is the cost.

- ``oracle_gate`` decodes harmed requests on the full cache from the first token.
- ``oracle_onset`` checks at the token where harm starts, then goes on with the full cache.
- ``oracle_end`` checks harmed requests once, at their end.
- ``oracle_ratio`` decodes each request at the highest ratio of the press, the condition's own at
  most, that does not harm it; on the full cache where every ratio does.
"""

from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard import config
from kvguard.schema import CONDITION
from kvguard.stored_requests import StoredRequests

ORACLES = tuple(name for name, entry in config.POLICIES.items() if not entry.live)
"""Names of the oracles."""


BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int32]


class Ending(NamedTuple):
    """How N requests end under a policy, all (N,)."""

    draft: NDArray[np.int64]  # tokens generated when the policy intervenes, or all of them
    alarmed: BoolArray
    released: IntArray  # see Replay
    source: NDArray[np.int64]  # row whose tokens are the final ones (STOP: their start); -1 unknown
    stopped: BoolArray
    checks: BoolArray  # goes on compressed after a check, or ended with it
    recovers: BoolArray  # goes on at the safe ratio after a pass over what it keeps
    carried: NDArray[np.int64]  # tokens that the recovering pass processes
    kept: NDArray[np.int64]  # tokens that stay; -1 unknown
    cuts: BoolArray  # a recovery that asked which tokens stay
    cold: bool  # checks run the draft alone
    replayed_bytes: NDArray[np.float64] | None = None  # caches that probes were replayed over
    replays: NDArray[np.int64] | None = None  # how many; None: the policy reads no probes
    prefills: NDArray[np.int64] | None = None  # of the prompt, beyond the first


def is_proven(
    requests: StoredRequests, kept: NDArray[np.int64], draft: NDArray[np.int64]
) -> BoolArray:
    """(N,) whether what a check keeps of a draft is the uncompressed answer's prefix.

    So are tokens that the audit lets through, unless they tie with what the uncompressed run chose.
    """
    rejected, differs = requests.first_rejected, requests.first_difference
    prefix = (kept <= rejected) & (kept <= differs)
    tie_at_cut = (kept < draft) & (kept == rejected) & (rejected < differs)
    return np.asarray(prefix & ~tie_at_cut)


def oracle_ending(name: str, requests: StoredRequests, flagged: BoolArray | None = None) -> Ending:
    """How every request ends under an oracle; unknown where harm or its onset is.

    Args:
        name: one of `ORACLES`.
        requests: the traces.
        flagged: (N,) acts on these requests instead of those that are harmed: what a forecast that
            flags them would lead to. Not for ``oracle_onset`` and ``oracle_ratio``.

    Raises:
        ValueError: ``flagged`` with an oracle that needs to know more.
    """
    table, own = requests.table, np.arange(len(requests.lengths))
    judged = table["harmed"].is_not_null().to_numpy()
    harmed = table["harmed"].fill_null(False).to_numpy()
    if flagged is not None:
        if name not in ("oracle_gate", "oracle_end"):
            raise ValueError(f"flagged: for oracle_gate and oracle_end, got {name!r}")
        judged, harmed = np.ones(len(own), np.bool_), flagged & (requests.baseline >= 0)
    lengths = requests.lengths.astype(np.int64)
    draft, kept = lengths.copy(), lengths.copy()
    promotes = np.zeros(len(own), np.bool_)
    if name == "oracle_ratio":
        source = harmless_ratio(requests)
    elif name == "oracle_gate":
        source = np.where(harmed, requests.baseline, own)
    else:
        promotes = harmed
        if name == "oracle_onset":
            onset = table["harm_onset"].fill_null(-1).to_numpy().astype(np.int64)
            judged &= ~harmed | (onset >= 0)
            draft = np.where(harmed, np.clip(onset + 1, 1, lengths), lengths)
        kept = np.minimum(requests.first_rejected, draft).astype(np.int64)
        proven = is_proven(requests, kept, draft)
        source = np.where(harmed, np.where(proven, requests.baseline, -1), own)
    source = np.where(judged, source, -1)
    nothing = np.zeros(len(own), np.bool_)
    return Ending(
        draft=draft,
        alarmed=harmed,
        released=np.zeros(len(own), np.int32),
        source=source.astype(np.int64),
        stopped=nothing,
        checks=nothing,
        recovers=promotes,
        carried=draft,
        kept=kept,
        cuts=promotes,
        cold=requests.cold,
    )


def harmless_ratio(requests: StoredRequests) -> NDArray[np.int64]:
    """(N,) row of the same prompt at the highest ratio, its own at most, that does it no harm.

    The uncompressed row where every such ratio harms.
    """
    alone = ("model", "press", "prompt_id")
    table = requests.table.select(*CONDITION, "prompt_id", "harmed").with_columns(
        row=pl.int_range(pl.len(), dtype=pl.Int64), base=pl.Series(requests.baseline)
    )
    fine = pl.when(~pl.col("harmed")).then("row")
    best = table.sort("ratio").with_columns(best=fine.forward_fill().over(alone))
    return best.sort("row")["best"].fill_null(best.sort("row")["base"]).to_numpy()
