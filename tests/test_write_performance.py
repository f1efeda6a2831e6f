"""The numbers of docs/performance.md come from files, and only what is between marks changes."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location(
    "write_performance", ROOT / "benchmarks" / "write_performance.py"
)
write_performance = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(write_performance)

DOCUMENT = """# Title
text with a number 17
<!-- generated: speed -->
old
<!-- end generated -->
between
<!-- generated: absent -->
<!-- end generated -->
<!-- generated: earlier -->
| speedup | 4 |
<!-- end generated -->
"""


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("peak_rss_bytes", 3 * 2**20, "3.0 MiB"),
        ("peak_rss_bytes_tenth", 512, "0.5 KiB"),
        ("decode_seconds", 12.5, "12.5 s"),
        ("step_seconds", 0.0042, "4.2 ms"),
        ("step_seconds", 3.3e-5, "33 µs"),
        ("signals_share", 0.0125, "1.25 %"),
        ("share_p99", 0.5, "50.00 %"),
        ("step_ms_early", 218.4, "218 ms"),
        ("p50_us", 31.26, "31.3 µs"),
        ("rows_per_second", 1234567.8, "1,234,568 /s"),
        ("tokens_identical", True, "yes"),
        ("speedup", 8.125, "8.125"),
        ("rows", 1000000, "1,000,000"),
        ("ratio", None, "undefined"),
        ("device_bytes_peak_ratio", 0.28125, "0.2812"),
        ("tokens_per_second_ratio_rounds", [0.95, 1.05], "0.95, 1.05"),
        ("repeats_seconds", [0.5, 2.0], "500 ms, 2 s"),
        ("note", "a | b", "a \\| b"),
    ],
)
def test_values_take_their_unit_from_the_key(key, value, text):
    assert write_performance.format_value(key, value) == text


def test_blocks_are_filled_and_the_rest_is_left_alone(tmp_path):
    result = {
        "speedup": 9.5,
        "step_seconds": {"1": {"p50": 2e-6}},
        "profile": [{"part": "attention", "time_share": 0.5}, {"part": "copies", "calls": 3}],
    }
    (tmp_path / "speed.json").write_text(json.dumps(result))
    filled = write_performance.fill(DOCUMENT, tmp_path)
    assert filled.startswith("# Title\ntext with a number 17\n<!-- generated: speed -->\n")
    assert "\nbetween\n" in filled
    assert "old" not in filled
    assert "| speedup | 9.5 |" in filled
    assert "| step seconds 1 p50 | 2 µs |" in filled
    assert "| part | time share | calls |" in filled
    assert "| attention | 50.00 % | undefined |" in filled
    assert "`make bench`" in filled.split("absent")[1]
    assert "earlier -->\n| speedup | 4 |\n<!-- end" in filled
    assert write_performance.fill(filled, tmp_path) == filled


def test_the_real_documents_have_a_block_for_every_benchmark():
    documents = [ROOT / "docs" / name for name in ("performance.md", "scaling.md")]
    names = {
        name
        for document in documents
        for _, name, _ in write_performance.BLOCK.findall(document.read_text())
    }
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    scripts -= {"write_performance", "measuring", "synthetic_sweep"}
    assert scripts <= names
