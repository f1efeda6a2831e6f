"""Whether live requests still resemble the calibration prompts, tested at any time."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvguard.certificate import Certificate, CertificateError


class DriftMonitor:
    """Says when requests alarm more or less often than on the calibration prompts.

    Whether a live request is harmless is not known, so the false-alarm rate itself cannot be
    watched. What can be watched is the rate of alarms. If it leaves the range that the calibration
    prompts allow, then live requests do not resemble them, and the certificate does not apply. The
    reverse does not follow: the alarm rate may stay as it was while harmless requests alarm more
    and harmful ones less.

    The test is anytime-valid: it may be read after every request, for ever. Two e-processes,
    against "the rate is at most the reference's upper bound" and "at least its lower bound", are
    mixtures of likelihood ratios over fixed alternatives. Each is a non-negative supermartingale
    that starts at 1, so (Ville 1939) the chance that one of them ever reaches 2 / level is at most
    ``level`` while the reference's bounds are right. They are wrong with probability at most twice
    the reference's delta. Successive requests must be of different prompts: count a prompt once.

    Args:
        certificate: as loaded.
        operating_point: the one in use.
        press, ratio: the condition in use; None pools all of calibration's, which is only right
            where live requests mix them alike.
        level: the chance of a warning without a cause.

    Raises:
        CertificateError: unknown operating point or condition.
    """

    def __init__(
        self,
        certificate: Certificate,
        operating_point: str = "balanced",
        *,
        press: str | None = None,
        ratio: str | None = None,
        level: float = 0.05,
    ) -> None:
        references = certificate.point(operating_point).references
        found = [r for r in references if (r.press, r.ratio) == (press, ratio)]
        if not found:
            known = [(r.press, r.ratio) for r in references]
            raise CertificateError(f"no reference for ({press}, {ratio}); known: {known}")
        if not 0 < level < 1:
            raise ValueError(f"level lies between 0 and 1, got {level:g}")
        self.reference = found[0]
        self.level = level
        self.requests = 0
        self.alarms = 0
        self.drifted: Literal["more", "fewer"] | None = None
        self._prompts: set[int] = set()
        upper, lower = self.reference.upper, self.reference.lower
        self._more = _Mixture(upper, np.linspace(upper, 1, _ALTERNATIVES + 2)[1:-1])
        self._fewer = _Mixture(lower, np.linspace(0, lower, _ALTERNATIVES + 2)[1:-1])

    def update(self, alarmed: bool | Iterable[bool]) -> Literal["more", "fewer"] | None:
        """Count one request, or several in their order; returns `drifted`.

        Returns:
            ``more`` or ``fewer`` once requests have alarmed more or less often than the reference
            allows; it stays so. None as long as nothing is amiss.
        """
        for alarm in [alarmed] if isinstance(alarmed, bool | np.bool_) else alarmed:
            self.requests += 1
            self.alarms += bool(alarm)
            threshold = math.log(2 / self.level)
            more, fewer = self._more.update(bool(alarm)), self._fewer.update(bool(alarm))
            if self.drifted is None and max(more, fewer) >= threshold:
                self.drifted = "more" if more >= fewer else "fewer"
        return self.drifted

    def count_prompts(self, requests: Iterable[tuple[Sequence[int], bool]]) -> bool:
        """Count those requests whose prompts have not been counted.

        Args:
            requests: prompt ids, and whether the request alarmed, of those that did not fail.

        Returns:
            Whether `drifted` has changed.
        """
        before = self.drifted
        for prompt_ids, alarmed in requests:
            prompt = hash(tuple(prompt_ids))
            if prompt not in self._prompts:
                self._prompts.add(prompt)
                self.update(alarmed)
        return self.drifted != before

    @property
    def e_value(self) -> float:
        """Evidence against the reference so far, 1 at the start; a warning comes at 2 / level."""
        return math.exp(min(max(self._more.log_value, self._fewer.log_value), 700.0))

    @property
    def text(self) -> str:
        """Where the monitor stands, in words."""
        reference = self.reference
        allowed = f"{reference.lower:.1%} to {reference.upper:.1%} ({reference.prompts} prompts)"
        if self.requests == 0:
            return f"no request yet; calibration allows an alarm rate of {allowed}"
        seen = f"{self.alarms} of {self.requests} requests alarmed; calibration allows {allowed}"
        if self.drifted is None:
            return f"{seen}: no evidence of drift"
        return f"{seen}: {self.drifted} alarms than it allows, the certificate no longer applies"


_ALTERNATIVES = 32


class _Mixture:
    """Log of an equal mixture of Bernoulli likelihood ratios against one null rate."""

    def __init__(self, null: float, alternatives: NDArray[np.float64]) -> None:
        self.log_value = 0.0
        if not 0 < null < 1:  # a bound at 0 or 1 excludes nothing
            alternatives, null = np.array([0.5]), 0.5
        self._hit = np.log(alternatives / null)
        self._miss = np.log1p(-alternatives) - math.log1p(-null)
        self._sums = np.zeros(len(alternatives))

    def update(self, hit: bool) -> float:
        self._sums += self._hit if hit else self._miss
        top = self._sums.max()
        self.log_value = float(top + np.log(np.mean(np.exp(self._sums - top))))
        return self.log_value
