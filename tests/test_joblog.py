"""Log lines reach the terminal of the moment, and the file of the job."""

import contextlib
import faulthandler
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvguard import joblog


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """The handlers and the level of before, afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


def test_a_terminal_that_was_replaced_and_closed_gets_no_line_and_no_traceback() -> None:
    """As a command that ran inside another program and whose output was collected leaves it."""
    with contextlib.redirect_stderr(io.StringIO()) as collected:
        joblog.configure_logging()
        joblog.logger.info("inside")
        assert collected.getvalue() == "inside\n"
        collected.close()
        joblog.logger.info("nobody reads this")
    with contextlib.redirect_stderr(io.StringIO()) as later:
        joblog.logger.info("afterwards")
        assert later.getvalue() == "afterwards\n"


def test_a_log_file_gets_the_time_and_the_terminal_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faulthandler, "enable", lambda stream: None)  # pytest has its own
    joblog.configure_logging(tmp_path / "logs" / "rule.log")
    joblog.logger.info("a line")
    logging.getLogger("kvguard.part").warning("a warning")
    assert capsys.readouterr().err == "a line\na warning\n"
    first, second = (tmp_path / "logs" / "rule.log").read_text().splitlines()
    assert first.endswith(" INFO kvguard: a line")
    assert second.endswith(" WARNING kvguard.part: a warning")
