"""docs/findings.md, written from the tables."""

from pathlib import Path


def write_findings(tables: str | Path, target: str | Path) -> None:
    """Write the findings as Markdown from a folder of ``<table>.parquet`` files."""
    raise NotImplementedError
