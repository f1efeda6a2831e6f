"""Logging of the pipeline's jobs: every job has a log, and a traceback always reaches it.

Import this module first in a workflow script. When it finds that Snakemake started the script, it
sets a hook at once, so that even a failing import below leaves its traceback in the rule's log.
"""

import faulthandler
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from kvguard.files import check_inputs, record_origin

logger = logging.getLogger("kvguard")

LINE_SECONDS = 10.0
"""Least time between two progress lines where there is no terminal."""


class Advance(Protocol):
    """Reports progress: ``advance(3)`` says that three more units are done."""

    def __call__(self, units: int = 1, note: str = "") -> None: ...


class _Terminal(logging.Handler):
    """Writes to the ``sys.stderr`` of the moment, which may be another at every message.

    `logging.StreamHandler` keeps the stream that it was made with. Whoever runs a command inside
    another program and collects what it prints (a test, a notebook) replaces ``sys.stderr`` and
    closes it afterwards; every later log line would then print a traceback of logging's own.
    """

    def emit(self, record: logging.LogRecord) -> None:
        stream: IO[str] | None = sys.stderr
        try:
            if stream is not None and not stream.closed:
                stream.write(self.format(record) + "\n")
                stream.flush()
        except Exception:
            self.handleError(record)


def configure_logging(log: str | Path | None = None) -> None:
    """Send log lines and warnings to a file and, in short form, to the terminal.

    Args:
        log: the rule's log file, started afresh; None logs to the terminal alone.
    """
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    terminal = _Terminal()
    terminal.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(terminal)
    if log is not None:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        stream = Path(log).open("w")  # noqa: SIM115, lives as long as the job
        file = logging.StreamHandler(stream)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(file)
        faulthandler.enable(stream)
    logging.captureWarnings(True)
    for chatty in ("httpx", "httpcore", "urllib3", "filelock", "matplotlib", "fsspec", "fontTools"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def start_log() -> Any:
    """Set up the log of the rule whose script is running.

    Returns:
        The object that Snakemake puts into a script's globals: input, output, params, wildcards.

    Raises:
        RuntimeError: the script was not started by Snakemake.
    """
    job = getattr(sys.modules.get("__main__"), "snakemake", None)
    if job is None:
        raise RuntimeError("this script is started by Snakemake, as the rule of the same name")
    configure_logging(job.log[0])
    return job


def start_job() -> Any:
    """As `start_log`; besides, check the digests of the job's inputs.

    Lists of shards among the inputs are replaced by the shards and go to an input of their own,
    ``shard_lists``. What the job writes carries what made it (`kvguard.provenance.describe_job`).

    Raises:
        RuntimeError: the script was not started by Snakemake.
        DamagedFile: an input is not what was written; names it and how to heal it.
        LostShard: a list names a shard that is not there.
    """
    job = start_log()
    from kvguard.blocks import Named  # not at the top: the hook is set before
    from kvguard.provenance import describe_job
    from kvguard.shard_lists import is_shard_list, with_listed

    read = set(map(str, job.input))
    check_inputs(read)
    record_origin(describe_job(job))
    lists = list(filter(is_shard_list, job.input))
    if lists:
        shards = {name: with_listed(given) for name, given in job.input.items()}
        job.input = Named(shards | {"shard_lists": lists})
        check_inputs(path for path in job.input if path not in read)
    return job


@contextmanager
def progress(total: int, what: str) -> Iterator[Advance]:
    """Show how far a loop is: a bar on a terminal, a plain line every few seconds elsewhere.

    Args:
        total: number of units.
        what: what is done, in words.

    Yields:
        a function that is called with the number of units just done, and optionally a note.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)

            def advance_bar(units: int = 1, note: str = "") -> None:
                bar.update(task, advance=units, description=f"{what} {note}".strip())

            yield advance_bar
        return
    done = 0
    started = spoken = time.monotonic()

    def advance_line(units: int = 1, note: str = "") -> None:
        nonlocal done, spoken
        done += units
        now = time.monotonic()
        if now - spoken >= LINE_SECONDS or done == total:
            spoken = now
            tail = f", {note}" if note else ""
            logger.info("%s: %d of %d after %.0f s%s", what, done, total, now - started, tail)

    yield advance_line


def _workflow_log() -> Path | None:
    """The log of the rule whose script is running, None outside Snakemake."""
    job = getattr(sys.modules.get("__main__"), "snakemake", None)
    logs = getattr(job, "log", None)
    return Path(logs[0]) if logs else None


def _write_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    sys.__excepthook__(kind, error, trace)
    log = _workflow_log()
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.writelines(traceback.format_exception(kind, error, trace))


if _workflow_log() is not None:
    sys.excepthook = _write_traceback
