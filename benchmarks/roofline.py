"""What this machine could do at best: matrix products, attention, and what they leave of the goals.

    python benchmarks/roofline.py [--threads 2] [--repeats 5]

Random numbers in the shapes of SmolLM2 in float32; no model runs. Timed are the products with all
of the model's matrices for M tokens at once (``matrices_ms``, ``matrices_gflops``), and attention:
its two batched products or torch's flash kernel, whichever is faster, of one query a row over the
entries of a cache, or n drafted tokens a row over its cold cache. Everything else (norms, signals,
Python) counts as free, so what follows is a bound, not a forecast. Writes
results/bench/roofline.json:

- ``read_bytes_per_second``: the weights' bytes over the time of M = 1;
- ``generation_bound``: of generation.json's GSM8K job (32 prompts of 518 tokens, 70 of them behind
  what all share, 160 steps, every answer audited): seconds one prompt at a time, each prefilled
  whole, over seconds in batches;
- ``long_context``: of long_context.json (8 rows, 4,096 entries, ratio 0.750): a step uncompressed
  and compressed, a check of all rows;
- ``lossless_bound``: for acceptance lengths (tokens from one rejection to the next), the best
  tokens a second over never compressing that a fixed horizon of 2 to 32 reaches there.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import FOLDER, machine, say, write

TARGET = FOLDER / "roofline.json"
LAYERS, HIDDEN, INNER, VOCABULARY = 30, 576, 1536, 49_152
HEADS, GROUPS, HEAD_DIM = 3, 3, 64
KV = HEADS * HEAD_DIM
SHAPES = [
    *((HIDDEN, HIDDEN), (HIDDEN, KV), (HIDDEN, KV), (HIDDEN, HIDDEN)),
    *((HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)),
]
"""(inputs, outputs) of a layer's matrices."""
ACCEPTANCE = (8, 14, 30, 60, 250)
GSM8K = {"tokens": 4_179, "prompts": 32, "own_tokens": 70, "entries": 518, "kept": 0.5}
"""generation.json's job: prompts of 518 tokens on average, 70 behind the shared examples."""

STEPS, AUDITED_TOKENS = 160, 512
"""Decoding steps until the last of 32 rows has ended, and tokens of one pass of audits."""


def median_ms(work: Callable[[], object], repeats: int) -> float:
    """Milliseconds of the median run, after one that is not counted."""
    work()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - began))
    return statistics.median(found)


class Machine:
    """Times of this machine, each measured once."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.layers = [[torch.randn(out, into) for into, out in SHAPES] for _ in range(LAYERS)]
        self.head = torch.randn(VOCABULARY, HIDDEN)
        self.weights = LAYERS * sum(a * b for a, b in SHAPES) + VOCABULARY * HIDDEN
        self._matrices: dict[tuple[int, int], float] = {}
        self._attention: dict[tuple[int, int, int], float] = {}

    @torch.inference_mode()
    def matrices(self, tokens: int, predicted: int | None = None) -> float:
        """Milliseconds of all products for so many tokens, the last ones of which get logits."""
        predicted = tokens if predicted is None else predicted
        if (tokens, predicted) not in self._matrices:
            inputs = {size: torch.randn(tokens, size) for size in (HIDDEN, INNER)}
            last = torch.randn(predicted, HIDDEN)

            def work() -> None:
                for layer in self.layers:
                    for matrix in layer:
                        inputs[matrix.shape[1]] @ matrix.t()
                last @ self.head.t()

            self._matrices[tokens, predicted] = median_ms(work, self.repeats)
        return self._matrices[tokens, predicted]

    @torch.inference_mode()
    def attention(self, rows: int, entries: int, queries: int = 1) -> float:
        """Milliseconds of attention in all layers: its two products, or the flash kernel."""
        key = (rows, entries, queries)
        if key not in self._attention:
            caches = torch.randn(4, 2, rows * HEADS, entries, HEAD_DIM)  # 4 layers: out of L2
            query = torch.randn(rows * HEADS, GROUPS * queries, HEAD_DIM)
            weights = torch.randn(rows * HEADS, GROUPS * queries, entries)

            def work() -> None:
                for keys, values in caches:
                    torch.bmm(query, keys.transpose(1, 2))
                    torch.bmm(weights, values)

            def flash() -> None:
                for keys, values in caches:
                    attend(query[None], keys[None], values[None])

            attend = torch.nn.functional.scaled_dot_product_attention
            fastest = min(median_ms(each, self.repeats) for each in (work, flash))
            self._attention[key] = fastest * LAYERS / len(caches)
        return self._attention[key]


def generation_bound(limits: Machine) -> dict[str, float]:
    """One prompt at a time beside batches of 32: the GSM8K job."""
    tokens, prompts, own, entries = (
        int(GSM8K[name]) for name in ("tokens", "prompts", "own_tokens", "entries")
    )
    kept = int(GSM8K["kept"] * entries)
    length = tokens // prompts
    prefill = prompts * limits.matrices(own, 1)
    passes = tokens / AUDITED_TOKENS
    audit = passes * limits.matrices(AUDITED_TOKENS)
    audit += prompts * limits.attention(1, entries, length)
    rows = round(tokens / STEPS)
    batched = STEPS * (limits.matrices(rows) + limits.attention(rows, kept))
    single = tokens * (limits.matrices(1) + limits.attention(1, kept))
    whole = prompts * (limits.matrices(entries, 1) + limits.matrices(entries + length, length))
    return {
        "prefill_seconds": prefill / 1e3,
        "decode_seconds": batched / 1e3,
        "audit_seconds": audit / 1e3,
        "sequential_seconds": (whole + single) / 1e3,
        "speedup": (whole + single) / (prefill + batched + audit),
    }


def long_context(
    limits: Machine, rows: int, entries: int, ratio: float
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Lossless decoding beside never compressing: its parts, and the best by acceptance length."""
    full = limits.matrices(rows) + limits.attention(rows, entries)
    drafting = limits.matrices(rows) + limits.attention(rows, int(entries * (1 - ratio)))
    passes = {
        n: limits.matrices(rows * n) + limits.attention(rows, entries, n) for n in (2, 4, 8, 16, 32)
    }
    bound = []
    for accepted in ACCEPTANCE:
        survives = 1 - 1 / accepted
        best = 0.0
        for n, check in passes.items():
            # n tokens: the first is the check's own, n - 1 are drafted.
            kept = 1 + sum(survives**k for k in range(1, n))
            best = max(best, kept * full / ((n - 1) * drafting + check))
        bound.append({"tokens_per_rejection": accepted, "tokens_per_second_ratio": best})
    parts = {
        "step_ms_uncompressed": full,
        "step_ms_compressed": drafting,
        **{f"check_ms_of_{n}_tokens": value for n, value in passes.items()},
    }
    return parts, bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    before = machine()
    limits = Machine(given.repeats)
    result: dict[str, Any] = {"machine": before}
    matrices = {tokens: limits.matrices(tokens) for tokens in (1, 8, 32, 128, 512)}
    result["matrices_ms"] = matrices
    result["matrices_gflops"] = {
        tokens: 2e-6 * tokens * limits.weights / ms for tokens, ms in matrices.items()
    }
    result["read_bytes_per_second"] = 4e3 * limits.weights / matrices[1]
    say(json.dumps(result["matrices_gflops"]))
    result["generation_bound"] = generation_bound(limits)
    say(json.dumps(result["generation_bound"]))
    write(TARGET, result)
    result["long_context"], result["lossless_bound"] = long_context(
        limits, given.rows, given.tokens, 0.75
    )
    write(TARGET, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
