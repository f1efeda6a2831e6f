"""Figures show the numbers of their frames, refuse frames that lack some, and are written whole."""

import importlib
import inspect
import itertools
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.container import ErrorbarContainer
from synthetic import make_run, write_run

from kvguard import plot_failures, plot_harm, plot_policies, plot_predictor, schema
from kvguard.compare_policies import summarize_runs
from kvguard.config import OperatingPoint, load_config
from kvguard.database import build_database, condition_summary, read_view
from kvguard.evaluate_controller import Frames, simulate_model
from kvguard.figures import FIGURES, draw_figure
from kvguard.plot_style import (
    KINDS,
    POLICY_LABELS,
    WELL_KNOWN,
    MissingData,
    policy_style,
    press_styles,
    save_figure,
    spread,
)

PRESSES = ("snapkv", "streaming_llm", "expected_attention")
RATIOS = ("0.500", "0.750")
RATES = ("accuracy", "agreement", "cfr", *KINDS)


def interval(value, reach=0.1):
    return {"": value, "_low": max(value - reach, 0.0), "_high": min(value + reach, 1.0)}


def summary(models=("tiny",), presses=PRESSES, ratios=RATIOS, requests=24):
    rows = []
    conditions = [("none", "0.000"), *itertools.product(presses, ratios)]
    for model, (number, (press, ratio)) in itertools.product(models, enumerate(conditions)):
        row = {"model": model, "press": press, "ratio": ratio, "requests": requests}
        row["prompts"] = requests
        for place, metric in enumerate((*RATES, "excess_cfr", "excess_error")):
            value = (7 * number + 3 * place) % 20 / 20
            row |= {f"{metric}{end}": number for end, number in interval(value).items()}
        rows.append(row)
    return pl.DataFrame(rows)


def only(count, *metrics):
    """The summary's keys, its count and some of its metrics with their intervals."""
    intervals = [f"{metric}{end}" for metric in metrics for end in ("", "_low", "_high")]
    return summary().select("model", "press", "ratio", count, *intervals)


def timeline(length, press="snapkv"):
    rng = np.random.default_rng(length)
    return pl.DataFrame(
        {
            "position": range(length),
            "token_text": [f" word{n}" if n % 7 else " $5\n" for n in range(length)],
            "entropy": rng.uniform(0, 3, length),
            "hazard": rng.uniform(0, 1, length),
            "mode": np.minimum(np.arange(length) * 3 // max(length, 1), 2),
            "llr": rng.normal(0, 0.3, length),
            "audit_is_argmax": np.arange(length) % 5 != 3,
        },
        schema_overrides={"mode": pl.Int8},
    )


def curves(targets=("any", "looping")):
    rows = []
    kinds = ("roc", "precision_recall", "calibration")
    for target, predictor, kind in itertools.product(targets, plot_predictor._PREDICTORS, kinds):
        for x in np.linspace(0, 1, 5):
            rows.append(
                {
                    "target": target,
                    "predictor": predictor,
                    "curve": kind,
                    "x": x,
                    "y": math.sqrt(x),
                    "y_low": max(math.sqrt(x) - 0.1, 0),
                    "y_high": min(math.sqrt(x) + 0.1, 1),
                    "score": 0.8125,
                    "score_low": 0.7,
                    "score_high": 0.9,
                }
            )
    return pl.DataFrame(rows)


def alarms(presses=PRESSES, targets=("any",)):
    return pl.DataFrame(
        [
            {
                "target": target,
                "press": press,
                "lead_time_tokens": lead,
                "detection_delay_tokens": delay,
            }
            for target in targets
            for press in presses
            for lead, delay in ((10, 3), (-4, 9), (None, None), (2, None))
        ]
    )


def sensitivity(models=("tiny",)):
    return pl.DataFrame(
        [
            {
                "parameter": parameter,
                "value": float(value),
                "configured": value == values[1],
                "model": model,
                "press": press,
                "ratio": ratio,
                "cfr": 0.1 * place,
                "cfr_low": 0.05 * place,
                "cfr_high": 0.2 * place,
            }
            for model in models
            for parameter, values in (("amnesia_llr", (0.5, 1)), ("loop_repeats", (2, 3, 4)))
            for place, value in enumerate(values)
            for press, ratio in (("none", "0.000"), *itertools.product(PRESSES, RATIOS))
        ]
    )


def memory():
    rows = []
    for policy in ("none", "guard_promote"):
        for step in range(6):
            mode = None if policy == "none" else (0, 0, 1, 2, 2, 2)[step]
            size = 2**20 * (4 if mode == 2 else 1) + step * 1000
            rows.append({"policy": policy, "step": step, "kv_bytes": size, "mode": mode})
    return pl.DataFrame(rows, schema_overrides={"mode": pl.Int8})


def policies(names=("none", "guard_promote", "verify_all"), presses=PRESSES, ratios=RATIOS):
    rows = []
    for name, press, ratio in itertools.product(names, presses, ratios):
        row = {"policy": name, "model": "tiny", "press": press, "ratio": ratio, "requests": 6}
        row["source"] = "live"
        for place, metric in enumerate(plot_policies.POLICY_METRICS):
            value = 0.1 * (place + names.index(name)) * float(ratio)
            row |= {f"{metric}{end}": number for end, number in interval(value, 0.05).items()}
        rows.append(row)
    return pl.DataFrame(rows)


def both_sources():
    simulated = policies().with_columns(
        pl.col("^harmed.*$") + 0.05,
        device_bytes_peak=pl.when(pl.col("policy") != "verify_all").then("device_bytes_peak"),
    )
    return pl.concat(
        [
            frame.with_columns(source=pl.lit(source))
            for source, frame in (("live", policies()), ("simulation", simulated))
        ]
    ).drop("requests")


POINTS = {"balanced": OperatingPoint(tau_low=0.2, tau_high=0.5, k=2, j=8)}


def with_interval(name, value, reach):
    if value is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: value, f"{name}_low": value - reach, f"{name}_high": value + reach}


def harm(tasks=("recall", "copy")):
    rows = []
    conditions = [("none", "0.000"), *itertools.product(PRESSES, RATIOS)]
    for task, (number, (press, ratio)) in itertools.product(tasks, enumerate(conditions)):
        keys = {"task": task, "model": "tiny", "press": press, "ratio": ratio}
        counts = {"requests": 40, "baseline_right": 35 if task == "recall" else None}
        shares = with_interval("harmed", 0.1 * number, 0.05)
        rows.append(keys | counts | shares | with_interval("silent_harm", 0.05 * number, 0.02))
    return pl.DataFrame(rows)


def harm_metrics():
    rows = []
    for metric, compared in itertools.product(plot_harm.HARM_METRICS, plot_harm.COMPARED):
        for number, press in enumerate([None, *PRESSES]):
            keys = {"metric": metric, "press": press, "ratio": None, "task": None}
            keys |= {"target": "harm", "predictor": "hazard", "compared_with": compared}
            rows.append(keys | with_interval("difference", 0.05 * number - 0.1, 0.1))
            rows.append(rows[-1] | {"ratio": "0.500", "task": "recall"})
            rows.append(rows[-2] | {"predictor": "entropy"})
    return pl.DataFrame(rows, schema_overrides={"ratio": pl.String, "task": pl.String})


def certificate(tasks=("recall", "copy")):
    """Every prompt is one request; nothing of 20 goes wrong at the conservative point."""
    rows = []
    keys = itertools.product(
        tasks, PRESSES, RATIOS, ("promote", "continue"), plot_harm.POINT_MARKERS
    )
    for task, press, ratio, recovery, point in keys:
        for risk, alpha in (("harm_left", 0.2), ("alarm", 0.5), ("missed_harm", 0.5)):
            row = {"model": "tiny", "task": task, "press": press, "ratio": ratio, "risk": risk}
            row |= {"recovery": recovery, "operating_point": point, "alpha": alpha}
            row |= {"observed": 0.1 * list(plot_harm.POINT_MARKERS).index(point), "units": 20}
            row |= {"requests": 20, "delta": 0.1, "certified": point == "conservative"}
            rows.append(row)
    return pl.DataFrame(rows)


COST_OF = {"none": 0.4, "always_safe": 1.0, "guard": 0.7, "guard_promote": 1.4, "oracle_gate": 0.5}
TRAFFIC_OF = {"none": 0.0, "always_safe": 0.0, "guard": 1.2, "guard_promote": 0.3}


def costs():
    rows = []
    for (policy, cost), ratio in itertools.product(COST_OF.items(), RATIOS):
        keys = {"policy": policy, "model": "tiny", "press": "snapkv", "ratio": ratio}
        keys["source"] = "simulation" if policy.startswith("oracle") else "live"
        harmed = with_interval("harmed", 0.5 - cost / 3, 0.1)
        moved = with_interval("relative_bus_traffic", TRAFFIC_OF.get(policy), 0.1)
        rows.append(keys | harmed | with_interval("relative_byte_steps", cost, 0.1) | moved)
        if policy == "none":  # the stored answers, from which the line of constant ratios is made
            rows.append(rows[-1] | {"source": "simulation", "harmed": 0.4 * float(ratio)})
            rows[-1] |= with_interval("relative_byte_steps", 1 - float(ratio), 0.1)
    return pl.DataFrame(rows)


def draw_trace(tokens):
    return plot_failures.plot_trace(
        tokens,
        press="snapkv",
        title="snapkv 0.75: costs $5 or $6",
        marks={"first rejected": 1, "looping": 2, "amnesia": None},
        thresholds=(0.2, 0.5),
    )


def prices(levels=(0.1, 0.05)):
    """Two prices of 100 prompts: mixed conditions, and one alone; the lower one saves traffic."""
    rows = []
    for press, level in itertools.product((None, "snapkv"), levels):
        for price, observed, moved in ((300.0, 0.0, 9e6), (100.0, 0.02, 6e6)):
            row = {"model": "tiny", "press": press, "ratio": press and "0.500", "level": level}
            row |= {"harm_price": price, "observed": observed, "units": 100, "delta": 0.05}
            row |= {"requests": 100 if press else 300, "certified": level == 0.1 or price == 300}
            rows.append(row | {"device_byte_steps": 2.5e7, "bytes_moved": moved})
    return pl.DataFrame(rows, schema_overrides={"press": pl.String, "ratio": pl.String})


DRAWN = {
    "rates": (plot_failures.plot_rates, lambda: only("requests", "accuracy", "agreement", "cfr")),
    "failure_kinds": (plot_failures.plot_failure_kinds, lambda: only("requests", *KINDS)),
    "excess": (plot_failures.plot_excess, lambda: only("prompts", "excess_cfr", "excess_error")),
    "trace": (draw_trace, lambda: timeline(20)),
    "predictor": (plot_predictor.plot_predictor, curves),
    "lead_time": (plot_predictor.plot_lead_time, alarms),
    "sensitivity": (plot_failures.plot_sensitivity, sensitivity),
    "memory": (lambda frame: plot_policies.plot_memory(frame, title="one request"), memory),
    "policies": (plot_policies.plot_policies, policies),
    "harm": (plot_harm.plot_harm, harm),
    "harm_metrics": (plot_harm.plot_harm_metrics, harm_metrics),
    "harm_against_cost": (plot_harm.plot_harm_against_cost, costs),
    "harm_against_price": (plot_harm.plot_harm_against_price, prices),
    "simulation_gap": (plot_policies.plot_simulation_gap, both_sources),
    "certificate": (plot_harm.plot_certificate, certificate),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "rates" else pytest.mark.matrix) for name in DRAWN],
)
def test_every_figure_is_saved_as_pdf_and_png(name, tmp_path):
    plot, frame = DRAWN[name]
    pdf, png = save_figure(plot(frame()), tmp_path / "made" / f"{name}_0.750")
    assert (pdf.name, png.name) == (f"{name}_0.750.pdf", f"{name}_0.750.png")
    assert pdf.read_bytes().startswith(b"%PDF-")
    assert png.read_bytes().startswith(b"\x89PNG")
    shown = sorted(path.name for path in pdf.parent.iterdir() if path.name[0] != ".")
    assert shown == [pdf.name, png.name]


@pytest.mark.parametrize("name", DRAWN)
def test_each_column_is_needed_and_named(name):
    plot, frame = DRAWN[name]
    complete = frame()
    for column in complete.columns:
        with pytest.raises(MissingData, match=rf"'{name}'.*'{column}'"):
            plot(complete.drop(column))
    with pytest.raises(MissingData, match=rf"'{name}'.*empty"):
        plot(complete.clear())


def test_a_saved_figure_carries_no_date(tmp_path):
    first = save_figure(plot_failures.plot_excess(summary()), tmp_path / "a")
    second = save_figure(plot_failures.plot_excess(summary()), tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert b"CreationDate" not in first[0].read_bytes()


def error_bars(axes):
    """Label to (x, y, low, high) of every error bar of the axes."""
    found = {}
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer):
            line, _, (bars,) = container.lines
            ends = np.array(bars.get_segments())[:, :, 1]
            found[container.get_label()] = (line.get_ydata(), ends[:, 0], ends[:, 1])
    return found


def test_rates_are_drawn_with_their_intervals_and_the_baseline_as_a_band():
    frame = summary()
    axes = plot_failures.plot_rates(frame).axes
    assert [panel.get_title(loc="left") for panel in axes] == [
        "accuracy",
        "agrees with uncompressed",
        "catastrophic failure rate",
    ]
    for panel, metric in zip(axes, ("accuracy", "agreement", "cfr"), strict=True):
        bars = error_bars(panel)
        assert set(bars) == {press_styles(PRESSES)[press].label for press in PRESSES}
        for press in PRESSES:
            rows = frame.filter(pl.col("press") == press).sort("ratio")
            y, low, high = bars[press_styles([press])[press].label]
            assert y == pytest.approx(rows[metric].to_list())
            assert low == pytest.approx(rows[f"{metric}_low"].to_list())
            assert high == pytest.approx(rows[f"{metric}_high"].to_list())
        baseline = frame.filter(pl.col("press") == "none").row(0, named=True)
        bands = [(p.get_bbox().y0, p.get_bbox().y1) for p in panel.patches]
        # an answer always agrees with itself: no interval
        interval_of = (baseline[f"{metric}_low"], baseline[f"{metric}_high"])
        assert bands == ([] if metric == "agreement" else [interval_of])


def test_an_undefined_rate_leaves_a_gap_and_an_undefined_metric_says_so():
    frame = summary().with_columns(
        accuracy=pl.when(pl.col("ratio") != "0.750").then("accuracy"), agreement=None
    )
    accuracy, agreement, _ = plot_failures.plot_rates(frame).axes
    assert {len(y) for y, _, _ in error_bars(accuracy).values()} == {1}
    assert [text.get_text() for text in agreement.texts] == ["undefined"]
    assert not error_bars(agreement)


def test_a_press_has_one_colour_in_all_figures():
    both = ["snapkv", "my_press"]
    expected = press_styles(both)
    frame = summary(presses=("my_press",))
    lines = plot_failures.plot_rates(frame, presses=both).axes[0].containers
    assert lines[0].lines[0].get_color() == expected["my_press"].colour
    ends = plot_predictor.plot_lead_time(alarms(["my_press"]), presses=both).axes[0].lines
    assert ends[0].get_color() == expected["my_press"].colour


@given(st.sets(st.sampled_from([*WELL_KNOWN, "a", "b", "c", "d", "e"])))
@settings(deadline=None)
def test_presses_differ_in_colour_and_marker(names):
    styles = press_styles(names)
    looks = [(style.colour, style.marker) for style in styles.values()]
    assert len(set(looks)) == len(looks)
    assert styles == press_styles(sorted(names, reverse=True))
    if len(names) <= 8:
        assert len({style.colour for style in styles.values()}) == len(styles)


def test_excess_leaves_the_baseline_out_and_keeps_values_below_zero():
    frame = summary().with_columns(pl.col("^excess_cfr.*$") - 0.5)
    (axes,) = plot_failures.plot_excess(frame).axes
    drawn = [c.lines[0].get_xdata()[0] for c in axes.containers if c.get_label() == "excess_cfr"]
    expected = frame.filter(pl.col("press") != "none")["excess_cfr"].to_list()
    assert sorted(drawn) == pytest.approx(sorted(expected))
    assert min(drawn) < 0
    with pytest.raises(MissingData):
        plot_failures.plot_excess(frame.filter(pl.col("press") == "none"))


@pytest.mark.parametrize("length", [1, 2, 40, 300])
def test_a_trace_shows_every_signal_and_all_its_text(length):
    tokens = timeline(length)
    figure = draw_trace(tokens)
    entropy, hazard, mode, llr = figure.axes
    assert entropy.lines[0].get_ydata() == pytest.approx(tokens["entropy"].to_list())
    assert hazard.lines[0].get_ydata() == pytest.approx(tokens["hazard"].to_list())
    assert {line.get_ydata()[0] for line in hazard.lines[1:3]} == {0.2, 0.5}
    tops = [segment[1][1] for segment in llr.collections[0].get_segments()]
    assert tops == pytest.approx(tokens["llr"].to_list())
    assert len(mode.patches) == len(set(tokens["mode"]))
    labels = [label.get_text() for label in llr.get_xticklabels()]
    if length <= 100:
        assert labels == ["$5↵" if n % 7 == 0 else f"word{n}" for n in range(length)]
    assert len(labels) * 0.08 < figure.get_figwidth()
    assert [t.get_text() for t in entropy.texts] == ["first rejected", "looping"]


def test_a_trace_without_predictor_or_audit_says_so():
    empty = timeline(5).with_columns(
        hazard=pl.lit(None, pl.Float32),
        mode=pl.lit(None, pl.Int8),
        llr=pl.lit(None, pl.Float32),
        audit_is_argmax=pl.lit(None, pl.Boolean),
    )
    texts = [t.get_text() for axes in draw_trace(empty).axes for t in axes.texts]
    assert {"no predictor", "no controller", "not audited"} <= set(texts)
    assert not any("rejected by" in text for text in texts)


def test_lead_time_counts_requests_that_never_alarmed():
    both = alarms(["snapkv"], ("any", "looping"))
    others = pl.when(pl.col("target") == "any").then("lead_time_tokens")
    lead, delay = plot_predictor.plot_lead_time(both.with_columns(lead_time_tokens=others)).axes[:2]
    # 4 harmed requests; leads 10, 2, -4 and never: a quarter each, drawn from early to late
    assert lead.lines[0].get_xdata().tolist() == [-10, -10, -2, 4]
    assert lead.lines[0].get_ydata().tolist() == [0, 0.25, 0.5, 0.75]
    assert delay.lines[0].get_ydata().tolist() == [0, 0.25, 0.5]


def test_predictor_states_its_score_with_the_interval():
    figure = plot_predictor.plot_predictor(curves(["any"]))
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts.count("AUROC 0.81 [0.70, 0.90]") == 1
    roc = figure.axes[0]
    assert roc.lines[0].get_ydata() == pytest.approx(np.sqrt(np.linspace(0, 1, 5)))


def test_policies_are_drawn_in_mebibytes_and_in_order():
    figure = plot_policies.plot_policies(policies())
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert rows == ["compression alone", "guard: full cache after alarm", "check at the end"]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    memory_axes = figure.axes[titles.index("peak (MiB)")]
    drawn = sorted(bar.lines[0].get_xdata()[0] for bar in memory_axes.containers)
    assert drawn == pytest.approx(sorted(policies()["device_bytes_peak"] / 2**20))


def test_harm_is_drawn_by_task_with_its_silent_share():
    frame = harm()
    figure = plot_harm.plot_harm(frame)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["recall\n35 of 40 right uncompressed", "copy\nno right answers"]
    for axes, task in zip(figure.axes, ("recall", "copy"), strict=True):
        compressed = frame.filter(pl.col("press") != "none", pl.col("task") == task)
        for metric in ("harmed", "silent_harm"):
            bars = [bar for bar in axes.containers if bar.get_label() == metric]
            drawn = sorted(bar.lines[0].get_xdata()[0] for bar in bars)
            assert drawn == pytest.approx(sorted(compressed[metric]))


def test_a_policy_that_costs_more_than_never_compressing_is_drawn_open():
    axes = plot_harm.plot_harm_against_cost(costs()).axes[0]
    drawn = {bar.get_label(): bar.lines[0] for bar in axes.containers}
    assert {name: line.get_xdata()[0] for name, line in drawn.items()} == COST_OF
    is_open = {name for name, line in drawn.items() if line.get_markerfacecolor() == "white"}
    assert is_open == {"guard_promote", "oracle_gate"}
    assert drawn["always_safe"].get_ydata()[0] == pytest.approx(0.5 - 1 / 3)


def test_harm_is_drawn_against_traffic_beside_it_where_that_is_known():
    """Offloading is drawn as simulated where it did not run; the rest as it ran."""
    offload = pl.DataFrame(
        [
            {"policy": "offload", "model": "tiny", "press": "snapkv", "ratio": RATIOS[0]}
            | {"source": "simulation"}
            | with_interval("harmed", 0.0, 0.1)
            | with_interval("relative_byte_steps", 0.08, 0.0)
            | with_interval("relative_bus_traffic", 1.0, 0.0)
        ]
    )
    figure = plot_harm.plot_harm_against_cost(pl.concat([costs(), offload]))
    left, right = figure.axes[:2]
    drawn = {bar.get_label(): bar.lines[0] for bar in right.containers}
    expected = TRAFFIC_OF | {"offload": 1.0}
    assert {name: line.get_xdata()[0] for name, line in drawn.items()} == expected
    is_open = {name for name, line in drawn.items() if line.get_markerfacecolor() == "white"}
    assert is_open == {"guard"}
    assert {bar.get_label() for bar in left.containers} == {*COST_OF, "offload"}
    assert left.get_ylim() == right.get_ylim()
    unknown = costs().with_columns(pl.lit(None, pl.Float64).alias("relative_bus_traffic"))
    assert not plot_harm.plot_harm_against_cost(unknown).axes[1].containers


def test_constant_ratios_are_a_line_from_the_measured_ones_to_the_full_cache():
    axes = plot_harm.plot_harm_against_cost(costs()).axes[0]
    (line,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert line.get_xdata() == pytest.approx([0.25, 0.5, 1.0])
    assert line.get_ydata() == pytest.approx([0.3, 0.2, 0.0])


@pytest.mark.parametrize("line", [True, False])
def test_the_legend_names_constant_ratios_where_they_are_drawn(line):
    """A run that simulates nothing has no stored answers of constant ratios."""
    frame = costs() if line else costs().filter(source="live")
    figure = plot_harm.plot_harm_against_cost(frame)
    assert any(drawn.get_linestyle() == "--" for drawn in figure.axes[0].lines) == line
    named = {text.get_text() for text in figure.legends[0].get_texts()}
    assert ("constant ratio" in named) == line


def test_a_price_is_filled_where_it_is_certified_and_named_with_its_bound():
    figure = plot_harm.plot_harm_against_price(prices(), presses=PRESSES)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["all conditions mixed", "", "SnapKV  0.5", ""]
    for axes, cost in zip(figure.axes, [(25, 25), (9, 6)] * 2, strict=True):
        drawn = {bar.get_label(): bar.lines[0] for bar in axes.containers}
        assert [line.get_xdata()[0] for line in drawn.values()] == pytest.approx(cost)
        assert {name: line.get_fillstyle() for name, line in drawn.items()} == {
            "300": "full",
            "100": "bottom",
        }
        assert {text.get_text() for text in axes.texts} == {"300", "100"}
        assert {line.get_ydata()[0] for line in axes.lines if line.get_linestyle() != "-"} >= {
            0.05,
            0.1,
        }
    mixed, alone = (figure.axes[at].containers[0].lines[2][0].get_segments()[0] for at in (0, 2))
    clopper_pearson = 1 - 0.05 ** (1 / 100)  # nothing of 100
    assert alone[:, 1] == pytest.approx([0, clopper_pearson], abs=1e-9)
    assert mixed[1, 1] >= clopper_pearson, "several requests a prompt: no exact tail"
    unknown = prices().with_columns(bytes_moved=pl.lit(None, pl.Float64))
    assert not plot_harm.plot_harm_against_price(unknown).axes[1].containers


def test_what_is_certified_is_filled_and_has_its_bound():
    figure = plot_harm.plot_certificate(certificate(["recall"]))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "harmed and\nnot repaired, promote",
        "harmed and\nnot repaired, continue",
        "alarmed",
    ]
    axes = figure.axes[0]
    assert len(axes.containers) == len(PRESSES) * len(RATIOS) * 3
    for bar in axes.containers:
        filled = bar.lines[0].get_markerfacecolor() != "white"
        assert filled == (bar.get_label() == "conservative")
        if bar.get_label() == "conservative":  # 0 of 20: 1 - 0.1 ** (1 / 20)
            (segment,) = bar.lines[2][0].get_segments()
            assert segment[:, 0] == pytest.approx([0, 1 - 0.1 ** (1 / 20)])


def test_a_caption_says_which_prompts_a_figure_is_about():
    for name, entry in FIGURES.items():
        samples = ("test prompt", "all prompts of the run", "calibration requests")
        assert any(sample in entry.caption.lower() for sample in samples), name


def test_the_example_is_a_test_prompt():
    """The predictor has seen the outcomes of the others."""
    run = make_run(num_prompts=12, max_new_tokens=64, error_rate=0)
    ids = run.prompts["prompt_id"]
    tokens = run.tokens.select(*schema.TOKEN_KEYS, "token_id", "entropy", "llr", "audit_is_argmax")
    tokens = tokens.with_columns(token_text=pl.lit("a"), hazard=pl.lit(0.9), mode=pl.lit(2))
    for chosen in (ids[3], ids[8]):
        splits = pl.DataFrame({"prompt_id": ids}).with_columns(
            split=pl.when(pl.col("prompt_id") == chosen)
            .then(pl.lit("test"))
            .otherwise(pl.lit("train"))
        )
        figure = plot_failures.plot_example(
            tokens, run.outcomes, splits, operating_point=POINTS["balanced"]
        )
        assert chosen in figure.get_suptitle()


def test_the_predictor_is_drawn_pooled_and_by_press_against_both_references():
    figure = plot_harm.plot_harm_metrics(harm_metrics())
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["all conditions", *(press_styles(PRESSES)[press].label for press in PRESSES)]
    for axes in figure.axes:
        drawn = sorted(bar.lines[0].get_xdata()[0] for bar in axes.containers)
        assert drawn == pytest.approx(sorted(2 * [-0.1, -0.05, 0.0, 0.05]))


def test_only_live_runs_and_oracles_are_compared_in_cost():
    frame = costs().with_columns(source=pl.lit("simulation"))
    axes = plot_harm.plot_harm_against_cost(frame).axes[0]
    assert {bar.get_label() for bar in axes.containers} == {"oracle_gate"}
    with pytest.raises(MissingData):
        plot_harm.plot_harm_against_cost(frame.filter(~pl.col("policy").str.starts_with("oracle")))


def test_every_policy_differs_in_colour_or_marker():
    looks = [policy_style(name)[1:] for name in POLICY_LABELS]
    assert len(set(looks)) == len(looks)


def test_live_is_paired_with_the_simulation_of_the_same_condition():
    excess = plot_policies.plot_simulation_gap(both_sources()).axes[0]
    points = [line for line in excess.lines if line.get_markersize() and line.get_marker() in "os^"]
    assert len(points) == policies().height
    assert sorted(line.get_ydata()[0] for line in points) == sorted(policies()["harmed"])
    for line in points:
        assert line.get_xdata()[0] == pytest.approx(line.get_ydata()[0] + 0.05)
    with pytest.raises(MissingData):
        plot_policies.plot_simulation_gap(both_sources().filter(pl.col("source") == "live"))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0.01, 0.2))
@settings(deadline=None)
def test_labels_at_line_ends_keep_their_order_and_distance(heights, gap_size):
    wanted = np.sort(np.array(heights))
    placed = spread(wanted, gap_size)
    assert (np.diff(placed) >= gap_size - 1e-9).all()
    if (np.diff(wanted) >= gap_size).all():
        assert placed == pytest.approx(wanted)
    assert placed.mean() == pytest.approx(wanted.mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("models", "ratios", "requests"),
    [
        (("tiny",), ("0.500",), 1),
        (("model-one", "model-two"), ("0.250", "0.500", "0.625", "0.750", "0.875"), 500),
    ],
)
def test_no_label_leaves_the_figure_or_hides_another(models, ratios, requests):
    frame = summary(models, (*PRESSES, "another_press"), ratios, requests)
    for plot in (plot_failures.plot_rates, plot_failures.plot_excess):
        figure = plot(frame)
        figure.draw_without_rendering()
        page = figure.bbox
        boxes = [t.get_window_extent() for axes in figure.axes for t in axes.texts]
        boxes += [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
        assert boxes
        for box in boxes:
            assert page.x0 <= box.x0
            assert box.x1 <= page.x1
        for one, other in itertools.combinations(boxes, 2):
            overlap = min(one.y1, other.y1) - max(one.y0, other.y0)
            beside = one.x1 < other.x0 or other.x1 < one.x0
            assert beside or overlap < 0.35 * min(one.height, other.height)


def test_figures_draw_what_the_database_says(tmp_path):
    run = write_run(make_run(num_prompts=8, max_new_tokens=64), tmp_path)
    database = tmp_path / "kvguard.duckdb"
    build_database(database, run.prompts, run.traces, run.tokens, run.outcomes)
    summary_view = condition_summary(database)
    plot_failures.plot_failure_kinds(summary_view)
    plot_failures.plot_excess(read_view(database, "excess"))
    cfr = plot_failures.plot_rates(summary_view).axes[2]
    y, _, _ = error_bars(cfr)["SnapKV"]
    outcomes = pl.read_parquet(run.outcomes).filter(pl.col("press") == "snapkv")
    planted = outcomes.group_by("ratio").agg(pl.col("catastrophe").mean()).sort("ratio")
    assert y == pytest.approx(planted["catastrophe"].to_list())


def test_figures_draw_what_the_simulation_says():
    run = make_run(num_prompts=12, max_new_tokens=64, error_rate=0)
    hazard = pl.when(pl.col("position") > 20).then(0.8).otherwise(0.1).cast(pl.Float32)
    predictions = run.tokens.select(
        *schema.TOKEN_KEYS, split=pl.lit("test"), target=pl.lit("any"), hazard=hazard
    )
    overrides = {
        "predictor": {"bootstrap_samples": 20},
        "controller": {"tau_low": [0.2], "tau_high": [0.5], "k": [2], "j": [8]},
    }
    experiment = load_config(Path(__file__).parents[1] / "config.yaml", overrides=overrides)
    frames = Frames(run.traces, run.tokens, run.outcomes, predictions)
    runs = simulate_model(frames, run.prompts, experiment, POINTS["balanced"], str)
    guard = runs.filter(pl.col("policy") == "guard_promote", pl.col("press") != "none")
    assert guard["alarmed"].any()
    # The hazard is that of the predictor to which the thresholds belong, not of another target.
    calm = predictions.with_columns(target=pl.lit("harm"), hazard=pl.lit(0.1, pl.Float32))
    both = frames._replace(predictions=pl.concat([predictions, calm]))
    calm_runs = simulate_model(
        both, run.prompts, experiment, POINTS["balanced"], str, target="harm"
    )
    assert not calm_runs.filter(pl.col("policy") == "guard_promote")["alarmed"].any()
    summary_table = summarize_runs(runs, run.outcomes, bootstrap_samples=20)
    compressed = summary_table.filter(pl.col("press") != "none")
    live = compressed.with_columns(source=pl.lit("live"))
    plot_policies.plot_policies(live)
    plot_policies.plot_simulation_gap(pl.concat([compressed, live]))


def test_the_registry_names_functions_that_take_what_it_gives_them():
    for name, entry in FIGURES.items():
        function = getattr(importlib.import_module(f"kvguard.{entry.module}"), entry.function)
        parameters = inspect.signature(function).parameters
        positional = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert len(positional) == len(entry.tables), name
        given = {*entry.arguments, *entry.fixed}
        assert given <= set(parameters), name
        needed = {p.name for p in parameters.values() if p.default is p.empty}
        assert needed <= given | {p.name for p in positional}, name
        assert entry.caption.endswith("."), name


def test_a_figure_without_rows_says_so():
    figure = draw_figure("excess", {"excess": pl.DataFrame()}, presses=PRESSES)
    assert "no such request" in figure.texts[0].get_text()
