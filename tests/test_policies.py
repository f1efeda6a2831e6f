"""The guard and its rivals, driven by token streams whose right answer is worked out by hand."""

import numpy as np
import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st

from kvguard import config
from kvguard.controller import Mode
from kvguard.policies import ENTROPY, Action, Observation, is_alarm
from kvguard.policy_factory import make_policy
from kvguard.rivals import RepetitionRuns
from kvguard.schema import SIGNALS

POINT = config.OperatingPoint(tau_low=0.2, tau_high=0.5, k=1, j=2)


def build(name, rows=1, max_new_tokens=100, **options):
    needs = {
        "constant": {"press_ratio": "0.500"},
        "random": {"alarm_rate": 0.5},
        "clock_or_loop": {"clock_tokens": 6},
        "gate": {"gate_threshold": 2.0},
        "ladder": {"ladder_threshold": 0.2},
    }
    options = {"controller": POINT} | needs.get(name, {}) | options
    return make_policy(name, rows, max_new_tokens=max_new_tokens, **options)


def observe(rows, position, tokens, hazard=None, entropy=None):
    """The observation of rows whose answers so far are ``tokens`` (lists), all at one position."""
    signals = np.zeros((len(rows), len(SIGNALS)), np.float32)
    if entropy is not None:
        signals[:, ENTROPY] = entropy
    history = np.full((len(rows), 100), -1, np.int32)
    for number, answer in enumerate(tokens):
        history[number, : position + 1] = answer[: position + 1]
    return Observation(
        np.asarray(rows),
        np.full(len(rows), position, np.int32),
        history[:, position],
        signals,
        None if hazard is None else np.asarray(hazard, np.float32),
        history,
    )


def run(policy, length=20, tokens=None, hazard=None, entropy=None, seed=0, row=0):
    """Actions of one request by position, until the end; ``finish`` is the last entry."""
    policy.reset(row, seed)
    answer = list(range(length)) if tokens is None else list(tokens)
    actions = []
    for position in range(len(answer)):
        seen = observe(
            [row],
            position,
            [answer],
            None if hazard is None else [hazard[position]],
            None if entropy is None else [entropy[position]],
        )
        actions.append(Action(policy.step(seen).actions[0]))
    if actions[-1] == Action.CONTINUE:
        actions.append(Action(policy.finish(seen).actions[0]))
    return actions


def acted(actions):
    """(position, action) pairs of everything but CONTINUE."""
    return [(at, action) for at, action in enumerate(actions) if action != Action.CONTINUE]


CALM, WORRY, DANGER = 0.1, 0.3, 0.9


@given(
    looks=st.lists(
        st.lists(st.sampled_from([0.1, 0.1, 0.1, 0.3, 0.9, np.nan]), min_size=1, max_size=8),
        max_size=8,
    ),
    name=st.sampled_from(["guard_promote", "guard", "guard_restart"]),
)
def test_rows_at_rest_are_as_steps_would_leave_them(looks, name):
    point = config.OperatingPoint(tau_low=0.2, tau_high=0.5, k=2, j=3)
    asked, shown = build(name, controller=point), build(name, controller=point)
    position, row = 0, np.array([0])
    for hazards in looks:
        quiet = shown.modes[0] == Mode.NORMAL and set(hazards) == {CALM}
        rests = asked.rests(row, np.array([hazards], np.float32))[0]
        assert rests or not quiet
        for ahead, hazard in enumerate(hazards):
            seen = observe([0], position + ahead, [range(100)], [hazard])
            expected = shown.step(seen)
            if rests:
                assert expected.actions[0] == Action.CONTINUE
            else:
                assert asked.step(seen).actions[0] == expected.actions[0]
        position += len(hazards)
        for one, other in zip(asked.row_state, shown.row_state, strict=True):
            assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("guard_relax_only", Action.RELAX),
        ("guard_restart", Action.RESTART),
        ("guard_promote", Action.REWIND),
        ("guard_tolerant", Action.REWIND),
    ],
)
def test_a_guard_acts_once_when_its_controller_reaches_safe(name, action):
    hazard = [CALM, CALM, DANGER, DANGER, CALM, CALM, CALM, CALM, DANGER, DANGER]
    assert acted(run(build(name), 10, hazard=hazard)) == [(3, action)]
    assert acted(run(build(name), 10, hazard=[WORRY] * 10)) == []


def test_guards_say_where_they_cut_and_what_follows():
    assert build("guard_promote").recovery_cut == "exact"
    assert build("guard_tolerant").recovery_cut == "tolerant"
    assert build("guard_promote").safe_after == "stay"
    assert build("guard").safe_after == build("guard_recompute").safe_after == "resume"
    assert build("guard_recompute").fresh_checks
    assert not build("guard").fresh_checks


def test_alert_is_visible_before_any_action():
    policy = build("guard_promote")
    decisions = [
        policy.step(observe([0], at, [[5] * 9], [h])) for at, h in enumerate([CALM, WORRY, DANGER])
    ]
    assert [Mode(d.modes[0]).name for d in decisions] == ["NORMAL", "ALERT", "SAFE"]
    assert [Action(d.actions[0]).name for d in decisions] == ["CONTINUE", "CONTINUE", "REWIND"]


@pytest.mark.parametrize("name", ["guard", "guard_recompute"])
def test_the_guard_checks_on_alarm_and_then_in_turn_until_calm(name):
    # SAFE at 1; in turn at 3 and 7; j = 4 calm tokens lead to ALERT at 7, four more to NORMAL.
    point = config.OperatingPoint(tau_low=0.2, tau_high=0.5, k=1, j=4)
    policy = build(name, controller=point, check_every_tokens=4)
    hazard = [DANGER, DANGER, WORRY, DANGER, *[CALM] * 12]
    found = acted(run(policy, 16, hazard=hazard))
    assert found == [(1, Action.CHECK), (3, Action.CHECK), (7, Action.CHECK)]
    assert policy.modes[0] == Mode.NORMAL


def test_a_request_that_ends_in_safe_is_checked_at_its_end():
    policy = build("guard", check_every_tokens=8)
    assert acted(run(policy, 6, hazard=[DANGER] * 6)) == [(1, Action.CHECK), (6, Action.CHECK)]
    policy = build("guard", check_every_tokens=6)
    assert acted(run(policy, 6, hazard=[DANGER] * 6)) == [(1, Action.CHECK), (5, Action.CHECK)]


def test_gate_promotes_by_the_first_tokens_score_alone():
    policy = build("gate", rows=3)
    tokens = [[1] * 5] * 3
    first = policy.step(observe([0, 1, 2], 0, tokens, entropy=[2.5, 2.0, np.nan]))
    assert first.actions.tolist() == [Action.REWIND, Action.CONTINUE, Action.CONTINUE]
    assert first.modes.tolist() == [Mode.SAFE, Mode.NORMAL, Mode.NORMAL]
    second = policy.step(observe([0, 1, 2], 1, tokens, entropy=[9, 9, 9]))
    assert second.actions.tolist() == [Action.CONTINUE] * 3
    probed = observe([0, 1], 0, tokens[:2], entropy=[9, 0])
    probed = probed._replace(probe=np.array([1.0, 3.0], np.float32))
    assert build("gate", rows=2).step(probed).actions.tolist() == [
        Action.CONTINUE,
        Action.REWIND,
    ]


def test_what_anyone_can_see_is_checked_at_the_end():
    fine = build("verify_on_failure", max_new_tokens=30)
    assert acted(run(fine, 29)) == []
    assert acted(run(fine, 30)) == [(30, Action.REWIND)]
    assert acted(run(fine, 29, tokens=[*[7] * 22, *range(100, 107)])) == [(29, Action.REWIND)]


def test_clock_or_loop_alarms_once_at_whichever_comes_first():
    assert acted(run(build("clock_or_loop"), 20)) == [(5, Action.REWIND)]
    assert acted(run(build("clock_or_loop"), 5)) == []
    late = build("clock_or_loop", clock_tokens=99)
    assert acted(run(late, 30, tokens=[7] * 30)) == [(19, Action.REWIND)]


def test_probation_checks_once():
    live = config.Live(probation_tokens=4)
    assert acted(run(build("probation", live=live), 9)) == [(3, Action.COMMIT)]
    assert acted(run(build("probation", live=live), 4)) == [(3, Action.COMMIT)]
    assert acted(run(build("probation", live=live), 3)) == [(3, Action.COMMIT)]


def test_lossless_checks_every_m_tokens_and_the_rest():
    live = config.Live(lossless_tokens=4)
    found = acted(run(build("lossless", live=live), 10))
    assert found == [(3, Action.CHECK), (7, Action.CHECK), (10, Action.CHECK)]
    assert acted(run(build("lossless", live=live), 8)) == [(3, Action.CHECK), (7, Action.CHECK)]


def test_a_guard_without_hazard_is_an_error_not_a_calm_request():
    with pytest.raises(ValueError, match=r"needs Observation\.hazard"):
        build("guard_promote").step(observe([0], 0, [[1]]))


@pytest.mark.parametrize("name", ["none", "constant", "always_safe", "offload", "shared_prefix"])
def test_policies_that_never_act(name):
    policy = build(name)
    assert acted(run(policy, hazard=[DANGER] * 20, entropy=[9.0] * 20, tokens=[7] * 20)) == []
    assert policy.starts_safe == (name in ("always_safe", "offload", "shared_prefix"))


def test_constant_names_its_ratio():
    assert build("constant", press_ratio="0.3").press_ratio == "0.300"
    assert build("none").press_ratio is None


def test_verify_all_verifies_once_at_the_end():
    assert acted(run(build("verify_all"), 7)) == [(7, Action.REWIND)]
    policy = build("verify_all")
    seen = observe([0], 6, [[1] * 7])
    assert policy.finish(seen).actions.tolist() == [Action.REWIND]
    assert policy.finish(seen).actions.tolist() == [Action.CONTINUE]  # after the rewind


def test_entropy_needs_tokens_in_a_row_above_the_bound():
    policy = build("entropy", live=config.Live(entropy_nats=4.0, entropy_tokens=3))
    entropy = [5, 5, 3, 4.0, 5, 5, 5, 5, 5]
    assert acted(run(policy, 9, entropy=entropy)) == [(6, Action.REWIND)]
    assert acted(run(policy, 9, entropy=[5, 5, np.nan] * 3)) == []


def test_ergo_restarts_on_a_rise_between_windows():
    policy = build("ergo", live=config.Live(ergo_delta_nats=1.0, ergo_window_tokens=3))
    # Window means 1, 0.5, 2: the second falls, the third rises by 1.5 at token 8.
    assert acted(run(policy, 9, entropy=[1, 1, 1, 0.5, 0.5, 0.5, 1, 2, 3])) == [(8, Action.RESTART)]
    assert acted(run(policy, 9, entropy=[1, 1, 1, 1.5, 1.5, 1.5, 2, 2, 2])) == []
    assert acted(run(policy, 3, entropy=[9, 9, 9])) == []  # nothing to compare with


def test_periodic_refresh_is_no_alarm():
    policy = build("periodic_refresh", live=config.Live(refresh_tokens=4))
    found = acted(run(policy, 10))
    assert found == [(3, Action.REFRESH), (7, Action.REFRESH)]
    assert not is_alarm(np.array([Action.REFRESH, Action.CONTINUE], np.int8)).any()
    assert is_alarm(np.array([Action.REWIND, Action.STOP, Action.PRUNE], np.int8)).all()


LOOPS = config.Live(loop_pattern_tokens=4, loop_copies=3, loop_cover_tokens=6)


def test_ngram_stop_ends_at_the_third_copy():
    tokens = [1, 2, 3, 8, 9, 8, 9, 8, 9, 8, 9]
    assert acted(run(build("ngram_stop", live=LOOPS), tokens=tokens)) == [(8, Action.STOP)]
    million = [1, 0, 0, 0, 0, 0, 5]  # five zeros cover five tokens, fewer than six
    assert acted(run(build("ngram_stop", live=LOOPS), tokens=million)) == []


def test_loopguard_prunes_the_cached_part_of_the_loop_each_time_it_forms():
    policy = build("loopguard", live=LOOPS)
    tokens = [1, 2, 3] + [8, 9] * 6
    amounts = []
    for position in range(len(tokens)):
        decision = policy.step(observe([0], position, [tokens]))
        if decision.actions[0] == Action.PRUNE:
            amounts.append((position, int(decision.amount[0])))
    # At 8 the tail 8 9 8 9 8 9 is complete; its last token has no cache entry yet: 5 of 6 go.
    # Then four more repeated tokens make a new loop; four entries are there to be dropped.
    assert amounts == [(8, 5), (12, 4)]


def tail_by_hand(tokens, live):
    """The shortest pattern repeated at the end of ``tokens``, by comparing slices."""
    for period in range(1, live.loop_pattern_tokens + 1):
        copied = 0
        while copied < len(tokens) - period and tokens[-1 - copied] == tokens[-1 - copied - period]:
            copied += 1
        enough = copied + period >= max(period * live.loop_copies, live.loop_cover_tokens)
        if copied >= 1 and enough:
            return copied + period
    return 0


@examples(60)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=4))
def test_repetition_runs_agree_with_comparing_slices(answers):
    runs = RepetitionRuns(
        len(answers), LOOPS.loop_pattern_tokens, LOOPS.loop_copies, LOOPS.loop_cover_tokens
    )
    for position in range(max(map(len, answers))):
        rows = [row for row, answer in enumerate(answers) if len(answer) > position]
        found = runs.tail(observe(rows, position, [answers[row] for row in rows]))
        expected = [tail_by_hand(answers[row][: position + 1], LOOPS) for row in rows]
        assert found.tolist() == expected


def test_random_holds_its_rate_and_depends_on_the_seed_alone():
    def alarms(lengths):
        policy = build("random", alarm_rate=0.3, max_new_tokens=40)
        return [acted(run(policy, length, seed=seed)) for seed, length in enumerate(lengths)]

    lengths = np.random.default_rng(0).integers(1, 41, 400)
    found = alarms(lengths)
    alarmed = [bool(actions) for actions in found]
    assert 0.3 - 4 * 0.023 < np.mean(alarmed) < 0.3 + 4 * 0.023  # 0.023: binomial standard error
    assert all(actions[0][1] == Action.REWIND for actions in found if actions)
    # The same requests alarm whatever their length, only sooner where they end sooner.
    assert [bool(actions) for actions in alarms([1] * 400)] == alarmed
    steps = [actions[0][0] for actions in alarms([40] * 400) if actions]
    assert min(steps) < 8
    assert max(steps) > 31
    assert acted(run(build("random", alarm_rate=0.0), 40, seed=3)) == []
    assert len(acted(run(build("random", alarm_rate=1.0), 100, seed=3))) == 1


STREAM = {
    "hazard": [CALM, DANGER, DANGER, CALM, CALM, CALM, CALM, CALM] * 3,
    "entropy": [1.0] * 8 + [6.0] * 16,
    "tokens": [1, 2, 3] + [8, 9] * 10 + [4],
}
EAGER = config.Live(
    entropy_tokens=3,
    ergo_window_tokens=4,
    refresh_tokens=5,
    loop_pattern_tokens=4,
    loop_cover_tokens=6,
)


@pytest.mark.parametrize("name", config.POLICY_NAMES)
def test_a_reused_slot_knows_nothing_of_its_last_request(name):
    fresh = run(build(name, live=EAGER), **STREAM, seed=5)
    policy = build(name, live=EAGER)
    run(policy, **STREAM, seed=9)
    assert run(policy, **STREAM, seed=5) == fresh


@pytest.mark.parametrize("name", config.POLICY_NAMES)
def test_rows_do_not_see_their_neighbours_and_may_change_slots(name):
    tokens, hazard, entropy = STREAM["tokens"], STREAM["hazard"], STREAM["entropy"]
    alone = build(name, live=EAGER)
    batch = build(name, rows=3, live=EAGER)
    alone.reset(0, 5)
    for row, seed in enumerate((1, 2, 5)):
        batch.reset(row, seed)
    mine = 2
    for position in range(len(tokens)):
        if position == 4:
            batch.move(2, 0)  # row 0 has left, the last row takes its place
            mine = 0
        rows = [2, 0, 1] if mine == 2 else [1, 0]
        at = rows.index(mine)
        others = [[7] * 30] * len(rows)
        others[at] = tokens
        h, e = [DANGER] * len(rows), [0.0] * len(rows)
        h[at], e[at] = hazard[position], entropy[position]
        together = batch.step(observe(rows, position, others, h, e))
        single = alone.step(observe([0], position, [tokens], h[at : at + 1], e[at : at + 1]))
        for field_together, field_single in zip(together, single, strict=True):
            assert field_together[at] == field_single[0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("guards", {}, "unknown policy 'guards'; known: none, always_safe"),
        ("guard_promote", {"controller": None}, "needs a controller"),
        ("random", {"alarm_rate": None}, "needs an alarm rate"),
        ("random", {"alarm_rate": 1.5}, r"alarm rate in \[0, 1\], got 1.5"),
        ("constant", {"press_ratio": None}, "needs the ratio"),
        ("constant", {"press_ratio": "1.0"}, r"lies in \[0, 1\)"),
    ],
)
def test_a_policy_that_cannot_be_built_says_why(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)
