"""What is guaranteed about the guard's thresholds: the file, its words, and when it stops to hold.

`kvguard.calibration` makes certificates; this module is what a guard needs to read one.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvguard import schema
from kvguard.config import POINT_NAMES, OperatingPoint, PointName
from kvguard.predictor import Predictor

Risk = Literal["false_alarm", "missed_harm"]

FORMAT = 1

_DEMAND: dict[Risk, str] = {
    "false_alarm": "harmless requests alarm",
    "missed_harm": "harmful requests never alarm before they end",
}


class CertificateError(ValueError):
    """A certificate that cannot be used, or that speaks of another predictor."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Bound(_Part):
    """One statement about one risk of one setting.

    Attributes:
        risk: ``false_alarm`` or ``missed_harm``.
        alpha: what the risk is to stay under.
        delta: the chance, over the draw of the calibration prompts, that a statement of this kind
            is made although it is false.
        prompts: calibration prompts with at least one request that counts.
        requests: those requests.
        observed: mean over those prompts of the share that went wrong; None without any.
        p_value: against "the risk exceeds alpha"; None without any.
        certified: whether the statement is made.
        prompts_needed_at_zero: prompts it takes if nothing at all goes wrong on them.
        prompts_needed: prompts it takes if the observed share stays; None where it is not under
            alpha, so that no number would do, or nothing was observed.
    """

    risk: Risk
    alpha: float
    delta: float
    prompts: int = Field(ge=0)
    requests: int = Field(ge=0)
    observed: float | None
    p_value: float | None
    certified: bool
    prompts_needed_at_zero: int
    prompts_needed: int | None

    @property
    def text(self) -> str:
        """The statement, or the refusal, in words."""
        claim = f"at most {self.alpha:.0%} of {_DEMAND[self.risk]}"
        seen = (
            "no such request was seen"
            if self.observed is None
            else f"{self.observed:.1%} observed, {self.prompts} prompts, {self.requests} requests"
        )
        if self.certified:
            return f"with probability at least {1 - self.delta:.0%}, {claim} ({seen})"
        more = max(self.prompts_needed_at_zero - self.prompts, 0)
        need = (
            f"it takes at least {self.prompts_needed_at_zero} such prompts, {more} more than there "
            f"are, even if nothing goes wrong on them"
        )
        if self.prompts_needed is not None:
            need += f", and {self.prompts_needed} at the observed share"
        elif self.observed is not None:
            need += "; at the observed share no number of prompts would do"
        return f"not certified that {claim} ({seen}): {need}"


class Reference(_Part):
    """How often requests of the calibration prompts alarm, harmless or not, for `DriftMonitor`.

    Attributes:
        press, ratio: the condition, or None for all of them pooled.
        prompts: calibration prompts.
        rate: mean over prompts of the share of their requests that alarm.
        lower, upper: bounds on the expected rate, each valid with probability 1 - delta.
        delta: of each bound.
    """

    press: str | None
    ratio: str | None
    prompts: int
    rate: float
    lower: float
    upper: float
    delta: float


class CertifiedPoint(_Part):
    """One operating point: its thresholds and what is known about it."""

    name: PointName
    operating_point: OperatingPoint
    false_alarm: Bound
    missed_harm: Bound
    references: list[Reference]

    @property
    def text(self) -> str:
        """Setting and statements in words."""
        point = self.operating_point
        values = f"tau_low={point.tau_low:g}, tau_high={point.tau_high:g}, k={point.k}, j={point.j}"
        return f"{self.name} ({values}): {self.false_alarm.text}; {self.missed_harm.text}."


class Certificate(_Part):
    """Operating points with what could be certified about them.

    Attributes:
        predictor_digest: of the predictor that the thresholds belong to.
        target: the failure that counts as harm.
        alpha, delta: of the headline: which settings of the grid have a false-alarm risk of at most
            alpha.
        certified: whether the headline names any setting.
        certified_points: the settings that it names; with probability 1 - delta all of them hold.
        headline: the statement or the refusal about the grid.
        points: the operating points by name; each says what was certified about it.
        prompts_certifying: prompts kept for the certificate.
        prompts_total: prompts of the run, of all splits.
        prompts_digest: of the prompts that certify.
    """

    format: int = FORMAT
    predictor_digest: str
    target: str
    alpha: float
    delta: float
    certified: bool
    certified_points: list[OperatingPoint]
    headline: Bound
    points: dict[PointName, CertifiedPoint]
    prompts_certifying: int
    prompts_total: int
    prompts_digest: str

    def operating_point(self, name: str) -> OperatingPoint:
        """The thresholds of an operating point.

        Raises:
            CertificateError: an unknown name; lists the known ones.
        """
        return self._point(name).operating_point

    def bounds(self, name: str) -> tuple[Bound, Bound]:
        """What is known about an operating point's false alarms and missed harm."""
        point = self._point(name)
        return point.false_alarm, point.missed_harm

    def check_predictor(self, predictor: Predictor) -> None:
        """Check that the thresholds belong to this predictor.

        Raises:
            CertificateError: names both digests.
        """
        if predictor.digest != self.predictor_digest:
            raise CertificateError(
                f"the certificate speaks of predictor {self.predictor_digest}, this one is "
                f"{predictor.digest}: calibrate again"
            )

    @property
    def text(self) -> str:
        """The whole certificate in words."""
        chosen = (
            f"{len(self.certified_points)} settings of the grid are certified together: "
            if self.certified
            else "No setting of the grid is certified: "
        )
        lines = [
            f"Harm is target {self.target!r}. The unit is the prompt: a share is that of a "
            "prompt's own requests, averaged over prompts. Each statement holds on its own, over "
            "the draw of the calibration prompts, for requests that resemble theirs. Of the run's "
            f"{self.prompts_total} prompts {self.prompts_certifying} certify; for more of these, "
            "enlarge the run or the calibration split.",
            f"{chosen}{self.headline.text}.",
            *(self.points[name].text for name in POINT_NAMES if name in self.points),
        ]
        return "\n".join(lines)

    def _point(self, name: str) -> CertifiedPoint:
        for known, point in self.points.items():
            if known == name:
                return point
        raise CertificateError(f"no operating point {name!r}; known: {', '.join(self.points)}")


def save_certificate(certificate: Certificate, path: str | Path) -> None:
    """Write a certificate as JSON with its text, all or nothing."""
    content = certificate.model_dump(mode="json") | {"text": certificate.text}
    with schema.atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def load_certificate(path: str | Path) -> Certificate:
    """Read a certificate that `save_certificate` wrote.

    Raises:
        FileNotFoundError: names the path and the rule that would make it.
        CertificateError: the file is not a certificate of this version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no certificate at {path}; `kvguard train` makes it")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CertificateError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise CertificateError(f"{path} is not a certificate of format {FORMAT}")
    try:
        return Certificate.model_validate({k: v for k, v in content.items() if k != "text"})
    except ValidationError as error:
        raise CertificateError(f"{path} is not a certificate of this package:\n{error}") from None


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
        references = certificate._point(operating_point).references
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
