"""What the commands print: tables that fit the terminal, answers with their text."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import polars as pl

from kvguard.config_types import ConfigError
from kvguard.progress import duration, stage_pace
from kvguard.workflow import StageStatus

console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140)

SHOWN_METRICS = ("auroc", "pr_auc", "brier", "recall_on_roc", "request_auroc")
"""What `train` prints of the evaluation; the pipeline's tables hold the rest."""

SHOWN_SETTINGS = (
    "operating_point",
    "model",
    "press",
    "ratio",
    "requests",
    "false_alarm_rate",
    "detection_rate",
    "lead_tokens",
    "excess_cfr",
    "tokens_prefilled",
    "tokens_wasted",
)
SHOWN_POLICIES = (
    "policy",
    "requests",
    "harmed",
    "silent_harm",
    "alarmed",
    "cfr",
    "agreement",
    "relative_byte_steps",
    "checks",
    "tokens_wasted",
    "seconds",
)
"""What `eval-controller` and `live` print of their tables."""


def print_stages(
    stages: Sequence[StageStatus], results_dir: str | Path, started: float | None
) -> None:
    """Print jobs done and left per stage, the pace of the latest, and the time that is left.

    Args:
        stages: of the whole run.
        results_dir: where the records of jobs are.
        started: when the run started whose plan the stages are; None: of a plan made now.
    """
    table = Table(title="jobs", title_justify="left", caption_justify="left")
    table.add_column("stage")
    for name in ("done", "left", "a job", "at once", "tokens/s", "time left"):
        table.add_column(name, justify="right")
    total, unknown = 0.0, False
    for stage in stages:
        pace = stage_pace(results_dir, stage.rule) if stage.done else None
        cells = ["-"] * 4
        if pace is not None:
            seconds = pace.seconds_left(stage.left)
            total += seconds
            rate = "-" if pace.tokens_per_second is None else f"{pace.tokens_per_second:,.0f}"
            left = duration(seconds) if stage.left else "-"
            cells = [duration(pace.seconds_per_job), f"{pace.at_once:.1f}", rate, left]
        unknown = unknown or (pace is None and stage.left > 0)
        style = "green" if stage.left == 0 else "yellow" if stage.done else None
        table.add_row(stage.rule, str(stage.done), str(stage.left), *cells, style=style)
    table.add_section()
    done, waiting = sum(stage.done for stage in stages), sum(stage.left for stage in stages)
    time_left = ("at least " if unknown else "") + duration(total) if waiting and total else "-"
    table.add_row("all", str(done), str(waiting), "", "", "", time_left)
    if started is not None:
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(started))
        table.caption = f"planned by the run that started at {at}; --plan asks Snakemake anew"
    console.print(table)


def print_answers(rows: "pl.DataFrame", title: str) -> None:
    """Print one row per request, then the text of each answer."""
    import polars as pl

    from kvguard.schema import CATASTROPHES

    kinds = pl.concat_list(pl.when(kind).then(pl.lit(kind)) for kind in CATASTROPHES)
    kinds = kinds.list.drop_nulls().list.join(", ").replace("", "none")
    shown = rows.select(
        "reference",
        "answer",
        prompt=pl.col("prompt_id").str.head(8),
        tokens="generated_tokens",
        first_rejected="first_rejected",
        KiB_before=pl.col("cache_bytes_before") // 1024,
        KiB_after=pl.col("cache_bytes_after") // 1024,
        stop="stop_reason",
        failures=pl.when(pl.col("status") == "ok").then(kinds).otherwise("error"),
    )
    print_frame(shown.select("prompt", pl.exclude("prompt")), title)
    ok = rows.filter(pl.col("status") == "ok")
    before, after = int(ok["cache_bytes_before"].sum()), int(ok["cache_bytes_after"].sum())
    share = f"{after / before:.1%}" if before else "-"
    console.print(
        f"{ok.height} of {rows.height} prompts ran, {int(ok['right'].sum())} right, "
        f"{int(ok['catastrophe'].sum())} with a catastrophe; cache after the press: "
        f"{share} of {before / 2**20:.1f} MiB; "
        f"{int(ok['generated_tokens'].sum())} tokens in {ok['decode_seconds'].sum():.1f} s",
        soft_wrap=True,
        highlight=False,
    )
    for row in rows.iter_rows(named=True):
        text = row["text"] if row["status"] == "ok" else f"error: {row['error']}"
        console.print(f"[bold]{row['prompt_id'][:8]}[/]: {escape(text)}", soft_wrap=True)


def spread_metrics(metrics: "pl.DataFrame", names: Sequence[str]) -> "pl.DataFrame":
    """From one row per metric to one row per predictor, with the metrics' intervals."""
    import polars as pl

    keys = ["target", "predictor"]
    wide = metrics.select(keys).unique(maintain_order=True)
    for name in names:
        own = metrics.filter(pl.col("metric") == name).select(
            *keys,
            pl.col("value").alias(name),
            pl.col("low").alias(f"{name}_low"),
            pl.col("high").alias(f"{name}_high"),
        )
        wide = wide.join(own, on=keys, how="left", maintain_order="left")
    return wide


def print_frame(frame: "pl.DataFrame", title: str, columns: Sequence[str] | None = None) -> None:
    """Print a table; a value with its interval becomes one cell, an undefined one a dash.

    Args:
        frame: any table; ``x_low`` and ``x_high`` are shown inside the cell of ``x``.
        title: above the table.
        columns: those to show; None shows all.
    """
    names = [
        name
        for name in columns or frame.columns
        if name.removesuffix("_low").removesuffix("_high") == name or f"{name}_low" in frame.columns
    ]
    rows = [[_cell(row, name) for name in names] for row in frame.iter_rows(named=True)]
    widths = [
        max(len(part) for part in (name.replace("_", " "), *(row[index] for row in rows))) + 3
        for index, name in enumerate(names)
    ]
    for number, chosen in enumerate(_fitting(frame, names, widths)):
        table = Table(title=escape(title) if number == 0 else None, title_justify="left")
        for index in chosen:
            numeric = frame.schema[names[index]].is_numeric()
            heading = names[index].replace("_", " ")
            table.add_column(heading, justify="right" if numeric else "left")
        for row in rows:
            table.add_row(*(row[index] for index in chosen))
        console.print(table)


def _fitting(frame: "pl.DataFrame", names: Sequence[str], widths: Sequence[int]) -> list[list[int]]:
    """Columns of each of the tables that together show a frame in the terminal's width.

    The leading columns of text say what a row is about, and begin every table.
    """
    keys: list[int] = []
    for index, name in enumerate(names):
        if frame.schema[name].is_numeric():
            break
        keys.append(index)
    tables, room = [list(keys)], console.width - 1 - sum(widths[index] for index in keys)
    left = room
    for index in range(len(keys), len(names)):
        if widths[index] > left and len(tables[-1]) > len(keys):
            tables.append(list(keys))
            left = room
        tables[-1].append(index)
        left -= widths[index]
    return tables


def _cell(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if value is None:
        return "-"
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if isinstance(value, float):
        text = _number(value)
        return text if low is None or high is None else f"{text} [{_number(low)}, {_number(high)}]"
    return (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else escape(str(value))
    )


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def read_policies(results_dir: Path) -> "pl.DataFrame":
    """What each live policy left and cost per request, the least harm first within a condition.

    Args:
        results_dir: of a finished run.

    Returns:
        Harm left as shares of requests with 95 % intervals; byte-steps as a multiple of those of
        the full KV cache on the same prompts; bus traffic as a multiple of what offloading that
        cache moves; peak in MiB; tokens, checks and seconds per request.

    Raises:
        ConfigError: no policy was run.
    """
    import polars as pl

    from kvguard.config_policies import POLICIES
    from kvguard.schema import read_table

    path = results_dir / "tables" / "policies.parquet"
    if not path.is_file():
        raise ConfigError(
            f"--view policies: no table at {path}; run the live experiment first (`kvguard sweep`)"
        )
    shares = ("harmed", "silent_harm", "rescued")
    table = read_table(path)
    if "relative_bus_traffic" not in table.columns:  # of an earlier version
        table = table.with_columns(relative_bus_traffic=pl.lit(None, pl.Float64))
    return (
        table.filter(pl.col("source") == "live")
        .sort("model", "press", "ratio", "harmed", "relative_byte_steps", nulls_last=True)
        .select(
            "press",
            "ratio",
            pl.col("policy").replace({name: entry.label for name, entry in POLICIES.items()}),
            "requests",
            *(f"{name}{end}" for name in shares for end in ("", "_low", "_high")),
            byte_steps="relative_byte_steps",
            bus_traffic="relative_bus_traffic",
            peak_mib=pl.col("device_bytes_peak") / 2**20,
            prefilled="tokens_prefilled",
            checks="checks",
            seconds="seconds",
        )
    )
