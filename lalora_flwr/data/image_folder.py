"""A folder with one sub-folder of images per class; what is read here are names only, never an image.

``datasets`` has a reader too, but it takes a file ``test-1.png`` for a test split, and drops the classes if there is only one
or if a stray image lies elsewhere: one record would decide about the others.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as Pil


def read_image_folder(folder: Path, split_of: Callable[[str], str], order: Callable[[set[str]], Sequence[str]]) -> DatasetDict:
    """Columns ``image`` and ``label`` of a folder of class folders, or of a folder of such folders, one per split.

    Args:
        folder: the whole.
        split_of: the split that a sub-folder's name stands for, or an empty text.
        order: puts the names of the classes in order.

    Raises:
        ValueError: no image in a class folder.
    """
    found = {
        split: [(str(image), kind.name) for kind in kinds for image in images_in(kind)]
        for split, kinds in class_folders(folder, split_of).items()
    }
    found = {split: images for split, images in found.items() if images}
    if not found:
        raise ValueError("no table and no sub-folder of images per class")
    names = list(order({name for images in found.values() for _, name in images}))
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    made = {}
    for split, images in found.items():
        columns = {"image": [path for path, _ in images], "label": [name for _, name in images]}
        made[split] = Dataset.from_dict(columns, features)
    return DatasetDict(made)


def class_folders(folder: Path, split_of: Callable[[str], str]) -> dict[str, list[Path]]:
    """The class folders of each split; no image is looked for. A folder without splits is ``train``."""
    inner = _folders(folder)
    places = [("train", folder)]
    if any(split_of(sub.name) and _folders(sub) for sub in inner):
        places = [(split_of(sub.name) or sub.name, sub) for sub in inner]
    found: dict[str, list[Path]] = {}
    for split, place in places:
        if kinds := _folders(place):
            found.setdefault(split, []).extend(kinds)
    return found


def _folders(folder: Path) -> list[Path]:
    return sorted(sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith("."))


def images_in(folder: Path) -> list[Path]:
    """The files below a class folder that are images by their suffix, in order."""
    Pil.init()
    kinds = {suffix for suffix, name in Pil.registered_extensions().items() if name in Pil.OPEN}
    inside = (folder / name for name in sorted(glob.glob("**", root_dir=folder, recursive=True)))
    return [path for path in inside if path.suffix.lower() in kinds and path.is_file()]
