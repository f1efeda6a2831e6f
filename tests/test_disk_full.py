"""A disk that is full: nothing half written stays, a check recomputes what could not be parked."""

from pathlib import Path

import kvpress
import polars as pl
import pytest
from small_disk import small_disk
from test_engine import ragged_requests
from test_guard import GREEDY, uncompressed
from transformers import PreTrainedModel

from kvguard.engine import Session
from kvguard.files import check_file, digest_path
from kvguard.guard_observer import GuardObserver, guarded
from kvguard.rivals import Lossless
from kvguard.schema import write_table


def table(rows: int) -> pl.DataFrame:
    """A table that does not compress to nothing."""
    return pl.DataFrame({"text": [f"{i * i * 7919 % 1_000_003}" * 4 for i in range(rows)]})


def test_a_table_on_a_full_disk_is_not_there_and_the_older_one_stays(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        path = disk / "table.parquet"
        write_table(table(100), path)
        with pytest.raises((OSError, pl.exceptions.PolarsError), match="No space left") as caught:
            write_table(table(100_000), path)
        assert f"while writing {path}" in caught.value.__notes__[0]
        assert "MiB free there); none of it is kept" in caught.value.__notes__[0]
        assert pl.read_parquet(path).height == 100
        check_file(path)
        assert {file.name for file in disk.iterdir()} == {path.name, digest_path(path).name}


def test_what_does_not_fit_on_the_disk_is_recomputed_by_checks(
    tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    """Every answer is checked to the end, parked or not, and the disk is empty again afterwards."""
    requests = ragged_requests(tiny_llama.config.vocab_size)
    with small_disk(tmp_path / "disk", "160k") as disk:
        session = Session(
            tiny_llama, GREEDY, press=kvpress.KnormPress(0.6), rows=4, cold="disk", cold_folder=disk
        )
        observer = GuardObserver(session, Lossless("lossless", 4, 4))
        answers, notes = {}, {}
        for done, report in guarded(session, requests, observer):
            answers[done.request.key] = done.token_ids
            notes[done.request.key] = report.notes
        assert list(disk.iterdir()) == []
    assert answers == uncompressed(tiny_llama, requests)
    refused = [text for texts in notes.values() for text in texts]
    assert refused
    assert all("No space left" in text for text in refused)
    assert any(not texts for texts in notes.values()), "some found room"
