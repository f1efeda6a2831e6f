"""Which code a digest counts: what a script reaches, and nothing that changes no result."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kvguard.code_digest import (
    NOT_RESULTS,
    KnownDigests,
    code_digest,
    definition_digest,
    reached_definitions,
)

CHECKOUT = Path(__file__).parent.parent
SCRIPTS = sorted((CHECKOUT / "workflow_scripts").glob("*.py"))

MODULES = {
    "a.py": """
import logging

from kvguard import b, c
from kvguard.d import TABLE

logger = logging.getLogger(__name__)


def used(x: int) -> int:
    \"\"\"Add one.\"\"\"
    if x < 0:
        raise ValueError(f"x is negative, got {x}")
    logger.info("working on %d", x)
    return b.helper(x) + len(TABLE)  # sum


def unused(x: int) -> int:
    return c.other(x)


def later() -> int:
    from kvguard.c import third

    return third()
""",
    "b.py": """
LIMIT = 3
REGISTRY = {"one": lambda x: x, "two": lambda x: x + LIMIT}


def helper(x):
    return REGISTRY["one"](x)


def stranger():
    return 9
""",
    "c.py": """
def other(x):
    return x


def third():
    return 3
""",
    "d.py": """
KEYS = {"id": "text"}
TABLE = KEYS | {"value": "float"}
ELSEWHERE = KEYS | {"more": "float"}
""",
}

Changed = Callable[[str, str, str], bool]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script that calls ``a.used``, beside a small library."""
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    path = tmp_path / "scripts" / "script.py"
    path.parent.mkdir()
    path.write_text("from kvguard.a import used\n\nused(1)\n")
    return path


@pytest.fixture
def changes(script: Path, tmp_path: Path) -> Changed:
    """Whether replacing a text in one file of the library changes the script's digest."""

    def changes(name: str, old: str, new: str) -> bool:
        path = tmp_path / name
        text = path.read_text()
        assert old in text
        before = code_digest(script, package=tmp_path)
        path.write_text(text.replace(old, new))
        after = code_digest(script, package=tmp_path)
        path.write_text(text)
        assert code_digest(script, package=tmp_path) == before
        return before != after

    return changes


def test_names_are_followed_from_definition_to_definition(script: Path, tmp_path: Path) -> None:
    assert set(reached_definitions(script, package=tmp_path)) - {"a.", "b.", "d."} == {
        *("a.used", "b.helper", "b.REGISTRY", "b.LIMIT", "d.TABLE", "d.KEYS")
    }


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("a.py", "if x < 0", "if x < 1"),
        ("a.py", "raise ValueError", "raise TypeError"),
        ("b.py", "lambda x: x,", "lambda x: x * 2,"),
        ("b.py", "LIMIT = 3", "LIMIT = 4"),
        ("d.py", '"id": "text"', '"id": "int"'),
        ("d.py", '"value"', '"amount"'),
    ],
)
def test_code_that_is_reached_counts(changes: Changed, name: str, old: str, new: str) -> None:
    assert changes(name, old, new)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("a.py", "Add one.", "Add another."),
        ("a.py", "# sum", "# the sum"),
        ("a.py", "x is negative", "x should not be negative"),
        ("a.py", '    logger.info("working on %d", x)\n', ""),
        ("a.py", "x: int", "x: float"),
        ("a.py", "return c.other(x)", "return c.other(x) + 1"),
        ("b.py", "return 9", "return 10"),
        ("c.py", "return 3", "return 4"),
        ("d.py", '"more"', '"less"'),
    ],
)
def test_what_changes_no_result_does_not_count(
    changes: Changed, name: str, old: str, new: str
) -> None:
    assert not changes(name, old, new)


def test_the_script_itself_counts(script: Path, tmp_path: Path) -> None:
    before = code_digest(script, package=tmp_path)
    script.write_text('"""Says more."""\n\nfrom kvguard.a import used\n\nused(1)  # once\n')
    assert code_digest(script, package=tmp_path) == before
    script.write_text("from kvguard.a import used\n\nused(2)\n")
    assert code_digest(script, package=tmp_path) != before


def test_imports_inside_functions_are_followed(script: Path, tmp_path: Path) -> None:
    script.write_text("from kvguard import a\n\na.later()\n")
    assert "c.third" in reached_definitions(script, package=tmp_path)
    assert "c.other" not in reached_definitions(script, package=tmp_path)


def test_one_entry_of_a_registry_counts_alone(script: Path, tmp_path: Path) -> None:
    only = {"b.REGISTRY": "one"}
    before = code_digest(script, only, tmp_path)
    assert "b.LIMIT" not in reached_definitions(script, only, tmp_path)
    (tmp_path / "b.py").write_text(MODULES["b.py"].replace("x + LIMIT", "x - LIMIT"))
    assert code_digest(script, only, tmp_path) == before
    assert code_digest(script, {"b.REGISTRY": "two"}, tmp_path) != before
    with pytest.raises(KeyError, match="no entry 'three': one, two"):
        code_digest(script, {"b.REGISTRY": "three"}, tmp_path)
    with pytest.raises(KeyError, match=r"no c\.NOTHING is reached"):
        code_digest(script, {"c.NOTHING": "one"}, tmp_path)


def test_one_definition_counts_with_what_it_reaches(script: Path, tmp_path: Path) -> None:
    before = definition_digest("b", "helper", tmp_path)
    (tmp_path / "b.py").write_text(MODULES["b.py"].replace("return 9", "return 10"))
    assert definition_digest("b", "helper", tmp_path) == before
    (tmp_path / "b.py").write_text(MODULES["b.py"].replace("LIMIT = 3", "LIMIT = 4"))
    assert definition_digest("b", "helper", tmp_path) != before
    with pytest.raises(KeyError, match="defines no 'absent'"):
        definition_digest("b", "absent", tmp_path)


def test_statements_that_run_on_import_count(changes: Changed, tmp_path: Path) -> None:
    text = MODULES["b.py"] + "\n\nREGISTRY.update(three=abs)\nprint('loaded')\n"
    (tmp_path / "b.py").write_text(text)
    assert changes("b.py", "three=abs", "three=len")
    assert changes("b.py", "loaded", "here")


# --- the workflow's own scripts ------------------------------------------------------------------


def modules(script: str) -> set[str]:
    names = reached_definitions(CHECKOUT / "workflow_scripts" / f"{script}.py")
    return {name.split(".")[0] for name in names}


def test_generation_depends_on_what_makes_tokens_and_on_no_picture() -> None:
    found = modules("generate")
    assert {"signals", "engine", "audit", "presses", "prompts", "models"} <= found
    assert not {"checkpoints", "plot_style", "viewer", "train", "calibration", "live"} & found


def test_live_jobs_depend_on_no_summary() -> None:
    found = modules("run_live")
    assert {"engine", "policies", "controller", "features"} <= found
    assert not {"compare_policies", "evaluate_controller", "simulation", "train"} & found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_name_that_a_script_imports_is_found(script: Path) -> None:
    from ast import ImportFrom, parse, walk

    reached = {name.split(".")[0] for name in reached_definitions(script)}
    for node in walk(parse(script.read_text())):
        if isinstance(node, ImportFrom) and (node.module or "").startswith("kvguard."):
            module = (node.module or "").split(".")[1]
            if module not in {"config", "schema"} | NOT_RESULTS:
                assert module in reached, module


def test_known_digests_hold_until_a_source_changes(script: Path, tmp_path: Path) -> None:
    store, folders = tmp_path / "state" / "known.json", [tmp_path, script.parent]
    counted = iter(range(9))

    def ask() -> str:
        known = KnownDigests(store, folders)
        digest = known.get("script", lambda: str(next(counted)))
        known.save()
        return digest

    assert (ask(), ask()) == ("0", "0")
    (tmp_path / "b.py").write_text((tmp_path / "b.py").read_text() + "\n")
    assert (ask(), ask()) == ("1", "1")
    script.write_text(script.read_text() + "\n")
    assert (ask(), ask()) == ("2", "2")
    store.write_bytes(bytes(range(256)))
    assert (ask(), ask()) == ("3", "3")


def test_digests_are_computed_where_nothing_can_be_kept(script: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    known = KnownDigests(tmp_path / "file" / "known.json", [script.parent])
    assert known.get("script", lambda: "computed") == "computed"
    known.save()
