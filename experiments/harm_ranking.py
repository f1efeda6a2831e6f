"""How well P, the probability of harm that `guard_price` weighs, ranks finished answers.

Test prompts of a run, compressed, at risk (right uncompressed). AUROC of harm and of silent harm,
within condition and within task and condition: means over groups that hold both kinds, with 95 %
intervals from a bootstrap over prompts. Beside P: the mean entropy of the answer, the expected
rejections of its tokens, the gate's score. Writes results/bench/harm_ranking.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from kvguard.config import BASELINE
from kvguard.harm_model import expected_rejections, load_harm_model
from kvguard.rival_settings import trace_probes
from kvguard.schema import CONDITION, OUTCOMES, TRACE_KEYS, atomic_path, read_table
from kvguard.splits import prompts_of, read_splits

Floats = NDArray[np.float64]


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
        gate=pl.Series(gate.astype(np.float64)).fill_nan(None),
    )


def mean_auroc(scores: Floats, labels: NDArray[np.bool_], groups: NDArray[np.intp]) -> float:
    """Mean over groups that hold both kinds; NaN without any."""
    found = [
        roc_auc_score(labels[groups == group], scores[groups == group])
        for group in np.unique(groups)
        if 0 < labels[groups == group].sum() < (groups == group).sum()
    ]
    return float(np.mean(found)) if found else float("nan")


def measure(table: pl.DataFrame, draws: int, seed: int) -> list[dict[str, object]]:
    """One entry per score, label and grouping: the mean AUROC and its interval."""
    prompts = table["prompt_id"].rank("dense").to_numpy().astype(np.intp) - 1
    places = [np.flatnonzero(prompts == prompt) for prompt in range(prompts.max() + 1)]
    rng = np.random.default_rng(seed)
    samples = [
        np.concatenate([places[i] for i in rng.integers(0, len(places), len(places))])
        for _ in range(draws)
    ]
    entries: list[dict[str, object]] = []
    for name, keys in (("condition", CONDITION), ("task and condition", ("task", *CONDITION))):
        groups = table.select(pl.struct(keys).rank("dense")).to_series().to_numpy().astype(np.intp)
        for label in ("harmed", "silent_harm"):
            labels = table[label].to_numpy().astype(np.bool_)
            for score in ("p", "rejections", "gate", "mean_entropy"):
                values = table[score].fill_null(0.5).to_numpy()
                drawn = [mean_auroc(values[at], labels[at], groups[at]) for at in samples]
                lower, upper = np.nanquantile(drawn, [0.025, 0.975])
                entries.append(
                    {
                        "score": score,
                        "label": label,
                        "within": name,
                        "auroc": round(mean_auroc(values, labels, groups), 3),
                        "interval": [round(float(lower), 3), round(float(upper), 3)],
                    }
                )
    return entries


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results-dir", type=Path, default=Path("results/silent_harm_2_bus"))
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("results/bench/harm_ranking.json"))
    given = parser.parse_args()
    if not (given.results_dir / "outcomes.parquet").is_file():
        print(f"{given.results_dir} holds no run: nothing is measured")
        return
    table = answers(given.results_dir)
    counts = {name: int(table[name].sum()) for name in ("harmed", "silent_harm")}
    found = {
        "answers": table.height,
        **counts,
        "ranking": measure(table, given.draws, seed=0),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(given.out) as temporary:
        temporary.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
