"""Where harm begins: the last prefix of an answer that the uncompressed model still gets right.

Where the task's verifier points at a wrong item in the text, harm begins at that item's first
token. Where an item is missing, and for other tasks, the uncompressed model continues prefixes of
the answer: the onset is a token that turns a prefix whose continuation is right into one whose
continuation is wrong, found by bisection. The search starts at the first token that the
uncompressed model rejects: up to there its continuation is its own answer. Only harmed requests are
searched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl

from kvguard import config, schema
from kvguard.engine import Session, generate
from kvguard.experiment import Prepared, prepare_requests
from kvguard.joblog import progress
from kvguard.models import LoadedModel
from kvguard.prompts import Example, Prompt
from kvguard.requests import Request
from kvguard.tasks import Verdict, verify

Decode = Callable[[Sequence[int]], str]


@dataclass
class _Search:
    """One harmed request: the continuation of ``right`` tokens is right, that of ``wrong`` not."""

    prompt: Prompt
    token_ids: list[int]
    wanted: Verdict  # of the uncompressed answer
    right: int
    wrong: int

    @property
    def found(self) -> bool:
        return self.wrong - self.right <= 1

    @property
    def middle(self) -> int:
        return (self.right + self.wrong) // 2

    def narrow(self, middle: int, text: str) -> None:
        """Take the verdict on the text that continues the first ``middle`` tokens."""
        if _is_right(verify(self.prompt.kind, self.prompt.spec, text), self.wanted):
            self.right = middle
        else:
            self.wrong = middle


def find_harm_onsets(
    prompts: Sequence[Prompt],
    examples: Sequence[Example],
    traces: pl.DataFrame,
    tokens: pl.DataFrame,
    baseline: pl.DataFrame,
    *,
    load: Callable[[], LoadedModel],
    decode: Decode,
    experiment: config.Config,
) -> pl.DataFrame:
    """Find the onset of harm of every harmed request of a shard.

    Args:
        prompts: this shard's prompts.
        examples: few-shot examples.
        traces: `schema.TRACES` of the shard under one press and ratio.
        tokens: ``prompt_id``, ``position``, ``token_id`` and ``audit_gap`` of `schema.TOKENS`.
        baseline: `schema.TRACES` of the same prompts uncompressed.
        load: gives the model; called only where a request must be continued.
        decode: token ids -> text without special tokens.
        experiment: the whole configuration.

    Returns:
        `schema.HARM_ONSETS`, one row per trace; null where there is no harm, or where a
        continuation failed.
    """
    before = dict(baseline.filter(status="ok").select("prompt_id", "text").iter_rows())
    rows = tokens.sort("prompt_id", "position").group_by("prompt_id", maintain_order=True)
    generated = {key[0]: part for key, part in rows}
    margin = experiment.detection.rejection_margin_nats
    onsets: dict[str, int] = {}
    searches: list[_Search] = []
    texts = dict(traces.filter(status="ok").select("prompt_id", "text").iter_rows())
    for prompt in prompts:
        text, twin = texts.get(prompt.prompt_id), before.get(prompt.prompt_id)
        if text is None or twin is None:
            continue
        found, wanted = (verify(prompt.kind, prompt.spec, each) for each in (text, twin))
        if wanted.right is False or _is_right(found, wanted):
            continue
        part = generated[prompt.prompt_id]
        token_ids = part["token_id"].to_list()
        character = found.first_wrong_character
        if character is not None and character < len(text):
            onsets[prompt.prompt_id] = _token_at(token_ids, character, decode)
            continue
        rejected = part.filter(~(pl.col("audit_gap") <= margin))["position"]
        first = int(rejected[0]) if len(rejected) else 0
        searches.append(_Search(prompt, token_ids, wanted, first, len(token_ids)))
    if any(not search.found for search in searches):
        searches = _bisect(searches, load(), prompts, examples, experiment, decode)
    onsets |= {search.prompt.prompt_id: search.right for search in searches}
    found_at = [onsets.get(prompt_id) for prompt_id in traces["prompt_id"]]
    return traces.select(*schema.TRACE_KEYS, pl.Series("harm_onset", found_at, dtype=pl.Int32))


def _is_right(verdict: Verdict, wanted: Verdict) -> bool:
    """Right; where the task has no right answer: the uncompressed run's answer."""
    return verdict.answer == wanted.answer if verdict.right is None else verdict.right


def _token_at(token_ids: Sequence[int], character: int, decode: Decode) -> int:
    """Position of the token that writes a character of the text; the last one past its end."""
    low, high = 0, len(token_ids) - 1
    while low < high:
        middle = (low + high) // 2
        if len(decode(token_ids[: middle + 1])) > character:
            high = middle
        else:
            low = middle + 1
    return low


def _bisect(
    searches: list[_Search],
    model: LoadedModel,
    prompts: Sequence[Prompt],
    examples: Sequence[Example],
    experiment: config.Config,
    decode: Decode,
) -> list[_Search]:
    """Narrow all searches together, one batch of continuations a round; failed ones are dropped."""
    ready = prepare_requests(model, prompts, examples, experiment)
    requests = {request.key: request for request in ready.requests}
    session = Session(model.model, ready.decoding, press=None, rows=ready.rows, prefix=ready.prefix)
    open_ = {search.prompt.prompt_id: search for search in searches if not search.found}
    failed: set[str] = set()
    rounds = max(search.wrong - search.right for search in open_.values()).bit_length()
    with progress(rounds, "onsets of harm") as advance:
        while open_:
            middles = {key: search.middle for key, search in open_.items()}
            for completion in generate(session, _prefixes(open_, requests, ready)):
                key = completion.request.key
                if completion.error is not None:
                    failed.add(key)
                    continue
                search, middle = open_[key], middles[key]
                search.narrow(middle, decode(search.token_ids[:middle] + completion.token_ids))
            open_ = {
                key: search
                for key, search in open_.items()
                if not search.found and key not in failed
            }
            advance(1, f"{len(open_)} requests")
    return [search for search in searches if search.prompt.prompt_id not in failed]


def _prefixes(
    searches: dict[str, _Search], requests: dict[str, Request], ready: Prepared
) -> list[Request]:
    """Each search's middle prefix as a request whose noise goes on where the prefix ends."""
    return [
        Request(
            key,
            [*requests[key].prompt_ids, *search.token_ids[: search.middle]],
            requests[key].seed,
            ready.decoding.max_new_tokens - search.middle,
            first_position=search.middle,
        )
        for key, search in searches.items()
    ]
