"""The ladder of ratios against prefills at each ratio: caches, probes, tokens and costs."""

import kvpress
import numpy as np
import polars as pl
import pytest
import torch
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from kvpress import (
    AdaKVPress,
    CompressionRatioDecodingPress,
    KeyRerotationPress,
    KnormPress,
    PrefillDecodingPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
)

from kvguard import press_catalogue, schema
from kvguard.config import ratio_text
from kvguard.engine import Session, generate
from kvguard.guard import KVGuard
from kvguard.guard_observer import GuardObserver, guarded
from kvguard.guard_report import GuardError
from kvguard.ladder import RatioLadder, gathers, ladder_presses
from kvguard.policies import Policy
from kvguard.predictor import Predictor
from kvguard.prefill import layer_tensors, prefill, prefill_prefix
from kvguard.presses import with_ratio
from kvguard.probes import CacheProbe
from kvguard.requests import Completion, Request
from kvguard.rival_settings import (
    NEVER_RELAX,
    best_cutoff,
    best_ladder_threshold,
    fit_rivals,
    gate_scores,
)
from kvguard.rivals import choose_rung
from kvguard.sampling import Decoding
from kvguard.schema import REPLAY_TOKENS

RATIOS = {"0.750": 0.75, "0.500": 0.5, "0.250": 0.25}
DECODING = Decoding(max_new_tokens=8, end_token_ids=())


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(4, 100, length).tolist()


def starts_at(text):
    """A risk that one ratio alone passes; of "0.000": none does."""
    return lambda probes, ratio: 0.0 if ratio_text(ratio) == text else 1.0


def ladder_session(model, press, risk, *, cold="host", rows=1, prefix=None, ratios=RATIOS):
    ladder = RatioLadder(ladder_presses(press, ratios), risk, 0.5)
    return Session(
        model,
        DECODING,
        press=ladder.heaviest,
        rows=rows,
        prefix=prefix,
        probes=True,
        cold=cold,
        ladder=ladder,
    )


def run(session, requests):
    """Completion and report of each request, under a policy that does nothing else."""
    observer = GuardObserver(session, Policy("ladder", session.slots.rows))
    return {
        completion.request.key: (completion, report)
        for completion, report in guarded(session, requests, observer)
    }


def started(model, press, text, ids, *, cold="host", prefix=None):
    """What a ladder leaves for a request that starts at one ratio."""
    session = ladder_session(model, press, starts_at(text), cold=cold, prefix=prefix)
    completion = Completion(Request("a", ids))
    _, ready = session.ladder.start(session, completion.request, completion)
    return ready, completion


def at_ratio(model, press, ratio, ids, prefix=None):
    """A prefill under the press at one ratio, with its probes."""
    return prefill(
        model, ids, with_ratio(press, ratio), prefix=prefix, probe=CacheProbe(model, ids)
    )


def same_cache(one, other):
    pairs = zip(layer_tensors(one), layer_tensors(other), strict=True)
    return all(torch.equal(a, b) for own, others in pairs for a, b in zip(own, others, strict=True))


def scorers():
    """Every supported press that scores entries, with arguments that fit a short prompt."""
    made = []
    for name in press_catalogue.press_classes():
        kind = getattr(kvpress, name)
        if name in press_catalogue.REFUSED or name in press_catalogue.ATTENTION_WEIGHTS:
            continue
        if isinstance(kind, type) and issubclass(kind, ScorerPress):
            window = {"window_size": 8} if name in ("SnapKVPress", "PyramidKVPress") else {}
            inner = {"press": KnormPress()} if name == "CriticalKVPress" else {}
            made.append(kind(**window, **inner))
    return made


@pytest.mark.parametrize("press", scorers(), ids=lambda press: type(press).__name__)
def test_each_rung_is_a_prefill_at_its_ratio(tiny_llama, press):
    ids = prompt(90, seed=3)
    for text, ratio in RATIOS.items():
        ready, completion = started(tiny_llama, press, text, ids)
        expected = at_ratio(tiny_llama, press, ratio, ids)
        assert completion.start_ratio == text
        assert same_cache(ready.cache, expected.cache)
        np.testing.assert_array_equal(ready.probes, expected.probes)
        assert gathers(press)
        assert torch.equal(ready.logits, expected.logits)
        assert ready.bytes_before == expected.bytes_before
        assert ready.bytes_after == expected.bytes_after
        assert completion.tokens_prefilled == 0  # the first prefill is the engine's to count


@pytest.mark.parametrize("cold", ["disk", "none"])
@pytest.mark.parametrize("shared", [0, 50])
@pytest.mark.parametrize(
    "press",
    [
        SnapKVPress(window_size=8),
        KeyRerotationPress(SnapKVPress(window_size=8)),
        AdaKVPress(KnormPress()),
    ],
    ids=lambda press: type(press).__name__,
)
def test_it_is_exact_for_any_press_and_place(tiny_llama, press, shared, cold):
    """Presses that merge, hide or rotate, and a machine without room, prefill again."""
    ids = prompt(90, seed=4)
    prefix = prefill_prefix(tiny_llama, ids[:shared]) if shared else None
    ready, completion = started(tiny_llama, press, "0.250", ids, cold=cold, prefix=prefix)
    expected = at_ratio(tiny_llama, press, 0.25, ids, prefix)
    assert same_cache(ready.cache, expected.cache)
    np.testing.assert_array_equal(ready.probes, expected.probes)
    at_once = gathers(press) and cold != "none"
    assert completion.tokens_prefilled == (0 if at_once else 2 * len(ids))
    masks = [each is None for each in (ready.masked, expected.masked)]
    assert masks[0] == masks[1]
    if ready.masked is not None:
        pairs = zip(ready.masked, expected.masked, strict=True)
        assert all(torch.equal(own, other) for own, other in pairs)


@pytest.mark.parametrize("cold", ["host", "none"])
def test_rows_answer_as_under_the_press_at_the_ratio_they_start_at(tiny_llama, cold):
    """Three requests, each at a rung of its own, decode together with one on the full cache."""
    press = SnapKVPress(window_size=8)
    chosen = ["0.750", "0.500", "0.250", "0.000"]
    requests = [Request(str(i), prompt(60 + 7 * i, seed=i)) for i in range(4)]
    texts = dict(zip((60, 67, 74, 81), chosen, strict=True))
    session = ladder_session(tiny_llama, press, None, cold=cold, rows=2)

    def risk(probes, ratio):  # of the request whose prompt is at work
        return starts_at(texts[current[0]])(probes, ratio)

    current = [0]
    session.ladder.risk = risk
    admit = session.admit

    def admitting(request):
        current[0] = len(request.prompt_ids)
        return admit(request)

    session.admit = admitting
    done = run(session, requests)
    for request, text in zip(requests, chosen, strict=True):
        completion, report = done[request.key]
        own = None if text == "0.000" else with_ratio(press, float(text))
        alone = Session(tiny_llama, DECODING, press=own, rows=1)
        (expected,) = generate(alone, [request])
        assert completion.token_ids == expected.token_ids
        assert report.start_ratio == completion.start_ratio == text
        assert report.alarm_steps == ([] if text == "0.750" else [0])
        assert report.modes[0] == (0, "SAFE" if text == "0.000" else "NORMAL")
        assert completion.cold is None
        assert completion.cache_bytes_after == expected.cache_bytes_after


def test_what_it_costs_is_counted(tiny_llama):
    """Alone in its batch: bytes of each pass and move by hand, entries of 3 layers, 2 heads, 16."""
    entry = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head size, float32
    ids = prompt(80, seed=5)
    kept = [80 - int(80 * ratio) for ratio in RATIOS.values()]
    for text, rungs in (("0.750", 1), ("0.500", 2), ("0.250", 3), ("0.000", 3)):
        session = ladder_session(tiny_llama, StreamingLLMPress(), starts_at(text))
        completion, _ = run(session, [Request("a", ids)])["a"]
        last = None if text == "0.000" else StreamingLLMPress(float(text))
        (plain,) = generate(Session(tiny_llama, DECODING, press=last, rows=1), [Request("a", ids)])
        passes = sum(kept[:rungs]) * entry
        assert completion.device_byte_steps == plain.device_byte_steps + passes
        assert completion.tokens_prefilled == 80 + rungs * REPLAY_TOKENS
        loads = rungs - 1 + (text == "0.000")  # gathered from a whole layer at a time
        assert completion.bytes_moved == (1 + loads) * 80 * entry
        assert completion.decode_steps == plain.decode_steps
        assert completion.host_byte_steps == 0  # nothing stays parked


def test_a_prompt_that_the_press_refuses_is_not_compressed(tiny_llama):
    session = ladder_session(tiny_llama, SnapKVPress(window_size=32), starts_at("0.500"))
    session.falls_back = True
    completion, report = run(session, [Request("a", prompt(20))])["a"]
    assert completion.error is None
    assert report.start_ratio is None
    assert report.alarm_steps == []
    assert "refuses the prompt" in report.notes[0]


def test_a_predictor_that_fails_relaxes(tiny_llama):
    def risk(probes, ratio):
        raise ZeroDivisionError

    completion, _ = run(ladder_session(tiny_llama, KnormPress(), risk), [Request("a", prompt(40))])[
        "a"
    ]
    assert completion.start_ratio == "0.000"


def test_without_a_predictor_it_is_the_press(tiny_llama):
    ids = prompt(50)
    completion, report = run(ladder_session(tiny_llama, KnormPress(), None), [Request("a", ids)])[
        "a"
    ]
    (plain,) = generate(
        Session(tiny_llama, DECODING, press=KnormPress(0.75), rows=1), [Request("a", ids)]
    )
    assert completion.token_ids == plain.token_ids
    assert completion.device_byte_steps == plain.device_byte_steps
    assert (report.start_ratio, report.alarm_steps) == ("0.750", [])


def test_compression_while_decoding_goes_on_at_the_chosen_ratio(tiny_llama):
    def both():
        decoding = CompressionRatioDecodingPress(
            base_press=KnormPress(), target_compression_ratio=0.5, compression_interval=4
        )
        return PrefillDecodingPress(prefilling_press=KnormPress(), decoding_press=decoding)

    ids = prompt(50, seed=6)
    session = ladder_session(tiny_llama, both(), starts_at("0.250"))
    completion, _ = run(session, [Request("a", ids)])["a"]
    own = Session(tiny_llama, DECODING, press=with_ratio(both(), 0.25), rows=1)
    (expected,) = generate(own, [Request("a", ids)])
    assert completion.token_ids == expected.token_ids


@given(
    risk=st.lists(
        st.lists(st.sampled_from([0.1, 0.3, 0.5, np.nan]), min_size=3, max_size=3), min_size=1
    ),
    threshold=st.sampled_from([0.0, 0.2, 0.4, 1.0]),
)
def test_the_first_small_risk_is_chosen(risk, threshold):
    chosen = choose_rung(np.array(risk), threshold)
    for row, rung in zip(risk, chosen, strict=True):
        fine = [number for number, value in enumerate(row) if value < threshold]
        assert rung == (fine[0] if fine else 3)


@examples(50)
@given(seed=st.integers(0, 999), ratios=st.integers(1, 3))
def test_the_threshold_is_the_best_of_all(seed, ratios):
    rng = np.random.default_rng(seed)
    risk = rng.random((12, ratios)).round(1)
    harmed = rng.random((12, ratios)) < risk
    levels = np.linspace(0.6, 0.2, ratios)
    threshold = best_ladder_threshold(risk, harmed, levels)

    def index(bound):
        removed, given_up, hurt = 0, [], harmed[:, 0].sum()
        for row in range(12):
            fine = [n for n in range(ratios) if risk[row, n] < bound]
            kept = levels[fine[0]] if fine else 0.0
            removed += int(harmed[row, 0]) - (int(harmed[row, fine[0]]) if fine else 0)
            if not harmed[row, 0]:
                given_up.append(1 - kept / levels[0])
        return removed / hurt - (np.mean(given_up) if given_up else 0)

    if not harmed[:, 0].any():
        assert threshold == NEVER_RELAX
        return
    best = max(index(bound) for bound in np.arange(-0.05, 1.2, 0.1))
    assert index(threshold) == pytest.approx(best)
    if ratios == 1 and not harmed.all():
        cutoff = best_cutoff(risk[:, 0], harmed[:, 0])
        assert index(threshold) == pytest.approx(0 if cutoff is None else cutoff.youden)


def gate_predictor(weight=1.0, intercept=0.0):
    """A gate that goes by one probe and the ratio."""
    names = schema.GATE_FEATURES
    weights = {"evicted_mass_mean": weight, "compression_ratio": 1.0}
    return Predictor(
        kind="gate",
        target="harm",
        horizon_tokens=8,
        feature_names=names,
        feature_version=schema.FEATURE_VERSION,
        model={
            "means": [0.0] * len(names),
            "scales": [1.0] * len(names),
            "coefficients": [weights.get(name, 0.0) for name in names],
            "intercept": intercept,
        },
        provenance={},
    )


def greedy(model, guard, prompts):
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    return model.generate(
        torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        custom_generate=guard,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
    )


def test_a_users_ladder_answers_as_the_ratios_that_it_reports(tiny_llama, tmp_path):
    prompts = [prompt(40 + 9 * seed, seed) for seed in range(4)]
    press, gate = SnapKVPress(window_size=8), gate_predictor(weight=4.0, intercept=-2.6)
    probes = np.array([at_ratio(tiny_llama, press, 0.75, ids).probes for ids in prompts])
    risks = np.sort(gate_scores(gate, probes, "SnapKVPress", 0.75))
    guard = KVGuard(
        press,
        policy="ladder",
        ratios=[0.25, 0.75, 0.5],
        predictor=gate,
        threshold=float(risks[1] + risks[2]) / 2,  # two of them start at the heaviest ratio
    )
    answers = greedy(tiny_llama, guard, prompts)
    ratios = [row.start_ratio for row in guard.report]
    assert sorted(ratios)[-2:] == ["0.750", "0.750"]
    assert ratios.count("0.750") == 2
    for ids, text, answer in zip(prompts, ratios, answers, strict=True):
        press = None if text == "0.000" else SnapKVPress(float(text), window_size=8)
        session = Session(tiny_llama, Decoding(6, ()), press=press, rows=1)
        (expected,) = generate(session, [Request("a", ids)])
        assert answer[-6:].tolist() == expected.token_ids
    assert "start_ratio" in guard.report.to_frame().columns
    guard.save(tmp_path)
    loaded = KVGuard.load(tmp_path)
    assert torch.equal(greedy(tiny_llama, loaded, prompts), answers)
    assert [row.start_ratio for row in loaded.report] == ratios


@pytest.mark.parametrize(
    ("press", "options", "message"),
    [
        (None, {"ratios": [0.5]}, "press: policy='ladder' chooses the ratio of a press, got None"),
        (KnormPress(), {}, r"ratios: .*\[0.75, 0.5, 0.25\], got None"),
        (KnormPress(), {"ratios": [0.5, 1.5]}, r"ratios: .* in \(0, 1\).*got \[0.5, 1.5\]"),
        (KnormPress(), {"ratios": [0.5, 0.5]}, "ratios: each is given once"),
        (KnormPress(), {"ratios": [0.5], "threshold": 0}, r"threshold lies in \(0, 1\], got 0"),
        (KnormPress(), {"ratios": [0.5], "predictor": "rules"}, "predictor: .*gate_predictor.json"),
        (KnormPress(), {"policy": "guard", "ratios": [0.5]}, "ratios are those of policy='ladder'"),
        (
            CompressionRatioDecodingPress(base_press=KnormPress()),
            {"ratios": [0.5]},
            "press: CompressionRatioDecodingPress compresses while decoding alone",
        ),
    ],
)
def test_errors_name_the_argument(press, options, message):
    given = {"policy": "ladder", "predictor": gate_predictor()} | options
    if given["policy"] == "guard":
        given["predictor"] = "rules"
    with pytest.raises(GuardError, match=message):
        KVGuard(press, **given)


def test_thresholds_are_chosen_on_calibration_prompts_of_all_ratios_together():
    """Two ratios, risk = what happens: the ladder of both removes all harm for the least."""
    rows, splits = [], []
    for index in range(40):
        split = "calibration" if index % 2 else "train"
        splits.append({"prompt_id": f"p{index}", "split": split})
        for ratio, harmed in (("0.400", index % 4 == 1), ("0.200", index % 8 == 1)):
            rows.append(
                {
                    "model": "m",
                    "press": "s",
                    "ratio": ratio,
                    "prompt_id": f"p{index}",
                    "status": "ok",
                    "generated_tokens": 5,
                    "max_new_tokens": 9,
                    "harmed": harmed,
                    "score": 0.9 - index / 1000 if harmed else 0.1,
                }
            )
    table = pl.DataFrame(rows)
    chosen = {one.ratio: one for one in fit_rivals(table, table, table, pl.DataFrame(splits))}
    assert 0.1 < chosen["0.400"].ladder_threshold < 0.86
    assert 0.1 < chosen["0.200"].ladder_threshold < 0.86
    harmless = table.with_columns(harmed=pl.lit(False))
    for one in fit_rivals(harmless, harmless, harmless, pl.DataFrame(splits)):
        assert one.ladder_threshold == NEVER_RELAX


def test_the_real_model_starts_at_the_ratio_that_is_fine(smollm2):
    """The rung between: same tokens as under the press at that ratio, from one prefill."""
    text = "The code for amber otter is 4821. The code for keen camel is 7719. " * 8
    ids = smollm2.tokenizer.encode(text, add_special_tokens=False)
    press = SnapKVPress(window_size=16)
    session = ladder_session(smollm2.model, press, starts_at("0.500"))
    completion, report = run(session, [Request("a", ids)])["a"]
    alone = Session(smollm2.model, DECODING, press=with_ratio(press, 0.5), rows=1)
    (expected,) = generate(alone, [Request("a", ids)])
    assert completion.token_ids == expected.token_ids
    assert report.start_ratio == "0.500"
    assert completion.tokens_prefilled == len(ids) + 2 * REPLAY_TOKENS
    probes = dict(zip(schema.PROBE_NAMES, completion.probes, strict=True))
    assert 0 < probes["evicted_mass_mean"] < 1
    assert probes["replay_kl_last"] > 0
