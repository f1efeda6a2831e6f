"""KVGuard: a guard around a press, for ``model.generate``. Watch the decoding, check, recover."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from kvpress import BasePress
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from kvguard.config import POINT_NAMES, OperatingPoint, Tolerance
from kvguard.engine import Completion, Request, Session, batch_size_for
from kvguard.guard_observer import (
    GuardError,
    GuardObserver,
    HazardModel,
    RowReport,
    Stopping,
    guarded,
)
from kvguard.policy_factory import make_policy
from kvguard.prefill import Prefix
from kvguard.presses import phases, with_ratio
from kvguard.sampling import Decoding
from kvguard.schema import FEATURE_VERSION

if TYPE_CHECKING:
    from kvguard.certificate import Certificate

logger = logging.getLogger(__name__)

RULES_POINTS = {
    "conservative": OperatingPoint(tau_low=0.4, tau_high=0.8, k=2, j=16),
    "balanced": OperatingPoint(tau_low=0.3, tau_high=0.6, k=2, j=16),
    "aggressive": OperatingPoint(tau_low=0.2, tau_high=0.4, k=1, j=16),
}
"""Thresholds of ``predictor="rules"``, which has no certificate."""


Recovery = Literal["rewind", "rewind_tolerant", "recompute", "relax_only", "restart"]


class KVGuard:
    """A guard around a press: pass it to ``model.generate`` as ``custom_generate``.

    >>> guard = KVGuard(press=SnapKVPress(0.75), predictor="results/models/hazard_predictor.json")
    >>> output = model.generate(**inputs, custom_generate=guard, max_new_tokens=512)
    >>> guard.report[0].alarm_steps

    Args:
        press: any press that `docs/presses.md` lists as supported, or None.
        predictor: path of a trained predictor, a predictor object, or "rules": a risk made of
            repetition and entropy, which needs no training.
        operating_point: "conservative", "balanced" or "aggressive" of the certificate beside the
            predictor, or thresholds of your own.
        recovery: what an alarm does. "rewind" verifies and cuts at the first token that the
            uncompressed model rejects: an alarmed request ends as if it had never been compressed.
            "rewind_tolerant" cuts at the first sign of harm; "recompute" keeps every token;
            "restart" keeps none; "relax_only" stops compressing and recomputes nothing.
        after_alarm: "stay" at the safe ratio, or "resume" compression after calm tokens.
        safe_ratio: fraction of entries that SAFE removes; 0 is the uncompressed model.
        margin_nats: a token this close to the uncompressed model's best counts as a tie.
        check_every_tokens: the predictor is asked every so many tokens of a row, and at its end,
            about all of them at once, which costs a small batch a fraction of asking each time. An
            alarm is acted upon that much later at most; what an exact rewind returns is the same.
        holdback_tokens: streaming releases a token once this many have followed it, at the next
            look: with the default, tokens come eight at a time.
        batch_size: rows decoded together; None takes as many as memory allows.
        seed: of sampling; None draws one from torch's global generator at each call.
        condition: press and ratio of the certificate, e.g. ("snapkv", "0.750"), whose alarm rate on
            the calibration prompts the drift monitor expects; None: all of them pooled.
        streamer: receives released tokens; one request at a time. Give it here: transformers drops
            the ``streamer`` of a ``generate`` call that has a ``custom_generate``.

    Attributes:
        report: one `RowReport` a row of the last call.
        completions: one `kvguard.engine.Completion` a row of the last call, with every signal.
        drift: a `kvguard.certificate.DriftMonitor` fed with every prompt's first request, or None
            without a certificate; ``drift.text`` says whether the certificate still applies.
        certificate: what came with the predictor, or None; ``certificate.text`` says it in words.

    Raises:
        GuardError: the predictor was made for other features, or an argument is not accepted.
    """

    def __init__(
        self,
        press: BasePress | None,
        *,
        predictor: str | Path | HazardModel = "rules",
        operating_point: str | OperatingPoint = "balanced",
        recovery: Recovery = "rewind",
        after_alarm: Literal["stay", "resume"] = "stay",
        safe_ratio: float = 0.0,
        margin_nats: float = 1e-4,
        tolerance: Tolerance | None = None,
        check_every_tokens: int = 8,
        holdback_tokens: int = 16,
        batch_size: int | None = None,
        seed: int | None = None,
        condition: tuple[str, str] | None = None,
        streamer: Any = None,
    ) -> None:
        phases(press)  # refuses a press by name, before any token is generated
        if not 0 <= safe_ratio < 1:
            raise GuardError(f"safe_ratio lies in [0, 1), got {safe_ratio}")
        if check_every_tokens < 1:
            raise GuardError(f"check_every_tokens is at least 1, got {check_every_tokens}")
        self.press = press
        self.predictor, self.certificate = _load_predictor(predictor)
        self.operating_point = _operating_point(
            operating_point, self.certificate, rules=predictor == "rules"
        )
        self.drift = None
        if self.certificate is not None and isinstance(operating_point, str):
            from kvguard.certificate import DriftMonitor

            press_name, ratio = condition or (None, None)
            self.drift = DriftMonitor(
                self.certificate, operating_point, press=press_name, ratio=ratio
            )
        self._prompts_seen: set[int] = set()
        self.policy_name = _policy_name(recovery, after_alarm)
        self.safe_ratio, self.margin_nats, self.tolerance = safe_ratio, margin_nats, tolerance
        self.check_every_tokens, self.holdback_tokens = check_every_tokens, holdback_tokens
        self.batch_size, self.seed = batch_size, seed
        self.streamer = streamer
        self.report: list[RowReport] = []
        self.completions: list[Completion] = []
        if safe_ratio > 0 and press is not None:
            with_ratio(press, safe_ratio)  # refuses a press without a ratio now, not at an alarm

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: GenerationConfig | None = None,
        **model_kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Decode a batch; transformers calls this with what it prepared.

        Args:
            model: a causal language model of a supported family.
            input_ids: (rows, length), padded on the left where ``attention_mask`` is 0.
            logits_processor: temperature, top-k and top-p; others are refused by name.
            stopping_criteria: called for each row alone: (1, length) ids with the row's left
                padding, and the raw logits of the last token as scores. ``stop_strings`` needs a
                tokenizer, which transformers does not hand on.
            generation_config: length, end tokens, sampling, output type.
            model_kwargs: ``attention_mask`` is used, the caches are the guard's own.

        Returns:
            (rows, length + longest continuation) token ids, padded behind each row's end; or a
            ``GenerateDecoderOnlyOutput`` with ``return_dict_in_generate=True``. A row that failed
            is its prompt and padding, with a warning; `report` says why.

        Raises:
            GuardError: an option that the guard does not have.
            RuntimeError: every row failed.
        """
        _refuse_inputs(input_ids, generation_config, model_kwargs)
        settings = generation_config or model.generation_config
        decoding = _decoding(model, settings, logits_processor, input_ids.shape[1])
        mask = model_kwargs.get("attention_mask")
        prompts = [
            row.tolist() if mask is None else row[mask[i].bool()].tolist()
            for i, row in enumerate(input_ids)
        ]
        if self.streamer is not None and len(prompts) > 1:
            raise GuardError(f"a streamer takes one request at a time, got {len(prompts)} rows")
        seed = self.seed
        if seed is None:
            seed = int(torch.randint(1 << 62, ()).item()) if decoding.do_sample else 0
        requests = [Request(str(i), prompt, seed + i) for i, prompt in enumerate(prompts)]
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        completions = self.run(
            model, requests, decoding, stopping=_stopping(stopping_criteria, input_ids)
        )
        if self.streamer is not None:
            self.streamer.end()
        failed = [completion for completion in completions if completion.error is not None]
        for completion in failed:
            logger.warning("row %s failed: %s", completion.request.key, completion.error)
        if failed and len(failed) == len(completions):
            raise RuntimeError(f"every row failed; the first: {failed[0].error}")
        pad = settings.pad_token_id
        if pad is None:
            pad = decoding.end_token_ids[0] if decoding.end_token_ids else 0
        longest = max((len(c.token_ids) for c in completions), default=0)
        tail = torch.full((len(prompts), longest), pad, dtype=input_ids.dtype)
        for i, completion in enumerate(completions):
            tail[i, : len(completion.token_ids)] = torch.tensor(completion.token_ids)
        sequences = torch.cat([input_ids, tail.to(input_ids.device)], dim=1)
        if settings.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences

    def run(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        decoding: Decoding,
        *,
        prefix: Prefix | None = None,
        stopping: Stopping | None = None,
    ) -> list[Completion]:
        """Decode requests of any lengths under the guard; sets `report`.

        Args:
            model: in eval mode.
            requests: their keys must differ.
            decoding: how tokens are chosen.
            prefix: what the prompts share, prefilled.
            stopping: see `guard_observer.GuardObserver`.

        Returns:
            Completions in the requests' order; a failed one has ``error`` set.
        """
        longest = max(len(request.prompt_ids) for request in requests) + decoding.max_new_tokens
        rows = self.batch_size or batch_size_for(model, longest)
        rows = min(rows, len(requests))
        session = Session(model, decoding, press=self.press, rows=rows, prefix=prefix)
        policy = make_policy(
            self.policy_name,
            rows,
            max_new_tokens=decoding.max_new_tokens,
            controller=self.operating_point,
            check_every_tokens=self.check_every_tokens,
        )
        watch = GuardObserver(
            session,
            policy,
            predictor=self.predictor,
            ratio=press_ratio(self.press),
            safe_ratio=self.safe_ratio,
            margin_nats=self.margin_nats,
            tolerance=self.tolerance,
            check_every_tokens=self.check_every_tokens,
            holdback_tokens=self.holdback_tokens,
            released=None if self.streamer is None else self._stream,
            stopping=stopping,
        )
        finished = {}
        for completion, report in guarded(session, requests, watch):
            finished[completion.request.key] = (completion, report)
        self.report = [finished[request.key][1] for request in requests]
        self.completions = [finished[request.key][0] for request in requests]
        self._watch_drift(requests)
        return self.completions

    def _watch_drift(self, requests: Sequence[Request]) -> None:
        """Tell the drift monitor of each new prompt's request, and the user when it warns."""
        if self.drift is None:
            return
        before = self.drift.drifted
        for request, report in zip(requests, self.report, strict=True):
            prompt = hash(tuple(request.prompt_ids))
            if report.error is None and prompt not in self._prompts_seen:
                self._prompts_seen.add(prompt)
                self.drift.update(bool(report.alarm_steps))
        if self.drift.drifted != before:
            logger.warning("%s", self.drift.text)

    def _stream(self, _: str, tokens: list[int]) -> None:
        for token in tokens:
            self.streamer.put(torch.tensor([token]))


def press_ratio(press: BasePress | None) -> float:
    """The press's nominal compression ratio, 0 for none; NaN where it follows from the prompt."""
    if press is None:
        return 0.0
    split = phases(press)
    for part in (split.prefill, split.decode):
        if part is None:
            continue
        ratio = getattr(part, "target_compression_ratio", None)
        if ratio is None:
            try:
                ratio = part.compression_ratio
            except (AttributeError, ValueError):
                ratio = None
        if ratio is not None:
            return float(ratio)
    return math.nan


def _load_predictor(given: str | Path | HazardModel) -> tuple[HazardModel, "Certificate | None"]:
    """A predictor and the certificate beside it, which must speak of this predictor."""
    from kvguard.certificate import load_certificate
    from kvguard.predictor import load_predictor, rules_predictor

    if isinstance(given, str) and given == "rules":
        return rules_predictor(), None
    if isinstance(given, str | Path):
        path = Path(given)
        if not path.is_file():
            raise GuardError(f'predictor: no file at {path}; give a trained predictor or "rules"')
        predictor = load_predictor(path)
        beside = path.with_name("certificate.json")
        if not beside.is_file():
            return predictor, None
        certificate = load_certificate(beside)
        certificate.check_predictor(predictor)
        logger.info("%s", certificate.text)
        return predictor, certificate
    if given.feature_version != FEATURE_VERSION:
        raise GuardError(
            f"predictor: made for feature version {given.feature_version}, the guard computes "
            f"version {FEATURE_VERSION}"
        )
    return given, None


def _operating_point(
    given: str | OperatingPoint, certificate: "Certificate | None", rules: bool
) -> OperatingPoint:
    """Thresholds by name: the certificate's, or the rules'; of another predictor there are none."""
    if isinstance(given, OperatingPoint):
        return given
    if given not in POINT_NAMES:
        raise GuardError(f"operating_point is one of {', '.join(POINT_NAMES)}, got {given!r}")
    if certificate is not None:
        return certificate.operating_point(given)
    if rules:
        return RULES_POINTS[given]
    raise GuardError(
        f"operating_point: {given!r} is a name in a certificate, and there is no certificate.json "
        "beside the predictor; give thresholds, an OperatingPoint(tau_low, tau_high, k, j)"
    )


def _policy_name(recovery: str, after_alarm: str) -> str:
    known = ("rewind", "rewind_tolerant", "recompute", "relax_only", "restart")
    if recovery not in known:
        raise GuardError(f"recovery is one of {', '.join(known)}, got {recovery!r}")
    if after_alarm not in ("stay", "resume"):
        raise GuardError(f"after_alarm is 'stay' or 'resume', got {after_alarm!r}")
    if after_alarm == "stay":
        names = {"rewind": "guard_promote", "rewind_tolerant": "guard_tolerant"}
        return names.get(recovery, f"guard_{recovery}")
    if recovery != "rewind":
        raise GuardError(f"after_alarm='resume' goes with recovery='rewind', got {recovery!r}")
    return "guard"


def _decoding(
    model: PreTrainedModel, settings: GenerationConfig, processors: Any, prompt_length: int
) -> Decoding:
    """The guard's decoding from a generation config; what it cannot do is refused by name."""
    warpers: dict[type, Any] = {}
    for processor in processors or []:
        kind = type(processor)
        if kind not in (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper):
            raise GuardError(
                f"logits processor {kind.__name__} is not supported; the guard decodes greedily or "
                "with temperature, top_k and top_p. A model may ship others in its generation "
                "config: switch them off, e.g. repetition_penalty=1.0"
            )
        if kind in warpers or not settings.do_sample:
            why = "given twice" if kind in warpers else "without do_sample=True"
            raise GuardError(f"logits processor {kind.__name__}: {why}")
        warpers[kind] = processor
    if (settings.num_beams or 1) > 1:
        raise GuardError(f"num_beams: the guard decodes one beam a row, got {settings.num_beams}")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(settings, name, None):
            raise GuardError(
                f"{name}: the guard returns token ids; its signals are in `guard.completions`"
            )
    ends = settings.eos_token_id
    if ends is None:
        ends = model.config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if settings.max_new_tokens is not None:
        count = settings.max_new_tokens
    else:
        count = (settings.max_length or 20) - prompt_length
    temperature = warpers.get(TemperatureLogitsWarper)
    top_k, top_p = warpers.get(TopKLogitsWarper), warpers.get(TopPLogitsWarper)
    return Decoding(
        max_new_tokens=count,
        end_token_ids=tuple(int(end) for end in ends),
        do_sample=bool(settings.do_sample),
        temperature=1.0 if temperature is None else float(temperature.temperature),
        top_k=0 if top_k is None else int(top_k.top_k),
        top_p=1.0 if top_p is None else float(top_p.top_p),
    )


def _refuse_inputs(
    input_ids: torch.Tensor, settings: GenerationConfig | None, arguments: dict[str, Any]
) -> None:
    """Refuse by name what the guard would otherwise ignore."""
    if arguments.get("inputs_embeds") is not None or input_ids.shape[1] == 0:
        raise GuardError("inputs_embeds: the guard needs the prompt's token ids, input_ids")
    cache = arguments.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise GuardError("past_key_values: the guard prefills prompts itself, pass no filled cache")
    if settings is not None and settings.prompt_lookup_num_tokens is not None:
        raise GuardError("prompt_lookup_num_tokens: the guard has no assisted decoding")


def _stopping(criteria: Any, input_ids: torch.Tensor) -> Stopping | None:
    """A user's stopping criteria; length and end tokens are the engine's own business."""
    length = (MaxLengthCriteria, EosTokenCriteria)
    own = [one for one in criteria or [] if not isinstance(one, length)]
    if not own:
        return None

    def stop(key: str, tokens: list[int], logits: torch.Tensor) -> bool:
        prompt = input_ids[int(key)]
        ids = torch.cat([prompt, prompt.new_tensor(tokens)])[None]
        return any(bool(torch.as_tensor(one(ids, logits)).all()) for one in own)

    return stop
