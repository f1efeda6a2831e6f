"""Signals against a plain float64 computation, at the edges where shortcuts go wrong."""

import numpy as np
import pytest
import torch
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st

from kvguard.signals import SIGNAL_INDEX, SIGNAL_NAMES, extract_signals, largest, peaks


def plain(logits: np.ndarray, chosen: int) -> dict[str, float]:
    """One row's signals by definition, in float64."""
    x = logits.astype(np.float64)
    logprobs = x - x.max() - np.log(np.exp(x - x.max()).sum())
    order = np.argsort(-logprobs, kind="stable")
    p = np.exp(logprobs)
    others = np.delete(logprobs, order[0])
    others = others - others.max() - np.log(np.exp(others - others.max()).sum())
    return {
        "entropy": -(p * logprobs).sum(),
        "alternatives_entropy": -(np.exp(others) * others).sum(),
        "top1_probability": p[order[0]],
        "top5_probability": p[order[:5]].sum(),
        "mean_logprob": logprobs.mean(),
        "chosen_logprob": logprobs[chosen],
        "chosen_rank": float((logprobs > logprobs[chosen]).sum()),
        **{f"top_logprob_{i:02d}": logprobs[order[i]] for i in range(20)},
    }


@examples(60)
@given(
    seed=st.integers(0, 10_000),
    spread=st.floats(0.01, 12),
    vocabulary=st.sampled_from([20, 160, 5_000, 30_001]),
    lead=st.floats(0, 30),
)
def test_signals_equal_their_definitions(
    seed: int, spread: float, vocabulary: int, lead: float
) -> None:
    draw = np.random.default_rng(seed)
    logits = (draw.normal(size=(3, vocabulary)) * spread).astype(np.float32)
    logits[0, draw.integers(vocabulary)] += lead  # nearly all of the mass on one token
    chosen = draw.integers(vocabulary, size=3)
    signals = extract_signals(torch.from_numpy(logits), torch.from_numpy(chosen))
    assert signals.finite.all()
    for row in range(3):
        for name, value in plain(logits[row], int(chosen[row])).items():
            found = float(signals.table[row, SIGNAL_INDEX[name]])
            assert found == pytest.approx(value, abs=2e-4, rel=2e-4), name


def test_the_entropy_delta_is_undefined_where_there_is_no_previous_token() -> None:
    logits = torch.randn(2, 50)
    chosen = logits.argmax(dim=1)
    entropy = extract_signals(logits, chosen).table[:, 0]
    previous = torch.tensor([float("nan"), 1.0])
    delta = extract_signals(logits, chosen, previous).table[:, SIGNAL_INDEX["entropy_delta"]]
    assert torch.isnan(delta[0])
    assert delta[1] == entropy[1] - 1
    alone = extract_signals(logits, chosen).table[:, SIGNAL_INDEX["entropy_delta"]]
    assert torch.isnan(alone).all()


@given(
    seed=st.integers(0, 1000),
    vocabulary=st.sampled_from([40, 12_345]),
    decimals=st.sampled_from([-1, 0, 3]),
)
@examples(30)
def test_without_a_chosen_token_it_is_the_argmax(seed: int, vocabulary: int, decimals: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocabulary, generator=generator).round(decimals=decimals)
    greedy = extract_signals(logits)
    assert torch.equal(greedy.chosen, logits.argmax(dim=1))
    given_ = extract_signals(logits, logits.argmax(dim=1))
    torch.testing.assert_close(greedy.table, given_.table, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peaks_are_torchs(dtype: torch.dtype) -> None:
    logits = torch.randn(6, 700).round(decimals=1).to(dtype)  # ties
    logits[1, 500], logits[2, 3], logits[3] = float("nan"), float("inf"), float("-inf")
    for part in (logits, logits[:, ::2]):
        values, indices = peaks(part)
        assert torch.equal(indices, part.argmax(dim=1))
        torch.testing.assert_close(values, part.amax(dim=1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_logits_are_seen_in_their_row_only(bad: float) -> None:
    logits = torch.randn(3, 600)
    logits[1, 77] = bad
    signals = extract_signals(logits, torch.zeros(3, dtype=torch.long))
    assert signals.finite.tolist() == [True, False, True]


def test_forbidden_tokens_have_no_mass() -> None:
    logits = torch.randn(1, 600)
    open_ = logits.clone()
    logits[0, 100:] = -torch.inf
    kept = extract_signals(logits, torch.tensor([3])).table[0]
    alone = extract_signals(open_[:, :100], torch.tensor([3])).table[0]
    names = [name for name in SIGNAL_NAMES if name not in ("mean_logprob", "entropy_delta")]
    columns = [SIGNAL_INDEX[name] for name in names]
    torch.testing.assert_close(kept[columns], alone[columns])


def test_a_row_alone_and_among_many_and_none_at_all() -> None:
    # 30 rows of 50,000 are several blocks of a CPU's work.
    logits = torch.randn(30, 50_000, generator=torch.Generator().manual_seed(0)) * 4
    chosen = torch.arange(30)
    table = extract_signals(logits, chosen).table
    for row in (0, 9, 10, 29):
        alone = extract_signals(logits[row : row + 1], chosen[row : row + 1]).table
        torch.testing.assert_close(table[row : row + 1], alone, equal_nan=True)
    with torch.inference_mode():  # in and out of that mode, in the same scratch memory
        torch.testing.assert_close(extract_signals(logits, chosen).table, table, equal_nan=True)
    assert extract_signals(logits[:0], chosen[:0]).table.shape == (0, len(SIGNAL_NAMES))


def test_certainty_has_no_alternatives() -> None:
    logits = torch.full((1, 40), -1e6)
    logits[0, 5] = 0.0
    table = extract_signals(logits, torch.tensor([5])).table[0]
    assert table[SIGNAL_INDEX["entropy"]] == 0
    assert torch.isnan(table[SIGNAL_INDEX["alternatives_entropy"]])


@given(seed=st.integers(0, 1000), vocabulary=st.sampled_from([11_000, 12_345, 20_480]))
@examples(20)
def test_the_largest_entries_are_found_exactly(seed: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, vocabulary, generator=generator).round(decimals=1)  # many ties
    values, indices = largest(logits, 20)
    assert torch.equal(values, logits.topk(20, dim=1).values)
    assert torch.equal(values, logits.gather(1, indices))


def test_an_accelerator_is_never_waited_for() -> None:
    # A meta tensor has no values: whatever asks for one of them raises.
    logits = torch.empty(4, 30_000, device="meta")
    chosen = torch.zeros(4, dtype=torch.long, device="meta")
    table = extract_signals(logits, chosen, torch.empty(4, device="meta")).table
    assert table.shape == (4, len(SIGNAL_NAMES))


def test_wrong_shapes_say_what_fits() -> None:
    with pytest.raises(ValueError, match=r"\(rows, vocabulary\) and chosen \(rows,\)"):
        extract_signals(torch.zeros(50), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="need 20 vocabulary entries, got 8"):
        extract_signals(torch.zeros(1, 8), torch.zeros(1, dtype=torch.long))
