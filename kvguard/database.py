"""One DuckDB file that holds a whole run, with views for the everyday questions.

Tables: prompts, traces, tokens, outcomes, and splits once they are drawn. Views:

- ``condition_summary``: one row per (model, press, ratio): requests, errors, and the share of each
  metric with a Wilson 95 % interval;
- ``failure_kinds``: the same shares of the kinds of failure, one row per kind;
- ``harm``: one row per (task, model, press, ratio): what was right uncompressed and is wrong now,
  the reverse, and the share of it that nothing in the finished text gives away;
- ``excess``: failures and errors beyond those of the same prompts uncompressed, with paired
  intervals;
- ``compression_check``: what the press was asked to remove and what really left the cache;
- ``onsets``: where each kind of failure begins;
- ``errors``: requests that failed to run;
- ``pairs``: each answer beside the uncompressed one, for questions of one's own.

Any DuckDB client reads the file; nothing in it needs this package.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb
import polars as pl

from kvguard import schema
from kvguard.config import BASELINE, BASELINE_RATIO
from kvguard.files import DamagedFile, check_file

METRICS = {
    "accuracy": '"right"',
    "answered": "answered",
    "harmed": "harmed",
    "rescued": "rescued",
    "silent_harm": "silent_harm",
    "agreement": "agrees",
    "disagreement": "NOT agrees",
    "cfr": "catastrophe",
    "looping": "looping",
    "non_termination": "non_termination",
    "amnesia": "amnesia",
    "divergence": "divergence",
}
"""Shares in ``condition_summary``: name -> which outcome counts. Requests where it is null do not
count at all. Accuracy, answered and agreement: higher is better; the others: lower."""

FAILURE_KINDS = {
    "looping": "looping",
    "non_termination": "non_termination",
    "amnesia": "amnesia",
    "divergence": "divergence",
    "harm": "harmed",
    "silent_harm": "silent_harm",
    "wrong_answer": 'NOT "right"',
    "disagreement": "NOT agrees",
    "catastrophe": "catastrophe",
}
"""Kinds in ``failure_kinds``; they overlap: a loop rarely ends."""

EXCESSES = {
    "cfr": ("catastrophe", "baseline_catastrophe"),
    "error": ('NOT "right"', "NOT baseline_right"),
}
"""Excesses in ``excess``: name -> what counts with compression and without."""

VIEWS = (
    "condition_summary",
    "failure_kinds",
    "harm",
    "excess",
    "compression_check",
    "onsets",
    "errors",
    "pairs",
)

_CONDITION = "model, press, ratio"

_MACROS = """
-- Wilson (1927): the score interval of k successes in n trials; null without trials. The constant
-- is the square of the normal quantile at 97.5 %.
CREATE MACRO wilson_centre(k, n) AS
    (k + 3.841458820694124 / 2) / (n + 3.841458820694124);
CREATE MACRO wilson_reach(k, n) AS
    sqrt(3.841458820694124 * (k * (n - k) / n + 3.841458820694124 / 4)) / (n + 3.841458820694124);
CREATE MACRO wilson_low(k, n) AS
    CASE WHEN n > 0 THEN greatest(0, wilson_centre(k, n) - wilson_reach(k, n)) END;
CREATE MACRO wilson_high(k, n) AS
    CASE WHEN n > 0 THEN least(1, wilson_centre(k, n) + wilson_reach(k, n)) END;
-- Newcombe (1998), Statistics in Medicine 17, 2635-2650, method 10: the difference of two paired
-- shares, (a + b) / n - (a + c) / n, from counts of both, only first, only second, neither.
CREATE MACRO paired_phi(a, b, c, d) AS
    CASE WHEN (a + b) * (c + d) * (a + c) * (b + d) = 0 THEN 0 ELSE
        CASE WHEN a * d < b * c THEN a * d - b * c
             ELSE greatest(0, a * d - b * c - (a + b + c + d) / 2) END
        / sqrt((a + b)::DOUBLE * (c + d) * (a + c) * (b + d)) END;
CREATE MACRO paired_root(x, y, phi) AS sqrt(greatest(0, x * x - 2 * phi * x * y + y * y));
CREATE MACRO paired_low(a, b, c, d) AS
    CASE WHEN a + b + c + d > 0 THEN greatest(-1, (b - c) / (a + b + c + d) - paired_root(
        (a + b) / (a + b + c + d) - wilson_low(a + b, a + b + c + d),
        wilson_high(a + c, a + b + c + d) - (a + c) / (a + b + c + d),
        paired_phi(a, b, c, d))) END;
CREATE MACRO paired_high(a, b, c, d) AS
    CASE WHEN a + b + c + d > 0 THEN least(1, (b - c) / (a + b + c + d) + paired_root(
        wilson_high(a + b, a + b + c + d) - (a + b) / (a + b + c + d),
        (a + c) / (a + b + c + d) - wilson_low(a + c, a + b + c + d),
        paired_phi(a, b, c, d))) END;
"""


def build_database(
    target: str | Path,
    prompts: str | Path,
    traces: Sequence[str | Path],
    tokens: Sequence[str | Path],
    outcomes: str | Path,
    splits: str | Path | None = None,
) -> None:
    """Load a run's Parquet files into one DuckDB file, all or nothing.

    Rows are told apart by their key columns; the names of files and folders say nothing.

    Args:
        target: the file to write; an older one is replaced.
        prompts: `schema.PROMPTS`.
        traces: shards of `schema.TRACES`.
        tokens: shards of `schema.TOKENS`.
        outcomes: `schema.OUTCOMES`.
        splits: `schema.SPLITS`; None leaves the table out.

    Raises:
        schema.SchemaError: a file lacks a column or has another type; names the table and column.
        ValueError: a key occurs twice, or tables do not belong together; names the table.
    """
    sources: dict[str, tuple[Sequence[str | Path], Mapping[str, pl.DataType], Sequence[str]]] = {
        "prompts": ([prompts], schema.PROMPTS, ["prompt_id"]),
        "traces": (traces, schema.TRACES, schema.TRACE_KEYS),
        "tokens": (tokens, schema.TOKENS, schema.TOKEN_KEYS),
        "outcomes": ([outcomes], schema.OUTCOMES, schema.TRACE_KEYS),
    }
    if splits is not None:
        sources["splits"] = ([splits], schema.SPLITS, ["prompt_id"])
    with schema.atomic_path(target) as temporary:
        temporary.unlink()  # DuckDB wants to make the file itself
        try:
            with duckdb.connect(temporary) as connection:
                for table, (paths, columns, keys) in sources.items():
                    _load(connection, table, paths, columns, keys)
                _check_references(connection)
                connection.execute(_MACROS)
                for view, query in _view_queries().items():
                    connection.execute(f"CREATE VIEW {view} AS {query}")
        finally:
            temporary.with_name(f"{temporary.name}.wal").unlink(missing_ok=True)


def read_view(database: str | Path, name: str) -> pl.DataFrame:
    """Read one table or view of a database, e.g. one of `VIEWS`.

    Raises:
        FileNotFoundError: names the path and the command that would make it.
        DatabaseLocked: another process writes to the file; names it.
        DamagedFile: the file is no whole DuckDB database; says how to heal it.
        ValueError: no such table or view; lists those there are.
    """
    database = Path(database)
    if not database.is_file():
        raise FileNotFoundError(f"no database at {database}; `snakemake {database}` makes it")
    with _reading(database) as connection:
        known = _relations(connection)
        if name not in known:
            raise ValueError(f"no table or view {name!r} in {database}; known: {', '.join(known)}")
        frame: pl.DataFrame = connection.table(name).pl()
        return frame


def check_database(database: str | Path) -> dict[str, int]:
    """Read every table and view of a database to its end.

    Returns:
        The number of rows of each.

    Raises:
        DatabaseLocked: another process writes to the file; names it.
        DamagedFile: the file cannot be read, or lacks a table or view.
    """
    database = Path(database)
    with _reading(database) as connection:
        known = _relations(connection)
        missing = [name for name in ("prompts", "traces", "tokens", *VIEWS) if name not in known]
        if missing:
            raise DamagedFile(database, f"it has no {', '.join(missing)}")
        return {
            name: connection.table(name).aggregate("count(COLUMNS(*))").limit(1).fetchall()[0][0]
            for name in known
        }


class DatabaseLocked(OSError):
    """Another process has the database open for writing."""


@contextmanager
def _reading(database: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A read-only connection whose errors name the file and how to heal it."""
    try:
        check_file(database)
        with duckdb.connect(database, read_only=True) as connection:
            yield connection
    except duckdb.IOException as error:
        if "lock" in str(error):
            raise DatabaseLocked(
                f"{database} is open for writing in another process; close it there: {error}"
            ) from None
        raise DamagedFile(database, error) from None
    except (duckdb.Error, UnicodeDecodeError) as error:
        raise DamagedFile(database, error) from None


def _relations(connection: duckdb.DuckDBPyConnection) -> list[str]:
    rows = connection.execute("SELECT table_name FROM information_schema.tables").fetchall()
    return sorted(row[0] for row in rows)


def condition_summary(database: str | Path) -> pl.DataFrame:
    """One row per (model, press, ratio): requests, errors, every share of `METRICS`, its interval.

    A share named m stands beside m_low and m_high, its Wilson 95 % interval; null where undefined.
    """
    return read_view(database, "condition_summary")


def analyze(database: str | Path) -> pl.DataFrame:
    """The table that answers the everyday questions: one row per (model, press, ratio).

    Accuracy, agreement with the uncompressed answer (higher is better), CFR, excess CFR and excess
    error (lower is better), each with its 95 % interval, and the share of the prompt's cache bytes
    that compression really removed.
    """
    keys = ["model", "press", "ratio"]
    shares = ("accuracy", "agreement", "cfr")
    excesses = [f"excess_{name}" for name in EXCESSES]
    columns = [f"{name}{end}" for name in (*shares, *excesses) for end in ("", "_low", "_high")]
    return (
        condition_summary(database)
        .join(read_view(database, "excess"), on=keys, how="left", maintain_order="left")
        .join(read_view(database, "compression_check"), on=keys, how="left", maintain_order="left")
        .select(*keys, "requests", "errors", *columns, "removed_share", "mean_generated_tokens")
    )


def _load(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    paths: Sequence[str | Path],
    columns: Mapping[str, pl.DataType],
    keys: Sequence[str],
) -> None:
    rows = connection.read_parquet(
        [str(path) for path in paths], hive_partitioning=False, union_by_name=True
    )
    schema.check(rows.limit(0).pl(), columns, table)
    rows.select(*(duckdb.ColumnExpression(name) for name in columns)).create(table)
    key = ", ".join(keys)
    twice = connection.execute(
        f"SELECT {key} FROM {table} GROUP BY {key} HAVING count(*) > 1 LIMIT 1"
    ).fetchone()
    if twice is not None:
        raise ValueError(f"table {table!r}: ({key}) = {twice} occurs more than once")


def _check_references(connection: duckdb.DuckDBPyConnection) -> None:
    keys = ", ".join(schema.TRACE_KEYS)
    for table, other, key in (
        ("traces", "prompts", "prompt_id"),
        ("tokens", "traces", keys),
        ("outcomes", "traces", keys),
        ("traces", "outcomes", keys),
    ):
        stranger = connection.execute(
            f"SELECT DISTINCT {key} FROM {table} ANTI JOIN {other} USING ({key}) LIMIT 1"
        ).fetchone()
        if stranger is not None:
            raise ValueError(f"table {table!r}: ({key}) = {stranger} is not in table {other!r}")


def _view_queries() -> dict[str, str]:
    """The SELECT of each view, in an order in which each may read those before it."""
    summary = ",\n".join(_share(name, outcome) for name, outcome in METRICS.items())
    kinds = "\nUNION ALL BY NAME ".join(
        f"SELECT {_CONDITION}, '{kind}' AS kind, "
        f"count(*) FILTER (WHERE {failed}) AS failed, count({failed}) AS requests, "
        f"{_share('share', failed)} FROM outcomes GROUP BY {_CONDITION}"
        for kind, failed in FAILURE_KINDS.items()
    )
    return {
        "pairs": f"""
            SELECT o.*, t.generated_tokens, b.generated_tokens AS baseline_generated_tokens,
                b.text AS baseline_text, t.text,
                u.catastrophe AS baseline_catastrophe,
                u.answer AS baseline_answer, u.looping AS baseline_looping,
                u.non_termination AS baseline_non_termination
            FROM outcomes o
            JOIN traces t USING (model, press, ratio, prompt_id)
            LEFT JOIN outcomes u ON u.model = o.model AND u.prompt_id = o.prompt_id
                AND u.press = '{BASELINE}' AND u.ratio = '{BASELINE_RATIO}'
            LEFT JOIN traces b ON b.model = o.model AND b.prompt_id = o.prompt_id
                AND b.press = '{BASELINE}' AND b.ratio = '{BASELINE_RATIO}'
            """,
        "condition_summary": f"""
            SELECT {_CONDITION},
                count(*) FILTER (WHERE status = 'ok') AS requests,
                count(*) FILTER (WHERE status <> 'ok') AS errors,
                {summary},
                avg(generated_tokens) FILTER (WHERE status = 'ok') AS mean_generated_tokens
            FROM outcomes JOIN traces USING (model, press, ratio, prompt_id)
            GROUP BY {_CONDITION} ORDER BY {_order()}
            """,
        "failure_kinds": f"SELECT * FROM ({kinds}) ORDER BY {_order()}, kind",
        "harm": f"""
            SELECT task, {_CONDITION}, count(harmed) AS requests,
                CASE WHEN count(baseline_right) > 0
                    THEN count(*) FILTER (WHERE baseline_right) END AS baseline_right,
                count(*) FILTER (WHERE harmed) AS harmed_requests,
                count(*) FILTER (WHERE rescued) AS rescued_requests,
                {", ".join(_share(name, name) for name in ("harmed", "rescued", "silent_harm"))},
                {_excess("error", *EXCESSES["error"])}
            FROM outcomes WHERE press <> '{BASELINE}' AND harmed IS NOT NULL
            GROUP BY task, {_CONDITION} ORDER BY task, {_order()}
            """,
        "excess": f"""
            SELECT {_CONDITION}, count(*) AS prompts,
                {", ".join(_excess(name, *failed) for name, failed in EXCESSES.items())}
            FROM pairs
            WHERE catastrophe IS NOT NULL AND baseline_catastrophe IS NOT NULL
                AND press <> '{BASELINE}'
            GROUP BY {_CONDITION} ORDER BY {_order()}
            """,
        "compression_check": f"""
            SELECT {_CONDITION}, ratio::DOUBLE AS nominal_share, count(*) AS requests,
                sum(cache_bytes_before)::BIGINT AS cache_bytes_before,
                sum(cache_bytes_after)::BIGINT AS cache_bytes_after,
                1 - sum(cache_bytes_after) / nullif(sum(cache_bytes_before), 0) AS removed_share,
                min(1 - cache_bytes_after / nullif(cache_bytes_before, 0)) AS removed_share_min,
                max(1 - cache_bytes_after / nullif(cache_bytes_before, 0)) AS removed_share_max,
                avg(kv_kept_bytes_mean) AS kv_kept_bytes_mean,
                avg(kv_masked_bytes_mean) AS kv_masked_bytes_mean,
                avg(kv_padding_bytes_mean) AS kv_padding_bytes_mean,
                max(kv_allocated_bytes_peak) AS kv_allocated_bytes_peak
            FROM traces WHERE status = 'ok'
            GROUP BY {_CONDITION} ORDER BY {_order()}
            """,
        "onsets": f"""
            SELECT {_CONDITION}, kind, count(*) AS failed,
                quantile_cont(onset, 0.25) AS onset_quarter, median(onset) AS onset_median,
                quantile_cont(onset, 0.75) AS onset_three_quarters
            FROM (UNPIVOT (
                SELECT {_CONDITION}, looping_onset AS looping,
                    non_termination_onset AS non_termination, amnesia_onset AS amnesia,
                    divergence_onset AS divergence, first_rejected AS rejected_token
                FROM outcomes
            ) ON looping, non_termination, amnesia, divergence, rejected_token
            INTO NAME kind VALUE onset)
            GROUP BY {_CONDITION}, kind ORDER BY {_order()}, kind
            """,
        "errors": f"""
            SELECT {_CONDITION}, prompt_id, shard, error
            FROM traces WHERE status <> 'ok' ORDER BY {_order()}, shard, prompt_id
            """,
    }


def _order() -> str:
    return f"model, press <> '{BASELINE}', press, ratio"


def _share(name: str, outcome: str) -> str:
    """A share of the requests where ``outcome`` is known, with its Wilson interval."""
    successes, trials = f"count(*) FILTER (WHERE {outcome})", f"count({outcome})"
    return (
        f"{successes} / nullif({trials}, 0) AS {name}, "
        f"wilson_low({successes}, {trials}) AS {name}_low, "
        f"wilson_high({successes}, {trials}) AS {name}_high"
    )


def _excess(name: str, compressed: str, uncompressed: str) -> str:
    """A share of prompts under compression minus without, with its paired interval."""
    both, only_compressed, only_uncompressed, neither = (
        f"count(*) FILTER (WHERE {first}({compressed}) AND {second}({uncompressed}))"
        for first, second in (("", ""), ("", "NOT "), ("NOT ", ""), ("NOT ", "NOT "))
    )
    counts = f"{both}, {only_compressed}, {only_uncompressed}, {neither}"
    return (
        f"{both} AS {name}_both, {only_compressed} AS {name}_only_compressed, "
        f"{only_uncompressed} AS {name}_only_uncompressed, {neither} AS {name}_neither, "
        f"({only_compressed} - {only_uncompressed}) / "
        f"nullif({both} + {only_compressed} + {only_uncompressed} + {neither}, 0) "
        f"AS excess_{name}, "
        f"paired_low({counts}) AS excess_{name}_low, paired_high({counts}) AS excess_{name}_high"
    )
