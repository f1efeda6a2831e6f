"""The documentation names what is there: modules, files, commands, rules."""

import re
from pathlib import Path

import pytest

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


def _rules():
    return "\n".join(path.read_text() for path in sorted((ROOT / "rules").glob("*.smk")))
