"""A prefix held once for rows that keep it whole: answers, memory, prices; `KVGuard` finds it."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import examples, make_tiny_model
from hypothesis import given
from hypothesis import strategies as st
from test_engine import PREFILL, ragged_requests, reference, run, spec
from test_guard import GREEDY, SAMPLING, uncompressed
from transformers import PreTrainedModel

from kvguard.check_timing import LosslessAuto
from kvguard.checks import check_prices
from kvguard.config_policies import Sharing
from kvguard.engine import Session, generate
from kvguard.guard import KVGuard
from kvguard.guard_observer import GuardObserver, guarded
from kvguard.policy_factory import make_policy
from kvguard.prefill import prefill_prefix
from kvguard.presses import PressBehind, build_press, drops_lowest
from kvguard.requests import Request
from kvguard.rivals import AlwaysSafe
from kvguard.sampling import Decoding
from kvguard.shared_prefix import HeldPrefix, behind, common_prefix, compress_behind
from kvguard.slots import Slots

SHARED = 11
SHARINGS: tuple[Sharing, ...] = ("none", "full", "all")


def strangers(vocabulary: int) -> list[Request]:
    """Requests of which every third begins otherwise."""
    requests = ragged_requests(vocabulary)
    draw = np.random.default_rng(8)
    for number in range(0, len(requests), 3):
        first = draw.integers(4, vocabulary, SHARED).tolist()
        ids = [*first, *requests[number].prompt_ids[SHARED:]]
        requests[number] = replace(requests[number], prompt_ids=ids)
    return requests


def session_of(
    model: PreTrainedModel,
    requests: Sequence[Request],
    decoding: Decoding,
    rows: int,
    *,
    sharing: Sharing = "full",
    press: str | None = None,
) -> Session:
    """A session whose prefix is the second request's."""
    return Session(
        model,
        decoding,
        press=None if press is None else build_press(spec(press, 3), "0.500"),
        rows=rows,
        prefix=prefill_prefix(model, requests[1].prompt_ids[:SHARED]),
        cold="none" if press is None else "host",
        sharing=sharing,
    )


@examples(10)
@given(
    order=st.permutations(range(9)),
    rows=st.integers(1, 6),
    sample=st.booleans(),
    family=st.sampled_from(["llama", "qwen2"]),
)
def test_answers_are_those_of_rows_with_copies(
    order: list[int], rows: int, sample: bool, family: str
) -> None:
    """Rows that begin with the prefix beside others that do not, with refill, and sampled."""
    model = make_tiny_model(family)
    requests = strangers(model.config.vocab_size)
    decoding = SAMPLING if sample else GREEDY
    expected = uncompressed(model, requests, decoding)
    session = session_of(model, requests, decoding, rows)
    done = {one.request.key: one for one in generate(session, [requests[i] for i in order])}
    assert {key: one.token_ids for key, one in done.items()} == expected
    assert not session.slots.prefix.rows.any()
    assert session.slots.prefix.nbytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signals_are_those_of_rows_with_copies(dtype: torch.dtype) -> None:
    """The two parts' softmaxes are joined without loss; in bfloat16 within its rounding."""
    model = copy.deepcopy(make_tiny_model("llama")).to(dtype)
    requests = ragged_requests(model.config.vocab_size)
    found = [
        {one.request.key: one for one in generate(session, requests)}
        for session in (session_of(model, requests, GREEDY, 4, sharing=each) for each in SHARINGS)
    ]
    close = {torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    for key, one in found[0].items():
        other = found[1][key]
        same = min(
            [
                i
                for i, pair in enumerate(zip(one.token_ids, other.token_ids, strict=False))
                if pair[0] != pair[1]
            ],
            default=len(one.token_ids),
        )
        assert same == len(other.token_ids) or dtype == torch.bfloat16
        np.testing.assert_allclose(one.signals[:same, 0], other.signals[:same, 0], atol=close)


def test_memory_is_one_prefix_and_what_is_the_rows_own() -> None:
    model = make_tiny_model("llama")
    requests = [
        Request(str(i), [*range(5, 85), *range(6 + i, 26 + i)], max_new_tokens=20) for i in range(6)
    ]
    token = 2 * 3 * model.config.num_key_value_heads * model.config.head_dim * 4
    spent = {}
    for once in (False, True):
        prefix = prefill_prefix(model, requests[0].prompt_ids[:80])
        session = Session(
            model,
            Decoding(20),
            rows=6,
            prefix=prefix,
            sharing="full" if once else "none",
            cold="none",
        )
        spent[once] = list(generate(session, requests))
    for copies, one in zip(spent[False], spent[True], strict=True):
        assert copies.token_ids == one.token_ids
        # Of 19 steps; the step behind token s holds s generated tokens.
        own = [(20 + s) * token for s in range(1, 20)]
        assert copies.kv_bytes[:, 0].tolist() == [80 * token + each for each in own]
        assert (abs(one.kv_bytes[:, 0] - own - 80 * token / 6) <= 1).all()
    padded = sum(one.device_byte_steps for one in spent[True])
    kept = sum(int(one.kv_bytes[:, 0].sum()) for one in spent[True])
    assert kept <= padded == sum(int(one.kv_bytes.sum()) for one in spent[True])
    assert spent[True][0].device_bytes_peak < 0.55 * spent[False][0].device_bytes_peak


def test_promoted_rows_refer_to_the_prefix_and_move_what_is_their_own() -> None:
    """Beside compressed rows; a promotion moves the row's own entries alone."""
    model = make_tiny_model("llama")
    requests = ragged_requests(model.config.vocab_size)[:5]
    session = session_of(model, requests, GREEDY, 5, press="KnormPress")
    policy = LosslessAuto("lossless_auto", 5)
    policy.promotes = lambda row: row % 2 == 0  # type: ignore[method-assign,assignment]
    moved: dict[str, tuple[int, int]] = {}

    class Watch(GuardObserver):
        def observe(self, session: Session, step: object) -> None:
            before = [(row.exact, row.completion.bytes_moved) for row in session.rows]
            super().observe(session, step)  # type: ignore[arg-type]
            slots = session.slots
            for number, (row, (exact, bytes_)) in enumerate(zip(session.rows, before, strict=True)):
                assert slots.prefix.rows[number] == row.exact
                if row.exact and not exact:
                    length = int(session.prompt_lengths[number] + session.lengths[number])
                    own = (length - SHARED) * slots.layers * slots.bytes_per_entry
                    assert int(slots.lengths[0, number]) == length - SHARED
                    moved[row.completion.request.key] = (row.completion.bytes_moved - bytes_, own)

    expected = uncompressed(model, requests)
    for completion, report in guarded(session, requests, Watch(session, policy, bus_ratio=50)):
        assert not report.notes
        assert completion.token_ids == expected[completion.request.key]
    assert moved
    for found, own in moved.values():
        assert own <= found <= 3 * own + SHARED * own  # with what the check itself read


def test_a_promotion_is_priced_without_the_prefix() -> None:
    """It does not move; holding it costs the first rows an equal part, later ones nothing."""
    model = make_tiny_model("llama")
    requests = ragged_requests(model.config.vocab_size)[:4]
    prices = {}
    for once in (False, True):
        sharing: Sharing = "full" if once else "none"
        session = session_of(model, requests, GREEDY, 4, sharing=sharing, press="KnormPress")
        for request in requests:
            session.admit(request)
        prices[once] = check_prices(session, 50.0)
    slots, weights = session.slots, sum(each.nbytes for each in model.parameters())
    own = slots.lengths.sum(axis=0) * slots.bytes_per_entry
    alike = SHARED * slots.layers * slots.bytes_per_entry
    drafted, typical = weights / 4 + own.mean(), own.mean()
    with_copies, without = (prices[once].promotion for once in (False, True))
    assert with_copies is not None
    assert without is not None
    np.testing.assert_allclose(
        with_copies.transfer - without.transfer, np.full(4, 50.0 * alike / drafted)
    )
    beyond = alike * (1 - 1 / 4) * (1 / drafted + 1 / typical)
    np.testing.assert_allclose(with_copies.extra - without.extra, np.full(4, beyond))
    assert prices[True].shared == prices[False].shared  # checks read what they did

    slots.prefix.rows[0] = session.rows[0].exact = True  # as if one had been promoted
    found = check_prices(session, 50.0).promotion
    assert found is not None
    typical = own[1:].mean()
    whole = (session.prompt_lengths[1:] - SHARED) * slots.layers * slots.bytes_per_entry
    expected = (whole - own[1:]) * (1 / (weights / 4 + typical) + 1 / typical)
    np.testing.assert_allclose(found.extra[1:], expected)


# --- compressed rows that keep the prefix whole ---

DROPPING = [name for name in PREFILL if drops_lowest(build_press(spec(name, 3), "0.500"))]
"""Presses that can keep a prefix whole."""


@examples(8)
@given(
    press=st.sampled_from([*DROPPING, "PyramidKVPress"]),
    policy=st.sampled_from(["lossless", "lossless_auto", "verify_all"]),
    rows=st.integers(1, 6),
    sample=st.booleans(),
    share=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_checked_answers_are_the_uncompressed_ones(
    press: str, policy: str, rows: int, sample: bool, share: float, seed: int
) -> None:
    """Rows that keep the prefix, rows that have none, rows that are promoted, with refill."""
    rng = np.random.default_rng(seed)
    model = make_tiny_model("llama")
    requests = strangers(model.config.vocab_size)[:6]
    decoding = SAMPLING if sample else GREEDY
    session = session_of(model, requests, decoding, rows, sharing="all", press=press)
    rule = make_policy(policy, rows, max_new_tokens=decoding.max_new_tokens)
    if isinstance(rule, LosslessAuto):
        rule.promotes = lambda row: bool(rng.random() < share)  # type: ignore[method-assign]
    expected = uncompressed(model, requests, decoding)
    for completion, report in guarded(session, requests, GuardObserver(session, rule)):
        assert not report.notes
        assert completion.token_ids == expected[completion.request.key]
    assert session.slots.prefix.nbytes == 0


@pytest.mark.parametrize("name", DROPPING)
def test_a_press_that_keeps_the_prefix_equals_generate(name: str) -> None:
    """The same press in ``model.generate``, one prompt at a time; bytes are prefix and the rest."""
    model = make_tiny_model("llama")
    requests = ragged_requests(model.config.vocab_size)
    session = session_of(model, requests, GREEDY, 4, sharing="all", press=name)
    done = {one.request.key: one for one in generate(session, requests)}
    token = 2 * 3 * model.config.num_key_value_heads * model.config.head_dim * 4
    for request in requests:
        press = compress_behind(build_press(spec(name, 3), "0.500"), SHARED)
        assert isinstance(press, PressBehind)
        known = reference(model, request, press, [2])
        assert done[request.key].token_ids == known.tokens or known.tied
        own = len(request.prompt_ids) - SHARED
        kept = SHARED + max(1, own - own // 2 - own % 2)
        assert abs(done[request.key].cache_bytes_after - kept * token) <= token


def test_compressed_rows_hold_the_prefix_once() -> None:
    model = make_tiny_model("llama")
    requests = [
        Request(str(i), [*range(5, 85), *range(6 + i, 46 + i)], max_new_tokens=9) for i in range(4)
    ]
    prefix = prefill_prefix(model, requests[0].prompt_ids[:80])
    press = build_press(spec("KnormPress", 3), "0.500")
    token = 2 * 3 * model.config.num_key_value_heads * model.config.head_dim * 4
    session = Session(model, Decoding(9), press=press, rows=4, prefix=prefix, sharing="all")
    for completion in generate(session, requests):
        own = [(20 + s) * token for s in range(1, 9)]
        assert (abs(completion.kv_bytes[:, 0] - own - 80 * token / 4) <= 1).all()


def test_replays_ride_over_a_prefix_that_is_kept() -> None:
    """Probes of a replay in the step equal those of a replay at prefill."""
    model = make_tiny_model("llama")
    requests = ragged_requests(model.config.vocab_size)[:4]
    found = []
    for replay in ("prefill", "step"):
        session = Session(
            model,
            GREEDY,
            press=build_press(spec("KnormPress", 3), "0.500"),
            rows=4,
            prefix=prefill_prefix(model, requests[1].prompt_ids[:SHARED]),
            sharing="all",
            probes=True,
            replay=replay,  # type: ignore[arg-type]
        )
        found.append({one.request.key: one.probes for one in generate(session, requests)})
    for key in found[0]:
        np.testing.assert_allclose(found[0][key], found[1][key], atol=1e-4)


def test_presses_that_do_more_than_drop_scores_compress_the_whole_prompt() -> None:
    for name in ("PyramidKVPress", "AdaKVPress", "KeyRerotationPress", "ThinKPress"):
        press = build_press(spec(name, 3), "0.500")
        assert compress_behind(press, SHARED) is press
        assert not drops_lowest(press)
    assert compress_behind(None, SHARED) is None


def test_promotions_beside_rows_that_keep_the_prefix_pay_their_own_tokens() -> None:
    model = make_tiny_model("llama")
    requests = ragged_requests(model.config.vocab_size)[:4]
    session = session_of(model, requests, GREEDY, 4, sharing="all", press="KnormPress")
    for request in requests:
        session.admit(request)
    slots, prices = session.slots, check_prices(session, 50.0)
    assert prices.promotion is not None
    entry = slots.layers * slots.bytes_per_entry
    own = slots.lengths.sum(axis=0) * slots.bytes_per_entry
    weights = sum(each.nbytes for each in model.parameters())
    drafted = (weights + SHARED * entry) / 4 + own.mean()
    whole = (session.prompt_lengths - SHARED) * entry
    np.testing.assert_allclose(
        prices.promotion.extra, (whole - own) * (1 / drafted + 1 / own.mean())
    )
    np.testing.assert_allclose(prices.promotion.transfer, 50.0 * whole / drafted)


def test_safe_rows_of_a_guard_start_with_the_prefix() -> None:
    """A policy that never compresses shares it from the start."""
    model = make_tiny_model("llama")
    requests = ragged_requests(model.config.vocab_size)[:4]
    session = session_of(model, requests, GREEDY, 4, press="KnormPress")
    policy = make_policy("always_safe", 4, max_new_tokens=GREEDY.max_new_tokens)
    assert isinstance(policy, AlwaysSafe)
    observer = GuardObserver(session, policy)
    for request in requests:
        session.admit(request)
    assert session.slots.prefix.rows.all()
    expected = run(model, requests, None, 4)
    session = session_of(model, requests, GREEDY, 4, press="KnormPress")
    observer = GuardObserver(session, policy)
    for completion, _ in guarded(session, requests, observer):
        assert completion.token_ids == expected[completion.request.key].token_ids


def test_equal_parts_sum_to_the_whole() -> None:
    model = make_tiny_model("llama")
    held = HeldPrefix(prefill_prefix(model, [5, 6, 7]), 8)
    assert held.row_bytes(8).sum() == held.nbytes == 0
    for count in range(1, 8):
        held.rows[:] = False
        held.rows[1 : 1 + count] = True
        parts = held.row_bytes(8)
        assert parts.sum() == held.nbytes == held.whole_bytes
        assert (parts > 0).sum() == count


def test_what_stands_behind_a_prefix() -> None:
    model = make_tiny_model("llama")
    cache = prefill_prefix(model, [5, 6, 7, 8]).cache
    assert behind(cache, 0) is cache
    rest = behind(cache, 3)
    for one, other in zip(rest.layers, cache.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys[:, :, 3:])
        torch.testing.assert_close(one.values, other.values[:, :, 3:])


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("policy", ["lossless", "guard_price"])
def test_the_guard_finds_what_prompts_begin_with(policy: str, sharing: Sharing) -> None:
    """Three prompts behind 70 common tokens: prefilled once, the same answers as one at a time."""
    model = make_tiny_model("llama")
    prompts = torch.tensor([[*range(5, 75), *range(9 + i, 29 + i)] for i in range(3)])
    press = build_press(spec("KnormPress", 3), "0.500")
    lengths: list[int] = []
    handle = model.model.embed_tokens.register_forward_hook(
        lambda _module, args, _output: lengths.append(args[0].shape[1])
    )
    price = math.inf if policy == "guard_price" else None
    guard = KVGuard(press, policy=policy, harm_price=price, batch_size=3, sharing=sharing)
    together = model.generate(prompts, custom_generate=guard, max_new_tokens=12, do_sample=False)
    handle.remove()
    assert lengths[:4] == [70, 20, 20, 20]
    plain = model.generate(prompts, max_new_tokens=12, do_sample=False)
    assert together.tolist() == plain.tolist()


def test_without_a_press_a_chat_template_is_held_once() -> None:
    """README's first choice: 27 common tokens, no press; the same answers in less memory."""
    model = make_tiny_model("llama")
    prompts = torch.tensor([[*range(5, 32), *range(9 + i, 29 + i)] for i in range(3)])
    spent = {}
    for sharing in ("none", "full"):
        guard = KVGuard(None, policy="lossless", batch_size=3, sharing=sharing)
        answers = model.generate(prompts, custom_generate=guard, max_new_tokens=12, do_sample=False)
        plain = model.generate(prompts, max_new_tokens=12, do_sample=False)
        assert answers.tolist() == plain.tolist()
        spent[sharing] = sum(int(one.kv_bytes[:, 0].sum()) for one in guard.completions)
    token = 2 * 3 * model.config.num_key_value_heads * model.config.head_dim * 4
    steps = len(guard.completions[0].kv_bytes)
    assert spent["none"] - spent["full"] == 27 * token * 2 * steps  # one copy instead of three


def test_a_short_or_eager_prefix_is_not_worth_it() -> None:
    model = make_tiny_model("llama")
    prompts = [[*range(5, 5 + 16), 90 + i] for i in range(2)]
    found = common_prefix(model, prompts)
    assert found is not None
    assert found.token_ids == tuple(range(5, 21))
    assert common_prefix(model, [ids[1:] for ids in prompts]) is None
    assert common_prefix(make_tiny_model("llama", "eager"), prompts) is None
    assert common_prefix(model, prompts[:1]) is None


def test_slots_count_the_prefix_in_a_rows_length() -> None:
    model = make_tiny_model("llama")
    prefix = prefill_prefix(model, [5, 6, 7])
    slots = Slots(model.config, 2, device=model.device, dtype=model.dtype, prefix=prefix)
    slots.insert(0, prefill_prefix(model, [8, 9]).cache, shares=True)
    assert slots.get_seq_length() == 5
    assert slots.entries(0, 0)[0].shape[2] == 5
    slots.insert(0, prefill_prefix(model, [8, 9]).cache)
    assert slots.get_seq_length() == 2
