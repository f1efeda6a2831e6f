"""Rows that are checked in vain and get their full cache back, beside the best choice in hindsight.

The simulated rows have planted rejections; their costs are added up here, token by token.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
import pytest
from conftest import examples, make_tiny_model
from hypothesis import given
from hypothesis import strategies as st
from test_check_timing import observe
from test_engine import ragged_requests, spec
from test_guard import GREEDY, SAMPLING, uncompressed

from kvguard.check_timing import PRIOR_KEPT, LosslessAuto, Prices, Promotion
from kvguard.checks import check_prices
from kvguard.controller import Mode
from kvguard.engine import Session, Step
from kvguard.guard_observer import GuardObserver, guarded
from kvguard.harm_model import Coefficients, HarmModel
from kvguard.harm_price import GuardPrice
from kvguard.policies import Action
from kvguard.prefill import prefill_prefix
from kvguard.presses import build_press

PLAIN = HarmModel(alone=Coefficients(intercept=0.5, rejections=2.0))


class Costs(NamedTuple):
    """What promoting costs a row, in drafted tokens, as `Promotion`, and a check."""

    check: float
    transfer: float
    extra: float
    limit: int

    def prices(self) -> Prices:
        whole = Promotion(np.array([self.transfer]), np.array([self.extra]), np.array([self.limit]))
        return Prices(0.0, np.array([self.check]), whole)


class Outcome(NamedTuple):
    """Of a simulated row: costs and kept tokens after each check; where it was promoted."""

    paid: list[float]
    kept: list[int]
    promoted_at: int | None
    total: float


Rule = Literal["own", "never", "first"]


def simulate(
    costs: Costs,
    tokens: int,
    top1: float,
    rejected: float,
    seed: int,
    rule: Rule = "own",
    policy: LosslessAuto | None = None,
) -> Outcome:
    """A row of so many tokens whose drafted tokens are rejected with a probability."""
    policy = policy or LosslessAuto("lossless_auto", 1)
    policy.reset(0, 0)
    policy.set_prices(costs.prices())
    rng = np.random.default_rng(seed)
    kept, total = 0, 0.0
    paid, after = [], []
    while True:
        drafted, first = 0, None
        while True:
            if drafted and first is None and rng.random() < rejected:
                first = drafted
            action = policy.step(observe([0], kept + drafted, [top1])).actions[0]
            drafted += 1
            ends = kept + drafted >= (costs.limit if first is not None else tokens)
            if action == Action.CHECK or ends:
                break
        total += drafted + costs.check
        kept = min(kept + (drafted if first is None else first), tokens)
        policy.checked(0, kept)
        paid.append(total)
        after.append(kept)
        if kept == tokens:
            return Outcome(paid, after, None, total)
        if {"own": policy.promotes(0), "never": False, "first": True}[rule]:
            total += costs.transfer + (tokens - kept) * (1 + costs.extra)
            return Outcome(paid, after, kept, total)


def best(costs: Costs, never: Outcome, tokens: int) -> float:
    """The cheapest choice in hindsight: after any of the row's checks, or never."""
    later = [
        paid + costs.transfer + (tokens - kept) * (1 + costs.extra)
        for paid, kept in zip(never.paid[:-1], never.kept[:-1], strict=True)
    ]
    return min([never.total, *later])


COSTS = st.builds(
    Costs,
    check=st.floats(1, 60),
    transfer=st.floats(0, 60),
    extra=st.floats(0, 3),
    limit=st.integers(20, 120),
)


@examples(60)
@given(
    costs=COSTS,
    share=st.floats(0.1, 1),
    top1=st.floats(0.3, 1),
    rejected=st.floats(0, 0.9),
    seed=st.integers(0, 99),
)
def test_what_a_row_may_cost_before_it_is_promoted(
    costs: Costs, share: float, top1: float, rejected: float, seed: int
) -> None:
    """After every check that does not promote, the regret is within the bound of the module."""
    tokens = max(2, int(share * costs.limit))
    found = simulate(costs, tokens, top1, rejected, seed)
    last = len(found.kept) - 1  # promoted, or the answer's end
    for paid, kept in zip(found.paid[:last], found.kept[:last], strict=True):
        if kept <= costs.limit - kept:
            regret = paid - kept * (1 + costs.extra)
            bound = costs.transfer * (1 + PRIOR_KEPT / kept) + PRIOR_KEPT * costs.extra
            assert regret <= bound + 1e-6


@pytest.mark.parametrize("extra", [0.7, 1.9])
@pytest.mark.parametrize(("check", "transfer"), [(3.0, 0.05), (5.0, 2.1), (11.4, 8.4)])
def test_beside_the_best_choice_in_hindsight(check: float, transfer: float, extra: float) -> None:
    """Bus 1, 50 and 200: hopeless rows cost little more than the best, the others are left alone.

    Copied lists of 15 to 35 tokens, sure and rejected one time in three; answers that are rejected
    every tenth token, every fiftieth, never.
    """
    costs = Costs(check, transfer, extra, 40)
    kinds = {"copied": (0.97, 0.3), "some": (0.9, 0.1), "few": (0.97, 0.02), "clean": (0.95, 0.0)}
    for kind, (top1, rejected) in kinds.items():
        own, never, oracle = 0.0, 0.0, 0.0
        for seed in range(12):
            tokens = 15 + seed * 20 // 12
            one = simulate(costs, tokens, top1, rejected, seed)
            other = simulate(costs, tokens, top1, rejected, seed, "never")
            own, never = own + one.total, never + other.total
            oracle += best(costs, other, tokens)
        assert own <= 1.2 * never
        assert own <= 2 * oracle
        if kind == "copied":
            assert own <= 1.35 * oracle
            if transfer > 1 and extra < 1:
                assert own <= 0.5 * never
        if kind == "clean":
            assert own == never


def test_a_check_that_pays_promotes_nobody() -> None:
    """Cheap checks and a heavy cache: whatever is rejected, holding it costs more."""
    for rejected in (0.05, 0.3):
        found = simulate(Costs(1.2, 0.1, 6.0, 64), 60, 0.9, rejected, 1)
        assert found.promoted_at is None


def test_without_prices_of_promotion_nobody_is_promoted() -> None:
    policy = LosslessAuto("lossless_auto", 1)
    policy.set_prices(Prices(0.0, np.array([1e6])))
    policy.step(observe([0], 0, [0.5]))
    policy.step(observe([0], 1, [0.5]))
    policy.checked(0, 1)
    assert not policy.promotes(0)


def test_a_row_whose_harm_is_not_worth_checks_is_not_promoted() -> None:
    """Its earlier checks cost much, but going on unchecked costs next to nothing."""
    costs = Costs(5.0, 2.0, 0.7, 64)
    found = {
        price: simulate(
            costs, 40, 0.97, 0.3, 2, policy=GuardPrice("guard_price", 1, price, 64, PLAIN)
        ).promoted_at
        for price in (math.inf, 1e-6)
    }
    assert found[math.inf] is not None
    assert found[1e-6] is None


def test_a_promoted_row_is_never_checked_again() -> None:
    for policy in (LosslessAuto("a", 2), GuardPrice("g", 2, 1e9, 64, PLAIN)):
        policy.set_prices(Prices(5.0, np.array([1.0, 1.0])))
        policy.step(observe([0, 1], 0, [0.3, 0.3]))
        policy.checked(0, 1)
        policy.set_promoted(0)
        assert policy.modes[0] == Mode.SAFE
        for at in range(1, 70):
            seen = observe([0, 1], at, [0.3, 0.3])
            decision = policy.step(seen)
            assert decision.actions[0] == Action.CONTINUE
            assert decision.modes[0] == Mode.SAFE
            assert policy.share_pass(1, [0]) == []
            if decision.actions[1] == Action.CHECK:
                policy.checked(1, at + 1)
        assert policy.finish(seen).actions[0] == Action.CONTINUE
        policy.reset(0, 0)
        assert not policy.promoted[0]


# --- with a model ---


@examples(8)
@given(
    press=st.sampled_from(["SnapKVPress", "KnormPress", "StreamingLLMPress"]),
    share=st.sampled_from([0.2, 0.5, 1.0]),
    price=st.sampled_from([None, math.inf]),
    rows=st.integers(1, 5),
    sample=st.booleans(),
    cold=st.sampled_from(["host", "none"]),
    once=st.booleans(),
    seed=st.integers(0, 99),
)
def test_promoted_at_any_moment_the_answer_is_the_uncompressed_one(
    press: str,
    share: float,
    price: float | None,
    rows: int,
    sample: bool,
    cold: Literal["host", "none"],
    once: bool,
    seed: int,
) -> None:
    """Rows that are promoted at random beside others that are not, with refill."""
    rng = np.random.default_rng(seed)
    model = make_tiny_model("llama")
    decoding = SAMPLING if sample else GREEDY
    requests = ragged_requests(model.config.vocab_size)
    session = Session(
        model,
        decoding,
        press=build_press(spec(press, 3), "0.500"),
        rows=rows,
        cold=cold,
        prefix=prefill_prefix(model, requests[0].prompt_ids[:11]) if once else None,
        sharing="full" if once else "none",
    )
    longest = decoding.max_new_tokens
    policy = LosslessAuto("lossless_auto", rows)
    if price is not None:
        policy = GuardPrice("guard_price", rows, price, longest, PLAIN)
    policy.promotes = lambda row: bool(rng.random() < share)  # type: ignore[method-assign]
    expected = uncompressed(model, requests, decoding)
    promoted = 0

    class Watch(GuardObserver):
        def observe(self, session: Session, step: Step) -> None:
            super().observe(session, step)
            nonlocal promoted
            for number, row in enumerate(session.rows):
                if policy.promoted[number]:
                    promoted += 1
                    assert row.exact
                    assert row.cold is None
                    if not row.ended and row.sits_out:
                        kept = session.prompt_lengths[number] + session.lengths[number]
                        assert (session.slots.lengths[:, number] == kept - 11 * once).all()

    checks = {}
    for completion, report in guarded(session, requests, Watch(session, policy, bus_ratio=50)):
        assert not report.notes
        assert completion.token_ids == expected[completion.request.key]
        checks[completion.request.key] = completion.checks
    assert promoted or share < 1 or not any(checks.values())
    assert session.slots.allocated_bytes == 0 or session.slots.active == 0


def test_what_promotion_costs() -> None:
    """The transfer is what a check moves; then the evicted entries, read and held, token by token.

    The peak holds the cache twice for a moment; bytes moved are those of the whole cache.
    """
    model = make_tiny_model("llama")
    requests = ragged_requests(model.config.vocab_size)[:2]
    press = build_press(spec("KnormPress", 3), "0.500")
    session = Session(model, GREEDY, press=press, rows=2, cold="host")
    policy = LosslessAuto("lossless_auto", 2)
    asked: list[int] = []

    def once(row: int) -> bool:
        asked.append(row)
        return len(asked) == 1

    policy.promotes = once  # type: ignore[method-assign]
    before: dict[str, int] = {}

    class Watch(GuardObserver):
        def observe(self, session: Session, step: Step) -> None:
            exact = [row.exact for row in session.rows]
            moved = [row.completion.bytes_moved for row in session.rows]
            prices = check_prices(session, 50.0)
            assert prices.promotion is not None
            slots = session.slots
            weights = sum(parameter.nbytes for parameter in session.model.parameters())
            own = [
                int(slots.lengths[:, i].sum()) * slots.bytes_per_entry for i in range(len(exact))
            ]
            mean = np.mean([size for size, full in zip(own, exact, strict=True) if not full] or own)
            for i, row in enumerate(session.rows):
                if exact[i]:
                    continue
                tokens = int(session.prompt_lengths[i] + session.lengths[i])
                beyond = tokens * slots.layers * slots.bytes_per_entry - own[i]
                read = weights / session.active + mean
                assert prices.promotion.extra[i] == pytest.approx(beyond / mean + beyond / read)
                assert prices.promotion.transfer[i] == pytest.approx(prices.own[i])
                assert row.cold is not None
            super().observe(session, step)
            for i, row in enumerate(session.rows):
                if row.exact and not exact[i]:
                    tokens = int(session.prompt_lengths[i] + session.lengths[i])
                    size = tokens * slots.layers * slots.bytes_per_entry
                    before[row.completion.request.key] = size
                    assert row.completion.bytes_moved - moved[i] >= size
                    assert row.completion.device_bytes_peak >= slots.allocated_bytes + size

    watch = Watch(session, policy, bus_ratio=50)
    done = {report.key: (one, report) for one, report in guarded(session, requests, watch)}
    assert len(before) == 1
    (key,) = before
    assert done[key][1].modes[-1][1] == "SAFE"
    assert done[key][0].token_ids == uncompressed(model, requests)[key]
