"""Split CIFAR-10 into a public part (animals) for pretraining and a private part (vehicles) for fine-tuning.

    python -m experiments.cifar10.prepare SOURCE OUT

SOURCE holds train.parquet and test.parquet (columns image, label). OUT receives public.parquet and public-test.parquet
(six animals), private.parquet and test.parquet (four vehicles). Each part numbers its labels anew from 0 and keeps their
names in the `datasets` features of the file.
"""

import argparse
import sys
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, disable_progress_bars, load_dataset

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ANIMALS = ["bird", "cat", "deer", "dog", "frog", "horse"]
VEHICLES = ["airplane", "automobile", "ship", "truck"]


def select(data: Dataset, names: list[str]) -> Dataset:
    """The images of the named classes, in their original order; a label is the position in `names`."""
    number = {CLASSES.index(name): position for position, name in enumerate(names)}
    labels = data["label"][:]
    part = data.select([row for row, label in enumerate(labels) if label in number]).cast_column("image", Image(decode=False))
    columns = {"image": part["image"][:], "label": [number[label] for label in part["label"][:]]}
    return Dataset.from_dict(columns, Features({"image": Image(), "label": ClassLabel(names=names)}))


def prepare(source: Path, out: Path) -> None:
    files = {split: source / f"{split}.parquet" for split in ("train", "test")}
    for file in files.values():
        if not file.is_file():
            sys.exit(f"error: {file} does not exist; SOURCE must hold CIFAR-10 as train.parquet and test.parquet")
    disable_progress_bars()
    out.mkdir(parents=True, exist_ok=True)
    parts = {
        "public": ("train", ANIMALS),
        "public-test": ("test", ANIMALS),
        "private": ("train", VEHICLES),
        "test": ("test", VEHICLES),
    }
    for part, (split, names) in parts.items():
        data = load_dataset("parquet", data_files=str(files[split]), split="train")
        chosen = select(data, names)
        chosen.to_parquet(out / f"{part}.parquet")
        print(f"{part}.parquet: {len(chosen)} images of {', '.join(names)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Split CIFAR-10 into public animals and private vehicles.")
    parser.add_argument("source", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("out", type=Path, help="folder for the four parts")
    arguments = parser.parse_args()
    prepare(arguments.source, arguments.out)
