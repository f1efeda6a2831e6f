"""JSON schema of the configuration, for editors and for workflows that render its parameters.

``make schema`` writes ``config.schema.json``; definitions are inlined, because tools that render a
schema as a table rarely follow references.
"""

import json
from pathlib import Path
from typing import Any

from kvguard.config import Config

FILE_NAME = "config.schema.json"


def config_schema() -> dict[str, Any]:
    """The schema of `config.Config` with every reference replaced by what it names."""
    schema = Config.model_json_schema(by_alias=True)
    definitions = schema.pop("$defs", {})
    inlined: dict[str, Any] = _inline(schema, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **inlined}


def _inline(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_inline(part, definitions) for part in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        named = definitions[node["$ref"].removeprefix("#/$defs/")]
        node = named | {key: value for key, value in node.items() if key != "$ref"}
    # the mapping of a discriminator can only name references; `oneOf` says the same
    return {
        key: _inline(value, definitions) for key, value in node.items() if key != "discriminator"
    }


def write_schema(folder: str | Path) -> Path:
    """Write `FILE_NAME` into a folder.

    Returns:
        the path of the file.
    """
    path = Path(folder) / FILE_NAME
    path.write_text(json.dumps(config_schema(), indent=2) + "\n")
    return path


if __name__ == "__main__":
    print(write_schema(Path()))
