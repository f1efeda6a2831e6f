"""What the benchmarks share: files that survive a cut, progress lines, the machine's own speed.

No benchmark itself. A script writes its result after every round with `write`, so that one that is
stopped keeps the rounds that it finished; `Rounds` starts no further round once its minutes are
over.
"""

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kvguard.schema import atomic_path

FOLDER = Path("results/bench")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    """Processor, its cores, the threads in use, the load at this moment and torch's version."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def write(target: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON, all or nothing."""
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")


def say(text: str) -> None:
    """A progress line with the time of day."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def reference_seconds() -> float:
    """Seconds of a fixed piece of work: what varies between calls is the machine's doing.

    A sum over 256 MiB, bound by memory, and matrix products of a small model's size, bound by
    arithmetic; the memory is made before the clock starts.
    """
    block = torch.ones(64 * 2**20)
    left, right = torch.ones(512, 576), torch.ones(576, 1536)
    left @ right
    began = time.perf_counter()
    for _ in range(4):
        block.sum()
    for _ in range(100):
        left @ right
    return time.perf_counter() - began


class Rounds:
    """Numbers of rounds 0, 1, ...; ends after ``count`` or, but for the first, ``minutes``.

    The next round is expected to take as long as the longest one before.
    """

    def __init__(self, count: int, minutes: float) -> None:
        self.count, self.seconds = count, 60 * minutes

    def __iter__(self) -> Iterator[int]:
        began, longest = time.perf_counter(), 0.0
        for number in range(self.count):
            started = time.perf_counter()
            if number > 0 and started - began + longest > self.seconds:
                say(f"{number} of {self.count} rounds: the minutes are over")
                return
            yield number
            longest = max(longest, time.perf_counter() - started)


def spread(values: list[float]) -> float:
    """Largest minus smallest, over the smallest; 0 for one value."""
    return max(values) / min(values) - 1
