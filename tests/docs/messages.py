"""The texts that code can say, as patterns: what a program puts in stands as ``…``."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

VALUE = "…"


def templates(files: Iterable[Path]) -> set[str]:
    """Every text in the code of these files but docstrings; adjoining literals are one, and values stand as `VALUE`."""
    return {text for path in files for text in _texts(ast.parse(path.read_text(encoding="utf-8")))}


def _texts(tree: ast.AST) -> Iterator[str]:
    alone = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings say nothing to users
    for node in ast.walk(tree):
        if node in alone:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values)


def occurs(message: str, known: Iterable[str]) -> bool:
    """Whether one of the known texts holds the fixed parts of a message in their order."""
    parts = [part for part in message.split(VALUE) if part.strip(" :;,.")]
    return bool(parts) and any(_holds(text, parts) for text in known)


def _holds(text: str, parts: list[str]) -> bool:
    at = 0
    for part in parts:
        found = text.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True
