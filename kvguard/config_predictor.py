"""How hazard predictors are trained: a section of the configuration."""

from typing import Literal, get_args

from pydantic import Field

from kvguard.config_types import Count, Probability, ResultsFolder, Section

Target = Literal["harm", "any", "looping", "non_termination", "amnesia", "divergence"]


PredictorKind = Literal["boosted", "sequence"]


class SequenceSettings(Section):
    """How a GRU is fitted; nothing of it is searched. Values of docs/experiments/003-signals.md."""

    hidden: Count = 16
    dropout: float = Field(default=0.2, ge=0, lt=1, description="of the inputs, while fitting")
    learning_rate: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=1e-3, ge=0)
    max_epochs: Count = 40
    patience: Count = Field(default=6, description="epochs without a smaller watched loss")
    batch: Count = Field(default=64, description="answers of one step of the optimiser")


class Predictor(Section):
    """Training of the hazard predictors, or whose predictors the run uses."""

    trained_by: ResultsFolder | None = Field(
        default=None,
        exclude_if=lambda folder: folder is None,  # runs that train are recorded as before it
        description="results folder of a finished run whose models are used; null: this run trains",
    )
    kind: PredictorKind = Field(
        default="boosted",
        description="boosted: trees over a token's features; sequence: a GRU over an answer so far",
    )
    compare_kinds: bool = Field(
        default=False, description="train the other kind too, as a score in the tables"
    )
    sequence: SequenceSettings = SequenceSettings()
    targets: list[Target] = Field(default=list(get_args(Target)))
    feature_set: Literal[
        "full",
        "with_probes",
        "normalised",
        "no_ratio",
        "no_repetition",
        "logit_only",
        "entropy_only",
        "clock_repetition",
        "probes_only",
        "with_evidence",
    ] = "no_ratio"
    formulation: Literal["windowed", "discrete_time"] = "windowed"
    include_post_onset: bool = False
    include_baseline: bool = True
    max_rounds: Count = 400
    early_stopping_rounds: Count = 20
    early_stopping_share: Probability = 0.25
    search_trials: int = Field(default=8, ge=0)
    search_folds: int = Field(default=3, ge=2)
    max_depth: Count = 4
    learning_rate: float = Field(default=0.1, gt=0, le=1)
    probability_calibration: Literal["isotonic", "platt", "none"] = "platt"
    probability_share: Probability = Field(
        default=0.34,
        description="of the calibration prompts: they fit the probabilities, the rest certify",
    )
    bootstrap_samples: Count = 500
    false_alarm_rate: Probability = 0.05
