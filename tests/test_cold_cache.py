"""The cold cache on a device that is not the host: two layers at a time, the same attention.

The buffers are those of CUDA; here the device is the host, so that they can be compared.
"""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from kvguard import cold_cache
from kvguard.cold_cache import ColdRow, ColdStore, Draft, run_drafts
from kvguard.cold_layers import ColdLayers, layer_bytes
from kvguard.prefill import prefill, prefill_prefix

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
    (run,) = run_drafts(model, [Draft(rows[-1], random_ids(5, 0))]).runs
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
    expected = run_drafts(tiny_llama, drafts).runs
    plain: Callable[..., object] = cold_cache._Pass

    def buffered(*arguments: object, **_: bool) -> object:
        return plain(*arguments, buffered=True)

    monkeypatch.setattr(cold_cache, "_Pass", buffered)
    found = run_drafts(tiny_llama, drafts).runs
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
