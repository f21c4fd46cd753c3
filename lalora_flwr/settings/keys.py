"""What a run-config key is: its default, its documentation, what it takes, and what it is about."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from lalora_flwr.ground.registry import Registry

Value = bool | int | float | str


class Kind(StrEnum):
    """What a key is about. Comparisons, resumption and reports go by it."""

    METHOD = "method"  # what is computed
    BUDGET = "budget"  # what a fair comparison holds equal: data, rounds, steps, δ
    PERFORMANCE = "performance"  # what the computation costs, not what comes out
    PLACE = "place"  # where a run lies, what it is called, and who follows it


@dataclass(frozen=True)
class Key:
    """One documented run-config key.

    Attributes:
        name: in kebab-case behind the name of its group, ``privacy.clip-norm``.
        default: its type is the key's.
        doc: one line.
        takes: what it takes in words; empty if any value of its type.
        check: the same as a test.
        kind: what it is about.
        registry: whose names it takes.
        words: what it takes besides those names; one that goes on in angle brackets, as ``file:<glob or folder>``, with any
            text in their place.
    """

    name: str
    default: Value
    doc: str
    takes: str
    check: Callable[[Any], bool]  # a value of the type of the default
    kind: Kind
    registry: Registry | None = None
    words: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """What it takes in words, with the names of the registry as it is now; empty if any value of its type."""
        return self.takes if self.registry is None else "one of " + self.registry.listed(*self.words)

    def refusal(self, value: Value) -> str:
        """What a value of the right type must be instead; empty if it is allowed."""
        if self.registry is None:  # NaN fails every comparison, and so every check
            return "" if self.check(value) else self.takes
        name = str(value)
        if self.registry.arguments and name.partition(":")[0] in self.registry:
            return ""  # the argument is judged by what the name stands for, in `lalora_flwr.settings.rules`
        if any(_is_word(name, word) for word in self.words) or name in self.registry:
            return ""
        return "one of " + self.registry.suggest(name, *self.words)


def _is_word(value: str, word: str) -> bool:
    start, bracket, _ = word.partition("<")
    return value.startswith(start) and len(value) > len(start) if bracket else value == word


# The functions below make fields of dataclasses that are annotated with the type of the value, which only Any allows.
# A field without a kind has that of its group.


def key(
    default: Value,
    doc: str,
    takes: str = "",
    check: Callable[[Any], bool] = lambda _: True,
    *,
    kind: Kind | None = None,
    registry: Registry | None = None,
    words: tuple[str, ...] = (),
) -> Any:
    """A field that holds everything of a `Key` but the name."""
    about = {"doc": doc, "takes": takes, "check": check, "kind": kind, "registry": registry, "words": words}
    return field(default=default, metadata=about)


def choice(default: str, doc: str, *values: str, kind: Kind | None = None) -> Any:
    return key(default, doc, "one of " + ", ".join(values), lambda v: v in values, kind=kind)


def named(default: str, doc: str, registry: Registry, *words: str) -> Any:
    """A name of a registry, with what it takes behind a colon, or one of a few words (see `Key`)."""
    return key(default, doc, registry=registry, words=words)


def at_least(low: int, default: int, doc: str, *, kind: Kind | None = None) -> Any:
    return key(default, doc, f"a whole number of at least {low}", lambda v: v >= low, kind=kind)


def whole(low: int, high: int, default: int, doc: str, *, kind: Kind | None = None) -> Any:
    return key(default, doc, f"a whole number from {low} to {high}", lambda v: low <= v <= high, kind=kind)


def positive(default: float, doc: str, *, kind: Kind | None = None) -> Any:
    return key(default, doc, "a finite number above 0", lambda v: v > 0 and math.isfinite(v), kind=kind)


def within(low: float, high: float, default: float, doc: str) -> Any:
    """A number in a range wider than any use of it: beyond lie only numbers that float32 cannot compute with."""
    return key(default, doc, f"a number from {low:g} to {high:g}", lambda v: low <= v <= high)


def non_negative(default: float, doc: str, *, kind: Kind | None = None) -> Any:
    return key(default, doc, "a finite number of at least 0", lambda v: v >= 0 and math.isfinite(v), kind=kind)
