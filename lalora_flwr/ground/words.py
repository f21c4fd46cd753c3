"""Words that tables, plots and the console share."""

from __future__ import annotations

import difflib
import math
import unicodedata
from collections.abc import Iterable

LONGEST = 1024  # characters that are brought to NFC, which takes the square of a text's combining marks


def one_form(text: str) -> str:
    """A text in the Unicode form in which names are compared (NFC), so that é is é however it was typed.

    One above `LONGEST`, as nothing is called, stays as it is written, so that no text takes long.
    """
    return unicodedata.normalize("NFC", text) if len(text) <= LONGEST else text


def is_text(value: str) -> bool:
    """Whether files can hold it: JSON and names of files can say half of a surrogate pair, which UTF-8 has no bytes for."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def hint(wrong: str, names: Iterable[str]) -> str:
    """``; did you mean …?`` for a name that is close to one that there is; else empty."""
    known = {name.lower(): name for name in names}
    near = difflib.get_close_matches(wrong.lower(), known, n=1)
    return f"; did you mean {known[near[0]]!r}?" if near else ""


def epsilon_label(epsilon: float, *, said: bool = False) -> str:
    """``ε = 3``, or ``non-private``; with ``said`` the latter names its ε too, for a column or a panel among others."""
    return f"ε = {epsilon:g}" if math.isfinite(epsilon) else "non-private (ε = inf)" if said else "non-private"
