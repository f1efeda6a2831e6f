"""A ladder of ratios: each request starts at the heaviest whose predicted harm is small.

What a press evicts is lost to a request before its first token, so a request that would be harmed
has to be relaxed before that. In the prefill hook of each layer, with its uncompressed entries at
hand, the press runs at every ratio of the ladder; of each is kept which entries stay and what
`probes` says of those that go. The cache is left as the heaviest ratio leaves it, and the prompt's
entries are parked (`kvguard.cold_cache`). After the prefill the heaviest ratio is replayed and its
risk predicted; if that is too high, the next lighter ratio's cache is gathered from the parked
entries, and so on; the last rung is the full cache. So every rung has exactly the cache and the
probes of a prefill at its ratio, without a second prefill.

That holds for presses that score entries and keep the best (`gathers`). Others merge entries, hide
them or rotate keys anew: they are prefilled again at the next ratio, which is exact for every
press, and so is any press without parked entries.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from kvpress import BasePress, ScorerPress
from numpy.typing import NDArray
from transformers import PreTrainedModel

from kvguard.config_types import BASELINE_RATIO, ratio_text
from kvguard.guard_report import GuardError
from kvguard.predictor import Predictor
from kvguard.prefill import Prefilled, cache_bytes, prefill
from kvguard.presses import Phases, PressError, fresh, phases, with_ratio
from kvguard.probes import CacheProbe, Removal
from kvguard.replays import replay_length, replay_ran
from kvguard.requests import Completion, Request
from kvguard.rival_settings import gate_risk
from kvguard.schema import GATE_FEATURES

if TYPE_CHECKING:
    from kvguard.engine import Session

logger = logging.getLogger(__name__)

Risk = Callable[[NDArray[np.float32], float], float]
"""(probes,) of a prefill in the order of schema.PROBE_NAMES and the ratio that they are of, to the
probability that the request is harmed; NaN counts as too high."""


def gathers(press: BasePress | None) -> bool:
    """Whether what a press leaves at prefill are some of the prompt's entries, chosen by a score.

    Then its cache at another ratio can be gathered from parked entries.
    """
    if not isinstance(press, ScorerPress):
        return False
    own = type(press)
    return own.forward_hook is BasePress.forward_hook and own.__call__ is BasePress.__call__


def ladder_presses(press: BasePress, ratios: Mapping[str, float]) -> dict[str, BasePress]:
    """A press at each of some ratios, by the ratio as text, heaviest first.

    Raises:
        PressError: it has no ratio to set, or compresses nothing at prefill.
    """
    if phases(press).prefill is None:
        raise PressError(
            f"{type(press).__name__} compresses while decoding alone; a ladder chooses the ratio "
            "of a press that compresses at prefill"
        )
    order = sorted(ratios, key=lambda text: -ratios[text])
    return {text: with_ratio(press, ratios[text]) for text in order}


@dataclass
class _AllRatios(BasePress):  # type: ignore[misc]  # kvpress has no types
    """Runs a press at every ratio; the cache is left as the heaviest leaves it.

    Attributes:
        presses: heaviest first; reading attention weights is found out by this name.
        probe: measures what each removes.
        removals: of each press but the heaviest.
        random: state of the random numbers of each press, which draws its own in turn.
    """

    presses: list[BasePress]
    probe: CacheProbe
    removals: list[Removal] = field(default_factory=list)
    random: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Let every press look at the model."""
        for press in self.presses:
            press.post_init_from_model(model)

    def forward_hook(self, module: Any, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Compress one layer's cache at every ratio, the heaviest one last."""
        entry = kwargs["past_key_values"].layers[module.layer_idx]
        keys, values = entry.keys, entry.values
        start = _random_state(keys.device)
        for number in reversed(range(len(self.presses))):
            entry.keys, entry.values = keys, values
            _set_random_state(keys.device, self.random.get(number, start))
            output = self.presses[number].forward_hook(module, input, kwargs, output)
            self.random[number] = _random_state(keys.device)
            if number > 0:
                self.probe.note(module, entry, self.removals[number - 1])
        return output


def _random_state(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type != "cuda" else [*states, torch.cuda.get_rng_state(device)]


def _set_random_state(device: torch.device, states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


class RatioLadder:
    """Chooses the ratio at which a session's requests start.

    Args:
        presses: by ratio as text, heaviest first, see `ladder_presses`; the full cache is the rung
            behind the last.
        risk: the probability of harm; None: every request starts at the heaviest ratio.
        threshold: a request starts at the heaviest ratio whose risk is below it.

    Raises:
        ValueError: no ratio, or not heaviest first.
    """

    def __init__(
        self, presses: Mapping[str, BasePress], risk: Risk | None, threshold: float
    ) -> None:
        ratios = [float(text) for text in presses]
        if not ratios or ratios != sorted(set(ratios), reverse=True):
            raise ValueError(f"presses: ratios from the heaviest to the lightest, got {ratios}")
        self.presses, self.risk, self.threshold = dict(presses), risk, float(threshold)
        self.ratios = (*self.presses, BASELINE_RATIO)

    @property
    def heaviest(self) -> BasePress:
        """The press at the ratio that is tried first."""
        return next(iter(self.presses.values()))

    def start(
        self, session: "Session", request: Request, completion: Completion
    ) -> tuple[Phases, Prefilled]:
        """Prefill a request at the ratio that it starts at.

        Bytes moved, further prefills and replays are counted in ``completion``, which also learns
        the ratio. What is parked is forgotten after the choice.

        Raises:
            AssertionError, ValueError, RuntimeError: as `prefill`.
        """
        splits = {text: phases(press) for text, press in self.presses.items()}
        heaviest = next(iter(splits))
        if self.risk is None:
            completion.start_ratio = heaviest
            press = fresh(splits[heaviest].prefill)
            return splits[heaviest], self._prefill(session, request, press)
        probe = CacheProbe(session.model, request.prompt_ids, session.marked)
        parts = [fresh(split.prefill) for split in splits.values()]
        removals: dict[str, Removal] = {heaviest: probe.removal}
        press = parts[0]
        if session.store is not None and all(gathers(part) for part in parts):
            removals |= {text: Removal() for text in list(splits)[1:]}
            press = _AllRatios(
                [part for part in parts if part is not None], probe, list(removals.values())[1:]
            )
        first = self._prefill(session, request, press, probe, parked=True)
        ready, chosen = first, heaviest
        if first.cold is not None:
            completion.bytes_moved += first.cold.prompt.nbytes
        for chosen, split in splits.items():
            if chosen != heaviest:
                places = removals[chosen].places if chosen in removals else None
                if first.cold is not None and places is not None:
                    ready = self._gather(first, places, probe, removals[chosen], completion)
                else:
                    completion.tokens_prefilled += len(request.prompt_ids)
                    own = CacheProbe(session.model, request.prompt_ids, session.marked)
                    ready = self._prefill(session, request, fresh(split.prefill), own)
            assert ready.probes is not None
            if replay_ran(ready.probes):
                completion.replays.append(ready.bytes_after)
            if self._risk(ready.probes, chosen) < self.threshold:
                break
        else:
            chosen, split, probes = BASELINE_RATIO, Phases(None, None), ready.probes
            if first.cold is None:
                completion.tokens_prefilled += len(request.prompt_ids)
                ready = self._prefill(session, request, None)
            else:
                cache = first.cold.load()
                size = cache_bytes(cache)
                completion.bytes_moved += size
                ready = first._replace(cache=cache, masked=None, bytes_after=size)
            ready = ready._replace(probes=probes)
        completion.start_ratio = chosen
        return split, ready._replace(bytes_before=first.bytes_before, cold=None)

    def _prefill(
        self,
        session: "Session",
        request: Request,
        press: BasePress | None,
        probe: CacheProbe | None = None,
        *,
        parked: bool = False,
    ) -> Prefilled:
        """Prefill a request's prompt under a press, or none."""
        return prefill(
            session.model,
            request.prompt_ids,
            press,
            prefix=session.prefix,
            seed=request.seed,
            probe=probe,
            store=session.store if parked else None,
        )

    def _gather(
        self,
        first: Prefilled,
        places: list[torch.Tensor],
        probe: CacheProbe,
        removal: Removal,
        completion: Completion,
    ) -> Prefilled:
        """What a prefill at another ratio would have left, from parked entries."""
        assert first.cold is not None
        cold = first.cold
        cache = cold.gather(places)
        completion.bytes_moved += cold.length * cold.store.bytes_per_token
        assert probe.logits is not None
        probes = probe.finish(cache, probe.logits, removal)
        return first._replace(cache=cache, bytes_after=cache_bytes(cache), probes=probes)

    def _risk(self, probes: NDArray[np.float32], ratio: str) -> float:
        assert self.risk is not None
        try:
            return float(self.risk(probes, float(ratio)))
        except Exception:  # any predictor may be plugged in; the requests must go on
            logger.exception("the predictor failed; its request starts at a lighter ratio")
            return math.nan


def users_ladder(
    press: BasePress | None,
    ratios: Sequence[float] | None,
    predictor: object,
    threshold: float,
) -> RatioLadder:
    """The ladder of a `KVGuard`.

    Raises:
        GuardError: names the argument, its value and what is accepted.
    """
    if press is None:
        raise GuardError("press: policy='ladder' chooses the ratio of a press, got None")
    numbers = [float(ratio) for ratio in ratios or []]
    if not numbers or not all(0 < ratio < 1 for ratio in numbers):
        raise GuardError(
            "ratios: policy='ladder' needs the fractions to choose among, each in (0, 1), e.g. "
            f"[0.75, 0.5, 0.25], got {ratios}"
        )
    named = {ratio_text(ratio): ratio for ratio in numbers}
    if len(named) < len(numbers):
        raise GuardError(f"ratios: each is given once, to three decimals, got {ratios}")
    reads = getattr(predictor, "feature_names", ())
    if not isinstance(predictor, Predictor) or not {"compression_ratio"} < set(reads) <= set(
        GATE_FEATURES
    ):
        raise GuardError(
            "predictor: policy='ladder' needs one of a request's harm from the probes of its "
            "prefill and the ratio, results/models/gate_predictor.json of a run, got one that "
            f"reads {', '.join(sorted(reads)) or 'nothing'}"
        )
    try:
        presses = ladder_presses(press, named)
    except PressError as error:
        raise GuardError(f"press: {error}") from None
    return RatioLadder(presses, partial(gate_risk, predictor, type(press).__name__), threshold)


def relaxed(session: "Session", completion: Completion) -> bool:
    """Whether a ladder let a request start at another ratio than its heaviest."""
    ladder = session.ladder
    return ladder is not None and completion.start_ratio not in (None, ladder.ratios[0])


def charge_replays(session: "Session", row: int) -> None:
    """Charge a request that was just admitted for the passes of its probes.

    A session measures probes where its policy reads them; a replay is a pass over the compressed
    cache, of a few tokens of the prompt.
    """
    completion = session.rows[row].completion
    sizes = completion.replays
    if session.ladder is None and completion.probes is not None and replay_ran(completion.probes):
        sizes = [completion.cache_bytes_after]
    session.meter.replays(row, sizes)
    completion.tokens_prefilled += len(sizes) * replay_length(len(completion.request.prompt_ids))
