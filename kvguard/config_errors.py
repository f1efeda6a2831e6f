"""What is wrong with a configuration, field by field, in words."""

import difflib
import re
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import ValidationError

from kvguard.config_types import Section, shortened


def explain(error: ValidationError, values: Mapping[str, Any], root: type[Section]) -> str:
    """One line per field that is wrong: its path, what is accepted, and what was given.

    Args:
        error: of pydantic.
        values: what was checked.
        root: against what.
    """
    lines: dict[str, list[str]] = {}
    for problem in error.errors():
        kind, given, context = problem["type"], problem["input"], problem.get("ctx", {})
        path = _written_path(problem["loc"], values, missing=kind == "missing")
        message = problem["msg"].removeprefix("Value error, ").replace("Input should", "should")
        if kind == "value_error" and (named := re.match(r"([\w.]+): ", message)):
            path.append(named[1])
            message = message[named.end() :]
            for part in named[1].split("."):
                given = given.get(part) if isinstance(given, Mapping) else given
        elif kind == "extra_forbidden":
            known = _known_keys(problem["loc"], root)
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            message = f"unknown key{hint} Known here: {', '.join(known)}"
        elif kind == "missing":
            message = "required, but not given"
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            path.append(context["discriminator"].strip("'"))
            given = context.get("tag")
            accepted = context.get("expected_tags") or "'wheel', 'gguf', 'hub', 'local'"
            message = f"should be one of {accepted}"
        elif kind == "dict_type" or kind == "model_type":
            message = "should be a mapping"
        if kind != "missing" and not re.search(r"\bgot ", message):
            message += f" (got {shortened(given)})"
        lines.setdefault(".".join(path) or "configuration", []).append(message)
    listed = [f"  {field}: {' or '.join(messages)}" for field, messages in lines.items()]
    return "the configuration cannot be used:\n" + "\n".join(listed)


def _written_path(loc: tuple[int | str, ...], values: Any, *, missing: bool) -> list[str]:
    """The parts of pydantic's location that the user wrote, without tags of unions."""
    path: list[str] = []
    for index, part in enumerate(loc):
        indexed = isinstance(values, list | tuple) and isinstance(part, int)
        if indexed or (isinstance(values, Mapping) and part in values):
            values = values[part]
        elif not (missing and index == len(loc) - 1):
            continue
        path.append(str(part))
    return path


def _known_keys(loc: tuple[int | str, ...], root: type[Section]) -> list[str]:
    """The keys that the section around a location accepts."""
    sections: list[type[Section]] = [root]
    for part in loc[:-1]:
        inner = [
            section
            for outer in sections
            for name, field in outer.model_fields.items()
            if part in (name, field.alias)
            for section in _sections(field.annotation)
        ]
        tagged = [
            section
            for section in sections
            for name in ("source", "kind")
            if name in section.model_fields
            and part in get_args(section.model_fields[name].annotation)
        ]
        sections = inner or tagged or sections
    return [
        field.alias or name for section in sections for name, field in section.model_fields.items()
    ]


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]
