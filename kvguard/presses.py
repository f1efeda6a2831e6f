"""From a press's name in the configuration to the kvpress object that compresses.

Presses are dataclasses with mutable state, so a fresh one is built for every use. Which classes are
supported, and why others are not, is in `kvguard.press_catalogue`.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

import kvpress
import torch
from kvpress import (
    BasePress,
    CompressionRatioDecodingPress,
    DecodingPress,
    PrefillDecodingPress,
    ScorerPress,
    ThinKPress,
)
from kvpress.utils import compute_n_kept
from transformers import PreTrainedModel

from kvguard import press_catalogue
from kvguard.config import Press


class PressError(ValueError):
    """A press that cannot run as asked; the message says why and what would do."""


class Phases(NamedTuple):
    """What compresses the prompt's cache, and what compresses while decoding; None: nothing."""

    prefill: BasePress | None
    decode: DecodingPress | None

    @property
    def compresses(self) -> bool:
        """Whether there is anything of either."""
        return self != Phases(None, None)


def build_press(spec: Press, ratio: str) -> BasePress:
    """Build a fresh kvpress press from its configuration.

    ``phase: decode`` keeps a fraction ``1 - ratio`` of all tokens seen so far, every
    ``interval_tokens`` decoded tokens (kvpress's CompressionRatioDecodingPress); ``both`` also
    compresses the prompt (kvpress's PrefillDecodingPress).

    Args:
        spec: class, keyword arguments, phase.
        ratio: fraction of entries to remove, three decimals.

    Raises:
        PressError: the arguments do not fit the class, or contradict the ratio.
    """
    if spec.phase == "prefill":
        return _build(spec.press_class, spec.kwargs, float(ratio))
    decoding = CompressionRatioDecodingPress(
        base_press=_build(spec.press_class, spec.kwargs, 0.0),
        target_compression_ratio=float(ratio),
        compression_interval=spec.interval_tokens,
        hidden_states_buffer_size=spec.buffer_tokens,
    )
    if spec.phase == "decode":
        return decoding
    prefilling = _build(spec.press_class, spec.kwargs, float(ratio))
    return PrefillDecodingPress(prefilling_press=prefilling, decoding_press=decoding)


def _build(name: str, kwargs: Mapping[str, Any], ratio: float) -> BasePress:
    try:
        press_catalogue.check_ratio(name, kwargs, ratio)
    except ValueError as error:
        raise PressError(str(error)) from None
    press = _construct(name, kwargs)
    _set_ratio(press, ratio)
    return press


def _construct(name: str, kwargs: Mapping[str, Any]) -> BasePress:
    def value(given: Any) -> Any:
        if isinstance(given, Mapping) and "class" in given:
            return _construct(given["class"], given.get("kwargs") or {})
        return [value(entry) for entry in given] if isinstance(given, list) else given

    try:
        return getattr(kvpress, name)(**{key: value(given) for key, given in kwargs.items()})
    except (AssertionError, TypeError, ValueError) as error:
        raise PressError(f"{name} does not accept {dict(kwargs)}: {error}") from error


def _set_ratio(press: BasePress, ratio: float) -> None:
    if type(press).__name__ in press_catalogue.NO_RATIO:
        return
    if isinstance(press, ThinKPress):
        press.key_channel_compression_ratio = 2 * ratio
        return
    press.compression_ratio = ratio


class PressBehind(BasePress):  # type: ignore[misc]
    """A press that keeps the first tokens whole and works on what follows them.

    Scores are the press's own, of all tokens; of those behind the first, the fraction
    ``compression_ratio`` with the lowest scores goes.

    Args:
        press: one that `drops_lowest` accepts.
        tokens: how many stay whole, in front and in order.
    """

    def __init__(self, press: ScorerPress, tokens: int) -> None:
        self.press, self.tokens = press, tokens

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """As the press."""
        self.press.post_init_from_model(model)

    def compress(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first tokens' entries, and the best of the others in the order of their scores."""
        if self.press.compression_ratio == 0:
            return keys, values
        scores = self.press.score(module, hidden_states, keys, values, attentions, kwargs)
        own = scores[..., self.tokens :]
        kept = compute_n_kept(own.shape[-1], self.press.compression_ratio)
        chosen = own.topk(kept, dim=-1).indices[..., None] + self.tokens
        places = chosen.expand(-1, -1, -1, keys.shape[-1])
        first, second = (
            torch.cat([each[:, :, : self.tokens], each.gather(2, places)], dim=2)
            for each in (keys, values)
        )
        return first, second


def drops_lowest(press: object) -> TypeGuard[ScorerPress]:
    """Whether a press evicts the tokens with the lowest scores in each head, and nothing else."""
    return isinstance(press, ScorerPress) and _drops_lowest(type(press))


def _drops_lowest(kind: Any) -> bool:
    return (
        issubclass(kind, ScorerPress)
        and kind.__name__ not in press_catalogue.ATTENTION_WEIGHTS
        and kind.compress is ScorerPress.compress
        and kind.forward_hook is BasePress.forward_hook
        and kind.__call__ is BasePress.__call__
    )


def phases(press: BasePress | None) -> Phases:
    """Split a press into what it does at prefill and what it does while decoding.

    Args:
        press: a kvpress press as a user holds it, or None for no compression.

    Raises:
        PressError: the class is refused, with the reason.
    """
    if press is None:
        return Phases(None, None)
    if isinstance(press, PrefillDecodingPress):
        prefill, decode = press.prefilling_press, press.decoding_press
    elif isinstance(press, DecodingPress):
        prefill, decode = None, press
    else:
        prefill, decode = press, None
    if prefill is not None:
        _check_class(prefill, press_catalogue.REFUSED)
    if prefill is not None and decode is not None and _hides_entries(prefill):
        raise PressError(
            f"{type(prefill).__name__} hides entries without freeing them; a press that compresses "
            "while decoding would score them and bring them back"
        )
    if decode is not None:
        if type(decode) not in (DecodingPress, CompressionRatioDecodingPress):
            _check_class(decode, press_catalogue.REFUSED)
        _check_class(decode.base_press, press_catalogue.REFUSED)
        _check_class(decode.base_press, press_catalogue.PREFILL_ONLY)
    return Phases(prefill, decode)


def _check_class(press: BasePress, refused: Mapping[str, str]) -> None:
    name = type(press).__name__
    if name in refused:
        raise PressError(f"{name} is not supported: it {refused[name]}")
    nested = [getattr(press, "press", None), *getattr(press, "presses", [])]
    for inner in nested:
        if isinstance(inner, BasePress):
            _check_class(inner, refused)


def _hides_entries(press: BasePress) -> bool:
    inner = [getattr(press, "press", None), *getattr(press, "presses", [])]
    return type(press).__name__ in press_catalogue.NOT_EAGER or any(
        _hides_entries(entry) for entry in inner if isinstance(entry, BasePress)
    )


def fresh(press: BasePress | None) -> BasePress | None:
    """A copy for one use: presses keep counters and buffers."""
    return copy.deepcopy(press)


def reads_attention_weights(press: BasePress | None) -> bool:
    """Whether the press reads the whole prompt's attention weights (eager, undivided prefill)."""
    if press is None:
        return False
    inner = [getattr(press, "press", None), *getattr(press, "presses", [])]
    return type(press).__name__ in press_catalogue.ATTENTION_WEIGHTS or any(
        reads_attention_weights(entry) for entry in inner if isinstance(entry, BasePress)
    )


def with_ratio(press: BasePress, ratio: float) -> BasePress:
    """A fresh copy of a press at another ratio; `PressError` where the class has none to set."""
    copied = copy.deepcopy(press)
    if isinstance(copied, PrefillDecodingPress):
        if copied.prefilling_press is not None:
            copied.prefilling_press = with_ratio(copied.prefilling_press, ratio)
        if copied.decoding_press is not None:
            copied.decoding_press = with_ratio(copied.decoding_press, ratio)
    elif isinstance(copied, CompressionRatioDecodingPress):
        copied.target_compression_ratio = ratio
    elif type(copied).__name__ in press_catalogue.NO_RATIO or isinstance(copied, DecodingPress):
        raise PressError(f"{type(copied).__name__} has no ratio to set")
    else:
        _set_ratio(copied, ratio)
    return copied


def nominal_ratio(press: BasePress | None) -> float:
    """The press's compression ratio, 0 for none; NaN where it follows from the prompt."""
    split = phases(press)
    if press is None:
        return 0.0
    for part in (split.prefill, split.decode):
        ratio = getattr(part, "target_compression_ratio", None)
        if ratio is None and part is not None:
            try:
                ratio = part.compression_ratio
            except (AttributeError, ValueError):
                ratio = None
        if ratio is not None:
            return float(ratio)
    return math.nan


def support_table() -> str:
    """The Markdown of docs/presses.md, from the catalogue and the installed kvpress."""
    lines = [
        "# Presses",
        "",
        "Every press class that kvpress exports, and what KVGuard does with it. Generated by",
        "`kvguard presses > docs/presses.md`.",
        "",
        "A check reads the uncompressed entries outside device memory, so it is exact for every",
        "press. *After a check* says how a row goes on compressed. In place: the entries that the",
        "check computed replace the drafted ones, and no press runs. A press that compresses while",
        "decoding may have mixed a rejected token with others since that token was fed: then the",
        "prompt and the kept tokens are prefilled again.",
        "",
        "*Shared prefix*: what prompts begin with is prefilled once, and the press still sees the",
        'whole. With `sharing="all"` a press that can keep it whole evicts from what follows it',
        "alone, and all rows hold it once; the others work on the whole prompt as ever.",
        "",
        "| press | at prefill | while decoding | shared prefix | after a check | note |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in press_catalogue.press_classes():
        if name in press_catalogue.REFUSED:
            reason = press_catalogue.REFUSED[name]
            lines.append(f"| {name} | refused | refused | - | - | it {reason} |")
            continue
        eager = name in press_catalogue.ATTENTION_WEIGHTS
        notes = [press_catalogue.NO_RATIO[name]] if name in press_catalogue.NO_RATIO else []
        if name in press_catalogue.PREFILL_ONLY:
            notes.append(f"while decoding: it {press_catalogue.PREFILL_ONLY[name]}")
        if name in ("AdaKVPress", "CriticalAdaKVPress"):
            notes.append("hides entries, does not free them: its memory saving is nominal")
        if name == "ThinKPress":
            notes.append("zeroes key channels, frees nothing: its memory saving is nominal")
        shared = "yes, kept whole" if _drops_lowest(getattr(kvpress, name)) else "yes"
        lines.append(
            f"| {name} | yes | {'no' if name in press_catalogue.PREFILL_ONLY else 'yes'} "
            f"| {'no: reads attention weights' if eager else shared} | in place "
            f"| {'; '.join(notes)} |"
        )
    return "\n".join(lines) + "\n"
