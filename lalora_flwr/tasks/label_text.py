"""A label as it is compared."""

from __future__ import annotations

import re
import unicodedata

LONGEST = 1024  # characters that are brought to NFC, which takes the square of a text's combining marks


def as_text(value: object) -> str | None:
    """A label as it is compared; None if it is missing.

    Equal are the Unicode forms of one text (NFC), ``TRUE`` and ``true``, and a whole number with and without ``.0``, as files
    with gaps write it. Texts above `LONGEST`, as no class is called, are equal only as they are written, so that no record's
    label takes long.
    """
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, bool):
        return str(value).lower()  # as JSON has it
    text = str(value).strip()
    if len(text) <= LONGEST:
        text = unicodedata.normalize("NFC", text).strip()
    if text.lower() in ("true", "false"):
        return text.lower()
    if re.fullmatch(r"[+-]?[0-9]+\.0+", text):
        text = text.partition(".")[0]
    return text or None
