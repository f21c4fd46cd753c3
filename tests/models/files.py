"""Small files of records for the tasks, with words that the tiny tokenizers know."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

ANSWER = r"#### (\S+)"


def texts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Single texts about films: good ones are 1."""
    chance = random.Random(seed)
    rows = []
    for i in range(count):
        words = chance.choices(["the", "film", "is", "a", "plot", "actor", "long", "short"], k=chance.randint(1, 7))
        words.insert(chance.randrange(len(words) + 1), ("bad", "good")[i % 2])
        rows.append({"sentence": " ".join(words), "label": i % 2})
    return rows


def pairs(count: int, classes: int = 3) -> list[dict[str, Any]]:
    """Pairs of texts; the class is in the second."""
    seconds = ("not good", "very good", "fine", "poor")
    firsts = [row["sentence"] for row in texts(count, seed=1)]
    return [{"first": first, "second": seconds[i % classes], "label": i % classes} for i, first in enumerate(firsts)]


def scored(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts with the classes ``good`` and ``long`` as a list, and with a number from 0 to 10 that follows from them."""
    rows = texts(count, seed)
    for row in rows:
        words = row["sentence"].split()
        row["label"] = [name for name in ("good", "long") if name in words]
        row["score"] = 6.0 * ("good" in words) + 3.5 * ("long" in words)
    return rows


def sums(count: int) -> list[dict[str, Any]]:
    """Prompts and responses with an answer in all but one; the second part of the prompt is missing now and then."""
    rows = []
    for i in range(count):
        a, b = i % 5, i % 4
        said = f"the answer is #### {a + b}" if i != 3 else "very long"
        rows.append({"prompt": f"how much is {a} plus {b}", "more": ("a short answer", "")[i % 2], "response": said})
    return rows


def save_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """JSON lines; returns what ``data.name`` calls them."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"file:{path}"
