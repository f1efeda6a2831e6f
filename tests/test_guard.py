"""The guard: verify and rewind is exact, rows are independent, faults cost one row at most."""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import pytest
import torch
from conftest import examples, make_tiny_model
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_engine import DECODE, PREFILL, SCORED, every_press, ragged_requests, run, spec
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from kvguard import audit, press_catalogue
from kvguard.audit import check_answers, harmful_token
from kvguard.certificate import CertificateError, save_certificate
from kvguard.check_timing import LosslessAuto, Prices
from kvguard.cold_cache import ColdStore, Part
from kvguard.config import OperatingPoint, Tolerance
from kvguard.controller import Mode
from kvguard.engine import Session
from kvguard.guard import KVGuard
from kvguard.guard_observer import GuardObserver, guarded
from kvguard.guard_report import GuardError, RowReport
from kvguard.models import LoadedModel
from kvguard.policies import Action, Decision, Observation, Policy
from kvguard.policy_factory import make_policy
from kvguard.predictor import rules_predictor, save_predictor
from kvguard.prefill import prefill_prefix
from kvguard.presses import PressError, build_press
from kvguard.requests import Completion, Request
from kvguard.rivals import Lossless
from kvguard.sampling import Decoding
from kvguard.schema import FEATURE_VERSION
from kvguard.slots import Slots

NEW_TOKENS = 20
GREEDY = Decoding(NEW_TOKENS, (2,))
ENDLESS = Decoding(NEW_TOKENS)
SAMPLING = Decoding(NEW_TOKENS, (2,), do_sample=True, temperature=1.2, top_p=0.95)


class Scripted(Policy):
    """Takes given actions at given positions of given requests; knows them by their seed."""

    def __init__(
        self,
        rows: int,
        script: dict[int, dict[int, Action]],
        at_end: bool = False,
        needs_hazard: bool = False,
    ):
        super().__init__("scripted", rows)
        self.needs_hazard = needs_hazard
        self.script, self.at_end = script, at_end
        self.seeds = np.zeros(rows, np.int64)
        self.row_state.append(self.seeds)

    def reset(self, row: int, seed: int) -> None:
        super().reset(row, seed)
        self.seeds[row] = seed

    def step(self, observation: Observation) -> Decision:
        decision = self._decide(observation, Action.CONTINUE)
        for i, (row, position) in enumerate(
            zip(observation.rows, observation.positions, strict=True)
        ):
            plan = self.script.get(int(self.seeds[row]), {})
            action = plan.pop(int(position), Action.CONTINUE)
            decision.actions[i] = action
            if action == Action.REWIND:
                self.modes[row] = decision.modes[i] = Mode.SAFE
        return decision

    def finish(self, observation: Observation) -> Decision:
        decision = self._decide(observation, Action.CONTINUE)
        if self.at_end:
            safe = self.modes[observation.rows] == Mode.SAFE
            decision.actions[~safe] = Action.REWIND
            self.modes[observation.rows] = Mode.SAFE
            decision.modes[:] = Mode.SAFE
        return decision


def watched(
    model: PreTrainedModel,
    requests: Sequence[Request],
    press: kvpress.BasePress | None,
    policy: Policy | Callable[[int], Policy],
    *,
    rows: int = 4,
    decoding: Decoding = GREEDY,
    cold: Any = "host",
    **options: Any,
) -> dict[str, tuple[Completion, RowReport]]:
    """Run requests under a policy."""
    session = Session(model, decoding, press=press, rows=rows, cold=cold)
    rule = policy if isinstance(policy, Policy) else policy(rows)
    observer = GuardObserver(session, rule, **options)
    return {
        done.request.key: (done, report) for done, report in guarded(session, requests, observer)
    }


def uncompressed(
    model: PreTrainedModel, requests: Sequence[Request], decoding: Decoding = GREEDY
) -> dict[str, list[int]]:
    """The uncompressed model's own answers; to the same requests they are computed once."""
    asked = (model, decoding, repr(list(requests)))
    if asked not in _answers:
        done = run(model, requests, None, 4, decoding=decoding)
        _answers[asked] = {key: completion.token_ids for key, completion in done.items()}
    return _answers[asked]


_answers: dict[tuple[PreTrainedModel, Decoding, str], dict[str, list[int]]] = {}


@pytest.mark.parametrize("name", every_press(PREFILL))
def test_alarmed_requests_end_as_if_never_compressed(
    tiny_model: Callable[..., PreTrainedModel], name: str
) -> None:
    model = tiny_model("llama", "eager" if name in press_catalogue.ATTENTION_WEIGHTS else "sdpa")
    requests = ragged_requests(model.config.vocab_size)
    press = spec(name, model.config.num_hidden_layers)
    alarms = {request.seed: {(3 * i) % 7: Action.REWIND} for i, request in enumerate(requests)}
    done = watched(
        model, requests, build_press(press, "0.500"), lambda rows: Scripted(rows, alarms, True)
    )
    expected = uncompressed(model, requests)
    assert {key: completion.token_ids for key, (completion, _) in done.items()} == expected


@pytest.mark.parametrize("phase", ["decode", "both"])
@pytest.mark.parametrize("name", every_press(DECODE))
def test_the_theorem_holds_for_compression_while_decoding(
    tiny_llama: PreTrainedModel, name: str, phase: str
) -> None:
    requests = ragged_requests(tiny_llama.config.vocab_size)
    press = spec(name, 3, phase)
    done = watched(
        tiny_llama, requests, build_press(press, "0.500"), lambda rows: Scripted(rows, {}, True)
    )
    expected = uncompressed(tiny_llama, requests)
    assert {key: completion.token_ids for key, (completion, _) in done.items()} == expected


@examples(40)
@given(
    alarms=st.lists(
        st.lists(st.integers(0, NEW_TOKENS - 1), max_size=3, unique=True), min_size=6, max_size=6
    ),
    rows=st.integers(1, 6),
    sample=st.booleans(),
    phase=st.sampled_from(["prefill", "both"]),
    every=st.sampled_from([1, 3, 8]),
)
def test_the_theorem_at_any_step_any_number_of_times(
    alarms: list[list[int]], rows: int, sample: bool, phase: str, every: int
) -> None:
    model = make_tiny_model("llama")
    decoding = SAMPLING if sample else GREEDY
    requests = ragged_requests(model.config.vocab_size, count=6)
    script = {
        request.seed: dict.fromkeys(steps, Action.REWIND)
        for request, steps in zip(requests, alarms, strict=True)
    }
    press = build_press(spec("SnapKVPress", 3, phase), "0.500")
    done = watched(
        model,
        requests,
        press,
        lambda count: Scripted(count, script, at_end=True, needs_hazard=every > 1),
        rows=rows,
        decoding=decoding,
        predictor=Threshold(0),
        check_every_tokens=every,
    )
    expected = uncompressed(model, requests, decoding)
    assert {key: completion.token_ids for key, (completion, _) in done.items()} == expected


class Dear(LosslessAuto):
    """Checks at its own moments, whatever they cost: up to ``price`` tokens for row 0, 1 and on."""

    def __init__(self, name: str, rows: int, price: float) -> None:
        super().__init__(name, rows, longest_tokens=1 + int(price) // 10)
        self.price = price

    def set_prices(self, prices: Prices) -> None:
        count = len(prices.own)
        super().set_prices(Prices(self.price, self.price / np.arange(1, count + 1)))


@examples(40)
@given(
    name=st.sampled_from([name for name in PREFILL if name != "ObservedAttentionPress"]),
    phase=st.sampled_from(["prefill", "decode", "both"]),
    every=st.one_of(st.integers(1, 23), st.floats(0, 60)),
    rows=st.integers(1, 5),
    sample=st.booleans(),
    share=st.booleans(),
    cold=st.sampled_from(["host", "disk", "none"]),
)
def test_lossless_is_the_uncompressed_model(
    name: str, phase: str, every: int | float, rows: int, sample: bool, share: bool, cold: Any
) -> None:
    """Any press, any draft length, batches with refill, greedy and sampled: the same tokens."""
    model = make_tiny_model("llama")
    if name not in DECODE:
        phase = "prefill"
    decoding = SAMPLING if sample else GREEDY
    requests = ragged_requests(model.config.vocab_size, count=5)
    prefix = prefill_prefix(model, requests[0].prompt_ids[:11]) if share else None
    press = build_press(spec(name, 3, phase), "0.500")
    session = Session(model, decoding, press=press, rows=rows, prefix=prefix, cold=cold)
    fixed = isinstance(every, int)
    policy = Lossless("lossless", rows, every) if fixed else Dear("lossless_auto", rows, every)
    observer = GuardObserver(session, policy)
    done = {
        done.request.key: (done, report) for done, report in guarded(session, requests, observer)
    }
    expected = uncompressed(model, requests, decoding)
    assert {key: completion.token_ids for key, (completion, _) in done.items()} == expected
    assert all(not report.notes for _, report in done.values())


def test_lossless_reads_attention_weights_too(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama", "eager")
    requests = ragged_requests(model.config.vocab_size)
    press = build_press(spec("ObservedAttentionPress", 3), "0.500")
    done = watched(model, requests, press, lambda rows: Lossless("lossless", rows, 5), cold="host")
    expected = uncompressed(model, requests)
    assert {key: completion.token_ids for key, (completion, _) in done.items()} == expected


@pytest.mark.matrix
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3"])
def test_lossless_in_other_families(
    tiny_model: Callable[..., PreTrainedModel], family: str
) -> None:
    model = tiny_model(family)
    requests = ragged_requests(model.config.vocab_size)
    press = build_press(spec("SnapKVPress", 3), "0.750")
    done = watched(model, requests, press, lambda rows: Lossless("lossless", rows, 6), cold="host")
    expected = uncompressed(model, requests)
    assert {key: completion.token_ids for key, (completion, _) in done.items()} == expected


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        *((name, "prefill") for name in PREFILL if name not in SCORED),
        ("KeyDiffPress", "decode"),
        ("SnapKVPress", "both"),
    ],
)
def test_the_theorem_on_the_real_model(smollm2: LoadedModel, name: str, phase: str) -> None:
    model = smollm2.model
    texts = ["The capital of France is", "Count: one, two, three, four,"]
    requests = [
        Request(text, smollm2.tokenizer(text * 6).input_ids, seed=i) for i, text in enumerate(texts)
    ]
    decoding = Decoding(12, smollm2.end_token_ids)
    script = {0: {5: Action.REWIND}}
    press = build_press(spec(name, model.config.num_hidden_layers, phase), "0.500")
    done = watched(
        model,
        requests,
        press,
        lambda rows: Scripted(rows, script, at_end=True),
        rows=2,
        decoding=decoding,
    )
    expected = uncompressed(model, requests, decoding)
    assert {key: completion.token_ids for key, (completion, _) in done.items()} == expected


@pytest.mark.parametrize(
    ("name", "phase", "sample"),
    [
        ("SnapKVPress", "prefill", False),
        ("AdaKVPress", "prefill", True),
        ("PyramidKVPress", "prefill", False),
        ("KeyRerotationPress", "prefill", False),
        ("KeyDiffPress", "both", True),
    ],
)
def test_lossless_on_the_real_model(
    smollm2: LoadedModel, name: str, phase: str, sample: bool
) -> None:
    model = smollm2.model
    texts = ["The capital of France is", "Count: one, two, three, four,", "A list of colours:"]
    requests = [
        Request(text, smollm2.tokenizer(text * (6 - i)).input_ids, seed=i)
        for i, text in enumerate(texts)
    ]
    decoding = Decoding(16, smollm2.end_token_ids, do_sample=sample, temperature=0.8)
    press = build_press(spec(name, model.config.num_hidden_layers, phase), "0.500")
    done = watched(
        model,
        requests,
        press,
        lambda rows: Lossless("lossless", rows, 5),
        rows=2,
        decoding=decoding,
        cold="host",
    )
    expected = uncompressed(model, requests, decoding)
    assert {key: completion.token_ids for key, (completion, _) in done.items()} == expected


@pytest.mark.parametrize("cold", ["host", "none"])
def test_rewinds_count_what_they_cost(tiny_llama: PreTrainedModel, cold: str) -> None:
    request = ragged_requests(tiny_llama.config.vocab_size)[0]
    press = kvpress.KnormPress(0.7)
    draft = run(tiny_llama, [request], kvpress.KnormPress(0.7), 1, ends=())["0"].token_ids
    truth = run(tiny_llama, [request], None, 1, ends=())["0"].token_ids
    cut = next(i for i, (a, b) in enumerate(zip(draft, truth, strict=True)) if a != b)
    script = {request.seed: {12: Action.REWIND}}
    completion, report = watched(
        tiny_llama,
        [request],
        press,
        lambda rows: Scripted(rows, script),
        rows=1,
        decoding=ENDLESS,
        cold=cold,
    )["0"]
    assert report.alarm_steps == [13]
    assert report.rewound_to == [cut]
    assert report.tokens_wasted == 13 - cut
    prompt = len(request.prompt_ids)
    read = 13 if cold == "host" else prompt + 13
    assert report.tokens_prefilled == prompt + read
    # 12 drafted steps; after the rewind the token at the cut comes from the verifying pass itself.
    assert report.decode_steps == 12 + len(truth) - cut - 1
    assert completion.token_ids == truth
    assert [mode for _, mode in report.modes] == ["NORMAL", "SAFE"]


@pytest.mark.parametrize("name", ["SnapKVPress", "AdaKVPress"])
def test_a_guard_that_never_alarms_changes_nothing(tiny_llama: PreTrainedModel, name: str) -> None:
    requests = ragged_requests(tiny_llama.config.vocab_size)
    press = spec(name, 3)
    alone = run(tiny_llama, requests, build_press(press, "0.500"), 4)
    done = watched(
        tiny_llama,
        requests,
        build_press(press, "0.500"),
        lambda rows: make_policy("none", rows, max_new_tokens=NEW_TOKENS),
    )
    for key, (completion, report) in done.items():
        assert completion.token_ids == alone[key].token_ids
        assert report.alarm_steps == []


def test_a_rewind_changes_nothing_in_other_rows(tiny_llama: PreTrainedModel) -> None:
    requests = ragged_requests(tiny_llama.config.vocab_size)
    press = kvpress.KnormPress(0.6)
    alone = run(tiny_llama, requests, kvpress.KnormPress(0.6), 4)
    script = {requests[0].seed: {6: Action.REWIND}, requests[5].seed: {2: Action.REWIND}}
    done = watched(tiny_llama, requests, press, lambda rows: Scripted(rows, script))
    for key, (completion, _) in done.items():
        if key not in ("0", "5"):
            assert completion.token_ids == alone[key].token_ids


@pytest.mark.parametrize("action", [Action.RESTART, Action.REFRESH])
def test_other_recoveries_continue_from_what_they_keep(
    tiny_llama: PreTrainedModel, action: Action
) -> None:
    request = ragged_requests(tiny_llama.config.vocab_size)[0]
    press = kvpress.KnormPress(0.6)
    draft = run(tiny_llama, [request], kvpress.KnormPress(0.6), 1)["0"].token_ids
    script = {request.seed: {7: action}}
    completion, _ = watched(
        tiny_llama, [request], press, lambda rows: Scripted(rows, script), rows=1
    )["0"]
    kept = [] if action == Action.RESTART else draft[:8]
    continued = Request("c", [*request.prompt_ids, *kept], max_new_tokens=NEW_TOKENS - len(kept))
    again = None if action == Action.RESTART else kvpress.KnormPress(0.6)
    expected = kept + run(tiny_llama, [continued], again, 1)["c"].token_ids
    assert completion.token_ids == expected


def test_relaxing_stops_compression_while_decoding(tiny_llama: PreTrainedModel) -> None:
    request = ragged_requests(tiny_llama.config.vocab_size)[1]
    request = Request("r", request.prompt_ids, seed=1)
    press = build_press(spec("KnormPress", 3, "decode"), "0.500")
    script = {1: {2: Action.RELAX}}  # before the first compression, after 6 tokens
    completion, _ = watched(
        tiny_llama, [request], press, lambda rows: Scripted(rows, script), rows=1
    )["r"]
    assert completion.token_ids == uncompressed(tiny_llama, [request])["r"]


def test_the_safe_ratio_may_keep_compressing(tiny_llama: PreTrainedModel) -> None:
    request = ragged_requests(tiny_llama.config.vocab_size)[1]
    request = Request("r", request.prompt_ids, seed=1)
    script = {1: {10: Action.REWIND}}
    completion, report = watched(
        tiny_llama,
        [request],
        kvpress.KnormPress(0.7),
        lambda rows: Scripted(rows, script),
        rows=1,
        safe_ratio=0.3,
    )["r"]
    kept = report.rewound_to[0]
    truth = uncompressed(tiny_llama, [request])["r"]
    assert completion.token_ids[: kept + 1] == truth[: kept + 1]
    continued = Request("c", [*request.prompt_ids, *truth[:kept]], max_new_tokens=NEW_TOKENS - kept)
    expected = run(tiny_llama, [continued], kvpress.KnormPress(0.3), 1)["c"].token_ids
    assert completion.token_ids[kept:] == expected


def test_always_safe_is_the_uncompressed_model(tiny_llama: PreTrainedModel) -> None:
    requests = ragged_requests(tiny_llama.config.vocab_size)
    done = watched(
        tiny_llama,
        requests,
        kvpress.KnormPress(0.7),
        lambda rows: make_policy("always_safe", rows, max_new_tokens=NEW_TOKENS),
    )
    expected = uncompressed(tiny_llama, requests)
    assert {key: completion.token_ids for key, (completion, _) in done.items()} == expected
    assert all(c.cache_bytes_after == c.cache_bytes_before for c, _ in done.values())


# --- sampling follows the uncompressed distribution ---


@pytest.mark.matrix
def test_rewound_samples_follow_the_uncompressed_distribution(tiny_llama: PreTrainedModel) -> None:
    """A chi-squared test of the first two tokens over many seeds, on a vocabulary of 160."""
    from scipy.stats import chisquare

    base = ragged_requests(tiny_llama.config.vocab_size)[0]
    decoding = Decoding(2, (), do_sample=True, temperature=0.7, top_k=4)
    count = 1500
    requests = [Request(str(i), base.prompt_ids, seed=i) for i in range(count)]
    done = watched(
        tiny_llama,
        requests,
        kvpress.KnormPress(0.7),
        lambda rows: make_policy("verify_all", rows, max_new_tokens=2),
        rows=100,
        decoding=decoding,
    )
    ids = torch.tensor([list(base.prompt_ids)])
    with torch.inference_mode():
        first = _top_k_distribution(tiny_llama(ids).logits[0, -1], 4, 0.7)
        pairs = {}
        for token, probability in first.items():
            logits = tiny_llama(torch.cat([ids, torch.tensor([[token]])], dim=1)).logits[0, -1]
            for other, then in _top_k_distribution(logits, 4, 0.7).items():
                pairs[token, other] = probability * then
    seen = dict.fromkeys(pairs, 0)
    for completion, _ in done.values():
        seen[tuple(completion.token_ids)] += 1  # a KeyError is an impossible pair
    common = [pair for pair in pairs if pairs[pair] * count >= 5]
    rest = 1 - sum(pairs[pair] for pair in common)
    observed = [seen[pair] for pair in common]
    expected = [pairs[pair] * count for pair in common]
    observed.append(count - sum(observed))
    expected.append(rest * count)
    if expected[-1] < 5:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    assert chisquare(observed, expected).pvalue > 0.001


def _top_k_distribution(logits: torch.Tensor, k: int, temperature: float) -> dict[int, float]:
    values, tokens = (logits / temperature).topk(k)
    shares = values.softmax(0)
    return {int(t): float(p) for t, p in zip(tokens, shares, strict=True)}


# --- the user's way in ---


class Threshold:
    """A predictor whose hazard is 1 from a given position on."""

    feature_version = FEATURE_VERSION

    def __init__(self, position: float) -> None:
        self.position = position

    def predict(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        return (features[:, 38] * NEW_TOKENS >= self.position).astype(np.float32)


POINT = OperatingPoint(tau_low=0.4, tau_high=0.6, k=1, j=2)


def left_padded(requests: Sequence[Request]) -> dict[str, torch.Tensor]:
    """A batch as a tokenizer makes it."""
    longest = max(len(request.prompt_ids) for request in requests)
    ids = torch.zeros(len(requests), longest, dtype=torch.long)
    for i, request in enumerate(requests):
        ids[i, longest - len(request.prompt_ids) :] = torch.tensor(list(request.prompt_ids))
    mask = torch.zeros_like(ids)
    for i, request in enumerate(requests):
        mask[i, longest - len(request.prompt_ids) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def test_generate_accepts_the_guard(tiny_llama: PreTrainedModel) -> None:
    requests = ragged_requests(tiny_llama.config.vocab_size, count=4)
    guard = KVGuard(
        kvpress.KnormPress(0.6), predictor=Threshold(8), operating_point=POINT, recovery="promote"
    )
    output = tiny_llama.generate(
        **left_padded(requests),
        custom_generate=guard,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
    )
    whole = [Request(r.key, r.prompt_ids, r.seed) for r in requests]
    expected = uncompressed(tiny_llama, whole)
    draft = run(tiny_llama, whole, kvpress.KnormPress(0.6), 4, decoding=GREEDY)
    for i in range(4):
        tail = output.sequences[i, left_padded(requests)["input_ids"].shape[1] :].tolist()
        answer = expected[str(i)]
        assert tail[: len(answer)] == answer
        assert all(token == 0 for token in tail[len(answer) :])
        if len(answer) > 10:  # hazardous from 8: ALERT at 9, SAFE at 10; looked at after 8 and 16
            assert guard.report[i].alarm_steps == [min(16, len(draft[str(i)].token_ids))]
            assert [mode for _, mode in guard.report[i].modes] == ["NORMAL", "ALERT", "SAFE"]
            assert guard.report[i].modes[1:] == [(8, "ALERT"), (9, "SAFE")]


def test_a_guard_around_nothing_is_the_model(tiny_llama: PreTrainedModel) -> None:
    requests = ragged_requests(tiny_llama.config.vocab_size, count=3)
    inputs = left_padded(requests[2:3])
    guard = KVGuard(None, predictor="rules")
    own = tiny_llama.generate(**inputs, max_new_tokens=12, do_sample=False)
    with_guard = tiny_llama.generate(
        **inputs, max_new_tokens=12, do_sample=False, custom_generate=guard
    )
    assert with_guard.tolist() == own.tolist()


def test_sampling_is_reproducible_and_its_own(tiny_llama: PreTrainedModel) -> None:
    inputs = left_padded(ragged_requests(tiny_llama.config.vocab_size, count=2))
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        guard = KVGuard(kvpress.KnormPress(0.5), predictor="rules")
        answers.append(
            tiny_llama.generate(
                **inputs, custom_generate=guard, max_new_tokens=15, do_sample=True, top_p=0.9
            ).tolist()
        )
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_stopping_criteria_see_each_row_alone(tiny_llama: PreTrainedModel) -> None:
    requests = ragged_requests(tiny_llama.config.vocab_size, count=3)

    class LongEnough(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            assert input_ids.shape[0] == 1
            assert scores.shape == (1, tiny_llama.config.vocab_size)
            return torch.tensor([input_ids.shape[1] >= len(requests[0].prompt_ids) + 3])

    guard = KVGuard(kvpress.KnormPress(0.5), predictor="rules")
    tiny_llama.generate(
        **left_padded(requests[:1]),
        custom_generate=guard,
        max_new_tokens=15,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([LongEnough()]),
    )
    assert guard.report[0].stop_reason == "stopped"
    assert guard.report[0].decode_steps == 2


def test_what_the_guard_cannot_do_is_refused_by_name(tiny_llama: PreTrainedModel) -> None:
    inputs = left_padded(ragged_requests(tiny_llama.config.vocab_size, count=1))
    guard = KVGuard(kvpress.KnormPress(0.5), predictor="rules")
    options = {"custom_generate": guard, "max_new_tokens": 3}
    with pytest.raises(GuardError, match="TypicalLogitsWarper"):
        tiny_llama.generate(**inputs, **options, do_sample=True, typical_p=0.5)
    with pytest.raises(GuardError, match="use_cache=False"):
        tiny_llama.generate(**inputs, **options, use_cache=False)
    with pytest.raises(GuardError, match="cache_implementation"):
        tiny_llama.generate(**inputs, **options, cache_implementation="static")
    with pytest.raises(GuardError, match="assistant_model"):
        tiny_llama.generate(**inputs, **options, assistant_model=tiny_llama, do_sample=False)
    tiny_llama.train()
    try:
        with pytest.raises(GuardError, match="train mode"):
            tiny_llama.generate(**inputs, **options)
    finally:
        tiny_llama.eval()
    refused: list[tuple[str, dict[str, Any]]] = [
        ("holdback_tokens is at least 0, got -1", {"holdback_tokens": -1}),
        ("margin_nats is at least 0, got -0.1", {"margin_nats": -0.1}),
        ("batch_size is at least 1, or None, got 0", {"batch_size": 0}),
        ("'auto' with policy='lossless', got 0", {"check_every_tokens": 0}),
        ("'auto' with policy='lossless', got 'auto'", {"check_every_tokens": "auto"}),
        ("recovery is one of continue, .*, got 'rewind'", {"recovery": "rewind"}),
        ("cold is 'host', 'disk' or 'none', got 'tape'", {"cold": "tape"}),
        (
            "policy is 'guard', 'lossless', 'ladder' or 'guard_price', got 'brave'",
            {"policy": "brave"},
        ),
        ("policy='lossless' checks everything", {"policy": "lossless", "predictor": "p.json"}),
        (
            "operating_point.tau_low: Field required",
            {"operating_point": {"tau_high": 0.5, "k": 1, "j": 1}},
        ),
    ]
    for message, arguments in refused:
        with pytest.raises(GuardError, match=message):
            KVGuard(None, **arguments)
    with pytest.raises(GuardError, match=r"press: a kvpress press, .*, got 'snapkv'"):
        KVGuard("snapkv")  # type: ignore[arg-type]
    with pytest.raises(GuardError, match="output_logits"):
        tiny_llama.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    with pytest.raises(PressError, match="KVzipPress"):
        KVGuard(kvpress.KVzipPress(0.5))
    with pytest.raises(GuardError, match="operating_point is one of conservative"):
        KVGuard(None, operating_point="brave")
    with pytest.raises(GuardError, match=r"no file at nowhere\.json"):
        KVGuard(None, predictor="nowhere.json")
    old = Threshold(3)
    old.feature_version = 0
    with pytest.raises(GuardError, match="feature version 0, the guard computes version"):
        KVGuard(None, predictor=old)


def test_streaming_releases_what_has_aged(tiny_llama: PreTrainedModel) -> None:
    request = ragged_requests(tiny_llama.config.vocab_size)[0]
    draft = run(tiny_llama, [request], kvpress.KnormPress(0.7), 1, ends=())["0"].token_ids
    truth = uncompressed(tiny_llama, [request], ENDLESS)["0"]
    cut = next(i for i, (a, b) in enumerate(zip(draft, truth, strict=True)) if a != b)

    for holdback, lost in ((0, 1), (NEW_TOKENS, 0)):
        pieces: list[list[int]] = []
        script = {request.seed: {12: Action.REWIND}}
        done, report = watched(
            tiny_llama,
            [request],
            kvpress.KnormPress(0.7),
            lambda rows, script=script: Scripted(rows, script),
            rows=1,
            decoding=ENDLESS,
            holdback_tokens=holdback,
            released=lambda _key, tokens, pieces=pieces: pieces.append(tokens),
        )["0"]
        assert report.unrecoverable == lost
        streamed = [token for piece in pieces for token in piece]
        assert streamed == done.token_ids  # what has been streamed is final
        if lost:
            assert streamed[:12] == draft[:12]  # those of the step itself had not been released
            assert f"token {cut} is rejected, but 12 tokens were streamed" in report.notes[0]
        else:
            assert streamed == truth


class Collector:
    """A streamer as transformers has them."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_prompt_and_answer(tiny_llama: PreTrainedModel) -> None:
    requests = ragged_requests(tiny_llama.config.vocab_size, count=1)
    streamer = Collector()
    guard = KVGuard(kvpress.KnormPress(0.5), predictor="rules", streamer=streamer)
    output = tiny_llama.generate(
        **left_padded(requests), custom_generate=guard, max_new_tokens=9, do_sample=False
    )
    assert streamer.ended
    assert [token for piece in streamer.pieces for token in piece] == output[0].tolist()


@pytest.mark.parametrize("policy", ["lossless", "guard"])
@pytest.mark.parametrize("holdback", [0, pytest.param(2, marks=pytest.mark.matrix), 16])
def test_what_is_streamed_is_what_is_returned(
    tiny_llama: PreTrainedModel, policy: Any, holdback: int
) -> None:
    for number, request in enumerate(ragged_requests(tiny_llama.config.vocab_size, count=3)):
        arguments: dict[str, Any] = {}
        if policy == "guard":
            arguments = {"predictor": Pulse(0), "operating_point": POINT, "check_every_tokens": 3}
        guard = KVGuard(
            kvpress.KnormPress(0.6), policy=policy, holdback_tokens=holdback, **arguments
        )
        streamer = Collector()
        output = tiny_llama.generate(
            **left_padded([request]),
            custom_generate=guard,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            streamer=streamer,
        )
        assert streamer.ended
        assert [token for piece in streamer.pieces for token in piece] == output[0].tolist()
        if policy == "lossless":
            whole = [Request(str(number), request.prompt_ids)]
            answer = output[0, len(request.prompt_ids) :].tolist()
            assert answer == uncompressed(tiny_llama, whole)[str(number)]
            assert guard.report[0].unrecoverable == 0


PROCESSED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 9, "eos_token_id": list(range(4, 60))},
    {"suppress_tokens": list(range(4, 100))},
    {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "bad_words_ids": [[7], [8, 9]]},
]


@pytest.mark.parametrize("options", PROCESSED, ids=lambda options: next(iter(options)))
def test_lossless_with_processors_equals_generate(
    tiny_llama: PreTrainedModel, options: dict[str, Any]
) -> None:
    for request in ragged_requests(tiny_llama.config.vocab_size, count=2):
        inputs = left_padded([request])
        own = tiny_llama.generate(**inputs, max_new_tokens=14, do_sample=False, **options)
        guard = KVGuard(kvpress.KnormPress(0.6), policy="lossless", check_every_tokens=4)
        ours = tiny_llama.generate(
            **inputs, max_new_tokens=14, do_sample=False, custom_generate=guard, **options
        )
        assert ours.tolist() == own.tolist()
        assert guard.report[0].checks > 0


def test_lossless_samples_with_processors_as_the_uncompressed_model(
    tiny_llama: PreTrainedModel,
) -> None:
    inputs = left_padded(ragged_requests(tiny_llama.config.vocab_size, count=4))
    options = {"do_sample": True, "min_p": 0.05, "repetition_penalty": 1.2, "max_new_tokens": 15}
    answers = [
        tiny_llama.generate(
            **inputs, custom_generate=KVGuard(press, policy="lossless", seed=3), **options
        ).tolist()
        for press in (None, kvpress.KnormPress(0.6))
    ]
    assert answers[0] == answers[1]
    auto = KVGuard(
        kvpress.KnormPress(0.6), policy="lossless", check_every_tokens="auto", batch_size=3, seed=3
    )
    again = tiny_llama.generate(**inputs, custom_generate=auto, **options).tolist()
    assert again == answers[0]
    assert all(row.checks > 1 and not row.alarm_steps for row in auto.report)


def test_a_guard_pickles_and_its_report_adds_up(tiny_llama: PreTrainedModel) -> None:
    requests = [Request(r.key, r.prompt_ids, r.seed) for r in ragged_requests(160, count=3)]
    point = {"tau_low": 0.2, "tau_high": 0.4, "k": 1, "j": 16}
    guard = KVGuard(kvpress.KnormPress(0.6), predictor="rules", operating_point=point)
    guard.run(tiny_llama, requests, GREEDY)
    again = pickle.loads(pickle.dumps(guard))
    assert again.operating_point == guard.operating_point == OperatingPoint(**point)
    assert again.report == []
    done = again.run(tiny_llama, requests, GREEDY)
    assert [c.token_ids for c in done] == [c.token_ids for c in guard.completions]
    total = guard.report.total()
    assert total["rows"] == 3
    assert total["decode_steps"] == sum(c.decode_steps for c in guard.completions)
    assert guard.report.to_frame()["key"].to_list() == ["0", "1", "2"]
    assert repr(guard.report) == f"<GuardReport: 3 rows, {total['alarmed']:.0f} alarmed, 0 failed>"


def test_checks_at_fixed_steps_are_not_reported_as_alarms(tiny_llama: PreTrainedModel) -> None:
    requests = [Request(r.key, r.prompt_ids, r.seed) for r in ragged_requests(160, count=3)]
    guard = KVGuard(kvpress.KnormPress(0.3), policy="lossless", check_every_tokens=NEW_TOKENS - 1)
    guard.run(tiny_llama, requests, ENDLESS)
    for row in guard.report:
        assert row.alarm_steps == []
        assert len(row.scheduled_steps) == row.checks > 0
        assert row.scheduled_steps[0] == NEW_TOKENS - 1
    assert repr(guard.report) == "<GuardReport: 3 rows, 3 checked on schedule, 0 failed>"
    assert guard.report.total()["alarmed"] == 0
    assert guard.report.total()["checked_on_schedule"] == 3


def test_a_guard_is_saved_and_loaded(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    requests = [Request(r.key, r.prompt_ids, r.seed) for r in ragged_requests(160, count=3)]
    presses = (
        kvpress.SnapKVPress(0.5, window_size=4),
        kvpress.AdaKVPress(kvpress.KnormPress(0.4)),
        None,
    )
    for press in presses:
        guard = KVGuard(press, operating_point="conservative", recovery="promote", seed=3)
        guard.save(tmp_path / "guard")
        again = KVGuard.load(tmp_path / "guard")
        assert again.press == press
        assert again.operating_point == guard.operating_point
        assert again.policy_name == "guard_promote"
    guard = KVGuard(presses[0], policy="lossless", tolerance=None)
    guard.save(tmp_path / "guard")
    again = KVGuard.load(tmp_path / "guard")
    answers = [[c.token_ids for c in g.run(tiny_llama, requests, GREEDY)] for g in (guard, again)]
    assert answers[0] == answers[1]
    assert {file.suffix for file in (tmp_path / "guard").iterdir()} <= {".json", ".sha256"}
    with pytest.raises(GuardError, match="no guard at"):
        KVGuard.load(tmp_path)


def test_a_saved_guard_keeps_its_predictor(tmp_path: Path) -> None:
    point = {"tau_low": 0.2, "tau_high": 0.4, "k": 1, "j": 16}
    guard = KVGuard(kvpress.KnormPress(0.6), predictor=rules_predictor(), operating_point=point)
    guard.save(tmp_path)
    again = KVGuard.load(tmp_path)
    assert again.operating_point == OperatingPoint(**point)
    assert again.predictor is not None
    assert again.predictor.digest == rules_predictor().digest  # type: ignore[attr-defined]
    settings = (tmp_path / "guard.json").read_text()
    (tmp_path / "guard.json").write_text(settings.replace("KnormPress", "os"))
    with pytest.raises(GuardError, match="no press of kvpress"):
        KVGuard.load(tmp_path)


def test_a_predictor_out_of_its_place_warns(
    tiny_llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    conditions = {"presses": [["knorm", "0.500"]], "max_new_tokens": [NEW_TOKENS]}
    trained = rules_predictor().model_copy(update={"provenance": {"conditions": conditions}})
    requests = [Request(r.key, r.prompt_ids, r.seed) for r in ragged_requests(160, count=2)]

    def warnings_of(press: kvpress.BasePress) -> str:
        caplog.clear()
        guard = KVGuard(press, predictor=trained, operating_point=POINT)
        guard.run(tiny_llama, requests, GREEDY)
        return caplog.text

    assert "not trained" not in warnings_of(kvpress.KnormPress(0.5))
    assert "ratio 0.600" in warnings_of(kvpress.KnormPress(0.6))
    assert "press keydiff" in warnings_of(kvpress.KeyDiffPress(0.5))


# --- faults ---


@pytest.mark.parametrize(
    "error", [MemoryError("no host memory"), OSError(28, "No space left on device")]
)
def test_without_room_to_park_checks_recompute(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The second request finds no room, the third has room for its prompt only."""
    requests = ragged_requests(tiny_llama.config.vocab_size, count=4)
    allocate, calls = ColdStore.allocate, iter(range(1000))

    def allocate_some(store: ColdStore, tokens: int) -> Part:
        if next(calls) in (1, 4):
            raise error
        return allocate(store, tokens)

    monkeypatch.setattr(ColdStore, "allocate", allocate_some)
    done = watched(
        tiny_llama,
        requests,
        kvpress.KnormPress(0.6),
        lambda rows: Lossless("lossless", rows, 4),
        cold="disk",
    )
    expected = uncompressed(tiny_llama, requests)
    assert {key: completion.token_ids for key, (completion, _) in done.items()} == expected
    noted = {key for key, (_, report) in done.items() if report.notes}
    assert "1" in noted
    assert len(noted) == 2
    assert all(str(error) in report.notes[0] for _, report in done.values() if report.notes)


def test_a_full_disk_is_found_before_anything_is_written(tiny_llama: PreTrainedModel) -> None:
    config = tiny_llama.config
    store = ColdStore(config, device=torch.device("cpu"), dtype=torch.float32, kind="disk")
    with pytest.raises(OSError, match=r"No space left|File too large"):
        store.allocate(1 << 40)


def test_a_check_that_runs_out_of_memory_recomputes(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = ragged_requests(tiny_llama.config.vocab_size, count=4)
    run_drafts, calls = audit.run_drafts, iter(range(1000))

    def exhausted(*arguments: Any, **options: Any) -> Any:
        if next(calls) < 3:
            raise torch.OutOfMemoryError("no memory for this pass")
        return run_drafts(*arguments, **options)

    monkeypatch.setattr("kvguard.audit.run_drafts", exhausted)
    done = watched(
        tiny_llama,
        requests,
        kvpress.KnormPress(0.6),
        lambda rows: Lossless("lossless", rows, 4),
    )
    expected = uncompressed(tiny_llama, requests)
    assert {key: completion.token_ids for key, (completion, _) in done.items()} == expected
    assert any("recomputed" in note for _, report in done.values() for note in report.notes)


def test_an_answer_that_cannot_be_checked_fails_where_that_was_promised(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = ragged_requests(tiny_llama.config.vocab_size, count=3)
    check_answers = audit.check_answers
    bad = tuple(requests[1].prompt_ids)

    def fails_for_one(model: Any, answers: Any, *arguments: Any, **options: Any) -> Any:
        if any(tuple(answer.prompt_ids) == bad for answer in answers):
            raise torch.OutOfMemoryError("no memory for this row")
        return check_answers(model, answers, *arguments, **options)

    monkeypatch.setattr("kvguard.checks.check_answers", fails_for_one)
    done = watched(
        tiny_llama,
        requests,
        kvpress.KnormPress(0.6),
        lambda rows: Lossless("lossless", rows, 4),
    )
    expected = uncompressed(tiny_llama, requests)
    assert "could not be checked" in (done["1"][0].error or "")
    for key in ("0", "2"):
        assert done[key][0].token_ids == expected[key]


def test_thresholds_and_drift_come_from_the_certificate_beside_the_predictor(
    tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    from test_calibration import _certificate

    path = tmp_path / "hazard_predictor.json"
    save_predictor(rules_predictor(), path)
    certificate = _certificate()
    save_certificate(certificate, tmp_path / "certificate.json")
    guard = KVGuard(kvpress.KnormPress(0.5), predictor=path)
    assert guard.operating_point == certificate.operating_point("balanced")
    assert guard.certificate == certificate
    guard.operating_point = OperatingPoint(tau_low=1e-6, tau_high=2e-6, k=1, j=1)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(4, 160, 20).tolist() for _ in range(12)]
    guard.predictor = Threshold(0)  # everything alarms, which calibration's prompts did not
    requests = [Request(str(i), prompt) for i, prompt in enumerate(prompts)]
    guard.run(tiny_llama, requests, ENDLESS)
    assert guard.drift is not None
    assert guard.drift.requests == 12
    assert guard.drift.drifted == "more"
    guard.run(tiny_llama, requests, ENDLESS)
    assert guard.drift.requests == 12  # a prompt counts once
    other = rules_predictor().model_copy(update={"horizon_tokens": 8})
    save_predictor(other, path)
    with pytest.raises(CertificateError, match="calibrate again"):
        KVGuard(None, predictor=path)


class Failing:
    """A predictor that raises."""

    feature_version = FEATURE_VERSION

    def predict(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        raise ArithmeticError("no hazard today")


def test_a_predictor_that_raises_is_noted_and_survived(tiny_llama: PreTrainedModel) -> None:
    requests = ragged_requests(tiny_llama.config.vocab_size, count=3)
    guard = KVGuard(kvpress.KnormPress(0.5), predictor=Failing(), operating_point=POINT)
    done = guard.run(tiny_llama, requests, GREEDY)
    alone = run(tiny_llama, requests, kvpress.KnormPress(0.5), 3)
    for completion, report in zip(done, guard.report, strict=True):
        assert completion.token_ids == alone[completion.request.key].token_ids
        assert report.notes == ["predictor failed: ArithmeticError: no hazard today"]


def test_out_of_memory_while_verifying_is_survived(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = ragged_requests(tiny_llama.config.vocab_size, count=3)
    alone = run(tiny_llama, requests, kvpress.KnormPress(0.5), 3)

    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory for this pass")

    monkeypatch.setattr("kvguard.checks.check_answers", exhausted)
    script = {requests[0].seed: {4: Action.REWIND}}
    done = watched(
        tiny_llama, requests, kvpress.KnormPress(0.5), lambda rows: Scripted(rows, script)
    )
    for key, (completion, report) in done.items():
        assert completion.token_ids == alone[key].token_ids
        assert completion.error is None
        assert any("OutOfMemoryError" in note for note in report.notes) == (key == "0")


def test_non_finite_logits_are_recovered_by_the_uncompressed_model(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [Request(r.key, r.prompt_ids, r.seed) for r in ragged_requests(160, count=3)]
    session = Session(tiny_llama, GREEDY, press=kvpress.KnormPress(0.5), rows=3)
    advance, steps = session.advance, iter(range(1000))

    def poisoned() -> None:
        advance()
        if next(steps) == 5:
            row = next(i for i, r in enumerate(session.rows) if r.completion.request.key == "2")
            session.logits[row] = torch.nan

    monkeypatch.setattr(session, "advance", poisoned)
    observer = GuardObserver(session, make_policy("none", 3, max_new_tokens=NEW_TOKENS))
    done = {c.request.key: (c, r) for c, r in guarded(session, requests, observer)}
    completion, report = done["2"]
    assert completion.error is None
    assert "non-finite logits at token 6" in report.notes[0]
    assert completion.token_ids == uncompressed(tiny_llama, requests)["2"]
    alone = run(tiny_llama, requests, kvpress.KnormPress(0.5), 3, decoding=GREEDY)
    assert done["0"][0].token_ids == alone["0"].token_ids


def test_a_recovered_row_is_not_alarmed_again(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request("0", ragged_requests(160)[0].prompt_ids, seed=1)
    session = Session(tiny_llama, ENDLESS, press=kvpress.KnormPress(0.5), rows=1)
    advance, steps = session.advance, iter(range(1000))

    def poisoned() -> None:
        advance()
        if next(steps) == 5:
            session.logits[0] = torch.nan

    monkeypatch.setattr(session, "advance", poisoned)
    policy = make_policy("guard_promote", 1, max_new_tokens=NEW_TOKENS, controller=POINT)
    watch = GuardObserver(session, policy, predictor=Threshold(NEW_TOKENS))
    ((completion, report),) = guarded(session, [request], watch)
    assert report.alarm_steps == [7]
    assert len(report.rewound_to) == 1
    assert completion.token_ids == uncompressed(tiny_llama, [request], ENDLESS)["0"]


def test_a_prompt_that_the_press_refuses_is_not_compressed(tiny_llama: PreTrainedModel) -> None:
    requests = ragged_requests(tiny_llama.config.vocab_size, count=3)
    window = len(requests[0].prompt_ids)  # one of the three prompts is too short for it
    guard = KVGuard(kvpress.SnapKVPress(0.5, window_size=window), predictor="rules")
    output = tiny_llama.generate(
        **left_padded(requests), custom_generate=guard, max_new_tokens=4, do_sample=False
    )
    start = left_padded(requests)["input_ids"].shape[1]
    assert "its cache is not compressed" in guard.report[0].notes[0]
    assert "window size" in guard.report[0].notes[0]
    whole = [Request(r.key, r.prompt_ids, max_new_tokens=4) for r in requests]
    assert guard.completions[0].token_ids == uncompressed(tiny_llama, whole)["0"]
    for i in range(3):
        assert guard.report[i].error is None
        answer = guard.completions[i].token_ids
        assert output[i, start : start + len(answer)].tolist() == answer


@pytest.mark.parametrize("error", [RuntimeError("allocator"), torch.OutOfMemoryError("cuda")])
def test_a_recovery_that_cannot_write_its_cache_leaves_the_row_whole(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    requests = ragged_requests(tiny_llama.config.vocab_size, count=3)
    alone = run(tiny_llama, requests, kvpress.KnormPress(0.5), 3)
    reserve = Slots._reserve
    failing = {"on": False}

    def exhausted(slots: Slots, layer: int, entries: int) -> None:
        if failing["on"] and layer == 1:
            raise error
        reserve(slots, layer, entries)

    def check(*arguments: Any, **options: Any) -> Any:
        failing["on"] = True
        return check_answers(*arguments, **options)

    observe = GuardObserver.observe

    def observed(observer: GuardObserver, session: Session, step: Any) -> None:
        observe(observer, session, step)
        failing["on"] = False

    monkeypatch.setattr(Slots, "_reserve", exhausted)
    monkeypatch.setattr("kvguard.checks.check_answers", check)
    monkeypatch.setattr(GuardObserver, "observe", observed)
    script = {requests[0].seed: {4: Action.REWIND}}
    done = watched(
        tiny_llama, requests, kvpress.KnormPress(0.5), lambda rows: Scripted(rows, script)
    )
    for key, (completion, report) in done.items():
        assert completion.token_ids == alone[key].token_ids
        assert any("REWIND failed" in note for note in report.notes) == (key == "0")


def test_a_press_that_fails_while_decoding_costs_one_row(tiny_llama: PreTrainedModel) -> None:
    requests = ragged_requests(tiny_llama.config.vocab_size, count=3)
    press = kvpress.DecodingPress(
        kvpress.SnapKVPress(window_size=64), compression_interval=8, target_size=10
    )
    plain = run(tiny_llama, requests, press, 3)
    assert all(
        "SnapKVPress while decoding" in (done.error or "")
        for done in plain.values()
        if len(done.token_ids) >= 8
    )
    recovered = watched(
        tiny_llama,
        requests,
        press,
        lambda rows: make_policy("none", rows, max_new_tokens=NEW_TOKENS),
    )
    expected = uncompressed(tiny_llama, requests)
    assert {key: completion.token_ids for key, (completion, _) in recovered.items()} == expected


def test_a_model_with_gradients_is_guarded_too(tiny_llama: PreTrainedModel) -> None:
    model = AutoModelForCausalLM.from_config(tiny_llama.config, dtype=torch.float32).eval()
    assert any(parameter.requires_grad for parameter in model.parameters())
    requests = [Request(r.key, r.prompt_ids, r.seed) for r in ragged_requests(160, count=3)]
    guard = KVGuard(kvpress.KnormPress(0.5), predictor=Threshold(3), operating_point=POINT)
    done = guard.run(model, requests, GREEDY)
    expected = uncompressed(model, requests)
    for completion in done:
        if len(completion.token_ids) > 6:
            assert completion.token_ids == expected[completion.request.key]


@pytest.mark.parametrize(
    "recovery", ["continue", "promote", "tolerant", "recompute", "restart", "relax_only"]
)
def test_every_recovery_is_reachable(tiny_llama: PreTrainedModel, recovery: Any) -> None:
    requests = [Request(r.key, r.prompt_ids, r.seed) for r in ragged_requests(160, count=3)]
    guard = KVGuard(
        kvpress.KnormPress(0.6), predictor=Threshold(5), operating_point=POINT, recovery=recovery
    )
    done = guard.run(tiny_llama, requests, ENDLESS)
    assert all(report.alarm_steps[0] == 8 for report in guard.report)  # risky from 5, 2 tokens
    if recovery == "restart":
        expected = uncompressed(tiny_llama, requests, ENDLESS)
        assert [c.token_ids for c in done] == [expected[r.key] for r in requests]


class Pulse(Threshold):
    """Hazardous for a few tokens, then calm."""

    def predict(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        position = np.round(features[:, 38] * NEW_TOKENS)
        return ((position >= 2) & (position < 5)).astype(np.float32)


@pytest.mark.parametrize("phase", ["prefill", "both"])
def test_a_checked_row_goes_on_compressed_and_rows_stay_independent(
    tiny_llama: PreTrainedModel, phase: str
) -> None:
    requests = [Request(r.key, r.prompt_ids, r.seed) for r in ragged_requests(160, count=6)]
    press = build_press(spec("KnormPress", 3, phase), "0.500")

    def guarded_by(rows: int) -> KVGuard:
        return KVGuard(
            press,
            predictor=Pulse(0),
            operating_point=POINT,
            batch_size=rows,
        )

    together = guarded_by(4)
    done = together.run(tiny_llama, requests, ENDLESS)
    assert all("NORMAL" in [mode for _, mode in r.modes[1:]] for r in together.report)
    for request, completion in zip(requests, done, strict=True):
        alone = guarded_by(1).run(tiny_llama, [request], ENDLESS)[0]
        assert alone.token_ids == completion.token_ids
    assert any(report.rewound_to for report in together.report)


def test_the_tolerant_cut_is_where_harm_starts() -> None:
    tolerance = Tolerance(window_tokens=3, window_llr=1.0, token_logprob=-5.0)
    quiet = np.zeros(8, np.float32)
    assert harmful_token(quiet, quiet - 1, tolerance) is None
    llr = np.array([0, 0, 2, 0, 0, 1, 1, 1], np.float32)
    assert harmful_token(llr, quiet - 1, tolerance) == 5
    implausible = np.array([-1, -1, -1, -6, -1, -1, -1, -1], np.float32)
    assert harmful_token(llr, implausible, tolerance) == 3
