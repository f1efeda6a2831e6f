"""Files of models that others made: refused before a library reads, allocates or runs anything.

A model is weights, a description and a tokenizer. Here is checked that the weights are what they
claim (safetensors or GGUF whose sizes fit the file), and that the description asks for nothing
else: no pickled weights under another name, no file outside the folder, no kernels from a hub, no
parameters that the weights do not hold. Nothing of this changes a value that is stored.
"""

import json
import math
import mmap
import shutil
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

MAX_EXPANSION = 50
"""How many times larger than in its archive a file may be: packed weights hardly shrink."""

MAX_LAYERS = 4096
"""Layers that a description may claim."""

MAX_TEMPLATE_CHARACTERS = 100_000
"""Length of a chat template; those of published models have some ten thousand characters."""

_MAX_DIMENSIONS = 4
_MAX_NESTING = 2  # arrays of arrays
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_INTEGERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}

_REFUSED_KEYS = {
    "transformers_weights": "names another file of weights; name it model.safetensors",
    "quantization_config": "asks for weights in a packed format and for kernels to read them; "
    "give the weights in float32, bfloat16 or float16",
}


class ModelError(ValueError):
    """A model that cannot be prepared or loaded; the message names the field and the value."""


class Gguf(NamedTuple):
    """What a GGUF's header says, once it fits the file.

    Attributes:
        version: of the format, 2 or 3.
        tensors: how many there are.
        elements: numbers that they hold together.
    """

    version: int
    tensors: int
    elements: int


@contextmanager
def refusing(name: str | Path) -> Iterator[None]:
    """Turn whatever a library raises over a malformed file into a `ModelError` that names it."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # tokenizers and safetensors raise plain exceptions
        said = str(error).strip().split("\n")[0][:300]
        raise ModelError(f"{name} cannot be read: {type(error).__name__}: {said}") from error


def check_gguf(path: str | Path) -> Gguf:
    """Read the header of a GGUF file and compare every size in it with the file's own.

    Allocates nothing in proportion to what the header claims, and reads each byte once.

    Raises:
        ModelError: no GGUF of version 2 or 3, or a count, a length, a type, a name or a place that
            cannot be right; names the file, what is wrong and where.
    """
    path = Path(path)
    if path.stat().st_size < 24:
        raise ModelError(f"{path.name} is no GGUF file: it has {path.stat().st_size} bytes")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        return _Header(path.name, data).check()


class _Header:
    """A place in a GGUF's header, and steps from there that never leave the file."""

    def __init__(self, name: str, data: mmap.mmap) -> None:
        self.name, self.data, self.size, self.at = name, data, len(data), 0

    def check(self) -> Gguf:
        if self.data[:4] != b"GGUF":
            raise ModelError(f"{self.name} is no GGUF file: it starts with {self.data[:4]!r}")
        self.at = 4
        version = self.number("<I", "version")
        if version not in (2, 3):
            raise self.error(f"version {version}; supported are 2 and 3, little-endian")
        tensors = self.count("tensors", least_bytes=24)
        fields = self.count("metadata fields", least_bytes=13)
        if tensors == 0:
            raise self.error("it holds no tensors")
        alignment = self.fields(fields, tensors)
        sizes = [self.tensor(f"tensor {index}") for index in range(tensors)]
        names = {name for name, *_ in sizes}
        if len(names) != tensors:
            raise self.error("two tensors have the same name")
        start = -(-self.at // alignment) * alignment
        for name, _, length, offset in sizes:
            if offset % alignment or start + offset + length > self.size:
                raise self.error(
                    f"tensor {name!r} of {length:,} bytes at {offset:,} does not lie in the "
                    f"file, which has {self.size:,}"
                )
        if sum(length for _, _, length, _ in sizes) > self.size:
            raise self.error("its tensors share bytes")
        return Gguf(version, tensors, sum(elements for _, elements, _, _ in sizes))

    def error(self, problem: str) -> ModelError:
        return ModelError(f"{self.name} is not a sound GGUF file: {problem}")

    def number(self, code: str, what: str) -> int:
        size = struct.calcsize(code)
        if self.at + size > self.size:
            raise self.error(f"it ends before the {what}")
        value: int = struct.unpack_from(code, self.data, self.at)[0]
        self.at += size
        return value

    def count(self, what: str, least_bytes: int) -> int:
        """A number of things of which each takes some bytes of what is left of the file."""
        claimed = self.number("<Q", f"number of {what}")
        if claimed * least_bytes > self.size - self.at:
            raise self.error(
                f"it claims {claimed:,} {what}, for which {self.size - self.at:,} bytes are left"
            )
        return claimed

    def text(self, what: str) -> str:
        length = self.count(f"bytes of the {what}", least_bytes=1)
        self.at += length
        try:
            return str(self.data[self.at - length : self.at], "utf-8")
        except UnicodeDecodeError:
            raise self.error(f"the {what} is not UTF-8") from None

    def fields(self, count: int, tensors: int) -> int:
        """Pass over the metadata; returns the alignment of the tensors."""
        seen: set[str] = set()
        alignment = 32
        for index in range(count):
            key = self.text(f"name of field {index}")
            if key in seen or key.startswith("GGUF."):
                raise self.error(f"the field {key!r} is there twice, or not a name for one")
            seen.add(key)
            kind = self.number("<I", f"type of {key!r}")
            if key == "general.alignment":
                if kind != _UINT32:
                    raise self.error(f"{key} has type {kind}, not {_UINT32}")
                alignment = self.number("<I", key)
                if alignment == 0 or alignment & (alignment - 1):
                    raise self.error(f"{key} is {alignment}, not a power of two")
            elif key.endswith(".block_count") and kind in _INTEGERS:
                layers = self.number(_INTEGERS[kind], key)
                if not 0 < layers <= min(tensors, MAX_LAYERS):
                    raise self.error(f"{key} is {layers}, and it holds {tensors} tensors")
            elif key.startswith("tokenizer.chat_template") and kind == _STRING:
                length = len(self.text(key))
                if length > MAX_TEMPLATE_CHARACTERS:
                    raise self.error(
                        f"{key} has {length:,} characters, at most {MAX_TEMPLATE_CHARACTERS:,}"
                    )
            else:
                self.value(kind, key)
        return alignment

    def value(self, kind: int, key: str, depth: int = 0) -> None:
        if kind in _SCALAR_BYTES:
            self.at += _SCALAR_BYTES[kind]
            if self.at > self.size:
                raise self.error(f"it ends in {key!r}")
        elif kind == _STRING:
            self.text(f"value of {key!r}")
        elif kind == _ARRAY and depth < _MAX_NESTING:
            inner = self.number("<I", f"type of the items of {key!r}")
            length = self.count(f"items of {key!r}", _SCALAR_BYTES.get(inner, 8))
            if inner in _SCALAR_BYTES:
                self.at += length * _SCALAR_BYTES[inner]
            else:
                for _ in range(length):
                    self.value(inner, key, depth + 1)
        else:
            raise self.error(f"{key!r} has type {kind} at depth {depth}")

    def tensor(self, what: str) -> tuple[str, int, int, int]:
        """Name, elements, bytes and offset of the next tensor."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.text(f"name of {what}")
        dimensions = self.number("<I", f"number of dimensions of {name!r}")
        if not 0 < dimensions <= _MAX_DIMENSIONS:
            raise self.error(f"tensor {name!r} has {dimensions} dimensions")
        shape = [self.number("<Q", f"shape of {name!r}") for _ in range(dimensions)]
        kind = self.number("<I", f"type of {name!r}")
        offset = self.number("<Q", f"place of {name!r}")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise self.error(f"tensor {name!r} has the unknown type {kind}") from None
        if 0 in shape or shape[0] % block:
            raise self.error(f"tensor {name!r} of shape {shape} is no whole number of {block}")
        elements = math.prod(shape)
        return name, elements, elements // block * block_bytes, offset


def read_description(path: str | Path) -> dict[str, Any]:
    """A model's ``config.json``, without anything that names other files or other code.

    Raises:
        ModelError: no JSON object, or it has such a key; names the file, the key and the reason.
    """
    path = Path(path)
    with refusing(path):
        described = json.loads(path.read_text("utf-8"))
    if not isinstance(described, dict):
        raise ModelError(f"{path}: a model is described by a JSON object")
    for key, reason in _REFUSED_KEYS.items():
        if described.get(key) is not None:
            raise ModelError(f"{path}: {key} {reason}")
    layers = described.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise ModelError(f"{path}: num_hidden_layers is {layers}, at most {MAX_LAYERS}")
    return described


def check_weights(folder: str | Path) -> int:
    """Check a folder's safetensors without loading them, and what else lies beside them.

    Returns:
        Numbers that the tensors hold together.

    Raises:
        ModelError: a file that is no safetensors, an index that names a file elsewhere or of
            another kind, an adapter, or a chat template that is too long; names the file.
    """
    from safetensors import safe_open

    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder / 'adapter_config.json'}: an adapter names another model to load; merge it "
            "into its model first"
        )
    present = {path.name for path in folder.glob("*.safetensors")}
    for index in sorted(folder.glob("*.index.json")):
        with refusing(index):
            named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        if not named <= present:
            raise ModelError(
                f"{index}: weights are read from *.safetensors of this folder, not from "
                f"{min(map(str, named - present))!r}"
            )
    for template in sorted(folder.glob("*.jinja")):
        if template.stat().st_size > MAX_TEMPLATE_CHARACTERS:
            raise ModelError(
                f"{template}: a chat template has at most {MAX_TEMPLATE_CHARACTERS:,} bytes"
            )
    elements = 0
    for name in sorted(present):
        with refusing(folder / name), safe_open(folder / name, framework="numpy") as tensors:
            names = tensors.keys()
            elements += sum(math.prod(tensors.get_slice(each).get_shape()) for each in names)
    return elements


def check_described_size(model_config: Any, elements: int, name: str | Path) -> None:
    """Refuse a description of more parameters than the weights hold: making them would allocate it.

    Args:
        model_config: of a family of `models.FAMILIES`.
        elements: numbers in the weights.
        name: of the file or folder, for errors.

    Raises:
        ModelError: names both sizes.
    """
    with refusing(name):
        hidden, heads = int(model_config.hidden_size), int(model_config.num_attention_heads)
        shared = int(model_config.num_key_value_heads or heads)
        width = int(getattr(model_config, "head_dim", None) or hidden // heads)
        sizes = {
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": shared,
            "head_dim": width,
            "intermediate_size": int(model_config.intermediate_size),
            "num_hidden_layers": int(model_config.num_hidden_layers),
            "vocab_size": int(model_config.vocab_size),
        }
    for field, value in sizes.items():
        if value < 1:
            raise ModelError(f"{name}: {field} is {value}")
    layer = 2 * hidden * width * (heads + shared) + 3 * hidden * sizes["intermediate_size"]
    described = sizes["vocab_size"] * hidden + sizes["num_hidden_layers"] * layer
    if described > 1.01 * elements:
        raise ModelError(
            f"{name} describes a model of at least {described:,} parameters, and its weights hold "
            f"{elements:,}"
        )


def extract_member(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    """Write one file of an archive to ``target``, never more than it may hold.

    Nothing of the member's path is used.

    Raises:
        ModelError: it would grow more than `MAX_EXPANSION` times, or there is no room for it.
    """
    info = archive.getinfo(member)
    free = shutil.disk_usage(target.parent).free
    if info.file_size > MAX_EXPANSION * max(info.compress_size, 1):
        raise ModelError(
            f"{member} would grow from {info.compress_size:,} to {info.file_size:,} bytes; at most "
            f"{MAX_EXPANSION} times is accepted"
        )
    if info.file_size > free:
        raise ModelError(f"{member} needs {info.file_size:,} bytes, {free:,} are free")
    with refusing(member), archive.open(info) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)


def check_metadata(metadata: Mapping[str, Any], name: str) -> None:
    """Check the lists and ids of a GGUF's tokenizer against each other.

    Raises:
        ModelError: names the file and the field.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ModelError(f"{name}: tokenizer.ggml.tokens is no list of texts")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ModelError(f"{name}: tokenizer.ggml.token_type is no list of {len(tokens)} types")
    for key, value in metadata.items():
        is_id = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        if is_id and not (isinstance(value, int) and 0 <= value < len(tokens)):
            raise ModelError(f"{name}: {key} is {value!r}, not one of {len(tokens)} tokens")
