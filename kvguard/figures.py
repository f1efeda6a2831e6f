"""The registry of figures: which function draws which tables, and the caption beside it.

The workflow reads it: a figure is drawn anew when its tables, its caption, its function or anything
that the function calls changes. Plot functions live in `plot_failures`, `plot_harm`,
`plot_predictor` and `plot_policies`, their common style in `plot_style`. This module imports none
of them until a figure is drawn.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure


class FigureEntry(NamedTuple):
    """One figure of a run."""

    module: str
    function: str  # takes the tables in order, and the arguments by name
    tables: tuple[str, ...]
    section: str  # of the report
    title: str
    caption: str
    arguments: tuple[str, ...] = ("presses",)  # of the run: see `draw_figure`
    fixed: Mapping[str, Any] = {}  # further arguments, built-ins only


FIGURES = {
    "rates": FigureEntry(
        "plot_failures",
        "plot_rates",
        ("condition_summary",),
        "Failures",
        "rates",
        "Accuracy against the reference answers, agreement with the uncompressed run's "
        "final answer, and catastrophic failure rate (looping, no end token, or amnesia) "
        "by press and share of cache entries removed. Bars are 95 % Wilson intervals over"
        " requests; the grey line and band are the same model uncompressed, which agrees "
        "with itself by definition. Presses are shifted sideways a little so that their "
        "bars do not hide each other. Answers that are missing count as wrong. All prompts of the "
        "run; nothing is fitted.",
    ),
    "harm": FigureEntry(
        "plot_harm",
        "plot_harm",
        ("harm",),
        "Harm",
        "harm by task and press",
        "Harmed requests by task, press and ratio: the uncompressed model answers rightly and the "
        "compressed one wrongly (filled), and the part of these that ended by themselves and do "
        "not loop, so that the finished text does not show the failure (open). For a task "
        "without right answers harm is a failure, or another final answer, where the uncompressed "
        "run did not fail. Shares of all prompts of the run with 95 % intervals (nothing is "
        "fitted); each title says how many the uncompressed model answers rightly.",
    ),
    "failure_kinds": FigureEntry(
        "plot_failures",
        "plot_failure_kinds",
        ("condition_summary",),
        "Failures",
        "kinds of failure",
        "Share of requests with each kind of failure, by press and ratio, with 95 % "
        "Wilson intervals. *Looping*: some window of tokens occurs again and again. *No "
        "end*: the token limit came before an end token. *Amnesia*: the uncompressed "
        "model, which still sees the whole prompt, finds a stretch of the text "
        "implausible; *divergence* is the same under a milder threshold, and no "
        "catastrophe by itself. *Another answer*: the final answer is not the "
        "uncompressed run's. The kinds overlap, so they do not add up. The grey line is "
        "the same model uncompressed, with its interval where it has one: amnesia, "
        "divergence and another answer compare with that run, so its own share is 0 by "
        "definition. All prompts of the run; nothing is fitted.",
    ),
    "excess": FigureEntry(
        "plot_failures",
        "plot_excess",
        ("excess",),
        "Failures",
        "excess failures",
        "What compression adds: for each press and ratio, the share of prompts that fail "
        "(filled) or are answered wrongly (open) under compression minus the share that "
        "do so uncompressed, on the same prompts. Intervals are 95 %, paired by prompt. A"
        " failure that the model has anyway cancels out; values below zero are prompts "
        "that compression happened to help. All prompts of the run; nothing is fitted.",
    ),
    "sensitivity": FigureEntry(
        "plot_failures",
        "plot_sensitivity",
        ("sensitivity",),
        "Failures",
        "sensitivity to the definitions",
        "The catastrophic failure rate when one parameter of the definitions changes and "
        "the others stay as configured (dotted line), with 95 % Wilson intervals. Nothing"
        " is generated again: the definitions are applied anew to the stored tokens. All prompts "
        "of the run; nothing is fitted.",
    ),
    "trace": FigureEntry(
        "plot_failures",
        "plot_example",
        ("timeline", "outcomes", "splits"),
        "Failures",
        "one answer",
        "One answer to a test prompt under compression, token by token: entropy of the next-token "
        "distribution, predicted hazard with the controller's two thresholds, the mode of"
        " a controller that only watches, and the log-likelihood ratio of each token "
        "between the compressed and the uncompressed model on the same prefix (above "
        "zero: compression likes the token more). Coloured tokens are those that the "
        "uncompressed model would not have chosen. Dashed lines mark the first of them "
        "and the onsets. The example is chosen by a fixed rule: a catastrophe whose alarm"
        " came earliest before its onset.",
        arguments=("presses", "operating_point"),
    ),
    "predictor": FigureEntry(
        "plot_predictor",
        "plot_predictor",
        ("predictor_curves",),
        "Predictor",
        "curves before onset",
        "The hazard predictor on test prompts, tokens before the onset only, one column "
        "per target: ROC, precision-recall and calibration curves, beside logistic "
        "regression on the same features and the entropy alone. Bands and bracketed "
        "intervals are 95 % bootstrap intervals that resample prompts. A target without a"
        " positive token among the test prompts has no curve.",
        arguments=(),
    ),
    "harm_metrics": FigureEntry(
        "plot_harm",
        "plot_harm_metrics",
        ("harm_metrics",),
        "Predictor",
        "what foresees harm",
        "How much better the hazard predictor foresees harm than a predictor that knows position, "
        "length and repetition alone (filled), and than the mean entropy (open): differences of "
        "AUROC on test prompts, paired by prompt, with 95 % intervals. Each metric compares "
        "requests after equally many tokens under one condition, so that a clock gets exactly 0.5. "
        "Right of 0 the predictor is better; an interval that includes 0 shows no difference.",
    ),
    "lead_time": FigureEntry(
        "plot_predictor",
        "plot_lead_time",
        ("lead_times",),
        "Predictor",
        "lead time",
        "How early alarms come on test prompts, as cumulative shares of all requests that"
        " go wrong, so a curve ends at the share that was ever alarmed. Left: tokens "
        "between the alarm and the onset. Right: tokens between the first token that the "
        "uncompressed model rejects and the alarm, which is what verify and rewind has to"
        " take back. Bands are 95 % Dvoretzky-Kiefer-Wolfowitz bounds; the number of "
        "requests is in brackets.",
    ),
    "harm_against_cost": FigureEntry(
        "plot_harm",
        "plot_harm_against_cost",
        ("policies",),
        "Guard",
        "harm against cost",
        "Harmed requests that each policy leaves against what it costs, one row a condition. Left: "
        "device memory over time (allocated bytes summed over model steps, checks included), as a "
        "multiple of the full KV cache's on the same prompts. Right: bytes of entries that cross "
        "between the device and where they are parked, as a multiple of what offloading the full "
        "KV cache moves, two layers of it on the device at a time (plus sign; counted). Live runs "
        "on test prompts; bars are 95 % intervals over prompts. The star is the full KV cache; in "
        "the shaded parts a policy costs more than never compressing, or moves more than "
        "offloading, and its mark is open. The dashed line, in a run that simulates policies, is "
        "the press without a policy at its measured ratios and between them, from the stored "
        "answers to the same prompts: a policy above it leaves more harm than a constant ratio of "
        "the same cost. Oracles know what no policy can know, and bound what any policy of their "
        "kind could reach. Down and left is better.",
        arguments=(),
    ),
    "harm_against_price": FigureEntry(
        "plot_harm",
        "plot_harm_against_price",
        ("price_certificate",),
        "Guard",
        "harm against the price",
        "What each price of harm leaves and costs, live on the calibration prompts that fitted "
        "nothing; requests that failed or could not be judged count as harmed. First row: all "
        "conditions mixed in equal shares, then each condition. Left: device memory over time, "
        "right: bytes of entries that cross between the device and where they are parked, means "
        "over calibration requests. Numbers name the price, in drafted tokens, and the pale line "
        "joins prices in the order of the tests. Lines upwards reach to the one-sided upper bound "
        "of each price alone. The horizontal lines are the levels that prices are tested against, "
        "from the highest price down until one is refused: a lower price is not certified then, "
        "even where its own bound lies below the line. Down and left is better.",
    ),
    "certificate": FigureEntry(
        "plot_harm",
        "plot_certificate",
        ("certificate",),
        "Guard",
        "certificate",
        "What the certificate is about, by task, press and ratio: the share of calibration "
        "requests that each operating point leaves harmed and not repaired, after each recovery, "
        "and the share that alarm. The operating points were chosen on these prompts, so the "
        "shares are in sample; the certificate's test allows for that. Lines reach to the exact "
        "upper bound of each share alone. Dotted: what is to be certified. A mark is filled where "
        "both statements are made, harm and alarms together; an open one is a refusal, of too much "
        "harm or of too few prompts.",
    ),
    "policies": FigureEntry(
        "plot_policies",
        "plot_policies",
        ("policies",),
        "Guard",
        "policies, live",
        "The live experiment: every policy on the same test prompts, with what it leaves "
        "(harmed and silently harmed requests, failures above the uncompressed run's) and what it "
        "costs (requests alarmed, device memory over time relative to the full KV cache, peak "
        "memory of the batch, tokens prefilled, seconds), per request with 95 % intervals over "
        "prompts. Lower is better in every panel. Colour and shape are the press, "
        "size is the ratio.",
    ),
    "simulation_gap": FigureEntry(
        "plot_policies",
        "plot_simulation_gap",
        ("policies",),
        "Guard",
        "simulation against live",
        "What the offline simulation of each policy predicts against what the live run "
        "measured, on the same test prompts. On the dotted line they agree. The largest gaps "
        "of each panel are named. Outcomes that no stored trace can tell are not "
        "simulated and have no point here.",
    ),
    "memory": FigureEntry(
        "plot_policies",
        "plot_memory",
        ("memory",),
        "Guard",
        "memory of one request",
        "Key-value memory that the request of one of the test prompts really has allocated at each "
        "decode step, under several policies. Shading shows the modes of the guard. The step "
        "upwards is the recovery: the cache that verified the draft is uncompressed and stays in "
        "use.",
        arguments=(),
    ),
}
"""Figures by the name of their file, in the order of the report."""


def draw_figure(name: str, tables: Mapping[str, "pl.DataFrame"], **arguments: Any) -> "Figure":
    """Draw one figure of the registry; without rows to show, a figure that says so.

    Args:
        name: a key of `FIGURES`.
        tables: at least those that the figure names.
        arguments: what figures may ask of a run: ``presses`` (names of all presses, for stable
            colours), ``operating_points`` (the controller's settings by name) and
            ``operating_point`` (the setting whose modes the timeline holds).

    Raises:
        MissingData: a table lacks a column that the figure needs.
    """
    entry = FIGURES[name]
    frames = [tables[table] for table in entry.tables]
    if all(frame.is_empty() for frame in frames):
        return _empty_figure(entry.title)
    plot = getattr(import_module(f"kvguard.{entry.module}"), entry.function)
    chosen = {argument: arguments[argument] for argument in entry.arguments}
    figure: Figure = plot(*frames, **chosen, **entry.fixed)
    return figure


def _empty_figure(title: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 1.5))
    figure.text(0.5, 0.5, f"{title}: no such request in this run", ha="center", va="center")
    return figure
