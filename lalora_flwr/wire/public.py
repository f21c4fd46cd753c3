"""Small public messages in free form: JSON texts of bounded length."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NoReturn

Json = str | int | float | bool | None | Sequence["Json"] | Mapping[str, "Json"]
Public = Mapping[str, Json]  # what everybody may know: a directive, what a transport needs, the notes of a merge
LONGEST = 1 << 20  # letters


def written(message: Public) -> str:
    """The text of a message.

    Raises:
        ValueError: it holds what JSON cannot, or is longer than `LONGEST`.
    """
    text = json.dumps(message, sort_keys=True, separators=(",", ":"), allow_nan=False)
    if len(text) > LONGEST:
        raise ValueError(f"a public message of {len(text)} letters; at most {LONGEST} travel")
    return text


def read(text: object) -> dict[str, Json]:
    """The message of a text.

    Raises:
        ValueError: it is not the text of a message.
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        raise ValueError("not the text of a public message")
    try:
        message = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(message, dict):
        raise ValueError("no names with values")
    return message


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")
