"""The guard's report per request, and its error."""

from typing import TYPE_CHECKING

from pydantic import BaseModel

if TYPE_CHECKING:
    import polars as pl

    from kvguard.requests import Completion


class GuardError(ValueError):
    """The guard cannot do what was asked; the message says what it can."""


class RowReport(BaseModel):
    """What the guard did with one request; counts of tokens and bytes are this request's alone.

    Attributes:
        modes: (position, mode) at the start and at each change; positions are of generated tokens.
        start_ratio: fraction that the press removed at prefill where a ladder chose it; "0.000" is
            the full cache. None: no ladder was asked.
        alarm_steps: generated tokens in the row when each alarm came.
        scheduled_steps: generated tokens in the row when each check came that was due at a fixed
            step, as all are with `policy="lossless"`; no alarms.
        rewound_to: tokens kept by each rewind or restart.
        unrecoverable: checks that rejected tokens which had been streamed already.
        tokens_wasted: generated, then dropped.
        tokens_prefilled: of prompts, checks and recoveries; a shared prefix counts.
        decode_steps: single-token passes, those of dropped tokens included.
        checks: passes of the uncompressed model over what had not been checked.
        kv_bytes_mean: bytes that the row's entries take, hidden ones too, mean over its decode
            steps; None without a step. Padding belongs to the batch and is left out.
        kv_bytes_peak: the largest of them, and of the caches that checks needed.
        kv_padding_bytes_mean: the row's share of memory that is allocated and empty: the end of its
            last page, and free pages; mean over its decode steps.
        seconds: of this request's prefill and recoveries, and its share of decoding and guarding.
        stop_reason: "eos", "length" or "stopped"; None on error.
        notes: what went wrong and was survived.
        error: why the request failed, None if it did not.
    """

    key: str
    modes: list[tuple[int, str]] = []
    start_ratio: str | None = None
    alarm_steps: list[int] = []
    scheduled_steps: list[int] = []
    rewound_to: list[int] = []
    unrecoverable: int = 0
    tokens_wasted: int = 0
    tokens_prefilled: int = 0
    decode_steps: int = 0
    checks: int = 0
    kv_bytes_mean: float | None = None
    kv_bytes_peak: int | None = None
    kv_padding_bytes_mean: float | None = None
    seconds: float = 0.0
    stop_reason: str | None = None
    notes: list[str] = []
    error: str | None = None


class GuardReport(list[RowReport]):
    """What the guard did in one call: one `RowReport` per row."""

    def __repr__(self) -> str:
        counts = self.total()
        if any(row.scheduled_steps for row in self):
            acted = f"{counts['checked_on_schedule']} checked on schedule"
        else:
            acted = f"{counts['alarmed']} alarmed"
        return f"<GuardReport: {len(self)} rows, {acted}, {counts['failed']} failed>"

    def total(self) -> dict[str, float]:
        """The rows' counts and seconds, added up."""
        names = (
            "tokens_wasted",
            "tokens_prefilled",
            "decode_steps",
            "checks",
            "unrecoverable",
            "seconds",
        )
        counts: dict[str, float] = {
            "rows": len(self),
            "alarmed": sum(bool(row.alarm_steps) for row in self),
            "checked_on_schedule": sum(bool(row.scheduled_steps) for row in self),
            "failed": sum(row.error is not None for row in self),
        }
        return counts | {name: sum(getattr(row, name) for row in self) for name in names}

    def to_frame(self) -> "pl.DataFrame":
        """A Polars frame with one row per request."""
        import polars as pl

        rows = [
            row.model_dump() | {"modes": [f"{position}:{mode}" for position, mode in row.modes]}
            for row in self
        ]
        return pl.DataFrame(rows, infer_schema_length=None)


def complete_report(report: RowReport, completion: "Completion") -> None:
    """Add what a finished request's completion says."""
    report.tokens_wasted = completion.tokens_wasted
    report.tokens_prefilled = completion.tokens_prefilled
    report.decode_steps, report.checks = completion.decode_steps, completion.checks
    report.seconds = completion.prefill_seconds + completion.decode_seconds
    report.stop_reason, report.error = completion.stop_reason, completion.error
    report.notes += [note for note in completion.notes if note not in report.notes]
    allocated = completion.kv_bytes[:, :2].sum(axis=1)  # kept and masked; padding is the batch's
    if len(allocated):
        report.kv_bytes_mean = float(allocated.mean())
        report.kv_padding_bytes_mean = float(completion.kv_bytes[:, 2].mean())
        report.kv_bytes_peak = max(report.kv_bytes_peak or 0, int(allocated.max()))
