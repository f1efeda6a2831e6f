"""The policies that there are, and how the guard works: thresholds, tolerance, recovery."""

from typing import Literal, NamedTuple, Self, get_args

from pydantic import Field, model_validator

from kvguard.config_types import BASELINE_RATIO, Count, Ratio, RunTokens, Section


class PolicyEntry(NamedTuple):
    """What readers, the pipeline and the simulation need to know of one policy.

    Attributes:
        name: in configurations, tables and file names.
        label: in figures and captions.
        needs_hazard: it asks the predictor, and runs at the certificate's operating point.
        cost: what a request pays beyond drafting. "none": nothing; "full": all of the cache, or
            more of it, from the start; "promote": a check, and the full cache from then on;
            "check": checks, and compression goes on; "prefill": passes over prompt and answer, and
            compression goes on.
        simulation: what stored traces prove of it, in words, for a safe ratio of 0 and requests
            that do not tie.
        live: whether the engine runs it; oracles need to know how a request ends.
    """

    name: str
    label: str
    needs_hazard: bool
    cost: Literal["none", "full", "promote", "check", "prefill"]
    simulation: str
    live: bool = True


_CHECKED = "exact: what the check leaves is the uncompressed answer"
_FRESH = "exact: the answer is generated afresh without compression"
_GOES_ON = "known without an alarm, and where the check leaves nothing to decode"
_ORACLE = "exact: the compressed trace or the uncompressed one"

POLICIES: dict[str, PolicyEntry] = {
    entry.name: entry
    for entry in (
        PolicyEntry("none", "compression alone", False, "none", "exact: the trace itself"),
        PolicyEntry("always_safe", "full KV cache", False, "full", "exact: the uncompressed trace"),
        PolicyEntry(
            "offload",
            "full KV cache, offloaded",
            False,
            "full",
            "exact: the uncompressed trace with costs that are counted, live and here",
        ),
        PolicyEntry(
            "shared_prefix",
            "full KV cache, prefix held once",
            False,
            "full",
            "exact: the uncompressed trace; its memory is measured live alone",
        ),
        PolicyEntry("guard", "guard", True, "check", _GOES_ON),
        PolicyEntry(
            "guard_price",
            "guard: one price",
            False,
            "check",
            f"{_GOES_ON}; alone, at a price of 4 tokens",
        ),
        PolicyEntry("guard_promote", "guard: full cache after alarm", True, "promote", _CHECKED),
        PolicyEntry(
            "guard_tolerant",
            "guard: tolerant cut",
            True,
            "promote",
            "exact where what it keeps had not left the uncompressed answer",
        ),
        PolicyEntry("guard_recompute", "guard: recompute", True, "prefill", _GOES_ON),
        PolicyEntry("guard_restart", "guard: restart", True, "promote", _FRESH),
        PolicyEntry(
            "guard_relax_only",
            "guard: relax only",
            True,
            "none",
            "exact where compression happens at prefill alone: nothing changes",
        ),
        PolicyEntry("lossless", "lossless", False, "check", _CHECKED),
        PolicyEntry("lossless_auto", "lossless, adaptive", False, "check", _CHECKED),
        PolicyEntry(
            "probation",
            "probation",
            False,
            "promote",
            "exact: rejected, the uncompressed answer; accepted, the trace",
        ),
        PolicyEntry("gate", "gate at prefill", False, "full", _ORACLE),
        PolicyEntry(
            "ladder",
            "ladder of ratios",
            False,
            "full",
            "exact: the trace at the ratio that it chooses, or the uncompressed one",
        ),
        PolicyEntry("verify_all", "check at the end", False, "promote", _CHECKED),
        PolicyEntry("verify_on_failure", "check visible failures", False, "promote", _CHECKED),
        PolicyEntry("clock_or_loop", "clock or loop", False, "promote", _CHECKED),
        PolicyEntry(
            "constant",
            "milder constant ratio",
            False,
            "none",
            "not simulated: interpolated between the measured ratios of the press",
        ),
        PolicyEntry("random", "random alarms", False, "promote", _CHECKED),
        PolicyEntry("entropy", "entropy", False, "promote", _CHECKED),
        PolicyEntry("ergo", "ERGO", False, "promote", _FRESH),
        PolicyEntry("ngram_stop", "n-gram stop", False, "none", "exact: a prefix of the trace"),
        PolicyEntry(
            "loopguard",
            "LoopGuard",
            False,
            "none",
            "alarm step alone: no trace goes on from a pruned cache",
        ),
        PolicyEntry(
            "periodic_refresh",
            "periodic refresh",
            False,
            "prefill",
            "known where the answer ends before the first refresh",
        ),
        PolicyEntry("oracle_gate", "oracle: gate", False, "full", _ORACLE, False),
        PolicyEntry("oracle_onset", "oracle: onset", False, "promote", _ORACLE, False),
        PolicyEntry("oracle_end", "oracle: end", False, "promote", _ORACLE, False),
        PolicyEntry(
            "oracle_ratio",
            "oracle: ratio",
            False,
            "none",
            "exact: the trace at the highest ratio that does not harm this prompt",
            False,
        ),
    )
}
"""Every policy, in the order in which tables and figures show them."""

POLICY_NAMES = tuple(name for name, entry in POLICIES.items() if entry.live)
"""The policies that `kvguard.policy_factory` builds and the live experiment can run."""

MATCHED_POLICIES = ("constant", "random")
"""Rivals that get a number from the simulated guard."""


class PlannedTest(Section):
    """Two policies that the plan of an experiment compares."""

    policy: str
    other: str

    @model_validator(mode="after")
    def _known(self) -> Self:
        for field in ("policy", "other"):
            if getattr(self, field) not in POLICY_NAMES:
                raise ValueError(
                    f"{field}: the policies are {', '.join(POLICY_NAMES)}, got "
                    f"{getattr(self, field)!r}"
                )
        if self.policy == self.other:
            raise ValueError(f"other: another policy than the first, got {self.other!r} twice")
        return self


PointName = Literal["conservative", "balanced", "aggressive"]

POINT_NAMES: tuple[PointName, ...] = get_args(PointName)
"""The operating points that calibration chooses."""


class OperatingPoint(Section):
    """Thresholds of the three-mode controller: 0 < tau_low <= tau_high < 1, k and j at least 1.

    >>> OperatingPoint(tau_low=0.2, tau_high=0.5, k=2, j=8)
    OperatingPoint(tau_low=0.2, tau_high=0.5, k=2, j=8)
    """

    tau_low: float = Field(gt=0, lt=1)
    tau_high: float = Field(gt=0, lt=1)
    k: RunTokens = Field(description="tokens in a row above a threshold before the mode rises")
    j: RunTokens = Field(description="calm tokens in a row before the mode falls")

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.tau_low > self.tau_high:
            raise ValueError(f"tau_low={self.tau_low:g} must not exceed tau_high={self.tau_high:g}")
        return self


Recovery = Literal["continue", "promote", "tolerant", "recompute", "restart", "relax_only"]
"""What an alarm does."""


Sharing = Literal["none", "full", "all"]
"""Which rows refer to one copy of what their prompts begin with. "none": each holds a copy, and
pays for it, as if its context were its own; "full": rows with the full cache refer to it; "all":
compressed rows too, whose press works on what follows it. Presses that do more than drop the lowest
scores, or compress while decoding, compress the whole prompt all the same."""


class Tolerance(Section):
    """Where a tolerant cut sees harm: the first such token or window goes, what is before it stays.

    Attributes:
        window_tokens: length of a window.
        window_llr: nats per token; a window's mean log-likelihood ratio at or above it is harm.
        token_logprob: nats; a token whose uncompressed log-probability is below it is harm.
    """

    window_tokens: Count = 16
    window_llr: float = Field(default=0.3, gt=0)
    token_logprob: float = Field(default=-8.0, lt=0)


class GuardSettings(Section):
    """How the guard works, whatever its thresholds: live runs, simulation and KVGuard alike."""

    recovery: Recovery = Field(
        default="continue", description="what an alarm does; the policies guard, guard_*"
    )
    cold: Literal["host", "disk", "none"] = Field(
        default="host", description="where evicted entries are stored for checks; none: recomputed"
    )
    sharing: Sharing = Field(
        default="none",
        description="rows that refer to one copy of what their prompts begin with: none; full: "
        "those with the full cache; all: compressed ones too, whose press works on what follows. "
        "Others than none in runs with predictor.trained_by alone: stored traces held copies",
    )
    safe_ratio: Ratio = Field(
        default=BASELINE_RATIO, description="fraction removed once a request is promoted"
    )
    check_every_tokens: Count = Field(
        default=8, description="tokens of a row between two times that the guard examines it"
    )
    holdback_tokens: int = Field(
        default=16, ge=0, description="age at which a token that no check has seen is streamed"
    )
    margin_nats: float = Field(
        default=1e-4, ge=0, description="a drafted token this close to the best one is accepted"
    )
    tolerance: Tolerance = Tolerance()
    bus_ratio: float | None = Field(
        default=None,
        ge=1,
        allow_inf_nan=False,
        description="bytes read from device memory in the time that the bus brings one, for when a "
        "check is worth it; null: 1 on a CPU, 50 elsewhere",
    )
