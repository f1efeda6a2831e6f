"""Whether two results folders say the same: the same files, and the same values but timings."""

import io
import re
from pathlib import Path

import polars as pl
from polars.testing import assert_frame_equal

TIMINGS = re.compile(r"seconds|(^|_)time(_|$)|allocator_bytes")
"""Columns, and rows of a long table, that no two runs share."""


def comparable(path: Path) -> pl.DataFrame:
    """A table without its timings, in a fixed order of rows."""
    frame = pl.read_parquet(path, hive_partitioning=False)
    timed = [name for name in frame.columns if TIMINGS.search(name)]
    frame = frame.drop(timed)
    for name, kind in frame.schema.items():
        if kind == pl.String and name in ("metric", "cost", "quantity"):
            frame = frame.filter(~pl.col(name).fill_null("").str.contains(TIMINGS.pattern))
    flat = [name for name, kind in frame.schema.items() if not kind.is_nested()]
    return frame.sort(flat) if flat else frame


def parquet(frame: pl.DataFrame) -> bytes:
    """The table as a file."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def files(results: Path) -> set[str]:
    """Names of all files below a results folder."""
    return {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()}


def assert_same_results(one: Path, other: Path) -> None:
    """The same files, and the same values in every table and every JSON file of a model."""
    assert files(one) == files(other)
    for name in sorted(files(one)):
        if name.endswith(".parquet"):
            left, right = comparable(one / name), comparable(other / name)
            try:
                assert_frame_equal(left, right, check_exact=True)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
            assert parquet(left) == parquet(right), f"{name}: equal values, other bytes"
        elif name.startswith(("models/", "prompts/")) and name.endswith(".json"):
            assert (one / name).read_text() == (other / name).read_text(), name
