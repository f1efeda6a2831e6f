"""Write the numbers of docs/performance.md and scaling.md from results/bench/*.json.

    python benchmarks/write_performance.py

None is typed by hand. Between ``<!-- generated: NAME -->`` and ``<!-- end generated -->`` stands
the content of results/bench/NAME.json as a table; everything else is left as it is. Numbers take
their unit from the key (``_bytes``, ``_seconds``, ``_ms``, ``_us``, ``_share``, ``_per_second``). A
list of records becomes a table of its own. A block without a result keeps the numbers of an earlier
run; an empty one says that it was not measured. `make bench` runs this last.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"(<!-- generated: ([a-z0-9_]+) -->\n).*?(<!-- end generated -->)", re.DOTALL)
COMMAND = "make bench"


def format_value(key: str, value: Any) -> str:
    """One value as text, with the unit that its key asks for."""
    if value is None:
        return "undefined"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(format_value(key, entry) for entry in value)
    if not isinstance(value, int | float):
        return str(value).replace("|", "\\|").replace("\n", " ")
    if "ratio" in key.split("_"):
        return f"{value:,.4g}"
    if key.endswith("bytes") or "_bytes_" in key:
        return f"{value / 2**20:,.1f} MiB" if abs(value) >= 2**20 else f"{value / 2**10:,.1f} KiB"
    if "share" in key.split("_"):
        return f"{100 * value:.2f} %"
    for unit, symbol in (("_ms", "ms"), ("_us", "µs")):
        if unit in key:
            return f"{value:,.3g} {symbol}"
    if key.endswith("per_second"):
        return f"{value:,.0f} /s" if abs(value) >= 10 else f"{value:.2f} /s"
    if "seconds" in key:
        for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
            if abs(value) * factor >= 1 or unit == "µs":
                return f"{value * factor:,.3g} {unit}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}"


def flatten(value: dict[str, Any], prefix: str = "", inherited: str = "") -> list[tuple[str, str]]:
    """(name, text) of every scalar and plain list, nested names joined by a blank.

    A nested entry whose own name says no unit, such as a batch size or a percentile, takes it from
    the name above it.
    """
    rows = []
    for key, entry in value.items():
        name = f"{prefix} {key}".strip()
        unit_key = key if _has_unit(key) or not inherited else inherited
        if isinstance(entry, dict):
            rows += flatten(entry, name, unit_key if _has_unit(unit_key) else inherited)
        elif not _is_table(entry):
            rows.append((_label(name), format_value(unit_key, entry)))
    return rows


def _label(name: str) -> str:
    return name.replace("always_safe", "full KV cache").replace("_", " ")


def _has_unit(key: str) -> bool:
    units = ("bytes", "seconds", "share", "per_second", "_ms", "_us", "ratio")
    return any(unit in key for unit in units)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value)


def render(result: dict[str, Any]) -> str:
    """Markdown tables of one benchmark's result: its scalars first, then its lists of records."""
    lines: list[str] = []
    scalars = [f"| {name} | {text} |" for name, text in flatten(result)]
    if scalars:
        lines += ["| measured | value |", "| --- | ---: |", *scalars]
    for key, records in result.items():
        if not _is_table(records):
            continue
        columns = list(dict.fromkeys(name for record in records for name in record))
        if lines:
            lines += ["", f"{key.replace('_', ' ')}:", ""]
        lines.append("| " + " | ".join(name.replace("_", " ") for name in columns) + " |")
        lines.append("| " + " | ".join("---" for _ in columns) + " |")
        for record in records:
            cells = [format_value(name, record.get(name)) for name in columns]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def fill(document: str, bench: Path) -> str:
    """The document with every block rendered anew; one without a result stays, or says so."""

    def block(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        path = bench / f"{name}.json"
        if not path.is_file():
            if match[0] != opening + closing:
                return match[0]
            return f"{opening}Not measured on this machine yet: `{COMMAND}`.\n{closing}"
        return opening + render(json.loads(path.read_text(encoding="utf-8"))) + closing

    return BLOCK.sub(block, document)


def main(document: Path, bench: Path) -> None:
    """Fill the document in place."""
    text = fill(document.read_text(encoding="utf-8"), bench)
    temporary = document.with_name(f"{document.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(document)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    documents = [Path("docs/performance.md"), Path("docs/scaling.md")]
    parser.add_argument("--document", type=Path, nargs="*", default=documents)
    parser.add_argument("--bench", type=Path, default=Path("results/bench"))
    arguments = parser.parse_args()
    for document in arguments.document:
        main(document, arguments.bench)
