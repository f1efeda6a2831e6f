"""KVGuard: guard compressed key-value caches of language models.

Public names are imported on first use, so that ``import kvguard`` stays cheap.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "KVGuard": "guard",
    "GuardReport": "guard_report",
    "GuardError": "guard_report",
    "CertificateError": "certificate",
    "RowReport": "guard_report",
    "OperatingPoint": "config",
    "Tolerance": "config",
    "Mode": "controller",
    "RunResult": "experiment",
    "format_prompt": "prompts",
    "extract_signals": "signals",
    "detect_all": "detectors",
    "load_config": "config",
    "ConfigError": "config",
}

__all__ = list(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kvguard' has no attribute {name!r}")
    return getattr(import_module(f"kvguard.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
