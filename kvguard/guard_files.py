"""A guard on disk: settings as JSON, the predictor and its certificate beside them.

Nothing is pickled. A press is stored by its kvpress class and its arguments, so a file from
elsewhere can build presses of the catalogue and nothing else.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kvpress
from kvpress import BasePress

from kvguard import press_catalogue
from kvguard.certificate import Certificate, save_certificate
from kvguard.guard_report import GuardError
from kvguard.harm_model import HarmModel, save_harm_model
from kvguard.predictor import Predictor, save_predictor
from kvguard.price_certificate import (
    PRICE_CERTIFICATE,
    PriceCertificate,
    save_price_certificate,
)
from kvguard.schema import atomic_path

SETTINGS = "guard.json"
PREDICTOR = "hazard_predictor.json"
CERTIFICATE = "certificate.json"
FORMAT = 1


def press_to_json(press: BasePress) -> dict[str, Any]:
    """A press by class and arguments; the presses inside it likewise.

    Raises:
        GuardError: an argument that JSON cannot hold, or a class that is not kvpress's.
    """
    name = type(press).__name__
    if getattr(kvpress, name, None) is not type(press):
        raise GuardError(f"press: {name} is no class of kvpress, so a file cannot name it")

    def value(given: Any, field: str) -> Any:
        if isinstance(given, BasePress):
            return press_to_json(given)
        if isinstance(given, list | tuple):
            return [value(entry, field) for entry in given]
        if given is None or isinstance(given, bool | int | float | str):
            return given
        raise GuardError(f"press: {name}.{field} is a {type(given).__name__}, which is not saved")

    fields = [field.name for field in dataclasses.fields(press) if field.init]
    return {
        "class": name,
        "kwargs": {field: value(getattr(press, field), field) for field in fields},
    }


def press_from_json(content: Mapping[str, Any]) -> BasePress:
    """Build what `press_to_json` wrote.

    Raises:
        GuardError: no class of the catalogue, or arguments that it does not accept.
    """
    name = content.get("class")
    decoding = ("DecodingPress", "CompressionRatioDecodingPress", "PrefillDecodingPress")
    if name not in (*press_catalogue.press_classes(), *decoding):
        raise GuardError(f"press: {name!r} is no press of kvpress")

    def value(given: Any) -> Any:
        if isinstance(given, Mapping):
            return press_from_json(given)
        return [value(entry) for entry in given] if isinstance(given, list) else given

    try:
        arguments = {key: value(given) for key, given in content["kwargs"].items()}
        press: BasePress = getattr(kvpress, name)(**arguments)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise GuardError(f"press: {name} does not accept what the file says: {error}") from None
    return press


def write_models(
    path: str | Path,
    trained: object,
    thresholds: Certificate | None,
    prices: PriceCertificate | None,
) -> None:
    """Write what a guard decides by into its folder, which is made; old certificates go.

    Args:
        path: of the folder.
        trained: a `Predictor` or a `HarmModel`; None: nothing was trained.
        thresholds: certificate of the predictor.
        prices: certificate of the harm model.

    Raises:
        GuardError: a predictor of another kind.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(trained, HarmModel):
        save_harm_model(trained, folder / PREDICTOR)
    elif isinstance(trained, Predictor):
        save_predictor(trained, folder / PREDICTOR)
    elif trained is not None:
        kind = type(trained).__name__
        raise GuardError(f"predictor: a {kind} is not saved, a trained Predictor is")
    for name in (CERTIFICATE, PRICE_CERTIFICATE):
        (folder / name).unlink(missing_ok=True)
    if thresholds is not None:
        save_certificate(thresholds, folder / CERTIFICATE)
    if prices is not None:
        save_price_certificate(prices, folder / PRICE_CERTIFICATE)


def write_settings(path: str | Path, settings: Mapping[str, Any]) -> None:
    """Write a guard's settings, all or nothing."""
    with atomic_path(Path(path) / SETTINGS) as temporary:
        temporary.write_text(json.dumps({"format": FORMAT} | dict(settings), indent=1))


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `write_settings` wrote.

    Raises:
        GuardError: there are none, or they are of another format.
    """
    file = Path(path) / SETTINGS
    if not file.is_file():
        raise GuardError(f"no guard at {path}: there is no {file}; `KVGuard.save` makes it")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise GuardError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise GuardError(f"{file} is not a guard of format {FORMAT}")
    return content
