"""The controller against a plain state machine written from its docstring, and its promises."""

import numpy as np
import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kvguard import config
from kvguard.controller import (
    NEVER,
    Mode,
    OperatingPoint,
    at_rest,
    first_alarm,
    grid_points,
    initial_state,
    price_point,
    stack_points,
    step,
)

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, float("nan"))
"""Hazards that hit the thresholds exactly, lie between them, and are missing."""

hazards = st.lists(st.sampled_from(LEVELS), max_size=60)
thresholds = st.sampled_from((0.1, 0.2, 0.3, 0.5, 0.7))


@st.composite
def controllers(draw):
    low, high = sorted((draw(thresholds), draw(thresholds)))
    runs = st.integers(1, 4)
    return OperatingPoint(tau_low=low, tau_high=high, k=draw(runs), j=draw(runs))


def modes_by_table(values, setting):
    """The transition table of the docstring, one token at a time, in plain Python."""
    low, high = float(np.float32(setting.tau_low)), float(np.float32(setting.tau_high))
    mode, risky, calm, modes = "NORMAL", 0, 0, []
    for value in values:
        value = float(np.float32(value))
        if value == value:  # a hazard that is NaN changes nothing
            if mode == "NORMAL":
                risky = risky + 1 if value > low else 0
                if risky == setting.k:
                    mode, risky, calm = "ALERT", 0, 0
            elif mode == "ALERT":
                risky = risky + 1 if value > high else 0
                calm = calm + 1 if value <= low else 0
                if risky == setting.k:
                    mode, risky, calm = "SAFE", 0, 0
                elif calm == setting.j:
                    mode, risky, calm = "NORMAL", 0, 0
            else:
                calm = calm + 1 if value <= low else 0
                if calm == setting.j:
                    mode, risky, calm = "ALERT", 0, 0
        modes.append(mode)
    return modes


def modes_by_step(values, setting):
    state, modes = initial_state(1), []
    for value in values:
        state = step(state, np.array([value], np.float32), setting)
        modes.append(Mode(state.mode[0]).name)
    return modes


def first_safe(values, setting):
    modes = modes_by_table(values, setting)
    return modes.index("SAFE") if "SAFE" in modes else NEVER


@given(hazards, controllers())
def test_step_follows_the_transition_table(values, setting):
    assert modes_by_step(values, setting) == modes_by_table(values, setting)


@given(hazards, st.lists(st.sampled_from(LEVELS), min_size=1, max_size=9), controllers())
def test_at_rest_is_what_steps_would_find(before, values, setting):
    """Never where a step would have moved, always after evidence of calm alone."""
    state = initial_state(1)
    for value in before:
        state = step(state, np.array([value], np.float32), setting)
    rest = at_rest(state, np.array([values], np.float32), setting)[0]
    modes = modes_by_step([*before, *values], setting)[-len(values) - (1 if before else 0) :]
    stayed = set(modes) == {"NORMAL"}
    for value in values:
        state = step(state, np.array([value], np.float32), setting)
    fresh = stayed and state.risky[0] == 0 and state.calm[0] == 0
    if rest:
        assert fresh
    low = np.float32(setting.tau_low)
    seen = [np.float32(value) for value in values if value == value]
    if stayed and seen and max(seen) <= low:
        assert rest


def test_a_worked_example():
    setting = OperatingPoint(tau_low=0.2, tau_high=0.5, k=2, j=3)
    hazard = [0.3, 0.3, 0.6, 0.6, 0.1, 0.1, 0.1, 0.4, 0.1, 0.1, 0.1]
    expected = ["NORMAL", "ALERT", "ALERT", "SAFE", "SAFE", "SAFE", "ALERT"]
    expected += ["ALERT", "ALERT", "ALERT", "NORMAL"]
    assert modes_by_step(hazard, setting) == expected


def test_a_missing_hazard_neither_calms_nor_alarms():
    setting = OperatingPoint(tau_low=0.2, tau_high=0.5, k=2, j=2)
    nan = float("nan")
    assert modes_by_step([0.9, nan, nan, 0.9], setting)[-1] == "ALERT"
    assert modes_by_step([0.9, 0.9, 0.9, 0.9, nan, nan, nan, nan], setting)[-1] == "SAFE"
    assert modes_by_step([nan] * 20, setting)[-1] == "NORMAL"


def test_counters_do_not_overflow_in_a_long_request():
    setting = OperatingPoint(tau_low=0.2, tau_high=0.5, k=1, j=1)
    state = initial_state(1)
    for _ in range(33_000):
        state = step(state, np.float32(0.9), setting)
    assert state.mode[0] == Mode.SAFE
    state = initial_state(1)
    for _ in range(33_000):
        state = step(state, np.float32(0.1), setting)
    assert state.mode[0] == Mode.NORMAL


@examples(60)
@given(st.lists(hazards, min_size=1, max_size=7), st.lists(controllers(), min_size=1, max_size=5))
def test_first_alarm_of_a_grid_is_that_of_each_request_and_setting_alone(rows, points):
    lengths = np.array([len(row) for row in rows])
    hazard = np.full((len(rows), int(lengths.max()) + 2), 0.99, np.float32)  # junk past the end
    for number, row in enumerate(rows):
        hazard[number, : len(row)] = row
    found = first_alarm(hazard, lengths, stack_points(points))
    assert found.dtype == np.int32
    assert found.tolist() == [[first_safe(row, point) for row in rows] for point in points]


def test_first_alarm_across_block_borders():
    rng = np.random.default_rng(0)
    hazard = rng.uniform(size=(1100, 12)).astype(np.float32)
    lengths = rng.integers(0, 13, 1100)
    point = OperatingPoint(tau_low=0.3, tau_high=0.6, k=2, j=2)
    expected = [
        first_safe(row[:length], point) for row, length in zip(hazard, lengths, strict=True)
    ]
    assert first_alarm(hazard, lengths, stack_points([point]))[0].tolist() == expected


@given(hazards, controllers(), controllers())
def test_an_easier_setting_alarms_no_later(values, one, other):
    easier = OperatingPoint(
        tau_low=min(one.tau_low, other.tau_low),
        tau_high=min(one.tau_high, other.tau_high),
        k=min(one.k, other.k),
        j=max(one.j, other.j),
    )
    hazard = np.array([values], np.float32)
    found = first_alarm(hazard, [len(values)], stack_points([easier, one, other]))[:, 0]
    easy, *hard = np.where(found == NEVER, len(values), found).tolist()
    assert easy <= min(hard)


@given(st.lists(hazards, min_size=2, max_size=6), controllers())
def test_rows_of_a_batch_are_independent(rows, setting):
    longest = max(map(len, rows))
    hazard = np.full((longest, len(rows)), np.nan, np.float32)
    for number, row in enumerate(rows):
        hazard[: len(row), number] = row
    state = initial_state(len(rows))
    for position in range(longest):
        state = step(state, hazard[position], setting)
    alone = [["NORMAL", *modes_by_step(row, setting)][-1] for row in rows]
    assert [Mode(mode).name for mode in state.mode] == alone


def test_thresholds_mean_the_same_as_scalar_and_as_array():
    # float32(0.1) lies above 0.1: comparing it in double precision would alarm here.
    point = OperatingPoint(tau_low=0.1, tau_high=0.1, k=1, j=1)
    hazard = np.full((1, 4), 0.1, np.float32)
    assert modes_by_step(hazard[0], point) == ["NORMAL"] * 4
    assert first_alarm(hazard, [4], stack_points([point])).tolist() == [[NEVER]]


def test_grid_of_a_config_holds_every_ordered_combination_once():
    controller = config.Controller(tau_low=[0.1, 0.3], tau_high=[0.2, 0.3], k=[1, 2], j=[8])
    grid = grid_points(controller)
    found = [grid.point(index) for index in range(len(grid.k))]
    pairs = [(0.1, 0.2), (0.1, 0.3), (0.3, 0.3)]
    expected = [
        OperatingPoint(tau_low=low, tau_high=high, k=k, j=8) for low, high in pairs for k in (1, 2)
    ]
    own = [price_point(price) for price in controller.prices.values()]
    assert found == expected + own


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tau_low": 0.5, "tau_high": 0.2, "k": 1, "j": 1}, "tau_low=0.5 must not exceed"),
        ({"tau_low": 0.0, "tau_high": 0.2, "k": 1, "j": 1}, "greater than 0"),
        ({"tau_low": 0.1, "tau_high": 1.0, "k": 1, "j": 1}, "less than 1"),
        ({"tau_low": 0.1, "tau_high": 0.2, "k": 0, "j": 1}, "greater than or equal to 1"),
        ({"tau_low": 0.1, "tau_high": 0.2, "k": 1, "j": 40_000}, "less than or equal to 32767"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        OperatingPoint(**values)


def test_shapes_that_do_not_fit_are_refused():
    point = stack_points([OperatingPoint(tau_low=0.1, tau_high=0.2, k=1, j=1)])
    with pytest.raises(ValueError, match=r"hazard is \(N, T\)"):
        first_alarm(np.zeros(4, np.float32), [4], point)
    with pytest.raises(ValueError, match=r"lengths lie in 0\.\.4"):
        first_alarm(np.zeros((1, 4), np.float32), [5], point)
