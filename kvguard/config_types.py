"""What sections of the configuration are made of: their base class, names, ratios, hashes."""

import re
import reprlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
)

BASELINE = "none"
"""The press name of the uncompressed run, always at ratio "0.000"."""

BASELINE_RATIO = "0.000"


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names each field and what it accepts."""


def ratio_text(value: object) -> str:
    """Return a compression ratio as the three-decimal text used in tables and file names.

    Args:
        value: a number or text in [0, 1): the fraction of cache entries that is removed.

    Raises:
        ValueError: not a number, outside [0, 1), or finer than three decimals.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"a compression ratio is a number in [0, 1), got {value!r}")
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"a compression ratio is a number in [0, 1), got {value!r}") from None
    if not 0 <= number < 1:
        raise ValueError(f"a compression ratio lies in [0, 1), got {value!r}")
    if abs(number - round(number, 3)) > 1e-12:
        raise ValueError(f"a compression ratio has at most three decimals, got {value!r}")
    return f"{number:.3f}"


def shortened(value: object) -> str:
    """A value as errors show it: a few nested anchors of YAML stand for gigabytes of text."""
    short = reprlib.Repr()
    short.maxlevel, short.maxdict, short.maxstring, short.maxother = 4, 20, 300, 300
    short.maxlist = short.maxtuple = 40
    return short.repr(value)


def written_as(pattern: str, meaning: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"{meaning}, got {value!r}")
        return value

    return AfterValidator(check)


def check_files(info: ValidationInfo) -> bool:
    """Whether the files that a configuration names must exist: not where a finished run is read."""
    return bool((info.context or {}).get("check_files", True))


def _existing_file(path: Path, info: ValidationInfo) -> Path:
    if check_files(info) and not path.is_file():
        raise ValueError(f"no file at {path}; give the path of a JSON lines file")
    return path


Name = Annotated[
    str,
    written_as(
        r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}",
        "a name is letters, digits, '_', '.' and '-', starts with a letter or digit, and has at "
        "most 100 characters",
    ),
]
ResultsFolder = Annotated[
    str,
    written_as(
        r"(?!.*(?:^|/)(?:-|\.\.(?:/|$)))(?=.*\w)[\w./-]+",
        "a results folder is letters, digits, '_', '.', '-' and '/', without '..' and without a "
        "part that starts with '-'",
    ),
]
"""Every result is written below it; absolute, or below the folder in which Snakemake runs."""
SchedulerName = Annotated[
    str,
    written_as(
        r"[A-Za-z0-9_][A-Za-z0-9_.,:@+-]{0,99}",
        "a partition or account is at most 100 letters, digits and any of '_.,:@+-'",
    ),
]
"""Reaches the scheduler's command line, which a shell reads."""
Ratio = Annotated[str, BeforeValidator(ratio_text, json_schema_input_type=float | str)]
Sha256 = Annotated[
    str, written_as(r"[0-9a-f]{64}", "a SHA-256 is 64 lower-case hexadecimal digits")
]
Commit = Annotated[
    str, written_as(r"[0-9a-f]{40}", "a full commit hash is 40 lower-case hexadecimal digits")
]
Repository = Annotated[
    str, written_as(r"[A-Za-z0-9][\w.-]*/[\w.-]+", "a hub repository is written owner/name")
]
Device = Annotated[
    str,
    written_as(r"auto|cpu|mps|cuda(:\d+)?", "a device is auto, cpu, mps, cuda or cuda:<number>"),
]
ExistingFile = Annotated[Path, AfterValidator(_existing_file)]
DType = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Probability = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
RunTokens = Annotated[int, Field(ge=1, le=2**15 - 1, description="tokens in a row")]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values cannot change after parsing."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
