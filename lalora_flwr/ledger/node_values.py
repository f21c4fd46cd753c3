"""Values of a node-config: each reader takes what Flower parsed and says in words what it takes, never what it got."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import expanded
from lalora_flwr.ground.lists import ends_of, listed
from lalora_flwr.ground.words import is_text

RESIDENT_SECONDS = 600.0  # what resident-seconds is if a node-config does not say it; here, where no torch is needed
Reader = Callable[[Any], Any]  # raises ValueError with what the key "must be"


def text(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or not is_text(value):
        raise ValueError("a text")
    return value


def place(value: object) -> str:
    """A file or folder, which need not be there."""
    try:
        expanded(text(value))
    except ConfigError:
        raise ValueError("a path; its user has no home folder here") from None
    return str(value)


LONGEST = 1000  # letters of a short text, which travels


def short_text(value: object) -> str:
    if len(text(value)) > LONGEST:
        raise ValueError(f"a text of at most {LONGEST} letters")
    return text(value)


def names(value: object) -> tuple[str, ...]:
    """Comma-separated names in order; one that holds a comma stands in double quotes."""
    found = tuple(listed(text(value)))
    if not found or len(set(found)) < len(found):
        raise ValueError("a text of comma-separated names, each once")
    return found


def number(value: object, low: float = 0.0, high: float = math.inf) -> float:
    """A number above ``low`` and below ``high``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
        raise ValueError(f"a number above {low:g}" + (f" and below {high:g}" if high < math.inf else ""))
    return float(value)


def below(high: float) -> Reader:
    return lambda value: number(value, high=high)


def at_least(low: int) -> Reader:
    def read(value: object) -> int:
        if type(value) is not int or value < low:
            raise ValueError(f"a whole number of at least {low}")
        return value

    return read


def positive_range(value: object) -> tuple[float, float]:
    """``"low,high"``: two positive numbers, the smaller first; both ends belong to the range."""
    try:
        low, high = (float(part) for part in text(value).split(","))
    except ValueError:
        low = high = math.nan
    if not 0 < low <= high < math.inf:
        raise ValueError('a text of two numbers above 0, such as "0.1,10"')
    return low, high


def any_range(value: object) -> str:
    """``"low,high"``: two numbers, the smaller first."""
    try:
        ends_of(text(value))
    except ValueError:
        raise ValueError('a text of two numbers, the smaller first, such as "0,120"') from None
    return str(value)


def seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 3600:
        raise ValueError("a number of seconds from 0 to 3600")
    return float(value)


def switch(value: object) -> bool:
    """``true`` or ``false``, with or without quotes."""
    if str(value).lower() not in ("true", "false"):
        raise ValueError("true or false")
    return str(value).lower() == "true"


def one_of(*values: str) -> Reader:
    def read(value: object) -> str:
        if value not in values:
            raise ValueError("one of " + ", ".join(values))
        return str(value)

    return read
