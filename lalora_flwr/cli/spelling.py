"""Output on terminals and in files whose encoding lacks Greek letters: they are spelt out."""

from __future__ import annotations

import codecs
import io
from typing import TextIO

SPELT = {
    "ε": "epsilon",
    "δ": "delta",
    "σ": "sigma",
    "β": "beta",
    "≤": "<=",
    "≥": ">=",
    "±": "+-",
    "→": "->",
    "←": "<-",
    "—": "-",
    "…": "...",
}
HANDLER = "lalora-spelling"


def _spelling(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(SPELT.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


def spell_out(stream: TextIO) -> None:
    """Let a stream write what its encoding has no letter for in letters that it has."""
    codecs.register_error(HANDLER, _spelling)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=HANDLER)
