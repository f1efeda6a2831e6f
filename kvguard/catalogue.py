"""Which kvpress presses KVGuard runs, which it refuses and why; imports neither torch nor kvpress.

Class names and their keyword arguments are read from the source of the installed kvpress, so that a
misspelt one is found when the configuration is parsed.
"""

import ast
import difflib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

Phase = Literal["prefill", "decode", "both"]

REFUSED: dict[str, str] = {
    "BasePress": "is abstract: it compresses nothing",
    "ScorerPress": "is abstract: it scores nothing",
    "CAMPress": "merges evicted values while decoding with state that spans the whole batch",
    "DMSPress": "evicts token by token with a sliding window of its own while decoding",
    "DecodingPress": "is chosen with `phase: decode`, which runs it for each row of a batch",
    "CompressionRatioDecodingPress": "is chosen with `phase: decode`, for each row of a batch",
    "PrefillDecodingPress": "is chosen with `phase: both`, which runs it for each row of a batch",
    "DuoAttentionPress": "needs attention patterns that are downloaded for each model",
    "ExpectedAttentionStatsPress": "needs query statistics that are downloaded for each model",
    "FastKVzipPress": "needs trained gate weights that are downloaded for each model",
    "FinchPress": "needs a delimiter token between context and question, and rewrites the input",
    "KVComposePress": "needs a second pass over the prompt and its own generation loop",
    "KVgradPress": "needs several passes with gradients over the prompt",
    "KVzapPress": "needs trained surrogate weights that are downloaded for each model",
    "KVzipPress": "needs several passes that reconstruct the prompt",
    "RestoreKVPress": "needs several passes that reconstruct the prompt",
    "QFilterPress": "needs query filters that are downloaded for each model",
}
"""Press classes that KVGuard does not run, and the reason."""

ATTENTION_WEIGHTS = ("ObservedAttentionPress",)
"""Presses that read the whole prompt's attention weights: eager attention, undivided prefill."""


@dataclass(frozen=True)
class PressClass:
    """A press class as its source declares it."""

    name: str
    bases: tuple[str, ...]
    arguments: tuple[str, ...]
    required: tuple[str, ...]


@cache
def press_classes() -> dict[str, PressClass]:
    """Every press class that the installed kvpress exports, by name."""
    spec = importlib.util.find_spec("kvpress")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("kvpress is not installed: `make` installs the environment")
    folder = Path(spec.submodule_search_locations[0])
    declared: dict[str, PressClass] = {}
    for path in sorted((folder / "presses").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                declared[node.name] = _declaration(node)
    exported = {
        alias.name
        for node in ast.parse((folder / "__init__.py").read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.endswith("Press")
    }
    return {name: _inherit(declared[name], declared) for name in sorted(exported)}


def _declaration(node: ast.ClassDef) -> PressClass:
    arguments: list[str] = []
    required: list[str] = []
    own_init = False
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if "init=False" in ast.unparse(statement).replace(" ", ""):
                continue
            arguments.append(statement.target.id)
            if statement.value is None:
                required.append(statement.target.id)
        elif isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            own_init = True
            arguments = [argument.arg for argument in statement.args.args[1:]]
            required = arguments[: len(arguments) - len(statement.args.defaults)]
    bases = () if own_init else tuple(b.id for b in node.bases if isinstance(b, ast.Name))
    return PressClass(node.name, bases, tuple(arguments), tuple(required))


def _inherit(press: PressClass, declared: Mapping[str, PressClass]) -> PressClass:
    arguments, required = list(press.arguments), list(press.required)
    for base in press.bases:
        if base in declared:
            parent = _inherit(declared[base], declared)
            arguments += [a for a in parent.arguments if a not in arguments]
            required += [a for a in parent.required if a not in press.arguments]
    return PressClass(press.name, press.bases, tuple(arguments), tuple(required))


def check_press(name: str, kwargs: Mapping[str, Any], phase: Phase = "prefill") -> None:
    """Check a press's class name and keyword arguments, nested ones too.

    Raises:
        ValueError: unknown or refused class, or an argument it does not take; says what is known.
    """
    classes = press_classes()
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        known = ", ".join(sorted(set(classes) - set(REFUSED)))
        raise ValueError(f"class: kvpress has no press {name!r}{hint} Supported: {known}")
    if name in REFUSED:
        raise ValueError(f"class: {name} is not supported: it {REFUSED[name]}")
    press = classes[name]
    for argument, value in kwargs.items():
        if argument not in press.arguments:
            raise ValueError(
                f"kwargs.{argument}: {name} takes {', '.join(press.arguments) or 'no arguments'}"
            )
        for nested in value if isinstance(value, list) else [value]:
            if isinstance(nested, Mapping) and "class" in nested:
                unknown = set(nested) - {"class", "kwargs"}
                if unknown:
                    raise ValueError(f"kwargs.{argument}: unknown keys {sorted(unknown)}")
                check_press(nested["class"], nested.get("kwargs") or {}, phase)
    missing = [argument for argument in press.required if argument not in kwargs]
    if missing:
        raise ValueError(f"kwargs: {name} needs {', '.join(missing)}")


def needs_attention_weights(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether the press, or one nested in it, reads the prompt's attention weights."""
    nested = [
        entry
        for value in kwargs.values()
        for entry in (value if isinstance(value, list) else [value])
    ]
    return name in ATTENTION_WEIGHTS or any(
        needs_attention_weights(entry["class"], entry.get("kwargs") or {})
        for entry in nested
        if isinstance(entry, Mapping) and "class" in entry
    )
