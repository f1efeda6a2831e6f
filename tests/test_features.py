from itertools import pairwise
from typing import NamedTuple

import numpy as np
import polars as pl
import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from synthetic import make_run, write_run

from kvguard import schema
from kvguard.feature_files import build_features
from kvguard.features import FEATURE_SETS, FeatureState, compute_features

NAMES = list(schema.FEATURE_NAMES)
SIGNALS = list(schema.SIGNALS)


class Trace(NamedTuple):
    signals: np.ndarray  # (t, 28) float32, NaN where undefined
    token_ids: np.ndarray  # (t,)
    ratio: str
    max_new_tokens: int


def make_trace(seed: int, length: int, vocabulary: int) -> Trace:
    """A small vocabulary makes n-grams repeat; a few signals are undefined."""
    rng = np.random.default_rng(seed)
    signals = rng.normal(size=(length, len(SIGNALS))).astype(np.float32)
    signals[:, SIGNALS.index("chosen_rank")] = rng.integers(0, 5, length)
    delta = SIGNALS.index("entropy_delta")
    signals[rng.random(length) < 0.1, delta] = np.nan
    signals[:1, delta] = np.nan
    return Trace(
        signals,
        rng.integers(0, vocabulary, length),
        f"{rng.integers(0, 1000) / 1000:.3f}",
        length + int(rng.integers(1, 100)),
    )


def as_tables(traces: list[Trace]) -> tuple[pl.DataFrame, pl.DataFrame]:
    keys, frames = [], []
    for number, trace in enumerate(traces):
        key = {"model": "m", "press": "p", "ratio": trace.ratio, "prompt_id": f"{number:05d}"}
        keys.append(key | {"max_new_tokens": trace.max_new_tokens})
        frames.append(
            pl.DataFrame(trace.signals, schema=SIGNALS, nan_to_null=True).with_columns(
                *(pl.lit(value).alias(name) for name, value in key.items()),
                pl.int_range(pl.len(), dtype=pl.Int32).alias("position"),
                pl.Series("token_id", trace.token_ids, dtype=pl.Int32),
                pl.col("chosen_rank").cast(pl.Int32),
            )
        )
    return pl.concat(frames), pl.DataFrame(keys)


def whole(traces: list[Trace]) -> list[np.ndarray]:
    """Features of each trace from the table, NaN where null."""
    features = compute_features(*as_tables(traces))
    table = features.select(NAMES).to_numpy()
    offsets = np.cumsum([0, *(len(trace.token_ids) for trace in traces)])
    return [table[a:b] for a, b in pairwise(offsets)]


def assert_same_bits(left: np.ndarray, right: np.ndarray) -> None:
    """NaN equals NaN; otherwise the same bits, so that 0.0 differs from -0.0."""
    assert left.dtype == right.dtype == np.float32
    both = np.isnan(left) & np.isnan(right)
    different = np.argwhere((left.view(np.uint32) != right.view(np.uint32)) & ~both)
    assert not len(different), [(int(row), NAMES[column]) for row, column in different[:5]]


def expected_features(trace: Trace) -> np.ndarray:
    """The definitions, one token and one number at a time."""
    rows = []
    flags: list[float] = []
    ids = trace.token_ids.tolist()
    for t in range(len(ids)):
        row = dict(zip(SIGNALS, trace.signals[t].tolist(), strict=True))
        window = ids[max(0, t - 127) : t + 1]
        grams = [tuple(window[i : i + 4]) for i in range(len(window) - 3)]
        flags.append(float(len(grams) > 0 and grams[-1] in grams[:-1]))
        row["repeated_ngram"] = flags[-1]
        for name in ("entropy", "top1_probability", "alternatives_entropy", "entropy_delta"):
            values = trace.signals[max(0, t - 7) : t + 1, SIGNALS.index(name)].astype(np.float64)
            values = values[~np.isnan(values)]
            row[f"{name}_mean_8"] = values.mean() if len(values) else np.nan
            row[f"{name}_std_8"] = values.std() if len(values) else np.nan
        row["repetition_sum"] = sum(flags[max(0, t - 31) :])
        row["relative_position"] = t / trace.max_new_tokens
        row["compression_ratio"] = float(trace.ratio)
        seen = trace.signals[: t + 1].astype(np.float64)
        entropy, top1, top5 = (
            seen[:, SIGNALS.index(name)]
            for name in ("entropy", "top1_probability", "top5_probability")
        )
        row |= {"entropy_mean": entropy.mean(), "entropy_max": entropy.max()}
        row["top1_probability_mean"] = top1.mean()
        row["runner_up_probability_mean"] = (top5 - top1).mean()
        row |= dict.fromkeys(schema.PROBE_NAMES, np.nan)
        rows.append([row[name] for name in NAMES])
    return np.array(rows).reshape(-1, len(NAMES))


traces_of = st.builds(
    make_trace,
    seed=st.integers(0, 2**32),
    length=st.integers(1, 300),
    vocabulary=st.sampled_from([1, 2, 4, 5000]),
)


@examples(30)
@given(st.lists(traces_of, min_size=1, max_size=4))
def test_features_follow_their_definitions(traces):
    for trace, features in zip(traces, whole(traces), strict=True):
        np.testing.assert_allclose(features, expected_features(trace), rtol=1e-6, atol=1e-7)


def test_an_ngram_counts_as_repeated_while_both_fit_in_128_tokens():
    for gap, expected in ((120, 1.0), (121, 0.0)):  # 4 + 120 + 4 tokens are 128
        ids = np.array([1, 2, 3, 4, *range(100, 100 + gap), 1, 2, 3, 4])
        trace = make_trace(0, len(ids), 9)._replace(token_ids=ids)
        flags = whole([trace])[0][:, NAMES.index("repeated_ngram")]
        assert flags[-1] == expected
        assert not flags[:-1].any()


def test_a_token_said_without_end_fills_the_repetition_sum():
    trace = make_trace(0, 60, 1)
    features = whole([trace])[0]
    assert features[:, NAMES.index("repeated_ngram")].tolist() == [0.0] * 4 + [1.0] * 56
    assert features[:, NAMES.index("repetition_sum")].tolist() == [
        min(32, max(0, t - 3)) for t in range(60)
    ]


def test_ngrams_of_one_hash_are_told_apart(monkeypatch):
    traces = [make_trace(seed, 300, vocabulary) for seed, vocabulary in enumerate((3, 5, 5000))]
    expected = whole(traces)
    monkeypatch.setattr("kvguard.features._HASH_TAIL", 0)
    monkeypatch.setattr("kvguard.features._HASH_HEAD", 0)
    for features, same in zip(whole(traces), expected, strict=True):
        assert_same_bits(features, same)


def test_a_constant_signal_has_no_deviation_and_the_first_token_no_delta():
    trace = make_trace(0, 20, 9)
    trace.signals[:, SIGNALS.index("entropy")] = 0.1
    features = compute_features(*as_tables([trace]))
    assert features["entropy_std_8"].to_list() == [0.0] * 20
    assert set(features["entropy_mean_8"].to_list()) == {float(np.float32(0.1))}
    for name in ("entropy_delta", "entropy_delta_mean_8", "entropy_delta_std_8"):
        assert features[name][0] is None
    assert not any(features[name].is_nan().any() for name in NAMES)


def test_the_past_of_one_trace_does_not_reach_into_the_next():
    loop = make_trace(1, 40, 1)
    alone = whole([loop])[0]
    for features in whole([loop, loop, loop]):
        assert_same_bits(features, alone)


@examples(40)
@given(
    traces=st.lists(traces_of, min_size=1, max_size=7),
    slots=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
def test_a_few_tokens_at_a_time_equal_the_whole_table_bit_for_bit(traces, slots, seed):
    """Slots are refilled, random rows advance by one token or several, and rows are rewound."""
    rng = np.random.default_rng(seed)
    expected = whole(traces)
    state = FeatureState(slots, max_new_tokens=1, ratio=0.0)
    waiting = list(range(len(traces)))
    running: dict[int, list[int]] = {}  # slot -> [trace, tokens taken]
    while waiting or running:
        for slot in range(slots):
            if slot not in running and waiting:
                number = waiting.pop(0)
                running[slot] = [number, 0]
                state.reset(slot, float(traces[number].ratio), traces[number].max_new_tokens)
                if rng.random() < 0.3:  # another request went on here before the rewind
                    other = make_trace(int(rng.integers(100)), 50, 3)
                    state.replace(slot, other.signals, other.token_ids)
                    taken = int(rng.integers(0, len(traces[number].token_ids)))
                    replace(state, slot, traces[number], taken)
                    running[slot][1] = taken
        active = [slot for slot in running if rng.random() < 0.8] or list(running)
        rows = rng.permutation(active)
        for _ in range(int(rng.integers(1, 40))):
            rows = np.array(
                [r for r in rows if running[r][1] < len(traces[running[r][0]].token_ids)], dtype=int
            )
            if not len(rows):
                break
            now = [(traces[running[row][0]], running[row][1]) for row in rows]
            left = min(len(trace.token_ids) - t for trace, t in now)
            several = min(left, int(rng.choice([1, 2, 8, 200])))
            features = state.advance(
                rows,
                np.stack([trace.signals[t : t + several] for trace, t in now]),
                np.stack([trace.token_ids[t : t + several] for trace, t in now]),
                np.array([t for _, t in now]),
            )
            for row, one in zip(rows, features, strict=True):
                number, t = running[row]
                assert_same_bits(one, expected[number][t : t + several])
                running[row][1] += several
        if rng.random() < 0.3 and running:  # rewind one row
            slot = int(rng.choice(list(running)))
            running[slot][1] = int(rng.integers(0, running[slot][1] + 1))
            replace(state, slot, traces[running[slot][0]], running[slot][1])
        for slot, (number, taken) in list(running.items()):
            if taken == len(traces[number].token_ids):
                del running[slot]


def replace(state: FeatureState, slot: int, trace: Trace, taken: int) -> None:
    state.replace(slot, trace.signals[:taken], trace.token_ids[:taken])


def test_a_rewind_may_change_the_ratio():
    trace = make_trace(3, 10, 4)
    state = FeatureState(1, max_new_tokens=64, ratio=0.75)
    state.replace(0, trace.signals[:9], trace.token_ids[:9], ratio=0.0)
    row = np.array([0])
    features = state.advance(row, trace.signals[None, 9:], trace.token_ids[None, 9:], np.array([9]))
    features = features[0]
    assert features[0, NAMES.index("compression_ratio")] == 0.0
    assert features[0, NAMES.index("relative_position")] == np.float32(9 / 64)


def test_probes_are_the_same_for_all_tokens_of_a_request():
    traces = [make_trace(seed, 5, 4) for seed in (1, 2)]
    tokens, table = as_tables(traces)
    values = np.arange(2 * len(schema.PROBE_NAMES), dtype=np.float32).reshape(2, -1)
    probes = pl.DataFrame(values, schema=list(schema.PROBE_NAMES))
    features = compute_features(tokens, pl.concat([table, probes], how="horizontal"))
    found = features.select(schema.PROBE_NAMES).to_numpy()
    assert np.array_equal(found, np.repeat(values, 5, axis=0))
    state = FeatureState(1, max_new_tokens=64, ratio=0.5)
    state.reset(0, 0.5, 64, values[1])
    row, trace = np.array([0]), traces[1]
    state.advance(row, trace.signals[None, :3], trace.token_ids[None, :3], np.array([0]))
    state.replace(0, trace.signals[:2], trace.token_ids[:2])
    after = state.advance(row, trace.signals[None, 2:], trace.token_ids[None, 2:], np.array([2]))
    at = [NAMES.index(name) for name in schema.PROBE_NAMES]
    assert np.array_equal(after[0][:, at], np.repeat(values[1:], 3, axis=0))


def test_a_step_that_skips_a_token_is_refused():
    trace = make_trace(3, 4, 4)
    state = FeatureState(2, max_new_tokens=64, ratio=0.5)
    with pytest.raises(ValueError, match=r"positions must be \[0\], got \[1\]"):
        state.advance(
            np.array([1]), trace.signals[None, :1], trace.token_ids[None, :1], np.array([1])
        )
    with pytest.raises(ValueError, match="signals of 3 tokens, but 4 token ids"):
        state.replace(0, trace.signals[:3], trace.token_ids)


def test_feature_sets_drop_more_and_more():
    names = ("full", "with_probes", "no_ratio", "no_repetition", "logit_only")
    sizes = [len(FEATURE_SETS[name]) for name in names]
    probes = len(schema.PROBE_NAMES)
    assert sizes == [44 + probes, 43 + probes, 43, 41, 40]
    assert set(FEATURE_SETS["full"]) - set(FEATURE_SETS["logit_only"]) == {
        *schema.PROBE_NAMES,
        "compression_ratio",
        "repeated_ngram",
        "repetition_sum",
        "relative_position",
    }


@pytest.mark.parametrize("chunk_rows", [1, 100, 1_000_000])
def test_files_give_the_same_features_as_a_table_whatever_the_chunks(tmp_path, chunk_rows):
    run = make_run(6, seed=7)
    files = write_run(run, tmp_path)
    target = tmp_path / "features.parquet"
    build_features(files.tokens, files.traces, target, chunk_rows=chunk_rows)
    assert_frame_equal(
        schema.read_table(target, schema.FEATURES), compute_features(run.tokens, run.traces)
    )


def test_rows_out_of_order_are_put_in_order():
    run = make_run(6, seed=7)
    shuffled = run.tokens.sample(fraction=1, shuffle=True, seed=1)
    assert_frame_equal(
        compute_features(shuffled, run.traces),
        compute_features(run.tokens, run.traces).sort(schema.TOKEN_KEYS),
    )


def test_files_out_of_order_are_put_in_order_or_refused(tmp_path):
    run = make_run(6, seed=7)
    files = write_run(run, tmp_path)
    target, shuffled = tmp_path / "features.parquet", tmp_path / "shuffled.parquet"
    run.tokens.sample(fraction=1, shuffle=True, seed=1).write_parquet(shuffled)
    build_features([shuffled], files.traces, target)
    assert_frame_equal(
        schema.read_table(target, schema.FEATURES),
        compute_features(run.tokens, run.traces).sort(schema.TOKEN_KEYS),
    )
    prompt_id = run.tokens["prompt_id"][1]
    run.tokens[[0, *range(2, run.tokens.height)]].write_parquet(shuffled)
    with pytest.raises(ValueError, match=f"must count 0, 1, 2, .*'{prompt_id}'"):
        build_features([shuffled], files.traces, target)


def test_a_table_of_another_run_is_refused_and_nothing_is_written(tmp_path):
    run = make_run(6, error_rate=0)
    files = write_run(run, tmp_path)
    with pytest.raises(ValueError, match="max_new_tokens must be at least"):
        compute_features(run.tokens, run.traces[1:])
    with pytest.raises(ValueError, match="max_new_tokens must be at least"):
        build_features(files.tokens, files.traces[1:], tmp_path / "out" / "features.parquet")
    assert list((tmp_path / "out").iterdir()) == []


def test_no_tokens_at_all_give_an_empty_table(tmp_path):
    run = make_run(2, conditions=[("snapkv", "0.500")], error_rate=0)
    empty = compute_features(run.tokens.clear(), run.traces)
    assert empty.height == 0
    assert empty.schema == pl.Schema(schema.FEATURES)
