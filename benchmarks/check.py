"""What a check costs beside a prefill, and what it holds on the device.

    python benchmarks/check.py [--repeats 5] [--prompt-tokens 4096] [--rows 4] [--minutes 10]

SmolLM2 in float32, 2 threads. The prompt's entries are parked in host memory; a check runs drafted
tokens over them and scores each (`audit.check_answers`). Checks and prefills of the prompt run in
turn in one process; seconds are medians. Writes results/bench/check.json after every turn:

- ``prefill_seconds``: of the prompt, without a press;
- ``check``: per drafted tokens, ``seconds`` of a check of one row, and ``over_prefill``, goal 0.05
  at 64 tokens;
- ``check_of_rows``: the same for several rows in one pass, a row;
- ``device_layers``: bytes that a check holds on the device beyond what is kept, in layers of the
  row's cold cache, goal 2: as charged to the request, and on CUDA as the allocator saw it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from generation import load_embedded, load_experiment
from measuring import FOLDER, Rounds, machine, say, write

from kvguard.audit import Answer, check_answers
from kvguard.cold_cache import ColdRow, ColdStore
from kvguard.prefill import prefill
from kvguard.sampling import Decoding

TARGET = FOLDER / "check.json"
DRAFTS = (16, 64)


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--output", type=Path, default=TARGET)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = load_embedded(load_experiment(1, 8)).model
    store = ColdStore(model.config, device=model.device, dtype=model.dtype)
    draw = torch.Generator().manual_seed(0)

    def draw_ids(count: int) -> list[int]:
        return torch.randint(4, model.config.vocab_size - 4, (count,), generator=draw).tolist()

    prompt = draw_ids(given.prompt_tokens)
    parked = prefill(model, prompt, store=store).cold
    assert parked is not None
    drafted = draw_ids(max(DRAFTS))
    decoding = Decoding(max(DRAFTS) + 1)

    def copied() -> ColdRow:
        """The same entries in memory of their own, as another row has them."""
        part = store.allocate(parked.prompt.tokens)
        part.entries.copy_(parked.prompt.entries)
        part.tokens = parked.prompt.tokens
        return ColdRow(store, None, part, None, parked.prompt_hidden, parked.hidden)

    rows = [parked, *(copied() for _ in range(given.rows - 1))]

    def check(count: int, among: list[ColdRow]) -> None:
        answers = [Answer(prompt, drafted[:count], 0, row) for row in among]
        check_answers(model, answers, decoding)

    work: dict[str, Callable[[], object]] = {"prefill": lambda: prefill(model, prompt)}
    for count in DRAFTS:
        work[f"check {count}"] = partial(check, count, rows[:1])
        work[f"rows {count}"] = partial(check, count, rows)
    (found,) = check_answers(model, [Answer(prompt, drafted, 0, parked)], decoding)
    layer = store.bytes_per_token // store.layers * given.prompt_tokens
    layers: dict[str, float] = {"charged": found.device_bytes / layer}
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        check(max(DRAFTS), rows[:1])
        peak = torch.cuda.max_memory_allocated(model.device)
        layers["allocator"] = (peak - before) / layer
    took: dict[str, list[float]] = {name: [] for name in work}
    before_all = machine()

    def result() -> dict[str, object]:
        medians = {name: statistics.median(spent) for name, spent in took.items()}
        whole = medians["prefill"]
        return {
            "prompt_tokens": given.prompt_tokens,
            "repeats": len(took["prefill"]),
            "prefill_seconds": whole,
            "check": {
                str(count): {
                    "seconds": medians[f"check {count}"],
                    "over_prefill": medians[f"check {count}"] / whole,
                }
                for count in DRAFTS
            },
            "check_of_rows": {
                str(count): {
                    "rows": given.rows,
                    "seconds_a_row": medians[f"rows {count}"] / given.rows,
                    "over_prefill_a_row": medians[f"rows {count}"] / given.rows / whole,
                }
                for count in DRAFTS
            },
            "device_layers": layers,
            "machine": before_all,
        }

    for number in Rounds(given.repeats + 1, given.minutes):
        for name, one in work.items():
            spent = seconds(one)
            if number <= 1 and took[name]:  # the first round is for warming up, if another follows
                took[name].clear()
            took[name].append(spent)
            say(f"round {number} {name}: {spent:.2f} s")
        write(given.output, result())


if __name__ == "__main__":
    main()
