"""What retrained variants share: the same trainer, the same test prompts, the same table.

Every variant is fitted on train prompts with the configured tree parameters and measured on test
prompts. Nothing is chosen from these tables. ``low`` and ``high`` hold for all rows of a table at
once with 95 % (Bonferroni), ``low_pointwise``, ``high_pointwise`` and the intervals of differences
for one row alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from kvguard import schema
from kvguard.evaluate_predictor import COUNT_TYPES, bootstrap_weights, counts, measure, score
from kvguard.harm_metrics import Panel, build_panel, mean_over, measure_panel
from kvguard.metrics import INTERVAL_TYPES, Floats, Measured, with_intervals
from kvguard.predictor import Predictor
from kvguard.rows import Rows, load_rows
from kvguard.splits import Table
from kvguard.trainer import Formulation, Trainer

POSITION_PROOF = ("same_position", "request", "within_prompt")
RANKING = (*POSITION_PROOF, "auroc", "auroc_within", "pr_auc", "request_auroc")
"""Metrics of a variant; the first three are those of `kvguard.harm_metrics`."""


VARIANT_TYPES: dict[str, Any] = (
    {"metric": pl.String}
    | INTERVAL_TYPES
    | {"difference": pl.Float64, "difference_low": pl.Float64, "difference_high": pl.Float64}
    | COUNT_TYPES
    | {"reason": pl.String}
)


class Study(NamedTuple):
    """What all retrained variants share: the trainer, train and test tokens, the resamples."""

    trainer: Trainer
    train: Rows
    test: Rows
    weights: Floats

    def fit(
        self,
        target: str,
        names: Sequence[str],
        purpose: str,
        *,
        rows: Rows | None = None,
        formulation: Formulation | None = None,
        normalised: bool | None = None,
    ) -> Predictor:
        """Trees with the configured parameters, probabilities not calibrated."""
        train = self.train if rows is None else rows
        return self.trainer.fit(
            train, target, names, purpose, formulation=formulation, normalised=normalised
        )

    def fit_configured(self, target: str, purpose: str, rows: Rows | None = None) -> Predictor:
        """A predictor of the configured kind, its probabilities not calibrated."""
        train = self.train if rows is None else rows
        return self.trainer.fit_kind(self.trainer.settings.kind, train, target, purpose)

    def targets(self) -> list[str]:
        """The configured targets, those that can be trained first, the default in front."""
        wanted: list[str] = sorted(self.trainer.settings.targets, key=schema.TARGETS.index)
        refused = {target: self.trainer.refusal(self.train, target) for target in wanted}
        return sorted(wanted, key=lambda target: refused[target] is not None)

    def measure(
        self, predictor: Predictor, where: pl.Expr
    ) -> tuple[dict[str, Measured], dict[str, int]]:
        """Ranking metrics on the test tokens that ``where`` selects, and how many there are."""
        scored = score(
            self.test,
            predictor.predict(self.test.features, self.test.press),
            predictor.target,
            self.weights,
        )
        rate = self.trainer.settings.false_alarm_rate
        found = measure(scored, where, false_alarm_rate=rate)
        panel = self.panel(self.test, predictor.target)
        found |= pooled(panel, scored.hazard, where)
        return {metric: found[metric] for metric in RANKING}, counts(scored, where)

    def panel(self, rows: Rows, target: str) -> Panel:
        """The requests of some tokens, laid out for `kvguard.harm_metrics`."""
        samples = self.trainer.settings.bootstrap_samples
        return build_panel(rows, target, self.trainer.splits, samples, self.trainer.seed)


def pooled(panel: Panel, scores: Floats, where: pl.Expr | None = None) -> dict[str, Measured]:
    """The metrics `POSITION_PROOF`: means over the conditions that hold requests of ``where``."""
    inside = np.ones(len(panel.table), np.bool_)
    if where is not None:
        inside = panel.table.select(where).to_series().to_numpy().astype(np.bool_)
    conditions = np.unique(panel.condition[inside])
    found = measure_panel(panel, scores)
    return {name: mean_over(panel, found[name], conditions) for name in POSITION_PROOF}


def load_study(features: Table, labels: Table, trainer: Trainer) -> Study:
    train = load_rows(features, labels, trainer.splits, "train")
    test = load_rows(features, labels, trainer.splits, "test")
    trainer.leakage.check("evaluate", test.keys["prompt_id"], "retrained variants")
    weights = bootstrap_weights(test, trainer.settings.bootstrap_samples, trainer.seed)
    return Study(trainer, train, test, weights)


def compared(
    described: dict[str, Any],
    found: Mapping[str, Measured] | str,
    reference: Mapping[str, Measured] | None,
    size: dict[str, int],
) -> list[tuple[dict[str, Any], Measured]]:
    """Rows of one variant, with the paired difference to a reference; a reason where it failed."""
    if isinstance(found, str):
        nothing = Measured(None, np.zeros(0), 0)
        empty = {"difference": None, "difference_low": None, "difference_high": None}
        return [
            (described | {"metric": metric, "reason": found} | empty | size, nothing)
            for metric in RANKING
        ]
    rows = []
    for metric, measured in found.items():
        difference: dict[str, Any] = {}
        if reference is not None:
            paired = measured.minus(reference[metric])
            low, high = paired.interval()
            difference = {
                "difference": paired.value,
                "difference_low": low,
                "difference_high": high,
            }
        rows.append((described | {"metric": metric, "reason": None} | difference | size, measured))
    return rows


def variant_table(
    rows: Sequence[tuple[dict[str, Any], Measured]], columns: Mapping[str, Any]
) -> pl.DataFrame:
    finished = with_intervals(rows, lambda _: "table")
    return pl.DataFrame(finished, schema=dict(columns) | VARIANT_TYPES)
