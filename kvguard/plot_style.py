"""The style of every figure: rcParams, colours and markers, labels that do not overlap."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from kvguard.config import BASELINE, POLICIES
from kvguard.schema import atomic_path

INK, GREY, FAINT, ACCENT = "#202020", "#707070", "#DADADA", "#AA3377"
"""Text and main line; secondary line; bands; rejected tokens and limits."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">")

WELL_KNOWN = {
    "snapkv": "SnapKV",
    "streaming_llm": "StreamingLLM",
    "expected_attention": "Expected attention",
    "observed_attention": "Observed attention",
    "knorm": "Knorm",
    "tova": "TOVA",
    "pyramidkv": "PyramidKV",
    "keydiff": "KeyDiff",
}

MODES = ("NORMAL", "ALERT", "SAFE")
MODE_COLOURS = ("#E8E8E8", "#EECC66", "#6699CC")
"""In the order of `controller.Mode`: 0, 1, 2."""

POLICY_LABELS = {name: entry.label for name, entry in POLICIES.items()}
"""Policies in the order of tables and legends."""

GUARD, ORACLE = "#0072B2", "#AA3377"

KINDS = {
    "looping": "looping",
    "non_termination": "no end",
    "amnesia": "amnesia",
    "divergence": "divergence",
    "disagreement": "another answer",
}
"""Kinds of failure and their titles; they overlap: a loop rarely ends."""

P = ParamSpec("P")

LineEnd = tuple[float, float, str, str]
"""Where a line ends (x, y of the data), the name that it gets there, and its colour."""


class MissingData(ValueError):
    """A frame that lacks columns or rows that a figure needs."""


class PressStyle(NamedTuple):
    """Colour and marker of one press in every figure."""

    label: str
    colour: str
    marker: str


def press_styles(presses: Iterable[str]) -> dict[str, PressStyle]:
    """Colours and markers by press, the baseline first; independent of the order given.

    Well-known presses keep their own colour; others take free ones in alphabetical order. After
    eight presses colours repeat with other markers.
    """
    names = set(presses) - {BASELINE}
    known = list(WELL_KNOWN)
    slots = {name: index for index, name in enumerate(known) if name in names}
    free = [index for index in range(len(COLOURS)) if index not in slots.values()]
    for index, name in enumerate(sorted(names - set(known))):
        slots[name] = free[index] if index < len(free) else len(COLOURS) + index - len(free)
    styles = {BASELINE: PressStyle("uncompressed", INK, "*")}
    for name, slot in slots.items():
        colour, marker = COLOURS[slot % len(COLOURS)], MARKERS[slot % len(MARKERS)]
        styles[name] = PressStyle(WELL_KNOWN.get(name, name), colour, marker)
    return styles


class PolicyStyle(NamedTuple):
    """Colour and marker of one policy in every figure."""

    label: str
    colour: str
    marker: str
    filled: bool


def policy_style(policy: str) -> PolicyStyle:
    """The guard's own policies are blue, rivals in warm and grey tones, oracles open and purple."""
    label = POLICY_LABELS.get(policy, policy)
    if policy in ("none", "always_safe"):
        return PolicyStyle(label, INK, "o" if policy == "none" else "*", True)
    if policy == "offload":
        return PolicyStyle(label, INK, "P", True)
    if policy == "shared_prefix":
        return PolicyStyle(label, INK, "H", True)
    alike = [name for name in POLICY_LABELS if _family(name) == _family(policy)]
    place = alike.index(policy) if policy in alike else len(alike)
    marker = MARKERS[place % len(MARKERS)]
    match _family(policy):
        case "guard":
            return PolicyStyle(label, GUARD, marker, True)
        case "oracle":
            return PolicyStyle(label, ORACLE, marker, False)
        case _:
            other = _RIVAL_MARKERS[place % len(_RIVAL_MARKERS)]
            return PolicyStyle(label, _RIVALS[place % len(_RIVALS)], other, True)


_RIVAL_MARKERS = ("D", "X", "v", "p", "<", ">", "^", "h", "d", "8")
"""Other places than in `MARKERS`: a rival may lie where a policy of the guard does."""
_RIVALS = ("#D55E00", "#E69F00", "#009E73", "#707070", "#999933", "#882255", "#A0522D")


def _family(policy: str) -> str:
    prefix = policy.split("_")[0]
    return (
        prefix if prefix in ("guard", "oracle", "none", "always", "offload", "shared") else "rival"
    )


def policy_order(policy: str) -> tuple[int, str]:
    """Key that sorts policies as `POLICY_LABELS` lists them, unknown ones behind by name."""
    names = list(POLICY_LABELS)
    return (names.index(policy) if policy in names else len(names), policy)


def conditions_in_order(
    rows: pl.DataFrame, styles: Mapping[str, PressStyle]
) -> list[tuple[str, str]]:
    """Distinct (press, ratio) of a table, presses in the order of their styles."""
    keys = set(zip(rows["press"], rows["ratio"], strict=True))
    return sorted(keys, key=lambda key: (list(styles).index(key[0]), key[1]))


def condition_label(condition: tuple[str, str], styles: Mapping[str, PressStyle]) -> str:
    """Press and ratio as an axis names them."""
    press, ratio = condition
    return f"{styles[press].label}  {float(ratio):g}"


def save_figure(figure: Figure, stem: str | Path) -> tuple[Path, Path]:
    """Write ``stem``.pdf and ``stem``.png, each all or nothing, without dates in them.

    Args:
        figure: what a plot function returned.
        stem: path without suffix; its folder is made.
    """
    stem = Path(stem)
    pdf, png = stem.with_name(f"{stem.name}.pdf"), stem.with_name(f"{stem.name}.png")
    without_dates: dict[str, dict[str, Any]] = {
        "pdf": {"CreationDate": None},
        "png": {"Software": None},
    }
    with matplotlib.rc_context(rc=rc_parameters()):
        for target in (pdf, png):
            suffix = target.suffix[1:]
            with atomic_path(target) as temporary:
                figure.savefig(temporary, format=suffix, metadata=without_dates[suffix])
    return pdf, png


@functools.cache
def rc_parameters() -> matplotlib.RcParams:
    """The parameters of the one plot style, ``kvguard/data/kvguard.mplstyle``."""
    with resources.as_file(resources.files("kvguard") / "data" / "kvguard.mplstyle") as path:
        return matplotlib.rc_params_from_file(path, use_default_template=False)


def styled(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorate a figure function so that it draws under the plot style."""

    @functools.wraps(function)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(rc=rc_parameters()):
            return function(*args, **kwargs)

    return drawn


DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (1, 2)), (0, (5, 1, 1, 1, 1, 1)))


def horizontal_interval(
    axes: Axes,
    row: Mapping[str, Any],
    metric: str,
    place: float,
    style: PressStyle,
    filled: bool = True,
    size: float | None = None,
    scale: float = 1.0,
) -> None:
    """One dot with its interval at the height ``place``; nothing where the value is null."""
    value, low, high = (row[f"{metric}{end}"] for end in ("", "_low", "_high"))
    if value is None:
        return
    reach = None if low is None or high is None else scale * interval_reach(value, low, high)
    axes.errorbar(
        [scale * value],
        [place],
        xerr=reach,
        color=style.colour,
        marker=style.marker,
        mfc=style.colour if filled else "white",
        mec=style.colour,
        ms=size,
        elinewidth=0.9,
        ls="none",
        label=metric,
    )


def stretches(values: pl.Series) -> list[tuple[int, int, int]]:
    """(start, stop, value) of each stretch of equal, known values; positions from 0."""
    runs = pl.DataFrame({"value": values}).with_row_index("at")
    runs = runs.with_columns(run=pl.col("value").rle_id()).drop_nulls("value")
    spans = runs.group_by("run", maintain_order=True).agg(
        start=pl.col("at").min(), stop=pl.col("at").max() + 1, value=pl.col("value").first()
    )
    return list(spans.select("start", "stop", "value").iter_rows())


def target_label(target: str) -> str:
    return "any catastrophe" if target == "any" else KINDS.get(target, target)


def label_points(axes: Axes, points: Sequence[LineEnd]) -> None:
    """Name points (x, y, text, colour) beside them, where the name meets the fewest other things.

    Greedy: each label in turn takes the best of a few places around its point.
    """
    figure = axes.get_figure(root=True)
    if not points or figure is None:
        return
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    at = axes.transData.transform([(x, y) for x, y, _, _ in points]) * scale  # (n, 2) in pt
    frame = np.asarray(axes.get_window_extent().extents) * scale
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in at]
    places = [(dx, dy, "left") for dx in (5,) for dy in (0, 7, -7, 14, -14, 21, -21)]
    places += [(-dx, dy, "right") for dx, dy, _ in places]
    for (x, y), (data_x, data_y, text, colour) in zip(at, points, strict=True):
        width = 3.4 * len(text)
        best: tuple[float, tuple[int, int, str], tuple[float, float, float, float]] | None = None
        for dx, dy, side in places:
            left = x + dx - (width if side == "right" else 0)
            box = (left, y + dy - 3.5, left + width, y + dy + 3.5)
            outside = max(frame[0] - box[0], box[2] - frame[2], box[3] - frame[3], 0)
            cost = sum(_overlap(box, other) for other in taken) + 8 * outside + abs(dy) / 2
            if best is None or cost < best[0]:
                best = cost, (dx, dy, side), box
        assert best is not None
        _, (dx, dy, side), box = best
        taken.append(box)
        axes.annotate(
            text,
            (data_x, data_y),
            xytext=(dx, dy),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=6,
            color=colour,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": colour, "shrinkA": 0, "shrinkB": 2}
            if dy
            else None,
        )


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    tall = min(one[3], other[3]) - max(one[1], other[1])
    return max(wide, 0) * max(tall, 0)


def need(frame: pl.DataFrame, columns: Iterable[str], figure: str) -> None:
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise MissingData(
            f"figure {figure!r} needs column {', '.join(map(repr, missing))}; the table has "
            f"{', '.join(frame.columns) or 'none'}"
        )
    if frame.is_empty():
        raise MissingData(f"figure {figure!r} needs at least one row; the table is empty")


def in_order(values: pl.Series, order: Iterable[str] = ()) -> list[str]:
    """Distinct values: in the given order, or as they first appear."""
    distinct = values.unique(maintain_order=True).to_list()
    ranks = {name: rank for rank, name in enumerate(order)}
    return sorted(distinct, key=lambda name: ranks[name]) if ranks else distinct


def floats(values: pl.Series) -> NDArray[np.float64]:
    """Values as float64, null as NaN."""
    return values.cast(pl.Float64).fill_null(math.nan).to_numpy()


def interval_reach(y: Any, low: Any, high: Any) -> NDArray[np.float64]:
    """Error bars (2, n) below and above y; rounding may put y a hair outside its interval."""
    below, above = np.atleast_1d(np.subtract(y, low)), np.atleast_1d(np.subtract(high, y))
    return np.maximum(np.array([below, above], dtype=np.float64), 0)


def count_text(counts: pl.Series) -> str:
    distinct = sorted(set(counts))
    return " to ".join(map(str, dict.fromkeys((distinct[0], distinct[-1]))))


def grouped_places(groups: Sequence[str]) -> list[float]:
    """Places 0, 1, ... with a gap of a half where the group changes."""
    places = [0.0]
    for previous, current in itertools.pairwise(groups):
        places.append(places[-1] + (1.0 if previous == current else 1.5))
    return places


def spaced(ticks: Sequence[float], least: float) -> list[float]:
    """Ticks at least that far apart, the last one always kept."""
    kept: list[float] = []
    for tick in reversed(ticks):
        if not kept or kept[-1] - tick >= least:
            kept.append(tick)
    return kept[::-1]


def beside(axes: Axes, y: float, text: str, colour: str) -> None:
    """Text right of the axes at the height y of the data."""
    axes.annotate(
        text,
        (1, y),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=6,
        color=colour,
        annotation_clip=False,
    )


def label_ends(axes: Axes, ends: Sequence[LineEnd]) -> None:
    """Name lines right of the axes at their ends, spread so that no names overlap.

    An end whose x is NaN gets its name at its height, without a leader to it.
    """
    if not ends:
        return
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout decides how tall the axes are
    points = axes.get_window_extent().height / figure.dpi * 72
    to_fraction = (axes.transData + axes.transAxes.inverted()).transform
    order = sorted(ends, key=lambda end: (end[1], end[2]))
    wanted = np.array([to_fraction((0, y))[1] for _, y, _, _ in order])
    leader = {"arrowstyle": "-", "lw": 0.5, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
    for (x, y, text, colour), height in zip(order, spread(wanted, 8.5 / points), strict=True):
        nowhere = math.isnan(x)
        axes.annotate(
            text,
            (1, height) if nowhere else (x, y),
            xycoords="axes fraction" if nowhere else "data",
            xytext=(1.06, height),
            textcoords="axes fraction",
            va="center",
            fontsize=6.5,
            color=colour,
            arrowprops=None if nowhere else leader | {"color": colour},
            annotation_clip=False,
        )


def spread(wanted: NDArray[np.float64], gap: float) -> NDArray[np.float64]:
    """Heights in ascending order, at least ``gap`` apart, as near the wanted ones as that allows.

    Least squares under the order is isotonic regression once each height's own gap is taken off.
    """
    steps = gap * np.arange(len(wanted))
    return np.asarray(isotonic_regression(wanted - steps).x + steps)
