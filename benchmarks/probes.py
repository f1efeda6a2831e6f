"""What the probes at prefill cost, in decoding steps of the same request.

    python benchmarks/probes.py [--lengths 400 4096] [--repeats 9] [--minutes 5]

SmolLM2 in float32, 2 threads, one prompt of text that long, snapkv at 0.500. A prefill with and one
without `probes.CacheProbe` alternate; then single decoding steps of that row. Writes
results/bench/probes.json after every length: per length the medians ``prefill_seconds``,
``probed_seconds`` and ``step_seconds``, ``steps`` = (probed - prefill) / step, goal at most 1, and
``of_prefill``, the same difference over the prefill.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from generation import PRESS, load_embedded
from measuring import FOLDER, Rounds, machine, say, write

from kvguard.config import load_config
from kvguard.engine import Session
from kvguard.prefill import prefill
from kvguard.presses import build_press
from kvguard.probes import CacheProbe, marked_tokens
from kvguard.requests import Request
from kvguard.sampling import Decoding

TARGET = FOLDER / "probes.json"
STEPS = 24


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Measure every length and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[400, 4096])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=5, help="for each length")
    parser.add_argument("--output", type=Path, default=TARGET)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    loaded = load_embedded(load_config("config.yaml"))
    model = loaded.model
    marked = marked_tokens(loaded.tokenizer, model.config.vocab_size)
    words = loaded.tokenizer.encode(Path(__file__).read_text(), add_special_tokens=False)
    results: dict[str, object] = {}
    before = machine()
    for length in given.lengths:
        ids = (words * (length // len(words) + 1))[:length]

        def probed(ids: list[int] = ids) -> object:
            probe = CacheProbe(model, ids, marked)
            return prefill(model, ids, build_press(PRESS, "0.500"), probe=probe)

        def plain(ids: list[int] = ids) -> object:
            return prefill(model, ids, build_press(PRESS, "0.500"))

        plain()
        probed()
        pairs = []
        for _ in Rounds(given.repeats, given.minutes):
            pairs.append((seconds(plain), seconds(probed)))
            say(f"{length} tokens: {pairs[-1][0]:.2f} s, with probes {pairs[-1][1]:.2f} s")
        session = Session(model, Decoding(STEPS), press=build_press(PRESS, "0.500"), rows=1)
        session.admit(Request("0", ids))
        steps = []
        for _ in range(STEPS - 1):
            session.choose()
            steps.append(seconds(session.advance))
        prefilled, with_probe = (statistics.median(each) for each in zip(*pairs, strict=True))
        extra = statistics.median(two - one for one, two in pairs)
        step = statistics.median(steps)
        results[str(length)] = {
            "prefill_seconds": prefilled,
            "probed_seconds": with_probe,
            "step_seconds": step,
            "steps": extra / step,
            "of_prefill": extra / prefilled,
        }
        write(given.output, {**results, "machine": before})


if __name__ == "__main__":
    main()
