"""Models and tokenizers for tests: tiny random ones for speed, the embedded one for truth.

``KVGUARD_TEST_CACHE`` moves the folder in which the embedded model is prepared once; the default is
``.cache`` in the checkout.

What is slow to import is imported where it is used: the process that hands tests out to the others
reads this file too, and needs none of it.
"""

import inspect
import os
import shutil
import string
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from hypothesis import settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from kvguard.models import LoadedModel

settings.register_profile("kvguard", deadline=None, print_blob=True)
settings.load_profile("kvguard")

QUICK = "KVGUARD_TEST_QUICK" in os.environ
"""Set by `make test-quick`: property tests try a few cases."""

CHECKOUT = Path(__file__).parent.parent

TINY_VOCABULARY = 160
"""Entries of the tiny models' vocabulary; `tiny_tokenizer` uses the first 100."""

TINY_END_ID = 2


def examples(count: int) -> settings:
    """So many cases of a property test; in `make test-quick` an eighth of them, at least 4."""
    return settings(max_examples=max(4, count // 8) if QUICK else count)


@cache
def make_tiny_model(family: str, attention: str = "sdpa", seed: int = 0) -> "PreTrainedModel":
    """A random model of that family: 3 layers, 4 heads on 2 key-value heads, float32, on the CPU.

    Families are llama, mistral, qwen2, qwen3 and phi3. The weights are wide enough that the next
    token depends visibly on the whole context: greedy answers differ between prompts, and the gap
    between the two best tokens is far above rounding.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        vocab_size=TINY_VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        sliding_window=None,
        initializer_range=0.25,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=TINY_END_ID,
        pad_token_id=0,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.requires_grad_(False).eval()
    return model


def make_tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """One token a character, with a chat template; ids 0..3 are special, 100 in all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    characters = [*string.printable[:95], "\n"]
    vocabulary = {token: index for index, token in enumerate([*special, *characters])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        chat_template=(
            "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n"
            "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
        ),
    )


@pytest.fixture(scope="session")
def tiny_model() -> "Callable[..., PreTrainedModel]":
    """``tiny_model(family, attention="sdpa", seed=0)``: see `make_tiny_model`; one copy of each."""
    return make_tiny_model


@pytest.fixture(scope="session")
def tiny_llama() -> "PreTrainedModel":
    """The tiny Llama; shared by all tests, so leave no hook and no changed weight behind."""
    return make_tiny_model("llama")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """A character tokenizer whose ids all fit the tiny models' vocabulary."""
    return make_tiny_tokenizer()


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """Folder of the embedded model, prepared on first use from ``config.yaml``."""
    import kvguard.checkpoints
    from kvguard.checkpoints import prepare_model
    from kvguard.config import digest, load_config
    from kvguard.models import RECORD

    spec = load_config(CHECKOUT / "config.yaml").models[0]
    cache_folder = Path(os.environ.get("KVGUARD_TEST_CACHE") or CHECKOUT / ".cache")
    cache_folder.mkdir(parents=True, exist_ok=True)
    converters = (kvguard.checkpoints._convert_gguf, kvguard.checkpoints._gguf_tokenizer)
    made_by = [spec.model_dump(mode="json"), *(inspect.getsource(each) for each in converters)]
    folder = cache_folder / f"{spec.name}-{digest(made_by)}"
    with FileLock(cache_folder / f"{spec.name}.lock"):
        for stale in set(cache_folder.glob(f"{spec.name}-*")) - {folder}:
            shutil.rmtree(stale)
        if not (folder / RECORD).is_file():
            prepare_model(spec, folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> "LoadedModel":
    """The embedded model in float32 on the CPU; shared, so leave nothing behind on it."""
    from kvguard.models import load_model

    return load_model(smollm2_folder, dtype="float32", device="cpu", attention="sdpa")


CODE_DIGESTS = ".snakemake/kvguard_code.json"
"""Where a plan keeps the digests of its rules' code, below the folder that it runs in."""


def share_code_digests(folder: Path) -> None:
    """Give a folder the digests of this checkout's code; its first plan takes seconds for them.

    They are computed once, by a plan in the checkout. A plan takes them only where its sources are,
    byte for byte, those that they were computed from.
    """
    from kvguard.code_digest import PACKAGE, KnownDigests

    kept = CHECKOUT / CODE_DIGESTS
    (CHECKOUT / ".cache").mkdir(exist_ok=True)
    with FileLock(CHECKOUT / ".cache/code_digests.lock"):
        if not KnownDigests(kept, [CHECKOUT / "workflow_scripts", PACKAGE]).known:
            command = [
                sys.executable,
                "-m",
                "snakemake",
                "--dry-run",
                "--cores",
                "1",
                "--nolock",
                "--ignore-incomplete",
                "all",
                "figures",
            ]
            # Whatever a user's unfinished run says to it: a plan without digests makes its own.
            subprocess.run(command, cwd=CHECKOUT, capture_output=True, check=False)
        if kept.is_file():
            (folder / CODE_DIGESTS).parent.mkdir(exist_ok=True)
            shutil.copy2(kept, folder / CODE_DIGESTS)


WORKFLOW_TESTS = (
    "test_pipeline",
    "test_cli",
    "test_install",
    "test_interruptions",
    "test_slurm",
    "test_module_use",
    "test_repetition",
)
"""Modules whose tests start Snakemake, the command line or another process or environment."""


LONGEST_FIRST = (
    *("test_engine", "test_guard", "test_pipeline", "test_cli", "test_integrity"),
    *("test_evaluate_controller", "test_figures", "test_evaluate_predictor", "test_train"),
    *("test_findings", "test_calibration", "test_experiment", "test_harm_onsets", "test_install"),
    *("test_security", "test_models", "test_live", "test_repetition"),
)
"""Files of more than about 15 seconds: one that begins last keeps the other workers waiting."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test as workflow, real_model or unit, to run each kind alone; order the files."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))
    for item in items:
        if item.path.stem in WORKFLOW_TESTS:
            item.add_marker(pytest.mark.workflow)
        if {"smollm2", "smollm2_folder"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.real_model)
        if not any(item.iter_markers("workflow")) and not any(item.iter_markers("real_model")):
            item.add_marker(pytest.mark.unit)
