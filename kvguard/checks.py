"""Passes of the uncompressed model over what rows have drafted; on failure each row alone."""

from typing import NamedTuple

import numpy as np
import torch

from kvguard.audit import Answer, Check, check_answers
from kvguard.check_timing import Prices, Promotion
from kvguard.engine import Session

BUS = 50.0
"""Bytes read from device memory in the time that the bus brings one: HBM over PCIe 5."""

PREFILL_TOKEN = 0.1
"""Cost of a token of a prefill, in drafted tokens; about what SmolLM2 takes on a CPU."""

RECOVERABLE = (AssertionError, IndexError, MemoryError, OSError, RuntimeError, ValueError)
"""Errors of a check, a recovery or a press (out of memory too, on the device, on the host or on the
disk of the cold cache) that end their own row alone."""


class Checks(NamedTuple):
    """What the checks of some rows came to.

    Attributes:
        found: row to its check, or to the error that prevented it.
        notes: row to what went wrong with it and was survived.
    """

    found: dict[int, Check | Exception]
    notes: dict[int, str]


def run_checks(session: Session, tokens: dict[int, list[int]], *, fresh: bool = False) -> Checks:
    """Check rows in one pass; where that fails, each row alone.

    A row whose cold cache cannot be read, for want of device memory or else, is prefilled afresh.
    What the checks cost is charged to their rows.

    Args:
        session: whose rows they are.
        tokens: row to its generated tokens, from the first.
        fresh: prefill prompt and answer, without reading the cold cache.
    """
    if not tokens:
        return Checks({}, {})
    answers = {}
    for row, ids in tokens.items():
        state = session.rows[row]
        request = state.completion.request
        cold = None if fresh else state.cold
        ended = state.ended and len(ids) == session.lengths[row]
        answers[row] = Answer(
            request.prompt_ids, ids, request.seed, cold, ended, request.first_position
        )
    keep = any(session.rows[row].decode is not None for row in answers)
    checks = Checks({}, {})
    try:
        done = _one_pass(session, list(answers.values()), keep)
        checks.found.update(zip(answers, done, strict=True))
    except RECOVERABLE as first:
        free_memory(session.model.device, first)
        for row, answer in answers.items():
            checks.found[row] = _check_alone(session, row, answer, keep, checks.notes)
    transient = {}
    for row, check in checks.found.items():
        if isinstance(check, Exception):
            continue
        completion = session.rows[row].completion
        completion.checks += 1
        completion.tokens_prefilled += check.tokens_prefilled
        completion.bytes_moved += check.bytes_moved
        transient[row] = check.device_bytes
    session.meter.extra_pass(transient)
    return checks


def _check_alone(
    session: Session, row: int, answer: Answer, keep_inputs: bool, notes: dict[int, str]
) -> Check | Exception:
    """One row's check; prefilled afresh where its cold cache cannot be read."""
    attempts = [answer] if answer.cold is None else [answer, answer._replace(cold=None)]
    for attempt in attempts:
        try:
            (check,) = _one_pass(session, [attempt], keep_inputs)
        except RECOVERABLE as error:
            failure: Exception = error
            free_memory(session.model.device, error)
            continue
        if attempt is not answer:
            notes[row] = f"the cold cache could not be read, recomputed: {failure}"
        return check
    return failure


def _one_pass(session: Session, answers: list[Answer], keep_inputs: bool) -> list[Check]:
    return check_answers(
        session.model,
        answers,
        session.decoding,
        prefix=session.prefix,
        keep_inputs=keep_inputs,
    )


def check_prices(session: Session, bus_ratio: float | None = None) -> Prices:
    """What checks of the active rows cost now, in drafted tokens, from the bytes that are read.

    A decoding step reads the weights, shared by its rows, the prefix where compressed rows refer to
    it, and each row's compressed cache; a check reads the weights and each row's cold cache, over
    the bus where the device is not the host. A prefix that the prompts share crosses once for all
    rows of the pass, as the weights are read. A check without a cold cache computes prompt and
    answer, `PREFILL_TOKEN` each. Compressed rows
    alone say what a drafted token reads.

    A row that is promoted moves its cold cache once, its own copy of a shared prefix too. From then
    on it holds, and reads at every token, what the press had evicted. Held bytes are priced by what
    they displace: the memory of a compressed row drafts one token a step, and compression is worth
    having only where memory is what the batch lacks. Where the session holds the prefix once
    (`shared_prefix`), it is there already and does not move; it costs nothing more once a row
    refers to it, and until then an equal part for each row that could.

    Args:
        session: whose rows they are.
        bus_ratio: bytes read from device memory in the time that the bus brings one; None: 1 where
            the host is the device, `BUS` elsewhere.
    """
    active, slots = session.active, session.slots
    weights = sum(parameter.nbytes for parameter in session.model.parameters())
    own = slots.lengths[:, :active].sum(axis=0) * slots.bytes_per_entry
    drafts = np.array([not row.exact for row in session.rows], dtype=bool)
    typical = float((own[drafts] if drafts.any() else own).mean())
    begins = slots.prefix.nbytes if slots.prefix.rows[:active][drafts].any() else 0
    drafted = (weights + begins) / max(1, active) + typical
    bus = bus_ratio
    if bus is None:
        bus = 1.0 if session.model.device.type == "cpu" else BUS
    shared, prices, transfer = 0.0, [], []
    tokens = session.prompt_lengths[:active] + session.lengths[:active]
    for number, row in enumerate(session.rows):
        if row.exact:  # never checked
            prices.append(0.0)
            transfer.append(0.0)
        elif row.cold is None:  # a check computes the full cache, on the device
            prices.append(PREFILL_TOKEN * int(tokens[number]))
            transfer.append(0.0)
        else:
            token = bus * row.cold.store.bytes_per_token / drafted
            prefix = 0 if row.cold.prefix is None else row.cold.prefix.tokens
            shared = max(shared, token * prefix)
            prices.append(token * (row.cold.length - prefix))
            transfer.append(token * (row.cold.length - row.held))
    whole = tokens * slots.layers * slots.bytes_per_entry
    held = np.array([row.held > 0 for row in session.rows], dtype=bool)
    alike = slots.prefix.whole_bytes
    to_share = 0.0 if slots.prefix.nbytes else alike / max(1, int(held.sum()))
    beyond = np.maximum(whole - own - held * (alike - to_share), 0)
    # Reading it, and the rows that would find room in it, each a drafted token a step.
    extra = beyond / drafted + beyond / typical
    promotion = Promotion(np.array(transfer), extra, session.limits[:active])
    return Prices(float(weights / drafted) + shared, np.array(prices), promotion)


def free_memory(device: torch.device, error: BaseException) -> None:
    """After an accelerator ran out of memory: give back what torch keeps for later."""
    if isinstance(error, torch.OutOfMemoryError) and device.type == "cuda":
        torch.cuda.empty_cache()
