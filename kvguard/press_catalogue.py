"""Which kvpress presses KVGuard runs, which it refuses and why; imports neither torch nor kvpress.

Class names and their keyword arguments are read from the source of the installed kvpress, so that a
misspelt one is found when the configuration is parsed.
"""

import ast
import difflib
import importlib.util
from collections.abc import Collection, Mapping
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
    "LUKVPress": "needs head budgets that are downloaded for each model",
    "QFilterPress": "needs query filters that are downloaded for each model",
}
"""Press classes that KVGuard does not run, and the reason."""

PREFILL_ONLY: dict[str, str] = {
    "AdaKVPress": "writes fake keys over masked entries, which its next scores would read",
    "BlockPress": "is a wrapper that kvpress's DecodingPress does not take",
    "ChunkKVPress": "is a wrapper that kvpress's DecodingPress does not take",
    "ChunkPress": "is a wrapper that kvpress's DecodingPress does not take",
    "CompactorPress": "scores a whole prompt only",
    "ComposedPress": "is a wrapper that kvpress's DecodingPress does not take",
    "CriticalAdaKVPress": "writes fake keys over masked entries, which its next scores would read",
    "EntropyGatedChunkKVPress": "is a wrapper that kvpress's DecodingPress does not take",
    "KeyRerotationPress": "is a wrapper that kvpress's DecodingPress does not take",
    "LeverageScorePress": "scores a whole prompt only",
    "MergingPress": "is a wrapper that kvpress's DecodingPress does not take",
    "NonCausalAttnPress": "scores a whole prompt only",
    "ObservedAttentionPress": "reads the attention weights of the whole prompt",
    "PerLayerCompressionPress": "is a wrapper that kvpress's DecodingPress does not take",
    "SimLayerKVPress": "is not a scorer, which kvpress's DecodingPress needs",
    "ThinKPress": "removes key channels, not entries",
}
"""Presses that compress the prompt's cache but not a growing one (`phase: decode` or `both`)."""

NO_RATIO: dict[str, str] = {
    "SimLayerKVPress": "its lazy_threshold decides how much is removed; the ratio is a label",
    "PerLayerCompressionPress": "the mean of its compression_ratios must equal the ratio",
    "ComposedPress": "the ratios of its presses must compose to the ratio",
}
"""Presses whose ratio follows from their keyword arguments."""

ATTENTION_WEIGHTS = ("ObservedAttentionPress",)
"""Presses that read the whole prompt's attention weights: eager attention, undivided prefill."""

NOT_EAGER = ("AdaKVPress", "CriticalAdaKVPress")
"""Head-wise presses: kvpress hides their masked keys from every attention but the eager one."""

_SIMPLE_TYPES: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "bool": bool,
    "str": str,
}


@dataclass(frozen=True)
class PressClass:
    """A press class as its source declares it."""

    name: str
    bases: tuple[str, ...]
    arguments: tuple[str, ...]
    required: tuple[str, ...]
    types: Mapping[str, str]


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
    types: dict[str, str] = {}
    own_init = False
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            hidden = statement.target.id.startswith("_")
            if hidden or "init=False" in ast.unparse(statement).replace(" ", ""):
                continue
            arguments.append(statement.target.id)
            types[statement.target.id] = ast.unparse(statement.annotation)
            hollow = isinstance(statement.value, ast.Constant) and statement.value.value is None
            if statement.value is None or (hollow and types[statement.target.id].endswith("Press")):
                required.append(statement.target.id)
        elif isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            own_init = True
            arguments = [argument.arg for argument in statement.args.args[1:]]
            required = arguments[: len(arguments) - len(statement.args.defaults)]
            types = {
                argument.arg: ast.unparse(argument.annotation)
                for argument in statement.args.args[1:]
                if argument.annotation is not None
            }
    bases = () if own_init else tuple(b.id for b in node.bases if isinstance(b, ast.Name))
    return PressClass(node.name, bases, tuple(arguments), tuple(required), types)


def _inherit(press: PressClass, declared: Mapping[str, PressClass]) -> PressClass:
    arguments, required, types = list(press.arguments), list(press.required), dict(press.types)
    for base in press.bases:
        if base in declared:
            parent = _inherit(declared[base], declared)
            arguments += [a for a in parent.arguments if a not in arguments]
            required += [a for a in parent.required if a not in press.arguments]
            types = {**parent.types, **types}
    return PressClass(press.name, press.bases, tuple(arguments), tuple(required), types)


def check_press(
    name: str, kwargs: Mapping[str, Any], phase: Phase = "prefill", within: str = ""
) -> None:
    """Check a press's class name and keyword arguments, nested ones too.

    Args:
        name: a class that kvpress exports.
        kwargs: its keyword arguments; a nested press is ``{"class": ..., "kwargs": {...}}``.
        phase: when it compresses.
        within: path of the press inside an outer one, in front of the field that a message names.

    Raises:
        ValueError: unknown or refused class, or an argument it does not take; says what is known.
    """
    classes = press_classes()
    if name not in classes:
        near = difflib.get_close_matches(str(name), classes, n=2, cutoff=0.8)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        known = ", ".join(sorted(set(classes) - set(REFUSED)))
        raise ValueError(f"{within}class: {hint}kvpress's presses are {known}, got {name!r}")
    if name in REFUSED:
        raise ValueError(f"{within}class: {name} is not supported: it {REFUSED[name]}")
    if phase != "prefill" and name in PREFILL_ONLY:
        raise ValueError(
            f"{within}phase: {name} cannot compress while decoding: it {PREFILL_ONLY[name]}; use "
            f"'prefill', got {phase!r}"
        )
    press = classes[name]
    for argument, value in kwargs.items():
        field = f"{within}kwargs.{argument}"
        if argument not in press.arguments:
            accepted = ", ".join(press.arguments) or "no arguments"
            raise ValueError(f"{field}: unknown argument; {name} takes {accepted}")
        if argument in ("press", "presses"):
            for nested in value if isinstance(value, list) else [value]:
                _check_nested(nested, phase, field)
        expected = press.types.get(argument, "")
        simple = _SIMPLE_TYPES.get(expected)
        wrong_bool = isinstance(value, bool) and expected != "bool"
        if simple is not None and (wrong_bool or not isinstance(value, simple)):
            raise ValueError(f"{field}: {name} takes {expected} here, got {value!r}")
    missing = [argument for argument in press.required if argument not in kwargs]
    if missing:
        raise ValueError(f"{within}kwargs: {name} needs {', '.join(missing)}, got {dict(kwargs)}")


def _check_nested(nested: object, phase: Phase, field: str) -> None:
    if not isinstance(nested, Mapping) or not {"class"} <= set(nested) <= {"class", "kwargs"}:
        raise ValueError(
            f"{field}: a nested press is {{class: <name>, kwargs: {{...}}}}, got {nested!r}"
        )
    check_press(nested["class"], nested.get("kwargs") or {}, phase, f"{field}.")


def check_ratio(name: str, kwargs: Mapping[str, Any], ratio: float) -> None:
    """Check that a press can remove a fraction ``ratio`` of the entries.

    Raises:
        ValueError: its arguments already say another ratio, or its class has a lower limit.
    """
    if name == "ThinKPress" and ratio > 0.5:
        raise ValueError(
            f"{name} zeroes key channels, which is at most 0.500 of an entry, got {ratio:.3f}"
        )
    implied = implied_ratio(name, kwargs)
    if implied is not None and abs(implied - ratio) > 5e-4:
        raise ValueError(f"{name}: its arguments remove {implied:.3f}, got {ratio:.3f}")


def implied_ratio(name: str, kwargs: Mapping[str, Any]) -> float | None:
    """The ratio that the arguments of a press of `NO_RATIO` say; None where they leave it open."""
    if name == "PerLayerCompressionPress":
        ratios = kwargs["compression_ratios"]
        return float(sum(ratios) / len(ratios))
    if name == "ComposedPress":
        kept = 1.0
        for nested in kwargs["presses"]:
            arguments = nested.get("kwargs") or {}
            own = implied_ratio(nested["class"], arguments)
            if own is None:
                own = float(arguments.get("compression_ratio", 0.0))
            kept *= 1 - own
        return 1 - kept
    return None


def scoring_window(name: str, kwargs: Mapping[str, Any]) -> int:
    """Newest tokens that a press, or one nested in it, needs to score with; 0 for none."""
    own = int(kwargs.get("window_size", 64)) if name in ("SnapKVPress", "PyramidKVPress") else 0
    nested = [kwargs.get("press"), *kwargs.get("presses", [])]
    windows = [
        scoring_window(entry["class"], entry.get("kwargs") or {})
        for entry in nested
        if isinstance(entry, Mapping)
    ]
    return max([own, *windows])


def needs_attention_weights(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether the press, or one nested in it, reads the prompt's attention weights."""
    return _contains(ATTENTION_WEIGHTS, name, kwargs)


def refuses_eager(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether the press, or one nested in it, does not work with eager attention."""
    return _contains(NOT_EAGER, name, kwargs)


def _contains(classes: Collection[str], name: str, kwargs: Mapping[str, Any]) -> bool:
    nested = [
        entry
        for value in kwargs.values()
        for entry in (value if isinstance(value, list) else [value])
        if isinstance(entry, Mapping) and "class" in entry
    ]
    return name in classes or any(
        _contains(classes, entry["class"], entry.get("kwargs") or {}) for entry in nested
    )
