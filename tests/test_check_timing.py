"""When `lossless_auto` checks, beside horizons that are found by trying all."""

import numpy as np
import pytest

from kvguard.check_timing import (
    LosslessAuto,
    Prices,
    rejection_rate,
    stopping_survival,
)
from kvguard.policies import Action, Observation
from kvguard.schema import SIGNALS


def observe(rows: list[int], position: int, top1: list[float]) -> Observation:
    signals = np.zeros((len(rows), len(SIGNALS)), np.float32)
    signals[:, list(SIGNALS).index("top1_probability")] = top1
    positions = np.full(len(rows), position, np.int32)
    return Observation(np.array(rows), positions, positions, signals, None, None)


def horizon(top1: list[float], price: float = 4.0, history: list[int] | None = None) -> int:
    """Tokens of the draft at which a check is due; ``history``: accepted tokens of checks before.

    Each of those drafts had ten tokens.
    """
    policy = LosslessAuto("lossless_auto", 1, 500)
    policy.reset(0, 0)
    policy.set_prices(Prices(0.0, np.array([1e9])))
    at = 0
    for accepted in history or []:
        for token in range(10):
            policy.step(observe([0], at + token, [0.8]))
        at += accepted
        policy.checked(0, at)
    policy.set_prices(Prices(0.0, np.array([price])))
    for token, probability in enumerate(top1):
        decision = policy.step(observe([0], at + token, [probability]))
        if decision.actions[0] == Action.CHECK:
            return token + 1
    return len(top1) + 1


@pytest.mark.parametrize("rate", [0.002, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("price", [1.5, 4.0, 30.0, 200.0])
def test_the_horizon_is_the_best_of_all(rate: float, price: float) -> None:
    """At a constant rate: kept tokens per cost of every horizon, by adding up."""
    tokens = np.arange(1, 20_000)
    kept = 1 + np.cumsum(np.exp(-rate * tokens))
    yields = np.concatenate([[1 / price], kept / (tokens + price)])  # from no drafted token on
    threshold = float(stopping_survival(rate, price))
    chosen = int(-np.log(threshold) / rate)  # the next one would be kept less often than that
    best = yields.max()
    assert yields[chosen] > 0.97 * best
    assert threshold == pytest.approx(best, rel=0.25 if rate == 0.5 else 0.06)


def test_a_check_that_costs_less_than_a_token_is_always_due() -> None:
    assert stopping_survival(0.1, 0.5) == 1
    assert horizon([0.9] * 5, price=0.5) == 1


def test_unsure_tokens_end_a_draft() -> None:
    sure, unsure = 0.9999, 0.3
    assert horizon([sure] * 400) > 30
    assert horizon([unsure] * 400) <= 4
    assert horizon([sure, sure, sure, unsure, unsure, sure]) in (4, 5, 6)
    assert rejection_rate(np.array([0.2, 0.9, 1.0])) == pytest.approx([0.5366, 0.0452, 0.001], 0.01)
    assert rejection_rate(np.array([np.nan])) == rejection_rate(np.array([0.0]))


def test_the_first_token_of_a_draft_is_the_checks_own() -> None:
    """It comes from logits of the uncompressed model, so it is sure, however flat they are."""
    assert horizon([0.0, *[0.9999] * 400]) == horizon([0.9999] * 401)


def test_a_dearer_check_comes_later() -> None:
    found = [horizon([0.9] * 450, price) for price in (1.2, 4, 20, 200)]
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_a_row_learns_from_its_checks() -> None:
    draft = [0.8] * 450
    fresh = horizon(draft, 20)
    assert horizon(draft, 20, history=[10] * 6) > fresh > horizon(draft, 20, history=[2] * 6)


def test_a_draft_has_a_longest_length() -> None:
    policy = LosslessAuto("lossless_auto", 1, 5)
    policy.set_prices(Prices(0.0, np.array([1e9])))
    actions = [policy.step(observe([0], at, [1.0])).actions[0] for at in range(12)]
    assert [at for at, action in enumerate(actions) if action == Action.CHECK] == [4, 9]


def test_rows_join_a_pass_unless_their_own_check_is_dear() -> None:
    def joined(own: float, shared: float, tokens: int, top1: float) -> list[int]:
        policy = LosslessAuto("lossless_auto", 2)
        policy.set_prices(Prices(shared, np.array([own, own])))
        for at in range(tokens):
            policy.step(observe([0, 1], at, [top1, top1]))
        return policy.share_pass(1, [1])

    assert joined(own=1.0, shared=10.0, tokens=3, top1=0.8) == [1]
    assert joined(own=50.0, shared=1.0, tokens=3, top1=0.999) == []
    assert joined(own=3.0, shared=0.01, tokens=3, top1=0.999) == []


def test_what_has_ended_is_checked_to_its_last_token() -> None:
    policy = LosslessAuto("lossless_auto", 1)
    seen = observe([0], 0, [1.0])
    policy.set_prices(Prices(0.0, np.array([1e9])))
    assert policy.step(seen).actions[0] == Action.CONTINUE
    assert policy.finish(seen).actions[0] == Action.CHECK
    policy.checked(0, 1)
    assert policy.finish(seen).actions[0] == Action.CONTINUE
