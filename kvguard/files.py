"""Files that are whole or not there: atomic writes with a recorded SHA-256, checked before use.

A file appears under its name only when it is complete, and the digest of what was written is kept
beside it (``.<name>.sha256``): the digest on the first line, what made the file on the second, as
JSON. A job checks the digests of its inputs before it reads them, so that a truncated file or a
flipped bit stops the first reader instead of spreading into tables.
"""

import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RECORD = "kvguard_model.json"
"""File in a prepared model's folder that lists the SHA-256 of the others under ``files``."""

MANIFEST = "manifest.json"
"""Size and SHA-256 of every file of a finished run, in its results folder."""

PARTIAL = ".part"
"""Ending of a file that is being written; one that no process writes was left by a kill."""

_origin: dict[str, Any] = {}


def record_origin(origin: Mapping[str, Any]) -> None:
    """Keep this beside every file that the process writes from now on: a job's `describe_job`."""
    _origin.clear()
    _origin.update(origin)


class DamagedFile(ValueError):
    """A result that is not what was written; the message says how to have it made anew.

    Args:
        path: the file, or the folder of a prepared model.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | Path, reason: object) -> None:
        self.path = Path(path)
        remove = ["rm", *(["-r"] if self.path.is_dir() else []), str(path)]
        super().__init__(
            f"{path} is damaged: {reason}. Remove it (`{shlex.join(remove)}`, or `kvguard verify "
            f"--discard` for all that is damaged) and run again: it is made anew, with what "
            f"depends on it and nothing else"
        )


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_path(path: str | Path) -> Path:
    """Where the digest of a written file is kept."""
    path = Path(path)
    return path.with_name(f".{path.name}.sha256")


def recorded_digest(path: str | Path) -> str | None:
    """The SHA-256 of a file as it was written; None where none is recorded."""
    lines = _record_lines(path)
    return lines[0].strip() if lines else None


def content_digest(path: str | Path) -> str | None:
    """The recorded digest of what a file says, the same for every run of a job.

    Of a table the digest of its values without timings (`kvguard.schema.write_table`), of a
    prepared model that of its record, of any other file its SHA-256; None where none is recorded.
    """
    path = Path(path)
    if (path / RECORD).is_file():
        return file_sha256(path / RECORD)
    return origin_of(path).get("values") or recorded_digest(path)


def origin_of(path: str | Path) -> dict[str, Any]:
    """What made a file (`kvguard.provenance.describe_job`); empty where that was not recorded.

    Raises:
        DamagedFile: the record is not what was written.
    """
    lines = _record_lines(path) or []
    if not "".join(lines[1:]).strip():  # written by a process that is no job, such as the plan
        return {}
    try:
        return dict(json.loads(lines[1]))
    except (ValueError, TypeError) as error:
        raise DamagedFile(path, f"{digest_path(path).name} cannot be read ({error})") from None


def _record_lines(path: str | Path) -> list[str] | None:
    """Lines of a file's record, at least one; None where there is none. Noise is some text too."""
    record = digest_path(path)
    if not record.is_file():
        return None
    return record.read_text(errors="replace").split("\n")


def check_file(path: str | Path) -> None:
    """Compare a file with the digest that was recorded when it was written.

    A file without a record, such as one that a user provides, is not checked.

    Raises:
        DamagedFile: its content is another one, or a folder is in its place.
    """
    recorded = recorded_digest(path)
    if recorded is not None and Path(path).is_dir():
        raise DamagedFile(path, "a folder is in the place of the file")
    if recorded is not None and recorded != file_sha256(path):
        raise DamagedFile(path, "its content is not what was written (SHA-256)")


def check_model(folder: str | Path) -> None:
    """Compare a prepared model's files with the digests in its record.

    Raises:
        DamagedFile: a file changed or is missing; names it.
    """
    folder = Path(folder)
    try:
        files = json.loads((folder / RECORD).read_text())["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(folder, f"{RECORD} cannot be read ({error})") from None
    for name, sha256 in files.items():
        if not (folder / name).is_file():
            raise DamagedFile(folder, f"{name} is missing")
        if file_sha256(folder / name) != sha256:
            raise DamagedFile(folder, f"the content of {name} changed since it was prepared")


def check_inputs(paths: Iterable[str | Path]) -> None:
    """Check every file, and every folder of a prepared model, that a job is about to read.

    Raises:
        DamagedFile: the first that is not what was written.
    """
    for path in map(Path, paths):
        if (path / RECORD).is_file():
            check_model(path)
        else:
            check_file(path)


class atomic_path:
    """Context manager: a temporary name beside ``path``, renamed onto it on success.

    What an earlier, killed writer of the same file left is removed. An error gets a note that names
    the file.

    Args:
        path: the file.
        values: digest of what it says, where its bytes differ between runs that agree.

    >>> with atomic_path(target) as temporary:
    ...     temporary.write_text("whole or not at all")
    """

    def __init__(self, path: str | Path, values: str | None = None) -> None:
        self.path, self.values = Path(path), values

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.parent.glob(f".{self.path.name}.*{PARTIAL}*"):
            leftover.unlink(missing_ok=True)
        try:
            handle, name = tempfile.mkstemp(
                dir=self.path.parent, prefix=f".{self.path.name}.", suffix=PARTIAL
            )
        except OSError as error:
            error.add_note(self._note())
            raise
        os.close(handle)
        self.temporary = Path(name)
        return self.temporary

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        try:
            if kind is None:
                self.temporary.chmod(0o644)
                digest = file_sha256(self.temporary)
                digest_path(self.path).unlink(missing_ok=True)
                self.temporary.replace(self.path)
                origin = _origin | ({"values": self.values} if self.values else {})
                further = json.dumps(origin, sort_keys=True) + "\n" if _origin else ""
                digest_path(self.path).write_text(f"{digest}\n{further}")
        except OSError as failure:
            failure.add_note(self._note())
            raise
        finally:
            self.temporary.unlink(missing_ok=True)
        if error is not None:
            error.add_note(self._note())

    def _note(self) -> str:
        free = shutil.disk_usage(self.path.parent).free
        return f"while writing {self.path} ({free / 2**20:,.0f} MiB free there); none of it is kept"
