"""The answers that `signal_study` analyses: tokens of compressed requests, as arrays."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard import config, schema
from kvguard.answer_signals import Decode, Encode, answer_signals, entropy_levels, mark_tokens
from kvguard.harm import at_risk
from kvguard.probe_scale import PROBE_COLUMNS, ProbeScale, fit_probe_scale
from kvguard.rows import Rows, load_rows
from kvguard.splits import Table, hash_order

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


class Answers(NamedTuple):
    """Compressed requests, token by token.

    Attributes:
        rows: their tokens, sorted by `schema.TOKEN_KEYS`; the labels of ``harm`` in ``keys`` are
            those of silent harm.
        table: one row a request, in the order of ``rows``: `schema.TRACE_KEYS`, ``task``.
        lengths: (requests,) tokens.
        silent: (requests,) silently harmed.
        ranked: (requests,) enters fits and rankings: right uncompressed, and silently harmed or
            right. The others are scored, too.
        marked: what `answer_signals` needs, one row a token.
        llr: (tokens,) log-likelihood ratio of compressed over uncompressed; NaN: not audited.
        baseline: tokens of uncompressed answers: ``prompt_id`` and what `entropy_levels` needs.
    """

    rows: Rows
    table: pl.DataFrame
    lengths: Ints
    silent: Bools
    ranked: Bools
    marked: pl.DataFrame
    llr: Floats
    baseline: pl.DataFrame

    @property
    def prompts(self) -> NDArray[np.str_]:
        """(requests,) prompt of each."""
        return self.table["prompt_id"].to_numpy().astype(np.str_)

    @property
    def presses(self) -> NDArray[np.str_]:
        """(requests,) press of each."""
        return self.table["press"].to_numpy().astype(np.str_)

    @property
    def owner(self) -> Ints:
        """(tokens,) request of each token."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def first(self) -> Ints:
        """(requests,) place of each one's first token."""
        return np.cumsum(self.lengths) - self.lengths

    def column(self, name: str) -> NDArray[np.float32]:
        """(tokens,) one feature."""
        return self.rows.features[:, schema.FEATURE_NAMES.index(name)]

    def scale(self, prompts: Sequence[str]) -> ProbeScale:
        """Every press's scale from the probes of these prompts; no outcome is read."""
        chosen = self.table["prompt_id"].is_in(list(prompts)).to_numpy()
        probes = self.rows.features[self.first[chosen]][:, PROBE_COLUMNS]
        return fit_probe_scale(probes, self.presses[chosen])

    def signals(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """`answer_signals` of every token, with levels from these prompts."""
        known = self.baseline.filter(pl.col("prompt_id").is_in(list(prompts)))
        return answer_signals(self.marked, entropy_levels(known))


def load_answers(
    features: Table,
    labels: Table,
    tokens: pl.DataFrame,
    outcomes: pl.DataFrame,
    splits: pl.DataFrame,
    questions: Mapping[str, str] | None = None,
    decode: Decode | None = None,
    encode: Encode | None = None,
) -> Answers:
    """Read one run.

    Args:
        features: `schema.FEATURES`, a frame or its file.
        labels: `schema.LABELS`.
        tokens: `schema.TOKENS` of all traces; ids and ratios are read.
        outcomes: `schema.OUTCOMES`.
        splits: `schema.SPLITS`; prompts outside are left out.
        questions: by prompt id; None: no token counts as copied.
        decode, encode: of the model's tokenizer; None: no token counts as a line break or copied.

    Raises:
        ValueError: no compressed request was judged.
    """
    whole = load_rows(features, labels, splits, splits["prompt_id"].to_list())
    compressed = whole.compressed()
    judged = outcomes.with_columns(risk=at_risk(outcomes)).select(
        *schema.TRACE_KEYS,
        silent="silent_harm",
        used=pl.col("risk") & (pl.col("silent_harm") | ~pl.col("harmed")),
    )
    keys = whole.keys.join(judged, on=schema.TRACE_KEYS, how="left", maintain_order="left")
    keys = keys.filter(compressed)
    ranked = pl.col("used").fill_null(False)
    if not keys.select(ranked.any()).item():
        raise ValueError("no compressed request was right uncompressed and judged for silent harm")
    unknown = ranked & pl.col("silent") & pl.col("steps_to_harm").is_null()
    harmed = ranked & pl.col("silent") & ~unknown
    labelled = keys.with_columns(
        steps_to_harm=pl.when(unknown).then(-pl.col("position")).when(harmed).then("steps_to_harm"),
        hazard_harm=pl.when(harmed).then("hazard_harm").otherwise(False).fill_null(False),
        post_onset_harm=pl.when(unknown)
        .then(True)
        .when(harmed)
        .then("post_onset_harm")
        .otherwise(False),
    )
    table = labelled.group_by(schema.TRACE_KEYS, maintain_order=True).agg(
        task=pl.col("task").first(),
        silent=pl.col("silent").first() & ranked.first(),
        ranked=ranked.first(),
        length=pl.len(),
    )
    marked = _marked(labelled, whole.features[compressed], tokens, questions, decode, encode)
    plain = ~compressed
    entropy = schema.FEATURE_NAMES.index("entropy")
    return Answers(
        rows=Rows(labelled.drop("silent", "used"), whole.features[compressed]),
        table=table.select(*schema.TRACE_KEYS, "task"),
        lengths=table["length"].to_numpy().astype(np.int64),
        silent=table["silent"].fill_null(False).to_numpy().astype(np.bool_),
        ranked=table["ranked"].to_numpy().astype(np.bool_),
        marked=marked,
        llr=marked["llr"].cast(pl.Float64).fill_null(np.nan).to_numpy(),
        baseline=whole.keys.filter(plain)
        .select("prompt_id", "press", "task", "position")
        .with_columns(pl.Series("entropy", whole.features[plain][:, entropy])),
    )


def _marked(
    keys: pl.DataFrame,
    features: NDArray[np.float32],
    tokens: pl.DataFrame,
    questions: Mapping[str, str] | None,
    decode: Decode | None,
    encode: Encode | None,
) -> pl.DataFrame:
    wanted = ("entropy", "top_logprob_01")
    frame = (
        keys.select(*schema.TOKEN_KEYS, "task")
        .with_columns(
            pl.Series(name, features[:, schema.FEATURE_NAMES.index(name)]) for name in wanted
        )
        .join(
            tokens.select(*schema.TOKEN_KEYS, "token_id", "llr"),
            on=schema.TOKEN_KEYS,
            how="left",
            maintain_order="left",
        )
    )
    if decode is None or encode is None:
        return frame.with_columns(line_break=pl.lit(False), copied=pl.lit(False))
    return mark_tokens(frame, decode, encode, questions or {})


def deal_folds(splits: pl.DataFrame, count: int, salt: str) -> dict[str, int]:
    """Fold of each prompt, 0 to ``count`` - 1; the prompts of each task are dealt out evenly.

    Prompts of one template are dealt together.

    Raises:
        ValueError: fewer prompts than folds.
    """
    if splits["prompt_id"].n_unique() < count:
        raise ValueError(f"folds: {splits['prompt_id'].n_unique()} prompts cannot fill {count}")
    folds: dict[str, int] = {}
    dealt = 0
    known = splits.with_columns(unit=pl.coalesce("template", "prompt_id"))
    for _, part in known.sort("task", nulls_last=True).group_by("task", maintain_order=True):
        members = dict(part.group_by("unit").agg("prompt_id").iter_rows())
        for unit in hash_order(members, salt):
            folds |= dict.fromkeys(members[unit], dealt % count)
            dealt += 1
    return folds


def run_paths(results: Path, experiment: config.Config, table: str) -> list[Path]:
    """Files of TRACES or TOKENS of a run, in the order of the configuration."""
    from kvguard.integrity import expected_shards

    return [shard.path(results, table) for shard in expected_shards(experiment)]
