"""The study of transfer between two language models: what its numbers say of planted answers."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.linear_model import LogisticRegression


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, which imports its neighbour."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "experiments"))
    for name in ("ranking", "small_to_large"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import small_to_large

    return small_to_large


def _answers(seed: int = 0, prompts: int = 60, presses: int = 3) -> pl.DataFrame:
    """Answers to half "copy", half "recall" under each press; harm follows the column ``truth``."""
    rng = np.random.default_rng(seed)
    rows = prompts * presses
    odds = rng.normal(-1, 2, rows)
    number = np.repeat(np.arange(prompts), presses)
    harmed = rng.random(rows) < 1 / (1 + np.exp(-odds))
    return pl.DataFrame(
        {
            "model": "m",
            "press": [f"press{k}" for k in range(presses)] * prompts,
            "ratio": "0.500",
            "prompt_id": [f"{one:016x}" for one in number],
            "task": ["copy" if one % 2 else "recall" for one in number],
            "split": np.array(["train", "calibration", "test"])[number % 3],
            "harmed": harmed,
            "silent_harm": harmed,
            "truth": 1 / (1 + np.exp(-odds)),
        }
    )


def test_a_score_that_holds_on_one_task_only_is_named(study: Any) -> None:
    table = _answers().with_columns(
        score=pl.when(task="copy").then("truth").otherwise(-pl.col("truth"))
    )
    found = {
        entry["task"]: entry["verdict"] for entry in study.by_part(table, ["score"], "task", 200)
    }
    assert found == {"copy": "works", "recall": "backwards"}


def test_the_line_is_that_of_a_weighted_logistic_regression(study: Any) -> None:
    rng = np.random.default_rng(1)
    odds = rng.normal(size=300)
    labels = rng.random(300) < 1 / (1 + np.exp(-(0.5 + 2 * odds)))
    weights = rng.multinomial(300, np.full(300, 1 / 300), size=4).astype(float)
    intercept, slope = study.logistic_line(odds, labels, weights)
    for row in range(4):
        fit = LogisticRegression(C=1e9, tol=1e-10, max_iter=1000)
        fit.fit(odds[:, None], labels, sample_weight=weights[row])
        assert slope[row] == pytest.approx(fit.coef_[0, 0], abs=1e-3)
        assert intercept[row] == pytest.approx(fit.intercept_[0], abs=1e-3)


def test_a_line_that_no_fit_has_is_undefined(study: Any) -> None:
    odds = np.array([-2.0, -1.0, 1.0, 2.0])
    for labels in (odds > 0, np.zeros(4, bool)):
        _, slope = study.logistic_line(odds, labels, np.ones((1, 4)))
        assert np.isnan(slope[0])


def test_probabilities_that_are_right_have_slope_one_and_gain(study: Any) -> None:
    table = _answers(prompts=400).with_columns(
        sharp=1 / (1 + (-3 * (pl.col("truth") / (1 - pl.col("truth"))).log()).exp()),
    )
    found = study.calibration(table, ["truth", "sharp"], 200)
    low, high = found["truth"]["slope"]["interval"]
    assert low < 1 < high
    assert found["sharp"]["slope"]["value"] == pytest.approx(
        found["truth"]["slope"]["value"] / 3, abs=0.02
    )
    assert found["truth"]["log_loss_gain"]["interval"][0] > 0
    rate = table["harmed"].mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    assert found["base rate"]["log_loss"] == pytest.approx(entropy, abs=1e-4)


def test_a_few_prompts_put_shifted_probabilities_right(study: Any) -> None:
    """A map from twenty prompts beats what it started from, on prompts that it never saw."""
    table = _answers(prompts=300).with_columns(
        p=1 / (1 + ((1 - pl.col("truth")) / pl.col("truth")) * float(np.exp(3)))
    )
    odds, labels = study.log_odds(table["p"].to_numpy()), table["harmed"].to_numpy()
    found = study.from_few(table, {"p": study.platt(odds, labels)})
    lines = {(one["prompts"], one["score"]): one for one in found}
    test = table.filter(split="test")
    before = study.losses(test["p"].to_numpy(), test["harmed"].to_numpy()).mean()
    assert lines[20, "p"]["log_loss"] < before - 0.1
    assert lines[5, "p"]["log_loss"] >= lines[200, "p"]["log_loss"]
    assert lines[20, "p"]["log_loss"] < lines[20, "base rate"]["log_loss"]
