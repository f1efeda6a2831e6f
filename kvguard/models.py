"""Load a prepared model: a folder of safetensors with its tokenizer and its record.

`kvguard.checkpoints` makes such folders. Code that comes with a model is never run, and the
end-of-sequence ids come from the record: a tokenizer converted from GGUF names the wrong token.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_flash_attn_2_available

from kvguard.files import RECORD as RECORD
from kvguard.untrusted import ModelError as ModelError
from kvguard.untrusted import read_description, refusing

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")
"""Values of a model config's ``model_type`` that the engine decodes exactly."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ATTENTIONS = ("sdpa", "eager", "flash_attention_2")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for decoding.

    Attributes:
        model: in evaluation mode, on ``device``, without gradients, greedy unless told otherwise.
        tokenizer: its tokenizer, with a chat template where the model has one.
        end_token_ids: every id that ends an answer, ascending.
        device: where the weights are.
        name: the model's name in the configuration.
        digest: 16 hex digits over the SHA-256 of all weight and tokenizer files.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_token_ids: tuple[int, ...]
    device: torch.device
    name: str
    digest: str


def load_model(folder: str | Path, *, dtype: str, device: str, attention: str) -> LoadedModel:
    """Load what `prepare_model` left in ``folder``.

    The model's shipped generation defaults (sampling, repetition penalty) are replaced by greedy
    decoding with the recorded end token ids.

    Args:
        folder: a folder made by `prepare_model`.
        dtype: "float32", "bfloat16" or "float16".
        device: "auto" or what `torch.device` accepts, see `resolve_device`.
        attention: "sdpa", "eager" or "flash_attention_2".

    Raises:
        ModelError: ``folder`` has no record, or dtype, device, attention or architecture cannot be
            used here.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise ModelError(f"no prepared model in {folder} (no {RECORD}); `prepare_model` makes it")
    if dtype not in _DTYPES:
        raise ModelError(f"dtype: {dtype!r} is not one of {', '.join(_DTYPES)}")
    if attention not in _ATTENTIONS:
        raise ModelError(f"attention: {attention!r} is not one of {', '.join(_ATTENTIONS)}")
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise ModelError(
            "attention: 'flash_attention_2' needs the flash-attn package and a CUDA device; "
            "available here: sdpa, eager"
        )
    target = resolve_device(device)
    record = json.loads((folder / RECORD).read_text())
    model_config = read_model_config(folder)
    check_architecture(model_config)
    if getattr(model_config, "sliding_window", None) is not None:
        model_config.sliding_window = None  # wider than any input: full attention, plain caches
    end_token_ids = tuple(record["end_token_ids"])
    with quiet_progress():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=model_config,
            dtype=_DTYPES[dtype],
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=list(end_token_ids), pad_token_id=end_token_ids[0]
    )
    model.requires_grad_(False).eval().to(target)
    tokenizer = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return LoadedModel(model, tokenizer, end_token_ids, target, record["name"], record["digest"])


@lru_cache(maxsize=1)
def load_once(folder: Path, *, dtype: str, device: str, attention: str) -> LoadedModel:
    """`load_model` for a process that makes several shards: the last one loaded is kept."""
    return load_model(folder, dtype=dtype, device=device, attention=attention)


def recorded_digest(model: PreTrainedModel) -> str | None:
    """`LoadedModel.digest` of a model loaded from a prepared folder; None: from elsewhere.

    What happened to the weights after they were loaded is not seen.
    """
    record = Path(model.name_or_path or "") / RECORD
    if not model.name_or_path or not record.is_file():
        return None
    return str(json.loads(record.read_text())["digest"])


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is cuda, else mps, else cpu.

    Raises:
        ModelError: unknown, or not on this machine; says what is available.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        numbered = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        available = ["cuda", *numbered, *available]
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise ModelError(
            f"device: {name!r} is not available on this machine; available: auto, "
            f"{', '.join(available)}"
        )
    return torch.device(name)


def check_architecture(model_config: PreTrainedConfig) -> None:
    """Refuse a model whose cache the engine would not pack exactly.

    Raises:
        ModelError: the family is not one of `FAMILIES`, a layer attends to a sliding window that is
            narrower than the model's context, or rotary frequencies depend on the longest row of a
            batch.
    """
    family = model_config.model_type
    check_family(family)
    window = getattr(model_config, "sliding_window", None)
    layer_types = getattr(model_config, "layer_types", None)
    context = model_config.max_position_embeddings
    if layer_types is None:
        sliding = window is not None and window < context
    else:
        sliding = "sliding_attention" in layer_types and (window is None or window < context)
    if sliding:
        raise ModelError(
            f"sliding_window: this {family} model's layers see only the last {window} of up to "
            f"{context} positions, so its cache already evicts; use a model with full attention"
        )
    if rope_type(model_config) == "dynamic":
        raise ModelError(
            "rope_type: 'dynamic' frequencies depend on the longest row of a batch, so a row would "
            "depend on its neighbours; use a model with fixed frequencies"
        )


def rope_type(model_config: PreTrainedConfig) -> str:
    """How the model's rotary frequencies are made; "default" where the config does not say."""
    parameters = getattr(model_config, "rope_parameters", None) or {}
    return str(parameters.get("rope_type", "default"))


def position_limit(model_config: PreTrainedConfig) -> int:
    """Positions that a request may use: prompt and new tokens.

    With "longrope" frequencies a batch switches to its long ones when any of its rows passes the
    original context; a row stays independent of its neighbours only up to there.
    """
    limit: int = model_config.max_position_embeddings
    if rope_type(model_config) != "longrope":
        return limit
    parameters = getattr(model_config, "rope_parameters", None) or {}
    original = parameters.get("original_max_position_embeddings") or getattr(
        model_config, "original_max_position_embeddings", limit
    )
    return min(limit, int(original or limit))


def check_family(family: object) -> None:
    if family not in FAMILIES:
        raise ModelError(
            f"model_type: {family!r} is not supported; supported families: {', '.join(FAMILIES)}"
        )


def read_model_config(folder: Path) -> PreTrainedConfig:
    """A folder's config, of a known family: transformers fails obscurely on others."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json")
    check_family(read_description(folder / "config.json").get("model_type"))
    with refusing(folder / "config.json"):
        model_config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return model_config


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Keep the libraries' progress bars on a terminal, and out of logs."""
    shown = transformers_logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator, so that seconds are charged to whom they belong."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
