"""The offline simulation against a guard played by hand, request by request and token by token."""

import json
from functools import cache
from typing import NamedTuple

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from kvguard import config, schema
from kvguard.audit import harmful_token
from kvguard.compare_policies import (
    compare_live_simulation,
    constant_frontier,
    pareto,
    summarize_differences,
    summarize_runs,
)
from kvguard.controller import Mode, OperatingPoint, grid_points, stack_points
from kvguard.costs import COSTS
from kvguard.detectors import detect_all, detect_outcomes
from kvguard.evaluate_controller import (
    simulability,
    simulate_controller,
    simulate_points,
)
from kvguard.experiment import run_shard
from kvguard.features import compute_features
from kvguard.live import match_guard, run_policy_shard
from kvguard.models import LoadedModel
from kvguard.oracles import ORACLES, harmless_ratio
from kvguard.policies import AFTER_END, ENTROPY, Action, Observation
from kvguard.policy_factory import make_policy
from kvguard.predictor import Predictor
from kvguard.prompts import Prompt, prompts_frame
from kvguard.rival_settings import fit_rivals, gate_scores, trace_probes
from kvguard.simulation import OUTCOME_COLUMNS, alarm_rates, simulate_policies
from kvguard.stored_requests import load_requests, tied_requests

MAX_NEW_TOKENS = 48
ENTRY_BYTES = 64
END = 2
DETECTION = config.Detection(
    loop_window_tokens=4,
    loop_repeats=3,
    amnesia_window_tokens=4,
    divergence_window_tokens=4,
    divergence_llr=0.25,
)
TOLERANCE = config.Tolerance(window_tokens=4, window_llr=0.25)
GUARD = config.GuardSettings(check_every_tokens=1, tolerance=TOLERANCE)
LIVE = config.Live(
    clock_tokens=17,
    gate_threshold=1.5,
    ladder_threshold=0.3,
    probation_tokens=6,
    lossless_tokens=7,
    entropy_nats=3.0,
    entropy_tokens=3,
    ergo_window_tokens=5,
    ergo_delta_nats=0.6,
    refresh_tokens=15,
    loop_pattern_tokens=6,
    loop_cover_tokens=9,
)
POINT = OperatingPoint(tau_low=0.4, tau_high=0.6, k=1, j=3)
KEYS = list(schema.TRACE_KEYS)


def decode(token_ids):
    """Tokens from 900 on are written answers, all others are words."""
    return "\n".join(f"#### {t - 900}" if t >= 900 else f"w{t}" for t in token_ids)


class Run(NamedTuple):
    prompts: pl.DataFrame
    traces: pl.DataFrame
    tokens: pl.DataFrame
    outcomes: pl.DataFrame
    predictions: pl.DataFrame


def answer_tokens(rng, length, answer, loop):
    """``length`` tokens: words, perhaps a loop at the end, perhaps a written number."""
    tokens = rng.choice(800, length, replace=False) + 10
    if loop:
        start, period = length // 3, int(rng.integers(1, 4))
        cycle = start + (np.arange(length) - start) % period
        tokens = np.where(np.arange(length) >= start, tokens[cycle], tokens)
    if answer is not None:
        tokens[-2] = 900 + answer
    if length < MAX_NEW_TOKENS:
        tokens[-1] = END
    return tokens.tolist()


@cache
def make_run(seed=0, num_prompts=14, conditions=(("snapkv", "0.500"), ("snapkv", "0.750"))):
    """A run whose compressed answers follow the uncompressed one up to a planted divergence."""
    rng = np.random.default_rng(seed)
    prompts, traces, tokens, predictions = [], [], [], []
    for index in range(num_prompts):
        prompt_id = f"{index:016x}"
        reference = int(rng.integers(1, 90))
        prompts.append(
            {
                "prompt_id": prompt_id,
                "task": "t",
                "kind": "gsm8k",
                "template": None,
                "index": index,
                "question": "q",
                "reference": str(reference),
                "spec": json.dumps({"answer": str(reference)}),
            }
        )
        length = int(rng.choice([12, 20, 30, MAX_NEW_TOKENS]))
        answer = reference if rng.random() < 0.6 else None
        baseline = answer_tokens(rng, length, answer, loop=rng.random() < 0.15)
        for press, ratio in (("none", "0.000"), *conditions):
            draft, diverges = baseline, None
            if press != "none" and rng.random() < 0.8:
                diverges = int(rng.integers(0, len(baseline)))
                rest = int(rng.integers(1, MAX_NEW_TOKENS - diverges + 1))
                wrong = int(rng.integers(1, 90)) if rng.random() < 0.5 else None
                tail = answer_tokens(rng, max(diverges + rest, 3), wrong, rng.random() < 0.5)
                draft = baseline[:diverges] + tail[diverges:]
                if len(draft) > diverges and draft[diverges] == baseline[diverges]:
                    draft[diverges] = 5  # a word of no other answer
            add_trace(
                rng, traces, tokens, predictions, prompt_id, index, press, ratio, draft, diverges
            )
    run = Run(
        pl.DataFrame(prompts, schema=schema.PROMPTS),
        pl.DataFrame(traces, schema=schema.TRACES),
        pl.concat(tokens),
        pl.DataFrame(),
        pl.concat(predictions),
    )
    return judge(run)


def judge(run):
    outcomes = detect_outcomes(run.prompts, run.traces, run.tokens, DETECTION)
    return run._replace(outcomes=outcomes)


def add_trace(rng, traces, tokens, predictions, prompt_id, index, press, ratio, draft, diverges):
    count, prompt_tokens = len(draft), 30 + index
    before = ENTRY_BYTES * prompt_tokens
    after = before - round(float(ratio) * prompt_tokens) * ENTRY_BYTES
    masked = 128.0 if press == "adakv" else 0.0
    keys = {"model": "m", "press": press, "ratio": ratio, "prompt_id": prompt_id}
    traces.append(
        keys
        | {
            "task": "t",
            "shard": index // 8,
            "seed": 1000 + index,
            "status": "ok",
            "prompt_tokens": prompt_tokens,
            "generated_tokens": count,
            "max_new_tokens": MAX_NEW_TOKENS,
            "stop_reason": "eos" if draft[-1] == END else "length",
            "text": decode(draft),
            "cache_bytes_before": before,
            "cache_bytes_after": after,
            "kv_kept_bytes_mean": after + ENTRY_BYTES * count / 2 if count > 1 else None,
            "kv_masked_bytes_mean": masked if count > 1 else None,
            "device_byte_steps": round(
                1.25 * (count - 1) * (after + (masked or 0) + ENTRY_BYTES * count / 2)
            ),
            "prefill_seconds": 0.1,
            "decode_seconds": 0.1,
        }
    )
    gap = np.zeros(count)
    llr = rng.uniform(-0.1, 0.1, count)
    if diverges is not None:
        gap[diverges:] = np.where(rng.random(count - diverges) < 0.4, 0.5, 0)
        gap[diverges] = 0.5
        llr[diverges:] += rng.choice([0.0, 1.2])
    columns = {name: np.zeros(count) for name in schema.SIGNALS} | {
        "position": np.arange(count),
        "token_id": draft,
        "entropy": rng.gamma(2.0, 1.2, count),
        "audit_logprob": np.where(rng.random(count) < 0.02, -9.0, -1.0),
        "audit_is_argmax": gap == 0,
        "audit_gap": gap,
        "llr": llr,
    }
    frame = pl.DataFrame(columns).with_columns(pl.lit(v).alias(k) for k, v in keys.items())
    tokens.append(schema.conform(frame, schema.TOKENS))
    hazard = np.clip(0.25 + 0.3 * (np.arange(count) >= (diverges or count)), 0, 1)
    hazard = np.clip(hazard + rng.normal(0, 0.2, count), 0, 1)
    predicted = frame.select(*KEYS, "position").with_columns(
        split=pl.lit("test"), target=pl.lit("any"), hazard=pl.Series(hazard)
    )
    predictions.append(schema.conform(predicted, schema.PREDICTIONS))


def requests_of(run, **options):
    options = {"guard": GUARD} | options
    return load_requests(run.traces, run.tokens, run.outcomes, run.predictions, **options)


def simulate(run, policies, **options):
    options = {"controller": POINT, "decode": decode, "guard": GUARD, "live": LIVE} | options
    return simulate_policies(
        requests_of(run, guard=options["guard"]),
        policies,
        prompts=run.prompts,
        detection=DETECTION,
        **options,
    )


def sequences(run):
    """Per trace: token ids, gaps, hazards, entropies, and the trace's row, as plain lists."""
    columns = [*KEYS, "position"]
    table = run.tokens.join(run.predictions, on=columns).sort(columns)
    found = {}
    for key, part in table.group_by(KEYS, maintain_order=True):
        found[key] = {
            name: part[name].to_list()
            for name in ("token_id", "audit_gap", "hazard", "entropy", "llr", "audit_logprob")
        }
    for row in run.traces.to_dicts():
        found[tuple(row[k] for k in KEYS)]["trace"] = row
    return found


def play(name, request, baseline, holdback=16, rate=None, every=1):
    """One request under a live guard, in plain Python: the uncompressed model is the baseline.

    Returns final tokens, alarm steps, cuts and costs; None when the baseline cannot say.
    """
    policy = make_policy(
        name,
        1,
        max_new_tokens=MAX_NEW_TOKENS,
        live=LIVE,
        controller=POINT,
        check_every_tokens=every,
        alarm_rate=rate,
    )
    policy.reset(0, request["trace"]["seed"])
    prompt = request["trace"]["prompt_tokens"]
    entry = ENTRY_BYTES
    full = request["trace"]["cache_bytes_before"]
    held = request["trace"]["cache_bytes_after"] + (request["trace"]["kv_masked_bytes_mean"] or 0)
    bytes_, waiting, passes, checks, prefilled = [], [], [], 0, prompt
    alarms, cuts, wasted, streamed, unrecoverable = [], [], 0, 0, 0
    if policy.starts_safe:
        final = baseline["token_id"]
        bytes_ = [full + entry * s for s in range(1, len(final))]
    else:
        final, draft = None, request["token_id"]
        for at in range(len(draft)):
            history = np.full((1, MAX_NEW_TOKENS), -1, np.int32)
            history[0, : at + 1] = draft[: at + 1]
            signals = np.zeros((1, len(schema.SIGNALS)), np.float32)
            signals[0, ENTROPY] = request["entropy"][at]
            seen = Observation(
                np.array([0]),
                np.array([at], np.int32),
                np.array([draft[at]], np.int32),
                signals,
                np.array([request["hazard"][at]], np.float32),
                history,
            )
            decision = policy.step(seen)
            action, last = decision.actions[0], at == len(draft) - 1
            if last and action == Action.CONTINUE:
                decision = policy.finish(seen)
                action = decision.actions[0]
            look = at + 1  # tokens there when the guard looks at this one
            while name.startswith("guard") and look % every and look < len(draft):
                look += 1
            ended = look == len(draft)
            if ended and action not in AFTER_END:
                action = Action.CONTINUE
            if action == Action.RELAX:
                alarms.append(look)  # nothing changes
                action = Action.CONTINUE
            if action == Action.CONTINUE:
                if not last:  # feed the token: one decode step
                    bytes_.append(held + entry * (at + 1))
                if decision.modes[0] == Mode.NORMAL and look == at + 1:
                    streamed = max(streamed, look - holdback)
                continue
            if action in (Action.PRUNE, Action.REFRESH):
                return None
            bytes_ += [held + entry * s for s in range(at + 1, look)]
            alarms.append(look)
            if action == Action.STOP:
                final = draft[:look]
                break
            rejected = next((i for i in range(look) if request["audit_gap"][i] > 1e-4), look)
            cut = rejected
            if policy.recovery_cut == "tolerant":
                seen_so_far = (np.array(request[c][:look]) for c in ("llr", "audit_logprob"))
                harm = harmful_token(*seen_so_far, TOLERANCE)
                cut = look if harm is None else harm
            kept, carried = (0, 0) if action == Action.RESTART else (cut, look)
            if kept > rejected:
                return None
            if action == Action.CHECK:
                cuts, final = [kept], None
                if kept == look == len(draft):
                    final = draft
                elif kept < look and kept >= len(baseline["token_id"]) - 1:
                    final = baseline["token_id"]
                elif kept < look or look < len(draft):
                    return None
                return {
                    "token_ids": final,
                    # one that goes on compressed checks again
                    "alarm_steps": alarms if kept == look else None,
                    "rewound_to": cuts if kept == look else None,
                    "unrecoverable": unrecoverable + (kept < streamed),
                }
            if action == Action.COMMIT and kept == look:
                return {"token_ids": draft, "alarm_steps": alarms, "rewound_to": [kept]}
            unrecoverable += kept < streamed
            # A check reads the prompt's entries, and needs no entry of a last token.
            prefilled += carried - ended if carried else prompt
            checks += carried > 0
            # The draft's cache stays while the pass runs; a restart fills the prompt's anew.
            waiting.append(held + entry * (look - 1))
            passes.append(entry * (carried - ended) if carried else full)
            wasted += look - kept
            cuts.append(kept)
            assert draft[:kept] == baseline["token_id"][:kept]
            final = draft[:kept]
            while final != baseline["token_id"]:
                if len(final) > kept:  # the pass itself gave the logits of token ``kept``
                    bytes_.append(full + entry * len(final))
                final = [*final, baseline["token_id"][len(final)]]
            break
        else:
            final = draft
    return {
        "token_ids": final,
        "alarm_steps": alarms,
        "rewound_to": cuts,
        "unrecoverable": unrecoverable,
        "device_byte_steps": 1.25 * (sum(bytes_) + sum(waiting)) + sum(passes),
        "checks": checks,
        "tokens_prefilled": prefilled,
        "decode_steps": len(bytes_),
        "tokens_wasted": wasted,
    }


EXACT = (
    "none",
    "always_safe",
    "random",
    "entropy",
    "ergo",
    "ngram_stop",
    "verify_all",
    "guard_relax_only",
    "guard_recompute",
    "guard_restart",
    "guard_promote",
    "guard_tolerant",
    "guard",
    "verify_on_failure",
    "clock_or_loop",
    "probation",
    "gate",
)


def assert_as_played(run, name, holdback=4, every=1):
    """Every simulated request is the one played by hand; how many are known, how many act."""
    played = sequences(run)
    simulated = simulate(
        run,
        [name],
        random_rate=0.6,
        guard=config.GuardSettings(
            holdback_tokens=holdback, check_every_tokens=every, tolerance=TOLERANCE
        ),
    )
    known, acted = 0, 0
    for row in simulated.filter(pl.col("press") != "none").to_dicts():
        key = tuple(row[k] for k in KEYS)
        baseline = played["m", "none", "0.000", key[3]]
        by_hand = play(name, played[key], baseline, holdback, rate=0.6, every=every)
        if by_hand is None:
            assert row["token_ids"] is None
            assert row["catastrophe"] is None
            assert row["device_byte_steps"] is None
            continue
        known += 1
        acted += bool(by_hand["alarm_steps"])
        for column, expected in by_hand.items():
            if column == "device_byte_steps":
                assert row[column] == pytest.approx(expected, rel=1e-6)
            else:
                assert row[column] == expected, column
        assert row["alarmed"] == (by_hand["alarm_steps"] != [])
    return known, acted


@pytest.mark.parametrize("name", [*EXACT, "loopguard", "periodic_refresh"])
@pytest.mark.parametrize(
    ("seed", "every"),
    [
        pytest.param(0, 1, marks=pytest.mark.matrix),
        (1, 8),  # as the guard does it
        pytest.param(2, 3, marks=pytest.mark.matrix),
    ],
)
def test_simulated_requests_are_those_of_a_guard_played_by_hand(name, seed, every):
    run = make_run(seed, conditions=(("snapkv", "0.500"), ("adakv", "0.750")))
    known, acted = assert_as_played(run, name, every=every)
    assert known > 0
    if name in EXACT and name not in ("none", "always_safe", "guard", "guard_recompute"):
        assert acted > 0


@pytest.mark.parametrize(
    "holdback",
    [pytest.param(n, marks=() if n in (0, 1, 8) else pytest.mark.matrix) for n in range(9)],
)
@pytest.mark.parametrize("name", ["guard_promote", "guard_restart", "verify_all"])
def test_alarms_at_the_last_token(name, holdback):
    run = make_run(21)
    last = pl.col("position").max().over(KEYS)
    hazard = pl.when(pl.col("position") >= last - 1).then(0.9).otherwise(0.1).cast(pl.Float32)
    run = run._replace(predictions=run.predictions.with_columns(hazard=hazard))
    runs = simulate(run, [name])
    lengths = run.traces.select(*KEYS, generated="generated_tokens")
    steps = runs.join(lengths, on=KEYS)
    assert steps["alarm_steps"].list.first().equals(steps["generated"], check_names=False)
    known, acted = assert_as_played(run, name, holdback)
    assert known == acted == runs.height


@pytest.mark.parametrize("name", EXACT)
def test_outcomes_of_simulated_requests_are_those_of_their_tokens(name):
    run = make_run(3)
    simulated = simulate(run, [name], random_rate=0.6).filter(pl.col("token_ids").is_not_null())
    references = dict(run.prompts.select("prompt_id", "reference").iter_rows())
    llr = {
        key: part["llr"].to_list()
        for key, part in run.tokens.sort(*KEYS, "position").group_by(KEYS, maintain_order=True)
    }
    drafts = {key: trace["token_id"] for key, trace in sequences(run).items()}
    for row in simulated.to_dicts():
        key = tuple(row[k] for k in KEYS)
        baseline = ("m", "none", "0.000", key[3])
        is_own = row["token_ids"] == drafts[key][: len(row["token_ids"])]
        source = key if is_own else baseline
        found = detect_all(
            row["token_ids"],
            stop_reason=row["stop_reason"],
            max_new_tokens=MAX_NEW_TOKENS,
            llr=llr[source][: len(row["token_ids"])],
            detection=DETECTION,
        )
        if row["token_ids"] != drafts[baseline]:
            assert row["amnesia"] == found.amnesia
            assert row["catastrophe"] == found.catastrophe
        assert (row["looping"], row["non_termination"]) == (found.looping, found.non_termination)
        assert row["text"] == decode(row["token_ids"])
        written = [t - 900 for t in row["token_ids"] if t >= 900]
        assert row["answer"] == (str(written[-1]) if written else None)
        assert row["right"] == (row["answer"] == references[key[3]])


def test_byte_steps_are_relative_to_the_full_cache_on_the_same_prompts():
    prompts = ["a", "b", "c", "d"]
    whole, guarded = [100, 200, 300, 400], [50, 100, 450, 300]
    harmed = [False, True, True, False]
    rows = []
    for policy, byte_steps, harm in (
        ("always_safe", whole, [False] * 4),
        ("guard", guarded, harmed),
    ):
        for prompt, steps, harm_of in zip(prompts, byte_steps, harm, strict=True):
            row = dict.fromkeys(schema.RUNS)
            row |= {"model": "m", "press": "snapkv", "ratio": "0.500", "prompt_id": prompt}
            row |= {"policy": policy, "source": "live", "status": "ok", "decode_steps": 5}
            row |= {"device_byte_steps": steps, "harmed": harm_of, "silent_harm": False}
            row |= {"catastrophe": False, "right": True, "agrees": True, "alarmed": False}
            rows.append(row)
    runs = pl.DataFrame(rows, schema=schema.RUNS)
    outcomes = pl.DataFrame(
        [
            dict.fromkeys(schema.OUTCOMES)
            | {"model": "m", "press": "none", "ratio": "0.000", "prompt_id": prompt}
            | {"catastrophe": False, "right": True}
            for prompt in prompts
        ],
        schema=schema.OUTCOMES,
    )
    table = {
        row["policy"]: row
        for row in summarize_runs(runs, outcomes, bootstrap_samples=50).to_dicts()
    }
    guard = table["guard"]
    assert guard["relative_byte_steps"] == pytest.approx(900 / 1000)
    assert guard["relative_byte_steps_low"] < 0.9 < guard["relative_byte_steps_high"]
    assert (guard["harmed"], guard["silent_harm"], guard["rescued"]) == (0.5, 0.0, None)
    assert guard["device_byte_steps"] == 225
    assert table["always_safe"]["relative_byte_steps"] == 1
    alone = summarize_runs(runs.filter(policy="guard"), outcomes, bootstrap_samples=50)
    assert alone["relative_byte_steps"][0] is None, "nothing to compare with"


def test_verified_policies_have_the_uncompressed_accuracy_and_no_excess_failure():
    run = make_run(4, num_prompts=20)
    runs = simulate(run, ["none", "verify_all", "guard_restart", "always_safe"])
    table = summarize_runs(runs, run.outcomes, bootstrap_samples=50)
    baseline = run.outcomes.filter(pl.col("press") == "none")
    for row in table.filter(pl.col("policy").is_in(["verify_all", "always_safe"])).to_dicts():
        assert row["known"] == 1
        assert row["accuracy"] == pytest.approx(baseline["right"].mean())
        assert row["excess_cfr"] == 0
        assert row["excess_error"] == 0
    verify = table.filter(pl.col("policy") == "verify_all")
    assert verify["alarmed"].to_list() == [1.0, 1.0]
    failing = run.outcomes.group_by("ratio").agg(pl.col("catastrophe").mean())
    rates = dict(failing.iter_rows())
    for row in verify.to_dicts():
        assert row["prevented_cfr"] == pytest.approx(rates[row["ratio"]] - rates["0.000"])


def test_a_tie_between_audit_and_tokens_makes_only_later_alarms_unknown():
    run = make_run(5)
    key = {"press": "snapkv", "ratio": "0.750"}
    mine = pl.all_horizontal(pl.col(name) == value for name, value in key.items())
    # The audit accepts everything, although the tokens leave the uncompressed answer: a tie.
    tokens = run.tokens.with_columns(
        audit_gap=pl.when(mine).then(pl.lit(0.0, pl.Float32)).otherwise("audit_gap")
    )
    tied = judge(run._replace(tokens=tokens))
    requests = requests_of(tied)
    drafts = {key: trace["token_id"] for key, trace in sequences(run).items()}
    runs = simulate(tied, ["guard_promote"]).filter(mine)
    seen = set()
    for row in runs.to_dicts():
        own = drafts[tuple(row[k] for k in KEYS)]
        base = drafts["m", "none", "0.000", row["prompt_id"]]
        differs = next((i for i, t in enumerate(own) if t != base[i]), None)
        alarm = row["alarm_steps"][0] if row["alarmed"] else None
        unknown = alarm is not None and differs is not None and alarm > differs
        assert (row["token_ids"] is None) == unknown
        seen.add(unknown)
    assert seen == {True, False}
    left = run.traces.filter(mine).select(KEYS)
    assert tied_requests(requests).join(left, on=KEYS, how="anti").height == 0


def test_without_an_audit_the_cut_is_where_the_tokens_differ():
    run = make_run(6)
    silent = run.tokens.with_columns(pl.lit(None, pl.Float32).alias("audit_gap"))
    one = simulate(run, ["guard_promote", "none"])
    other = simulate(run._replace(tokens=silent), ["guard_promote", "none"])
    assert one.equals(other)


def test_order_of_the_tables_does_not_matter():
    run = make_run(7)
    shuffled = Run(*(table.sample(fraction=1, shuffle=True, seed=1) for table in run))
    by = [*KEYS, "policy"]
    names = ["guard_promote", "ngram_stop", "random"]
    assert simulate(run, names).sort(by).equals(simulate(shuffled, names).sort(by))


def test_a_safe_ratio_above_zero_leaves_recoveries_unknown():
    run = make_run(8)
    runs = simulate(
        run,
        ["guard_promote", "guard_restart", "always_safe"],
        guard=config.GuardSettings(safe_ratio="0.250"),
    )
    assert runs.filter(pl.col("alarmed"))["token_ids"].null_count() == runs["alarmed"].sum() > 0
    assert runs.filter(pl.col("policy") == "always_safe")["catastrophe"].is_null().all()


def test_relaxing_after_compression_while_decoding_is_unknown():
    run = make_run(9)
    flat = run.traces.with_columns(
        kv_kept_bytes_mean=pl.when(pl.col("press") != "none")
        .then(pl.lit(777.0))
        .otherwise("kv_kept_bytes_mean")
    )
    runs = simulate(run._replace(traces=flat), ["guard_relax_only", "guard_promote"])
    relaxed = runs.filter((pl.col("policy") == "guard_relax_only") & pl.col("alarmed"))
    assert relaxed.height > 0
    assert relaxed["token_ids"].is_null().all()
    rewound = runs.filter((pl.col("policy") == "guard_promote") & pl.col("alarmed"))
    assert rewound["token_ids"].is_not_null().all()
    assert (
        rewound["device_byte_steps"].is_null().all()
    )  # the draft's share of it is not on the line
    assert rewound["decode_steps"].is_not_null().all()
    where = {"model": "m", "press": "snapkv", "ratio": "0.750"}
    with pytest.raises(ValueError, match=r"with source 'live' for m snapkv 0\.750"):
        match_guard(runs, "constant", **where)
    live = pl.concat([runs, rewound.with_columns(source=pl.lit("live"))])
    with pytest.raises(ValueError, match=r"guard_promote for m snapkv 0\.750 are not known"):
        match_guard(live, "constant", **where)


def test_failed_prompts_stay_rows():
    run = make_run(10)
    bad = run.traces.with_columns(
        failed=(pl.col("prompt_id") == f"{3:016x}") & (pl.col("ratio") == "0.750")
    ).with_columns(
        status=pl.when("failed").then(pl.lit("error")).otherwise("status"),
        error=pl.when("failed").then(pl.lit("ValueError: too short")),
    )
    runs = simulate(run._replace(traces=bad.drop("failed")), ["none", "guard_promote"])
    assert runs.height == 3 * 14 + 2 * 14
    rows = runs.filter(pl.col("status") == "error")
    assert sorted(rows["policy"]) == ["guard_promote", "none"]
    assert rows["error"].to_list() == ["ValueError: too short"] * 2
    table = summarize_runs(runs, run.outcomes, bootstrap_samples=20)
    assert table.filter(pl.col("ratio") == "0.750")["requests"].to_list() == [13, 13]


def test_a_prompt_that_failed_uncompressed_leaves_the_pairs_not_the_table():
    run = make_run(10)
    gone = (pl.col("prompt_id") == f"{3:016x}") & (pl.col("press") == "none")
    traces = run.traces.with_columns(status=pl.when(gone).then(pl.lit("error")).otherwise("status"))
    tokens = run.tokens.filter(~gone)
    broken = judge(run._replace(traces=traces, tokens=tokens))
    runs = simulate(broken, ["none", "verify_all"])
    table = summarize_runs(runs, broken.outcomes, bootstrap_samples=20)
    assert table.filter(pl.col("press") != "none")["requests"].to_list() == [13] * 4
    assert table["excess_cfr"].null_count() == 0
    lost = runs.filter((pl.col("prompt_id") == f"{3:016x}") & (pl.col("policy") == "verify_all"))
    assert lost["alarmed"].to_list() == [True, True]
    assert lost["token_ids"].null_count() == 2
    with pytest.raises(ValueError, match="also ran uncompressed"):
        summarize_runs(runs, broken.outcomes.filter(pl.col("press") != "none"))


def test_only_the_given_prompts_are_simulated():
    run = make_run(11)
    wanted = {f"{2:016x}", f"{5:016x}"}
    requests = requests_of(run, prompt_ids=wanted)
    assert set(requests.table["prompt_id"]) == wanted
    assert tied_requests(requests).height == 0


def test_settings_agree_with_simulating_each_of_them():
    run = make_run(12, num_prompts=24)
    requests = requests_of(run)
    grid = grid_points(config.Controller(tau_low=[0.3, 0.5], tau_high=[0.5, 0.7], k=[1, 2], j=[3]))
    table = simulate_points(requests, grid, bootstrap_samples=50)
    assert table.height == 2 * len(grid.k)
    measures = ("alarmed", "cfr", "accuracy", "agreement", "excess_cfr", "prevented_cfr", *COSTS)
    for index in range(len(grid.k)):
        setting = grid.point(index)
        runs = simulate(run, ["none", "guard_promote"], controller=setting)
        alone = summarize_runs(runs, run.outcomes, bootstrap_samples=50)
        for row in alone.filter(pl.col("policy") == "guard_promote").to_dicts():
            mine = table.filter(
                (pl.col("ratio") == row["ratio"])
                & (pl.col("tau_low") == setting.tau_low)
                & (pl.col("tau_high") == setting.tau_high)
                & (pl.col("k") == setting.k)
            ).row(0, named=True)
            for name in measures:
                for suffix in ("", "_low", "_high"):
                    assert mine[name + suffix] == pytest.approx(row[name + suffix]), name + suffix


def test_detection_columns_by_hand():
    run = make_run(13, num_prompts=30)
    table = simulate_controller(requests_of(run), {"balanced": POINT}, bootstrap_samples=20)
    assert table["operating_point"].to_list() == ["balanced"] * 2
    runs = simulate(run, ["guard_promote"]).join(
        run.outcomes.select(*KEYS, alone="catastrophe", onset="onset"), on=KEYS
    )
    for row in table.to_dicts():
        mine = runs.filter(pl.col("ratio") == row["ratio"]).to_dicts()
        harmless = [r["alarmed"] for r in mine if not r["alone"]]
        harmful = [r for r in mine if r["alone"]]
        leads = [r["onset"] - (r["alarm_steps"][0] - 1) for r in harmful if r["alarmed"]]
        early = [lead for lead in leads if lead >= 0]
        assert row["false_alarm_rate"] == pytest.approx(np.mean(harmless))
        assert row["detection_rate"] == pytest.approx(len(leads) / len(harmful))
        assert row["early_rate"] == pytest.approx(len(early) / len(harmful))
        assert row["lead_tokens"] == (pytest.approx(np.mean(early)) if early else None)


def test_intervals_cover_their_means_and_shrink_with_more_prompts():
    widths = []
    for count in (12, 120):
        run = make_run(14, num_prompts=count, conditions=(("snapkv", "0.500"),))
        row = simulate_controller(requests_of(run), {"x": POINT}).row(0, named=True)
        assert row["agreement_low"] < row["agreement"] < row["agreement_high"]
        widths.append(row["agreement_high"] - row["agreement_low"])
    assert widths[1] < 0.5 * widths[0]


def frontier_rows(points):
    return pl.DataFrame(
        [
            {
                "model": "m",
                "press": press,
                "ratio": ratio,
                "policy": policy,
                "device_byte_steps": kv,
                "cfr": cfr,
                "agreement": 1 - cfr,
                "accuracy": 0.5,
            }
            for press, ratio, policy, kv, cfr in points
        ]
    )


def test_constant_ratio_of_equal_memory_is_interpolated_within_the_measured_range():
    table = constant_frontier(
        frontier_rows(
            [
                ("none", "0.000", "none", 1000.0, 0.1),
                ("snapkv", "0.500", "none", 600.0, 0.3),
                ("snapkv", "0.750", "none", 400.0, 0.7),
                ("snapkv", "0.750", "guard_promote", 700.0, 0.1),
                ("snapkv", "0.750", "guard_restart", 450.0, 0.1),
                ("snapkv", "0.750", "verify_all", 1200.0, 0.1),
                ("knorm", "0.750", "guard_promote", 700.0, 0.1),
            ]
        )
    )
    found = dict(
        zip(table["policy"].to_list()[3:], table["constant_cfr"].to_list()[3:], strict=True)
    )
    # 700 lies a quarter of the way from 600 (0.3) to 1000 (0.1); 450 a quarter from 400 to 600.
    guards = table["constant_cfr"].to_list()
    assert guards[3] == pytest.approx(0.25)
    assert guards[4] == pytest.approx(0.6)
    assert found["verify_all"] is None  # more memory than no compression at all
    assert guards[6] is None  # one measured point of this press at 1000 bytes: 700 is outside
    assert table["constant_agreement"][3] == pytest.approx(0.75)
    assert table["constant_accuracy"][3] == pytest.approx(0.5)
    live = frontier_rows([("snapkv", "0.750", "guard_promote", 700.0, 0.2)])
    assert constant_frontier(live)["constant_cfr"].to_list() == [None]
    assert constant_frontier(live, table)["constant_cfr"][0] == pytest.approx(0.25)


def test_every_policy_has_a_constant_ratio_of_equal_byte_steps_beside_it():
    run = make_run(15, num_prompts=30)
    simulated = summarize_runs(
        simulate(run, ["none", "guard_promote"]), run.outcomes, bootstrap_samples=20
    )
    live = simulated.with_columns(source=pl.lit("live"))
    table = constant_frontier(pl.concat([live, simulated]), measured=simulated)
    assert table.drop(*(f"constant_{name}" for name in MEASURES)).equals(
        pl.concat([live, simulated])
    )
    none = table.filter(pl.col("policy") == "none")
    assert none["constant_harmed"].to_list() == pytest.approx(none["harmed"].to_list())
    columns = ["source", "policy", "alarmed", "constant_harmed"]
    halves = table.select(columns).partition_by("source", include_key=False)
    # The simulation's byte-steps of a guard that acted are an estimate: nothing is set beside them.
    acted = halves[1]["alarmed"] > 0
    assert acted.any()
    assert not acted.all()
    assert halves[1].filter(acted)["constant_harmed"].is_null().all()
    assert halves[0].filter(~acted).equals(halves[1].filter(~acted))
    assert halves[0].filter(acted)["constant_harmed"].is_not_null().any()


MEASURES = ("harmed", "cfr", "agreement", "accuracy")


def test_pareto_marks_what_nothing_else_beats():
    run = make_run(15, num_prompts=30)
    requests = requests_of(run)
    grid = simulate_points(requests, grid_points(config.Controller()), bootstrap_samples=20)
    runs = simulate(run, [name for name in config.POLICY_NAMES if name != "constant"])
    summary = summarize_runs(
        runs, run.outcomes, exclude=tied_requests(requests), bootstrap_samples=20
    )
    table = pareto(grid, summary)
    assert table.height == grid.height + summary.height
    goals = ["excess_cfr", "device_byte_steps", "tokens_prefilled", "decode_steps"]
    for _, part in table.group_by("press", "ratio"):
        rows = part.select(*goals, "efficient").rows()
        for *mine, efficient in rows:
            if None in mine:
                assert efficient is None
                continue
            beaten = any(
                None not in other
                and all(o <= m for o, m in zip(other, mine, strict=True))
                and other != mine
                for *other, _ in rows
            )
            assert efficient == (not beaten)
    assert table.filter(pl.col("efficient"))["policy"].n_unique() > 1


def test_random_alarms_as_often_as_the_guard_in_each_condition():
    run = make_run(16, num_prompts=200)
    requests = requests_of(run)
    runs = simulate(run, ["guard_promote", "random"])
    shares = runs.group_by("ratio", "policy").agg(pl.col("alarmed").mean())
    shares = {(ratio, policy): share for ratio, policy, share in shares.iter_rows()}
    rates = dict(zip(requests.table["ratio"], alarm_rates(requests, POINT), strict=True))
    for ratio in ("0.500", "0.750"):
        guard = shares[ratio, "guard_promote"]
        assert rates[ratio] == pytest.approx(guard)
        assert abs(shares[ratio, "random"] - guard) < 4 * np.sqrt(guard * (1 - guard) / 200)


def test_rivals_are_matched_to_the_guard_of_their_condition():
    run = make_run(16)
    runs = simulate(run, ["none", "guard_promote"])
    where = {"model": "m", "press": "snapkv", "ratio": "0.750"}
    guard = runs.filter((pl.col("policy") == "guard_promote") & (pl.col("ratio") == "0.750"))
    assert match_guard(runs, "verify_all", **where) == {}
    assert match_guard(runs, "random", **where) == {"alarm_rate": guard["alarmed"].mean()}

    # Byte-steps fall by 4000 from ratio 0 to 0.5 and by 2000 more to 0.75.
    bytes_ = {"0.000": 10_000, "0.500": 6_000, "0.750": 4_000}
    flat = runs.with_columns(
        device_byte_steps=pl.when(pl.col("policy") == "none")
        .then(pl.col("ratio").replace_strict(bytes_))
        .otherwise(pl.lit(1))  # what the simulation says of the guard does not count
        .cast(pl.Int64)
    )
    for spent, found in ((7_000, "0.375"), (5_000, "0.625")):
        live = guard.with_columns(device_byte_steps=pl.lit(spent, pl.Int64), source=pl.lit("live"))
        both = pl.concat([flat, live])
        assert match_guard(both, "constant", **where) == {"constant_ratio": found}
    # The curve is that of the prompts that the guard ran, here the first alone.
    first = guard["prompt_id"][0]
    dear = flat.with_columns(
        device_byte_steps=pl.when((pl.col("policy") == "none") & (pl.col("prompt_id") != first))
        .then(pl.lit(10**9))
        .otherwise("device_byte_steps")
    ).cast({"device_byte_steps": pl.Int64})
    one = guard.filter(pl.col("prompt_id") == first).with_columns(
        device_byte_steps=pl.lit(7_000, pl.Int64), source=pl.lit("live")
    )
    both = pl.concat([dear, one])
    assert match_guard(both, "constant", **where) == {"constant_ratio": "0.375"}
    with pytest.raises(ValueError, match=r"source 'simulation' for m knorm 0\.500"):
        match_guard(runs, "random", model="m", press="knorm", ratio="0.500")


def test_oracles_leave_no_harm_and_touch_nobody_else():
    run = make_run(17)
    requests = requests_of(run)
    runs = simulate(run, ["none", "always_safe", *ORACLES])
    alone = runs.filter((pl.col("policy") == "none") & (pl.col("press") != "none")).select(
        *KEYS, own="token_ids", hurt="harmed", spent="decode_steps", memory="device_byte_steps"
    )
    table = runs.filter(pl.col("policy").is_in(ORACLES)).join(alone, on=KEYS)
    assert table.height == 4 * alone.height
    assert alone["hurt"].sum() > 0
    assert not table["harmed"].drop_nulls().any()
    known = table.filter(pl.col("token_ids").is_not_null() & ~pl.col("hurt"))
    same = known.filter(pl.col("policy") != "oracle_ratio")
    assert (same["token_ids"] == same["own"]).all()
    assert same["device_byte_steps"].equals(same["memory"], check_names=False)
    assert table.filter(pl.col("policy") == "oracle_gate")["alarmed"].equals(
        alone["hurt"], check_names=False
    )
    # the highest harmless ratio by hand
    rows = requests.table.select(*KEYS, "harmed").to_dicts()
    chosen = harmless_ratio(requests)
    for row, place in zip(rows, chosen, strict=True):
        fine = [
            (other["ratio"], index)
            for index, other in enumerate(rows)
            if other["press"] == row["press"]
            and other["prompt_id"] == row["prompt_id"]
            and other["ratio"] <= row["ratio"]
            and not other["harmed"]
        ]
        expected = max(fine)[1] if fine else None
        if expected is None:
            assert rows[place]["press"] == "none"
        else:
            assert place == expected


def test_a_lossless_run_is_the_uncompressed_one():
    run = make_run(17)
    runs = simulate(run, ["none", "lossless"])
    baseline = runs.filter(pl.col("press") == "none").select("prompt_id", own="token_ids")
    found = runs.filter(pl.col("policy") == "lossless").join(baseline, on="prompt_id")
    assert (found["token_ids"] == found["own"]).all()
    assert not found["harmed"].any()
    assert (
        found["device_byte_steps"].is_null().all()
    )  # no trace says what the drafts between would be


def test_rivals_learn_from_train_and_calibration_alone():
    rows = []
    for index in range(40):
        harmed = index % 2 == 0
        split = ("train", "calibration", "test")[index % 3]
        # on test prompts everything is the other way round
        late = harmed != (split == "test")
        keys = {"model": "m", "press": "p", "ratio": "0.500", "prompt_id": f"{index:02d}"}
        rows.append(
            keys
            | {"status": "ok", "generated_tokens": 50 if late else 20, "max_new_tokens": 90}
            | {"harmed": harmed, "score": 2.0 if late else 1.0, "split": split}
        )
    table = pl.DataFrame(rows)
    (chosen,) = fit_rivals(table, table, table, table)
    assert (chosen.clock_tokens, chosen.train_harmed) == (50, 7)
    assert 1.0 < chosen.gate_threshold < 2.0 or chosen.gate_threshold == pytest.approx(2.0)
    assert np.float32(2.0) > np.float32(chosen.gate_threshold) > 1.0
    calm = table.with_columns(harmed=pl.lit(False))
    (none,) = fit_rivals(table, table, calm, table)
    assert none.clock_tokens == 90
    assert none.gate_threshold > 1e30


def test_simulability_says_what_is_known_of_every_policy():
    run = make_run(17)
    table = simulability(simulate(run, config.POLICY_NAMES))
    assert table["policy"].to_list() == list(config.POLICIES)
    counts = {row["policy"]: row for row in table.to_dicts()}
    for name in ("none", "always_safe", "random", "entropy", "verify_all", "guard_promote"):
        assert counts[name]["known"] == counts[name]["requests"] == 28
    resume = counts["guard"]
    assert resume["alarmed"] > 0
    quiet = resume["requests"] - resume["alarmed"]
    assert resume["known"] == quiet + resume["known_among_alarmed"] < resume["requests"]
    assert counts["constant"]["requests"] == 0


def test_a_price_that_waits_for_its_certificate_is_not_simulated():
    """No price is known offline then: live runs on other prompts make the certificate."""
    run, waits = make_run(17), LIVE.model_copy(update={"harm_price": "certified"})
    names = ["none", "guard_price", "always_safe"]
    known = simulate(run, names)
    waiting = simulate(run, names, live=waits)
    assert set(known["policy"]) == set(names)
    assert_frame_equal(waiting, known.filter(pl.col("policy") != "guard_price"))
    counts = {row["policy"]: row["requests"] for row in simulability(waiting).to_dicts()}
    assert counts["guard_price"] == 0 < counts["none"]


def test_live_runs_that_differ_from_the_simulation_are_told_apart():
    run = make_run(18)
    simulated = simulate(run, ["guard_promote", "none", "guard"])
    simulated = simulated.filter(pl.col("press") != "none")
    live = simulated.with_columns(source=pl.lit("live")).with_row_index("n")
    same = compare_live_simulation(live.drop("n"), simulated)
    assert set(same["reason"]) == {"same", "outcome unknown offline"}
    assert same.filter(pl.col("reason") == "same").select(COSTS).fill_null(
        0
    ).sum().sum_horizontal()[0] == pytest.approx(0)

    guard, alone = pl.col("policy") == "guard_promote", pl.col("policy") == "none"
    rewound = live.filter(guard & pl.col("alarmed"))["n"].to_list()
    calm = live.filter(alone)["n"].to_list()
    changed = pl.concat_list(pl.col("token_ids").list.head(4), pl.lit(7, pl.Int32))
    is_ = pl.col("n")
    live = live.with_columns(
        token_ids=pl.when(is_.is_in([rewound[0], calm[0]])).then(changed).otherwise("token_ids"),
        alarm_steps=pl.when(is_ == rewound[1])
        .then(pl.concat_list(pl.col("alarm_steps").list.first() + 1))
        .otherwise("alarm_steps"),
        status=pl.when(is_ == calm[1]).then(pl.lit("error")).otherwise("status"),
        policy=pl.when(is_ == calm[2]).then(pl.lit("always_safe")).otherwise("policy"),
    ).with_columns(
        decode_steps=pl.col("decode_steps") + pl.when(is_ == calm[3]).then(2).otherwise(0)
    )
    found = compare_live_simulation(live.drop("n"), simulated)
    reasons = found["reason"].to_list()
    assert reasons[rewound[0]] == "recovery differs"
    assert found["first_difference"][rewound[0]] == 4
    assert reasons[rewound[1]] == "alarm step differs"
    assert reasons[calm[0]] == "draft differs"
    assert reasons[calm[1]] == "one failed"
    assert reasons[calm[2]] == "not simulated"
    assert reasons[calm[3]] == "same"
    assert found["decode_steps"][calm[3]] == 2
    counted = summarize_differences(found)
    assert counted["requests"].sum() == live.height
    assert counted["explanation"].null_count() == 0


def test_runs_have_their_schema_and_the_baseline_appears_once():
    run = make_run(19)
    runs = simulate(run, config.POLICY_NAMES)
    schema.check(runs, schema.RUNS, "simulation")
    assert set(runs.filter(pl.col("press") == "none")["policy"]) == {"none"}
    assert runs.select(*KEYS, "policy").is_duplicated().sum() == 0
    assert runs["source"].unique().to_list() == ["simulation"]
    none = runs.filter(pl.col("policy") == "none").join(run.outcomes, on=KEYS, suffix="_own")
    for name in OUTCOME_COLUMNS:
        if name != "agrees":
            assert none[name].equals(none[f"{name}_own"], check_names=False)


def test_tables_that_do_not_belong_together_are_refused():
    run = make_run(20)
    missing = run.tokens.filter(pl.col("prompt_id") != f"{1:016x}")
    with pytest.raises(ValueError, match=r"no tokens for the trace .*0000000000000001"):
        load_requests(run.traces, missing, run.outcomes, run.predictions)
    with pytest.raises(ValueError, match="no trace with status 'ok'"):
        requests_of(run, prompt_ids=["unheard of"])
    only = run.traces.filter(pl.col("press") == "none")
    with pytest.raises(ValueError, match="only the baseline was given"):
        simulate_points(
            load_requests(only, run.tokens, run.outcomes, run.predictions), stack_points([POINT])
        )


def planted_gate():
    """A gate that goes by one probe."""
    weights = [float(name == "evicted_mass_mean") for name in schema.PROBE_NAMES]
    return Predictor(
        kind="gate",
        target="harm",
        horizon_tokens=16,
        feature_names=schema.PROBE_NAMES,
        feature_version=schema.FEATURE_VERSION,
        model={
            "means": [0.0] * len(weights),
            "scales": [1.0] * len(weights),
            "coefficients": weights,
            "intercept": 0.0,
        },
        provenance={},
    )


class EntropyRisk:
    """A predictor that a test can foresee: the riskier, the higher the entropy."""

    feature_version = schema.FEATURE_VERSION

    def predict(self, features):
        entropy = features[:, schema.FEATURE_NAMES.index("entropy")]
        return (1 / (1 + np.exp(6 - 2 * entropy))).astype(np.float32)


@pytest.mark.matrix
@pytest.mark.parametrize(("phase", "every"), [("prefill", 1), ("prefill", 8), ("both", 5)])
def test_simulation_predicts_the_live_guard_request_by_request(
    tiny_llama, tiny_tokenizer, phase, every
):
    ends = (2, 40, 41, 42, 43)
    model = LoadedModel(
        tiny_llama, tiny_tokenizer, ends, tiny_llama.device, name="tiny", digest="0" * 16
    )
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(
            prompt_id=f"{7919 * index + 1:016x}",
            task="gsm_symbolic",
            kind="gsm_symbolic",
            index=index,
            question="".join(rng.choice(list("abcdefgh "), 30 + 5 * index)),
            reference="1",
            spec='{"answer": "1"}',
        )
        for index in range(8)
    ]
    press = {"name": "s", "class": "StreamingLLMPress", "kwargs": {"n_sink": 4}, "ratios": [0.125]}
    hub = {"source": "hub", "name": "tiny", "repository": "a/b", "revision": "0" * 40}
    experiment = config.parse_config(
        {
            "name": "x",
            "models": [hub],
            "tasks": [{"kind": "gsm_symbolic", "num_prompts": 8}],
            "presses": [press | {"phase": phase, "interval_tokens": 8}],
            "generation": {"max_new_tokens": 40, "batch_size": 3},
            "detection": {"divergence_window_tokens": 8},
            "guard": {"holdback_tokens": 4, "check_every_tokens": every},
            "live": {
                "entropy_nats": 3.0,
                "entropy_tokens": 2,
                "ergo_window_tokens": 6,
                "ergo_delta_nats": 0.3,
                "loop_copies": 2,
                "loop_cover_tokens": 2,
            },
        }
    )
    compressor, point = experiment.presses[0], OperatingPoint(tau_low=0.5, tau_high=0.6, k=1, j=4)
    shards = [
        run_shard(model, prompts, [], press=p, ratio=r, shard=0, experiment=experiment)
        for p, r in ((None, "0.000"), (compressor, "0.125"))
    ]
    traces, tokens = (pl.concat(tables) for tables in zip(*shards, strict=True))
    outcomes = detect_outcomes(prompts_frame(prompts), traces, tokens, experiment.detection)
    features = compute_features(tokens, traces)
    hazard = EntropyRisk().predict(features.select(schema.FEATURE_NAMES).to_numpy())
    predictions = features.select(schema.TOKEN_KEYS).with_columns(
        split=pl.lit("test"), target=pl.lit("any"), hazard=pl.Series(hazard)
    )
    requests = load_requests(traces, tokens, outcomes, predictions)
    assert tied_requests(requests).height == 0
    gate = planted_gate() if every > 1 else None  # else: by the entropy of the first token
    scores = None if gate is None else gate_scores(gate, trace_probes(requests.table))
    compressed = (requests.table["press"] != "none").to_numpy()
    gate_threshold = 0.5 if scores is None else float(np.median(scores[compressed]))
    names = EXACT
    simulated = simulate_policies(
        requests,
        names,
        prompts=prompts_frame(prompts),
        live=experiment.live,
        detection=experiment.detection,
        controller=point,
        random_rate=0.7,
        clock_tokens=12,
        gate_threshold=gate_threshold,
        gate=gate,
        guard=experiment.guard,
        decode=lambda ids: tiny_tokenizer.decode(ids, skip_special_tokens=True),
    )
    live = pl.concat(
        run_policy_shard(
            model,
            prompts,
            [],
            press=compressor,
            ratio="0.125",
            policy=name,
            shard=0,
            experiment=experiment,
            baseline=outcomes,
            predictor=EntropyRisk(),
            controller=point,
            alarm_rate=0.7,
            clock_tokens=12,
            gate_threshold=gate_threshold,
            gate=gate,
        )
        for name in names
    )
    found = compare_live_simulation(live, simulated)
    unknown = {"guard", "guard_recompute", "guard_tolerant"}
    unknown |= {"guard_relax_only"} if phase == "both" else set()
    for policy, part in found.group_by("policy"):
        allowed = {"same", "outcome unknown offline"} if policy[0] in unknown else {"same"}
        assert set(part["reason"]) <= allowed, policy
    same = found.filter(pl.col("reason") == "same").select("prompt_id", "policy")
    assert same["policy"].n_unique() >= len(names) - len(unknown)
    keys = ["prompt_id", "policy"]
    claims = ["text", "alarm_steps", "rewound_to", "unrecoverable", "tokens_prefilled"]
    claims += ["decode_steps", "tokens_wasted", "checks", "catastrophe", *OUTCOME_COLUMNS]
    one, other = (table.sort(keys) for table in (live, simulated.filter(pl.col("press") != "none")))
    assert_frame_equal(one.select(keys), other.select(keys))
    gated = one.filter(pl.col("policy") == "gate")["alarmed"]
    assert gated.any()
    assert gate is None or not gated.all()
    for column in claims:  # whatever the simulation says of a request, the live run did
        wrong = other[column].is_not_null() & one[column].ne_missing(other[column])
        assert not wrong.any(), (column, one.filter(wrong)["policy"].to_list())
    again = {"guard", "guard_recompute"}  # they check more than once, and go on compressed
    exact = other.filter(~pl.col("policy").is_in(unknown | again) & pl.col("text").is_not_null())
    assert exact.select(claims[1:8]).null_count().sum_horizontal().item() == 0
    more = one["alarm_steps"].list.len() > 1
    assert other.filter(more)["alarm_steps"].null_count() == more.sum() > 0
    # Byte-steps: measured where nothing happens, else a low estimate (see kvguard.costs).
    spent = one.select(*keys, real="device_byte_steps").with_columns(
        claimed=other["device_byte_steps"], touched=one["alarmed"]
    )
    alone = spent.filter(pl.col("policy") == "none")
    assert alone["real"].equals(alone["claimed"], check_names=False)
    touched = spent.filter(pl.col("touched") & (pl.col("policy") != "guard_relax_only"))
    share = (touched["claimed"] / touched["real"]).drop_nulls()
    assert share.len() > 0
    assert share.is_between(0.4, 1).all()  # low: 2 layers and a page are much of a tiny cache
