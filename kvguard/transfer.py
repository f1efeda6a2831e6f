"""What carries over: predictors trained without a task, press or ratio, on one alone, on a model.

Everything is fitted and measured as `kvguard.variants` says.
"""

from typing import Any

import polars as pl

from kvguard.config import BASELINE
from kvguard.metrics import Measured
from kvguard.predictor import Predictor
from kvguard.rows import Rows
from kvguard.splits import Table
from kvguard.trainer import Refusal, Trainer
from kvguard.variants import Study, compared, load_study, variant_table


def leave_one_out(features: Table, labels: Table, trainer: Trainer) -> dict[str, pl.DataFrame]:
    """Train without one task, press, ratio or model, and test on what was left out.

    Prompts stay split.

    Arguments as in `ablate`. Trees have the configured parameters: a search would have seen what
    is left out.

    Returns:
        - ``leave_one_out``: one row per task, press and ratio and metric, on its test prompts:
          trained on the ``others``, and on ``itself`` alone (uncompressed runs stay in);
          ``difference`` is to a predictor trained on everything.
        - ``transfer``: one row per (trained on, tested on) pair of models and metric;
          ``difference`` is to a predictor of the tested model. With one model a null row says so.
        - ``leakage_check_leave_one_out``.
    """
    study = load_study(features, labels, trainer)
    target = study.targets()[0]
    return {
        "leave_one_out": _leave_one_out(study, target),
        "transfer": _transfer(study, target),
        "leakage_check_leave_one_out": trainer.leakage.table(),
    }


def _values(rows: Rows, column: str) -> list[str]:
    return (
        rows.keys.filter(pl.col("press") != BASELINE)[column].drop_nulls().unique().sort().to_list()
    )


def _without(rows: Rows, column: str, value: str, *, keep: bool = False) -> Rows:
    mask = (rows.keys[column] == value).to_numpy()
    if not keep:
        return rows.take(~mask)
    # alone, but with its uncompressed runs
    return rows.take(mask | ~rows.compressed() if column in ("press", "ratio") else mask)


def _leave_one_out(study: Study, target: str) -> pl.DataFrame:
    rows: list[tuple[dict[str, Any], Measured]] = []
    whole: Predictor | str
    try:
        whole = study.fit_configured(target, "leave one out: everything")
    except Refusal as refusal:
        whole = str(refusal)
    for column in ("task", "press", "ratio"):
        values = _values(study.train, column)
        for value in values:
            where = (pl.col(column) == value) & (pl.col("press") != BASELINE)
            for trained_on in ("others", "itself"):
                described = {"target": target, "left_out": column, "value_left_out": value}
                described["trained_on"] = trained_on
                if len(values) == 1:
                    rows += compared(described, f"{value} is the only {column}", None, {})
                    continue
                if isinstance(whole, str):
                    rows += compared(described, whole, None, {})
                    continue
                try:
                    alone = trained_on == "itself"
                    kept = _without(study.train, column, value, keep=alone)
                    purpose = f"{column} {value}: trained on {trained_on}"
                    predictor = study.fit_configured(target, purpose, kept)
                except Refusal as refusal:
                    rows += compared(described, str(refusal), None, {})
                    continue
                found, size = study.measure(predictor, where)
                rows += compared(described, found, study.measure(whole, where)[0], size)
    columns = dict.fromkeys(("target", "left_out", "value_left_out", "trained_on"), pl.String())
    return variant_table(rows, columns)


def _transfer(study: Study, target: str) -> pl.DataFrame:
    models = _values(study.train, "model")
    rows: list[tuple[dict[str, Any], Measured]] = []
    if len(models) == 1:
        described = {"target": target, "trained_on": models[0], "tested_on": models[0]}
        rows += compared(described, f"{models[0]} is the only model", None, {})
    fitted: dict[str, Predictor | str] = {}
    for model in models if len(models) > 1 else ():
        try:
            part = _without(study.train, "model", model, keep=True)
            fitted[model] = study.fit_configured(target, f"transfer from {model}", part)
        except Refusal as refusal:
            fitted[model] = str(refusal)
    for tested in fitted:
        where = (pl.col("model") == tested) & (pl.col("press") != BASELINE)
        same = fitted[tested]
        reference = None if isinstance(same, str) else study.measure(same, where)[0]
        for trained, predictor in fitted.items():
            described = {"target": target, "trained_on": trained, "tested_on": tested}
            if isinstance(predictor, str):
                rows += compared(described, predictor, None, {})
                continue
            found, size = study.measure(predictor, where)
            rows += compared(described, found, None if trained == tested else reference, size)
    columns = {"target": pl.String, "trained_on": pl.String, "tested_on": pl.String}
    return variant_table(rows, columns)
