"""Records and settings of a small run on texts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any


def save_texts(path: Path, count: int, seed: int) -> Path:
    """A CSV or Parquet file of labelled texts, in the words of `tests.models.folders`."""
    from datasets import Dataset

    chance = random.Random(seed)
    labels = [chance.choice(("bad", "good")) for _ in range(count)]
    table = Dataset.from_dict({"text": [f"the film is very {label}" for label in labels], "label": labels})
    _ = table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path)
    return path


def text_run(folder: Path, **overrides: Any) -> dict[str, Any]:
    """Run-config of two short rounds on two sites with a tiny text model, which is made under ``folder`` if it is missing."""
    from tests.models.folders import save_hf

    if not (folder / "model").exists():
        save_hf(folder / "model", "bert", "base")
        save_texts(folder / "public.csv", 30, seed=0)
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in overrides.items()}
    return {
        "num-rounds": 2,
        "num-supernodes": 2,
        "max-failures": 0,
        "output-dir": str(folder / "runs"),
        "run-name": "run",
        "model.name": f"hf/{folder / 'model'}",
        "data.name": "sites",
        "data.labels": "bad,good",
        "data.test": f"file:{folder / 'public.csv'}",
        "lora.rank": 2,
        "train.local-steps": 2,
        "train.batch-size": 10,
        "privacy.epsilon": 4.0,
        **named,
    }
