"""Replays that ride in a decoding step, beside those that take a pass of their own."""

import numpy as np
import pytest
from conftest import make_tiny_model
from kvpress import AdaKVPress, ExpectedAttentionPress, KnormPress, SnapKVPress, StreamingLLMPress

from kvguard.engine import Session, Step, generate
from kvguard.guard_observer import GuardObserver, guarded
from kvguard.harm_model import HarmModel
from kvguard.policies import Policy
from kvguard.prefill import prefill_prefix
from kvguard.replays import replay_for, replay_ran
from kvguard.requests import Request
from kvguard.sampling import Decoding
from kvguard.schema import PROBE_NAMES, REPLAY_TOKENS

DECODING = Decoding(6, ())
REPLAYED = [name.startswith("replay_") for name in PROBE_NAMES]


def requests(count: int = 5, shared: int = 0) -> list[Request]:
    rng = np.random.default_rng(4)
    start = rng.integers(4, 100, shared).tolist()
    return [
        Request(str(i), [*start, *rng.integers(4, 100, 20 + 7 * i).tolist()], max_new_tokens=1 + i)
        for i in range(1, count + 1)
    ]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize(
    "press",
    [
        SnapKVPress(0.5, window_size=8),
        ExpectedAttentionPress(0.4),
        StreamingLLMPress(0.6),
        AdaKVPress(KnormPress(0.5)),
    ],
    ids=lambda press: type(press).__name__,
)
def test_a_rider_says_what_a_pass_of_its_own_says(family: str, press: object) -> None:
    """Several ride in one step, requests come later, rows move; tokens are as without."""
    model = make_tiny_model(family)
    asked = requests()
    found = {}
    for when in ("prefill", "step"):
        session = Session(model, DECODING, press=press, rows=3, probes=True, replay=when)
        found[when] = {one.request.key: one for one in generate(session, asked)}
    for key, own in found["prefill"].items():
        rider = found["step"][key]
        assert rider.token_ids == own.token_ids
        assert rider.probes is not None
        assert own.probes is not None
        np.testing.assert_allclose(rider.probes, own.probes, rtol=2e-3, atol=2e-5)
        assert replay_ran(own.probes)
        length = len(own.request.prompt_ids)
        assert rider.tokens_prefilled == length + min(REPLAY_TOKENS, length - 1)


def test_a_shared_prefix_is_replayed_over() -> None:
    model = make_tiny_model("llama")
    asked = requests(3, shared=24)
    found = []
    for when in ("prefill", "step"):
        prefix = prefill_prefix(model, asked[0].prompt_ids[:24])
        session = Session(
            model,
            DECODING,
            press=KnormPress(0.5),
            rows=3,
            prefix=prefix,
            probes=True,
            replay=when,
            cold="host",
        )
        found.append({one.request.key: one.probes for one in generate(session, asked)})
    for key, probes in found[0].items():
        other = found[1][key]
        assert probes is not None
        assert other is not None
        np.testing.assert_allclose(other, probes, rtol=2e-3, atol=2e-5)


def test_none_is_run_where_nobody_reads_it() -> None:
    model = make_tiny_model("llama")
    session = Session(model, DECODING, press=KnormPress(0.5), rows=2, probes=True, replay="none")
    for one in generate(session, requests(3)):
        assert one.probes is not None
        assert not replay_ran(one.probes)
        assert np.isfinite(one.probes[PROBE_NAMES.index("evicted_mass_mean")])
        assert one.tokens_prefilled == len(one.request.prompt_ids)


def test_an_answer_of_one_token_has_none() -> None:
    """It leaves before the next step; nothing is charged."""
    model = make_tiny_model("llama")
    asked = [Request("a", list(range(4, 40)), max_new_tokens=1), *requests(2)]
    session = Session(model, DECODING, press=KnormPress(0.5), rows=3, probes=True, replay="step")
    done = {one.request.key: one for one in generate(session, asked)}
    assert done["a"].tokens_prefilled == 36
    for key, one in done.items():
        assert one.probes is not None
        assert replay_ran(one.probes) == (key != "a")


def test_a_rider_costs_a_copy_of_a_layer_and_no_pass() -> None:
    model = make_tiny_model("llama")
    asked = requests(4)
    found = {}
    for when in ("none", "step", "prefill"):
        session = Session(model, DECODING, press=KnormPress(0.5), rows=4, probes=True, replay=when)
        observer = GuardObserver(session, Policy("none", 4))
        found[when] = {one.request.key: one for one, _ in guarded(session, asked, observer)}
        entry = session.slots.bytes_per_entry
    for key, none in found["none"].items():
        kept = none.cache_bytes_after // (entry * session.slots.layers)
        added = found["step"][key].device_byte_steps - none.device_byte_steps
        assert added == kept * entry
        assert found["prefill"][key].device_byte_steps - none.device_byte_steps > added


def test_scores_are_known_at_the_second_token() -> None:
    model = make_tiny_model("llama")
    session = Session(model, DECODING, press=KnormPress(0.5), rows=2, probes=True, replay="step")
    last = PROBE_NAMES.index("replay_kl_last")
    known: dict[str, list[bool]] = {}

    class Watch(GuardObserver):
        def observe(self, session: Session, step: Step) -> None:
            super().observe(session, step)
            for number, row in enumerate(session.rows):
                known.setdefault(row.completion.request.key, []).append(
                    bool(np.isfinite(self.probe[number]))
                )

    observer = Watch(session, Policy("none", 2), probe_score=lambda probes: probes[:, last])
    done = {one.request.key: one for one, _ in guarded(session, requests(4), observer)}
    for key, seen in known.items():
        assert seen == [False, *[True] * (len(done[key].token_ids) - 1)]
    assert not observer.unscored


def test_where_a_reader_has_its_replay() -> None:
    class Reader:
        feature_names: tuple[str, ...] = ("evicted_mass_mean", "replay_kl_max")

    class Other:
        feature_names: tuple[str, ...] = ("evicted_mass_mean",)

    assert replay_for(Reader(), waits=True) == "step"
    assert replay_for(Reader(), waits=False) == "prefill"
    assert replay_for(Other(), waits=True) == "none"
    alone = HarmModel.model_validate({"alone": {"intercept": 0, "rejections": 1}})
    assert replay_for(alone, waits=True) == "none"
    assert replay_for(None, waits=True) == "none"
