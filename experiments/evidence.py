"""Does evidence of checks rank harmful requests better than the same features without it?

The plan: docs/experiments/005-price.md, section "Evidence". Train and calibration prompts of a run,
cross-fitted by prompt; no test prompt is read. Writes results/bench/evidence.json.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.metrics import log_loss

from kvguard.check_timing import rejection_rate
from kvguard.config import BASELINE, load_config
from kvguard.features import FEATURE_SETS, without_evidence
from kvguard.rows import Rows, load_rows
from kvguard.schema import CONDITION, FEATURE_NAMES, OUTCOMES, TRACE_KEYS, atomic_path, read_table
from kvguard.splits import read_splits
from kvguard.supposed_checks import evidence_of, rows_with_evidence
from kvguard.trainer import make_trainer

FOLDS = 5
POSITIONS = (4, 8, 12, 16)
SCORES = ("with_evidence", "without", "rejections")

Floats = NDArray[np.float64]


def cross_fitted(folder: Path, config: Path) -> pl.DataFrame:
    """One row per request and position: the scores, harm from there on, whether a check cut.

    ``valid`` is false behind the first rejected token, where an answer that is checked goes on
    otherwise.
    """
    experiment = load_config(config, check_files=False)
    splits = read_splits(folder / "splits.parquet").filter(pl.col("split") != "test")
    files = [path for path in (folder / "tokens").rglob("*.parquet") if path.is_file()]
    guard = experiment.guard.model_dump(mode="json")
    evidence = evidence_of(files, guard, experiment.seed)
    assert evidence is not None
    order = np.random.default_rng(0).permutation(splits.height)
    fold = pl.Series("fold", np.argsort(order) % FOLDS)
    splits = splits.sort("prompt_id").with_columns(fold)
    outcomes = read_table(folder / "outcomes.parquet", OUTCOMES).filter(pl.col("baseline_right"))
    frames = []
    for number in range(FOLDS):
        ours = splits.with_columns(
            split=pl.when(pl.col("fold") == number).then(pl.lit("test")).otherwise(pl.lit("train"))
        ).drop("fold")
        trainer = make_trainer(
            ours,
            experiment.predictor.model_copy(update={"kind": "boosted"}),
            horizon_tokens=experiment.labels.horizon_tokens,
            seed=experiment.seed,
            evidence=evidence,
        )
        tables = (folder / "features.parquet", folder / "labels.parquet")
        train, held = (load_rows(*tables, ours, split) for split in ("train", "test"))
        both = rows_with_evidence(train, evidence)
        names = FEATURE_SETS["with_evidence"]
        plain = Rows(both.keys, both.features[:, : len(FEATURE_NAMES)])
        fitted = {
            "with_evidence": trainer.fit(both, "harm", names, f"fold {number}"),
            "without": trainer.fit(plain, "harm", without_evidence(names), f"fold {number}"),
        }
        everything = evidence.with_columns(supposed=pl.lit(True))
        held = rows_with_evidence(held, everything)
        frame = held.keys.select(*TRACE_KEYS, "position")
        top1 = held.features[:, FEATURE_NAMES.index("top1_probability")]
        rate = np.where(frame["position"].to_numpy() == 0, 0.0, rejection_rate(top1))
        frames.append(
            frame.with_columns(
                with_evidence=pl.Series(fitted["with_evidence"].predict(held.features)),
                without=pl.Series(
                    fitted["without"].predict(held.features[:, : len(FEATURE_NAMES)])
                ),
                rate=pl.Series(rate),
            ).with_columns(rejections=pl.col("rate").cum_sum().over(TRACE_KEYS))
        )
    table = pl.concat(frames).filter(
        pl.col("position").is_in([at - 1 for at in POSITIONS]) & (pl.col("press") != BASELINE)
    )
    table = table.join(
        outcomes.select(*TRACE_KEYS, "harmed", "harm_onset", "first_rejected"), on=TRACE_KEYS
    )
    seen = pl.col("position") + 1
    return table.filter(pl.col("harmed").is_not_null()).with_columns(
        later=pl.col("harmed") & (pl.col("harm_onset") >= seen),
        valid=pl.col("first_rejected").is_null() | (pl.col("first_rejected") >= seen),
    )


def mean_auroc(
    table: Mapping[str, NDArray[np.generic]], score: str, label: str, at: NDArray[np.intp]
) -> float:
    """Pairs share condition and position; weighted by pairs inside a condition, mean over them."""
    group, condition = table["group"][at], table["condition"][at]
    scores, labels = table[score][at], table[label][at].astype(np.bool_)
    found: dict[int, list[tuple[float, int]]] = {}
    for one in np.unique(group):
        mask = group == one
        positive = labels[mask]
        harmed, others = int(positive.sum()), int((~positive).sum())
        if harmed * others:
            above = rankdata(scores[mask])[positive].sum() - harmed * (harmed + 1) / 2
            entry = (float(above) / (harmed * others), harmed * others)
            found.setdefault(int(condition[mask][0]), []).append(entry)
    means = [sum(v * n for v, n in own) / sum(n for _, n in own) for own in found.values()]
    return float(np.mean(means)) if means else float("nan")


def measure(table: pl.DataFrame, label: str, draws: int) -> dict[str, object]:
    """AUROC of each score, and the difference that the plan asks for, with its interval."""
    condition = table.select(pl.struct(CONDITION).rank("dense")).to_series()
    group = table.select(pl.struct(*CONDITION, "position").rank("dense")).to_series()
    prompt = table["prompt_id"].rank("dense").to_numpy().astype(np.intp) - 1
    columns: dict[str, NDArray[np.generic]] = {
        name: table[name].to_numpy() for name in (*SCORES, label)
    }
    columns |= {"condition": condition.to_numpy(), "group": group.to_numpy()}
    places = [np.flatnonzero(prompt == one) for one in range(prompt.max() + 1)]
    everything = np.arange(table.height)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(draws):
        at = np.concatenate([places[i] for i in rng.integers(0, len(places), len(places))])
        drawn.append(
            mean_auroc(columns, "with_evidence", label, at)
            - mean_auroc(columns, "without", label, at)
        )
    auroc = {score: mean_auroc(columns, score, label, everything) for score in SCORES}
    lower, upper = np.nanquantile(drawn, [0.025, 0.975])
    labels = table[label].to_numpy()
    losses = {
        score: log_loss(labels, np.clip(table[score].to_numpy(), 1e-4, 1 - 1e-4))
        for score in ("with_evidence", "without")
    }
    return {
        "rows": table.height,
        "requests": table.select(TRACE_KEYS).n_unique(),
        "harmed_rows": int(labels.sum()),
        "auroc": {score: round(value, 4) for score, value in auroc.items()},
        "difference": round(auroc["with_evidence"] - auroc["without"], 4),
        "interval": [round(float(lower), 4), round(float(upper), 4)],
        "log_loss": {score: round(float(loss), 4) for score, loss in losses.items()},
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results-dir", type=Path, default=Path("results/silent_harm_2"))
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("results/bench/evidence.json"))
    given = parser.parse_args()
    if not (given.results_dir / "outcomes.parquet").is_file():
        print(f"{given.results_dir} holds no run: nothing is measured")
        return
    table = cross_fitted(given.results_dir, given.results_dir / "config.json")
    found = {
        "primary": measure(table.filter("valid"), "later", given.draws),
        "all positions": measure(table, "harmed", given.draws),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(given.out) as temporary:
        temporary.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
