"""Lists in one text, as keys and node-configs hold them."""

from __future__ import annotations

import csv
import io
import math
import unicodedata
from collections.abc import Iterable


def listed(text: str) -> list[str]:
    """The comma-separated names in a text, in order, without blanks around them, and in one Unicode form (NFC).

    A name that holds a comma stands in double quotes.
    """
    rows = csv.reader(unicodedata.normalize("NFC", text).splitlines(), skipinitialspace=True)
    return [name.strip() for row in rows for name in row if name.strip()]


def joined(names: Iterable[str]) -> str:
    """The text that `listed` takes apart."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(names)
    return line.getvalue()


def ends_of(text: str) -> tuple[float, float]:
    """The range ``low,high``, whose ends belong to it.

    Raises:
        ValueError: it is not two finite numbers, the smaller first, or they are so close that float64 has no middle between them.
    """
    low, high = (float(part) for part in text.split(","))
    if "_" in text or not (low < low + (high - low) / 2 < high and math.isfinite(high - low)):
        raise ValueError("not two numbers, the smaller first")
    return low, high
