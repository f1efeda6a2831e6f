"""The live experiment: which policies run with which parameters, which prices are certified."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvguard.config_policies import POLICY_NAMES, PlannedTest, PointName
from kvguard.config_types import Count, Name, Probability, Ratio, Section


class Live(Section):
    """The live experiment: policies on test prompts, and prices on prompts that certify them."""

    policies: list[str] = Field(
        default=["none", "guard", "guard_promote", "verify_on_failure", "always_safe"]
    )
    planned_tests: list[PlannedTest] = Field(
        default=[],
        description="pairs compared in `tables/planned_tests`, adjusted as one family",
    )
    operating_point: PointName = "balanced"
    conditions: list[tuple[Name, Ratio]] = Field(
        default=[], description="(press, ratio) pairs; empty: each press's live_ratios"
    )
    shard_size: Count = 24
    refresh_tokens: Count = 32
    entropy_nats: float = Field(default=4.0, gt=0)
    entropy_tokens: Count = 4
    ergo_delta_nats: float = Field(default=1.0, gt=0)
    ergo_window_tokens: Count = 16
    random_rate: float | Literal["matched"] = "matched"
    lossless_tokens: Count = Field(
        default=32, description="tokens between two checks of `lossless`"
    )
    probation_tokens: Count = Field(
        default=16, description="tokens after which `probation` decides"
    )
    clock_tokens: Count | Literal["trained"] = Field(
        default="trained", description="when `clock_or_loop` alarms; trained: on train prompts"
    )
    gate_threshold: float | Literal["calibrated"] = Field(
        default="calibrated", description="of the score at prefill; above it `gate` promotes"
    )
    ladder_threshold: Annotated[float, Field(ge=0, le=1)] | Literal["calibrated"] = Field(
        default="calibrated",
        description="of the predicted harm; `ladder` starts at the heaviest ratio that is below it",
    )
    harm_price: Annotated[float, Field(ge=0)] | Literal["certified"] = Field(
        default=100.0,
        description="of `guard_price`: what a harmed answer costs, in drafted tokens; certified: "
        "the lowest price that is certified at the first of `certify_levels`, or all is checked",
    )
    certify_prices: list[Annotated[float, Field(gt=0)]] = Field(
        default=[],
        description="prices that run live on the prompts that certify, tested from the highest "
        "down; an infinite one is lossless and needs no test; empty: no such runs",
    )
    certify_levels: list[Probability] = Field(
        default=[0.1, 0.05],
        min_length=1,
        description="shares of harmed requests that prices are tested against, the primary first",
    )
    loop_pattern_tokens: Count = Field(default=64, description="longest period of a repetition")
    loop_copies: int = Field(default=3, ge=2, description="copies that make a repetition")
    loop_cover_tokens: Count = Field(
        default=20, description="tokens that the copies cover at least"
    )

    @model_validator(mode="after")
    def _policies(self) -> Self:
        for index, policy in enumerate(self.policies):
            if policy not in POLICY_NAMES:
                raise ValueError(
                    f"policies.{index}: the policies are {', '.join(POLICY_NAMES)}, got {policy!r}"
                )
        for field in ("certify_prices", "certify_levels"):
            if len(set(getattr(self, field))) != len(getattr(self, field)):
                raise ValueError(f"{field}: each is listed once, got {getattr(self, field)}")
        return self

    @property
    def prices_tested(self) -> list[float]:
        """Prices of the certificate in the order of its tests: from the highest down."""
        return sorted(self.certify_prices, reverse=True)
