"""Blocks: several shards made by one job, whose process loads the model once.

With ``jobs.shards_per_job`` above 1 the rules that run the language model are planned in blocks
(``rules/blocks.smk``). Each shard stays a file of its own, with the record it would have alone.
Snakemake removes every output of a job that it starts again, so a finished shard has a second name
beside the first, ``.<name>.kept``: a hard link, which takes no room. A job that was interrupted, or
one of whose shards was lost, links what is there and still valid and makes the rest.

With ``jobs.list_shards`` a block's outputs are lists of its shards (`kvguard.shard_lists`). Then
Snakemake removes no shard, and the job makes those that are not there or not valid.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kvguard import joblog
from kvguard.files import (
    PARTIAL,
    DamagedFile,
    check_file,
    check_inputs,
    digest_path,
    origin_of,
    record_origin,
)
from kvguard.shard_lists import forget_manifest, is_shard_list, write_shard_list

logger = logging.getLogger(__name__)

KEPT = ".kept"

_BLOCK = "_block_"

T = TypeVar("T")

_MADE_BY = (
    *("rule", "wildcards", "parameters", "code", "seed", "data"),
    *("kvguard", "python", "packages", "dtype"),
)
"""Of a file's origin, what has to agree for it to count as finished; the device may be another."""


def block_name(rule: str, number: int | None = None) -> str:
    """Name of the rule that makes one block of another rule's shards, or every block."""
    return f"{rule}{_BLOCK}" + ("each" if number is None else f"{number:03d}")


def rule_of_block(name: str) -> str:
    """The rule whose shards a block makes; the name of any other rule is its own.

    >>> rule_of_block("generate_block_012")
    'generate'
    """
    return re.sub(rf"{_BLOCK}(\d+|each)$", "", name)


def cut(shards: Iterable[T], size: int, together: Callable[[T], object]) -> Iterator[list[T]]:
    """Blocks of at most so many consecutive shards that may be made by one process.

    Args:
        shards: all of them, in order.
        size: shards in a block, at least 1.
        together: what consecutive shards of one block have in common.
    """
    for _, group in groupby(shards, together):
        listed = list(group)
        yield from (listed[at : at + size] for at in range(0, len(listed), size))


def pack(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """Rows by name, each different value once: Snakemake records a job's parameters for every file.

    Args:
        rows: values that JSON can say; a name that a row lacks is None there.
    """
    packed = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        places: dict[str, int] = {}
        which = [places.setdefault(json.dumps(v, sort_keys=True), len(places)) for v in values]
        packed[name] = {"which": which, "values": [json.loads(text) for text in places]}
    return packed


def unpack(packed: Mapping[str, Mapping[str, Sequence[Any]]]) -> list[dict[str, Any]]:
    """The rows of `pack`."""
    columns = [[entry["values"][at] for at in entry["which"]] for entry in packed.values()]
    return [dict(zip(packed, row, strict=True)) for row in zip(*columns, strict=True)]


class Named(list[Any]):
    """Values with names, as Snakemake gives a script its inputs, parameters and wildcards.

    Args:
        values: by name; lists are laid side by side, names with None are left out.
        parameters: None and a list are values as any other.
    """

    def __init__(self, values: Mapping[str, Any], *, parameters: bool = False) -> None:
        kept = {k: v for k, v in values.items() if parameters or v is not None}
        flat = not parameters
        super().__init__(
            one for v in kept.values() for one in (v if flat and isinstance(v, list) else [v])
        )
        self._named = kept

    def items(self) -> Iterable[tuple[str, Any]]:
        return self._named.items()

    def get(self, name: str, default: Any = None) -> Any:
        return self._named.get(name, default)

    def __getitem__(self, key: Any) -> Any:
        return self._named[key] if isinstance(key, str) else super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._named:
            raise AttributeError(name)
        return self._named[name]


class Shard(NamedTuple):
    """A job of one shard, as Snakemake would give it to a script."""

    rule: str
    wildcards: Named
    input: Named
    output: Named
    params: Named
    config: Mapping[str, Any]


def read_shards(job: Any) -> list[Shard]:
    """The jobs that one block stands for; its ``params.shards`` are packed by part of a job."""
    parts = {name: unpack(packed) for name, packed in job.params.shards.items()}
    return [
        Shard(
            rule_of_block(job.rule),
            Named(wildcards),
            Named(inputs),
            Named(outputs),
            Named(params, parameters=True),
            job.config,
        )
        for wildcards, inputs, outputs, params in zip(
            *(parts[name] for name in ("wildcards", "input", "output", "params")), strict=True
        )
    ]


def run_shards(run: Callable[[Any], None]) -> None:
    """Call ``run`` with the job of the rule whose script is running, as `joblog.start_job` does.

    Of a block's rule, with one such job for each shard that is not finished. A shard that fails
    leaves its traceback in the log, and the others are made before the job ends with an error.
    Lists among the outputs are written when all shards are there.

    Raises:
        RuntimeError: the script was not started by Snakemake, or shards of the block failed.
        DamagedFile: as `joblog.start_job`.
    """
    job = joblog.start_log()
    if "shards" not in dict(job.params.items()):
        run(joblog.start_job())
        return
    from kvguard.provenance import describe_job

    shards = read_shards(job)
    listed = any(map(is_shard_list, job.output))
    checked: set[str] = set()
    failed = []
    for number, shard in enumerate(shards, 1):
        name = f"{' '.join(shard.wildcards)} ({number} of {len(shards)})"
        try:
            check_inputs(path for path in shard.input if path not in checked)
            checked.update(shard.input)
            origin = describe_job(shard)
            if is_finished(shard.output, origin) if listed else take_back(shard.output, origin):
                logger.info("%s was finished before", name)
                continue
            logger.info("%s", name)
            if listed:
                forget_manifest(Path(job.output[0]))
            record_origin(origin)
            run(shard)
            if not listed:
                keep(shard.output)
        except Exception:
            logger.exception("%s failed", name)
            failed.append(name)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(shards)} shards failed: {'; '.join(failed)}")
    if listed:
        record_origin(describe_job(job))
        for name, target in job.output.items():
            write_shard_list([shard.output[name] for shard in shards], Path(target))


def is_finished(paths: Iterable[str | Path], origin: Mapping[str, Any]) -> bool:
    """Whether all files of a shard are there, as they were written, by what would make them now.

    Args:
        paths: all files of the shard.
        origin: `kvguard.provenance.describe_job` of the job that would make them.
    """
    return all(_is_valid(Path(path), origin) for path in paths)


def kept_path(path: str | Path) -> Path:
    """The second name of a finished shard's file."""
    path = Path(path)
    return path.with_name(f".{path.name}{KEPT}")


def keep(paths: Iterable[str | Path]) -> None:
    """Give the files of a shard that is finished their second names."""
    for path in map(Path, paths):
        _link(digest_path(path), digest_path(kept_path(path)))
        _link(path, kept_path(path))


def take_back(paths: Sequence[str | Path], origin: Mapping[str, Any]) -> bool:
    """Give a shard's files their first names again, if all were kept and are still valid.

    Args:
        paths: all files of the shard.
        origin: `kvguard.provenance.describe_job` of the job that would make them.

    Returns:
        False where one is missing, damaged, or was made by something else; nothing is changed then.
    """
    if not is_finished(map(kept_path, paths), origin):
        return False
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        _link(kept_path(path), path)
        _link(digest_path(kept_path(path)), digest_path(path))
        os.utime(path)  # finished by this run, for `kvguard status`
    return True


def _is_valid(path: Path, origin: Mapping[str, Any]) -> bool:
    if not path.is_file() or not digest_path(path).is_file():
        return False
    try:
        check_file(path)
        made = origin_of(path)
    except DamagedFile:
        return False
    due = json.loads(json.dumps(dict(origin)))
    return all(made.get(name) == due.get(name) for name in _MADE_BY)


def _link(source: Path, target: Path) -> None:
    """One more name for a file, in place of another file; a copy where there are no links."""
    if target.exists() and target.samefile(source):
        return  # renaming one name of a file onto another one would leave both
    temporary = target.with_name(f".{target.name}{PARTIAL}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copy2(source, temporary)
    temporary.replace(target)
