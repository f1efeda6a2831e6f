"""What models of harm that were trained on one language model say of the answers of another.

Two finished runs of one language model each, a small one and a large one. Their compressed answers
at risk (right uncompressed) are scored by the models of both runs and by what needs no training.
For both directions:

- AUROC of silent harm against no harm (visibly harmed answers left out), within condition and
  within task and condition: means over groups that hold both kinds, 95 % intervals from a bootstrap
  over prompts. On all prompts for what the other run trained, on test prompts beside the run's own.
- the planned contrasts, Holm-adjusted, and unplanned ones;
- where each score works: its interval on a task lies above 0.5;
- the probabilities: log loss against the base rate's, calibration slope and intercept;
- what a few prompts with known outcomes make of them: Platt's map, or models of their own.

The plan: docs/experiments/007-small-to-large.md. Writes results/bench/small_to_large.json.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from ranking import Codes, Ranking, codes, rounded, run
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kvguard.config import BASELINE
from kvguard.harm_model import LEAST_REJECTIONS, expected_rejections, load_harm_model, log_odds
from kvguard.metrics import Measured, resample_weights
from kvguard.paired_tests import holm
from kvguard.predictor import Predictor, parse_predictor
from kvguard.probability_maps import fit_calibration_map
from kvguard.probe_scale import PROBE_COLUMNS, fit_probe_scale
from kvguard.rival_settings import gate_scores
from kvguard.schema import (
    CONDITION,
    FEATURE_NAMES,
    FEATURES,
    OUTCOMES,
    TOKEN_KEYS,
    TRACE_KEYS,
    read_table,
)
from kvguard.signal_study import p_value
from kvguard.splits import prompts_of, read_splits
from kvguard.train import load_models

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Maker = Callable[[Bools], Floats]

UNTRAINED = ("mean_entropy", "rejections", "evicted_mass", "length")
TRAINED = ("p", "hazard", "boosted", "clock", "gate")
RESCALED = ("p", "hazard", "gate")
"""Scores that read probes on the press's own scale, which can be had anew without outcomes."""

PROBABILITIES, SUFFIXES = ("p", "gate"), ("", " rescaled")
PLATT_PROMPTS, PLATT_DRAWS = (5, 10, 20), 200
WITHIN = {"condition": CONDITION, "task and condition": ("task", *CONDITION)}
CHANCE = 0.5

CONTRASTS = (
    ("primary", "p, small", "evicted_mass", "condition", "all"),
    ("S1", "p, small", "mean_entropy", "condition", "all"),
    ("S2", "p, small", "mean_entropy", "task and condition", "all"),
    ("S3", "gate, small", "evicted_mass", "condition", "all"),
    ("S4", "hazard, small", "clock, small", "condition", "all"),
    ("S5", "p, small", "p, large", "condition", "test"),
    ("S6", "gate, small", "gate, large", "condition", "test"),
)
"""Name, score, other, within, prompts; on the large model's answers. The first stands alone, the
others are one family."""

UNPLANNED = (
    ("p, small", "rejections", "condition", "all"),
    ("p, small", "rejections", "task and condition", "all"),
    ("p, small rescaled", "rejections", "condition", "all"),
    ("p, small rescaled", "rejections", "task and condition", "all"),
    ("p, small rescaled", "p, small", "condition", "all"),
    ("gate, small rescaled", "evicted_mass", "condition", "all"),
    ("p, small rescaled", "p, large", "condition", "test"),
    ("gate, small rescaled", "gate, large", "condition", "test"),
)
"""As the last four of `CONTRASTS`; chosen after the results were seen, without p-values."""


class Answers(NamedTuple):
    """Compressed answers at risk of one run.

    Attributes:
        table: one row each: `TRACE_KEYS`, ``task``, ``split``, ``harmed``, ``silent_harm`` and the
            scores; larger is riskier.
        features: (tokens, features) of their tokens, one answer after the other.
        lengths: (answers,) tokens.
    """

    table: pl.DataFrame
    features: NDArray[np.float32]
    lengths: Codes

    @property
    def probes(self) -> NDArray[np.float32]:
        """(answers, probes) of each prefill."""
        first = np.cumsum(self.lengths) - self.lengths
        return np.asarray(self.features[first][:, PROBE_COLUMNS], dtype=np.float32)

    @property
    def presses(self) -> NDArray[np.str_]:
        """(answers,) press of each."""
        return self.table["press"].to_numpy().astype(np.str_)


def load_answers(folder: Path) -> Answers:
    """The answers of a run, with the scores that need no training."""
    outcomes = read_table(folder / "outcomes.parquet", OUTCOMES).filter(
        (pl.col("press") != BASELINE) & pl.col("baseline_right") & pl.col("harmed").is_not_null()
    )
    kept = outcomes.select(
        *TRACE_KEYS, "task", "harmed", pl.col("silent_harm").fill_null(False)
    ).join(read_splits(folder / "splits.parquet").select("prompt_id", "split"), on="prompt_id")
    tokens = read_table(folder / "features.parquet", FEATURES)
    tokens = tokens.join(kept, on=TRACE_KEYS, how="inner").sort(TOKEN_KEYS)
    of = ("task", "split", "harmed", "silent_harm")
    table = tokens.group_by(TRACE_KEYS, maintain_order=True).agg(
        *(pl.col(name).first() for name in of),
        pl.col("entropy").cast(pl.Float64).mean().alias("mean_entropy"),
        pl.col("evicted_mass_mean").first().cast(pl.Float64).alias("evicted_mass"),
        pl.len().cast(pl.Float64).alias("length"),
        pl.col("top1_probability"),
    )
    rejections = [expected_rejections(np.array(each)) for each in table["top1_probability"]]
    return Answers(
        table.with_columns(rejections=pl.Series(rejections)).drop("top1_probability"),
        tokens.select(FEATURE_NAMES).to_numpy().astype(np.float32, order="C"),
        table["length"].to_numpy().astype(np.int64),
    )


def answer_means(model: Predictor, answers: Answers) -> Floats:
    """(answers,) mean log-odds of a predictor over each whole answer."""
    press = np.repeat(answers.presses, answers.lengths)
    scores = model.log_odds(answers.features, press)
    first = np.cumsum(answers.lengths) - answers.lengths
    return np.asarray(np.add.reduceat(scores, first) / answers.lengths)


def add_scores(answers: Answers, folder: Path, name: str) -> Answers:
    """The same answers with what the models of a run say of them, as columns "score, name".

    "score, name rescaled" reads the probes on a scale of these answers' own train prompts.
    """
    models, harm = (
        load_models(folder / "models"),
        load_harm_model(folder / "models/harm_model.json"),
    )
    hazard = models.predictors["harm"]
    gate = parse_predictor(harm.gate, "the harm model's gate")
    train = (answers.table["split"] == "train").to_numpy()
    scale = fit_probe_scale(answers.probes[train], answers.presses[train])
    rejections = answers.table["rejections"].to_numpy()
    ratios = answers.table["ratio"].cast(pl.Float64).to_numpy()
    found = {
        f"boosted, {name}": answer_means(models.baselines["boosted"]["harm"], answers),
        f"clock, {name}": answer_means(models.baselines["clock_repetition"]["harm"], answers),
    }
    for suffix, changed in (("", {}), (" rescaled", {"probe_scale": scale})):
        own = gate.model_copy(update=changed)
        scores = gate_scores(own, answers.probes, answers.presses, ratios).astype(np.float64)
        found[f"gate, {name}{suffix}"] = np.nan_to_num(scores, nan=0.5)
        found[f"p, {name}{suffix}"] = harm.predict(rejections, scores)
        of = hazard.model_copy(update=changed)
        found[f"hazard, {name}{suffix}"] = answer_means(of, answers)
    return answers._replace(
        table=answers.table.with_columns(pl.Series(key, value) for key, value in found.items())
    )


def chosen(table: pl.DataFrame, prompts: str) -> pl.DataFrame:
    """Answers to all prompts or to test prompts that are silently harmed or not harmed."""
    ranked = table.filter(pl.col("silent_harm") | ~pl.col("harmed"))
    return ranked if prompts == "all" else ranked.filter(pl.col("split") == "test")


def rank(table: pl.DataFrame, own: str, other: str, draws: int) -> list[dict[str, object]]:
    """Mean AUROC of every score, on all prompts (nothing of ``own``) and on test prompts."""
    transferred = [f"{score}, {other}" for score in TRAINED]
    transferred += [f"{score}, {other} rescaled" for score in RESCALED]
    trained_here = [f"{score}, {own}" for score in TRAINED]
    entries: list[dict[str, object]] = []
    for prompts, scores in (
        ("all", [*UNTRAINED, *transferred]),
        ("test", [*UNTRAINED, *transferred, *trained_here]),
    ):
        part = chosen(table, prompts)
        for within, groups in WITHIN.items():
            ranking = Ranking(part, groups, (), draws)
            for score in scores:
                named = {"prompts": prompts, "within": within, "score": score}
                entries.append(named | rounded(ranking.auroc(score, "silent_harm"), 3))
    return entries


def contrast(table: pl.DataFrame, draws: int) -> dict[str, list[dict[str, object]]]:
    """The planned differences on the large model's answers, and `UNPLANNED` ones."""
    planned: list[dict[str, object]] = []
    values: list[float | None] = []
    for name, score, other, within, prompts in CONTRASTS:
        difference, entry = _difference(table, score, other, within, prompts, draws)
        planned.append({"contrast": name} | entry)
        values.append(p_value(difference))
    adjusted = [*values[:1], *holm(values[1:])]
    return {
        "planned": [
            entry | {"p": _short(raw), "p_adjusted": _short(value)}
            for entry, raw, value in zip(planned, values, adjusted, strict=True)
        ],
        "unplanned": [
            _difference(table, score, other, within, prompts, draws)[1]
            for score, other, within, prompts in UNPLANNED
        ],
    }


def _difference(
    table: pl.DataFrame, score: str, other: str, within: str, prompts: str, draws: int
) -> tuple[Measured, dict[str, object]]:
    ranking = Ranking(chosen(table, prompts), WITHIN[within], (), draws)
    one, two = (ranking.auroc(each, "silent_harm") for each in (score, other))
    difference = one.minus(two)
    named = {"score": score, "minus": other, "within": within, "prompts": prompts}
    return difference, named | rounded(difference, 3)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.2g}")


def by_part(
    table: pl.DataFrame, scores: Sequence[str], column: str, draws: int
) -> list[dict[str, object]]:
    """AUROC within task and condition on each task or press, and whether a score works there.

    Works: the interval lies above 0.5. Backwards: it lies below.
    """
    part = chosen(table, "all")
    entries: list[dict[str, object]] = []
    for value in part[column].unique().sort().to_list():
        here = part.filter(pl.col(column) == value)
        ranking = Ranking(here, WITHIN["task and condition"], (), draws)
        counts = {"answers": here.height, "silently_harmed": int(here["silent_harm"].sum())}
        for score in scores:
            measured = ranking.auroc(score, "silent_harm")
            low, high = measured.interval()
            verdict = None
            if low is not None and high is not None:
                verdict = "works" if low > CHANCE else "backwards" if high < CHANCE else "no"
            named = {column: value, "score": score, "verdict": verdict}
            entries.append(named | rounded(measured, 3) | counts)
    return entries


# --- probabilities -------------------------------------------------------------------------------


def logistic_line(odds: Floats, labels: Bools, weights: Floats) -> tuple[Floats, Floats]:
    """Intercept and slope of a logistic regression on one number, for every row of weights.

    Args:
        odds: (n,) log-odds.
        labels: (n,).
        weights: (B, n) how often each counts.

    Returns:
        (B,) each; NaN where a fit does not converge, as with one kind of label or separable ones.
    """
    intercept, slope = np.zeros((2, len(weights)))
    done = np.zeros(len(weights), np.bool_)
    for _ in range(40):
        chance = 1 / (1 + np.exp(-np.clip(intercept[:, None] + slope[:, None] * odds, -30, 30)))
        residual, curve = weights * (labels - chance), weights * chance * (1 - chance)
        g0, g1 = residual.sum(axis=1), residual @ odds
        h0, h1, h2 = curve.sum(axis=1), curve @ odds, curve @ odds**2
        determinant = h0 * h2 - h1**2
        usable = determinant > 1e-9
        safe = np.where(usable, determinant, 1.0)
        step0 = np.where(usable, (h2 * g0 - h1 * g1) / safe, 0.0)
        step1 = np.where(usable, (h0 * g1 - h1 * g0) / safe, 0.0)
        largest = np.maximum(np.abs(step0), np.abs(step1))
        shrink = np.minimum(1.0, 2.0 / np.maximum(largest, 1e-12))  # no leap out of a flat region
        intercept, slope = intercept + shrink * step0, slope + shrink * step1
        done = usable & (largest < 1e-6)
        if done.all():
            break
    return np.where(done, intercept, np.nan), np.where(done, slope, np.nan)


def losses(chance: Floats, labels: Bools) -> Floats:
    """(n,) log loss of each, in nats."""
    kept = np.clip(chance, 1e-6, 1 - 1e-6)
    return np.asarray(-np.log(np.where(labels, kept, 1 - kept)))


def calibration(
    table: pl.DataFrame, scores: Sequence[str], draws: int
) -> dict[str, dict[str, object]]:
    """How good probabilities of harm are: visible harm counts, as in what they were fitted to.

    ``log_loss_gain``: the loss of the sample's own base rate minus the loss, in nats an answer;
    above 0 is better than knowing how often harm comes and no more. Slope 1 and intercept 0 are a
    calibrated probability.
    """
    labels, prompts = table["harmed"].to_numpy().astype(np.bool_), codes(table, "prompt_id")
    drawn = resample_weights(int(prompts.max()) + 1, draws, seed=0)[:, prompts]
    all_weights = np.vstack([np.ones(len(labels)), drawn])
    total = all_weights.sum(axis=1)
    rate = all_weights @ labels / total
    base = losses(rate, np.ones(len(rate), np.bool_)) * rate
    base += losses(rate, np.zeros(len(rate), np.bool_)) * (1 - rate)
    found: dict[str, dict[str, object]] = {
        "base rate": {"value": round(float(rate[0]), 4), "log_loss": round(float(base[0]), 4)}
    }
    units = len(np.unique(prompts))

    def measured(values: Floats) -> dict[str, object]:
        own = float(values[0]) if np.isfinite(values[0]) else None
        return rounded(Measured(own, values[1:], units, None), 3)

    for score in scores:
        chance = table[score].to_numpy().astype(np.float64)
        odds = log_odds(chance)
        intercept, slope = logistic_line(odds, labels, all_weights)
        loss = all_weights @ losses(chance, labels) / total
        found[score] = {
            "mean": round(float(chance.mean()), 4),
            "log_loss": round(float(loss[0]), 4),
            "log_loss_gain": measured(base - loss),
            "slope": measured(slope),
            "intercept": measured(intercept),
        }
    return found


def from_few(table: pl.DataFrame, makers: Mapping[str, Maker]) -> list[dict[str, object]]:
    """Log loss on test prompts of probabilities that are made from a few of the other prompts.

    Args:
        table: answers.
        makers: by name: from the answers to the prompts drawn, as a mask, to the probabilities of
            all answers.

    Returns:
        By number of prompts and maker: mean, 10th and 90th percentile over draws of prompts. "base
        rate" stands for the share harmed among the prompts drawn, one more of either kind added;
        it takes the place of every maker where a draw lacks one of the kinds.
    """
    held_out = (table["split"] == "test").to_numpy()
    known = table.filter(~held_out)["prompt_id"].unique().sort().to_list()
    number = {prompt: place for place, prompt in enumerate(known)}
    place = np.array([number.get(prompt, len(known)) for prompt in table["prompt_id"]])
    labels = table["harmed"].to_numpy().astype(np.bool_)
    truth = labels[held_out]
    rng = np.random.default_rng(0)
    drawn = [rng.permutation(len(known)) for _ in range(PLATT_DRAWS)]
    entries: list[dict[str, object]] = []
    for count in (*PLATT_PROMPTS, len(known)):
        loss: dict[str, list[float]] = {name: [] for name in ("base rate", *makers)}
        for order in drawn if count < len(known) else drawn[:1]:
            mine = np.isin(place, order[:count])
            rate = (labels[mine].sum() + 1) / (mine.sum() + 2)
            constant = float(losses(np.full(len(truth), rate), truth).mean())
            loss["base rate"].append(constant)
            both = bool(labels[mine].any() and not labels[mine].all())
            for name, maker in makers.items():
                made = float(losses(maker(mine)[held_out], truth).mean()) if both else constant
                loss[name].append(made)
        for name, values in loss.items():
            low, high = np.quantile(values, [0.1, 0.9])
            entries.append(
                {"prompts": count, "score": name, "log_loss": round(float(np.mean(values)), 4)}
                | {"percentiles": [round(float(low), 4), round(float(high), 4)]}
            )
    return entries


def platt(odds: Floats, labels: Bools) -> Maker:
    """Platt's map of a score."""
    return lambda mask: fit_calibration_map(odds[mask], labels[mask], "platt").apply(odds)


def few_makers(answers: Answers, folder: Path, scores: Sequence[str]) -> dict[str, Maker]:
    """What `from_few` compares, with the model of harm of another run.

    Platt's map of the scores; of its P with the probes on the scale of the prompts drawn ("p
    rescaled by them"); and a logistic model of the same inputs, probes on that scale, the ratio and
    the expected rejections, fitted on the prompts drawn alone ("trained on them"; standardised, L2
    with C = 0.1, as the logistic models of 003).
    """
    labels = answers.table["harmed"].to_numpy().astype(np.bool_)
    harm = load_harm_model(folder / "models/harm_model.json")
    gate = parse_predictor(harm.gate, "the harm model's gate")
    rejections = answers.table["rejections"].to_numpy()
    ratios = answers.table["ratio"].cast(pl.Float64).to_numpy()
    probes, presses = answers.probes, answers.presses

    def rescaled(mask: Bools) -> Floats:
        scale = fit_probe_scale(probes[mask], presses[mask])
        own = gate.model_copy(update={"probe_scale": scale})
        scores = gate_scores(own, probes, presses, ratios).astype(np.float64)
        return platt(log_odds(harm.predict(rejections, scores)), labels)(mask)

    def trained(mask: Bools) -> Floats:
        ranks = fit_probe_scale(probes[mask], presses[mask]).ranks(probes, presses)
        known = np.where(np.isnan(ranks), 0.5, ranks).astype(np.float64)
        inputs = np.column_stack([known, ratios, np.log(rejections + LEAST_REJECTIONS)])
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        model.fit(inputs[mask], labels[mask])
        return np.asarray(model.predict_proba(inputs)[:, 1], dtype=np.float64)

    makers: dict[str, Maker] = {
        score: platt(_odds(answers.table, score), labels) for score in scores
    }
    return makers | {"p rescaled by them": rescaled, "trained on them": trained}


def _odds(table: pl.DataFrame, score: str) -> Floats:
    """What Platt's map reads: log-odds of probabilities, logarithm of rejections, entropy."""
    values = table[score].to_numpy().astype(np.float64)
    if score == "rejections":
        return np.asarray(np.log(values + LEAST_REJECTIONS))
    return values if score == "mean_entropy" else log_odds(values)


# --- both directions -----------------------------------------------------------------------------


def study(folder: Path, draws: int, large: Path) -> dict[str, object]:
    """Both directions; ``folder`` is the small model's run."""
    folders = {"small": folder, "large": large}
    found: dict[str, object] = {}
    for own, other in (("large", "small"), ("small", "large")):
        answers = load_answers(folders[own])
        for name in ("small", "large"):
            answers = add_scores(answers, folders[name], name)
        table = answers.table
        test = prompts_of(read_splits(folders[own] / "splits.parquet"), "test")
        transferred = [f"{score}, {other}{kind}" for score in PROBABILITIES for kind in SUFFIXES]
        at_home = [f"{score}, {own}" for score in PROBABILITIES]
        scores = [*UNTRAINED, *(f"{score}, {other}" for score in TRAINED)]
        scores += [f"{score}, {other} rescaled" for score in RESCALED]
        held_out = table.filter(pl.col("prompt_id").is_in(test))
        found[f"{other} to {own}"] = {
            "answers": table.height,
            **{label: int(table[label].sum()) for label in ("harmed", "silent_harm")},
            "prompts": table["prompt_id"].n_unique(),
            "test_prompts": held_out["prompt_id"].n_unique(),
            **(contrast(table, draws) if own == "large" else {}),
            "ranking": rank(table, own, other, draws),
            "by_task": by_part(table, scores, "task", draws),
            "by_press": by_part(table, scores, "press", draws),
            "calibration": {
                "all": calibration(table, transferred, draws),
                "test": calibration(held_out, [*transferred, *at_home], draws),
            },
            "from_few": from_few(
                table,
                few_makers(
                    answers,
                    folders[other],
                    [*(f"{score}, {other}" for score in PROBABILITIES), *UNTRAINED[:2]],
                ),
            ),
        }
    return found


if __name__ == "__main__":
    run(
        __doc__,
        "results/small_to_large",
        "small_to_large",
        study,
        large="results/silent_harm_2_bus",
    )
