"""KVGuard: a guard around a press, for ``model.generate``. Predict hazards, check, recover.

What runs the model is imported where a guard is made or called: kvpress imports datasets and
pandas, transformers scikit-learn where it is installed, and importing `KVGuard` loads none of them.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from kvguard.config import Live, OperatingPoint, Tolerance
from kvguard.config_policies import Sharing
from kvguard.guard_predictor import (
    check_streaming,
    deployed,
    resolve_harm_model,
    resolve_point,
    resolve_predictor,
    stored_marks,
    untrained,
)
from kvguard.guard_report import GuardError, GuardReport
from kvguard.harm_model import HarmModel
from kvguard.harm_price import GuardPrice
from kvguard.policies import Policy
from kvguard.policy_factory import make_policy
from kvguard.rivals import Ladder
from kvguard.schema import PROBE_NAMES

if TYPE_CHECKING:
    from kvpress import BasePress
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    from kvguard.certificate import Certificate, Statement
    from kvguard.drift import DriftMonitor
    from kvguard.guard_observer import HazardModel, Stopping
    from kvguard.ladder import RatioLadder
    from kvguard.prefill import Prefix
    from kvguard.price_certificate import PriceCertificate, PriceStatement
    from kvguard.requests import Completion, Request
    from kvguard.sampling import Decoding

logger = logging.getLogger(__name__)

Recovery = Literal["continue", "promote", "tolerant", "recompute", "restart", "relax_only"]

UNCHECKED = ("guard_recompute", "guard_restart", "guard_relax_only")
"""Policies that read no cold cache."""


class KVGuard:
    """A guard around a press: pass it to ``model.generate`` as ``custom_generate``.

    >>> guard = KVGuard(press=SnapKVPress(0.75), predictor="results/models/hazard_predictor.json")
    >>> output = model.generate(**inputs, custom_generate=guard, max_new_tokens=512)
    >>> guard.report[0].alarm_steps

    Lossless decoding on any press needs no predictor:

    >>> guard = KVGuard(SnapKVPress(0.75), policy="lossless", check_every_tokens=16)

    A ladder starts each request at the heaviest ratio that is predicted not to harm it:

    >>> guard = KVGuard(SnapKVPress(), policy="ladder", ratios=[0.75, 0.5, 0.25],
    ...                 predictor="results/models/gate_predictor.json")

    A named operating point is the certificate's beside the predictor, for certified uses alone.
    Thresholds as numbers, and ``predictor="rules"``, work with any model, press and length.

    One price decides when to check: what a harmed answer costs, in drafted tokens; with
    ``harm_risk=0.05`` instead it is the one that a run has certified:

    >>> guard = KVGuard(SnapKVPress(0.75), policy="guard_price", harm_price=100,
    ...                 predictor="results/models/harm_model.json")

    Args:
        press: any press that `docs/presses.md` lists as supported, or None.
        predictor: path of a trained predictor, a predictor object, or "rules": a risk made of
            repetition and entropy, which needs no training.
        policy: "guard" lets the predictor say when to check; "lossless" checks every
            ``check_every_tokens`` tokens and at the end, and returns the uncompressed model's own
            answer; "guard_price" checks what is worth it (`harm_price`); "ladder" chooses the ratio
            of each request at its prefill, before anything is evicted, and does nothing afterwards.
        harm_price: with "guard_price": what a harmed answer costs, in drafted tokens; at 0 nothing
            is checked, with ``math.inf`` every answer is the uncompressed one. None: 100.
        harm_risk: instead of a price: the share of requests that may be harmed. Takes the lowest
            price that the certificate beside the predictor certifies for this press and ratio.
        bus_ratio: bytes read from device memory in the time that the bus brings one, for policies
            that weigh what a check costs; None: 1 on a CPU, 50 elsewhere, or what was certified.
        ratios: with "ladder": the ratios of the press to choose among; the full cache is the last
            resort.
        threshold: with "ladder": a ratio is taken where the predicted probability of harm is below
            it.
        operating_point: "conservative", "balanced" or "aggressive" of the certificate beside the
            predictor, or thresholds of your own, an `OperatingPoint` or a dict of its fields.
        recovery: what an alarm does. "continue" checks, cuts at the first token that the
            uncompressed model rejects, and goes on compressed, with further checks until the
            hazard is calm. "promote" goes on with the full cache instead: an alarmed request ends
            as if it had never been compressed. "tolerant" cuts at the first sign of harm;
            "recompute" is "continue" with checks that prefill afresh; "restart" keeps no token;
            "relax_only" stops compressing while decoding and recomputes nothing.
        cold: where the entries go that the press evicts, so that a check need not compute them
            again: "host" memory, "disk", or "none".
        cold_folder: for "disk"; None takes the system's folder of temporary files.
        sharing: what prompts begin with is held once by rows with the full cache ("full"), by all
            rows ("all"; the press then works on what follows it), or by none. Under `harm_risk`
            by none.
        safe_ratio: fraction of entries that SAFE removes; 0 is the uncompressed model.
        margin_nats: a token this close to the uncompressed model's best counts as a tie.
        check_every_tokens: the predictor is asked every so many tokens of a row (default 8), and at
            its end, about all of them at once, which costs a small batch a fraction of asking each
            time. An alarm is acted upon that much later at most. With "lossless": the tokens
            between two checks (default 16), or "auto": a row is checked when its draft is no
            longer worth going on with (`check_timing`), rows together.
        holdback_tokens: streaming releases a token once a check has accepted it or this many have
            followed it. Released tokens stay. In ALERT and SAFE, and with "lossless", accepted
            tokens alone are released.
        batch_size: rows decoded together; None takes as many as memory allows.
        seed: of sampling; None draws one from torch's global generator at each call.
        task: of the prompts, a name in the certificate. None, for prompts of your own: whether they
            resemble one of its tasks is yours to judge; ``statements`` has one of each.
        streamer: receives released tokens, one request at a time; or give it to ``generate``.

    Attributes:
        report: one `RowReport` a row of the last call, with ``total()`` and ``to_frame()``.
        completions: one `kvguard.requests.Completion` a row of the last call, with every signal.
        drift: a `kvguard.drift.DriftMonitor` fed with every prompt's first request, or None
            without a certificate; ``drift.text`` says whether the certificate still applies.
        certificate: what came with the predictor, or None, in words ``certificate.text``.
        statements: what it says of this use, one for each task, or one about the price; empty with
            thresholds or a price of your own. ``text`` says each in words.

    Raises:
        GuardError: the predictor was made for other features, or an argument is not accepted.
        CertificateError: a named operating point or ``harm_risk`` is the certificate's, which was
            made on another press, ratio, phase, task, recovery, bus or ``check_every_tokens``;
            names what differs. A call raises it for another model, ``max_new_tokens`` or way of
            sampling.
    """

    def __init__(
        self,
        press: "BasePress | None",
        *,
        predictor: "str | Path | HazardModel | HarmModel" = "rules",
        policy: Literal["guard", "lossless", "ladder", "guard_price"] = "guard",
        ratios: Sequence[float] | None = None,
        threshold: float = 0.2,
        harm_price: float | None = None,
        harm_risk: float | None = None,
        bus_ratio: float | None = None,
        operating_point: str | OperatingPoint | Mapping[str, float] = "balanced",
        recovery: Recovery = "continue",
        cold: Literal["host", "disk", "none"] = "host",
        cold_folder: Path | None = None,
        sharing: Sharing = "full",
        safe_ratio: float = 0.0,
        margin_nats: float = 1e-4,
        tolerance: Tolerance | None = None,
        check_every_tokens: int | Literal["auto"] | None = None,
        holdback_tokens: int = 16,
        batch_size: int | None = None,
        seed: int | None = None,
        task: str | None = None,
        streamer: Any = None,
    ) -> None:
        from kvpress import BasePress

        from kvguard.presses import phases, with_ratio

        if press is not None and not isinstance(press, BasePress):
            raise GuardError(f"press: a kvpress press, e.g. SnapKVPress(0.75), got {press!r}")
        phases(press)  # refuses a press by name, before any token is generated
        adaptive = policy == "lossless" and check_every_tokens == "auto"
        if check_every_tokens is None:
            check_every_tokens = 16 if policy == "lossless" else 8
        limits = {
            "safe_ratio lies in [0, 1)": (safe_ratio, 0 <= safe_ratio < 1),
            "check_every_tokens is at least 1, or 'auto' with policy='lossless'": (
                check_every_tokens,
                adaptive or (isinstance(check_every_tokens, int) and check_every_tokens >= 1),
            ),
            "holdback_tokens is at least 0": (holdback_tokens, holdback_tokens >= 0),
            "margin_nats is at least 0": (margin_nats, margin_nats >= 0),
            "batch_size is at least 1, or None": (batch_size, batch_size is None or batch_size > 0),
            "cold is 'host', 'disk' or 'none'": (cold, cold in ("host", "disk", "none")),
            "sharing is 'none', 'full' or 'all'": (sharing, sharing in get_args(Sharing)),
            "policy is 'guard', 'lossless', 'ladder' or 'guard_price'": (
                policy,
                policy in ("guard", "lossless", "ladder", "guard_price"),
            ),
            "harm_price is at least 0, in drafted tokens": (harm_price, (harm_price or 0) >= 0),
            "harm_risk lies in (0, 1) and stands in place of harm_price, for 'guard_price'": (
                harm_risk,
                harm_risk is None
                or (policy == "guard_price" and harm_price is None and 0 < harm_risk < 1),
            ),
            "bus_ratio is at least 1, or None": (bus_ratio, bus_ratio is None or bus_ratio >= 1),
            "threshold lies in (0, 1]": (threshold, 0 < threshold <= 1),
            "ratios are those of policy='ladder'": (ratios, policy == "ladder" or ratios is None),
            f"recovery is one of {', '.join(get_args(Recovery))}": (
                recovery,
                recovery in get_args(Recovery),
            ),
        }
        for rule, (given, holds) in limits.items():
            if not holds:
                raise GuardError(f"{rule}, got {given!r}")
        self.press = press
        self.predictor: HazardModel | None = None
        self._thresholds: Certificate | None = None
        self._prices: PriceCertificate | None = None
        self.operating_point: OperatingPoint | None = None
        self.ladder: RatioLadder | None = None
        self.ratios, self.threshold = None if ratios is None else list(ratios), threshold
        self.harm_price = 100.0 if harm_price is None else harm_price
        self.harm_risk, self.bus_ratio = harm_risk, bus_ratio
        self.harm_model: HarmModel | None = None
        if policy == "lossless":
            if predictor != "rules":
                raise GuardError("predictor: policy='lossless' checks everything and needs none")
        elif policy == "guard_price":
            self.harm_model, self._prices = resolve_harm_model(predictor, harm_risk is not None)
        elif isinstance(predictor, HarmModel):
            raise GuardError("predictor: a HarmModel is that of policy='guard_price'")
        elif policy == "ladder":
            from kvguard.ladder import users_ladder

            self.predictor, _ = resolve_predictor(predictor, False)
            self.ladder = users_ladder(press, ratios, self.predictor, threshold)
        else:
            self.predictor, self._thresholds = resolve_predictor(
                predictor, isinstance(operating_point, str)
            )
            self.operating_point = resolve_point(
                operating_point, self._thresholds, rules=predictor == "rules"
            )
        self.task, self.safe_ratio = task, safe_ratio
        self.check_every_tokens: int | Literal["auto"] = check_every_tokens
        self.recovery = recovery
        self._point = operating_point if isinstance(operating_point, str) else None
        self.cold, self.cold_folder, self.sharing = cold, cold_folder, sharing
        self.margin_nats, self.tolerance = margin_nats, tolerance
        self.holdback_tokens, self.batch_size, self.seed = holdback_tokens, batch_size, seed
        self.statements = self._statements()
        self._most_rows = sys.maxsize
        if harm_risk is not None:
            self.harm_price, use = deployed(self.statements)
            self.bus_ratio, self._most_rows = use.bus_ratio, use.batch_size
        self.drift = self._drift_monitor()
        self._saved: dict[str, Any] = {
            "policy": policy,
            "operating_point": operating_point
            if isinstance(operating_point, str)
            else None
            if self.operating_point is None
            else self.operating_point.model_dump(),
            "rules": isinstance(predictor, str) and predictor == "rules",
        }
        own = "guard" if recovery == "continue" else f"guard_{recovery}"
        self.policy_name = "lossless_auto" if adaptive else own if policy == "guard" else policy
        self._warned: set[str] = set()
        self.streamer = streamer
        self.report = GuardReport()
        self.completions: list[Completion] = []
        if safe_ratio > 0 and press is not None:
            with_ratio(press, safe_ratio)  # refuses a press without a ratio now, not at an alarm

    def __call__(
        self,
        model: "PreTrainedModel",
        input_ids: torch.Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: "GenerationConfig | None" = None,
        **model_kwargs: Any,
    ) -> "torch.Tensor | GenerateDecoderOnlyOutput":
        """Decode a batch; transformers calls this with what it prepared.

        Args:
            model: a causal language model of a supported family.
            input_ids: (rows, length), padded on the left where ``attention_mask`` is 0.
            logits_processor: temperature, top-k, top-p and min-p when sampling; repetition penalty,
                no-repeat n-grams, suppressed and bad words, sequence bias, minimum lengths; others
                are refused by name.
            stopping_criteria: called for each row alone: (1, length) ids with the row's left
                padding, and the raw logits of the last token as scores. ``stop_strings`` needs a
                tokenizer, which transformers does not hand on.
            generation_config: length, end tokens, sampling, output type.
            model_kwargs: ``attention_mask`` is used; the guard makes its own caches.

        Returns:
            (rows, length + longest continuation) token ids, padded behind each row's end; or a
            ``GenerateDecoderOnlyOutput`` with ``return_dict_in_generate=True``. A row that failed
            is its prompt and padding, with a warning; `report` says why.

        Raises:
            GuardError: an option that the guard does not have.
            RuntimeError: every row failed.
        """
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        from kvguard.generate_options import (
            call_in_progress,
            decoding_of,
            refuse_inputs,
            stopping_of,
        )
        from kvguard.requests import Request

        dropped = call_in_progress()
        refuse_inputs(model, input_ids, generation_config, model_kwargs | dropped)
        settings = generation_config or model.generation_config
        decoding = decoding_of(model, settings, logits_processor, input_ids.shape[1])
        mask = model_kwargs.get("attention_mask")
        prompts = [
            row.tolist() if mask is None else row[mask[i].bool()].tolist()
            for i, row in enumerate(input_ids)
        ]
        given = dropped.get("streamer")  # which has got the prompt already
        streamer = self.streamer if given is None else given
        if streamer is not None and len(prompts) > 1:
            raise GuardError(f"a streamer takes one request at a time, got {len(prompts)} rows")
        seed = self.seed
        if seed is None:
            seed = int(torch.randint(1 << 62, ()).item()) if decoding.do_sample else 0
        requests = [Request(str(i), prompt, seed + i) for i, prompt in enumerate(prompts)]
        if streamer is not None and given is None:
            streamer.put(input_ids.cpu())
        completions = self.run(
            model,
            requests,
            decoding,
            stopping=stopping_of(stopping_criteria, input_ids),
            streamer=streamer,
        )
        if streamer is not None:
            streamer.end()
        failed = [completion for completion in completions if completion.error is not None]
        for completion in failed:
            logger.warning("row %s failed: %s", completion.request.key, completion.error)
        if failed and len(failed) == len(completions):
            raise RuntimeError(f"every row failed; the first: {failed[0].error}")
        pad = settings.pad_token_id
        if pad is None:
            pad = decoding.end_token_ids[0] if decoding.end_token_ids else 0
        ends = [torch.tensor(c.token_ids, dtype=input_ids.dtype) for c in completions]
        tail = torch.nn.utils.rnn.pad_sequence(ends, batch_first=True, padding_value=pad)
        sequences = torch.cat([input_ids, tail.to(input_ids.device)], dim=1)
        if settings.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences

    def run(
        self,
        model: "PreTrainedModel",
        requests: "Sequence[Request]",
        decoding: "Decoding",
        *,
        prefix: "Prefix | None" = None,
        stopping: "Stopping | None" = None,
        streamer: Any = None,
    ) -> "list[Completion]":
        """Decode requests of any lengths under the guard; sets `report`.

        Args:
            model: in eval mode.
            requests: their keys must differ.
            decoding: how tokens are chosen.
            prefix: what the prompts share, prefilled; None: what all of them begin with.
            stopping: see `guard_observer.GuardObserver`.
            streamer: receives released tokens, those of all requests; None takes the guard's own.

        Returns:
            Completions in the requests' order; a failed one has ``error`` set.

        Raises:
            CertificateError: the certificate does not speak of this model or this decoding.
        """
        from kvguard.certified_use import press_use
        from kvguard.engine import Session
        from kvguard.guard_observer import GuardObserver, guarded
        from kvguard.predictor import for_press
        from kvguard.presses import nominal_ratio
        from kvguard.replays import replay_for
        from kvguard.shared_prefix import common_prefix
        from kvguard.slots import batch_size_for

        self._statements(model, decoding)
        streamer = self.streamer if streamer is None else streamer
        check_streaming(streamer, self.harm_risk, self.holdback_tokens, decoding.max_new_tokens)
        longest = max(len(request.prompt_ids) for request in requests) + decoding.max_new_tokens
        rows = self.batch_size or batch_size_for(model, longest)
        rows = min(rows, len(requests), self._most_rows)
        probes = _reads_probes(self.predictor) or _reads_probes(self.harm_model)
        prefix = prefix or common_prefix(model, [each.prompt_ids for each in requests])
        session = Session(
            model,
            decoding,
            press=self.press if self.ladder is None else self.ladder.heaviest,
            rows=rows,
            prefix=prefix,
            probes=probes,
            replay=replay_for(self.harm_model or self.predictor, waits=self.harm_model is not None),
            marked=stored_marks(model) if probes else None,
            cold="none" if self.policy_name in UNCHECKED else self.cold,
            cold_folder=self.cold_folder,
            falls_back=True,
            ladder=self.ladder,
            sharing=self.sharing if self.harm_risk is None else "none",  # certified with copies
        )
        policy = self._policy(rows, decoding.max_new_tokens)
        press_class, ratio = press_use(self.press)["press_class"], nominal_ratio(self.press)
        harm_model = self.harm_model

        def release(_: str, tokens: list[int]) -> None:
            for token in tokens:
                streamer.put(torch.tensor([token]))

        observer = GuardObserver(
            session,
            policy,
            predictor=for_press(self.predictor, press_class),
            ratio=ratio,
            safe_ratio=self.safe_ratio,
            margin_nats=self.margin_nats,
            tolerance=self.tolerance,
            check_every_tokens=self._every,
            holdback_tokens=self.holdback_tokens,
            released=None if streamer is None else release,
            stopping=stopping,
            probe_score=None if harm_model is None else harm_model.scorer(press_class, ratio),
            bus_ratio=self.bus_ratio,
        )
        self._warn_of_transfer(decoding.max_new_tokens)
        finished = {}
        for completion, report in guarded(session, requests, observer):
            if policy.checks_everything:
                report.scheduled_steps, report.alarm_steps = report.alarm_steps, []
            finished[completion.request.key] = (completion, report)
        self.report = GuardReport(finished[request.key][1] for request in requests)
        self.completions = [finished[request.key][0] for request in requests]
        self._watch_drift(requests)
        return self.completions

    def _statements(
        self, model: "PreTrainedModel | None" = None, decoding: "Decoding | None" = None
    ) -> "list[Statement] | list[PriceStatement]":
        """What the certificate says of this use; nothing where it gives no thresholds or price."""
        from kvguard.certified_use import certified_price, certified_statements

        about: dict[str, Any] = {"press": self.press, "task": self.task, "model": model}
        about |= {"decoding": decoding, "safe_ratio": self.safe_ratio}
        if self._prices is not None and self.harm_risk is not None:
            names = ("bus_ratio", "margin_nats", "cold", "batch_size")
            about |= {name: getattr(self, name) for name in names}
            return [certified_price(self._prices, self.harm_risk, **about)]
        if self._thresholds is None or self._point is None:
            return []
        about |= {"recovery": self.recovery, "check_every_tokens": self._every}
        about |= {"sharing": self.sharing}
        return certified_statements(self._thresholds, self._point, **about)

    @property
    def certificate(self) -> "Certificate | PriceCertificate | None":
        """What came with the predictor: of its thresholds, or of prices; None: nothing."""
        return self._thresholds if self._prices is None else self._prices

    def _drift_monitor(self) -> "DriftMonitor | None":
        """A monitor that expects the alarm rate of this press and ratio, or of all pooled."""
        if self._thresholds is None or self._point is None:
            return None
        from kvguard.drift import DriftMonitor

        known = {(one.press, one.ratio) for one in self._thresholds.point(self._point).references}
        uses = {(one.use.press, one.use.ratio) for one in self.statements if one.use} & known
        press, ratio = uses.pop() if len(uses) == 1 else (None, None)
        return DriftMonitor(self._thresholds, self._point, press=press, ratio=ratio)

    def _watch_drift(self, requests: "Sequence[Request]") -> None:
        """Count each new prompt's request in the drift monitor; log its warning."""
        if self.drift is None:
            return
        pairs = zip(requests, self.report, strict=True)
        if self.drift.count_prompts(
            (one.prompt_ids, bool(row.alarm_steps)) for one, row in pairs if row.error is None
        ):
            logger.warning("%s", self.drift.text)

    @property
    def _every(self) -> int:
        """`check_every_tokens` as a number; an adaptive policy looks at every token."""
        return 1 if self.check_every_tokens == "auto" else self.check_every_tokens

    def _policy(self, rows: int, max_new_tokens: int) -> Policy:
        if self.ladder is not None:
            return Ladder("ladder", rows, self.threshold)
        if self.harm_model is not None:
            return GuardPrice(
                self.policy_name, rows, self.harm_price, max_new_tokens, self.harm_model
            )
        return make_policy(
            self.policy_name,
            rows,
            max_new_tokens=max_new_tokens,
            live=Live(lossless_tokens=self._every),
            controller=self.operating_point,
            check_every_tokens=self._every,
        )

    def _warn_of_transfer(self, max_new_tokens: int) -> None:
        """Say once where the predictor is used at what it was not trained on."""
        ratios = None if self.ladder is None else list(self.ladder.presses)
        for warning in untrained(self.predictor, self.press, ratios, max_new_tokens):
            if warning not in self._warned:
                self._warned.add(warning)
                logger.warning("%s: its hazards may mean little here", warning)

    def save(self, path: str | Path) -> None:
        """Write the guard into a folder: settings as JSON, predictor and certificate beside it.

        A streamer, a folder of the cold cache and what earlier calls left are not saved.

        Raises:
            GuardError: the press or the predictor cannot be written as JSON.
        """
        from kvguard import guard_files

        settings = self._saved | {
            "press": None if self.press is None else guard_files.press_to_json(self.press),
            "tolerance": None if self.tolerance is None else self.tolerance.model_dump(),
            **{name: getattr(self, name) for name in _SAVED},
        }
        if self._prices is not None:
            settings["harm_price"] = None  # the certificate's
        trained = None if settings["rules"] else self.harm_model or self.predictor
        guard_files.write_models(path, trained, self._thresholds, self._prices)
        guard_files.write_settings(path, settings)

    @classmethod
    def load(cls, path: str | Path) -> "KVGuard":
        """The guard that `save` wrote.

        Raises:
            GuardError: there is none, or it names what this version does not have.
        """
        from kvguard import guard_files

        settings = guard_files.read_settings(path)
        press, tolerance = settings.pop("press"), settings.pop("tolerance")
        if settings.pop("rules"):
            settings["predictor"] = "rules"
        else:
            settings["predictor"] = Path(path) / guard_files.PREDICTOR
        if settings["operating_point"] is None:
            del settings["operating_point"]
        try:
            return cls(
                None if press is None else guard_files.press_from_json(press),
                tolerance=None if tolerance is None else Tolerance.model_validate(tolerance),
                **settings,
            )
        except TypeError as error:
            raise GuardError(f"{path}: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        """Settings are pickled, a streamer and the results of the last call are not."""
        empty: dict[str, Any] = {"streamer": None, "report": GuardReport(), "completions": []}
        return self.__dict__ | empty


_SAVED = (
    *("recovery", "cold", "safe_ratio", "margin_nats", "check_every_tokens", "holdback_tokens"),
    *("sharing", "batch_size", "seed", "task", "ratios", "threshold"),
    *("harm_price", "harm_risk", "bus_ratio"),
)
"""Settings that are attributes of the same name."""


def _reads_probes(predictor: "HazardModel | HarmModel | None") -> bool:
    """Whether a predictor reads what is measured at prefill."""
    return bool(set(getattr(predictor, "feature_names", ())) & set(PROBE_NAMES))
