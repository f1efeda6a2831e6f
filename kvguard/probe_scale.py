"""Probes on the scale of their press: ranks among the probes of train prompts under that press.

The attention mass that one press evicts is not comparable with what another one evicts: each has a
level and a spread of its own. A rank among requests of the same press is. The reference needs the
prefills of train prompts only, no outcome; all ratios of a press share one, so that a heavier ratio
of the same prompt still ranks higher.
"""

import logging
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, model_validator

from kvguard import schema
from kvguard.config_types import BASELINE

logger = logging.getLogger(__name__)

MAX_VALUES = 200
"""Reference values kept of each probe: of more, so many quantiles that are values themselves."""

PROBE_COLUMNS = np.array([schema.FEATURE_NAMES.index(name) for name in schema.PROBE_NAMES])
"""Places of the probes among `schema.FEATURE_NAMES`."""

_warned: set[str] = set()


class ProbeScale(BaseModel):
    """Reference values of every probe under every press; make it with `fit_probe_scale`.

    Attributes:
        presses: by press, by probe: its values, ascending. A probe that the press leaves undefined
            has none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    presses: dict[str, dict[str, list[float]]]

    @model_validator(mode="after")
    def _sorted(self) -> "ProbeScale":
        for press, probes in self.presses.items():
            for probe, values in probes.items():
                if probe not in schema.PROBE_NAMES:
                    raise ValueError(
                        f"presses.{press}: unknown probe {probe!r}; one of {schema.PROBE_NAMES}"
                    )
                if any(one > other for one, other in pairwise(values)):
                    raise ValueError(f"presses.{press}.{probe}: values must ascend")
        return self

    def ranks(self, probes: NDArray[np.float32], press: str | ArrayLike) -> NDArray[np.float32]:
        """Probes as shares of reference values below them, ties counting half.

        Args:
            probes: (n, probes) in the order of `schema.PROBE_NAMES`; NaN: undefined.
            press: the press's name, one for all or (n,). Case, underscores and the ending "Press"
                make no difference; the name of a class stands for a reference called after it.

        Returns:
            (n, probes) float32 in [0, 1]; NaN where a probe is undefined, or its press has no
            reference. An unknown press is warned of once; the uncompressed baseline has none.
        """
        names = np.broadcast_to(np.asarray(press, dtype=np.str_), (len(probes),))
        ranked = np.full(probes.shape, np.nan, np.float32)
        for name in np.unique(names):
            rows = np.flatnonzero(names == name)
            references = self._references(_plain(str(name)))
            if references is None:
                _warn(str(name), sorted(self.presses))
                continue
            for column, reference in enumerate(references):
                if not len(reference):
                    continue
                values = probes[rows, column].astype(np.float64)
                below = np.searchsorted(reference, values, side="left")
                not_above = np.searchsorted(reference, values, side="right")
                rank = (below + not_above) / (2 * len(reference))
                ranked[rows, column] = np.where(np.isnan(values), np.nan, rank)
        return ranked

    def scale(self, features: NDArray[np.float32], press: str | ArrayLike) -> NDArray[np.float32]:
        """A copy of features (n, features) in which `ranks` take the place of the probes."""
        scaled = features.copy()
        scaled[:, PROBE_COLUMNS] = self.ranks(features[:, PROBE_COLUMNS], press)
        return scaled

    def _references(self, press: str) -> list[NDArray[np.float64]] | None:
        """Of a press by its own name, else of the first that is called after it: snapkv_w16."""
        named = sorted(name for name in self._by_plain_name if press and name.startswith(press))
        return self._by_plain_name.get(press, self._by_plain_name[named[0]] if named else None)

    @cached_property
    def _by_plain_name(self) -> dict[str, list[NDArray[np.float64]]]:
        return {
            _plain(press): [np.array(probes.get(name, [])) for name in schema.PROBE_NAMES]
            for press, probes in self.presses.items()
        }


def fit_probe_scale(probes: NDArray[np.float32], presses: Sequence[str] | ArrayLike) -> ProbeScale:
    """The reference of every press among some requests; the uncompressed baseline gets none.

    Args:
        probes: (n, probes) one row a request of train prompts.
        presses: (n,) their presses.
    """
    names = np.asarray(presses, dtype=np.str_)
    found: dict[str, dict[str, list[float]]] = {}
    for press in np.unique(names[names != BASELINE]):
        rows = probes[names == press].astype(np.float64)
        found[str(press)] = {
            probe: _reference(column[np.isfinite(column)])
            for probe, column in zip(schema.PROBE_NAMES, rows.T, strict=True)
        }
    return ProbeScale(presses=found)


def _reference(values: NDArray[np.float64]) -> list[float]:
    ordered = np.sort(values)
    if len(ordered) > MAX_VALUES:
        places = (np.arange(MAX_VALUES) + 0.5) * len(ordered) / MAX_VALUES
        ordered = ordered[places.astype(np.int64)]
    return [float(value) for value in ordered]


def _plain(press: str) -> str:
    return press.replace("_", "").replace("-", "").lower().removesuffix("press")


def _warn(press: str, known: list[str]) -> None:
    if press == BASELINE or press in _warned:
        return
    _warned.add(press)
    logger.warning(
        "no reference for the probes of press %r, which count as missing; there are references "
        "for %s",
        press,
        ", ".join(known) or "none",
    )
