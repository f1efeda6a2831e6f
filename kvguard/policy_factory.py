"""A policy from its name in the configuration."""

import numpy as np
from numpy.typing import NDArray

from kvguard.check_timing import LosslessAuto
from kvguard.config import POLICY_NAMES, Live, OperatingPoint, ratio_text
from kvguard.harm_model import HarmModel
from kvguard.harm_price import GuardPrice
from kvguard.policies import Action, Guard, Policy
from kvguard.rivals import (
    AlwaysSafe,
    ClockOrLoop,
    EntropyAlarm,
    Ergo,
    Gate,
    Ladder,
    LoopGuard,
    Lossless,
    NgramStop,
    Offload,
    PeriodicRefresh,
    Probation,
    RandomAlarm,
    RepetitionRuns,
    SharedPrefix,
    VerifyAll,
    VerifyOnFailure,
)


def make_policy(
    name: str,
    rows: int,
    *,
    max_new_tokens: int | NDArray[np.integer],
    live: Live | None = None,
    controller: OperatingPoint | None = None,
    check_every_tokens: int = 1,
    alarm_rate: float | NDArray[np.float64] | None = None,
    press_ratio: str | None = None,
    clock_tokens: int | NDArray[np.integer] | None = None,
    gate_threshold: float | NDArray[np.float64] | None = None,
    ladder_threshold: float | NDArray[np.float64] | None = None,
    harm_model: HarmModel | None = None,
) -> Policy:
    """Build the policy of that name for a batch of ``rows`` slots.

    Args:
        name: one of config.POLICY_NAMES.
        rows: slots of the batch.
        max_new_tokens: the longest answer, of all rows or of each.
        live: parameters of the rivals; None takes the defaults.
        controller: the guard's thresholds; the ``guard*`` policies need it.
        check_every_tokens: of the ``guard*`` policies.
        alarm_rate: share of requests that ``random`` alarms, when ``live.random_rate`` is
            "matched": the guard's own rate, one for all or one per row.
        press_ratio: the ratio of ``constant``.
        clock_tokens: of ``clock_or_loop``, of all rows or of each, chosen on train prompts;
            ``live.clock_tokens`` where that is a number.
        gate_threshold: of ``gate``, chosen on calibration prompts; ``live.gate_threshold`` where
            that is a number.
        ladder_threshold: of ``ladder``, chosen on calibration prompts; ``live.ladder_threshold``
            where that is a number.
        harm_model: of ``guard_price``; None: its default.

    Raises:
        ValueError: an unknown name, or an argument that this policy needs is missing or wrong.
    """
    live = live or Live()
    if name not in POLICY_NAMES:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(POLICY_NAMES)}")
    if name == "guard_price":
        if live.harm_price == "certified":
            raise ValueError("policy 'guard_price' needs the price that is certified (harm_price=)")
        return GuardPrice(name, rows, live.harm_price, max_new_tokens, harm_model)
    if name.startswith("guard"):
        if controller is None:
            raise ValueError(f"policy {name!r} needs a controller setting (controller=)")
        return _guard(name, rows, controller, check_every_tokens)
    if name == "random":
        rate = alarm_rate if live.random_rate == "matched" else live.random_rate
        if rate is None or not np.all((np.asarray(rate) >= 0) & (np.asarray(rate) <= 1)):
            raise ValueError(f"policy 'random' needs an alarm rate in [0, 1], got {rate!r}")
        return RandomAlarm(name, rows, rate, max_new_tokens)
    if name in ("ngram_stop", "loopguard", "verify_on_failure", "clock_or_loop"):
        return _loop_rival(name, rows, max_new_tokens, live, clock_tokens)
    if name == "entropy":
        return EntropyAlarm(name, rows, live.entropy_nats, live.entropy_tokens)
    if name == "ergo":
        return Ergo(name, rows, live.ergo_delta_nats, live.ergo_window_tokens)
    if name == "periodic_refresh":
        return PeriodicRefresh(name, rows, live.refresh_tokens)
    if name == "verify_all":
        return VerifyAll(name, rows)
    if name == "lossless":
        return Lossless(name, rows, live.lossless_tokens)
    if name == "lossless_auto":
        return LosslessAuto(name, rows)
    if name == "probation":
        return Probation(name, rows, live.probation_tokens)
    if name == "gate":
        bound = gate_threshold if live.gate_threshold == "calibrated" else live.gate_threshold
        if bound is None:
            raise ValueError("policy 'gate' needs the threshold of its score (gate_threshold=)")
        return Gate(name, rows, bound)
    if name == "ladder":
        own = live.ladder_threshold
        bound = ladder_threshold if own == "calibrated" else own
        if bound is None:
            raise ValueError("policy 'ladder' needs the threshold of its risk (ladder_threshold=)")
        return Ladder(name, rows, bound)
    if name == "always_safe":
        return AlwaysSafe(name, rows)
    if name == "offload":
        return Offload(name, rows)
    if name == "shared_prefix":
        return SharedPrefix(name, rows)
    policy = Policy(name, rows)
    if name == "constant":
        if press_ratio is None:
            raise ValueError("policy 'constant' needs the ratio at which it runs (press_ratio=)")
        policy.press_ratio = ratio_text(press_ratio)
    return policy


def _guard(name: str, rows: int, controller: OperatingPoint, every: int) -> Guard:
    """One of the guard's policies; they differ in the recovery alone."""
    if name == "guard_relax_only":
        return Guard(name, rows, controller, Action.RELAX)
    if name == "guard_restart":
        return Guard(name, rows, controller, Action.RESTART)
    if name == "guard_promote":
        return Guard(name, rows, controller, Action.REWIND)
    if name == "guard_tolerant":
        return Guard(name, rows, controller, Action.REWIND, "tolerant")
    fresh = name == "guard_recompute"
    return Guard(name, rows, controller, Action.CHECK, fresh_checks=fresh, check_every_tokens=every)


def _loop_rival(
    name: str,
    rows: int,
    max_new_tokens: int | NDArray[np.integer],
    live: Live,
    clock_tokens: int | NDArray[np.integer] | None,
) -> Policy:
    """A rival that watches for exact repetitions."""
    runs = RepetitionRuns(rows, live.loop_pattern_tokens, live.loop_copies, live.loop_cover_tokens)
    if name == "ngram_stop":
        return NgramStop(name, rows, runs)
    if name == "loopguard":
        return LoopGuard(name, rows, runs)
    if name == "verify_on_failure":
        return VerifyOnFailure(name, rows, runs, max_new_tokens)
    clock = clock_tokens if live.clock_tokens == "trained" else live.clock_tokens
    if clock is None:
        raise ValueError("policy 'clock_or_loop' needs its number of tokens (clock_tokens=)")
    return ClockOrLoop(name, rows, runs, clock)
