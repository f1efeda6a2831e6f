"""What is guaranteed about the guard's thresholds: the file, its words, and where it applies.

`kvguard.calibration` makes certificates; this module is what a guard needs to read one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvguard import schema
from kvguard.config import POINT_NAMES, OperatingPoint, PointName
from kvguard.predictor import Predictor

Risk = Literal["harm_left", "alarm", "false_alarm", "missed_harm"]

FORMAT = 2

_DEMAND: dict[Risk, str] = {
    "harm_left": "requests are harmed and not repaired",
    "alarm": "requests alarm",
    "false_alarm": "requests that compression does not harm alarm",
    "missed_harm": "requests that compression harms never alarm",
}


class CertificateError(ValueError):
    """A certificate that cannot be used, or that speaks of something else."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Use(_Part):
    """What a statement is bound to; anywhere else it says nothing.

    A field that is empty, 0 or None was not recorded and binds nothing.

    Attributes:
        model, model_digest: name, and digest of weights and tokenizer; None: not recorded.
        press, press_class, phase: the press's name, its class, and when it compresses.
        press_settings: of the configuration's entry: ``kwargs`` and, where the press compresses
            while decoding, ``interval_tokens`` and ``buffer_tokens``.
        ratio: fraction removed.
        task: of the prompts.
        max_new_tokens: longest answer.
        decoding: how tokens are chosen, `config.Generation.text`.
        check_every_tokens: how often the predictor is asked about a row.
        recovery: what an alarm does.
    """

    model: str
    model_digest: str | None
    press: str
    press_class: str
    phase: str
    press_settings: dict[str, Any] | None = None
    ratio: str
    task: str
    max_new_tokens: int
    decoding: str = ""
    check_every_tokens: int
    recovery: str

    @property
    def text(self) -> str:
        """The use in one line."""
        decoding = f", {self.decoding}" if self.decoding else ""
        return (
            f"{self.model}, {self.press} {self.ratio} ({self.phase}), task {self.task}, at most "
            f"{self.max_new_tokens} tokens{decoding}, examined every {self.check_every_tokens}, "
            f"recovery {self.recovery}"
        )


class Bound(_Part):
    """One statement about one risk of one operating point.

    Attributes:
        risk: what goes wrong: ``harm_left``, ``alarm``, ``false_alarm`` or ``missed_harm``.
        alpha: what the risk is to stay under.
        delta: the chance, over the draw of the calibration prompts, that any statement of the
            sequence is made although it is false; certificates from the same prompts add up.
        unit: what is independent: prompts, or templates where prompts are drawn from templates.
        units: calibration units with at least one request that counts.
        requests: those requests.
        observed: mean over units of the share that went wrong; None without any.
        p_value: against "the risk exceeds alpha"; None without any.
        certified: whether the statement is made.
        units_needed_at_zero: units it takes if nothing at all goes wrong on them.
        units_needed: units it takes if the observed share stays; None where it is not under alpha,
            so that no number would do, or nothing was observed.
    """

    risk: Risk
    alpha: float
    delta: float
    unit: Literal["prompt", "template"]
    units: int = Field(ge=0)
    requests: int = Field(ge=0)
    observed: float | None
    p_value: float | None
    certified: bool
    units_needed_at_zero: int
    units_needed: int | None

    @property
    def text(self) -> str:
        """The statement, or the refusal, in words."""
        claim = f"at most {self.alpha:.0%} of {_DEMAND[self.risk]}"
        seen = (
            "no such request was seen"
            if self.observed is None
            else f"{self.observed:.1%} observed, {self.units} {self.unit}s, "
            f"{self.requests} requests"
        )
        if self.certified:
            return f"with probability at least {1 - self.delta:.0%}, {claim} ({seen})"
        more = max(self.units_needed_at_zero - self.units, 0)
        need = (
            f"it takes at least {self.units_needed_at_zero} such {self.unit}s, {more} more than "
            "there are, even if nothing goes wrong on them"
        )
        if self.units_needed is not None:
            need += f", and {self.units_needed} at the observed share"
        elif self.observed is not None:
            need += "; at the observed share no number of them would do"
        return f"not certified that {claim} ({seen}): {need}"


class Statement(_Part):
    """What is known of one operating point in one use.

    The primary statement is ``harm_left`` together with ``alarms``: both are certified or neither
    is. The others are secondary, in the same sequence of tests.
    """

    use: Use
    operating_point: PointName
    harm_left: Bound
    alarms: Bound
    false_alarm: Bound
    missed_harm: Bound
    conservative: bool = Field(
        description="requests whose ending no trace proves count as harmed: the recovery goes on "
        "compressed after a check"
    )

    @property
    def certified(self) -> bool:
        """Whether the primary statement is made."""
        return self.harm_left.certified

    @property
    def primary_text(self) -> str:
        """The primary statement, or the refusal, in words."""
        note = (
            " Requests that alarm and go on compressed count as harmed: no trace proves their "
            "ending."
            if self.conservative
            else ""
        )
        return (
            f"{self.operating_point}, {self.use.text}: {self.harm_left.text}; jointly, "
            f"{self.alarms.text}.{note}"
        )

    @property
    def text(self) -> str:
        """The primary statement and the secondary ones in words."""
        secondary = f"{self.false_alarm.text}; {self.missed_harm.text}"
        return f"{self.primary_text} Secondary: {secondary}."


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
    """One operating point: its thresholds and how often requests alarm under them.

    Attributes:
        price: what a check costs, in harmed requests; the thresholds minimise harm left plus
            ``price`` times alarms.
    """

    name: PointName
    operating_point: OperatingPoint
    price: float
    references: list[Reference]

    @property
    def text(self) -> str:
        """Thresholds and price in words."""
        point = self.operating_point
        return (
            f"{self.name} (tau_low={point.tau_low:g}, tau_high={point.tau_high:g}, k={point.k}, "
            f"j={point.j}): a check may cost {self.price:g} of a harmed request"
        )


class Certificate(_Part):
    """Operating points with what could be certified about them.

    Attributes:
        predictor_digest: of the predictor that the thresholds belong to.
        target: what the predictor was trained for.
        delta: of each use's sequence of tests, in one certificate.
        looks: certificates made from these calibration prompts so far, this one included; all of
            them hold together with probability 1 - looks x delta.
        frozen: digest of everything that the certificate depends on but the prompts.
        frozen_before_prompts: whether that digest was recorded before any prompt was generated.
        points: the operating points by name.
        statements: one for each use and operating point.
        prompts_certifying: prompts kept for the certificate.
        prompts_total: prompts of the run, of all splits.
        prompts_digest: of the prompts that certify.
    """

    format: int = FORMAT
    predictor_digest: str
    target: str
    delta: float
    looks: int = Field(ge=1)
    frozen: str
    frozen_before_prompts: bool
    points: dict[PointName, CertifiedPoint]
    statements: list[Statement]
    prompts_certifying: int
    prompts_total: int
    prompts_digest: str

    @property
    def certified(self) -> bool:
        """Whether the primary statement is made for any use and operating point."""
        return any(statement.certified for statement in self.statements)

    @property
    def confidence(self) -> float:
        """With which all certificates made from these prompts hold; 0 where nothing is left."""
        return max(1 - self.looks * self.delta, 0.0)

    def operating_point(self, name: str) -> OperatingPoint:
        """The thresholds of an operating point.

        Raises:
            CertificateError: an unknown name; lists the known ones.
        """
        return self.point(name).operating_point

    def point(self, name: str) -> CertifiedPoint:
        """An operating point by its name; CertificateError lists the known ones."""
        for known, point in self.points.items():
            if known == name:
                return point
        raise CertificateError(f"no operating point {name!r}; known: {', '.join(self.points)}")

    def statements_about(self, operating_point: str, **use: Any) -> list[Statement]:
        """What is known of an operating point in a use, one statement for each task and press name.

        Args:
            operating_point: its name.
            use: fields of `Use` and their values; those not given may be anything.

        Raises:
            CertificateError: the certificate was made on something else; names what differs.
        """
        name = self.point(operating_point).name
        known = [one for one in self.statements if one.operating_point == name]
        if not known:
            raise CertificateError("the certificate makes no statement about any use")

        def differing(statement: Statement) -> list[str]:
            recorded = {key: getattr(statement.use, key) for key in use}
            return [key for key, value in recorded.items() if value and value != use[key]]

        found = [one for one in known if not differing(one)]
        if not found:
            fields = differing(min(known, key=lambda one: len(differing(one))))
            told = ", ".join(
                f"{key}={use[key]!r} (certified on "
                f"{', '.join(sorted({repr(getattr(one.use, key)) for one in known}))})"
                for key in fields
            )
            raise CertificateError(
                f"the certificate does not speak of {told}: {self.advice(operating_point)}"
            )
        return found

    def advice(self, operating_point: str) -> str:
        """What to do where the certificate does not speak of a use."""
        point = self.operating_point(operating_point)
        return (
            f"a named operating point is for certified uses alone; calibrate again (`kvguard "
            f"calibrate`), or use the thresholds of {operating_point!r} without a certificate: "
            f"operating_point=OperatingPoint(tau_low={point.tau_low:g}, tau_high="
            f"{point.tau_high:g}, k={point.k}, j={point.j})"
        )

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
        made = [statement for statement in self.statements if statement.certified]
        reuse = (
            f"These prompts were used for {self.looks} certificates; all of them hold together "
            f"with probability at least {self.confidence:.0%}."
            if self.looks > 1
            else "These prompts were used for no other certificate."
        )
        frozen = (
            "Everything it depends on was recorded before the prompts were generated."
            if self.frozen_before_prompts
            else "What it depends on was NOT recorded before the prompts were generated: read it "
            "as exploratory."
        )
        lines = [
            f"{len(made)} of {len(self.statements)} primary statements are certified, each with "
            f"its secondary ones at {1 - self.delta:.0%}, over the draw of the calibration "
            f"prompts, for requests that resemble theirs. Of the run's {self.prompts_total} "
            f"prompts {self.prompts_certifying} certify; for more of these, enlarge the run or the "
            f"calibration split. {reuse} {frozen}",
            *(self.points[name].text for name in POINT_NAMES if name in self.points),
            *(statement.primary_text for statement in self.statements),
        ]
        return "\n".join(lines)


def upper_bound(row: Mapping[str, Any]) -> float | None:
    """Exact upper bound at 1 - delta of a share that was observed on calibration prompts.

    Args:
        row: ``observed``, ``units``, ``requests`` and ``delta`` as in `Bound`.

    Returns:
        Clopper and Pearson's bound (1934); None where a unit holds several requests, or none was
        seen.
    """
    from scipy import stats  # a guard that reads a certificate needs none of it

    units = row["units"]
    if row["observed"] is None or units == 0 or row["requests"] != units:
        return None
    wrong = round(row["observed"] * units)
    if wrong == units:
        return 1.0
    return float(stats.beta.ppf(1 - row["delta"], wrong + 1, units - wrong))


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
