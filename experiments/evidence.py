"""Does evidence of checks rank harmful requests better than the same features without it?

The plan: docs/experiments/005-price.md, section "Evidence". Train and calibration prompts of a run,
cross-fitted by prompt; no test prompt is read. Writes results/bench/evidence.json.
"""

from pathlib import Path

import numpy as np
import polars as pl
from ranking import Ranking, rounded, run
from sklearn.metrics import log_loss

from kvguard.check_timing import rejection_rate
from kvguard.config import BASELINE, load_config
from kvguard.features import FEATURE_SETS, without_evidence
from kvguard.rows import Rows, load_rows
from kvguard.schema import CONDITION, FEATURE_NAMES, OUTCOMES, TRACE_KEYS, read_table
from kvguard.splits import read_splits
from kvguard.supposed_checks import evidence_of, rows_with_evidence
from kvguard.trainer import make_trainer

FOLDS = 5
POSITIONS = (4, 8, 12, 16)
SCORES = ("with_evidence", "without", "rejections")


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


def measure(table: pl.DataFrame, label: str, draws: int) -> dict[str, object]:
    """AUROC of each score, and the difference that the plan asks for, with its interval."""
    ranking = Ranking(table, tuple(CONDITION), ("position",), draws)
    auroc = {score: ranking.auroc(score, label) for score in SCORES}
    labels = table[label].to_numpy()
    losses = {
        score: round(float(log_loss(labels, np.clip(table[score].to_numpy(), 1e-4, 1 - 1e-4))), 4)
        for score in ("with_evidence", "without")
    }
    return {
        "rows": table.height,
        "requests": table.select(TRACE_KEYS).n_unique(),
        "harmed_rows": int(labels.sum()),
        "auroc": {score: rounded(value) for score, value in auroc.items()},
        "difference": rounded(auroc["with_evidence"].minus(auroc["without"])),
        "log_loss": losses,
    }


def study(folder: Path, draws: int) -> dict[str, object]:
    """The primary and the secondary comparison."""
    table = cross_fitted(folder, folder / "config.json")
    return {
        "primary": measure(table.filter("valid"), "later", draws),
        "all positions": measure(table, "harmed", draws),
    }


if __name__ == "__main__":
    run(__doc__, "results/silent_harm_2", "evidence", study)
