"""What the probes at prefill cost, in decoding steps of the same request.

    python benchmarks/probes.py [--lengths 400 4096] [--repeats 9] [--minutes 5]

SmolLM2 in float32, 2 threads, one prompt of text that long, snapkv at 0.500. In every round
alternate: a prefill with and one without `probes.CacheProbe`, one with a ladder of three ratios
that stops at the first (`kvguard.ladder`), a pass of the model over four tokens alone, and single
decoding steps of that row. Writes results/bench/probes.json after every length: medians over the
rounds, in seconds (``prefill_seconds``, ``probes_seconds``, ``step_seconds``) and in steps of the
same round: ``steps``, all that the probes add, goal at most 1; ``finish_steps`` of it, the replay
and the numbers of the whole request, once a request; ``layer_steps`` of it, once a layer;
``ladder_steps``, a prefill with the ladder less one without;
``four_token_steps``, the pass that a replay cannot go below. ``of_prefill``: all that the probes
add over the prefill.

The probes' seconds are those of their own hooks: a prefill takes some hundred times as long, and
the difference of two prefills is mostly the machine's.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generation import PRESS, load_embedded
from measuring import FOLDER, Rounds, machine, say, write
from numpy.typing import NDArray

from kvguard.config import load_config
from kvguard.engine import Session
from kvguard.ladder import RatioLadder
from kvguard.prefill import prefill
from kvguard.presses import build_press
from kvguard.probes import CacheProbe, marked_tokens
from kvguard.requests import Completion, Request
from kvguard.sampling import Decoding

TARGET = FOLDER / "probes.json"
STEPS = 5
RATIOS = ("0.500", "0.400", "0.300")


class TimedProbe(CacheProbe):
    """Adds up what the probes themselves take: ``layers`` in every layer, ``last`` at the end."""

    layers = 0.0
    last = 0.0

    def _keep_queries(self, *given: Any) -> None:
        self.layers += seconds(lambda: CacheProbe._keep_queries(self, *given))

    def _before(self, *given: Any) -> None:
        self.layers += seconds(lambda: CacheProbe._before(self, *given))

    def _after(self, *given: Any) -> None:
        self.layers += seconds(lambda: CacheProbe._after(self, *given))

    def finish(self, *given: Any) -> NDArray[np.float32]:
        """As `CacheProbe.finish`."""
        began = time.perf_counter()
        found = super().finish(*given)
        self.last = time.perf_counter() - began
        return found


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

        def plain(ids: list[int] = ids) -> object:
            return prefill(model, ids, build_press(PRESS, "0.500"))

        def probed(ids: list[int] = ids) -> TimedProbe:
            probe = TimedProbe(model, ids, marked)
            prefill(model, ids, build_press(PRESS, "0.500"), probe=probe)
            return probe

        ladder = RatioLadder({r: build_press(PRESS, r) for r in RATIOS}, lambda _, __: 0.0, 0.5)
        session = Session(
            model,
            Decoding(STEPS * (given.repeats + 1)),
            press=build_press(PRESS, "0.500"),
            rows=1,
            probes=True,
            marked=marked,
            cold="host",
        )
        request = Request("0", ids)
        session.admit(request)

        def laddered(
            ladder: RatioLadder = ladder, session: Session = session, request: Request = request
        ) -> object:
            return ladder.start(session, request, Completion(request))

        @torch.inference_mode()
        def four(ids: list[int] = ids) -> object:
            return model(torch.tensor([ids[-4:]]), use_cache=False)

        def step(session: Session = session) -> float:
            taken = []
            for _ in range(STEPS):
                session.choose()
                taken.append(seconds(session.advance))
            return statistics.median(taken)

        plain()
        probed()
        laddered()
        step()
        rounds = []
        for _ in Rounds(given.repeats, given.minutes):
            probe = probed()
            took = [seconds(work) for work in (plain, laddered, four)]
            rounds.append([*took, probe.layers, probe.last, step()])
            say(f"{length} tokens: {took[0]:.2f} s, probes {probe.layers + probe.last:.3f} s")
        table = np.array(rounds).T  # (what, rounds)
        prefilled, with_ladder, pass_of_four, layers, last, steps = table
        results[str(length)] = {
            "prefill_seconds": float(np.median(prefilled)),
            "probes_seconds": float(np.median(layers + last)),
            "step_seconds": float(np.median(steps)),
            "steps": float(np.median((layers + last) / steps)),
            "layer_steps": float(np.median(layers / steps)),
            "finish_steps": float(np.median(last / steps)),
            "ladder_steps": float(np.median((with_ladder - prefilled) / steps)),
            "four_token_steps": float(np.median(pass_of_four / steps)),
            "of_prefill": float(np.median((layers + last) / prefilled)),
        }
        write(given.output, {**results, "machine": before})


if __name__ == "__main__":
    main()
