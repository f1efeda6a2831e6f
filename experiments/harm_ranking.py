"""How well P, the probability of harm that `guard_price` weighs, ranks finished answers.

Test prompts of a run, compressed, at risk (right uncompressed). AUROC of harm, and of silent harm
against no harm (visibly harmed answers left out, as in `kvguard.signal_study`), within condition
and within task and condition: means over groups that hold both kinds, with 95 % intervals from a
bootstrap over prompts. Beside P: the mean entropy of the answer, the expected
rejections of its tokens, the gate's score. Writes results/bench/harm_ranking.json.
"""

from pathlib import Path

import numpy as np
import polars as pl
from ranking import Ranking, rounded, run

from kvguard.config import BASELINE
from kvguard.harm_model import expected_rejections, load_harm_model
from kvguard.rival_settings import trace_probes
from kvguard.schema import CONDITION, OUTCOMES, TRACE_KEYS, read_table
from kvguard.splits import prompts_of, read_splits


def answers(folder: Path) -> pl.DataFrame:
    """One row per compressed answer at risk: keys, task, harm, and the four scores."""
    test = prompts_of(read_splits(folder / "splits.parquet"), "test")
    chosen = pl.col("prompt_id").is_in(test) & (pl.col("press") != BASELINE)
    traces, tokens = (
        pl.scan_parquet(folder / f"{name}/**/*.parquet", hive_partitioning=False).filter(chosen)
        for name in ("traces", "tokens")
    )
    signals = (
        tokens.select(*TRACE_KEYS, "position", "top1_probability", "entropy")
        .sort(*TRACE_KEYS, "position")
        .group_by(TRACE_KEYS, maintain_order=True)
        .agg("top1_probability", mean_entropy=pl.col("entropy").mean().cast(pl.Float64))
    )
    table = traces.join(signals, on=TRACE_KEYS).collect()
    outcomes = read_table(folder / "outcomes.parquet", OUTCOMES)
    kept = outcomes.filter(pl.col("baseline_right")).select(
        *TRACE_KEYS, "harmed", pl.col("silent_harm").fill_null(False)
    )
    table = table.join(kept, on=TRACE_KEYS).filter(pl.col("harmed").is_not_null())
    model = load_harm_model(folder / "models/harm_model.json")
    score = model.scorer(table["press"].to_numpy(), table["ratio"].cast(pl.Float64).to_numpy())
    gate = np.full(table.height, np.nan) if score is None else score(trace_probes(table))
    rejections = np.array([expected_rejections(np.array(p)) for p in table["top1_probability"]])
    return table.select(*TRACE_KEYS, "task", "harmed", "silent_harm", "mean_entropy").with_columns(
        p=pl.Series(model.predict(rejections, gate.astype(np.float64))),
        rejections=pl.Series(rejections),
        gate=pl.Series(gate.astype(np.float64)).fill_nan(0.5),
    )


def study(folder: Path, draws: int) -> dict[str, object]:
    """One entry per label, grouping and score: the mean AUROC and its interval."""
    table = answers(folder)
    entries: list[dict[str, object]] = []
    for label in ("harmed", "silent_harm"):
        ranked = table.filter(pl.col(label) | ~pl.col("harmed"))
        for name, groups in (
            ("condition", CONDITION),
            ("task and condition", ("task", *CONDITION)),
        ):
            ranking = Ranking(ranked, tuple(groups), (), draws)
            for score in ("p", "rejections", "gate", "mean_entropy"):
                named = {"label": label, "within": name, "score": score}
                entries.append(named | rounded(ranking.auroc(score, label), 3))
    counts = {label: int(table[label].sum()) for label in ("harmed", "silent_harm")}
    return {"answers": table.height, **counts, "ranking": entries}


if __name__ == "__main__":
    run(__doc__, "results/silent_harm_2_bus", "harm_ranking", study)
