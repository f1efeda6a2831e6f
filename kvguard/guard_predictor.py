"""What a guard is given to predict with: a predictor, its certificate, thresholds by name."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from kvguard.config import POINT_NAMES, OperatingPoint
from kvguard.guard_report import GuardError
from kvguard.harm_model import DEFAULT, HarmModel, load_harm_model
from kvguard.schema import FEATURE_VERSION

if TYPE_CHECKING:
    from kvguard.certificate import Certificate
    from kvguard.guard_observer import HazardModel

logger = logging.getLogger(__name__)

RULES_POINTS = {
    "conservative": OperatingPoint(tau_low=0.4, tau_high=0.8, k=2, j=16),
    "balanced": OperatingPoint(tau_low=0.3, tau_high=0.6, k=2, j=16),
    "aggressive": OperatingPoint(tau_low=0.2, tau_high=0.4, k=1, j=16),
}
"""Thresholds of ``predictor="rules"``, which has no certificate."""


def resolve_predictor(
    given: "str | Path | HazardModel", needs_certificate: bool
) -> "tuple[HazardModel, Certificate | None]":
    """A predictor and the certificate beside it that speaks of it.

    Raises:
        CertificateError: it speaks of another predictor or cannot be read, and is needed.
    """
    from kvguard.certificate import CertificateError, load_certificate
    from kvguard.predictor import load_predictor, rules_predictor

    if isinstance(given, str) and given == "rules":
        return rules_predictor(), None
    if isinstance(given, str | Path):
        path = Path(given)
        if not path.is_file():
            raise GuardError(f'predictor: no file at {path}; give a trained predictor or "rules"')
        predictor = load_predictor(path)
        beside = path.with_name("certificate.json")
        if not beside.is_file():
            return predictor, None
        try:
            certificate = load_certificate(beside)
            certificate.check_predictor(predictor)
        except CertificateError:
            if needs_certificate:
                raise
            return predictor, None
        logger.info("%s", certificate.text)
        return predictor, certificate
    if given.feature_version != FEATURE_VERSION:
        raise GuardError(
            f"predictor: made for feature version {given.feature_version}, the guard computes "
            f"version {FEATURE_VERSION}"
        )
    return given, None


def resolve_harm_model(given: "str | Path | HazardModel | HarmModel") -> HarmModel:
    """What `guard_price` is given to predict harm with; "rules" is the default.

    Raises:
        GuardError: it is no harm model.
    """
    if isinstance(given, HarmModel):
        return given
    if given == "rules":
        return DEFAULT
    if isinstance(given, str | Path):
        return load_harm_model(given)
    raise GuardError(
        "predictor: policy='guard_price' needs a HarmModel, results/models/harm_model.json of a "
        f"run, or 'rules', got {type(given).__name__}"
    )


def resolve_point(
    given: str | OperatingPoint | Mapping[str, float],
    certificate: "Certificate | None",
    rules: bool,
) -> OperatingPoint:
    """Thresholds by name: the certificate's, or the rules'; of another predictor there are none."""
    if isinstance(given, OperatingPoint):
        return given
    if isinstance(given, Mapping):
        try:
            return OperatingPoint.model_validate(dict(given))
        except ValidationError as error:
            faults = [
                ".".join(["operating_point", *map(str, fault["loc"])])
                + f": {fault['msg'].removeprefix('Value error, ')}, got {fault['input']!r}"
                for fault in error.errors()
            ]
            raise GuardError("; ".join(faults)) from None
    if given not in POINT_NAMES:
        raise GuardError(f"operating_point is one of {', '.join(POINT_NAMES)}, got {given!r}")
    if certificate is not None:
        return certificate.operating_point(given)
    if rules:
        return RULES_POINTS[given]
    raise GuardError(
        f"operating_point: {given!r} is a name in a certificate, and there is no certificate.json "
        "beside the predictor; give thresholds, an OperatingPoint(tau_low, tau_high, k, j)"
    )
