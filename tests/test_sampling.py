"""Token choice: Gumbel noise with the right distribution, nuclei, and settings that are refused."""

import numpy as np
import pytest
import torch
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest, poisson
from torch.utils._python_dispatch import TorchDispatchMode

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


def test_the_largest_noise_of_a_large_vocabulary_is_right_too() -> None:
    rows, vocabulary = 300, 150_000
    largest, beyond = [], 0
    for start in range(0, rows, 50):
        seeds = torch.arange(start, start + 50)
        noise = gumbel_noise(seeds, seeds % 7, vocabulary)
        assert torch.isfinite(noise).all()
        largest.append(noise.amax(dim=1) - np.log(vocabulary))
        beyond += int((noise > 14).sum())
    # The maximum of n standard Gumbel variables is one of them shifted by log n.
    assert kstest(torch.cat(largest).numpy(), "gumbel_r").pvalue > 0.001
    expected = rows * vocabulary * -np.expm1(-np.exp(-14))
    assert 0.001 < poisson.cdf(beyond, expected) < 0.999


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_sampling_in_a_large_vocabulary_follows_the_distribution(top_p: float) -> None:
    count, vocabulary = 1000, 50_000
    logits = -1.1 * torch.arange(1, vocabulary + 1).log()  # Zipf: half of the mass in the tail
    logits = logits[torch.randperm(vocabulary, generator=torch.Generator().manual_seed(1))]
    decoding = Decoding(1, do_sample=True, top_p=top_p)
    seeds, zero = torch.arange(count), torch.zeros(count, dtype=torch.long)
    chosen = [
        token_scores(logits.expand(250, -1), seeds[rows], zero[rows], decoding).argmax(dim=1)
        for rows in torch.arange(count).view(-1, 250)
    ]
    probabilities = logits.double().softmax(0).numpy()
    descending = np.argsort(-probabilities, kind="stable")
    ordered = probabilities[descending]
    ordered = np.where(ordered.cumsum() - ordered < top_p, ordered, 0)
    ordered /= ordered.sum()
    # Twenty groups of neighbours in rank with nearly equal mass; the first token has 0.1 alone.
    group = np.minimum(ordered.cumsum() * 20, 19.5).astype(int)
    place = np.empty(vocabulary, int)
    place[descending] = group
    observed = np.bincount(place[torch.cat(chosen).numpy()], minlength=20)
    expected = np.bincount(group, weights=ordered, minlength=20) * count
    used = expected > 0
    assert observed[~used].sum() == 0
    assert chisquare(observed[used], expected[used]).pvalue > 0.001


def plain_scores(
    logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, decoding: Decoding
) -> tuple[np.ndarray, np.ndarray]:
    """Scores by definition, over the whole vocabulary; and where float32 may round either way."""
    scaled = logits.float() / decoding.temperature
    noise = gumbel_noise(seeds, positions, logits.shape[1])
    values = scaled.double().numpy()
    kept = np.ones(values.shape, bool)
    unsure = np.zeros(values.shape, bool)
    for row, own in enumerate(values):
        if 0 < decoding.top_k < len(own):
            kept[row] = own >= np.sort(own)[-decoding.top_k]
        unsure[row] = kept[row] & (decoding.top_p < 1)
        mass = np.where(kept[row], np.exp(own - own.max()), 0)
        mass /= mass.sum()
        _, level = np.unique(own, return_inverse=True)
        of_level = np.bincount(level, weights=mass)
        above = (of_level[::-1].cumsum()[::-1] - of_level)[level]  # more probable tokens' mass
        if decoding.top_p < 1:
            kept[row] &= above < decoding.top_p
            unsure[row] &= np.abs(above - decoding.top_p) < 1e-5
    return np.where(kept, (scaled + noise).numpy(), -np.inf), unsure


@examples(60)
@given(
    seed=st.integers(0, 10_000),
    spread=st.floats(0.1, 8),
    vocabulary=st.sampled_from([3, 70, 2_000, 40_003]),
    top_k=st.sampled_from([0, 1, 40, 1_500]),
    top_p=st.sampled_from([1.0, 1 - 1e-9, 0.95, 0.5, 1e-4]),
    ties=st.booleans(),
)
def test_candidates_first_equals_the_definition(
    seed: int, spread: float, vocabulary: int, top_k: int, top_p: float, ties: bool
) -> None:
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    if ties:
        logits = logits.bfloat16()
    decoding = Decoding(1, do_sample=True, temperature=0.8, top_k=top_k, top_p=top_p)
    seeds, positions = torch.tensor([seed, 2**61, 5]), torch.tensor([0, 7, 400])
    scores = token_scores(logits, seeds, positions, decoding)
    expected, unsure = plain_scores(logits, seeds, positions, decoding)
    assert scores.dtype == torch.float32
    assert np.array_equal(scores.numpy()[~unsure], expected[~unsure])
    assert torch.isfinite(scores.amax(dim=1)).all()
    for row in range(3):  # alone as in the batch, but where rounding decides
        one = slice(row, row + 1)
        alone = token_scores(logits[one], seeds[one], positions[one], decoding)
        sure = torch.from_numpy(~unsure[row])
        assert torch.equal(alone[0][sure], scores[row][sure])


SAMPLERS = [{}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.9}]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_accelerator_is_never_waited_for(sampler: dict[str, float]) -> None:
    # A meta tensor has no values: whatever asks for one of them raises.
    logits = torch.empty(4, 30_000, device="meta")
    zero = torch.zeros(4, dtype=torch.long, device="meta")
    decoding = Decoding(1, do_sample=True, **sampler)  # type: ignore[arg-type]
    assert token_scores(logits, zero, zero, decoding).shape == logits.shape


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_accelerator_keeps_the_same_tokens(
    sampler: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(4, 5_000, generator=torch.Generator().manual_seed(3)) * 4
    decoding = Decoding(1, do_sample=True, **sampler)  # type: ignore[arg-type]
    seeds = torch.arange(4)
    here = token_scores(logits, seeds, seeds, decoding)
    monkeypatch.setattr("kvguard.sampling._on_host", lambda _: False)
    assert torch.equal(token_scores(logits, seeds, seeds, decoding), here)


class _Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers how many elements each operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        for one in output if isinstance(output, tuple | list) else [output]:
            self.seen += [one.numel()] if isinstance(one, torch.Tensor) else []
        return output


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_many_positions_take_little_more_memory_than_their_scores(
    sampler: dict[str, float],
) -> None:
    logits = torch.randn(40, 30_000)
    rows = torch.arange(40)
    decoding = Decoding(1, do_sample=True, **sampler)  # type: ignore[arg-type]
    with _Sizes() as sizes:
        token_scores(logits, rows, rows, decoding)
    large = [size for size in sizes.seen if size > logits.numel() // 10]
    assert large == [logits.numel()]  # the scores themselves


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
