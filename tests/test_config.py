"""Configurations: the shipped ones parse, and every mistake is named before any job starts."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvguard.config import (
    BASELINE,
    Config,
    ConfigError,
    config_part,
    digest,
    load_config,
    overlay,
    parse_config,
    ratio_text,
)
from kvguard.prompts import GENERATORS, load_tasks
from kvguard.tasks import verify

CHECKOUT = Path(__file__).parent.parent
SHIPPED: dict[str, Any] = yaml.safe_load((CHECKOUT / "config.yaml").read_text())
TASK = {"kind": "gsm_symbolic", "num_prompts": 9}
REVISION = "0123456789abcdef0123456789abcdef01234567"
ABSENT = object()


def changed(path: str, value: object) -> dict[str, Any]:
    """The shipped configuration with one value set, or removed, at a dotted path."""
    values = copy.deepcopy(SHIPPED)
    parts: list[Any] = [int(part) if part.isdigit() else part for part in path.split(".")]
    *parents, last = parts
    section: Any = values
    for part in parents:
        section = section[part] if isinstance(section, list) else section.setdefault(part, {})
    if value is ABSENT:
        del section[last]
    else:
        section[last] = value
    return values


def complaint(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(values)
    return str(error.value)


def lines(values: dict[str, Any]) -> list[str]:
    """The complaint's lines: one a field."""
    first, *rest = complaint(values).splitlines()
    assert first == "the configuration cannot be used:"
    return [line.strip() for line in rest]


# What is shipped


def test_shipped_configuration() -> None:
    config = load_config(CHECKOUT / "config.yaml")
    assert config.conditions[0] == (BASELINE, "0.000")
    assert {press for press, _ in config.conditions} == {
        "none",
        "snapkv",
        "streaming_llm",
        "knorm",
    }
    assert [task.name for task in config.tasks] == ["recall", "copy"]
    # What a newcomer is to see: what costs nothing, the guard, what is exact; one shard a task.
    expected = {"none", "verify_on_failure", "gate", "guard", "lossless", "always_safe"}
    assert set(config.live.policies) == expected | {"shared_prefix"}
    assert len(config.shards) == len(config.live_shards) == len(config.tasks)


def test_paper_is_two_models_and_sixteen_conditions() -> None:
    config = load_config(CHECKOUT / "config.yaml", CHECKOUT / "experiments" / "paper.yaml")
    presses = ("streaming_llm", "snapkv", "observed_attention")
    ratios = ("0.250", "0.500", "0.625", "0.750", "0.875")
    expected = [("none", "0.000"), *((press, ratio) for press in presses for ratio in ratios)]
    assert config.conditions == expected
    assert len(config.conditions) == 16
    repositories = {model.repository for model in config.models if model.source == "hub"}
    assert repositories == {"Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"}
    assert {model.dtype for model in config.models} == {"bfloat16"}
    assert config.num_prompts == 500
    assert config.generation.max_new_tokens == 512
    assert config.jobs.model.gpu == 1
    assert config.press("observed_attention").attention == "eager"
    assert config.press("snapkv").attention is None


def test_task_families_holds_every_generated_kind() -> None:
    """Tool calls and records too: no experiment for small models asks for them."""
    config = load_config(CHECKOUT / "config.yaml", CHECKOUT / "experiments/task_families.yaml")
    made = {name for name, entry in GENERATORS.items() if entry.__module__.endswith("generators")}
    assert {task.kind for task in config.tasks} == made
    assert {"tool_call", "records"} <= made
    assert len({task.name for task in config.tasks}) == len(config.tasks)
    drawn, _ = load_tasks([task.model_copy(update={"num_prompts": 2}) for task in config.tasks], 3)
    assert len(drawn) == 2 * len(config.tasks)
    assert all(verify(prompt.kind, prompt.spec, prompt.reference or "").right for prompt in drawn)


def test_gsm8k_local_takes_its_paths_from_the_config(tmp_path: Path) -> None:
    values = yaml.safe_load((CHECKOUT / "experiments" / "gsm8k_local.yaml").read_text())
    for field in ("test_path", "train_path"):
        path = tmp_path / f"{field}.jsonl"
        path.write_text("{}\n")
        values["tasks"][0][field] = str(path)
    config = load_config(CHECKOUT / "config.yaml", overrides=values)
    assert config.num_prompts == 100
    assert len(config.conditions) == 7


@pytest.mark.parametrize("path", sorted((CHECKOUT / "experiments").glob("*.yaml")))
def test_every_experiment_has_its_own_results(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    assert values["results_dir"] == f"results/{path.stem}"
    assert values["name"] == path.stem


def test_importing_the_configuration_imports_neither_torch_nor_kvpress() -> None:
    script = (
        "import sys; from kvguard.config import load_config; load_config('config.yaml'); "
        "print({'torch', 'kvpress', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Mistakes: the field as the user wrote it, what is accepted, what was given


@pytest.mark.parametrize(
    ("path", "value", "field", "accepted", "given"),
    [
        ("presses.0.class", "SnapPress", "presses.0.class", "SnapKVPress", "'SnapPress'"),
        ("presses.0.class", "KVzipPress", "presses.0.class", "several passes", "'KVzipPress'"),
        ("presses.0.class", "DecodingPress", "presses.0.class", "phase: decode", "DecodingPress"),
        ("presses.0.phase", "later", "presses.0.phase", "'prefill', 'decode' or 'both'", "'later'"),
        ("presses.0.ratios", [1.0], "presses.0.ratios.0", "[0, 1)", "1.0"),
        ("presses.0.ratios", [0.5, -0.1], "presses.0.ratios.1", "[0, 1)", "-0.1"),
        ("presses.0.ratios", ["half"], "presses.0.ratios.0", "a number in [0, 1)", "'half'"),
        ("presses.0.ratios", [0.1234], "presses.0.ratios.0", "three decimals", "0.1234"),
        ("presses.0.ratios", [True], "presses.0.ratios.0", "a number", "True"),
        ("presses.0.ratios", [0, 0.5], "presses.0.ratios", "baseline", "'0.000'"),
        ("presses.0.ratios", [0.5, "0.500"], "presses.0.ratios", "once", "'0.500', '0.500'"),
        ("presses.0.ratios", [], "presses.0.ratios", "at least 1", "[]"),
        ("presses.0.kwargs", {"window": 8}, "presses.0.kwargs.window", "window_size", "8"),
        (
            "presses.0.kwargs",
            {"window_size": "wide"},
            "presses.0.kwargs.window_size",
            "takes int",
            "'wide'",
        ),
        (
            "presses.0.kwargs",
            {"compression_ratio": 0.5},
            "presses.0.kwargs.compression_ratio",
            "`ratios`",
            "0.5",
        ),
        ("presses.1.name", "snapkv", "presses", "once", "'snapkv', 'snapkv'"),
        ("presses.1.name", "none", "presses.1.name", "uncompressed baseline", "'none'"),
        ("presses.1.name", "../x", "presses.1.name", "letters, digits", "'../x'"),
        ("presses", None, "presses", "list", "None"),
        ("tasks.0.num_prompts", -3, "tasks.0.num_prompts", "greater than or equal to 1", "-3"),
        ("tasks.0.num_prompts", 0, "tasks.0.num_prompts", "greater than or equal to 1", "0"),
        ("tasks.0.num_prompts", "many", "tasks.0.num_prompts", "integer", "'many'"),
        ("tasks.0.few_shot", -1, "tasks.0.few_shot", "greater than or equal to 0", "-1"),
        ("tasks.0.kind", "mmlu", "tasks.0.kind", "'gsm_symbolic', 'gsm8k'", "'mmlu'"),
        ("tasks", [TASK, TASK], "tasks", "once", "'gsm_symbolic', 'gsm_symbolic'"),
        ("generation.max_new_tokens", -1, "generation.max_new_tokens", "or equal to 1", "-1"),
        ("generation.batch_size", -2, "generation.batch_size", "'auto'", "-2"),
        ("generation.temperature", 0, "generation.temperature", "greater than 0", "0"),
        ("generation.temperature", float("inf"), "generation.temperature", "finite", "inf"),
        ("generation.top_p", 1.5, "generation.top_p", "less than or equal to 1", "1.5"),
        ("models.0.wheel_sha256", "abc", "models.0.wheel_sha256", "64 lower-case", "'abc'"),
        ("models.0.wheel_sha256", "A" * 64, "models.0.wheel_sha256", "64 lower-case", "AAAA"),
        ("models.0.member_sha256", 12, "models.0.member_sha256", "string", "12"),
        ("models.0.requirement", "llm", "models.0.requirement", "package==version", "'llm'"),
        (
            "models.0.source",
            "floppy",
            "models.0.source",
            "'wheel', 'gguf', 'hub', 'local'",
            "'floppy'",
        ),
        ("models.0.source", ABSENT, "models.0.source", "'wheel', 'gguf', 'hub', 'local'", "None"),
        ("models.0.dtype", "int4", "models.0.dtype", "'float32', 'bfloat16'", "'int4'"),
        ("models.0.device", "gpu", "models.0.device", "cuda:<number>", "'gpu'"),
        ("models.0.attention", "fast", "models.0.attention", "'sdpa', 'eager'", "'fast'"),
        ("models", [], "models", "at least 1", "[]"),
        ("splits.train", 0.9, "splits", "must be 1", "1.4"),
        ("live.policies", ["guards"], "live.policies.0", "guard_promote", "'guards'"),
        (
            "live.planned_tests",
            [{"policy": "guard", "other": "gates"}],
            "live.planned_tests.0.other",
            "guard_promote",
            "'gates'",
        ),
        (
            "live.planned_tests",
            [{"policy": "gate", "other": "gate"}],
            "live.planned_tests.0.other",
            "another policy",
            "'gate'",
        ),
        (
            "live.conditions",
            [["snapkv", 0.4], ["snapkv", 0.9]],
            "live.conditions.1",
            "('snapkv', '0.300')",
            "('snapkv', '0.900')",
        ),
        ("controller.tau_low", [1.5], "controller.tau_low.0", "less than 1", "1.5"),
        (
            "controller.prices",
            {"bold": 0.1},
            "controller.prices.bold",
            "'conservative', 'balanced' or 'aggressive'",
            "'bold'",
        ),
        ("results_dir", "my results", "results_dir", "letters, digits", "'my results'"),
        ("seed", -1, "seed", "greater than or equal to 0", "-1"),
    ],
)
def test_a_bad_value_is_named(
    path: str, value: object, field: str, accepted: str, given: str
) -> None:
    (line,) = lines(changed(path, value))
    assert line.startswith(f"{field}: ")
    assert accepted in line
    assert given in line.split("got")[-1]


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("generation.max_new_token", "generation.max_new_tokens"),
        ("taks", "tasks"),
        ("tasks.0.num_prompt", "tasks.0.num_prompts"),
        ("models.0.wheel_sha265", "models.0.wheel_sha256"),
        ("presses.0.ratio", "presses.0.ratios"),
        ("presses.0.clas", "presses.0.class"),
        ("jobs.model.runtimes", "jobs.model.runtime"),
        ("live.policy", "live.policies"),
    ],
)
def test_a_misspelt_key_is_named_with_the_right_one(path: str, meant: str) -> None:
    (line,) = lines(changed(path, 1))
    assert line.startswith(f"{path}: unknown key; did you mean '{meant.rpartition('.')[2]}'?")
    assert "Known here: " in line


def test_known_keys_are_those_of_the_chosen_source_or_task() -> None:
    (line,) = lines(changed("models.0.repository", "someone/model"))
    known = line.partition("Known here: ")[2]
    assert "wheel_sha256" in known
    assert "revision" not in known
    (line,) = lines(changed("tasks.0.test_path", "x"))
    assert "few_shot" in line
    assert "train_path" not in line


def test_a_missing_key_is_named() -> None:
    assert lines(changed("tasks.0.num_prompts", ABSENT)) == [
        "tasks.0.num_prompts: required, but not given"
    ]


def test_every_mistake_is_listed_at_once() -> None:
    values = changed("generation.max_new_tokens", -1)
    values["tasks"][0]["num_prompts"] = 0
    values["presses"][1]["ratios"] = [2]
    fields = {line.partition(":")[0] for line in lines(values)}
    assert fields == {"generation.max_new_tokens", "tasks.0.num_prompts", "presses.1.ratios.0"}


def test_missing_data_files_are_named(tmp_path: Path) -> None:
    task = {"kind": "gsm8k", "num_prompts": 5, "test_path": "no.jsonl", "train_path": "none.jsonl"}
    test_line, train_line = lines(changed("tasks.0", task))
    assert test_line.startswith("tasks.0.test_path: no file at no.jsonl")
    assert train_line.startswith("tasks.0.train_path: no file at none.jsonl")


def test_hub_data_needs_a_revision(tmp_path: Path) -> None:
    task: dict[str, Any] = {"kind": "gsm8k", "num_prompts": 5}
    (line,) = lines(changed("tasks.0", task))
    assert line.startswith("tasks.0.revision: ")
    assert "full commit hash" in line
    (line,) = lines(changed("tasks.0", task | {"revision": "main"}))
    assert (
        line
        == "tasks.0.revision: a full commit hash is 40 lower-case hexadecimal digits, got 'main'"
    )
    data = tmp_path / "test.jsonl"
    data.write_text("{}\n")
    local = task | {"test_path": str(data), "few_shot": 0}
    assert parse_config(changed("tasks", [local])).num_prompts == 5


def test_hub_models_are_pinned() -> None:
    hub = {"source": "hub", "name": "big", "repository": "gpt2", "revision": "v1"}
    repository, revision = lines(changed("models.0", hub))
    assert repository == "models.0.repository: a hub repository is written owner/name, got 'gpt2'"
    assert revision.startswith("models.0.revision: a full commit hash")


def test_local_models_exist(tmp_path: Path) -> None:
    local = {"source": "local", "name": "mine", "path": str(tmp_path)}
    (line,) = lines(changed("models.0", local))
    assert line.startswith(f"models.0.path: no config.json in {tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    assert parse_config(changed("models.0", local)).models[0].name == "mine"


OBSERVED = {"name": "observed", "class": "ObservedAttentionPress", "ratios": [0.5]}


def test_observed_attention_needs_eager_attention() -> None:
    (line,) = lines(changed("presses.0", OBSERVED))
    assert line.startswith("presses.0.attention: ObservedAttentionPress reads attention weights")
    assert "'eager'" in line
    assert line.endswith("got 'sdpa' for model 'smollm2-135m'")
    parse_config(changed("presses.0", OBSERVED | {"attention": "eager"}))
    eager_model = changed("models.0.attention", "eager")
    eager_model["presses"][0] = OBSERVED
    parse_config(eager_model)


def test_observed_attention_is_found_inside_a_wrapper() -> None:
    inner = {"class": "ObservedAttentionPress"}
    wrapped = {"name": "w", "class": "ChunkPress", "kwargs": {"press": inner}, "ratios": [0.5]}
    (line,) = lines(changed("presses.0", wrapped))
    assert line.startswith("presses.0.attention: ")


def test_head_wise_presses_refuse_eager_attention() -> None:
    inner = {"class": "SnapKVPress"}
    ada = {"name": "ada", "class": "AdaKVPress", "kwargs": {"press": inner}, "ratios": [0.5]}
    parse_config(changed("presses.0", ada))
    (line,) = lines(changed("presses.0", ada | {"attention": "eager"}))
    assert line.startswith("presses.0.attention: AdaKVPress")


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({}, "presses.0.kwargs: AdaKVPress needs press"),
        ({"press": "SnapKVPress"}, "presses.0.kwargs.press: a nested press is {class:"),
        ({"press": {"kwargs": {}}}, "presses.0.kwargs.press: a nested press is {class:"),
        (
            {"press": {"class": "SnapKVPress", "kwarg": {}}},
            "presses.0.kwargs.press: a nested press is {class:",
        ),
        (
            {"press": {"class": "SnapKVPres"}},
            "presses.0.kwargs.press.class: did you mean SnapKVPress?",
        ),
        (
            {"press": {"class": "SnapKVPress", "kwargs": {"window": 3}}},
            "presses.0.kwargs.press.kwargs.window: unknown argument; SnapKVPress takes",
        ),
    ],
)
def test_nested_presses_are_checked(kwargs: dict[str, Any], said: str) -> None:
    ada = {"name": "ada", "class": "AdaKVPress", "kwargs": kwargs, "ratios": [0.5]}
    (line,) = lines(changed("presses.0", ada))
    assert line.startswith(said)


def test_nested_presses_are_accepted() -> None:
    snapkv = {"class": "SnapKVPress", "kwargs": {"window_size": 32}}
    ada = {"name": "ada", "class": "AdaKVPress", "kwargs": {"press": snapkv}, "ratios": [0.5]}
    config = parse_config(changed("presses.0", ada))
    assert config.press("ada").kwargs["press"]["kwargs"] == {"window_size": 32}


# Files and overlays


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file at .*absent\.yaml"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="a configuration is a mapping, got list"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML") as error:
        load_config(tmp_path / "broken.yaml")
    assert "line 2" in str(error.value)


def test_overlays_merge_mappings_and_replace_lists(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text(
        "tasks: [{kind: gsm_symbolic, num_prompts: 7}]\n"
        "presses: [{name: k, class: KnormPress, ratios: [0.3]}]\n"
    )
    config = load_config(
        CHECKOUT / "config.yaml",
        tmp_path / "more.yaml",
        overrides={"generation": {"max_new_tokens": 9}},
    )
    assert (config.num_prompts, config.tasks[0].few_shot) == (7, 3)
    assert (config.generation.max_new_tokens, config.generation.shard_size) == (9, 24)
    assert config.conditions == [("none", "0.000"), ("k", "0.300")]


def test_overlay_leaves_its_arguments_alone() -> None:
    base, over = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}
    assert overlay(base, over) == {"a": {"b": 3, "c": 2}}
    assert base == {"a": {"b": 1, "c": 2}}


def test_a_dumped_configuration_parses_to_itself() -> None:
    config = parse_config(SHIPPED)
    dumped = config.model_dump(mode="json", by_alias=True)
    assert Config.model_validate(dumped) == config


# Small parts


@given(st.integers(0, 999))
def test_ratios_have_three_decimals(thousandths: int) -> None:
    text = ratio_text(thousandths / 1000)
    assert text == f"0.{thousandths:03d}"
    assert ratio_text(text) == text


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 30))
def test_shards_hold_every_prompt_once_and_one_task_each(counts: list[int], size: int) -> None:
    values = changed("generation.shard_size", size)
    values["tasks"] = [TASK | {"name": f"t{i}", "num_prompts": n} for i, n in enumerate(counts)]
    config = parse_config(values)
    task_of = [task.name for task in config.tasks for _ in range(task.num_prompts)]
    places = [place for shard in config.shards for place in shard]
    assert places == list(range(config.num_prompts)) == list(range(len(task_of)))
    for shard in config.shards:
        assert 1 <= len(shard) <= size
        assert len({task_of[place] for place in shard}) == 1


def test_a_task_is_named_by_its_kind_unless_told_otherwise() -> None:
    two = [TASK, TASK | {"name": "short", "max_new_tokens": 12}]
    config = parse_config(changed("tasks", two))
    assert [task.name for task in config.tasks] == ["gsm_symbolic", "short"]
    assert config.max_new_tokens("gsm_symbolic") == config.generation.max_new_tokens
    assert config.max_new_tokens("short") == 12
    with pytest.raises(KeyError, match=r"no task 'long'.*gsm_symbolic.*short"):
        config.task("long")


def test_live_shards_divide_each_tasks_test_prompts() -> None:
    values = changed("live", {"shard_size": 10})
    values["tasks"] = [TASK | {"name": "a", "num_prompts": 100}, TASK | {"name": "b"}]
    assert parse_config(values).live_shards == [("a", 0, 3), ("a", 1, 3), ("a", 2, 3), ("b", 0, 1)]


def test_a_ladder_runs_once_a_press_at_its_heaviest_live_ratio() -> None:
    values = changed("live", {"policies": ["none", "ladder"]})
    press = {"name": "p", "class": "KnormPress", "ratios": [0.2, 0.6, 0.4]}
    values["presses"] = [
        press | {"live_ratios": [0.2, 0.4]},
        press | {"name": "q"},
    ]
    config = parse_config(values)
    found = {pair: config.live_policies(*pair) for pair in config.live_conditions}
    assert {pair for pair, policies in found.items() if "ladder" in policies} == {
        ("p", "0.400"),
        ("q", "0.600"),
    }
    assert all("none" in policies for policies in found.values())
    with pytest.raises(ConfigError, match=r"live.ladder_threshold"):
        parse_config(changed("live", {"ladder_threshold": 1.5}))


def test_names_that_are_not_there_list_those_that_are() -> None:
    config = parse_config(SHIPPED)
    with pytest.raises(KeyError, match=r"no press 'tova'.*snapkv.*streaming_llm"):
        config.press("tova")
    with pytest.raises(KeyError, match=r"no model 'gpt'.*smollm2-135m"):
        config.model("gpt")


def test_digest_depends_on_content_not_on_order() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert len(digest({})) == 16


def test_a_part_holds_what_it_names_and_nothing_else() -> None:
    values = load_config(CHECKOUT / "config.yaml").model_dump(mode="json", by_alias=True)
    loops = {"loop_repeats": 4}
    part = config_part({"seed": 7, "generation": values["generation"], "detection": loops})
    assert part.seed == 7
    assert part.generation.max_new_tokens == values["generation"]["max_new_tokens"]
    assert part.detection.loop_repeats == 4
    for read in (lambda: part.live, lambda: part.models, lambda: part.detection.loop_window_tokens):
        with pytest.raises(AttributeError):
            read()
    with pytest.raises(ConfigError, match="has no generations; known: name, seed"):
        config_part({"generations": {}})
    with pytest.raises(ConfigError, match="seed"):
        config_part({"seed": "many"})
