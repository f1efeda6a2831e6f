"""Whether what a guard does is what its certificate was made on, and which price it may take."""

from collections.abc import Mapping
from typing import Any

from kvpress import BasePress
from transformers import PreTrainedModel

from kvguard.certificate import Certificate, CertificateError, Statement, Use
from kvguard.config import BASELINE, BASELINE_RATIO, Generation, Press
from kvguard.config_policies import Sharing
from kvguard.guard_files import press_to_json
from kvguard.models import RECORD, recorded_digest
from kvguard.presses import build_press, nominal_ratio, phases
from kvguard.price_certificate import PriceCertificate, PriceStatement, PriceUse
from kvguard.sampling import Decoding


def certified_statements(
    certificate: Certificate,
    operating_point: str,
    *,
    press: BasePress | None,
    recovery: str,
    check_every_tokens: int,
    safe_ratio: float,
    sharing: Sharing = "none",
    task: str | None = None,
    model: PreTrainedModel | None = None,
    decoding: Decoding | None = None,
) -> list[Statement]:
    """What a certificate says of a guard's use; one statement for each task.

    Args:
        certificate: as loaded.
        operating_point: its name there.
        press: the guarded one.
        recovery: what an alarm does.
        check_every_tokens: how often the predictor is asked.
        safe_ratio: fraction removed in SAFE; certificates are made at 0.
        sharing: certificates are made with presses that work on whole prompts: not for "all".
        task: of the prompts; None: the user judges which of the certificate's tasks they resemble.
        model: None: not known yet, as at the guard's construction.
        decoding: None: not known yet.

    Raises:
        CertificateError: it was made on something else; names what differs.
    """
    if not certificate.statements:
        return []
    advice = certificate.advice(operating_point)
    use: dict[str, Any] = press_use(press)
    use |= {"check_every_tokens": check_every_tokens, "recovery": recovery}
    if safe_ratio > 0:
        raise CertificateError(
            f"the certificate does not speak of safe_ratio={safe_ratio:g} (certified on 0): "
            f"{advice}"
        )
    if sharing == "all":
        raise CertificateError(
            "the certificate does not speak of sharing='all', where the press leaves what prompts "
            f"share whole (certified on presses that work on all of a prompt): {advice}"
        )
    if task is not None:
        use["task"] = task
    if decoding is not None:
        use |= {"max_new_tokens": decoding.max_new_tokens, "decoding": decoding_text(decoding)}
    if model is not None:
        digest = recorded_digest(model)
        if digest is None and all(one.use.model_digest for one in certificate.statements):
            raise CertificateError(
                f"the certificate does not speak of the model loaded from {model.name_or_path!r}, "
                f"where no {RECORD} says which it is; load the folder that the run prepared, "
                f"results/checkpoints/NAME; else {advice}"
            )
        use["model_digest"] = digest
    found = certificate.statements_about(operating_point, **use)
    faults = [_differing_settings(press, one.use) for one in found]
    if all(faults):
        raise CertificateError(
            f"the certificate does not speak of the press's {faults[0]}: {advice}"
        )
    return [one for one, fault in zip(found, faults, strict=True) if not fault]


def certified_price(
    certificate: PriceCertificate,
    level: float,
    *,
    press: BasePress | None,
    task: str | None = None,
    model: PreTrainedModel | None = None,
    decoding: Decoding | None = None,
    **settings: float | str | None,
) -> PriceStatement:
    """What a price certificate says of a guard's use at one level of harm.

    Args:
        certificate: as loaded.
        level: share of requests that may be harmed, one of the certificate's.
        press: the guarded one.
        task: of the prompts; a certificate over several tasks speaks of their mixture alone.
        model: None: not known yet, as at the guard's construction.
        decoding: None: not known yet.
        settings: ``bus_ratio``, ``margin_nats``, ``cold``, ``safe_ratio`` and ``batch_size`` as in
            `PriceUse`; None takes what was certified.

    Raises:
        CertificateError: it was made on something else, or certifies no price; names what differs
            from the nearest certified use, and all of them.
    """
    known = [(one, one.use) for one in certificate.at_level(level) if one.use is not None]
    own = press_use(press)

    def distance(use: PriceUse, faults: list[str]) -> tuple[bool, int, float]:
        """A user who changes a setting keeps the press."""
        other_press = use.press_class != own["press_class"]
        return other_press, len(faults), abs(float(use.ratio) - float(own["ratio"]))

    found = [
        (one, use, _price_faults(use, press, task, model, decoding, settings)) for one, use in known
    ]
    statement, nearest, faults = min(found, key=lambda entry: distance(*entry[1:]))
    if faults:
        uses = ", ".join(f"{use.press_class} {use.ratio}" for _, use in known)
        raise CertificateError(
            f"the price certificate does not speak of {', '.join(faults)}: harm_risk is for "
            f"certified uses alone ({uses}); certify again (live.certify_prices), or give "
            "harm_price, which needs no certificate"
        )
    if statement.certified_price is None:
        others = [
            f"{one.level:g}"
            for one in certificate.statements
            if one.use == nearest and one.certified_price is not None
        ]
        advice = f" This use has a price at harm_risk={' or '.join(others)}." if others else ""
        raise CertificateError(f"harm_risk={level:g}: {statement.text}{advice}")
    return statement


def _price_faults(
    use: PriceUse,
    press: BasePress | None,
    task: str | None,
    model: PreTrainedModel | None,
    decoding: Decoding | None,
    settings: Mapping[str, float | str | None],
) -> list[str]:
    """In what a guard's use differs from a certified one, in words."""
    own: dict[str, Any] = press_use(press) | {k: v for k, v in settings.items() if v is not None}
    faults = [
        f"{name}={value!r} (certified on {getattr(use, name)!r})"
        for name, value in own.items()
        if value != getattr(use, name) and name != "batch_size"
    ]
    if own.get("batch_size", 0) > use.batch_size:
        faults.append(f"batch_size={own['batch_size']} (certified up to {use.batch_size})")
    if not faults and (fault := _differing_settings(press, use)):
        faults.append(f"the press's {fault}")
    if task is not None and [task] != list(use.tasks):
        faults.append(f"task={task!r} (certified on {', '.join(use.tasks)}, mixed)")
    if decoding is not None:
        length, text = decoding.max_new_tokens, decoding_text(decoding)
        if length not in use.tasks.values():
            lengths = ", ".join(map(str, sorted(set(use.tasks.values()))))
            faults.append(f"max_new_tokens={length} (certified on {lengths})")
        if text != use.decoding:
            faults.append(f"decoding={text!r} (certified on {use.decoding!r})")
    if model is not None and (digest := recorded_digest(model)) != use.model_digest:
        what = f"model_digest={digest!r}" if digest else f"a model without a {RECORD}"
        faults.append(f"{what} (certified on {use.model_digest!r})")
    return faults


def press_use(press: BasePress | None) -> dict[str, str]:
    """Class, phase and ratio of a press, in the words of the configuration (`Press`)."""
    if press is None:
        return {"press_class": BASELINE, "phase": "", "ratio": BASELINE_RATIO}
    prefill, decode = phases(press)
    base = decode.base_press if prefill is None and decode is not None else prefill
    return {
        "press_class": type(base).__name__,
        "phase": "prefill" if decode is None else "decode" if prefill is None else "both",
        "ratio": f"{nominal_ratio(press):.3f}",
    }


def decoding_text(decoding: Decoding) -> str:
    """How tokens are chosen, in the words of `config.Generation.text`; with what that has not."""
    text = Generation(
        do_sample=decoding.do_sample, temperature=decoding.temperature, top_p=decoding.top_p
    ).text
    more = [f"top-k {decoding.top_k}"] if decoding.top_k else []
    more += [f"min-p {decoding.min_p:g}"] if decoding.min_p else []
    more += [f"at least {decoding.min_new_tokens} tokens"] if decoding.min_new_tokens else []
    more += [type(processor).__name__ for processor in decoding.processors]
    return ", ".join([text, *more])


def _differing_settings(press: BasePress | None, use: Use | PriceUse) -> str | None:
    """In what a press differs from that of a certified use; None: in nothing that was recorded."""
    if use.press_settings is None:
        return None
    spec = Press.model_validate(
        {"name": use.press, "class": use.press_class, "phase": use.phase, "ratios": [use.ratio]}
        | use.press_settings
    )
    certified = press_settings(build_press(spec, use.ratio))
    own = press_settings(press)
    faults = [
        f"{name}={own.get(name)!r} (certified on {certified.get(name)!r})"
        for name in sorted(certified.keys() | own.keys())
        if own.get(name) != certified.get(name)
    ]
    return ", ".join(faults) or None


def press_settings(press: BasePress | None) -> dict[str, Any]:
    """Every argument of a press and of the presses inside it, by its path: "press.window_size"."""

    def settings(content: Mapping[str, Any], path: str) -> dict[str, Any]:
        found: dict[str, Any] = {f"{path}class": content["class"]}
        for key, value in content["kwargs"].items():
            if isinstance(value, Mapping):
                found |= settings(value, f"{path}{key}.")
            else:
                found[f"{path}{key}"] = value
        return found

    return {} if press is None else settings(press_to_json(press), "")
