"""Which code of the library decides a result, and a digest of it.

Snakemake compares a rule's script and its ``params``; it does not follow the script's calls into
the library. `code_digest` closes that gap: it starts at the script, follows names from definition
to definition through the modules of the library, and digests exactly the functions, classes and
constants that it reaches. A rule therefore reruns when code that it runs has changed, in whichever
module, and not when another function of the same module has.

What changes no stored value does not count: comments, docstrings, formatting, annotations of
functions, the wording of errors, log lines.
"""

import ast
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import kvguard
from kvguard.config import digest
from kvguard.files import atomic_path, file_sha256

PACKAGE = Path(__file__).parent

NOT_RESULTS = frozenset({"blocks", "files", "joblog", "untrusted"})
"""Modules whose code changes no stored value."""

_SPEAKERS = frozenset({"logger", "logging", "warnings"})
"""Objects whose methods, called as a statement, only report (logging, consoles)."""

_WHOLE = "*"
"""In place of a definition's name: every definition of the module."""

Definition = tuple[str, str]
"""A module of the library and a name that it defines."""


def code_digest(
    script: str | Path, only: Mapping[str, str] | None = None, package: Path = PACKAGE
) -> str:
    """First 16 hex digits of a SHA-256 over a script and the library code that it reaches.

    Args:
        script: a Python file.
        only: of a constant ``"module.NAME"`` that is a dict literal, the one key whose entry
            counts: what a job of that name reads of a registry.
        package: the folder of the library.

    Raises:
        KeyError: ``only`` names no dict literal that is reached, or a key that it does not have.
    """
    return _digest(_reach(Path(script), only or {}, package))


def definition_digest(module: str, name: str, package: Path = PACKAGE) -> str:
    """First 16 hex digits of a SHA-256 over one definition of the library and all that it reaches.

    Args:
        module: e.g. "plot_failures".
        name: a function, class or constant at its top level.
        package: the folder of the library.

    Raises:
        KeyError: the module defines no such name.
    """
    if name not in _library(module, package).definitions:
        raise KeyError(f"module {module!r} defines no {name!r}")
    return _digest(_follow([(module, name)], {}, package))


class KnownDigests:
    """Digests that an earlier plan computed, valid as long as no source file has changed.

    Reading the whole library takes seconds, and every job of a cluster plans anew.

    Args:
        path: a JSON file, made where there is none; one that cannot be read or written is ignored.
        folders: of the Python files on which the digests depend.
    """

    def __init__(self, path: Path, folders: Iterable[Path]) -> None:
        self.path = path
        files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
        self.sources = digest([(file.name, file_sha256(file)) for file in files])
        self.known: dict[str, str] = {}
        self.added = False
        with suppress(OSError, ValueError, TypeError, KeyError):
            stored = json.loads(path.read_text())
            if stored["sources"] == self.sources:
                self.known = dict(stored["digests"])

    def get(self, key: str, compute: Callable[[], str]) -> str:
        """The digest of that name, computed where it is not known."""
        if key not in self.known:
            self.known[key] = compute()
            self.added = True
        return self.known[key]

    def save(self) -> None:
        """Keep what was computed; another process may do so at the same time."""
        if self.added:
            with suppress(OSError), atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps({"sources": self.sources, "digests": self.known}))


def data_digest(name: str) -> str:
    """SHA-256 of a file that the package carries in ``kvguard/data``."""
    return file_sha256(PACKAGE / "data" / name)


def reached_definitions(
    script: str | Path, only: Mapping[str, str] | None = None, package: Path = PACKAGE
) -> tuple[str, ...]:
    """Definitions of the library that a script reaches, as ``"module.name"``, sorted.

    Arguments are those of `code_digest`.
    """
    pieces = _reach(Path(script), only or {}, package)
    return tuple(sorted(f"{module}.{name}" for module, name in pieces if module))


class _Piece(NamedTuple):
    """One top-level statement of a file, without what does not count."""

    code: str
    names: frozenset[str]  # names used on their own
    attributes: frozenset[tuple[str, str]]  # ``base.attribute`` where ``base`` is a name
    imports: Mapping[str, Definition]  # made inside the statement
    entries: Mapping[str, "_Piece"]  # of a dict literal, by its keys
    kind: type[ast.AST]


class _Module(NamedTuple):
    """What one file defines."""

    definitions: Mapping[str, tuple[_Piece, ...]]
    always: tuple[_Piece, ...]  # statements that define nothing but run on import
    imports: Mapping[str, Definition]


def _reach(script: Path, only: Mapping[str, str], package: Path) -> dict[Definition, list[str]]:
    """Code of the script (module "") and of every definition that it reaches."""
    body = _read(script)
    pieces = [*body.always, *(piece for given in body.definitions.values() for piece in given)]
    uses = [use for piece in pieces for use in _uses("", body, piece)]
    return {("", ""): [piece.code for piece in pieces]} | _follow(uses, only, package)


def _follow(
    start: Iterable[Definition], only: Mapping[str, str], package: Path
) -> dict[Definition, list[str]]:
    """Code of every definition that is reached from ``start``, which is included."""
    found: dict[Definition, list[str]] = {}
    narrowed: set[str] = set()
    waiting = list(start)

    def add(module: str, name: str, body: _Module, pieces: Sequence[_Piece]) -> None:
        full = f"{module}.{name}"
        if full in only:
            narrowed.add(full)
            pieces = [_entry(piece, only[full], full) for piece in pieces]
        found[module, name] = [piece.code for piece in pieces]
        waiting.extend(use for piece in pieces for use in _uses(module, body, piece))

    while waiting:
        module, name = waiting.pop()
        body = _library(module, package)
        while name not in body.definitions and name in body.imports:  # a re-export
            module, name = body.imports[name]
            body = _library(module, package)
        for each in body.definitions if name == _WHOLE else [name]:
            if (module, each) not in found and _counts(module, each, body):
                if (module, "") not in found:
                    add(module, "", body, body.always)
                add(module, each, body, body.definitions[each])
    if narrowed != set(only):
        raise KeyError(f"no {', '.join(sorted(set(only) - narrowed))} is reached")
    return found


def _digest(code: Mapping[Definition, list[str]]) -> str:
    return digest({f"{module}.{name}": texts for (module, name), texts in code.items()})


def _entry(piece: _Piece, key: str, name: str) -> _Piece:
    if key not in piece.entries:
        known = ", ".join(piece.entries) or "it is no dict literal"
        raise KeyError(f"{name} has no entry {key!r}: {known}")
    return piece.entries[key]


def _counts(module: str, name: str, body: _Module) -> bool:
    """Whether a definition can change a stored value.

    Types of the configuration do not: their values reach a job in its params. Functions of the
    schema do not: they check and write what its constants say.
    """
    if module in NOT_RESULTS or name not in body.definitions:
        return False
    first = body.definitions[name][0]
    if module.startswith("config"):
        return first.kind is not ast.ClassDef and " = Annotated[" not in first.code
    return not (module == "schema" and first.kind in (ast.FunctionDef, ast.ClassDef))


def _uses(here: str, body: _Module, piece: _Piece) -> Iterator[Definition]:
    """Definitions of the library that one piece of code names."""
    imports = {**body.imports, **piece.imports}

    def resolve(name: str, attribute: str | None) -> Iterator[Definition]:
        module, imported = imports.get(name, (here, name))
        if name not in imports:
            if here and name in body.definitions:
                yield here, name
        elif imported != _WHOLE:
            yield module, imported
        else:
            yield module, _WHOLE if attribute is None else attribute

    for name in piece.names:
        yield from resolve(name, None)
    for name, attribute in piece.attributes:
        yield from resolve(name, attribute)


def _library(module: str, package: Path) -> _Module:
    """A module of the library; an empty one where there is none, as behind a name of the package
    itself."""
    path = package / f"{module}.py"
    return _read(path) if path.is_file() else _Module({}, (), {})


def _read(path: Path) -> _Module:
    status = path.stat()
    return _parse(path, status.st_mtime_ns, status.st_size)


@cache
def _parse(path: Path, _time: int, _size: int) -> _Module:
    tree = ast.parse(path.read_text(), filename=str(path))
    definitions: dict[str, list[_Piece]] = {}
    always: list[_Piece] = []
    imports: dict[str, Definition] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            imports.update(_imported(statement))
        elif _is_text(statement):
            continue
        else:
            names = _defined(statement)
            if isinstance(statement, ast.Expr):
                names = [name for name in names if name in definitions]
            inner = [node for node in ast.walk(statement) if _is_import(node)]
            if isinstance(statement, ast.If | ast.Try) and len(inner):
                for node in inner:  # imports for type checking, or with a fallback
                    imports.update(_imported(node))
            piece = _piece(statement)
            for name in names:
                definitions.setdefault(name, []).append(piece)
            if not names and piece.code != "pass":
                always.append(piece)
    return _Module(
        {name: tuple(given) for name, given in definitions.items()}, tuple(always), imports
    )


def _is_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def _imported(node: ast.AST) -> dict[str, Definition]:
    """Names that an import binds to the library, with what they stand for."""
    bound: dict[str, Definition] = {}
    if isinstance(node, ast.Import):
        for alias in node.names:
            parts = alias.name.split(".")
            if parts[0] == "kvguard" and len(parts) == 2:
                bound[alias.asname or "kvguard"] = (parts[1], _WHOLE)
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
        parts = node.module.split(".")
        for alias in node.names if parts[0] == "kvguard" else []:
            name = alias.asname or alias.name
            if len(parts) == 2:
                bound[name] = (parts[1], alias.name)
            elif alias.name in kvguard._PUBLIC:
                bound[name] = (kvguard._PUBLIC[alias.name], alias.name)
            else:
                bound[name] = (alias.name, _WHOLE)
    return bound


def _defined(statement: ast.stmt) -> list[str]:
    """Names that a top-level statement binds or changes."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.If | ast.Try | ast.For | ast.While | ast.With):
        inner = [node for node in ast.walk(statement) if isinstance(node, ast.stmt)]
        return [name for node in inner if node is not statement for name in _defined(node)]
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
        targets = [statement.target]
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        targets = [statement.value.func]  # NAME.update(...) changes NAME
    else:
        return []
    names: list[str] = []
    while targets:
        target = targets.pop()
        if isinstance(target, ast.Tuple | ast.List):
            targets.extend(target.elts)
        elif isinstance(target, ast.Subscript | ast.Attribute | ast.Starred):
            targets.append(target.value)
        elif isinstance(target, ast.Name) and target is not getattr(
            getattr(statement, "value", None), "func", None
        ):
            names.append(target.id)
    return names


def _piece(statement: ast.stmt) -> _Piece:
    """A statement's code, names and imports; of a dict literal, those of each entry as well."""
    counted = _Counted().visit(statement)
    if counted is None:
        return _summed(ast.Pass())
    ast.fix_missing_locations(counted)
    entries: dict[str, _Piece] = {}
    value = getattr(counted, "value", None)
    if isinstance(counted, ast.Assign | ast.AnnAssign) and isinstance(value, ast.Dict):
        for key, entry in zip(value.keys, value.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                entries[key.value] = _summed(entry)
    return _summed(counted)._replace(entries=entries)


def _summed(node: ast.AST) -> _Piece:
    names: set[str] = set()
    attributes: set[tuple[str, str]] = set()
    imports: dict[str, Definition] = {}
    bases: set[int] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            attributes.add((part.value.id, part.attr))
            bases.add(id(part.value))
        elif isinstance(part, ast.Name) and id(part) not in bases:
            names.add(part.id)
        elif _is_import(part):
            imports.update(_imported(part))
    return _Piece(
        ast.unparse(node), frozenset(names), frozenset(attributes), imports, {}, type(node)
    )


def _is_text(node: ast.stmt) -> bool:
    """Whether a statement is a docstring: a constant that nothing uses."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


class _Counted(ast.NodeTransformer):
    """Drops what changes no stored value; a block that becomes empty is ``pass``."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if field == "body" and block == []:
                node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        call = node.value
        if _is_text(node):
            return None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            base = call.func.value
            if isinstance(base, ast.Name) and base.id in _SPEAKERS:
                return None
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return _Unworded().visit(self.generic_visit(node))  # type: ignore[no-any-return]

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)


class _Unworded(ast.NodeTransformer):
    """Replaces texts by an empty one."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("") if isinstance(node.value, str) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.Constant("")
