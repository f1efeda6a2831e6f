"""Token choice: Gumbel noise with the right distribution, nuclei, and settings that are refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from kvguard.sampling import Decoding, gumbel_noise, nucleus, token_scores


def test_noise_is_gumbel_and_independent_across_seeds_positions_and_tokens() -> None:
    seeds = torch.arange(60)
    noise = gumbel_noise(seeds, torch.zeros_like(seeds), 500)
    assert kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 0.001
    later = gumbel_noise(seeds, torch.ones_like(seeds), 500)
    assert abs(np.corrcoef(noise.flatten(), later.flatten())[0, 1]) < 0.02
    assert abs(np.corrcoef(noise[:-1].flatten(), noise[1:].flatten())[0, 1]) < 0.02
    assert abs(np.corrcoef(noise[:, :-1].flatten(), noise[:, 1:].flatten())[0, 1]) < 0.02


@given(seed=st.integers(0, 2**62 - 1), position=st.integers(0, 100_000), rows=st.integers(1, 5))
def test_noise_depends_on_its_own_arguments_only(seed: int, position: int, rows: int) -> None:
    one = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), 30)
    others = torch.arange(rows)
    many = gumbel_noise(
        torch.cat([others, torch.tensor([seed])]),
        torch.cat([others, torch.tensor([position])]),
        64,
    )
    assert torch.equal(many[-1, :30], one[0])
    assert torch.isfinite(one).all()


def test_sampled_tokens_follow_the_tempered_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]])
    count = 20_000
    decoding = Decoding(1, do_sample=True, temperature=1.5)
    scores = token_scores(
        logits.expand(count, -1),
        torch.arange(count),
        torch.zeros(count, dtype=torch.long),
        decoding,
    )
    observed = np.bincount(scores.argmax(dim=1).numpy(), minlength=5)
    expected = (logits[0] / 1.5).softmax(0).double().numpy()
    assert chisquare(observed, expected / expected.sum() * count).pvalue > 0.001


def test_the_nucleus_is_the_smallest_set_that_reaches_its_mass() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]])
    kept = nucleus(probabilities.log(), 0.7)
    assert kept.tolist() == [[False, True, False, True], [True, False, False, False]]


def test_top_k_comes_before_top_p() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    zero = torch.zeros(1, dtype=torch.long)
    decoding = Decoding(1, do_sample=True, top_k=2, top_p=0.5)
    # Among the two best, renormalised to 4/7 and 3/7, the first alone reaches one half.
    assert torch.isfinite(token_scores(logits, zero, zero, decoding)).tolist() == [
        [True, False, False, False]
    ]


def test_greedy_scores_are_the_logits() -> None:
    logits = torch.randn(3, 40)
    zero = torch.zeros(3, dtype=torch.long)
    assert torch.equal(token_scores(logits, zero, zero, Decoding(1)), logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 1, "temperature": 0.0}, "temperature must be a positive number"),
        ({"max_new_tokens": 1, "top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"max_new_tokens": 1, "top_k": -1}, "top_k must not be negative, got -1"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding(**arguments)  # type: ignore[arg-type]
