"""Offline simulation: what a policy would have done to requests that are already on disk.

The policies and the controller are the live guard's own; only the model is missing. What a policy
does up to its first intervention follows from the trace. What comes after is *known* in four cases:

1. The policy never intervenes: the trace itself is the result.
2. The answer is generated afresh at a safe ratio of 0 (``guard_restart``, ``ergo``,
   ``always_safe``): the result is the uncompressed trace of the same prompt.
3. The draft is verified by the uncompressed model and cut at the first token that it would not have
   chosen (``guard_rewind``, ``guard_gate``, ``random``, ``entropy``, ``verify_all``). Everything
   kept is the uncompressed answer's prefix and the rest is generated uncompressed, so the result is
   again the uncompressed trace, token for token. The trace's audit says where the cut is.
   Recoveries that cut elsewhere (``guard_rewind_tolerant``) or nowhere (``guard_recompute``) belong
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

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard import config, schema
from kvguard.compare_policies import CONDITION, estimates
from kvguard.controller import NEVER, Mode, Settings, first_alarm, stack_settings
from kvguard.costs import COSTS, draft_cost, recovery_cost, trace_memory
from kvguard.detectors import agreement, loop_onsets
from kvguard.policies import Action, Observation, Policy, is_alarm, look_at, make_policy
from kvguard.prompts import extract_answer
from kvguard.schema import TRACE_KEYS

NOWHERE = np.iinfo(np.int32).max
"""A position that no answer reaches."""

OUTCOME_COLUMNS = ("answer", "correct", "agrees", "looping", "non_termination", "amnesia")
"""What RUNS says of an answer, besides ``catastrophe``."""

IntArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]


class Requests(NamedTuple):
    """Traces as arrays, longest answer first; N requests of at most T tokens.

    ``table`` has the columns of TRACES and OUTCOMES, and ``token_ids`` as lists.
    """

    table: pl.DataFrame
    failed: pl.DataFrame  # TRACES rows whose status is "error"
    token_ids: IntArray  # (N, T) padded with -1
    signals: NDArray[np.float32]  # (tokens, 28) of all requests, end to end
    offsets: NDArray[np.int64]  # (N,) where each request's signals start
    hazard: NDArray[np.float32]  # (N, T) padded with NaN
    lengths: IntArray  # (N,)
    baseline: NDArray[np.int64]  # (N,) row of the same prompt uncompressed; -1 where there is none
    first_rejected: IntArray  # (N,) where an exact REWIND cuts at the earliest; NOWHERE: nothing
    first_implausible: IntArray  # (N,) where a tolerant one finds a token implausible; or NOWHERE
    first_difference: IntArray  # (N,) where the tokens leave the uncompressed answer; or NOWHERE;
    # -1 without one


class Replay(NamedTuple):
    """A policy's first intervention in each of N requests."""

    position: IntArray  # (N,) 0-based token that it is about; NEVER where there is none
    action: NDArray[np.int8]  # (N,) Action; CONTINUE where there is none
    draft: IntArray  # (N,) tokens there when it is carried out; all of them where there is none
    released: IntArray  # (N,) tokens there when a look last found the mode NORMAL


def load_requests(
    traces: pl.DataFrame,
    tokens: pl.DataFrame,
    outcomes: pl.DataFrame,
    predictions: pl.DataFrame | None = None,
    *,
    target: str = "any",
    margin_nats: float = 1e-4,
    implausible_logprob: float = -8.0,
    prompt_ids: Collection[str] | None = None,
) -> Requests:
    """Arrange a run's tables for simulation.

    Args:
        traces: TRACES of all conditions, the baseline's too.
        tokens: TOKENS of those traces.
        outcomes: OUTCOMES of those traces.
        predictions: PREDICTIONS; None: no hazard, for policies that need none.
        target: the target whose hazard drives the guard.
        margin_nats: a token is rejected when the uncompressed model prefers another by more.
        implausible_logprob: nats; a tolerant REWIND cuts at a token below it (guard.Tolerance).
        prompt_ids: keep these prompts alone, e.g. the test split's; None keeps all.

    Raises:
        ValueError: no trace is left, or a trace has no tokens.
    """
    if prompt_ids is not None:
        traces = traces.filter(pl.col("prompt_id").is_in(list(prompt_ids)))
    finished = traces.filter(pl.col("status") == "ok")
    if not finished.height:
        raise ValueError("no trace with status 'ok' among the given prompts")
    columns = (*schema.TOKEN_KEYS, "token_id", *schema.SIGNALS, "audit_gap", "audit_logprob")
    tokens = tokens.select(columns).join(
        finished.select(TRACE_KEYS), on=TRACE_KEYS, how="semi", maintain_order="left"
    )
    tokens, bounds = schema.order_by_trace(tokens)
    table = (
        tokens[bounds[:-1]]
        .select(TRACE_KEYS)
        .join(finished, on=TRACE_KEYS, how="left", maintain_order="left")
        .join(outcomes, on=TRACE_KEYS, how="left", maintain_order="left")
        .with_columns(row=pl.int_range(pl.len()))
    )
    if table.height != finished.height:
        missing = finished.join(table, on=TRACE_KEYS, how="anti").select(TRACE_KEYS).row(0)
        raise ValueError(f"no tokens for the trace {missing}")
    lengths = np.diff(bounds)
    order = np.argsort(-lengths, kind="stable")

    def padded(values: NDArray[Any], fill: Any) -> NDArray[Any]:
        grid = np.full((len(lengths), int(lengths.max())), fill, values.dtype)
        grid[np.arange(grid.shape[1]) < lengths[:, None]] = values
        return grid[order]

    token_ids = padded(tokens["token_id"].to_numpy(), -1)
    gap = padded(tokens["audit_gap"].to_numpy().astype(np.float32), 0)
    audited = tokens["audit_gap"].is_not_null().to_numpy()
    hazard = np.full(tokens.height, np.nan, np.float32)
    if predictions is not None:
        hazard = (
            tokens.select(schema.TOKEN_KEYS)
            .join(
                predictions.filter(pl.col("target") == target),
                on=schema.TOKEN_KEYS,
                how="left",
                maintain_order="left",
            )["hazard"]
            .cast(pl.Float32)
            .to_numpy()
        )
    texts = tokens.group_by(TRACE_KEYS, maintain_order=True).agg(token_ids="token_id")
    table = table.with_columns(texts["token_ids"])[order].with_columns(row=pl.int_range(pl.len()))
    baseline = _baseline_rows(table)
    logprob = padded(tokens["audit_logprob"].to_numpy().astype(np.float32), 0)
    differs = _first_true(token_ids != token_ids[baseline])
    rejected = _first_true(~(gap <= margin_nats))
    rejected = np.where(padded(audited, True).all(axis=1), rejected, differs)
    return Requests(
        table.drop("row"),
        traces.filter(pl.col("status") != "ok"),
        token_ids,
        tokens.select(pl.col(list(schema.SIGNALS)).cast(pl.Float32)).to_numpy(),
        bounds[:-1][order],
        padded(hazard, np.nan),
        lengths[order].astype(np.int32),
        baseline,
        rejected,
        _first_true(logprob < implausible_logprob),
        np.where(baseline >= 0, differs, NEVER).astype(np.int32),
    )


def _baseline_rows(table: pl.DataFrame) -> NDArray[np.int64]:
    """(N,) the row of the same model's and prompt's uncompressed trace; -1 where there is none."""
    own = table.filter(pl.col("press") == config.BASELINE).select(
        "model", "prompt_id", baseline="row"
    )
    found = table.join(own, on=["model", "prompt_id"], how="left", maintain_order="left")
    return found["baseline"].fill_null(-1).to_numpy().astype(np.int64)


def _first_true(found: BoolArray) -> IntArray:
    """(N,) the first column that holds in each row; NOWHERE where none does."""
    return np.where(found.any(axis=1), found.argmax(axis=1), NOWHERE).astype(np.int32)


def tied_requests(requests: Requests) -> pl.DataFrame:
    """Keys of requests whose audit and uncompressed tokens disagree on the first difference.

    Either they tie numerically, or the premise of the rewind does not hold for them; a baseline
    that is missing counts too. Simulated outcomes of alarms in them may be null.
    """
    tied = requests.first_rejected != requests.first_difference
    return requests.table.filter(pl.Series(tied)).select(TRACE_KEYS)


def replay(policy: Policy, requests: Requests, check_every_tokens: int = 1) -> Replay:
    """Run a policy over traces, token by token, until it first intervenes in each.

    What it does afterwards is not recorded: the trace no longer says what it would see.

    Args:
        policy: built for as many rows as there are requests.
        requests: the traces.
        check_every_tokens: of a policy that needs hazards, see policies.look_at; others look at
            every token.
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
        decision = policy.step(_observe(requests, policy, going, at))
        look = np.minimum(look_at(policy, at + 1, every), requests.lengths[going])
        ended = requests.lengths[going] == look  # by the time that the action is carried out
        actions = np.where(ended & ~np.isin(decision.actions, _AFTER_END), 0, decision.actions)
        new = (actions != Action.CONTINUE) & (position[going] == NEVER)
        position[going[new]], action[going[new]], draft[going[new]] = at, actions[new], look[new]
        normal = (decision.modes == Mode.NORMAL) & (position[going] == NEVER) & (look == at + 1)
        released[going[normal]] = at + 1
        quiet = going[(requests.lengths[going] == at + 1) & (position[going] == NEVER)]
        actions = policy.finish(_observe(requests, policy, quiet, at)).actions
        new = np.isin(actions, _AFTER_END)
        position[quiet[new]], action[quiet[new]] = at, actions[new]
        released[quiet[new]] = np.minimum(released[quiet[new]], at)
    return Replay(position, action, draft, released)


_AFTER_END = (Action.REWIND, Action.RECOMPUTE, Action.RESTART)
"""Actions that mean something to a request that has ended."""


def _observe(requests: Requests, policy: Policy, rows: NDArray[np.intp], at: int) -> Observation:
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
    )


def alarm_rates(requests: Requests, controller: config.OperatingPoint) -> FloatArray:
    """(N,) share of requests that the controller alarms, in each request's own condition."""
    alarms = first_alarm(requests.hazard, requests.lengths, stack_settings([controller]))[0]
    alarmed = requests.table.select(CONDITION).with_columns(alarmed=pl.Series(alarms != NEVER))
    return alarmed.select(pl.col("alarmed").mean().over(CONDITION))["alarmed"].to_numpy()


def match_guard(
    simulated: pl.DataFrame, policy: str, *, model: str, press: str, ratio: str
) -> dict[str, Any]:
    """What makes a rival comparable to ``guard_rewind`` in one condition: arguments of a live run.

    ``random`` gets the share of requests that the guard alarms as ``alarm_rate``. ``constant`` gets
    as ``constant_ratio`` the ratio at which the press takes the guard's mean KV memory,
    interpolated linearly between the memory measured at the press's ratios, ratio 0 included.
    Other policies need nothing.

    Args:
        simulated: RUNS with source "simulation", with ``none`` and ``guard_rewind``.
        policy: one of config.POLICY_NAMES.
        model: of the condition.
        press: of the condition.
        ratio: of the condition.

    Raises:
        ValueError: the guard or the memory of this condition is not among the runs.
    """
    if policy not in ("random", "constant"):
        return {}
    ran = simulated.filter((pl.col("status") == "ok") & (pl.col("model") == model))
    guard = ran.filter(
        (pl.col("policy") == "guard_rewind")
        & (pl.col("press") == press)
        & (pl.col("ratio") == ratio)
    )
    if not guard.height:
        raise ValueError(f"no simulated guard_rewind for {model} {press} {ratio}")
    if policy == "random":
        return {"alarm_rate": float(guard["alarmed"].to_numpy().mean())}
    measured = (
        ran.filter((pl.col("policy") == "none") & pl.col("press").is_in([press, config.BASELINE]))
        .group_by("ratio")
        .agg(pl.col("kv_bytes_mean").mean())
        .drop_nulls()
        .sort("kv_bytes_mean")
    )
    wanted = guard.filter(pl.col("decode_steps").ne_missing(0))["kv_bytes_mean"]
    if not wanted.len() or wanted.null_count() or not measured.height:
        raise ValueError(f"the memory of guard_rewind for {model} {press} {ratio} is not known")
    found = np.interp(
        float(wanted.to_numpy().mean()),
        measured["kv_bytes_mean"].to_numpy(),
        measured["ratio"].cast(pl.Float64).to_numpy(),
    )
    return {"constant_ratio": f"{found:.3f}"}


def simulate_policies(
    requests: Requests,
    policies: Iterable[str],
    *,
    prompts: pl.DataFrame,
    live: config.Live,
    detection: config.Detection,
    controller: config.OperatingPoint | None = None,
    random_rate: float | None = None,
    safe_ratio: str = config.BASELINE_RATIO,
    check_every_tokens: int = 1,
    holdback_tokens: int = 16,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> pl.DataFrame:
    """What each policy would have done to each request: RUNS, source "simulation".

    The baseline's own requests appear under the policy ``none`` alone. ``constant`` is left out: it
    runs at a ratio of its own; see compare_policies.constant_frontier. ``seconds`` is null.
    ``alarm_steps`` and ``rewound_to`` hold the first alarm and its cut; after one whose outcome is
    unknown there may be more.

    Args:
        requests: the traces.
        policies: names out of config.POLICY_NAMES.
        prompts: PROMPTS, for the reference answers.
        live: parameters of the rivals.
        detection: what counts as a loop in a request that a policy stopped.
        controller: the guard's setting; the ``guard_*`` policies need it.
        random_rate: the rate of ``random``; None takes the controller's own rate in each condition.
        safe_ratio: of the guard; above "0.000" what follows a recovery is unknown.
        check_every_tokens: of the ``guard_*`` policies, see policies.look_at.
        holdback_tokens: a token is released when it is that old; a rewind behind it counts as
            unrecoverable.
        decode: token ids to text, for requests that a policy stopped; None: their answer is null.
    """
    rate: float | FloatArray | None = random_rate
    if rate is None and controller is not None:
        rate = alarm_rates(requests, controller)
    failed = requests.failed.select(*TRACE_KEYS, "shard", "status", "error")
    frames = []
    for name in dict.fromkeys(policies):
        if name == "constant":
            continue
        policy = make_policy(
            name,
            len(requests.lengths),
            max_new_tokens=int(requests.table["max_new_tokens"].to_numpy().max()),
            live=live,
            controller=controller,
            alarm_rate=rate,
        )
        exact = safe_ratio == config.BASELINE_RATIO
        replayed = replay(policy, requests, check_every_tokens)
        window = detection.divergence_window_tokens
        ending = _ending(policy, requests, replayed, exact, window)
        runs = _runs(policy, requests, ending, holdback_tokens)
        runs = _judge_stopped(runs, requests, prompts, detection, decode)
        runs = pl.concat([runs, failed.with_columns(policy=pl.lit(name))], how="diagonal")
        frames.append(runs if name == "none" else runs.filter(pl.col("press") != config.BASELINE))
    frame = pl.concat(frames, how="diagonal").with_columns(
        source=pl.lit("simulation"), seconds=pl.lit(None, pl.Float64)
    )
    return schema.check(schema.conform(frame, schema.RUNS), schema.RUNS, "simulation")


class Ending(NamedTuple):
    """How N requests end under a policy, all (N,)."""

    draft: NDArray[np.int64]  # tokens generated when the policy intervenes, or all of them
    alarmed: BoolArray
    released: IntArray  # see Replay
    source: NDArray[np.int64]  # row whose tokens are the final ones (STOP: their start); -1 unknown
    stopped: BoolArray
    recovers: BoolArray  # REWIND, RECOMPUTE or RESTART
    carried: NDArray[np.int64]  # tokens that the recovering pass processes
    kept: NDArray[np.int64]  # tokens that stay; -1 unknown
    cuts: BoolArray  # a recovery that asked which tokens stay


def _ending(
    policy: Policy,
    requests: Requests,
    replayed: Replay,
    safe_is_uncompressed: bool,
    harm_window_tokens: int,
) -> Ending:
    """Where the final tokens of each request come from: the module's four cases."""
    action, draft = replayed.action, replayed.draft.astype(np.int64)
    rewinds, restarts = action == Action.REWIND, action == Action.RESTART
    # A request that has ended keeps every token anyway: recomputing its cache means nothing.
    recomputes = (action == Action.RECOMPUTE) & (draft < requests.lengths)
    relaxes, stopped = action == Action.RELAX, action == Action.STOP

    kept = np.where(restarts, 0, draft)
    kept = np.where(
        rewinds, np.minimum(_first_cut(policy, requests, draft, harm_window_tokens), draft), kept
    )
    recovers = rewinds | restarts | recomputes
    # What is kept is the uncompressed answer's prefix, and so is what the audit lets through.
    rejected, differs = requests.first_rejected, requests.first_difference
    prefix = (kept <= rejected) & (kept <= differs)
    prefix &= ~((kept < draft) & (kept == rejected) & (rejected < differs))  # a tie at the cut
    uncompressed = requests.baseline if safe_is_uncompressed else np.full(len(draft), -1)

    source = uncompressed if policy.starts_safe else np.arange(len(draft))
    source = np.where(recovers, np.where(prefix | restarts, uncompressed, -1), source)
    source = np.where(relaxes & np.isnan(trace_memory(requests.table).slope), -1, source)
    source = np.where((action == Action.PRUNE) | (action == Action.REFRESH), -1, source)
    if policy.safe_after == "resume":
        source = np.where(recovers, -1, source)
    return Ending(
        draft,
        is_alarm(action),
        replayed.released,
        source,
        stopped,
        recovers,
        np.where(restarts, 0, draft),
        kept,
        rewinds | restarts,
    )


def _first_cut(
    policy: Policy, requests: Requests, draft: NDArray[np.int64], harm_window_tokens: int
) -> NDArray[np.int64]:
    """(N,) where a rewind after ``draft`` tokens cuts; at or behind ``draft``: nowhere."""
    if policy.recovery_cut == "exact":
        return requests.first_rejected.astype(np.int64)
    table = requests.table
    onset = table["divergence_onset"].fill_null(NOWHERE).to_numpy().astype(np.int64)
    window_inside = onset + harm_window_tokens <= draft
    return np.minimum(requests.first_implausible, np.where(window_inside, onset, NOWHERE))


def _runs(policy: Policy, requests: Requests, ending: Ending, holdback_tokens: int) -> pl.DataFrame:
    """RUNS columns of one policy, but for the verdict on requests that it stopped."""
    known = ending.source >= 0
    table = requests.table
    gathered = table[np.maximum(ending.source, 0)].select(
        "stop_reason", "text", "token_ids", "generated_tokens", "catastrophe", *OUTCOME_COLUMNS
    )
    frame = gathered.select(
        pl.when(pl.Series(known)).then(pl.col(name)).alias(name) for name in gathered.columns
    ).with_columns(
        table.select(*TRACE_KEYS, "shard", "status", "error"),
        policy=pl.lit(policy.name),
        alarmed=pl.Series(ending.alarmed),
        stopped=pl.Series(ending.stopped),
        draft=pl.Series(ending.draft, dtype=pl.Int32),
        kept=pl.Series(ending.kept, dtype=pl.Int32),
        cuts=pl.Series(ending.cuts),
        streamed=pl.Series(np.maximum(ending.released - holdback_tokens, 0)),
        **_costs(policy, requests, ending),
    )
    behind = pl.col("cuts") & (pl.col("kept") < pl.col("streamed"))
    empty = pl.lit([], dtype=pl.List(pl.Int32))
    return frame.with_columns(
        alarm_steps=pl.when("alarmed").then(pl.concat_list("draft")).otherwise(empty),
        rewound_to=pl.when("cuts").then(pl.concat_list("kept")).otherwise(empty),
        unrecoverable=behind.cast(pl.Int32),
        agrees=agreement(frame, table),
    )


def _costs(policy: Policy, requests: Requests, ending: Ending) -> dict[str, pl.Series]:
    """Costs of each request, null where its continuation is unknown.

    Of a recovery after which the policy only waits, the tokens that it prefilled and dropped are
    known whatever comes next.
    """
    memory = trace_memory(requests.table)
    prompt_tokens = requests.table["prompt_tokens"].to_numpy()
    known = ending.source >= 0
    final = np.where(known, requests.lengths[ending.source], 0)
    settled = known | (ending.recovers & (policy.safe_after == "stay"))
    drafted = np.where(ending.stopped, ending.draft, requests.lengths)
    own = draft_cost(memory, prompt_tokens, drafted)
    # A trace that ran to its end was measured; that holds whatever the press did to its cache.
    whole = drafted == requests.lengths
    own = own._replace(kv_bytes_mean=np.where(whole, memory.measured_mean, own.kv_bytes_mean))
    if policy.starts_safe:
        own = type(own)(*(field[ending.source] for field in own))
    recovery = recovery_cost(
        memory, prompt_tokens, ending.draft, ending.carried, ending.kept, final
    )
    costs = {}
    for name in COSTS:
        value = np.where(ending.recovers, getattr(recovery, name), getattr(own, name))
        sure = settled if name in ("prefilled_tokens", "wasted_tokens") else known
        costs[name] = pl.Series(np.where(sure, value, np.nan)).fill_nan(None)
    return costs


def _judge_stopped(
    runs: pl.DataFrame,
    requests: Requests,
    prompts: pl.DataFrame,
    detection: config.Detection,
    decode: Callable[[Sequence[int]], str] | None,
) -> pl.DataFrame:
    """Cut the answers of requests that a policy stopped, and judge what is left of them."""
    if not runs["stopped"].any():
        return runs
    table = requests.table.select("amnesia", "amnesia_onset")
    whole = pl.concat([runs.drop("amnesia"), table], how="horizontal").join(
        prompts.select("prompt_id", "reference_answer"),
        on="prompt_id",
        how="left",
        maintain_order="left",
    )
    rest, cut = whole.filter(~pl.col("stopped")), whole.filter(pl.col("stopped"))
    cut = cut.with_columns(token_ids=pl.col("token_ids").list.head("draft"))
    ids = cut["token_ids"].explode().to_numpy()
    bounds = np.concatenate([[0], np.cumsum(cut["draft"].to_numpy())])
    loops = loop_onsets(ids, bounds, detection.loop_window_tokens, detection.loop_repeats) >= 0
    texts = [None if decode is None else decode(tokens) for tokens in cut["token_ids"].to_list()]
    answers = [None if text is None else extract_answer(text) for text in texts]
    window_ends = pl.col("amnesia_onset") + detection.amnesia_window_tokens
    cut = cut.with_columns(
        stop_reason=pl.lit("stopped"),
        text=pl.Series(texts, dtype=pl.String),
        generated_tokens="draft",
        looping=pl.Series(loops),
        non_termination=pl.lit(False),
        # The onset is that of the first window, which counts if it lies within what is left.
        amnesia=pl.col("amnesia") & (window_ends <= pl.col("draft")).fill_null(False),
        answer=pl.Series(answers, dtype=pl.String),
    )
    read = pl.lit(decode is not None)
    right = pl.col("answer").eq_missing(pl.col("reference_answer")) & pl.col("answer").is_not_null()
    cut = cut.with_columns(
        catastrophe=pl.any_horizontal(
            pl.col("looping", "non_termination", "amnesia").fill_null(False)
        ),
        correct=pl.when(read).then(right),
        agrees=pl.when(read).then(agreement(cut, requests.table)),
    )
    return pl.concat([rest, cut])


DETECTION = ("false_alarm_rate", "detection_rate", "early_rate", "lead_tokens")
"""Of requests that are harmless under compression alone: the share that alarms. Of those that fail:
the shares that alarm at all and by the onset, and the mean of onset minus alarm where by then."""


def simulate_settings(
    requests: Requests,
    settings: Settings,
    *,
    check_every_tokens: int = 1,
    bootstrap_samples: int = 500,
    seed: int = 0,
) -> pl.DataFrame:
    """Benefit and cost of ``guard_rewind`` in each condition under each of many settings.

    Requests whose outcome the simulation does not know (`tied_requests`) are left out and counted
    in ``excluded``.

    Args:
        requests: the traces.
        settings: (G,).
        check_every_tokens: tokens of a request between two looks, see policies.look_at.
        bootstrap_samples: resamples of prompts.
        seed: of the resampling.

    Returns:
        Condition, setting, ``requests``, ``excluded``, the measures of compare_policies, COSTS and
        `DETECTION`, each with ``_low`` and ``_high`` (95 %, prompts resampled); null: undefined.
    """
    usable = requests.first_rejected == requests.first_difference
    table = requests.table.with_columns(
        row=pl.int_range(pl.len()), usable=pl.Series(usable), base=pl.Series(requests.baseline)
    )
    names = pl.DataFrame({name: getattr(settings, name) for name in Settings._fields}).cast(
        {"k": pl.Int32, "j": pl.Int32}
    )
    frames = []
    compressed = table.filter(pl.col("press") != config.BASELINE)
    for key, part in compressed.group_by(CONDITION, maintain_order=True):
        rows = part.filter("usable")["row"].to_numpy()
        values = _setting_values(requests, settings, rows, check_every_tokens)
        prompts = requests.table["prompt_id"].gather(rows)
        frames.append(
            names.with_columns(
                *(pl.lit(value).alias(name) for name, value in zip(CONDITION, key, strict=True)),
                requests=pl.lit(len(rows)),
                excluded=pl.lit(part.height - len(rows)),
                **estimates(values, prompts, bootstrap_samples, seed),
            )
        )
    if not frames:
        raise ValueError("no compressed request to simulate: only the baseline was given")
    order = [*CONDITION, *Settings._fields]
    frame = pl.concat(frames)
    return frame.select(*order, pl.exclude(order))


def _setting_values(
    requests: Requests, settings: Settings, rows: NDArray[np.integer[Any]], check_every_tokens: int
) -> dict[str, FloatArray]:
    """(G, n) measures of ``guard_rewind`` for some rows, NaN where undefined."""
    lengths, base = requests.lengths[rows], requests.baseline[rows]
    alarm = first_alarm(requests.hazard[rows], lengths, settings)  # (G, n)
    alarmed = alarm != NEVER
    look = look_at(Policy("guard_rewind", 0), alarm + 1, check_every_tokens)
    draft = np.where(alarmed, np.minimum(look, lengths), lengths)
    kept = np.minimum(requests.first_rejected[rows], draft)
    memory = trace_memory(requests.table).rows(rows)
    prompts = requests.table["prompt_tokens"].to_numpy()[rows]
    recovery = recovery_cost(memory, prompts, draft, draft, kept, requests.lengths[base])
    own = draft_cost(memory, prompts, lengths)._replace(kv_bytes_mean=memory.measured_mean)
    costs = {name: np.where(alarmed, getattr(recovery, name), getattr(own, name)) for name in COSTS}

    def measure(column: str) -> tuple[FloatArray, FloatArray]:
        """(G, n) under the guard, and (n,) uncompressed."""
        values = requests.table[column].cast(pl.Float64).to_numpy()
        return np.where(alarmed, values[base], values[rows]), values[base]

    failed, base_failed = measure("catastrophe")
    right, base_right = measure("correct")
    # An alarmed request ends as the uncompressed one; whether that counts as agreement is asked of
    # the same function as everywhere: silence that comes from breaking down does not.
    returned = requests.table[base].with_columns(requests.table[rows].select("press"))
    agrees = np.where(
        alarmed,
        agreement(returned, requests.table).cast(pl.Float64).to_numpy(),
        requests.table["agrees"].cast(pl.Float64).to_numpy()[rows],
    )
    fails = requests.table["catastrophe"].cast(pl.Float64).to_numpy()[rows]
    onset = requests.table["onset"].cast(pl.Float64).to_numpy()[rows]
    lead = np.where(alarmed & (fails == 1), onset - (draft - 1), np.nan)
    by_onset = np.where(alarmed, onset - (draft - 1) >= 0, False)
    return {
        "alarmed": alarmed.astype(np.float64),
        "cfr": failed,
        "accuracy": right,
        "agreement": agrees,
        "excess_cfr": failed - base_failed,
        "prevented_cfr": fails - failed,
        "excess_error": base_right - right,
        **costs,
        "false_alarm_rate": np.where(fails == 0, alarmed, np.nan),
        "detection_rate": np.where(fails == 1, alarmed, np.nan),
        "early_rate": np.where(fails == 1, by_onset, np.nan),
        "lead_tokens": np.where(lead >= 0, lead, np.nan),
    }


def simulate_controller(
    requests: Requests,
    operating_points: Mapping[str, config.OperatingPoint],
    *,
    check_every_tokens: int = 1,
    bootstrap_samples: int = 500,
    seed: int = 0,
) -> pl.DataFrame:
    """`simulate_settings` for named operating points; the name is the first column."""
    names = list(operating_points)
    frame = simulate_settings(
        requests,
        stack_settings(operating_points.values()),
        check_every_tokens=check_every_tokens,
        bootstrap_samples=bootstrap_samples,
        seed=seed,
    )
    repeats = frame.height // len(names)
    return frame.select(pl.Series("operating_point", names * repeats), pl.all())


SIMULABILITY = {
    "none": "exact: the trace itself",
    "always_safe": "exact: the uncompressed trace of the same prompt",
    "random": "exact: verified by the uncompressed model, so the answer is its own",
    "entropy": "exact: verified by the uncompressed model, so the answer is its own",
    "ergo": "exact: the answer is generated afresh without compression",
    "ngram_stop": "exact: the answer is a prefix of the trace",
    "loopguard": "alarm step alone: no trace goes on from a pruned cache",
    "periodic_refresh": "known where the answer ends before the first refresh",
    "verify_all": "exact: verified by the uncompressed model, so the answer is its own",
    "constant": "not simulated: interpolated between the measured ratios of the press",
    "guard_relax_only": "exact where compression happens at prefill alone: nothing changes",
    "guard_recompute": "exact where what it keeps had not left the uncompressed answer",
    "guard_restart": "exact: the answer is generated afresh without compression",
    "guard_rewind": "exact: verified by the uncompressed model, so the answer is its own",
    "guard_rewind_tolerant": "exact where what it keeps had not left the uncompressed answer",
    "guard_rewind_resume": "known without an alarm: no trace goes on from a recompressed cache",
    "guard_gate": "exact: verified by the uncompressed model, so the answer is its own",
}
"""What the simulation knows of each policy, for safe ratio 0 and requests that do not tie."""


def simulability(runs: pl.DataFrame) -> pl.DataFrame:
    """What the simulation knows of each policy, in words and in counts.

    Args:
        runs: RUNS with source "simulation".

    Returns:
        ``policy``, ``simulability``, ``requests`` (that ran), ``alarmed``, ``known`` (whose outcome
        is) and ``known_among_alarmed``; ``constant`` has no requests.
    """
    ran = runs.filter((pl.col("status") == "ok") & (pl.col("press") != config.BASELINE))
    known = pl.col("token_ids").is_not_null()
    counts = ran.group_by("policy", maintain_order=True).agg(
        requests=pl.len(),
        alarmed=pl.col("alarmed").sum(),
        known=known.sum(),
        known_among_alarmed=(known & pl.col("alarmed")).sum(),
    )
    words = pl.DataFrame({"policy": list(SIMULABILITY), "simulability": SIMULABILITY.values()})
    return words.join(counts, on="policy", how="left", maintain_order="left").with_columns(
        pl.col("requests", "alarmed", "known", "known_among_alarmed").fill_null(0)
    )
