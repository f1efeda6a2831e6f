"""The documentation names what is there: modules, files, commands, rules."""

import json
import re
import runpy
import shlex
from pathlib import Path

import jsonschema
import pytest
import typer
import yaml

import kvguard
from kvguard import cli
from kvguard.config import load_config, overlay
from kvguard.config_schema import config_schema
from kvguard.workflow import certificate_uses

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if target.startswith("http"):
            continue
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), flags=re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


def test_architecture_names_every_module_and_rule():
    text = (ROOT / "docs" / "architecture.md").read_text()
    modules = {path.stem for path in (ROOT / "kvguard").glob("*.py")} - {"__init__"}
    assert {name for name in modules if f"`{name}`" not in text} == set()
    chart = re.search(r"```mermaid(.*?)```", text, re.DOTALL)[1]
    rules = set(re.findall(r"^rule (\w+):", _rules(), flags=re.MULTILINE))
    records = {"record_run", "write_manifest"}
    assert {name for name in rules - records if name not in chart} == set()


def test_every_figure_of_the_report_has_a_caption_of_its_own_words():
    captions = set(re.findall(r"captions/(\w+)\.rst", _rules()))
    assert captions
    for name in captions:
        assert (ROOT / "reports" / "captions" / f"{name}.rst").read_text().strip(), name


def test_readme_states_the_two_commands_and_only_make_targets_that_exist():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:    |`)make ([a-z0-9-]+)", readme))
    assert {"demo", "test"} <= named <= targets


def test_command_lines_of_the_documentation_are_accepted():
    """Their commands and options, and the options that a comment beside them names."""
    group = typer.main.get_command(cli.commands)
    seen = 0
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for line in re.findall(r"^    kvguard (?!COMMAND)(.+)$", page.read_text(), re.MULTILINE):
            words = shlex.split(line, comments=True)
            command = group.get_command(None, words[0])
            assert command is not None, line
            command.make_context(words[0], words[1:])  # raises for an unknown option or value
            options = {option for parameter in command.params for option in parameter.opts}
            assert set(re.findall(r"--[a-z-]+", line)) <= options, line
            seen += 1
    assert seen >= 9


def test_the_untrained_guard_of_the_readme_runs_as_printed(tmp_path, tiny_model, tiny_tokenizer):
    readme = (ROOT / "README.md").read_text()
    example = readme[readme.index("```python") + 9 : readme.index("# What the demo trained")]
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    example = re.sub(r'folder = "(.+?)"', f"folder = {str(tmp_path)!r}", example)
    names = {}
    exec(example.replace("max_new_tokens=512", "max_new_tokens=12"), names)
    prompt = names["inputs"]["input_ids"].shape[1]
    assert names["output"].shape == (1, prompt + len(names["guard"].completions[0].token_ids))
    assert names["guard"].report.to_frame().height == 1


def test_the_trained_guard_of_the_readme_is_a_certified_use_of_the_demo():
    readme = (ROOT / "README.md").read_text()
    folder = re.search(r'folder = "(.+?)"', readme)[1]
    example = readme[readme.index("# What the demo trained") :]
    ratio, window = re.search(r"SnapKVPress\(([0-9.]+), window_size=(\d+)\)", example).groups()
    longest = re.search(r"max_new_tokens=(\d+)", example)[1]
    model = Path(folder).relative_to("results/checkpoints").name
    assert "do_sample=False" in example
    found = [
        use
        for use in certificate_uses(load_config(ROOT / "config.yaml"))
        if use["press_class"] == "SnapKVPress"
        and use["press_settings"] == {"kwargs": {"window_size": int(window)}}
        and use["ratio"] == f"{float(ratio):.3f}"
        and use["max_new_tokens"] == int(longest)
        and use["model"] == model
        and (use["recovery"], use["check_every_tokens"]) == ("continue", 8)
        and use["decoding"] == "greedy"
    ]
    assert found


def test_the_schema_of_the_configuration_is_fresh_and_accepts_every_experiment():
    written = json.loads((ROOT / "config.schema.json").read_text())
    assert written == config_schema(), "run `make schema`"
    validator = jsonschema.Draft202012Validator(written)
    base = yaml.safe_load((ROOT / "config.yaml").read_text())
    for path in (None, *sorted((ROOT / "experiments").glob("*.yaml"))):
        values = base if path is None else overlay(base, yaml.safe_load(path.read_text()))
        assert [error.message for error in validator.iter_errors(values)] == [], path
    assert list(validator.iter_errors(base | {"sed": 1}))


def test_the_quickstart_answers_and_reports(tmp_path, tiny_model, tiny_tokenizer, capsys):
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    example = runpy.run_path(str(ROOT / "examples" / "quickstart.py"))
    answer = example["main"](str(tmp_path), max_new_tokens=12)
    assert answer
    printed = capsys.readouterr().out
    assert printed.startswith(answer)
    assert printed.count("RowReport") >= 1


def test_the_citation_names_the_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == kvguard.__version__
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {kvguard.__version__}" in changes


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(
        r"`((?:kvguard|tests|rules|workflow_scripts|docs|experiments)/[^`*<{]+)`", text
    ):
        assert (ROOT / name).exists(), name
    for module, name in re.findall(r"`(\w+)\.((?!txt|jsonl?|ya?ml|md)\w+)`", text):
        path = ROOT / "kvguard" / f"{module}.py"
        assert path.is_file(), module
        assert re.search(rf"^(?:def |class |    \w*){{0,2}}{name}\b", path.read_text(), re.M), name


def _rules():
    return "\n".join(path.read_text() for path in sorted((ROOT / "rules").glob("*.smk")))
