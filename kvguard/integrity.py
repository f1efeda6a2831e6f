"""Integrity of what a results folder holds, checked against the configuration that made it."""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from kvguard import schema
from kvguard.config import BASELINE, Config
from kvguard.database import DatabaseLocked, check_database
from kvguard.files import (
    MANIFEST,
    PARTIAL,
    RECORD,
    DamagedFile,
    check_file,
    check_model,
    content_digest,
    digest_path,
    file_sha256,
    origin_of,
)
from kvguard.imported_models import check_imported
from kvguard.shard_lists import changed_lists
from kvguard.splits import calibration_parts, prompts_of

NOMINAL_RATIO = frozenset({"SimLayerKVPress", "ThinKPress"})
"""Presses whose ratio is not the share of entries that leave the cache."""

RATIO_TOLERANCE = 0.02
"""Largest difference between the asked and the measured share of removed bytes of an answer.

Presses round to whole entries: in a prompt of 100 tokens one entry is 0.01."""

LOGPROB_TOLERANCE_NATS = 1e-3
"""Rounding that a float32 log-probability may show."""

CLOCK_SLACK_SECONDS = 60.0
"""How far ahead of this machine's clock a file's time may be: clocks of a cluster differ."""

LISTED = 5
"""Problems of one kind in one file that are spelt out; the rest are counted."""


class FutureTime(ValueError):
    """A file is as it was written, and its time lies in the future."""


class Check(NamedTuple):
    """One check: how many items it examined, and what is wrong with them."""

    name: str
    examined: int
    problems: list[str]


class Shard(NamedTuple):
    """One (model, press, ratio, shard) of the configuration, and the rows that it should have."""

    model: str
    press: str
    ratio: str
    shard: int
    rows: int

    def path(self, results: Path, table: str) -> Path:
        """Where the shard's traces or tokens are."""
        return results / table / self.model / self.press / self.ratio / f"{self.shard:02d}.parquet"


Problems = Iterator[str | None]
"""What a check yields: None for a thing that is right, a sentence for one that is not."""


def verify_results(config: Config, results: str | Path) -> list[Check]:
    """Check everything that a results folder should hold.

    Args:
        config: the configuration that the results were made with.
        results: the folder.

    Returns:
        One entry per check, in a fixed order; a missing file is a problem of the check that reads
        it, never an exception, and so is one that cannot be read.
    """
    checks = []
    for name, check in CHECKS.items():
        found: list[str | None] = []
        try:
            found.extend(check(config, Path(results)))
        except (
            OSError,
            ValueError,
            pl.exceptions.PolarsError,
            pl.exceptions.PanicException,  # what Polars raises for some flipped bits
        ) as error:
            found.append(f"cannot go on after {len(found)}: {error}")
        checks.append(Check(name, len(found), [problem for problem in found if problem]))
    return checks


def expected_shards(config: Config) -> list[Shard]:
    """Every shard that the configuration asks for."""
    return [
        Shard(model.name, press, ratio, shard, len(places))
        for model in config.models
        for press, ratio in config.conditions
        for shard, places in enumerate(config.shards)
    ]


def _check_schemas(config: Config, results: Path) -> Problems:
    """Every table has the columns and types of its schema."""
    shards = expected_shards(config)
    tables = [(shard.path(results, "traces"), schema.TRACES) for shard in shards]
    tables += [(shard.path(results, "tokens"), schema.TOKENS) for shard in shards]
    left_out = TRAINED_TABLES if config.imports_models else frozenset()
    tables += [
        (results / name, declared)
        for name, declared in SINGLE_TABLES.items()
        if name not in left_out
    ]
    tables += [(path, schema.RUNS) for path in sorted((results / "live").rglob("*.parquet"))]
    certifying = sorted((results / "certifying").rglob("*.parquet"))
    tables += [(path, schema.CERTIFYING_RUNS) for path in certifying]
    for path, declared in tables:
        name = str(path.relative_to(results))
        if not path.is_file():
            yield f"{name}: no such file"
            continue
        try:
            schema.check(_head(path), declared, name)
        except schema.SchemaError as error:
            yield str(error)
        except (OSError, pl.exceptions.PolarsError) as error:
            yield f"{name}: cannot be read: {error}"
        else:
            yield None


def _check_rows(config: Config, results: Path) -> Problems:
    """Row counts follow from the configuration and from the traces."""
    generated = 0
    for shard in expected_shards(config):
        traces, tokens = (shard.path(results, name) for name in ("traces", "tokens"))
        if not traces.is_file() or not tokens.is_file():
            continue
        trace_rows, token_rows = _height(traces), _height(tokens)
        promised = int(_columns(traces, "generated_tokens").fill_null(0).sum().item())
        generated += token_rows
        yield _unless(trace_rows == shard.rows, traces, results, trace_rows, shard.rows)
        yield _unless(token_rows == promised, tokens, results, token_rows, promised)
    traces_expected = sum(shard.rows for shard in expected_shards(config))
    expected = {
        "prompts/prompts.parquet": config.num_prompts,
        "splits.parquet": config.num_prompts,
        "outcomes.parquet": traces_expected,
        "labels.parquet": generated,
        "features.parquet": generated,
    }
    for name, rows in expected.items():
        path = results / name
        if path.is_file():
            yield _unless(_height(path) == rows, path, results, _height(path), rows)


def _check_keys(config: Config, results: Path) -> Problems:
    """Keys agree with the file's place, no row is there twice, and every prompt was answered."""
    prompts = results / "prompts/prompts.parquet"
    known = set(_columns(prompts, "prompt_id")["prompt_id"]) if prompts.is_file() else set()
    answered: dict[tuple[str, str, str], set[str]] = {}
    for shard in expected_shards(config):
        place = {"model": shard.model, "press": shard.press, "ratio": shard.ratio}
        for table, keys in (("traces", schema.TRACE_KEYS), ("tokens", schema.TOKEN_KEYS)):
            path = shard.path(results, table)
            if not path.is_file():
                continue
            rows, name = _columns(path, *keys), path.relative_to(results)
            wrong = rows.filter(pl.any_horizontal(pl.col(key) != place[key] for key in place))
            yield f"{name}: {wrong.height} rows belong elsewhere" if wrong.height else None
            double = rows.height - rows.n_unique()
            yield f"{name}: {double} rows are there twice" if double else None
            if table == "traces":
                answered.setdefault(tuple(place.values()), set()).update(rows["prompt_id"])  # type: ignore[arg-type]
    for condition, prompt_ids in answered.items():
        missing, unknown = known - prompt_ids, prompt_ids - known
        yield (
            f"{'/'.join(condition)}: {len(missing)} prompts have no row, {len(unknown)} are unknown"
            if known and (missing or unknown)
            else None
        )


def _check_errors(config: Config, results: Path) -> Problems:
    """Prompts that failed are rows with a reason, and not all of a shard's prompts failed."""
    for shard in expected_shards(config):
        path = shard.path(results, "traces")
        if not path.is_file():
            continue
        rows = _columns(path, "status", "error")
        failed = rows.filter(pl.col("status") == "error")
        silent = failed.filter(pl.col("error").is_null()).height
        if failed.height == rows.height:
            yield f"{path.relative_to(results)}: every prompt failed: {failed['error'][0]}"
        else:
            yield (
                f"{path.relative_to(results)}: {silent} failures give no reason" if silent else None
            )


def _check_signals(config: Config, results: Path) -> Problems:
    """Stored signals are finite, and null only where they are undefined."""
    names = [name for name, kind in (schema.SIGNALS | schema.AUDIT).items() if kind.is_float()]
    for shard in expected_shards(config):
        path = shard.path(results, "tokens")
        if not path.is_file():
            continue
        rows = _columns(path, "position", *schema.SIGNALS, *schema.AUDIT)
        defined = {name: pl.lit(True) for name in (*schema.SIGNALS, *schema.AUDIT)}
        defined["entropy_delta"] = pl.col("position") > 0
        if not config.generation.audit:
            defined |= {name: pl.lit(False) for name in schema.AUDIT}
        counts = rows.select(
            *((pl.col(name).is_not_null() & ~pl.col(name).is_finite()).sum() for name in names),
            *(
                (pl.col(name).is_null() & known).sum().alias(f"no {name}")
                for name, known in defined.items()
            ),
        )
        wrong = [f"{name}: {count}" for name, count in counts.row(0, named=True).items() if count]
        shown = ", ".join(wrong[:LISTED]) + (" ..." if len(wrong) > LISTED else "")
        yield (
            f"{path.relative_to(results)}: NaN, Inf or missing values in {shown}" if wrong else None
        )


def _check_probabilities(config: Config, results: Path) -> Problems:
    """Signals agree with each other, as those of one probability distribution must."""
    slack = LOGPROB_TOLERANCE_NATS
    rules = {
        "entropy >= 0": pl.col("entropy") >= -slack,
        "0 < top1_probability <= top5_probability <= 1": (pl.col("top1_probability") > 0)
        & (pl.col("top1_probability") <= pl.col("top5_probability") + slack)
        & (pl.col("top5_probability") <= 1 + slack),
        "top1_probability = exp(top_logprob_00)": (
            pl.col("top1_probability") - pl.col("top_logprob_00").exp()
        ).abs()
        <= slack,
        "log-probabilities in falling order": pl.all_horizontal(
            pl.col(f"top_logprob_{rank:02d}") >= pl.col(f"top_logprob_{rank + 1:02d}") - slack
            for rank in range(schema.TOP_LOGPROBS - 1)
        ),
        "llr = chosen_logprob - audit_logprob": (
            pl.col("llr") - (pl.col("chosen_logprob") - pl.col("audit_logprob"))
        ).abs()
        <= slack * (1 + pl.col("audit_logprob").abs()),
    }
    for shard in expected_shards(config):
        path = shard.path(results, "tokens")
        if not path.is_file():
            continue
        counts = pl.scan_parquet(path, hive_partitioning=False).select(
            (~rule).sum().alias(name) for name, rule in rules.items()
        )
        broken = {name: n for name, n in counts.collect().row(0, named=True).items() if n}
        yield f"{path.relative_to(results)}: tokens that break {broken}" if broken else None


def _check_compression(config: Config, results: Path) -> Problems:
    """The cache really shrank by the asked ratio, measured in bytes."""
    for shard in expected_shards(config):
        path = shard.path(results, "traces")
        if not path.is_file():
            continue
        asked = float(shard.ratio)
        if shard.press != BASELINE:
            press = config.press(shard.press)
            if press.press_class in NOMINAL_RATIO:
                continue
            asked = 0.0 if press.phase == "decode" else asked
        rows = _columns(path, "status", "prompt_id", "cache_bytes_before", "cache_bytes_after")
        removed = 1 - pl.col("cache_bytes_after") / pl.col("cache_bytes_before")
        rows = rows.filter(pl.col("status") == "ok").with_columns(removed=removed)
        wrong = rows.filter(~((pl.col("removed") - asked).abs() <= RATIO_TOLERANCE))
        measured = ", ".join(f"{share:.3f}" for share in wrong["removed"].head(LISTED))
        yield (
            f"{path.relative_to(results)}: {wrong.height} of {rows.height} prompts had not "
            f"{asked:.3f} of their cache's bytes removed but {measured}"
            if wrong.height
            else None
        )


def _check_live(config: Config, results: Path) -> Problems:
    """Every policy ran on every test prompt, every price on every prompt that certifies it."""
    path = results / "splits.parquet"
    if not path.is_file():
        return
    splits = _columns(path, *schema.SPLITS)
    test = "test split", set(prompts_of(splits, "test"))
    certifying = "certifying part", set(calibration_parts(splits, config.probability_share)[1])
    for model in config.models:
        for press, ratio in config.live_conditions:
            place = f"{model.name}/{press}/{ratio}"
            wanted = {f"live/{place}/{one}": test for one in config.live_policies(press, ratio)}
            for price in config.live.prices_tested:
                wanted[f"certifying/{place}/{price:g}"] = certifying
            for folder, (kind, prompts) in wanted.items():
                files = sorted((results / folder).glob("*.parquet"))
                ran = set().union(*(_columns(file, "prompt_id")["prompt_id"] for file in files))
                wrong = len(prompts ^ ran)
                problem = f"{folder}: {wrong} prompts are missing or not of the {kind}"
                yield problem if wrong else None


def _check_hazards(config: Config, results: Path) -> Problems:
    """Predicted hazards are probabilities, for every token that has one."""
    path = results / "predictions.parquet"
    if not path.is_file():
        return
    inside = pl.col("hazard").is_between(0, 1) & pl.col("hazard").is_not_nan()
    counts = (
        pl.scan_parquet(path, hive_partitioning=False)
        .group_by("target")
        .agg((~inside.fill_null(False)).sum().alias("wrong"))
        .sort("target")
        .collect()
    )
    for target, wrong in counts.iter_rows():
        yield f"predictions.parquet: {wrong} hazards of {target} outside [0, 1]" if wrong else None


def _check_splits(config: Config, results: Path) -> Problems:
    """Every prompt is in exactly one split, and no split is empty."""
    path = results / "splits.parquet"
    if not path.is_file():
        return
    splits = _columns(path, *schema.SPLITS)
    double = splits.height - splits["prompt_id"].n_unique()
    yield f"splits.parquet: {double} prompts are in two splits" if double else None
    for name in config.splits.names:
        empty = splits.filter(pl.col("split") == name).is_empty()
        yield f"splits.parquet: no prompt in {name}" if empty else None


def _check_models(config: Config, results: Path) -> Problems:
    """Weights and tokenizer files have the hashes that were recorded when they were prepared."""
    for model in config.models:
        folder = results / "checkpoints" / model.name
        if not (folder / RECORD).is_file():
            yield f"{(folder / RECORD).relative_to(results)}: no such file"
        else:
            yield _damage(check_model, folder)


def _check_files(config: Config, results: Path) -> Problems:
    """Written files are as they were written, none is half written, none is of the future."""
    for path in _written_files(results):
        yield _damage(_check_written, path)
    for path in sorted(results.rglob(f".*{PARTIAL}*")):
        yield f"{path.relative_to(results)}: half written by a job that was killed; remove it"


def _check_origins(config: Config, results: Path) -> Problems:
    """Files that one rule wrote were made alike, with this seed, from the files that are there."""
    alike: dict[tuple[str | None, ...], list[tuple[str, dict[str, Any]]]] = {}
    manifest = results / MANIFEST
    counted = json.loads(manifest.read_text()) if manifest.is_file() else None
    for path in _written_files(results):
        name = path.relative_to(results).as_posix()
        if counted is not None and name not in counted:
            continue  # of an earlier configuration
        try:
            origin = origin_of(path)
        except DamagedFile as error:
            yield str(error)
            continue
        if not origin:
            continue  # written by a version that recorded no origin
        others = [
            source
            for source, used in origin["data"].items()
            if used and content_digest(results / source) not in (None, used)
        ]
        yield f"{name}: made from another {', '.join(others[:LISTED])}" if others else None
        if origin["seed"] != config.seed:
            yield f"{name}: made with seed {origin['seed']}, the configuration has {config.seed}"
        of = origin["wildcards"].get
        alike.setdefault((origin["rule"], of("model"), of("figure")), []).append((name, origin))
    yield from changed_lists(results, counted)
    for (rule, *_), files in alike.items():
        for field in ("code", "kvguard", "python", "packages", "device", "dtype"):
            yield _disagreement(f"{rule}: {field}", [(name, made[field]) for name, made in files])


def _disagreement(what: str, values: list[tuple[str, Any]]) -> str | None:
    """Which files differ from most others in one value; None where all agree."""
    counts = Counter(json.dumps(value, sort_keys=True) for _, value in values)
    (usual, _), *rest = counts.most_common()
    if not rest:
        return None
    odd = [(name, value) for name, value in values if json.dumps(value, sort_keys=True) != usual]
    most, (name, value) = json.loads(usual), odd[0]
    if isinstance(most, dict):
        differing = [part for part in most if most[part] != value.get(part)]
        most, value = ({part: one.get(part) for part in differing} for one in (most, value))
    return f"{what}: {len(odd)} of {len(values)} files differ: {name} has {value}, most have {most}"


def _check_database(config: Config, results: Path) -> Problems:
    """The database can be read to its end and holds every row of its source tables."""
    path = results / "kvguard.duckdb"
    if not path.is_file():
        yield f"{path.name}: no such file"
        return
    try:
        rows = check_database(path)
    except (DamagedFile, DatabaseLocked) as error:
        yield str(error)
        return
    expected = dict.fromkeys(("traces", "tokens"), 0)
    for shard in expected_shards(config):
        for name in expected:
            table = shard.path(results, name)
            expected[name] += _height(table) if table.is_file() else 0
    for name, count in expected.items():
        yield (
            None
            if rows[name] == count
            else f"{path.name}: {rows[name]} rows of {name}, the run's tables have {count}"
        )


def _written_files(results: Path) -> list[Path]:
    """Files that have a digest beside them, sorted."""
    records = results.rglob(".*.sha256")
    return sorted(
        path.with_name(path.name.removeprefix(".").removesuffix(".sha256")) for path in records
    )


def _check_written(path: Path) -> None:
    """Raise where a file is not what was written, or its time is wrong."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    check_file(path)
    ahead = path.stat().st_mtime - time.time()
    if ahead > CLOCK_SLACK_SECONDS:
        raise FutureTime(
            f"{path}: its time is {ahead:,.0f} s in the future (a clock went backwards), so that "
            f"Snakemake takes it for newer than what is made from it. Its content is what was "
            f"written: `kvguard verify --discard` keeps it and sets its time back"
        )


def _set_back(path: Path) -> None:
    """Give a file of the future the time of its record; the present where that is ahead too."""
    now = time.time()
    written = min(digest_path(path).stat().st_mtime, now)
    os.utime(path, (now, written))


def _damage(check: Callable[[Path], None], path: Path) -> str | None:
    try:
        check(path)
    except (DamagedFile, FutureTime, OSError) as error:
        return str(error)
    return None


def discard_damaged(config: Config, results: str | Path) -> list[Path]:
    """Remove every file and model folder that is not what was written, so that a run remakes it.

    The manifest goes with them, and where a file is missing: Snakemake remakes a lost file only for
    a job that reads it, and the manifest's job reads every file. A file whose time alone is wrong
    keeps its content.

    Returns:
        What was removed. Files that were never recorded, such as a user's own, are left alone.
    """
    results = Path(results)
    lost = False
    suspects: list[tuple[Path, Callable[[Path], None]]] = [
        (path, _check_written) for path in _written_files(results)
    ]
    suspects += [
        (results / "checkpoints" / model.name, check_model)
        for model in config.models
        if (results / "checkpoints" / model.name / RECORD).is_file()
    ]
    removed = []
    for path, check in suspects:
        try:
            check(path)
        except DamagedFile:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed.append(path)
        except FutureTime:
            _set_back(path)
            continue
        except FileNotFoundError:
            pass
        except PermissionError:
            continue  # what nobody could read is not known to be damaged; `verify` names it
        else:
            continue
        lost = True
        digest_path(path).unlink(missing_ok=True)
    if lost and (results / MANIFEST).is_file():
        (results / MANIFEST).unlink()
        digest_path(results / MANIFEST).unlink(missing_ok=True)
        removed.append(results / MANIFEST)
    for path in results.rglob(f".*{PARTIAL}*"):
        removed.append(path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return removed


def _check_manifest(config: Config, results: Path) -> Problems:
    """Files of the finished run are as they were when it ended."""
    path = results / MANIFEST
    if not path.is_file():
        yield f"{MANIFEST}: no such file; the run has not finished"
        return
    for name, entry in json.loads(path.read_text()).items():
        yield _changed(results / name, entry["sha256"], results)


CHECKS: dict[str, Callable[[Config, Path], Problems]] = {
    "schemas": _check_schemas,
    "row counts": _check_rows,
    "keys": _check_keys,
    "failed prompts": _check_errors,
    "finite signals": _check_signals,
    "consistent signals": _check_probabilities,
    "compression happened": _check_compression,
    "splits": _check_splits,
    "hazards": _check_hazards,
    "live runs": _check_live,
    "imported models": check_imported,
    "model hashes": _check_models,
    "written files": _check_files,
    "origins": _check_origins,
    "database": _check_database,
    "result hashes": _check_manifest,
}

SINGLE_TABLES = {
    "prompts/prompts.parquet": schema.PROMPTS,
    "outcomes.parquet": schema.OUTCOMES,
    "splits.parquet": schema.SPLITS,
    "labels.parquet": schema.LABELS,
    "features.parquet": schema.FEATURES,
    "predictions.parquet": schema.PREDICTIONS,
    "simulation.parquet": schema.RUNS,
}
"""Tables that a run has once."""

TRAINED_TABLES = frozenset(
    ("labels.parquet", "features.parquet", "predictions.parquet", "simulation.parquet")
)
"""Those that a run with another one's models has not."""


def _head(path: Path) -> pl.DataFrame:
    return pl.read_parquet(path, n_rows=0, hive_partitioning=False)


def _height(path: Path) -> int:
    return int(pl.scan_parquet(path, hive_partitioning=False).select(pl.len()).collect().item())


def _columns(path: Path, *names: str) -> pl.DataFrame:
    return pl.read_parquet(path, columns=list(names), hive_partitioning=False)


def _unless(right: bool, path: Path, results: Path, found: int, expected: int) -> str | None:
    return None if right else f"{path.relative_to(results)}: {found} rows, expected {expected}"


def _changed(path: Path, sha256: str, results: Path) -> str | None:
    if not path.is_file():
        return f"{path.relative_to(results)}: no such file"
    if file_sha256(path) != sha256:
        return f"{path.relative_to(results)}: its content changed since the hash was recorded"
    return None
