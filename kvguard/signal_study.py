"""Which signals see silent harm: models of them compared on the same answers.

Two samples. ``test``: everything is fitted and chosen on train and calibration prompts, and read
on test prompts. ``crossfit``: every prompt is scored by models that never saw it, five folds over
all prompts, choices inside the other four; scores are ranks within the fold, and the intervals do
not include that a refit would differ. Both compare requests of one condition (model, press, ratio,
task) only; conditions weigh the same. Plan and definitions: docs/experiments/003-signals.md.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from kvguard.harm_metrics import Panel, build_panel, condition_groups, mean_over, measure_panel
from kvguard.metrics import Measured
from kvguard.paired_tests import holm
from kvguard.signal_answers import Answers, Bools, Floats, deal_folds
from kvguard.signal_models import (
    CLOCK,
    GATE_MODELS,
    TOKEN_MODELS,
    Scores,
    choose,
    fit_and_score,
    out_of_fold,
    ranks_within,
)
from kvguard.train import Models
from kvguard.trainer import Refusal

logger = logging.getLogger(__name__)

TARGET = "harm"
ANSWER = "request_any_time"
TOKEN_METRICS = (ANSWER, "request_end", "request", "same_position", "within_prompt")
"""Metrics of scores per token, see `harm_metrics`; ``request_end``: each answer at its own end."""

GOALS = {("token", ANSWER): 0.95, ("first token", ANSWER): 0.85}
"""Goals of the mean over all conditions."""

SELECTED, SELECTED_GATE = "selected", "selected_gate"
FIXED_GATE = "gate_logistic_normalised"
"""Beside what is chosen: one gate for all presses, which can score a press that it never saw."""

MODEL_NAMES = (*TOKEN_MODELS, *GATE_MODELS)
"""Every model that the study can fit."""

SCORE_TYPES: dict[str, Any] = (
    dict.fromkeys(("sample", "moment", "score", "metric"), pl.String)
    | dict.fromkeys(("task", "model", "press", "ratio"), pl.String)
    | dict.fromkeys(("value", "low", "high", "goal"), pl.Float64)
    | dict.fromkeys(("conditions", "prompts", "requests", "silent"), pl.Int64)
    | {"is": pl.String}
)
TEST_TYPES: dict[str, Any] = dict.fromkeys(
    ("family", "sample", "metric", "score", "other"), pl.String
) | dict.fromkeys(("difference", "low", "high", "p_value", "p_adjusted", "goal"), pl.Float64)
TRANSFER_TYPES: dict[str, Any] = dict.fromkeys(
    ("sample", "left_out", "value_left_out", "score", "is", "reason"), pl.String
) | dict.fromkeys(
    ("value", "low", "high", "with_it", "difference", "difference_low", "difference_high"),
    pl.Float64,
)


class Sample(NamedTuple):
    """Requests on which scores are compared.

    ``everyone``: (all requests,) those of its prompts; ``requests``: those that are ranked;
    ``panel`` is theirs, ``single`` the same for one score a request. ``scores``: by name, of all
    tokens; ``gates``: of all requests; ``chosen``: what stands behind chosen scores, as text.
    """

    name: str
    everyone: Bools
    requests: Bools
    panel: Panel
    single: Panel
    scores: dict[str, Scores]
    gates: dict[str, Scores]
    chosen: dict[str, str]


class Choice(NamedTuple):
    """Models chosen on the fit prompts, and their scores of those prompts, out of fold."""

    models: dict[str, str]  # SELECTED, SELECTED_GATE -> name of a model
    out_of_fold: dict[str, Scores]  # log-odds, by SELECTED, SELECTED_GATE


class Study(NamedTuple):
    """Samples by name, and the choice behind the test sample."""

    answers: Answers
    samples: list[Sample]
    choice: Choice


def build_study(
    answers: Answers,
    splits: pl.DataFrame,
    *,
    models: Models | None = None,
    names: Sequence[str] = MODEL_NAMES,
    folds: int = 5,
    inner_folds: int = 3,
    choice_folds: int = 4,
    bootstrap_samples: int = 2000,
    seed: int = 0,
) -> Study:
    """Fit every model, choose, and score both samples.

    Args:
        answers: of `load_answers`.
        splits: `schema.SPLITS`.
        models: trained by the run; None leaves their scores out.
        names: what to fit, of `MODEL_NAMES`; what is chosen is chosen among these.
        folds: of ``crossfit``.
        inner_folds: of a choice inside it.
        choice_folds: of the choice on train and calibration prompts.
        bootstrap_samples: resamples of prompts.
        seed: of models and resamples.
    """
    split_of = dict(splits.select("prompt_id", "split").iter_rows())
    test = np.array([split_of[prompt] == "test" for prompt in answers.prompts.tolist()])
    fitted, everyone = ~test, np.ones(len(test), np.bool_)
    plain, plain_gates = _unfitted(answers)

    def quality(scores: Scores, requests: Bools, gate: bool) -> float | None:
        requests = requests & answers.ranked
        panel = _panel(answers, requests, splits, 1, seed)
        found = _measure(_single(panel) if gate else panel, _of(answers, scores, requests, gate))
        return mean_over(panel, found[ANSWER], np.unique(panel.condition)).value

    def chosen_of(requests: Bools, count: int) -> tuple[dict[str, str], dict[str, float]]:
        among = {
            SELECTED: [name for name in names if name in TOKEN_MODELS and name != CLOCK],
            SELECTED_GATE: [name for name in names if name in GATE_MODELS],
        }
        best: dict[str, str] = {}
        qualities: dict[str, float] = {}
        for role, candidates in among.items():
            one, values = choose(candidates, answers, requests, splits, count, seed, quality)
            qualities |= values
            if one is not None:
                best[role] = one
        return best, qualities

    # train and calibration prompts fit and choose, test prompts are scored
    scores, gates = dict(plain), dict(plain_gates)
    for name in names:
        try:
            made = fit_and_score(name, answers, fitted, seed)
        except Refusal as refusal:
            logger.warning("%s", refusal)
            continue
        (gates if name in GATE_MODELS else scores)[name] = made
    roles, qualities = chosen_of(fitted, choice_folds)
    roles |= _without_gru(qualities)
    _add_chosen(scores, gates, roles)
    apart = [roles[role] for role in (SELECTED, SELECTED_GATE) if role in roles]
    held_out = out_of_fold(apart, answers, fitted, splits, choice_folds, seed, ranked=False)
    choice = Choice(
        {role: name for role, name in roles.items() if role in (SELECTED, SELECTED_GATE)},
        {role: held_out[name] for role, name in roles.items() if name in held_out},
    )
    own = _run_scores(answers, models)
    samples = [
        _sample("test", answers, test, splits, bootstrap_samples, seed)._replace(
            scores=scores | own[0], gates=gates | own[1], chosen=roles
        )
    ]
    samples.append(
        _crossfit(
            _sample("crossfit", answers, everyone, splits, bootstrap_samples, seed),
            answers,
            splits,
            (plain, plain_gates),
            names,
            folds,
            lambda requests: _with_others(chosen_of(requests, inner_folds)),
            seed,
        )
    )
    return Study(answers, samples, choice)


def _with_others(found: tuple[dict[str, str], dict[str, float]]) -> dict[str, str]:
    return found[0] | _without_gru(found[1])


BEST_OTHER = "best other than gru"


def _without_gru(qualities: Mapping[str, float]) -> dict[str, str]:
    others = {name: value for name, value in qualities.items() if name in TOKEN_MODELS}
    others.pop("gru", None)
    return {BEST_OTHER: max(others, key=lambda name: others[name])} if others else {}


def _add_chosen(
    scores: dict[str, Scores], gates: dict[str, Scores], roles: Mapping[str, str]
) -> None:
    for role, name in roles.items():
        target = gates if name in GATE_MODELS else scores
        if name in target:
            target[role] = target[name]


def _crossfit(
    sample: Sample,
    answers: Answers,
    splits: pl.DataFrame,
    plain: tuple[dict[str, Scores], dict[str, Scores]],
    names: Sequence[str],
    folds: int,
    chosen_of: Any,
    seed: int,
) -> Sample:
    """Every prompt scored by models that never saw it, and chosen without it."""
    try:
        found = out_of_fold(names, answers, sample.everyone, splits, folds, seed)
    except Refusal as refusal:
        logger.warning("no crossfit: %s", refusal)
        found = {}
    scores = {name: value for name, value in found.items() if name in TOKEN_MODELS}
    gates = {name: value for name, value in found.items() if name in GATE_MODELS}
    behind: dict[str, list[str]] = {}
    if found:
        dealt = _dealt(answers, splits, folds)
        for number in range(folds):
            for role, name in chosen_of(dealt != number).items():
                gate = name in GATE_MODELS
                target = gates if gate else scores
                if name not in target:
                    continue
                inside = dealt == number if gate else (dealt == number)[answers.owner]
                role_scores = target.setdefault(role, np.full(len(inside), np.nan))
                role_scores[inside] = target[name][inside]
                behind.setdefault(role, []).append(name)
    chosen = {role: ", ".join(names) for role, names in behind.items()}
    return sample._replace(scores=plain[0] | scores, gates=plain[1] | gates, chosen=chosen)


def _dealt(answers: Answers, splits: pl.DataFrame, folds: int) -> NDArray[np.int64]:
    """(requests,) fold of each, as `signal_models.out_of_fold` deals all prompts."""
    mine = splits.filter(pl.col("prompt_id").is_in(np.unique(answers.prompts).tolist()))
    fold = deal_folds(mine, folds, f"signals {folds}")
    return np.array([fold[prompt] for prompt in answers.prompts.tolist()])


def _unfitted(answers: Answers) -> tuple[dict[str, Scores], dict[str, Scores]]:
    llr = np.nan_to_num(answers.llr)
    starts = np.repeat(np.cumsum(llr)[answers.first] - llr[answers.first], answers.lengths)
    position = np.arange(len(llr)) - np.repeat(answers.first, answers.lengths)
    scores = {
        "mean_entropy": answers.column("entropy_mean").astype(np.float64),
        "oracle_llr": (np.cumsum(llr) - starts) / (position + 1),
    }
    mass = answers.column("evicted_mass_mean")[answers.first].astype(np.float64)
    return scores, {"evicted_mass_mean": mass}


def _run_scores(
    answers: Answers, models: Models | None
) -> tuple[dict[str, Scores], dict[str, Scores]]:
    """Scores of the predictors that the run trained, where they forecast harm."""
    scores: dict[str, Scores] = {}
    gates: dict[str, Scores] = {}
    if models is None:
        return scores, gates
    press = answers.rows.keys["press"].to_numpy()
    trained = {"hazard": models.predictors.get(TARGET)} | {
        kind: by_target.get(TARGET) for kind, by_target in models.baselines.items()
    }
    for kind in ("hazard", "sequence", "boosted", "logistic", CLOCK, "gate"):
        model = trained.get(kind)
        if model is None or model.kind == "rules":
            continue
        values = model.log_odds(answers.rows.features, press)
        if kind == "gate":
            gates["run: gate"] = values[answers.first]
        else:
            scores[f"run: {kind}"] = values
    return scores, gates


# --- measuring -----------------------------------------------------------------------------------


def _panel(
    answers: Answers, requests: Bools, splits: pl.DataFrame, samples: int, seed: int
) -> Panel:
    rows = answers.rows.take(requests[answers.owner])
    return build_panel(rows, TARGET, splits, samples, seed)


def _single(panel: Panel) -> Panel:
    """The panel with one score a request, in the order of its table."""
    count = len(panel.table)
    nothing = np.zeros((count, 1), np.bool_)
    return panel._replace(
        cells=np.arange(count),
        place=np.stack([np.arange(count), np.zeros(count, np.int64)]),
        positive=nothing,
        at_risk=~nothing,
        lengths=np.ones(count, np.int64),
    )


def _sample(
    name: str, answers: Answers, requests: Bools, splits: pl.DataFrame, samples: int, seed: int
) -> Sample:
    ranked = requests & answers.ranked
    panel = _panel(answers, ranked, splits, samples, seed)
    return Sample(name, requests, ranked, panel, _single(panel), {}, {}, {})


def _of(answers: Answers, scores: Scores, requests: Bools, gate: bool) -> Floats:
    """Scores of some requests; what a model cannot say ranks below everything it can."""
    own = scores[requests] if gate else scores[requests[answers.owner]]
    lowest = np.nanmin(own, initial=0.0) - 1
    return np.where(np.isnan(own), lowest, own)


def _measure(panel: Panel, scores: Floats, running: bool = True) -> dict[str, dict[int, Measured]]:
    return measure_panel(panel, scores, running=running)


MeasuredScores = dict[str, dict[str, dict[int, Measured]]]
"""Score -> metric -> condition code -> what was measured."""


def measure_sample(sample: Sample, answers: Answers) -> MeasuredScores:
    """Every score's metrics by condition.

    Token scores have `TOKEN_METRICS`, gates the metric ``request_any_time`` alone.
    """
    found: dict[str, dict[str, dict[int, Measured]]] = {}
    lengths = answers.lengths[sample.requests]
    last = np.cumsum(lengths) - 1
    for name, scores in sample.scores.items():
        own = _of(answers, scores, sample.requests, gate=False)
        running = not name.startswith("run: ")  # hazards are averaged, running scores are not
        measured = _measure(sample.panel, own, running)
        end = own[last]
        if not running:
            first = last - lengths + 1
            end = np.add.reduceat(own, first) / lengths
        measured["request_end"] = _measure(sample.single, end)[ANSWER]
        found[name] = {metric: measured[metric] for metric in TOKEN_METRICS}
    for name, scores in sample.gates.items():
        own = _of(answers, scores, sample.requests, gate=True)
        found[name] = {ANSWER: _measure(sample.single, own)[ANSWER]}
    return found


def score_table(study: Study, measured: Mapping[str, MeasuredScores]) -> pl.DataFrame:
    """Every score in every sample: AUROC with its 95 % interval over prompts, by group.

    ``moment``: "token" or "first token". ``goal``: of the mean over all conditions, where there is
    one. ``is``: the model behind a chosen score. ``measured``: by sample, of `measure_sample`.
    """
    rows = []
    for sample in study.samples:
        panel = sample.panel
        for group, conditions in condition_groups(panel):
            inside = np.isin(panel.condition, conditions)
            pooled = not any(group.values())
            size = {
                "prompts": panel.table.filter(inside)["prompt_id"].n_unique(),
                "requests": int(inside.sum()),
                "silent": int((inside & panel.harmed).sum()),
            }
            for name, metrics in measured[sample.name].items():
                moment = "first token" if name in sample.gates else "token"
                for metric, found in metrics.items():
                    mean = mean_over(panel, found, conditions)
                    low, high = mean.interval()
                    rows.append(
                        {"sample": sample.name, "moment": moment, "score": name, "metric": metric}
                        | group
                        | {"value": mean.value, "low": low, "high": high}
                        | {"goal": GOALS.get((moment, metric)) if pooled else None}
                        | {"conditions": len(set(conditions.tolist()) & set(found))}
                        | size
                        | {"is": sample.chosen.get(name)}
                    )
    return pl.DataFrame(rows, schema=SCORE_TYPES)


# --- tests ---------------------------------------------------------------------------------------

FAMILIES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "A": ((SELECTED, "mean_entropy", ANSWER), (SELECTED, CLOCK, "same_position")),
    "B": (
        ("gate_logistic_normalised", "gate_logistic_raw", ANSWER),
        ("trees_normalised", "trees_probes", ANSWER),
        ("gru", BEST_OTHER, ANSWER),
    ),
}
"""(score, other, metric) of each family of tests; the second of A has a goal of 0.15."""

CLOCK_GOAL = 0.15


def p_value(difference: Measured) -> float | None:
    """Two-sided p-value of "no difference": the one that its symmetric interval belongs to."""
    drawn = difference.replicates[np.isfinite(difference.replicates)]
    if difference.value is None or difference.units < 3 or not len(drawn):
        return None
    error = float(drawn.std()) * np.sqrt(difference.units / (difference.units - 1))
    if error < 1e-12:
        return 1.0 if abs(difference.value) < 1e-12 else None
    return float(2 * stats.t.sf(abs(difference.value) / error, difference.units - 1))


def difference_table(study: Study, measured: Mapping[str, MeasuredScores]) -> pl.DataFrame:
    """Differences between scores, Holm-adjusted within family and sample.

    Beside the two families stand, without a p-value, all scores minus `CLOCK` at the same position.
    """
    rows: list[dict[str, Any]] = []
    for sample in study.samples:
        found = measured[sample.name]
        for family, tests in FAMILIES.items():
            differences = [_difference(sample.panel, found, *test) for test in tests]
            values = [None if one is None else p_value(one) for one in differences]
            for test, one, raw, adjusted in zip(
                tests, differences, values, holm(values), strict=True
            ):
                rows.append(
                    _test_row(family, sample.name, test, one)
                    | {"p_value": raw, "p_adjusted": adjusted}
                )
        for name in sample.scores:
            if name != CLOCK:
                test = (name, CLOCK, "same_position")
                apart = _difference(sample.panel, found, *test)
                rows.append(_test_row("-", sample.name, test, apart))
    return pl.DataFrame(rows, schema=TEST_TYPES)


def _difference(
    panel: Panel, found: MeasuredScores, one: str, other: str, metric: str
) -> Measured | None:
    """One score's mean over conditions minus another's; None: a score is missing."""
    if one not in found or other not in found:
        return None
    everywhere = np.unique(panel.condition)
    first, second = (mean_over(panel, found[name][metric], everywhere) for name in (one, other))
    return first.minus(second)


def _test_row(
    family: str, sample: str, test: tuple[str, str, str], found: Measured | None
) -> dict[str, Any]:
    low, high = (None, None) if found is None else found.interval()
    score, other, metric = test
    return {
        "family": family,
        "sample": sample,
        "metric": metric,
        "score": score,
        "other": other,
        "difference": None if found is None else found.value,
        "low": low,
        "high": high,
        "p_value": None,
        "p_adjusted": None,
        "goal": CLOCK_GOAL if other == CLOCK else None,
    }


# --- transfer ------------------------------------------------------------------------------------


def transfer_table(
    study: Study, splits: pl.DataFrame, *, folds: int = 5, seed: int = 0
) -> pl.DataFrame:
    """The chosen models refitted without one task, or one press, and read on it.

    The choice itself saw all of them. A press that is left out still has a scale: its probes need
    no outcome. ``with_it``: the same model fitted on everything else; ``difference``: left out
    minus that.
    """
    answers, choice = study.answers, study.choice
    rows: list[dict[str, Any]] = []
    dealt = _dealt(answers, splits, folds)
    for sample in study.samples:
        for role, name in (choice.models | {"fixed gate": FIXED_GATE}).items():
            gate = name in GATE_MODELS
            panel = sample.single if gate else sample.panel
            whole = (sample.gates if gate else sample.scores).get(name)
            for column in ("task", "press"):
                values = answers.table[column].drop_nulls().unique().sort().to_list()
                for value in values:
                    described = {
                        "sample": sample.name,
                        "left_out": column,
                        "value_left_out": value,
                        "score": role,
                        "is": name,
                    }
                    mine = (answers.table[column] == value).to_numpy()
                    scores = _left_out(study, sample, name, mine, dealt, folds, seed)
                    if len(values) == 1:
                        scores = f"{value} is the only {column}"
                    if isinstance(scores, str):
                        rows.append(described | {"reason": scores})
                        continue
                    at = np.unique(panel.condition[mine[sample.requests]])
                    found = _measure(panel, _of(answers, scores, sample.requests, gate))[ANSWER]
                    mean = mean_over(panel, found, at)
                    row = described | {"value": mean.value, "reason": None}
                    row |= dict(zip(("low", "high"), mean.interval(), strict=True))
                    if whole is not None:
                        other = _measure(panel, _of(answers, whole, sample.requests, gate))[ANSWER]
                        reference = mean_over(panel, other, at)
                        paired = mean.minus(reference)
                        low, high = paired.interval()
                        row |= {"with_it": reference.value, "difference": paired.value}
                        row |= {"difference_low": low, "difference_high": high}
                    rows.append(row)
    return pl.DataFrame(rows, schema=TRANSFER_TYPES)


def _left_out(
    study: Study,
    sample: Sample,
    name: str,
    mine: Bools,
    dealt: NDArray[np.int64],
    folds: int,
    seed: int,
) -> Scores | str:
    """Scores of the requests ``mine`` by models fitted without them; why not, in words."""
    answers = study.answers
    gate = name in GATE_MODELS
    size = len(answers.lengths) if gate else len(answers.rows.features)
    scores = np.full(size, np.nan)
    parts: Sequence[tuple[Bools, Bools]]
    if sample.name == "test":
        parts = [(~sample.everyone & ~mine, sample.everyone & mine)]
    else:
        parts = [((dealt != k) & ~mine, (dealt == k) & mine) for k in range(folds)]
    try:
        for fitted, read in parts:
            made = fit_and_score(name, answers, fitted, seed)
            inside = read if gate else read[answers.owner]
            scores[inside] = ranks_within(made[inside]) if len(parts) > 1 else made[inside]
    except Refusal as refusal:
        return str(refusal)
    read = sample.requests & mine
    if np.isnan(scores[read if gate else read[answers.owner]]).all():
        return f"{name} needs outcomes of what is left out"
    return scores
