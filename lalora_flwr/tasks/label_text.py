"""A label as it is compared."""

from __future__ import annotations

import re

from lalora_flwr.ground.words import one_form


def as_text(value: object) -> str | None:
    """A label as it is compared; None if it is missing.

    Equal are the Unicode forms of one text (NFC), ``TRUE`` and ``true``, and a whole number with and without ``.0``, as files
    with gaps write it. Texts as long as no class is called are equal only as they are written.
    """
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, bool):
        return str(value).lower()  # as JSON has it
    text = one_form(str(value).strip()).strip()
    if text.lower() in ("true", "false"):
        return text.lower()
    if re.fullmatch(r"[+-]?[0-9]+\.0+", text):
        text = text.partition(".")[0]
    return text or None
