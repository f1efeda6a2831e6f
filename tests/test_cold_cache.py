"""The cold cache on a device that is not the host: two layers at a time, the same attention.

The buffers are those of CUDA; here the device is the host, so that they can be compared.
"""

from collections import Counter
from collections.abc import Callable

import kvpress
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from kvguard import audit, cold_cache
from kvguard.checks import check_prices
from kvguard.cold_cache import ColdRow, ColdStore, Draft, Part, run_drafts
from kvguard.cold_layers import ColdLayers, layer_bytes
from kvguard.engine import Session, Step
from kvguard.guard_observer import GuardObserver, guarded
from kvguard.policies import Policy
from kvguard.prefill import prefill, prefill_prefix
from kvguard.requests import Request
from kvguard.rivals import Lossless, VerifyAll
from kvguard.sampling import Decoding
from kvguard.slots import Slots

SHARED = list(range(20, 43))


def random_ids(count: int, seed: int) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(5, 90, (count,), generator=draw).tolist()


def parked(model: PreTrainedModel, lengths: dict[int, bool], kind: str) -> list[ColdRow]:
    """Rows with prompts of these lengths, behind the shared prefix or not; some checked before."""
    store = ColdStore(model.config, device=model.device, dtype=model.dtype, kind=kind)
    prefix = prefill_prefix(model, SHARED)
    rows = []
    for length, shares in lengths.items():
        prompt = [*(SHARED if shares else []), *random_ids(length, length)]
        row = prefill(model, prompt, store=store, prefix=prefix).cold
        assert row is not None
        assert (row.prefix is not None) == shares
        rows.append(row)
    (run,) = run_drafts(model, [Draft(rows[-1], random_ids(5, 0))])
    rows[-1].append(run.entries, run.hidden[-1])
    return rows


@pytest.mark.parametrize("kind", ["host", "disk"])
@pytest.mark.parametrize(
    "lengths",
    [
        {9: False},
        {9: True},
        {9: False, 31: False, 4: False},
        {9: True, 31: True},
        {9: True, 12: False, 31: True},
    ],
    ids=["one", "one behind a prefix", "three", "two share", "two of three share"],
)
def test_layers_in_buffers_give_the_same_pass(
    tiny_llama: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    lengths: dict[int, bool],
    kind: str,
) -> None:
    rows = parked(tiny_llama, lengths, kind)
    drafts = [Draft(row, random_ids(3 + i, 7 + i)) for i, row in enumerate(rows)]
    expected = run_drafts(tiny_llama, drafts)
    plain: Callable[..., object] = cold_cache._Pass

    def buffered(*arguments: object, **_: bool) -> object:
        return plain(*arguments, buffered=True)

    monkeypatch.setattr(cold_cache, "_Pass", buffered)
    found = run_drafts(tiny_llama, drafts)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.hidden, other.hidden, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.entries, other.entries, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "lengths", [{9: False, 31: False}, {9: True, 31: True, 4: True}, {9: True, 12: False, 31: True}]
)
def test_a_check_needs_two_layers_and_is_charged_for_them(
    tiny_llama: PreTrainedModel, lengths: dict[int, bool]
) -> None:
    rows = parked(tiny_llama, lengths, "host")
    counts = [3 + i for i in range(len(rows))]
    store, parts = rows[0].store, [row.parts for row in rows]
    buffers = ColdLayers(store, parts, counts)
    charged = layer_bytes(store, parts, counts)
    assert 0 <= buffers.nbytes - sum(charged) <= len(rows), "less than a byte a row is rounded off"
    per_token = store.bytes_per_token // store.layers
    tokens = [row.length + count for row, count in zip(rows, counts, strict=True)]
    if not any(lengths.values()):
        assert charged == [2 * per_token * count for count in tokens]
        return
    # The prefix is there once for two layers, and once in the row that is being put together.
    shares = list(lengths.values())
    held = 2 * len(SHARED) + max(n for n, joins in zip(tokens, shares, strict=True) if joins)
    for row, own, joins in zip(rows, tokens, shares, strict=True):
        held += 2 * (row.length - len(SHARED) if joins else own)
    assert buffers.nbytes == per_token * held


ENTRY = 3 * 2 * 2 * 16 * 4
"""Bytes of a token: layers, keys and values, heads, head size, float32."""


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes that are copied to the device and from it, as on a device that is not the host."""
    found: Counter[str] = Counter()
    plain: Callable[..., object] = cold_cache._Pass
    read, park = Part.copy_layer, ColdStore.copy_out
    write, load = Slots.replace_tail, ColdRow.load

    def reading(part: Part, number: int, target: torch.Tensor) -> None:
        found["read"] += target.nbytes
        read(part, number, target)

    def parking(store: ColdStore, target: torch.Tensor, source: torch.Tensor) -> None:
        found["parked"] += source.nbytes
        park(store, target, source)

    def writing(slots: Slots, row: int, dropped: int, entries: torch.Tensor) -> None:
        found["written"] += entries.nbytes
        write(slots, row, dropped, entries)

    def loading(row: ColdRow, further: torch.Tensor | None = None, *, behind: int = 0) -> object:
        found["written"] += 0 if further is None else further.nbytes
        return load(row, further, behind=behind)

    monkeypatch.setattr(ColdRow, "load", loading)
    monkeypatch.setattr(cold_cache, "_Pass", lambda *given, **_: plain(*given, buffered=True))
    monkeypatch.setattr(Part, "copy_layer", reading)
    monkeypatch.setattr(ColdStore, "copy_out", parking)
    monkeypatch.setattr(Slots, "replace_tail", writing)
    return found


def behind_a_prefix(model: PreTrainedModel, max_new_tokens: int, once: bool = False) -> Session:
    """Three rows whose prompts begin with `SHARED`."""
    return Session(
        model,
        Decoding(max_new_tokens, (2,)),
        press=kvpress.KnormPress(0.6),
        rows=3,
        prefix=prefill_prefix(model, SHARED),
        cold="host",
        sharing="full" if once else "none",
    )


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_a_part_that_rows_share_is_read_once_and_counted_in_equal_parts(
    tiny_llama: PreTrainedModel, copied: Counter[str], kind: str
) -> None:
    rows = parked(tiny_llama, {9: True, 12: False, 31: True}, kind)
    copied.clear()
    runs = run_drafts(tiny_llama, [Draft(row, random_ids(3 + i, i)) for i, row in enumerate(rows)])
    # 23 tokens of the prefix for two rows; 5 were generated and parked behind the last prompt.
    read = [9 + 23 / 2, 12, 31 + 5 + 23 / 2]
    assert copied["read"] == sum(read) * ENTRY
    left = [3, 4, 5]
    moved = [run.bytes_moved for run in runs]
    assert moved == [(a + b) * ENTRY for a, b in zip(read, left, strict=True)]
    assert all(run.off_device for run in runs)


@pytest.mark.parametrize(
    ("policy", "once"),
    [
        (Lossless("lossless", 3, 3), False),
        (VerifyAll("verify_all", 3), False),
        (VerifyAll("verify_all", 3), True),
    ],
    ids=["lossless", "verify_all", "verify_all, prefix once"],
)
def test_bytes_moved_on_the_host_are_what_would_cross_a_bus(
    tiny_llama: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    copied: Counter[str],
    policy: Policy,
    once: bool,
) -> None:
    """Against every copy that a policy makes of its rows, refill and a shared prefix included."""
    checked = audit.run_drafts

    def leaving(model: PreTrainedModel, drafts: list[Draft], **options: bool) -> object:
        copied["left"] += sum(len(draft.token_ids) for draft in drafts) * ENTRY
        return checked(model, drafts, **options)

    monkeypatch.setattr(audit, "run_drafts", leaving)
    session = behind_a_prefix(tiny_llama, 14, once)
    requests = [
        Request(str(i), [*SHARED, *random_ids(6 + 5 * i, i)], max_new_tokens=8 + i)
        for i in range(5)
    ]
    done = [
        completion for completion, _ in guarded(session, requests, GuardObserver(session, policy))
    ]
    assert [completion.error for completion in done] == [None] * 5
    assert copied["read"] > 0
    assert copied["left"] > 0
    once = len(SHARED) * ENTRY  # the shared prefix was parked for all of them
    shares = sum(completion.bytes_moved for completion in done)
    assert 0 <= sum(copied.values()) - once - shares < sum(each.checks for each in done)


def test_a_shared_prefix_is_priced_once_a_pass(
    tiny_llama: PreTrainedModel, copied: Counter[str]
) -> None:
    """What a bus adds to the price of a pass for all rows is the way of the bytes that it reads."""
    session = behind_a_prefix(tiny_llama, max_new_tokens=6)
    requests = [Request(str(i), [*SHARED, *random_ids(6 + 5 * i, i)]) for i in range(3)]
    seen = 0

    class Watch(GuardObserver):
        def observe(self, session: Session, step: Step) -> None:
            nonlocal seen
            near, far = check_prices(session, 1.0), check_prices(session, 51.0)
            rows, slots = session.rows, session.slots
            if len(rows) == 3 and all(row.cold is not None for row in rows):
                kept = slots.lengths[:, :3].sum() * slots.bytes_per_entry
                weights = sum(parameter.nbytes for parameter in session.model.parameters())
                token = ENTRY / ((weights + kept) / 3)  # of what a drafted token reads
                lengths = np.array([row.cold.length for row in rows if row.cold is not None])
                alone = lengths - len(SHARED)
                np.testing.assert_allclose(far.own, 51 * token * alone)
                assert far.shared - near.shared == pytest.approx(50 * token * len(SHARED))
                assert far.promotion is not None
                np.testing.assert_allclose(far.promotion.transfer, 51 * token * lengths)
                seen += 1
                if seen == 3:
                    copied.clear()
                    run_drafts(session.model, [Draft(row.cold, [7]) for row in rows if row.cold])
                    read = far.own.sum() - near.own.sum() + far.shared - near.shared
                    assert copied["read"] == pytest.approx(read / 50 / token * ENTRY)
            super().observe(session, step)

    policy = Lossless("lossless", 3, 2)
    assert all(not report.notes for _, report in guarded(session, requests, Watch(session, policy)))
    assert seen > 2
