"""Prometheus' text format, for node_exporter's textfile collector, which reads every ``*.prom`` file of one folder.

A site needs no library for it: each package that it installs is code beside its records, and the format is a line a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lalora_flwr.ground.files import PUBLIC, replace_file

LONGEST_LABEL = 200  # letters of a label's value
_SAMPLE = re.compile(r'(?P<name>[a-z_]+)(?:\{(?P<labels>(?:[a-z_]+="(?:[^"\\]|\\.)*",?)*)\})? (?P<value>\S+)')
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')
_ESCAPED = {"\\": "\\\\", '"': '\\"', "\n": "\\n"}
Labels = tuple[tuple[str, str], ...]
Samples = dict[tuple[str, Labels], float]


@dataclass(frozen=True)
class Family:
    """All values of one name.

    Attributes:
        name: lower-case letters and underscores, with the unit at its end; ``…_total`` if it only grows.
        help: what it is, in one line.
        values: by labels; those that are None are left out.
    """

    name: str
    help: str
    values: Mapping[Labels, float | None] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return "counter" if self.name.endswith("_total") else "gauge"


def labels(**named: object) -> Labels:
    """Labels in their order, each value as text of bounded length."""
    return tuple((name, str(value)[:LONGEST_LABEL]) for name, value in named.items())


def exposition(families: Iterable[Family]) -> str:
    """The text of a file; families without a value are left out."""
    lines: list[str] = []
    for family in families:
        found = [(of, value) for of, value in family.values.items() if value is not None]
        if found:
            lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]
        lines += [f"{family.name}{_braced(of)} {_number(value)}" for of, value in found]
    return "".join(line + "\n" for line in lines)


def _braced(of: Labels) -> str:
    pairs = ",".join(f'{name}="{"".join(_ESCAPED.get(letter, letter) for letter in value)}"' for name, value in of)
    return f"{{{pairs}}}" if pairs else ""


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return "NaN" if math.isnan(value) else repr(value)


def samples_of(text: str) -> Samples:
    """What `exposition` wrote, by name and labels; lines of another form are passed over."""
    found: Samples = {}
    for line in text.split("\n"):  # a label may hold what Python takes for other ends of a line
        if match := _SAMPLE.fullmatch(line):
            of = tuple((name, _plain(value)) for name, value in _LABEL.findall(match["labels"] or ""))
            with suppress(ValueError):
                found[match["name"], of] = float(match["value"])
    return found


def _plain(value: str) -> str:
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], value)


def write_metrics(path: Path, families: Iterable[Family]) -> None:
    """Put the families at ``path``, for everybody to read: node_exporter belongs to another user.

    It need not survive a power cut, so nothing waits for the disk.

    Raises:
        OSError: it cannot be written; the old content is then still there.
    """
    replace_file(path, exposition(families), durable=False, mode=PUBLIC)
