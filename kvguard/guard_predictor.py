"""What a guard is given to predict with: a predictor, its certificate, thresholds by name."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from kvguard.config import POINT_NAMES, OperatingPoint
from kvguard.guard_report import GuardError
from kvguard.harm_model import DEFAULT, HarmModel, load_harm_model
from kvguard.schema import FEATURE_VERSION

if TYPE_CHECKING:
    from kvpress import BasePress
    from transformers import PreTrainedModel

    from kvguard.certificate import Certificate, Statement
    from kvguard.guard_observer import HazardModel
    from kvguard.price_certificate import PriceCertificate, PriceStatement, PriceUse

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


def resolve_harm_model(
    given: "str | Path | HazardModel | HarmModel", needs_certificate: bool = False
) -> "tuple[HarmModel, PriceCertificate | None]":
    """What `guard_price` is given to predict harm with, and the certificate of its prices.

    "rules" is the default model. The certificate is read where it is needed.

    Raises:
        GuardError: it is no harm model, or a certificate is needed and ``given`` is no file.
        CertificateError: there is no certificate beside the file, or one of another model of harm.
    """
    if needs_certificate:
        from kvguard.certificate import CertificateError
        from kvguard.price_certificate import PRICE_CERTIFICATE, load_price_certificate

        if given == "rules" or not isinstance(given, str | Path):
            raise GuardError(
                "harm_risk is what the certificate beside a predictor's file certifies; give the "
                "path of a run's harm_model.json as predictor, or harm_price"
            )
        model = load_harm_model(given)
        try:
            certificate = load_price_certificate(Path(given).with_name(PRICE_CERTIFICATE))
        except FileNotFoundError as error:
            raise CertificateError(f"harm_risk: {error}") from None
        certificate.check_model(model)
        logger.info("%s", certificate.text)
        return model, certificate
    if isinstance(given, HarmModel):
        return given, None
    if given == "rules":
        return DEFAULT, None
    if isinstance(given, str | Path):
        return load_harm_model(given), None
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


def deployed(statements: "Sequence[Statement | PriceStatement]") -> "tuple[float, PriceUse]":
    """The price that a certified use takes, and what it is bound to."""
    from kvguard.price_certificate import PriceStatement

    (statement,) = statements
    assert isinstance(statement, PriceStatement)
    assert statement.use is not None
    assert statement.certified_price is not None
    return statement.certified_price, statement.use


def check_streaming(
    streamer: Any, harm_risk: float | None, holdback_tokens: int, max_new_tokens: int
) -> None:
    """Check that a certified price holds for an answer that is streamed, if it is.

    Raises:
        CertificateError: tokens would be released, and stay, before a check has seen them.
    """
    from kvguard.certificate import CertificateError

    certified = streamer is not None and harm_risk is not None
    if certified and holdback_tokens < max_new_tokens:
        raise CertificateError(
            f"harm_risk: a price is certified for answers that are not streamed before a check; "
            f"holdback_tokens={holdback_tokens} would release tokens of {max_new_tokens}, and they "
            f"stay: give holdback_tokens={max_new_tokens}, or harm_price"
        )


def stored_marks(model: "PreTrainedModel") -> NDArray[np.bool_] | None:
    """`probes.marked_tokens` of the tokenizer in a model's folder; None: there is none.

    Without them the probes of such tokens are undefined, unlike those of a run's own prompts.
    """
    folder = model.name_or_path
    if not folder or not (Path(folder) / "tokenizer_config.json").is_file():
        return None
    return _marks_of(str(folder), int(model.config.vocab_size))


@lru_cache(maxsize=4)
def _marks_of(folder: str, size: int) -> NDArray[np.bool_]:
    from transformers import AutoTokenizer

    from kvguard.probes import marked_tokens

    tokenizer = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return marked_tokens(tokenizer, size)


def untrained(
    predictor: "HazardModel | None",
    press: "BasePress | None",
    ratios: Sequence[str] | None,
    max_new_tokens: int,
) -> Iterator[str]:
    """In what a predictor is used otherwise than it was trained, in words.

    Args:
        predictor: one that does not say what it was trained on gives nothing.
        press: the guarded one.
        ratios: at which requests may start; None: the press's own.
        max_new_tokens: longest answer.
    """
    trained = getattr(predictor, "provenance", {}).get("conditions")
    if not trained:
        return
    from kvguard.certified_use import press_use

    use = press_use(press)
    names = sorted({_plain(name) for name, _ in trained["presses"]})
    own = _plain(use["press_class"].removesuffix("Press"))
    own = next((name for name in names if name.startswith(own)), own)  # snapkv_w16 is a snapkv
    at = sorted({ratio for _, ratio in trained["presses"]})
    seen = [
        ("press", own, names),
        *(("ratio", ratio, at) for ratio in ([use["ratio"]] if ratios is None else ratios)),
        ("max_new_tokens", max_new_tokens, trained["max_new_tokens"]),
    ]
    for name, value, known in seen:
        if value not in known:
            yield f"the predictor was not trained at {name} {value}, but at {known}"


def _plain(name: str) -> str:
    """A press's name for comparison: class and configuration spell it differently."""
    return "".join(letter for letter in name.lower() if letter.isalnum())
