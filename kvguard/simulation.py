"""Offline simulation: what a policy would have done to requests that are already on disk.

The policies and the controller are the live guard's own; only the model is missing. What a policy
does up to its first intervention follows from the trace. What comes after is *known* in four cases:

1. The policy never intervenes: the trace itself is the result.
2. The answer is generated afresh at a safe ratio of 0 (``guard_restart``, ``ergo``,
   the full KV cache): the result is the uncompressed trace of the same prompt.
3. The draft is verified by the uncompressed model and cut at the first token that it would not have
   chosen (``guard_promote``, ``gate``, ``random``, ``entropy``, ``verify_all``). Everything
   kept is the uncompressed answer's prefix and the rest is generated uncompressed, so the result is
   again the uncompressed trace, token for token. The trace's audit says where the cut is.
   Recoveries that cut elsewhere (``guard_tolerant``) or nowhere (``guard_recompute``) belong
   here for requests of which they keep nothing but the uncompressed answer's prefix.
4. The tokens do not change (``guard_relax_only`` after compression that happened at prefill alone)
   or are a known prefix of the trace's (``ngram_stop``).

Everything else (a loop pruned from the cache, a refreshed or recompressed cache, a continuation of
tokens that the uncompressed model would not have chosen) is a counterfactual that no trace holds:
its outcome is null, and only live runs can fill it in. So whenever a failure counts as prevented
here, the answer that takes its place is one that the guard provably returns, not one that another
request happened to get. The premise of case 3 is checked for every trace: where its audit and its
tokens disagree about the first difference from the uncompressed answer (a numeric tie), an alarm
behind that point has no outcome here either, and summaries leave such requests out for all policies
alike (`tied_requests`).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard import config, schema
from kvguard.controller import NEVER, Mode, first_alarm, stack_points
from kvguard.costs import (
    COSTS,
    Cost,
    check_cost,
    draft_cost,
    offload_costs,
    recovery_cost,
    trace_memory,
)
from kvguard.detectors import agreement, judge_answers, loop_onsets
from kvguard.harm import judge_harm
from kvguard.harm_model import HarmModel
from kvguard.oracles import ORACLES, Ending, is_proven, oracle_ending
from kvguard.policies import AFTER_END, Action, Observation, Policy, is_alarm, next_decision
from kvguard.policy_factory import make_policy
from kvguard.predictor import Predictor
from kvguard.rival_settings import gate_scores, trace_probes
from kvguard.rivals import Ladder, Offload, SharedPrefix, choose_rung
from kvguard.schema import CATASTROPHES, CONDITION, REPLAY_TOKENS, TRACE_KEYS
from kvguard.stored_requests import NOWHERE, StoredRequests

OUTCOME_COLUMNS = ("answer", "right", "agrees", *CATASTROPHES)
"""What RUNS says of an answer, besides ``catastrophe``."""

_PROMPT_SIZES = ("prompt_tokens", "cache_bytes_before")

IntArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]


class Replay(NamedTuple):
    """A policy's first intervention in each of N requests."""

    position: IntArray  # (N,) 0-based token that it is about; NEVER where there is none
    action: NDArray[np.int8]  # (N,) Action; CONTINUE where there is none
    draft: IntArray  # (N,) tokens there when it is carried out; all of them where there is none
    released: IntArray  # (N,) length at the last decision that found the mode NORMAL


def replay(
    policy: Policy,
    requests: StoredRequests,
    check_every_tokens: int = 1,
    probe: NDArray[np.float32] | None = None,
) -> Replay:
    """Run a policy over traces, token by token, until it first intervenes in each.

    What it does afterwards is not recorded: the trace no longer says what it would see.

    Args:
        policy: built for as many rows as there are requests.
        requests: the traces.
        check_every_tokens: of a policy that needs hazards, see `policies.next_decision`; others
            decide at every token.
        probe: (N,) `Observation.probe` of each request; None: nothing.
    """
    count, steps = requests.token_ids.shape
    every = check_every_tokens if policy.needs_hazard else 1
    position = np.full(count, NEVER, np.int32)
    action = np.full(count, Action.CONTINUE, np.int8)
    draft = requests.lengths.copy()
    released = np.zeros(count, np.int32)
    for row, seed in enumerate(requests.table["seed"].to_list()):
        policy.reset(row, seed)
    for at in range(steps):
        going = np.arange(np.count_nonzero(requests.lengths > at))  # longest first
        decision = policy.step(_observe(requests, policy, going, at, probe))
        length = np.minimum(next_decision(policy, at + 1, every), requests.lengths[going])
        ended = requests.lengths[going] == length  # by the time that the action is carried out
        actions = np.where(ended & ~np.isin(decision.actions, AFTER_END), 0, decision.actions)
        new = (actions != Action.CONTINUE) & (position[going] == NEVER)
        position[going[new]], action[going[new]], draft[going[new]] = at, actions[new], length[new]
        normal = (decision.modes == Mode.NORMAL) & (position[going] == NEVER) & (length == at + 1)
        released[going[normal]] = at + 1
        quiet = going[(requests.lengths[going] == at + 1) & (position[going] == NEVER)]
        actions = policy.finish(_observe(requests, policy, quiet, at, probe)).actions
        new = np.isin(actions, AFTER_END)
        position[quiet[new]], action[quiet[new]] = at, actions[new]
        released[quiet[new]] = np.minimum(released[quiet[new]], at)
    return Replay(position, action, draft, released)


def _observe(
    requests: StoredRequests,
    policy: Policy,
    rows: NDArray[np.intp],
    at: int,
    probe: NDArray[np.float32] | None,
) -> Observation:
    """What a policy sees of some requests at one position; ``rows`` are in order."""
    first = len(rows) == 0 or rows[-1] == len(rows) - 1
    history = requests.token_ids[: len(rows)] if first else requests.token_ids[rows]
    return Observation(
        rows,
        np.full(len(rows), at, np.int32),
        requests.token_ids[rows, at],
        requests.signals[requests.offsets[rows] + at],
        requests.hazard[rows, at] if policy.needs_hazard else None,
        history[:, : at + 1] if policy.needs_history else None,
        None if probe is None else probe[rows],
    )


def alarm_rates(requests: StoredRequests, controller: config.OperatingPoint) -> FloatArray:
    """(N,) share of requests that the controller alarms, in each request's own condition."""
    alarms = first_alarm(requests.hazard, requests.lengths, stack_points([controller]))[0]
    alarmed = requests.table.select(CONDITION).with_columns(alarmed=pl.Series(alarms != NEVER))
    return alarmed.select(pl.col("alarmed").mean().over(CONDITION))["alarmed"].to_numpy()


def simulate_policies(
    requests: StoredRequests,
    policies: Iterable[str],
    *,
    prompts: pl.DataFrame,
    live: config.Live,
    detection: config.Detection,
    controller: config.OperatingPoint | None = None,
    random_rate: float | None = None,
    clock_tokens: IntArray | int | None = None,
    gate_threshold: FloatArray | float | None = None,
    ladder_threshold: FloatArray | float | None = None,
    gate: Predictor | None = None,
    harm_model: HarmModel | None = None,
    guard: config.GuardSettings | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    layers: int | None = None,
) -> pl.DataFrame:
    """What each policy would have done to each request: RUNS, source "simulation".

    The baseline's own requests appear under the policy ``none`` alone. ``constant`` is left out: it
    runs at a ratio of its own; see compare_policies.constant_frontier. ``guard_price`` is too where
    its price waits for a certificate, which live runs make. ``seconds`` is null.
    ``alarm_steps`` and ``rewound_to`` are null where a policy goes on compressed after its first
    check: there may be more of them.

    Args:
        requests: the traces.
        policies: names out of config.POLICIES.
        prompts: PROMPTS, for the reference answers.
        live: parameters of the rivals.
        detection: what counts as a loop in a request that a policy stopped.
        controller: the guard's setting; the ``guard_*`` policies need it.
        random_rate: the rate of ``random``; None takes the controller's own rate in each condition.
        clock_tokens: of ``clock_or_loop``, one for all or one per request.
        gate_threshold: of ``gate``, one for all or one per request.
        ladder_threshold: of ``ladder``, one for all or one per request.
        gate: scores the probes of traces for both; None: ``gate`` goes by the first token's
            entropy, and ``ladder`` starts every request at its own ratio.
        harm_model: of ``guard_price``, which is simulated at the default prices of a check, each
            request alone; None: its default.
        guard: how the guard works; None takes the defaults. Above a safe ratio of "0.000" what
            follows a recovery is unknown.
        decode: token ids to text, for requests that a policy stopped; None: their answer is null.
        layers: of the model; None: the device byte-steps of ``offload`` are null.
    """
    guard = guard or config.GuardSettings()
    rate: float | FloatArray | None = random_rate
    if rate is None and controller is not None:
        rate = alarm_rates(requests, controller)
    failed = requests.failed.select(*TRACE_KEYS, "task", "shard", "status", "error", *_PROMPT_SIZES)
    frames = []
    for name in dict.fromkeys(policies):
        if name == "constant" or (name == "guard_price" and live.harm_price == "certified"):
            continue
        if name in ORACLES:
            ending = oracle_ending(name, requests)
            runs = ending_runs(name, requests, ending, guard.holdback_tokens)
            frames.append(runs.filter(pl.col("press") != config.BASELINE))
            continue
        policy = make_policy(
            name,
            len(requests.lengths),
            max_new_tokens=requests.table["max_new_tokens"].to_numpy(),
            live=live,
            controller=controller,
            check_every_tokens=guard.check_every_tokens,
            alarm_rate=rate,
            clock_tokens=clock_tokens,
            gate_threshold=gate_threshold,
            ladder_threshold=ladder_threshold,
            harm_model=harm_model,
        )
        exact = guard.safe_ratio == config.BASELINE_RATIO or isinstance(
            policy, (Offload, SharedPrefix)
        )
        scores = None
        if name == "guard_price" and harm_model is not None:
            scores = _harm_scores(harm_model, requests)
        if name in ("gate", "ladder") and gate is not None:
            conditions = requests.table.select("press", pl.col("ratio").cast(pl.Float64))
            scores = gate_scores(
                gate, trace_probes(requests.table), *(column.to_numpy() for column in conditions)
            )
        replayed = replay(policy, requests, guard.check_every_tokens, scores)
        ending = _ending(policy, requests, replayed, exact)
        if scores is not None:
            ending = _with_replays(ending, requests)
        if isinstance(policy, Ladder):
            ending = ladder_ending(ending, requests, scores, policy.threshold)
        runs = ending_runs(name, requests, ending, guard.holdback_tokens)
        if isinstance(policy, Ladder):
            runs = runs.with_columns(start_ratio=_start_ratio(requests, ending))
        elif isinstance(policy, Offload):
            runs = runs.with_columns(**_offloaded(runs, layers))
        elif not policy.checks:  # nothing is parked
            runs = runs.with_columns(bytes_moved=pl.lit(0.0), host_byte_steps=pl.lit(0.0))
        if isinstance(policy, SharedPrefix):  # depends on the rows of the batch, step by step
            runs = runs.with_columns(device_byte_steps=pl.lit(None, pl.Float64))
        runs = _judge_stopped(runs, requests, prompts, detection, decode)
        runs = pl.concat([runs, failed.with_columns(policy=pl.lit(name))], how="diagonal")
        frames.append(runs if name == "none" else runs.filter(pl.col("press") != config.BASELINE))
    frame = pl.concat(frames, how="diagonal").with_columns(
        source=pl.lit("simulation"), seconds=pl.lit(None, pl.Float64)
    )
    unknown = [name for name in schema.COSTS if name not in frame.columns]
    frame = frame.with_columns(pl.lit(None).alias(name) for name in unknown)
    return schema.check(schema.conform(frame, schema.RUNS), schema.RUNS, "simulation")


def _harm_scores(model: HarmModel, requests: StoredRequests) -> NDArray[np.float32] | None:
    """(N,) what a harm model's gate says of each request."""
    conditions = requests.table.select("press", pl.col("ratio").cast(pl.Float64))
    score = model.scorer(*(column.to_numpy() for column in conditions))
    return None if score is None else score(trace_probes(requests.table))


def _ending(
    policy: Policy,
    requests: StoredRequests,
    replayed: Replay,
    safe_is_uncompressed: bool,
) -> Ending:
    """Where the final tokens of each request come from: the module's four cases."""
    action, draft = replayed.action, replayed.draft.astype(np.int64)
    rewinds, restarts = action == Action.REWIND, action == Action.RESTART
    checks, commits = action == Action.CHECK, action == Action.COMMIT
    relaxes, stopped = action == Action.RELAX, action == Action.STOP

    verifies = rewinds | checks | commits
    kept = np.where(restarts, 0, draft)
    kept = np.where(verifies, np.minimum(_first_cut(policy, requests, draft), draft), kept)
    promotes = rewinds | restarts | (commits & (kept < draft))
    prefix = is_proven(requests, kept, draft)
    uncompressed = requests.baseline if safe_is_uncompressed else np.full(len(draft), -1)

    own = np.arange(len(draft))
    source = uncompressed if policy.starts_safe else own
    source = np.where(promotes, np.where(prefix | restarts, uncompressed, -1), source)
    source = np.where(relaxes & np.isnan(trace_memory(requests.table).slope), -1, source)
    source = np.where((action == Action.PRUNE) | (action == Action.REFRESH), -1, source)
    if policy.checks_everything:
        same = requests.first_rejected == requests.first_difference
        source = np.where(same, requests.baseline, -1)
    else:
        # After a check the cache is no longer the trace's: known where nothing is left to decode.
        # The check gives the token at the cut as well.
        whole = (draft == requests.lengths) & (kept == draft)
        last = (kept < draft) & (kept >= requests.lengths[requests.baseline] - 1)
        ends = np.where(last & prefix, requests.baseline, np.where(whole, own, -1))
        source = np.where(checks, ends, source)
    return Ending(
        draft,
        is_alarm(action),
        np.zeros_like(replayed.released) if policy.checks_everything else replayed.released,
        source,
        stopped,
        checks | (commits & ~promotes),
        promotes,
        np.where(restarts, 0, draft),
        kept,
        verifies | restarts,
        requests.cold and not policy.fresh_checks,
    )


def _with_replays(ending: Ending, requests: StoredRequests) -> Ending:
    """The same with the pass that each request's own probes took."""
    ran = requests.table["replay_kl_last"].is_not_null().to_numpy()
    size = np.nan_to_num(trace_memory(requests.table).start)
    return ending._replace(replayed_bytes=np.where(ran, size, 0.0), replays=ran.astype(np.int64))


def ladder_ending(
    ending: Ending,
    requests: StoredRequests,
    risk: NDArray[np.float32] | None,
    threshold: FloatArray,
) -> Ending:
    """How requests end that start at the heaviest ratio of their press that is fine.

    Its own ratio at most: the ladder of a condition is the press's ratios from there down. The
    trace at the chosen ratio is the answer; unknown where that prompt failed at a ratio which the
    ladder asks first.

    Args:
        ending: of requests that nothing is done to, with the replays of their own probes.
        requests: the traces.
        risk: (N,) of each request; None: nothing is chosen.
        threshold: (N,).
    """
    if risk is None:
        return ending
    table, size = requests.table, len(requests.lengths)
    own = np.array([float(ratio) for ratio in table["ratio"]])
    places = table.select("model", "press", "ratio", "prompt_id").with_row_index("row")
    groups = ["model", "press"]
    source, replays = np.full(size, -1), np.zeros(size, np.int64)
    replayed, prefills = np.zeros(size), np.zeros(size, np.int64)
    assert ending.replays is not None
    assert ending.replayed_bytes is not None
    for _, part in places.group_by(groups):
        if part["press"][0] == config.BASELINE:
            rows = part["row"].to_numpy()
            source[rows] = rows
            continue
        ratios = part["ratio"].unique().sort(descending=True).to_list()
        wide = part.pivot("ratio", index="prompt_id", values="row").select(
            "prompt_id", *(pl.col(ratio).cast(pl.Int64).fill_null(-1) for ratio in ratios)
        )
        at = part.select("row", "prompt_id").join(
            wide, on="prompt_id", how="left", maintain_order="left"
        )
        rows, rungs = at["row"].to_numpy(), at.select(ratios).to_numpy()  # (n,), (n, ratios)
        asked = np.array([float(ratio) for ratio in ratios]) <= own[rows][:, None]
        there = (rungs >= 0) & asked
        risks = np.where(there, risk[rungs], np.nan)
        chosen = choose_rung(risks, threshold[rows])
        before = asked & (np.arange(len(ratios)) < chosen[:, None])
        tried = asked & (np.arange(len(ratios)) <= chosen[:, None])
        ends = np.column_stack([rungs, requests.baseline[rows]])[np.arange(len(rows)), chosen]
        source[rows] = np.where((before & ~there).any(axis=1), -1, ends)
        counted = np.where(tried & there, rungs, 0)
        replays[rows] = np.where(tried & there, ending.replays[counted], 0).sum(axis=1)
        replayed[rows] = np.where(tried & there, ending.replayed_bytes[counted], 0).sum(axis=1)
        prefills[rows] = before.sum(axis=1) * (not requests.cold)
    relaxed = source != np.arange(size)
    return ending._replace(
        source=source.astype(np.int64),
        alarmed=relaxed,
        draft=np.where(relaxed, 0, ending.draft),
        replayed_bytes=replayed,
        replays=replays,
        prefills=prefills,
    )


def _start_ratio(requests: StoredRequests, ending: Ending) -> pl.Series:
    """The ratio of the trace that each request ends as; null where that is unknown."""
    found = requests.table["ratio"].gather(np.maximum(ending.source, 0))
    known = pl.Series(ending.source >= 0)
    return pl.select(pl.when(known).then(found).alias("start_ratio"))["start_ratio"]


def _offloaded(runs: pl.DataFrame, layers: int | None) -> dict[str, pl.Series]:
    """Costs of uncompressed requests as they are counted for ``offload``."""
    names = ("device_byte_steps", "prompt_tokens", "decode_steps", "cache_bytes_before")
    values = [runs[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in names]
    counted = offload_costs(*values, layers=layers or 1)._asdict()
    if layers is None:
        counted["device_byte_steps"] = np.full(runs.height, np.nan)
    return {name: pl.Series(found).round().fill_nan(None) for name, found in counted.items()}


def _first_cut(
    policy: Policy, requests: StoredRequests, draft: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(N,) where a rewind after ``draft`` tokens cuts; at or behind ``draft``: nowhere."""
    if policy.recovery_cut == "exact":
        return requests.first_rejected.astype(np.int64)
    window = requests.first_harmful_window.astype(np.int64)
    inside = window + requests.tolerance.window_tokens <= draft
    return np.minimum(requests.first_implausible, np.where(inside, window, NOWHERE))


def ending_runs(
    policy: str, requests: StoredRequests, ending: Ending, holdback_tokens: int
) -> pl.DataFrame:
    """RUNS columns of one policy, but for the verdict on requests that it stopped."""
    known = ending.source >= 0
    table = requests.table
    gathered = table[np.maximum(ending.source, 0)].select(
        "stop_reason", "text", "token_ids", "generated_tokens", "catastrophe", *OUTCOME_COLUMNS
    )
    frame = gathered.select(
        pl.when(pl.Series(known)).then(pl.col(name)).alias(name) for name in gathered.columns
    ).with_columns(
        table.select(*TRACE_KEYS, "task", "shard", "status", "error", *_PROMPT_SIZES),
        policy=pl.lit(policy),
        alarmed=pl.Series(ending.alarmed),
        stopped=pl.Series(ending.stopped),
        draft=pl.Series(ending.draft, dtype=pl.Int32),
        kept=pl.Series(ending.kept, dtype=pl.Int32),
        cuts=pl.Series(ending.cuts),
        streamed=pl.Series(np.maximum(ending.released - holdback_tokens, 0)),
        **_costs(requests, ending),
    )
    behind = pl.col("cuts") & (pl.col("kept") < pl.col("streamed"))
    empty = pl.lit([], dtype=pl.List(pl.Int32))
    # After a check that goes on compressed there may be more alarms, which no trace shows.
    whole = pl.Series(~ending.checks | (ending.source == np.arange(len(known))))
    sure = pl.Series(~ending.checks | known)
    frame = frame.with_columns(agrees=agreement(frame, table))
    return frame.with_columns(judge_harm(frame, table)).with_columns(
        alarm_steps=pl.when(whole).then(
            pl.when("alarmed").then(pl.concat_list("draft")).otherwise(empty)
        ),
        rewound_to=pl.when(whole).then(
            pl.when("cuts").then(pl.concat_list("kept")).otherwise(empty)
        ),
        unrecoverable=pl.when(sure).then(behind.cast(pl.Int32)),
    )


def _costs(requests: StoredRequests, ending: Ending) -> dict[str, pl.Series]:
    """Costs of each request, null where its continuation is unknown.

    Of a recovery after which the policy only waits, the tokens that it prefilled and dropped are
    known whatever comes next.
    """
    memory = trace_memory(requests.table)
    prompt_tokens = requests.table["prompt_tokens"].to_numpy()
    # A check that leaves tokens and cache as they are adds its pass to the trace's costs; what
    # comes after another that goes on compressed depends on what it goes on with.
    stays = ending.checks & (ending.source == np.arange(len(requests.lengths)))
    known = (ending.source >= 0) & (~ending.checks | stays)
    final = np.where(known, requests.lengths[ending.source], 0)
    determined = known | ending.recovers
    drafted = np.where(ending.stopped, ending.draft, requests.lengths)
    own = draft_cost(memory, prompt_tokens, drafted)
    # A trace that ran to its end was measured; that holds whatever the press did to its cache.
    whole = drafted == requests.lengths
    own = own._replace(
        device_byte_steps=np.where(whole, memory.measured_steps, own.device_byte_steps)
    )
    # Decoded under another condition from the first token on: that trace's costs.
    own = type(own)(*(field[np.maximum(ending.source, 0)] for field in own))
    recovery = recovery_cost(
        memory,
        prompt_tokens,
        ending.draft,
        ending.carried,
        ending.kept,
        final,
        ended=ending.draft == requests.lengths,
        cold=ending.cold,
    )
    passed = check_cost(
        memory,
        prompt_tokens,
        ending.draft,
        ending.carried,
        ended=ending.draft == requests.lengths,
        cold=ending.cold,
    )
    own = type(own)(*(a + np.where(stays, b, 0) for a, b in zip(own, passed, strict=True)))
    checks = pl.Series(((ending.recovers | stays) & (ending.carried > 0)).astype(np.int64))
    own, recovery = (_add_admission(cost, requests, ending) for cost in (own, recovery))
    costs = {"checks": pl.select(pl.when(pl.Series(determined)).then(checks))[checks.name]}
    for name in COSTS:
        value = np.where(ending.recovers, getattr(recovery, name), getattr(own, name))
        sure = determined if name in ("tokens_prefilled", "tokens_wasted") else known
        column = pl.Series(np.where(sure, value, np.nan)).fill_nan(None)
        costs[name] = column.round() if schema.RUNS[name].is_integer() else column
    return costs


def _add_admission(cost: Cost, requests: StoredRequests, ending: Ending) -> Cost:
    """The same with the passes of an admission beyond its prefill."""
    if ending.replays is None or ending.replayed_bytes is None:
        return cost
    prompts = requests.table["prompt_tokens"].to_numpy().astype(np.int64)
    again = 0 if ending.prefills is None else ending.prefills * prompts
    tokens = ending.replays * np.minimum(REPLAY_TOKENS, prompts - 1) + again
    return cost._replace(
        device_byte_steps=cost.device_byte_steps + ending.replayed_bytes,
        tokens_prefilled=cost.tokens_prefilled + tokens,
    )


def _judge_stopped(
    runs: pl.DataFrame,
    requests: StoredRequests,
    prompts: pl.DataFrame,
    detection: config.Detection,
    decode: Callable[[Sequence[int]], str] | None,
) -> pl.DataFrame:
    """Cut the answers of requests that a policy stopped, and judge what is left of them."""
    if not runs["stopped"].any():
        return runs
    table = requests.table.select("amnesia", "amnesia_onset")
    whole = pl.concat([runs.drop("amnesia"), table], how="horizontal")
    rest, cut = whole.filter(~pl.col("stopped")), whole.filter(pl.col("stopped"))
    cut = cut.with_columns(token_ids=pl.col("token_ids").list.head("draft"))
    ids = cut["token_ids"].explode().to_numpy()
    bounds = np.concatenate([[0], np.cumsum(cut["draft"].to_numpy())])
    loops = loop_onsets(ids, bounds, detection.loop_window_tokens, detection.loop_repeats) >= 0
    texts = [None if decode is None else decode(tokens) for tokens in cut["token_ids"].to_list()]
    window_ends = pl.col("amnesia_onset") + detection.amnesia_window_tokens
    cut = cut.with_columns(
        stop_reason=pl.lit("stopped"),
        text=pl.Series(texts, dtype=pl.String),
        generated_tokens="draft",
        looping=pl.Series(loops),
        non_termination=pl.lit(True),  # it did not end by itself: a stop cures nothing
        # The onset is that of the first window, which counts if it lies within what is left.
        amnesia=pl.col("amnesia") & (window_ends <= pl.col("draft")).fill_null(False),
    )
    read = pl.lit(decode is not None)
    cut = cut.with_columns(*judge_answers(prompts, cut))
    cut = cut.with_columns(
        catastrophe=pl.any_horizontal(pl.col(CATASTROPHES).fill_null(False)),
        agrees=pl.when(read).then(agreement(cut, requests.table)),
    )
    cut = cut.with_columns(judge_harm(cut, requests.table))
    return pl.concat([rest, cut])
