"""Memory over time adds up to the costs that the tables report."""

from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from kvpress import SnapKVPress
from numpy.typing import NDArray
from synthetic import make_run
from test_slots import allocated
from transformers import PreTrainedModel

from kvguard import schema
from kvguard.costs import (
    MEMORY,
    CostMeter,
    choose_guarded,
    matched_ratio,
    memory_of_rewind,
    memory_steps,
    offload_costs,
    recovery_cost,
    trace_memory,
)
from kvguard.engine import Session, generate
from kvguard.requests import Completion, Request
from kvguard.sampling import Decoding

RUN = make_run(num_prompts=6, max_new_tokens=64, error_rate=0)


def one_trace():
    compressed = (pl.col("press") == "snapkv") & (pl.col("ratio") == "0.750")
    trace = RUN.traces.filter(compressed & (pl.col("generated_tokens") > 20)).head(1)
    linear = pl.col("cache_bytes_after") + pl.col("cache_bytes_before") / pl.col(
        "prompt_tokens"
    ) * (pl.col("generated_tokens") / 2)
    steps = (1.25 * linear * (pl.col("generated_tokens") - 1)).round().cast(pl.Int64)
    return trace.with_columns(kv_kept_bytes_mean=linear, device_byte_steps=steps)


def run_row(trace, policy, **values):
    defaults = {"policy": policy, "status": "ok", "alarm_steps": [], "rewound_to": []}
    row = trace.select(schema.TRACE_KEYS).row(0, named=True) | defaults | values
    empty = dict.fromkeys(schema.RUNS)
    return pl.DataFrame([empty | row], schema=schema.RUNS)


def test_mean_over_the_steps_is_the_cost_of_the_recovery():
    trace = one_trace()
    runs = pl.concat(
        [
            run_row(trace, "none", generated_tokens=trace["generated_tokens"][0]),
            run_row(trace, "guard_promote", generated_tokens=30, alarm_steps=[12], rewound_to=[5]),
            run_row(trace, "always_safe", generated_tokens=30),
            run_row(trace, "loopguard", generated_tokens=30),
        ]
    )
    steps = memory_steps(trace, runs)
    assert set(steps["policy"]) == {"none", "guard_promote", "always_safe"}
    guarded = steps.filter(pl.col("policy") == "guard_promote")
    memory = trace_memory(trace)
    cost = recovery_cost(
        memory, trace["prompt_tokens"].to_numpy(), [12], [12], [5], [30], ended=[False], cold=True
    )
    assert guarded.height == int(cost.decode_steps[0])
    decoding = guarded["kv_bytes"].sum() + guarded["kv_bytes"][10]  # the draft waits for its check
    check = 12 * float(memory.entry[0])
    found = float(cost.device_byte_steps[0])
    assert found == pytest.approx(decoding * float(memory.padding[0]) + check)
    assert guarded["step"].to_list() == list(range(1, guarded.height + 1))
    assert guarded["mode"].to_list() == [0] * 11 + [2] * 24

    alone = steps.filter(pl.col("policy") == "none")
    assert alone["kv_bytes"].mean() == pytest.approx(trace["kv_kept_bytes_mean"][0])
    safe = steps.filter(pl.col("policy") == "always_safe")
    per_token = trace["cache_bytes_before"][0] / trace["prompt_tokens"][0]
    assert safe["kv_bytes"][0] == pytest.approx(trace["cache_bytes_before"][0] + per_token)
    assert safe["mode"].is_null().all()


def test_what_cannot_be_shown_is_refused():
    trace = one_trace()
    twice = run_row(
        trace, "guard_promote", generated_tokens=30, alarm_steps=[9, 20], rewound_to=[5, 9]
    )
    with pytest.raises(ValueError, match="recovered at most once"):
        memory_steps(trace, twice)
    with pytest.raises(ValueError, match="another request"):
        memory_steps(trace, twice.with_columns(prompt_id=pl.lit("other")))
    with pytest.raises(ValueError, match="one row"):
        memory_steps(RUN.traces, twice)
    bent = trace.with_columns(kv_kept_bytes_mean=pl.lit(1.0))
    with pytest.raises(ValueError, match="linearly"):
        memory_steps(bent, twice)


def test_the_example_is_the_median_rewind():
    trace = one_trace()
    rows = [
        run_row(trace, "guard_promote", alarm_steps=[alarm], rewound_to=[1]).with_columns(
            prompt_id=pl.lit(name)
        )
        for name, alarm in (("late", 40), ("early", 3), ("middle", 9))
    ]
    never = run_row(trace, "guard_promote").with_columns(prompt_id=pl.lit("never"))
    assert choose_guarded(pl.concat([*rows, never]))["prompt_id"] == "middle"
    with pytest.raises(ValueError, match="rewound"):
        choose_guarded(never)


def test_a_run_without_a_rewind_that_can_be_shown_gives_no_rows():
    trace = one_trace()
    guarded = run_row(trace, "guard_promote", generated_tokens=30, alarm_steps=[12], rewound_to=[5])
    assert memory_of_rewind(trace, guarded).height == 35
    assert memory_of_rewind(trace, run_row(trace, "none", generated_tokens=30)).is_empty()
    bent = trace.with_columns(kv_kept_bytes_mean=pl.lit(1.0))
    assert memory_of_rewind(bent, guarded).schema == pl.Schema(MEMORY)
    assert memory_of_rewind(bent, guarded).is_empty()


def test_a_constant_ratio_is_matched_at_its_mildest() -> None:
    ratios, cost = [0.0, 0.75, 0.5], [100.0, 70.0, 60.0]
    assert matched_ratio(ratios, cost, 120.0) == 0.0
    assert matched_ratio(ratios, cost, 80.0) == pytest.approx(0.25)
    assert matched_ratio(ratios, cost, 65.0) == pytest.approx(0.4375)  # 0.75 costs more again
    assert matched_ratio(ratios, cost, 10.0) == 0.5


def test_requests_shares_sum_to_what_the_batch_allocated(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Device byte-steps against a recount of the pools' storages at every pass, with refill."""
    session = Session(tiny_llama, Decoding(12, (2,)), press=SnapKVPress(0.5, window_size=4), rows=3)
    recounted: list[int] = []
    advance = session.advance

    def counted() -> None:
        before = session.active
        advance()
        if before:
            recounted.append(allocated(session.slots))

    monkeypatch.setattr(session, "advance", counted)
    requests = [
        Request(str(i), [5 + i] * length, max_new_tokens=4 + i)
        for i, length in enumerate((9, 70, 33, 200, 12, 40))
    ]
    done = list(generate(session, requests))
    assert [completion.error for completion in done] == [None] * 6
    assert sum(completion.device_byte_steps for completion in done) == sum(recounted)
    assert max(completion.device_bytes_peak for completion in done) >= max(recounted)
    steps = sum(completion.kv_bytes.sum() for completion in done)
    assert steps == sum(recounted)


def test_a_pass_beyond_the_slots_is_charged_to_the_rows_that_it_is_for() -> None:
    class Fixed:
        allocated_bytes = 70

        def take_peak(self) -> int:
            return 75

        def row_bytes(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
            return np.array([20, 30]), np.array([0, 5]), np.array([8, 7])

    rows = [SimpleNamespace(completion=Completion(Request(str(i), [5])), cold=None) for i in (0, 1)]
    prefix = SimpleNamespace(nbytes=60)
    for row, size in zip(rows, (500, 1000), strict=True):
        row.cold = SimpleNamespace(nbytes=size, prefix=prefix)
    meter = CostMeter(Fixed(), rows)
    meter.step()
    meter.extra_pass({1: 400})
    first, second = (row.completion for row in rows)
    assert first.device_byte_steps == 2 * 28
    assert second.device_byte_steps == 2 * 42 + 400
    assert first.device_bytes_peak == second.device_bytes_peak == 470
    assert (first.host_byte_steps, second.host_byte_steps) == (1060, 2060)


@pytest.mark.parametrize(("layers", "share"), [(24, 2 / 24), (2, 1.0), (1, 1.0)])
def test_an_offloaded_cache_is_counted_step_by_step(layers: int, share: float) -> None:
    """Against the entries that cross at each step: prompts of 5 and 3, answers of 4 and 1."""
    prompts, answers, entry = [5, 3], [4, 1], 96
    moved, held = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        crossed, stored, there = prompt, 0, prompt  # the prompt's entries leave after its prefill
        for _ in range(answer - 1):
            crossed += there + 1  # what is there comes, the new token's entries leave
            there += 1
            stored += there
        moved.append(crossed * entry)
        held.append(stored * entry)
    measured = np.array([7000.0, 0.0])
    steps, size = np.array(answers) - 1.0, np.array(prompts) * float(entry)
    found = offload_costs(measured, np.array(prompts, float), steps, size, layers=layers)
    assert found.bytes_moved.tolist() == moved
    assert found.host_byte_steps.tolist() == held
    assert found.device_byte_steps == pytest.approx(measured * share)
