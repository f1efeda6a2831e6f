"""What an experiment is: pydantic models of ``config.yaml``, checked before any job starts.

Importing this module imports neither torch nor kvpress, so that Snakemake parses its rules quickly.
Lists in an overlay (``experiments/*.yaml``) replace the default's lists; mappings are merged.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from kvguard import press_catalogue
from kvguard.config_errors import explain
from kvguard.config_live import Live as Live
from kvguard.config_models import GgufModel as GgufModel
from kvguard.config_models import HubModel as HubModel
from kvguard.config_models import LocalModel as LocalModel
from kvguard.config_models import Model as Model
from kvguard.config_models import WheelModel as WheelModel
from kvguard.config_policies import MATCHED_POLICIES as MATCHED_POLICIES
from kvguard.config_policies import POINT_NAMES as POINT_NAMES
from kvguard.config_policies import POLICIES as POLICIES
from kvguard.config_policies import POLICY_NAMES as POLICY_NAMES
from kvguard.config_policies import GuardSettings as GuardSettings
from kvguard.config_policies import OperatingPoint as OperatingPoint
from kvguard.config_policies import PlannedTest as PlannedTest
from kvguard.config_policies import PointName as PointName
from kvguard.config_policies import PolicyEntry as PolicyEntry
from kvguard.config_policies import Recovery as Recovery
from kvguard.config_policies import Tolerance as Tolerance
from kvguard.config_predictor import Predictor as Predictor
from kvguard.config_predictor import SequenceSettings as SequenceSettings
from kvguard.config_predictor import Target as Target
from kvguard.config_tasks import Gsm8k as Gsm8k
from kvguard.config_tasks import GsmSymbolic as GsmSymbolic
from kvguard.config_tasks import Task as Task
from kvguard.config_types import BASELINE as BASELINE
from kvguard.config_types import BASELINE_RATIO as BASELINE_RATIO
from kvguard.config_types import (
    Attention,
    Count,
    Name,
    Probability,
    Ratio,
    ResultsFolder,
    SchedulerName,
    Section,
)
from kvguard.config_types import ConfigError as ConfigError
from kvguard.config_types import ratio_text as ratio_text


class Press(Section):
    """One kvpress compressor and the ratios at which it runs."""

    name: Name
    press_class: str = Field(alias="class")
    kwargs: dict[str, Any] = Field(default={})
    phase: Literal["prefill", "decode", "both"] = "prefill"
    ratios: list[Ratio] = Field(min_length=1)
    live_ratios: list[Ratio] | None = Field(
        default=None, description="ratios of the live experiment; null: all, []: none"
    )
    attention: Attention | None = Field(
        default=None, description="overrides the model's for this press; null: the model's"
    )
    interval_tokens: Count = Field(
        default=32, description="decode phase: compress every so many decoded tokens"
    )
    buffer_tokens: int = Field(
        default=64, ge=0, description="decode phase: hidden states kept for scoring"
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.name == BASELINE:
            raise ValueError(
                f"name: {BASELINE!r} is the uncompressed baseline, which always runs; choose "
                f"another name, got {self.name!r}"
            )
        press_catalogue.check_press(self.press_class, self.kwargs, phase=self.phase)
        if "compression_ratio" in self.kwargs:
            raise ValueError(
                "kwargs.compression_ratio: comes from `ratios`, remove it here, "
                f"got {self.kwargs['compression_ratio']!r}"
            )
        if len(set(self.ratios)) != len(self.ratios):
            raise ValueError(f"ratios: every ratio is listed once, got {self.ratios}")
        if any(ratio == BASELINE_RATIO for ratio in self.ratios):
            raise ValueError(
                f"ratios: 0 is the baseline, which always runs; list others, got {self.ratios}"
            )
        for ratio in self.live_ratios or []:
            if ratio not in self.ratios:
                raise ValueError(f"live_ratios: the ratios are {self.ratios}, got {ratio!r}")
        for ratio in self.ratios:
            try:
                press_catalogue.check_ratio(self.press_class, self.kwargs, float(ratio))
            except ValueError as error:
                raise ValueError(f"ratios: {error}") from None
        window = press_catalogue.scoring_window(self.press_class, self.kwargs)
        if self.phase != "prefill" and min(self.interval_tokens, self.buffer_tokens + 1) <= window:
            raise ValueError(
                f"interval_tokens, buffer_tokens: {self.press_class} scores with the newest "
                f"{window} tokens; compressing while decoding needs interval_tokens > {window} and "
                f"buffer_tokens >= {window}, got {self.interval_tokens} and {self.buffer_tokens}"
            )
        return self


class Generation(Section):
    """How tokens are decoded. The model's own sampling defaults are never used."""

    max_new_tokens: Count = 160
    batch_size: Count | Literal["auto"] = 24
    shard_size: Count = 24
    do_sample: bool = False
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    share_prefix: bool = True
    audit: bool = True
    probes: bool = True
    """Measure at prefill what a press removes (`kvguard.probes`)."""
    cold: Literal["host", "disk", "none"] = "host"
    """Where the entries go that a press evicts, for audits and checks; "none" recomputes them."""

    @property
    def text(self) -> str:
        """How tokens are chosen, in words."""
        if not self.do_sample:
            return "greedy"
        nucleus = f", top-p {self.top_p:g}" if self.top_p < 1 else ""
        return f"sampling at temperature {self.temperature:g}{nucleus}"


class Detection(Section):
    """When an answer counts as looping, not terminating, amnesic or diverged (`detectors`)."""

    loop_window_tokens: Count = 20
    loop_repeats: int = Field(default=3, ge=2)
    non_termination_onset: Probability = 0.75
    amnesia_window_tokens: Count = 16
    amnesia_llr: float = Field(default=1.0, gt=0)
    divergence_window_tokens: Count = 16
    divergence_llr: float = Field(default=0.3, gt=0)
    rejection_margin_nats: float = Field(default=1e-4, ge=0)


class Labels(Section):
    horizon_tokens: Count = 32


class Splits(Section):
    """Shares of the prompts; they add up to 1."""

    train: float = Field(
        default=0.5, ge=0, lt=1, description="0: only where `predictor.trained_by` names a run"
    )
    calibration: Probability = 0.25
    test: Probability = 0.25

    @model_validator(mode="after")
    def _sum(self) -> Self:
        total = self.train + self.calibration + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train + calibration + test must be 1, got {total:g}")
        return self

    @property
    def names(self) -> list[str]:
        """Splits that get prompts."""
        return [name for name in ("train", "calibration", "test") if getattr(self, name) > 0]


Price = Annotated[float, Field(gt=0, lt=1)]


class Controller(Section):
    """The grid that calibration searches, and what the three operating points ask for."""

    tau_low: list[Probability] = Field(default=[0.05, 0.1, 0.2, 0.3, 0.4])
    tau_high: list[Probability] = Field(default=[0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
    k: list[Count] = Field(default=[1, 2, 4])
    j: list[Count] = Field(default=[8, 16])
    prices: dict[PointName, Price] = Field(
        default={"conservative": 0.5, "balanced": 0.2, "aggressive": 0.05},
        description="what a check costs, in harmed requests; a check is due where the hazard of "
        "harm exceeds it",
    )

    @model_validator(mode="after")
    def _prices(self) -> Self:
        if set(self.prices) != set(POINT_NAMES):
            raise ValueError(f"prices: one for each of {', '.join(POINT_NAMES)}, got {self.prices}")
        return self


class CertificateSettings(Section):
    """Learn-then-Test: with probability 1 - delta, at most alpha of all requests are harmed and
    not repaired, and at most alarm_budget of them alarm."""

    alpha: Probability = 0.2
    delta: Probability = 0.1
    alarm_budget: float = Field(default=0.5, gt=0, le=0.999)
    false_alarm_alpha: Probability = 0.2
    miss_alpha: Probability = 0.3
    recoveries: list[Recovery] = Field(
        default=["promote", "continue"],
        min_length=1,
        description="each has statements of its own",
    )


class Job(Section):
    """What one job of a stage asks of a scheduler."""

    mem_mb: Count = 4000
    runtime: Count = Field(default=60, description="minutes")
    gpu: int = Field(default=0, ge=0)
    threads: Count = 2
    partition: SchedulerName | None = None
    account: SchedulerName | None = None


class Jobs(Section):
    """Per kind of job: ``model`` runs the language model, ``train`` fits, ``small`` is the rest."""

    shards_per_job: Count = 1
    """Shards that one job of the language model makes with the model loaded once."""
    list_shards: bool = False
    """Whether a plan goes by one list of each job's shards: for thousands of shards."""
    model: Job = Job()
    train: Job = Job()
    small: Job = Job(mem_mb=2000, runtime=20, threads=1)

    @model_validator(mode="after")
    def _lists(self) -> Self:
        if self.list_shards and self.shards_per_job == 1:
            raise ValueError(
                "list_shards: true lists the shards of jobs that make several; set shards_per_job "
                "above 1, got 1"
            )
        return self


class Config(Section):
    """A whole experiment."""

    name: Name
    seed: int = Field(default=0, ge=0)
    results_dir: ResultsFolder = "results"
    models: list[Model] = Field(min_length=1)
    tasks: list[Task] = Field(min_length=1)
    presses: list[Press] = Field(min_length=1)
    generation: Generation = Generation()
    detection: Detection = Detection()
    labels: Labels = Labels()
    splits: Splits = Splits()
    predictor: Predictor = Predictor()
    guard: GuardSettings = GuardSettings()
    controller: Controller = Controller()
    certificate: CertificateSettings = CertificateSettings()
    live: Live = Live()
    jobs: Jobs = Jobs()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field in ("models", "tasks", "presses"):
            names = [entry.name for entry in getattr(self, field)]
            if len(set(names)) != len(names):
                raise ValueError(f"{field}: every name is used once, got {names}")
        if self.live.certify_prices and self.guard.bus_ratio is None:
            raise ValueError(
                "guard.bus_ratio: a price is certified for one bus (live.certify_prices), which "
                "null leaves to the device; give a number, got None"
            )
        if self.live.certify_prices and self.generation.batch_size == "auto":
            raise ValueError(
                "generation.batch_size: a price is certified for so many rows at most "
                "(live.certify_prices); give a number, got 'auto'"
            )
        if self.live.harm_price == "certified" and not self.live.certify_prices:
            raise ValueError(
                "live.certify_prices: harm_price is 'certified', which needs some, got []"
            )
        if self.live.harm_price == "certified" and len(self.models) > 1:
            raise ValueError("live.harm_price: 'certified' is for a run of one model")
        self._check_origin()
        known = {(press.name, ratio) for press in self.presses for ratio in press.ratios}
        for index, condition in enumerate(self.live.conditions):
            if condition not in known:
                raise ValueError(
                    f"live.conditions.{index}: not among the presses' ratios, which are "
                    f"{', '.join(map(str, sorted(known)))}, got {condition}"
                )
        for index, press in enumerate(self.presses):
            eager_only = press_catalogue.needs_attention_weights(press.press_class, press.kwargs)
            not_eager = press_catalogue.refuses_eager(press.press_class, press.kwargs)
            for model in self.models:
                attention = press.attention or model.attention
                if eager_only and attention != "eager":
                    raise ValueError(
                        f"presses.{index}.attention: {press.press_class} reads attention weights, "
                        f"which only 'eager' gives, got {attention!r} for model {model.name!r}"
                    )
                if not_eager and attention == "eager":
                    raise ValueError(
                        f"presses.{index}.attention: {press.press_class} hides keys from any "
                        f"attention but 'eager', got {attention!r} for model {model.name!r}"
                    )
        return self

    def _check_origin(self) -> None:
        """Raise where splits and policies do not go with who trains the predictor."""
        source = self.predictor.trained_by
        shares = self.guard.sharing != "none"
        if shares and (source is None or self.live.certify_prices):
            raise ValueError(
                "guard.sharing: 'none' unless predictor.trained_by names a run and nothing is "
                f"certified (live.certify_prices: []), got {self.guard.sharing!r}"
            )
        if source is None:
            if self.splits.train == 0:
                raise ValueError(
                    "splits.train: above 0, or predictor.trained_by names the run that trained, "
                    "got 0"
                )
            return
        if Path(source).resolve() == Path(self.results_dir).resolve():
            raise ValueError(
                f"predictor.trained_by: another run's folder than results_dir, got {source!r}"
            )
        for index, policy in enumerate(self.live.policies):
            if policy in MATCHED_POLICIES:
                raise ValueError(
                    f"live.policies.{index}: {policy!r} is matched to a simulation of stored "
                    f"answers, which a run with predictor.trained_by has not; accepted are the "
                    f"policies but {', '.join(MATCHED_POLICIES)}, got {policy!r}"
                )

    @property
    def imports_models(self) -> bool:
        """Whether another run's models are used: nothing is trained, and nothing is stored under a
        press beside the live runs."""
        return self.predictor.trained_by is not None

    @property
    def probability_share(self) -> float:
        """Share of the calibration prompts that fit probabilities; 0 where nothing is fitted."""
        return 0.0 if self.imports_models else self.predictor.probability_share

    @property
    def conditions(self) -> list[tuple[str, str]]:
        """(press, ratio) pairs whose answers are stored, the baseline first.

        The baseline alone where the run uses another one's models (`imports_models`).
        """
        return self.all_conditions[:1] if self.imports_models else self.all_conditions

    @property
    def all_conditions(self) -> list[tuple[str, str]]:
        """All (press, ratio) pairs, the baseline first."""
        pairs = [(press.name, ratio) for press in self.presses for ratio in press.ratios]
        return [(BASELINE, BASELINE_RATIO), *pairs]

    @property
    def live_conditions(self) -> list[tuple[str, str]]:
        """(press, ratio) pairs of the live experiment."""
        return self.live.conditions or [
            (press.name, ratio)
            for press in self.presses
            for ratio in (press.ratios if press.live_ratios is None else press.live_ratios)
        ]

    def live_policies(self, press: str, ratio: str) -> list[str]:
        """Policies that run live at a ratio; ``ladder`` once a press, at its heaviest live one."""
        heaviest = max(own for name, own in self.live_conditions if name == press)
        return [name for name in self.live.policies if name != "ladder" or ratio == heaviest]

    @property
    def num_prompts(self) -> int:
        """Prompts of all tasks together."""
        return sum(task.num_prompts for task in self.tasks)

    @property
    def shards(self) -> list[range]:
        """Places in the run's order of the prompts that each shard holds; one task a shard."""
        shards, size, start = [], self.generation.shard_size, 0
        for task in self.tasks:
            stop = start + task.num_prompts
            shards += [range(at, min(at + size, stop)) for at in range(start, stop, size)]
            start = stop
        return shards

    @property
    def live_shards(self) -> list[tuple[str, int, int]]:
        """(task, part, parts) of each shard of the live experiment: one task's test prompts."""
        return self._parts(self.splits.test)

    @property
    def certifying_shards(self) -> list[tuple[str, int, int]]:
        """(task, part, parts) of each shard of one task's certifying prompts, if none fits."""
        return self._parts(self.splits.calibration)

    def _parts(self, share: float) -> list[tuple[str, int, int]]:
        shards = []
        for task in self.tasks:
            expected = max(round(share * task.num_prompts), 1)
            parts = -(-expected // self.live.shard_size)
            shards += [(task.name, part, parts) for part in range(parts)]
        return shards

    def max_new_tokens(self, task: str) -> int:
        """The longest answer to a task's prompts."""
        return self.task(task).max_new_tokens or self.generation.max_new_tokens

    def task(self, name: str) -> Task:
        """The task of that name; KeyError names the known ones."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise KeyError(f"no task {name!r} in the config; known: {[t.name for t in self.tasks]}")

    def press(self, name: str) -> Press:
        """The press of that name; KeyError names the known ones."""
        for press in self.presses:
            if press.name == name:
                return press
        raise KeyError(f"no press {name!r} in the config; known: {[p.name for p in self.presses]}")

    def model(self, name: str) -> Model:
        """The model of that name; KeyError names the known ones."""
        for model in self.models:
            if model.name == name:
                return model
        raise KeyError(f"no model {name!r} in the config; known: {[m.name for m in self.models]}")


def parse_config(values: Mapping[str, Any], *, check_files: bool = True) -> Config:
    """Check a configuration mapping.

    Args:
        values: the configuration.
        check_files: whether the models and questions that it names by path must be there; False
            for reading what a finished run left.

    Raises:
        ConfigError: one line per problem: the field's path, the value, and what is accepted.
    """
    try:
        return Config.model_validate(dict(values), context={"check_files": check_files})
    except ValidationError as error:
        raise ConfigError(explain(error, values, Config)) from None


def config_part(values: Mapping[str, Any]) -> Config:
    """The part of a configuration that a job's params hold, and nothing else.

    A field that ``values`` does not name cannot be read, not even its default: a script that reads
    what its rule's params leave out fails, instead of leaving a stale result behind.

    Args:
        values: sections and fields of a configuration; a section may lack fields.

    Raises:
        ConfigError: names no field of the configuration, or a value is wrong.
    """
    unknown = sorted(set(values) - set(Config.model_fields))
    if unknown:
        known = ", ".join(Config.model_fields)
        raise ConfigError(f"a configuration has no {', '.join(unknown)}; known: {known}")
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        kind: Any = Config.model_fields[name].annotation
        try:
            entry = TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"{name}: {error}") from None
        if isinstance(entry, Section):
            for field in set(type(entry).model_fields) - set(value):
                entry.__dict__.pop(field)
        parsed[name] = entry
    part = Config.model_construct(_fields_set=set(parsed), **parsed)
    for name in set(Config.model_fields) - set(parsed):
        part.__dict__.pop(name, None)
    return part


def load_config(
    *paths: str | Path, overrides: Mapping[str, Any] | None = None, check_files: bool = True
) -> Config:
    """Read YAML files, later ones laid over earlier ones, and check the result.

    Args:
        paths: YAML files, e.g. ``config.yaml`` and ``experiments/paper.yaml``.
        overrides: laid over all of them.
        check_files: as in `parse_config`.

    Raises:
        ConfigError: a file is missing or is not a mapping, or a field is wrong.
    """
    merged: dict[str, Any] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise ConfigError(f"no configuration file at {path}; give the path of a YAML file")
        try:
            values = yaml.safe_load(path.read_text()) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: a configuration is a mapping, got {type(values).__name__}")
        merged = overlay(merged, values)
    return parse_config(overlay(merged, overrides or {}), check_files=check_files)


def overlay(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings key by key, as Snakemake does; anything else in ``over`` replaces."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = overlay(merged[key], value)
        else:
            merged[key] = value
    return merged


def digest(values: object) -> str:
    """First 16 hex digits of the SHA-256 of ``values`` as canonical JSON."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
