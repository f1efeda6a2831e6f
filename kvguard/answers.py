"""Final answers read out of a text: numbers in canonical form, after ``####`` or in a box."""

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,2}}(?![0-9]))?"
_NUMBER = re.compile(
    rf"""
    [\s(\[{{:≈]*+ (?:(?:the\s++)?(?:final\s++)?answer(?:\s++is)?\s*+:?\s*+)?
    (?P<sign>[-+]?) \s*+
    (?:
        (?:(?P<whole>{_INTEGER})\s++(?=[0-9.]))?
        (?P<over>[-+]?{_DECIMAL}) \s*+/\s*+ (?P<under>[-+]?{_DECIMAL})
      | (?P<plain>{_DECIMAL})
    )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013\u2010\u2011\ufe63\uff0d", "-"),
        **{
            character: " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")
            for character in map(chr, (0xBC, 0xBD, 0xBE, *range(0x2153, 0x215F)))
        },
    }
)
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2"),
        (r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r" \1 "),
        (r"(?<=[0-9])(?:\{,\}|,?\\[,!;]|[\u00a0\u2009\u202f])(?=[0-9]{3})", ","),
        (r"\\(?:left|right|boxed|quad|[()\[\],!;: ])", " "),
        (r"\b(?:USD|EUR|GBP|INR|CAD|AUD|US(?=\s?\\?\$)|Rs\.?)\s*(?=[-+.0-9\\$£€₹])", ""),
        (r"[\\$£€¥₹₩*_`~]", ""),
    )
]
_MARKER = re.compile(r"(?<!#)####(?!#)\s*([^\n]*)")
_BOXED = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"[{}]")
_MAX_BOXES = 64  # a text of nested boxes would be read once a box


def canonical_number(text: str) -> str | None:
    """The number that a text starts with, written so that equal values compare equal.

    Signs, thousands separators, currency, LaTeX, decimals, fractions and mixed numbers are read;
    what follows the number (units, a percent sign, a full stop) is not. After "a = b", b counts.

    Args:
        text: e.g. "$1,000.00", "-3 apples", r"\\frac{1}{2}", "1 1/2 cups", "50%".

    Returns:
        An integer ("1000") or a fraction in lowest terms ("3/2"); None where no number is.
    """
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.translate(_CHARACTERS)
    found = _NUMBER.match(text.rpartition("=")[2]) or _NUMBER.match(text)
    if found is None:
        return None
    parts = {name: part.replace(",", "") for name, part in found.groupdict().items() if part}
    try:
        if "plain" in parts:
            value = Fraction(parts["plain"])
        else:
            value = Fraction(parts["over"]) / Fraction(parts["under"])
            value += int(parts.get("whole", "0"))
        return str(-value if parts.get("sign") == "-" else value)
    except (ValueError, ZeroDivisionError):  # more digits than Python converts, or a zero below
        return None


def extract_answer(text: str) -> str | None:
    """The final answer of a text, in canonical form: the last ``#### number``, else the last box.

    Args:
        text: a generated text.

    Returns:
        See `canonical_number`; None when neither ``####`` nor ``\\boxed{}`` holds a number, which
        is not the same as a wrong answer.
    """
    for content in reversed(_MARKER.findall(text)):
        if (answer := canonical_number(content)) is not None:
            return answer
    for content in _boxes(text):
        if (answer := canonical_number(content)) is not None:
            return answer
    return None


def _boxes(text: str) -> Iterator[str]:
    """Contents of the boxes that are closed, the last opened first, of the last `_MAX_BOXES`."""
    opened = {box.end() for box in _BOXED.finditer(text)}
    waiting: list[int] = []
    closed: dict[int, int] = {}
    for brace in _BRACE.finditer(text) if opened else ():
        if brace[0] == "{":
            waiting.append(brace.end())
        elif waiting:
            closed[waiting.pop()] = brace.start()
    for start in sorted(opened & closed.keys(), reverse=True)[:_MAX_BOXES]:
        yield text[start : closed[start]]
