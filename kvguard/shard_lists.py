"""Lists of shards: what a plan of ten thousand shards goes by, instead of by every one of them.

Snakemake's plan takes its time by jobs and by the files that they read and write. With
``jobs.list_shards`` a job that makes several shards (`kvguard.blocks`) has one list of them as its
output, and who reads the shards depends on the lists.
"""

import json
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

from kvguard.files import MANIFEST, DamagedFile, atomic_path, content_digest, digest_path

LISTS = "lists"
"""Folder of the lists below the results folder, ``lists/<table>/<block>.shards.json``."""

_SUFFIX = ".shards.json"


class LostShard(FileNotFoundError):
    """A shard that a list names and that is not there; the message says how to heal that."""

    def __init__(self, path: Path, listed_in: Path) -> None:
        super().__init__(
            f"{path} is missing; {listed_in} lists it. Run again: the plan sees it, and it is made "
            f"anew, with what depends on it"
        )


def list_name(table: str, block: str) -> str:
    """Where the list of a block's shards of one table is, below the results folder.

    >>> list_name("traces", "012")
    'lists/traces/012.shards.json'
    """
    return f"{LISTS}/{table}/{block}{_SUFFIX}"


def is_shard_list(path: str | Path) -> bool:
    """Whether a path is that of a list."""
    return str(path).endswith(_SUFFIX)


def write_shard_list(shards: Iterable[str | Path], target: Path) -> None:
    """List shards, with the digest of their values, the same whatever their timings.

    Args:
        shards: files below the results folder, in the order in which their readers want them.
        target: the list, at its `list_name`.
    """
    root = _root(target)
    values = {Path(shard).relative_to(root).as_posix(): content_digest(shard) for shard in shards}
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")


def listed_shards(path: str | Path) -> list[Path]:
    """The shards of a list, in its order.

    Raises:
        LostShard: one is not there; names the first.
    """
    path = Path(path)
    shards = [_root(path) / name for name in json.loads(path.read_text())]
    for shard in shards:
        if not shard.exists():
            raise LostShard(shard, path)
    return shards


def with_listed(given: str | Sequence[str]) -> str | list[str]:
    """One of a job's inputs, a path or several, with every list replaced by its shards.

    Raises:
        LostShard: as `listed_shards`.
    """
    paths = [given] if isinstance(given, str) else given
    if not any(map(is_shard_list, paths)):
        return given if isinstance(given, str) else list(given)
    return [
        str(each)
        for path in paths
        for each in (listed_shards(path) if is_shard_list(path) else [path])
    ]


def forget_manifest(path: Path) -> None:
    """Remove the manifest of a finished run whose shards are about to be made anew.

    A list whose shards have the values that they had is the same list, so that the manifest, which
    counts bytes, would not be out of date by it.

    Args:
        path: a list of the run.
    """
    manifest = _root(path) / MANIFEST
    manifest.unlink(missing_ok=True)
    digest_path(manifest).unlink(missing_ok=True)


def changed_shards(path: Path) -> list[str]:
    """Shards that have other values than when they were listed, or are gone."""
    root = _root(path)
    listed = json.loads(path.read_text())
    return [name for name, values in listed.items() if values != _values(root / name)]


def changed_lists(results: Path, counted: Container[str] | None = None) -> Iterator[str | None]:
    """What is wrong with each list of a run, None for one that is right.

    Args:
        results: the run's folder.
        counted: names of the files that count; None: all.
    """
    for path in sorted((results / LISTS).rglob(f"*{_SUFFIX}")):
        name = path.relative_to(results).as_posix()
        if counted is None or name in counted:
            changed = changed_shards(path)
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            yield f"{name}: lists other values of {changed[0]}{more}" if changed else None


def _values(shard: Path) -> str | None:
    try:
        return content_digest(shard) if shard.is_file() else None
    except DamagedFile:
        return None


def _root(target: Path) -> Path:
    return target.parents[2]
