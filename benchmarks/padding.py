"""What a batch allocates beyond what its rows keep, and what a decoding step costs for it.

    python benchmarks/padding.py [--steps 60]

12 rows of SmolLM2 in float32 decode together; 5 keep the quarter of their prompt that a press
leaves, 7 go back to the full cache one after the other, then all leave one by one. Entries are
random numbers: neither bytes nor times depend on them. Writes results/bench/padding.json:

- ``allocated_over_kept_max``, ``_mean``: over the steps; lower is better, goal 1.10;
- ``peak_over_kept``: the most bytes allocated at once, copies while growing included, over the most
  that was kept;
- ``attention_ms``: of one decoding step's attention over all layers, single thread, for batches of
  other shapes, three ways: ``pages`` (this library's), ``rectangle`` (one padded buffer, one call)
  and ``rows`` (a buffer a row, one call of scaled_dot_product_attention each). Processor time of
  the thread, the median of alternating runs, so that other work on the machine disturbs it little.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from measuring import FOLDER, machine, say, write
from transformers import DynamicCache, LlamaConfig

from kvguard.slots import Slots

TARGET = FOLDER / "padding.json"
LAYERS, HEADS, GROUPS, SIZE, SCALE = 30, 3, 3, 64, 64**-0.5
SMOLLM2 = LlamaConfig(
    num_hidden_layers=LAYERS,
    num_attention_heads=9,
    num_key_value_heads=3,
    hidden_size=576,
    head_dim=64,
)
Step = Callable[[torch.Tensor, torch.Tensor], None]


def random_cache(length: int) -> DynamicCache:
    """One row's cache of that many entries."""
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(
            torch.randn(1, HEADS, length, SIZE), torch.randn(1, HEADS, length, SIZE), layer
        )
    return cache


def filled(lengths: Sequence[int]) -> Slots:
    """Slots whose rows have these lengths."""
    slots = Slots(SMOLLM2, len(lengths), device=torch.device("cpu"), dtype=torch.float32)
    for row, length in enumerate(lengths):
        slots.insert(row, random_cache(length))
    return slots


def step(slots: Slots, query: torch.Tensor, new: torch.Tensor) -> None:
    """The caches' part of one decoding step."""
    slots.begin_step()
    for layer in range(slots.layers):
        slots.update(new, new, layer)
        slots.attend(layer, query, SCALE)
    slots.end_step()


def padding(steps: int) -> dict[str, float]:
    """Allocated over kept while 7 of 12 rows go back to the full cache and all leave."""
    random = np.random.default_rng(0)
    prompts = random.integers(400, 600, 12)
    slots = filled([int(length) // 4 for length in prompts])
    slots.take_peak()
    ratios, most = [], 0
    peak = 0
    for number in range(steps + 12):
        if number % 5 == 4 and number // 5 < 7:
            row = number // 5
            slots.insert(row, random_cache(int(prompts[row]) + number))
        if number >= steps:
            slots.remove(0)
        if slots.active == 0:
            break
        step(
            slots,
            torch.randn(slots.active, HEADS * GROUPS, 1, SIZE),
            torch.randn(slots.active, HEADS, 1, SIZE),
        )
        kept, masked, _ = slots.row_bytes()
        ratios.append(slots.allocated_bytes / float((kept + masked).sum()))
        most = max(most, int((kept + masked).sum()))
        peak = max(peak, slots.take_peak())
    return {
        "allocated_over_kept_max": max(ratios),
        "allocated_over_kept_mean": statistics.mean(ratios),
        "peak_over_kept": peak / most,
    }


def in_a_rectangle(lengths: Sequence[int]) -> Step:
    """One buffer a layer, as long as the longest row."""
    rows, longest = len(lengths), max(lengths)
    keys, values = (
        [torch.randn(rows, HEADS, longest, SIZE) for _ in range(LAYERS)] for _ in range(2)
    )
    places = torch.tensor(lengths) - 1
    beyond = (torch.arange(longest) > places[:, None])[:, None, None]
    mask = torch.zeros(beyond.shape).masked_fill_(beyond, -torch.inf)

    def run(query: torch.Tensor, new: torch.Tensor) -> None:
        for key, value in zip(keys, values, strict=True):
            for buffer in (key, value):
                buffer[torch.arange(rows), :, places] = new[:, :, 0]
            scores = (query.view(rows, HEADS, GROUPS, SIZE) * SCALE) @ key.transpose(2, 3)
            (scores + mask).softmax(-1) @ value

    return run


def row_by_row(lengths: Sequence[int]) -> Step:
    """One buffer and one call a row and layer."""
    caches = [random_cache(length) for length in lengths]
    attention = torch.nn.functional.scaled_dot_product_attention

    def run(query: torch.Tensor, new: torch.Tensor) -> None:
        for number in range(LAYERS):
            mixed = []
            for row, cache in enumerate(caches):
                layer = cache.layers[number]
                assert layer.keys is not None
                assert layer.values is not None
                layer.keys[0, :, -1] = new[row, :, 0]
                layer.values[0, :, -1] = new[row, :, 0]
                own = query[row].view(1, HEADS, GROUPS, SIZE)
                mixed.append(attention(own, layer.keys, layer.values, scale=SCALE))
            torch.cat(mixed)

    return run


def attention_ms(lengths: Sequence[int], repetitions: int) -> dict[str, float]:
    """Milliseconds of a step's attention, each way."""
    slots = filled([length - 1 for length in lengths])
    ways: dict[str, Step] = {
        "pages": lambda query, new: step(slots, query, new),
        "rectangle": in_a_rectangle(lengths),
        "rows": row_by_row(lengths),
    }
    query = torch.randn(len(lengths), HEADS * GROUPS, 1, SIZE)
    new = torch.randn(len(lengths), HEADS, 1, SIZE)
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, run in ways.items():
            started = time.thread_time()
            run(query, new)
            spent[name].append(time.thread_time() - started)
    return {name: statistics.median(seconds) * 1e3 for name, seconds in spent.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--output", type=Path, default=TARGET)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random = np.random.default_rng(1)
    shapes = {
        "1 row of 410": [410],
        "12 rows, 7 of them full": [*random.integers(100, 150, 5), *random.integers(410, 560, 7)],
        "32 rows of 200 to 290": [*random.integers(200, 290, 32)],
        "8 rows of 1024": [1024] * 8,
    }
    found = padding(arguments.steps)
    say(f"allocated over kept: {found['allocated_over_kept_max']:.3f}")
    spent: dict[str, dict[str, float]] = {}
    result: dict[str, object] = {**found, "attention_ms": spent, "machine": machine()}
    for name, lengths in shapes.items():
        spent[name] = attention_ms([int(length) for length in lengths], arguments.repetitions)
        say(f"{name}: {spent[name]}")
        write(arguments.output, result)


if __name__ == "__main__":
    main()
