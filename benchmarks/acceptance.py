"""How far drafts on a compressed cache get until the uncompressed model rejects a token.

    python benchmarks/acceptance.py [--contexts 1024 4096] [--every 16] [--requests 4] [--minutes 8]

SmolLM2 in float32. The requests of long_context.py, decoded by ``lossless`` with a check every
``--every`` tokens, which goes on compressed behind what it accepted; ``--every 0`` is
``lossless_auto``. Nothing is timed: the numbers do not depend on the machine's load. Writes
results/bench/acceptance.json after every run, with this call's runs alone (``--add``: beside what
the file has; a row with the same press, ratio, context and m is replaced). No run starts once the
minutes are over; ``left_out`` names those. ``acceptance``, a row each:

- ``accepted_share``: of the drafted tokens;
- ``tokens_per_check``: accepted tokens over checks;
- ``tokens_per_rejection``: accepted tokens over rejections: how many a draft gets until one is
  rejected; undefined where none was;
- ``checks``: how many the row rests on, and ``tokens`` accepted in all.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from generation import load_embedded, load_experiment
from long_context import PRESSES, prepare, run
from measuring import FOLDER, say, write

from kvguard.guard_report import RowReport

TARGET = FOLDER / "acceptance.json"
KEYS = ("press", "ratio", "prompt_tokens", "m")


def acceptance(reports: Sequence[RowReport]) -> dict[str, float | None]:
    """How far drafts get: from the lengths at which checks came, and what each kept."""
    accepted = drafted = rejections = checks = 0
    for report in reports:
        before = 0
        for at, kept in zip(report.alarm_steps, report.rewound_to, strict=True):
            drafted += at - before
            accepted += kept - before
            rejections += kept < at
            checks += 1
            before = kept
    return {
        "accepted_share": accepted / drafted if drafted else None,
        "tokens_per_check": accepted / checks if checks else None,
        "tokens_per_rejection": accepted / rejections if rejections else None,
        "checks": checks,
        "tokens": accepted,
    }


def place(row: dict[str, Any]) -> tuple[object, ...]:
    """What a row is about."""
    return tuple(row[key] for key in KEYS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 4096])
    parser.add_argument("--presses", nargs="*", default=list(PRESSES))
    parser.add_argument("--ratios", nargs="*", default=["0.500", "0.750"])
    parser.add_argument("--every", type=int, nargs="*", default=[16])
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--add", action="store_true", help="keep the rows that the file has")
    parser.add_argument("--output", type=Path, default=TARGET)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    began = time.perf_counter()
    experiment = load_experiment(given.requests, given.max_new_tokens)
    model = load_embedded(experiment)
    rows: list[dict[str, Any]] = []
    if given.add and given.output.is_file():
        rows = json.loads(given.output.read_text())["acceptance"]
    left_out: list[dict[str, Any]] = []
    for tokens in given.contexts:
        ready = None
        for press, ratio, every in itertools.product(given.presses, given.ratios, given.every):
            m = every or "auto"
            key = dict(zip(KEYS, (press, ratio, tokens, m), strict=True))
            if rows and time.perf_counter() - began > 60 * given.minutes:
                left_out.append(key)
                write(given.output, {"acceptance": rows, "left_out": left_out})
                continue
            if ready is None:
                ready = prepare(model, experiment, tokens, given.requests, given.max_new_tokens)
            policy = "lossless" if every else "lossless_auto"
            _, reports = run(model, ready, policy, press, ratio, every or 1)
            row: dict[str, Any] = {**key, "requests": given.requests}
            row |= acceptance(reports)
            rows = [other for other in rows if place(other) != place(row)] + [row]
            rows.sort(key=lambda one: [str(part) for part in place(one)])
            write(given.output, {"acceptance": rows, "left_out": left_out})
            say(json.dumps(row))


if __name__ == "__main__":
    main()
