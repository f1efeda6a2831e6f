"""The guard with one price: what it checks, beside rules that are found by trying all."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import examples, make_tiny_model
from hypothesis import given
from hypothesis import strategies as st
from test_check_timing import observe
from test_guard import ragged_requests, uncompressed

from kvguard.check_timing import LosslessAuto, Prices, rejection_rate, stopping_survival
from kvguard.checks import check_prices
from kvguard.config_policies import GuardSettings
from kvguard.controller import Mode
from kvguard.engine import Session
from kvguard.guard import KVGuard
from kvguard.guard_observer import GuardObserver, guarded
from kvguard.guard_report import GuardError
from kvguard.harm_model import (
    DEFAULT,
    Coefficients,
    HarmModel,
    fit_harm_model,
    load_harm_model,
    save_harm_model,
)
from kvguard.harm_price import GuardPrice
from kvguard.policies import Action
from kvguard.presses import build_press
from kvguard.sampling import Decoding
from kvguard.schema import TRACE_KEYS

PLAIN = HarmModel(alone=Coefficients(intercept=0.5, rejections=2.0))
TOP1 = st.lists(st.floats(0.05, 1.0), min_size=1, max_size=30)


def guard_price(price: float, rows: int = 1, longest: int = 64) -> GuardPrice:
    policy = GuardPrice("guard_price", rows, price, longest, PLAIN)
    for row in range(rows):
        policy.reset(row, 0)
    return policy


def draft(policy: LosslessAuto, top1: list[float], own: float, shared: float = 0.0) -> list[Action]:
    """What a row's policy says of each token; a check accepts everything."""
    policy.set_prices(Prices(shared, np.array([own])))
    actions = []
    for at, probability in enumerate(top1):
        seen = observe([0], at, [probability])
        action = Action(policy.step(seen).actions[0])
        if at == len(top1) - 1 and action == Action.CONTINUE:
            action = Action(policy.finish(seen).actions[0])
        actions.append(action)
        if action == Action.CHECK:
            policy.checked(0, at + 1)
    return actions


# --- the rule ---


@given(top1=TOP1, own=st.floats(0, 50), shared=st.floats(0, 50))
def test_nothing_is_worth_a_check_at_price_0(top1: list[float], own: float, shared: float) -> None:
    policy = guard_price(0)
    assert set(draft(policy, top1, own, shared)) == {Action.CONTINUE}
    assert policy.modes[0] == Mode.NORMAL


@given(top1=TOP1, own=st.floats(0, 50), shared=st.floats(0, 50))
def test_an_infinite_price_checks_as_lossless_auto(
    top1: list[float], own: float, shared: float
) -> None:
    policy = guard_price(math.inf)
    assert policy.checks_everything
    auto = LosslessAuto("lossless_auto", 1, 64)
    assert draft(policy, top1, own, shared) == draft(auto, top1, own, shared)


@given(
    top1=TOP1,
    own=st.floats(0, 50),
    history=st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=3),
    prices=st.lists(st.floats(0, 1e6), min_size=2, max_size=5).map(sorted),
)
def test_a_higher_price_never_checks_less(
    top1: list[float], own: float, history: list[tuple[int, bool]], prices: list[float]
) -> None:
    """The same draft after the same checks: what is worth it at a price is so at any higher."""
    policy = guard_price(1.0, longest=100)
    policy.set_prices(Prices(0.0, np.array([1e9])))
    at = 0
    for tokens, clean in history:
        for ahead in range(tokens):
            policy.step(observe([0], at + ahead, [0.7]))
        at += tokens if clean else max(1, tokens - 2)
        policy.checked(0, at)
    for ahead, probability in enumerate(top1):
        policy.step(observe([0], at + ahead, [probability]))
    policy.set_prices(Prices(0.0, np.array([own])))
    worth = []
    for price in prices:
        policy.harm_price = price
        worth.append(bool(policy.worth(np.array([0]))[0]))
    assert worth == sorted(worth)


def test_modes_say_what_a_check_is_worth() -> None:
    policy = guard_price(30)
    policy.set_prices(Prices(0.0, np.array([5.0])))
    policy.step(observe([0], 0, [0.5]))
    assert policy.modes[0] == Mode.NORMAL  # from the prefill's logits
    decisions = [policy.step(observe([0], at, [0.3])) for at in range(1, 6)]
    first = next(i for i, one in enumerate(decisions) if one.actions[0] == Action.CHECK)
    assert decisions[first].modes[0] == Mode.ALERT
    policy = guard_price(1000)
    policy.set_prices(Prices(0.0, np.array([1e9])))
    for at in range(4):
        policy.step(observe([0], at, [0.8]))
    policy.checked(0, 2)
    policy.set_prices(Prices(0.0, np.array([5.0])))
    modes = [policy.step(observe([0], at, [0.3])).modes[0] for at in range(2, 8)]
    assert Mode.SAFE in modes
    assert Mode.ALERT not in modes


def test_a_rejection_brings_the_next_check_closer() -> None:
    def tokens_until_due(kept: int) -> int:
        policy = guard_price(40)
        policy.set_prices(Prices(0.0, np.array([1e9])))
        for at in range(10):
            policy.step(observe([0], at, [0.8]))
        policy.checked(0, kept)
        policy.set_prices(Prices(0.0, np.array([5.0])))
        for ahead in range(50):
            if policy.step(observe([0], kept + ahead, [0.8])).actions[0] == Action.CHECK:
                return ahead
        return 50

    assert tokens_until_due(2) < tokens_until_due(10)


def test_a_gate_that_fears_harm_makes_checks_worth_it() -> None:
    model = HarmModel(
        alone=PLAIN.alone, with_gate=Coefficients(intercept=1, rejections=1.5, gate=1)
    )
    chance = model.predict(np.full(4, 0.3), np.array([0.01, 0.5, 0.99, np.nan]))
    assert chance[0] < chance[1] < chance[2]
    assert chance[3] == PLAIN.predict(np.array([0.3]))[0]


def best_cost(top1: float, cost: float, price: float, tokens: int, rule: str) -> float:
    """Expected cost of an answer of so many equal tokens, by dynamic programming.

    State: tokens that a check has left, tokens drafted since. Tokens cost 1, checks ``cost``, a
    finished draft that nobody checks ``price`` times its probability of harm. A rejection at the
    i-th drafted token leaves i - 1 and the check's own. ``best`` chooses the cheaper at every
    state; ``price`` does what `GuardPrice` does, ``never`` nothing, ``lossless`` as `LosslessAuto`.
    """
    rate = float(rejection_rate(np.array([top1]))[0])
    survival, due, worth = np.ones(tokens + 1), [False], [False]
    policy = guard_price(math.inf if rule == "lossless" else price, longest=tokens + 1)
    policy.set_prices(Prices(0.0, np.array([cost])))
    for at in range(tokens):
        due.append(policy.step(observe([0], at, [top1])).actions[0] == Action.CHECK)
        worth.append(bool(policy.worth(np.array([0]))[0]))
        policy.asked[:] = False  # look on, at a longer draft
    drafted = np.maximum(np.arange(tokens + 1) - 1, 0)
    survival = (2 / (2 + drafted * rate)) ** 2
    harm = price * PLAIN.predict(drafted * rate)
    value = np.zeros((tokens + 1, tokens + 2))
    for left in range(tokens - 1, -1, -1):
        for n in range(tokens - left, 0, -1):
            end = left + n == tokens
            check = cost + (0 if end else survival[n] * value[left + n, 1])
            for i in range(2, n + 1):
                check += (survival[i - 1] - survival[i]) * value[left + i - 1, 1]
            go = harm[n] if end else 1 + value[left, n + 1]
            checks = {"best": check < go, "never": False}.get(rule, worth[n] if end else due[n])
            value[left, n] = check if checks else go
    return float(value[0, 1])


def test_the_rule_is_close_to_the_best_of_all() -> None:
    """What it cannot know is how long the answer will be."""
    found = {"price": [], "never": [], "lossless": []}
    for tokens, top1, cost, price in itertools.product(
        (10, 24), (0.5, 0.8, 0.95, 0.99), (1.5, 5, 20), (5, 50, 200, 1000)
    ):
        best = best_cost(top1, cost, price, tokens, "best")
        for rule, ratios in found.items():
            ratios.append(best_cost(top1, cost, price, tokens, rule) / best)
    assert min(map(min, found.values())) >= 1 - 1e-9
    assert np.mean(found["price"]) < 1.1
    assert np.quantile(found["price"], 0.9) < 1.2
    assert np.median(found["price"]) < 1.03
    assert np.mean(found["price"]) < min(np.mean(found["never"]), np.mean(found["lossless"])) - 0.2


# --- rows ---


@examples(60)
@given(
    top1=st.lists(st.tuples(*[st.floats(0.05, 1)] * 3), min_size=2, max_size=20),
    price=st.floats(1, 500),
    own=st.floats(0, 20),
    data=st.data(),
)
def test_rows_know_nothing_of_each_other_and_move_whole(
    top1: list[tuple[float, ...]], price: float, own: float, data: st.DataObject
) -> None:
    """Three requests that wander through six slots decide as each does alone."""
    together = guard_price(price, rows=6)
    alone = [guard_price(price) for _ in range(3)]
    together.set_prices(Prices(0.0, np.full(6, own)))
    for policy in alone:
        policy.set_prices(Prices(0.0, np.array([own])))
    slots = [0, 1, 2]
    for at, probabilities in enumerate(top1):
        if data.draw(st.booleans()):
            moved = data.draw(st.integers(0, 2))
            target = data.draw(st.sampled_from(sorted(set(range(6)) - set(slots))))
            together.move(slots[moved], target)
            slots[moved] = target
        shared = together.step(observe(slots, at, list(probabilities)))
        for i, policy in enumerate(alone):
            own_decision = policy.step(observe([0], at, [probabilities[i]]))
            assert own_decision.actions[0] == shared.actions[i]
            assert own_decision.modes[0] == shared.modes[i]
            if own_decision.actions[0] == Action.CHECK:
                kept = data.draw(st.integers(int(policy.start[0]) + 1, at + 1))
                policy.checked(0, kept)
                together.checked(slots[i], kept)
                if kept <= at:  # the rest of the draft is gone; so are the other rows' positions
                    return


def test_rows_join_a_pass_that_happens_anyway() -> None:
    def joins(price: float, shared: float, ends: bool) -> list[int]:
        policy = guard_price(price, rows=2)
        policy.set_prices(Prices(shared, np.array([1.0, 1.0])))
        policy.rows_a_pass = 1.0
        for at in range(4):
            seen = observe([0, 1], at, [0.8, 0.8])
            policy.step(seen)
        if ends and policy.finish(seen.take(np.array([False, True]))).actions[0] == Action.CHECK:
            return [-1]
        return policy.share_pass(1, [1])

    assert joins(price=30, shared=100, ends=True) == [1]  # alone not worth it, in company it is
    assert joins(price=0.1, shared=100, ends=True) == []
    assert joins(price=1e9, shared=1, ends=True) == [-1]


# --- with a model ---


@examples(6)
@given(
    press=st.sampled_from(["SnapKVPress", "KnormPress", "StreamingLLMPress"]),
    price=st.one_of(st.just(math.inf), st.floats(0, 300)),
    bus=st.floats(1, 200),
    rows=st.integers(1, 5),
    sample=st.booleans(),
)
def test_what_a_check_leaves_is_the_uncompressed_answer(
    press: str, price: float, bus: float, rows: int, sample: bool
) -> None:
    from test_guard import GREEDY, SAMPLING, spec

    model = make_tiny_model("llama")
    decoding: Decoding = SAMPLING if sample else GREEDY
    requests = ragged_requests(model.config.vocab_size)
    session = Session(
        model, decoding, press=build_press(spec(press, 3), "0.500"), rows=rows, cold="host"
    )
    policy = GuardPrice("guard_price", rows, price, decoding.max_new_tokens, PLAIN)
    observer = GuardObserver(session, policy, bus_ratio=bus)
    expected = uncompressed(model, requests, decoding)
    for completion, report in guarded(session, requests, observer):
        assert not report.notes
        kept = max(report.rewound_to, default=0)
        own = expected[completion.request.key]
        assert completion.token_ids[:kept] == own[:kept]
        if math.isinf(price):
            assert completion.token_ids == own
        if price == 0:
            assert not completion.checks


def test_a_bus_makes_checks_dearer() -> None:
    model = make_tiny_model("llama")
    requests = ragged_requests(model.config.vocab_size)[:2]
    from test_guard import GREEDY, spec

    press = build_press(spec("KnormPress", 3), "0.500")
    session = Session(model, GREEDY, press=press, rows=2, cold="host")
    seen = []

    class Watch(GuardObserver):
        def observe(self, session: Session, step: object) -> None:
            seen.append([check_prices(session, ratio) for ratio in (None, 1.0, 50.0)])
            super().observe(session, step)  # type: ignore[arg-type]

    list(guarded(session, requests, Watch(session, LosslessAuto("lossless_auto", 2))))
    own = [[prices.own for prices in step] for step in seen]
    assert all(np.array_equal(a, b) for a, b, _ in own)  # the host is the device
    assert all(np.allclose(50 * b, c) for _, b, c in own)


def test_generate_with_a_price() -> None:
    model = make_tiny_model("llama")
    import kvpress
    from test_guard import left_padded

    inputs = left_padded(ragged_requests(model.config.vocab_size, count=3))
    truth = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    exact = KVGuard(kvpress.KnormPress(0.6), policy="guard_price", harm_price=math.inf)
    output = model.generate(**inputs, custom_generate=exact, max_new_tokens=12, do_sample=False)
    assert output.tolist() == truth.tolist()
    assert all(row.scheduled_steps and not row.alarm_steps for row in exact.report)
    never = KVGuard(kvpress.KnormPress(0.6), policy="guard_price", harm_price=0)
    model.generate(**inputs, custom_generate=never, max_new_tokens=12, do_sample=False)
    assert not any(row.alarm_steps for row in never.report)


def test_a_guard_with_a_price_is_saved(tmp_path: Path) -> None:
    import kvpress

    guard = KVGuard(
        kvpress.KnormPress(0.6), policy="guard_price", harm_price=7, bus_ratio=20, predictor=PLAIN
    )
    guard.save(tmp_path)
    again = KVGuard.load(tmp_path)
    assert (again.harm_price, again.bus_ratio, again.harm_model) == (7, 20, PLAIN)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"harm_price": -1}, "harm_price is at least 0"),
        ({"harm_price": math.nan}, "harm_price is at least 0"),
        ({"bus_ratio": 0.5}, "bus_ratio is at least 1"),
        ({"predictor": "nowhere.json"}, "nowhere.json is not one of a run"),
        ({"policy": "guard", "predictor": PLAIN}, "a HarmModel is that of policy='guard_price'"),
    ],
)
def test_bad_arguments_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(GuardError, match=message):
        KVGuard(None, **({"policy": "guard_price"} | given))  # type: ignore[arg-type]
    if "harm_price" in given:
        with pytest.raises(ValueError, match="harm_price is at least 0"):
            GuardPrice("guard_price", 1, given["harm_price"], 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bus_ratio"):
        GuardSettings(bus_ratio=0.5)


# --- the model of harm ---


def planted(prompts: int, intercept: float, slope: float) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Tokens and outcomes of answers whose harm follows a logistic law of their rejections."""
    rng = np.random.default_rng(3)
    tokens, outcomes = [], []
    for prompt in range(prompts):
        top1 = rng.uniform(rng.uniform(0, 0.98), 1, 12).astype(np.float32)
        key = dict(zip(TRACE_KEYS, ("m", "p", "0.500", f"{prompt:05d}"), strict=True))
        risk = np.log(rejection_rate(top1[1:]).sum() + 0.01)
        harmed = rng.random() < 1 / (1 + np.exp(-(intercept + slope * risk)))
        tokens += [key | {"position": at, "top1_probability": p} for at, p in enumerate(top1)]
        outcomes.append(key | {"harmed": bool(harmed)})
    return pl.DataFrame(tokens), pl.DataFrame(outcomes)


def test_a_planted_law_is_found() -> None:
    model = fit_harm_model(*planted(3000, -0.5, 1.2))
    assert model.alone.intercept == pytest.approx(-0.5, abs=0.15)
    assert model.alone.rejections == pytest.approx(1.2, abs=0.15)
    assert model.with_gate is None
    assert model.provenance["requests"] == 3000


def test_too_few_harmed_requests_leave_the_default() -> None:
    model = fit_harm_model(*planted(100, -20, 0.1))
    assert model.alone == DEFAULT.alone
    assert "fewer than" in model.provenance["fit"]


def test_a_harm_model_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "harm_model.json"
    save_harm_model(PLAIN, path)
    assert load_harm_model(path) == PLAIN
    for content in ("[]", "{", json.dumps({"alone": {"intercept": 0, "rejections": -1}})):
        path.write_text(content)
        with pytest.raises(GuardError, match="is not one of a run"):
            load_harm_model(path)


def test_the_stopping_threshold_is_that_of_check_timing() -> None:
    """Worth a check long before, a sure draft goes on until its survival is low."""
    policy = guard_price(1e6)
    policy.set_prices(Prices(0.0, np.array([5.0])))
    for at in range(64):
        if policy.step(observe([0], at, [0.95])).actions[0] == Action.CHECK:
            break
    rate = float(rejection_rate(np.array([0.95]))[0])
    survival = (2 / (2 + at * rate)) ** 2
    assert survival * 0.9 < float(stopping_survival(0.06, 5.0)) < survival * 1.15
