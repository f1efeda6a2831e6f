"""Presses from the configuration: ratios, nesting, phases, and the table of what is supported."""

import inspect
from pathlib import Path

import kvpress
import pytest
from pydantic import ValidationError

from kvguard import press_catalogue
from kvguard.config import Press
from kvguard.presses import (
    PressError,
    build_press,
    phases,
    reads_attention_weights,
    support_table,
    with_ratio,
)


def spec(name: str, phase: str = "prefill", **kwargs: object) -> Press:
    return Press.model_validate(
        {"name": "press", "class": name, "kwargs": kwargs, "ratios": ["0.750"], "phase": phase}
    )


def test_wrappers_pass_the_ratio_to_what_they_wrap() -> None:
    inner = {"class": "SnapKVPress", "kwargs": {"window_size": 32}}
    press = build_press(spec("AdaKVPress", press=inner), "0.750")
    assert isinstance(press, kvpress.AdaKVPress)
    assert press.press.compression_ratio == 0.75
    assert press.press.window_size == 32


def test_every_build_is_fresh() -> None:
    assert build_press(spec("KnormPress"), "0.750") is not build_press(spec("KnormPress"), "0.750")


def test_phases_are_kvpress_own_presses() -> None:
    assert phases(build_press(spec("KnormPress"), "0.750")).decode is None
    decode = phases(build_press(spec("KnormPress", "decode"), "0.750"))
    assert decode.prefill is None
    assert isinstance(decode.decode, kvpress.CompressionRatioDecodingPress)
    assert decode.decode.target_compression_ratio == 0.75
    both = phases(build_press(spec("KnormPress", "both"), "0.750"))
    assert both.prefill is not None
    assert both.prefill.compression_ratio == 0.75
    assert both.decode is not None


@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
def test_another_ratio_leaves_the_press_alone(phase: str) -> None:
    press = build_press(spec("KnormPress", phase), "0.750")
    milder = phases(with_ratio(press, 0.25))
    for part in milder:
        if isinstance(part, kvpress.DecodingPress):
            assert part.target_compression_ratio == 0.25
        elif part is not None:
            assert part.compression_ratio == 0.25
    for part in phases(press):
        if isinstance(part, kvpress.DecodingPress):
            assert part.target_compression_ratio == 0.75
        elif part is not None:
            assert part.compression_ratio == 0.75


def test_presses_whose_ratio_follows_from_their_arguments_must_agree_with_it() -> None:
    knorm = {"class": "KnormPress"}
    press = spec("PerLayerCompressionPress", press=knorm, compression_ratios=[0.6, 0.9])
    assert build_press(press, "0.750")
    with pytest.raises(PressError, match=r"arguments remove 0\.750, got 0\.500"):
        build_press(press, "0.500")
    with pytest.raises(PressError, match="has no ratio to set"):
        with_ratio(build_press(press, "0.750"), 0.5)


def test_bad_arguments_name_the_press() -> None:
    with pytest.raises(PressError, match="SimLayerKVPress does not accept"):
        build_press(spec("SimLayerKVPress", lazy_threshold=7.0), "0.750")


def test_impossible_ratios_are_found_before_any_job_starts() -> None:
    with pytest.raises(ValidationError, match=r"at most 0\.500 of an entry, got 0\.750"):
        spec("ThinKPress")
    inner = {"class": "KnormPress", "kwargs": {"compression_ratio": 0.5}}
    with pytest.raises(ValidationError, match=r"its arguments remove 0\.500, got 0\.750"):
        spec("ComposedPress", presses=[inner])
    with pytest.raises(ValidationError, match="needs interval_tokens > 64 and buffer_tokens >= 64"):
        spec("SnapKVPress", "decode")
    assert spec("SnapKVPress", "decode", window_size=16)


def test_presses_that_read_attention_are_known_wherever_they_hide() -> None:
    observed = kvpress.ObservedAttentionPress(0.5)
    assert reads_attention_weights(observed)
    assert reads_attention_weights(kvpress.ComposedPress([kvpress.KnormPress(0.1), observed]))
    assert not reads_attention_weights(kvpress.SnapKVPress(0.5))


def test_the_catalogue_knows_every_exported_class_and_its_arguments() -> None:
    exported = {name for name in kvpress.__all__ if name.endswith("Press")}
    classes = press_catalogue.press_classes()
    assert set(classes) == exported
    for name in set(classes) - set(press_catalogue.REFUSED):
        signature = inspect.signature(getattr(kvpress, name))
        public = {key for key in signature.parameters if not key.startswith("_")}
        assert set(classes[name].arguments) == public, name


def test_the_support_table_in_the_documentation_is_todays() -> None:
    path = Path(__file__).parent.parent / "docs" / "presses.md"
    assert path.read_text() == support_table()
