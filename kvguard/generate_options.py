"""What a ``model.generate`` call asks for, in the guard's terms; what it cannot do is refused."""

import inspect
import sys
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from kvguard.guard_observer import Stopping
from kvguard.guard_report import GuardError
from kvguard.sampling import Decoding

WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
"""What `sampling.token_scores` does itself when sampling."""

PROCESSORS = (
    RepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SuppressTokensLogitsProcessor,
    NoBadWordsLogitsProcessor,
    SequenceBiasLogitsProcessor,
)
"""Functions of the tokens before and the logits alone: a check repeats what a draft did."""


def call_in_progress() -> dict[str, Any]:
    """The arguments of the ``generate`` call in progress that transformers hands to no callable.

    A ``custom_generate`` callable gets what ``GenerationMixin._sample`` has, less ``streamer`` and
    ``assistant_model``, which are dropped without a word (transformers 5.2). They are read from
    the caller's frame, so that they are used or refused. Empty outside such a call.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return {name: frame.f_locals.get(name) for name in ("streamer", "assistant_model")}
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def decoding_of(
    model: PreTrainedModel, settings: GenerationConfig, processors: Any, prompt_length: int
) -> Decoding:
    """The guard's decoding from a generation config.

    Args:
        model: names its end tokens where the config names none.
        settings: the config, complete.
        processors: what transformers made of it, and what a user added.
        prompt_length: tokens of the longest prompt, padding included.

    Raises:
        GuardError: an option that the guard does not have.
    """
    warpers: dict[type, Any] = {}
    kept: list[Any] = []
    least = settings.min_new_tokens or 0
    for processor in processors or []:
        kind = type(processor)
        if kind in WARPERS:
            if kind in warpers or not settings.do_sample:
                why = "given twice" if kind in warpers else "without do_sample=True"
                raise GuardError(f"logits processor {kind.__name__}: {why}")
            warpers[kind] = processor
        elif kind is MinNewTokensLengthLogitsProcessor:
            least = max(least, int(processor.min_new_tokens))
        elif kind is MinLengthLogitsProcessor:
            least = max(least, int(processor.min_length) - prompt_length)
        elif kind in PROCESSORS and not getattr(processor, "prompt_ignore_length", None):
            kept.append(processor)
        else:
            names = ", ".join(one.__name__ for one in (*WARPERS, *PROCESSORS))
            raise GuardError(
                f"logits processor {kind.__name__} is not supported, a check could not repeat it; "
                f"the guard knows {names} and a minimum length"
            )
    if (settings.num_beams or 1) > 1:
        raise GuardError(f"num_beams: the guard decodes one beam a row, got {settings.num_beams}")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(settings, name, None):
            raise GuardError(
                f"{name}: the guard returns token ids; its signals are in `guard.completions`"
            )
    ends = settings.eos_token_id
    if ends is None:
        ends = model.config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if settings.max_new_tokens is not None:
        count = settings.max_new_tokens
    else:
        count = (settings.max_length or 20) - prompt_length
    temperature, min_p = warpers.get(TemperatureLogitsWarper), warpers.get(MinPLogitsWarper)
    top_k, top_p = warpers.get(TopKLogitsWarper), warpers.get(TopPLogitsWarper)
    return Decoding(
        max_new_tokens=count,
        end_token_ids=tuple(int(end) for end in ends),
        do_sample=bool(settings.do_sample),
        temperature=1.0 if temperature is None else float(temperature.temperature),
        top_k=0 if top_k is None else int(top_k.top_k),
        top_p=1.0 if top_p is None else float(top_p.top_p),
        min_p=0.0 if min_p is None else float(min_p.min_p),
        min_new_tokens=least,
        processors=tuple(kept),
    )


def refuse_inputs(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    settings: GenerationConfig | None,
    arguments: dict[str, Any],
) -> None:
    """Refuse by name what the guard would otherwise ignore.

    Raises:
        GuardError: says what was asked, and what would do.
    """
    if model.training:
        raise GuardError("the model is in train mode, its answers would be random: model.eval()")
    if arguments.get("inputs_embeds") is not None or input_ids.shape[1] == 0:
        raise GuardError("inputs_embeds: the guard needs the prompt's token ids, input_ids")
    cache = arguments.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise GuardError("past_key_values: the guard prefills prompts itself, pass no filled cache")
    if arguments.get("assistant_model") is not None:
        raise GuardError(
            "assistant_model: the compressed cache drafts, the guard takes no other model"
        )
    if settings is None:
        return
    if settings.prompt_lookup_num_tokens is not None:
        raise GuardError("prompt_lookup_num_tokens: the guard has no assisted decoding")
    if settings.use_cache is False or arguments.get("use_cache") is False:
        raise GuardError("use_cache=False: there is no cache to compress and to guard")
    if settings.cache_implementation is not None:
        raise GuardError(
            f"cache_implementation: the guard keeps the caches itself, got "
            f"{settings.cache_implementation!r}"
        )


def stopping_of(criteria: Any, input_ids: torch.Tensor) -> Stopping | None:
    """A user's stopping criteria; the engine itself ends rows at the length and at end tokens."""
    length = (MaxLengthCriteria, EosTokenCriteria)
    own = [one for one in criteria or [] if not isinstance(one, length)]
    if not own:
        return None

    def stop(key: str, tokens: list[int], logits: torch.Tensor) -> bool:
        prompt = input_ids[int(key)]
        ids = torch.cat([prompt, prompt.new_tensor(tokens)])[None]
        return any(bool(torch.as_tensor(one(ids, logits)).all()) for one in own)

    return stop
