"""Which column of a table is what: named in the settings, or found by type and by the names the field uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from datasets import ClassLabel, Features, Image, LargeList, List, Value
from datasets.features.features import FeatureType

from lalora_flwr.data.class_names import declared_labels
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.words import hint, one_form
from lalora_flwr.settings import DataSettings

IMAGE_NAMES = ("image", "img", "picture", "photo", "file_name")
TEXT_NAMES = ("text", "sentence", "content", "review", "sentence1", "premise", "question1", "question", "document")
PAIRS = {"sentence1": "sentence2", "premise": "hypothesis", "question1": "question2", "question": "sentence", "text": "text_pair"}
PROMPT_NAMES = ("instruction", "prompt", "question", "input", "text")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category")


Pick = Callable[[str, str, Sequence[str]], str]  # what, the name that the user gave, the usual names -> the column


@dataclass(frozen=True)
class Columns:
    """Column names; empty where the task has none."""

    image: str = ""
    text: str = ""
    text_pair: str = ""
    label: str = ""
    response: str = ""
    site: str = ""
    indicators: tuple[str, ...] = ()  # in place of a label, one column of 0 and 1 per class

    @property
    def texts(self) -> tuple[str, ...]:
        """All columns of a site's own table but the images; they are read as texts."""
        return (self.text, self.text_pair, self.label, *self.indicators, self.response)


def column_names(names: Sequence[str]) -> dict[str, str]:
    """The names of a table's columns in the one Unicode form in which they are compared, each with how it is written there.

    Two that differ in nothing else stay as they are.
    """
    forms = {one_form(name): name for name in names}
    return forms if len(forms) == len(names) else {name: name for name in names}


def find_columns(features: Features, settings: DataSettings, task: str, *, shared: bool = False, key: str = "data.{}") -> Columns:
    """The columns of a table for a task.

    Args:
        features: the table's columns, by names as `column_names` has them, and their types.
        settings: names that the user gave.
        task: ``image``, ``text`` or ``language``.
        shared: whether virtual sites share the records; only then ``data.site`` is looked at.
        key: what the setting of a column is called, for errors.

    Raises:
        ConfigError: a named column is missing, one that the task needs cannot be determined, or it holds what the
            task cannot use.
    """
    names = list(features)

    def pick(what: str, given: str, candidates: Sequence[str]) -> str:
        setting, given = key.format(what), given if given in names else one_form(given)
        if given and given not in names:
            raise ConfigError(f"{setting} = {given!r}: no such column; there are {', '.join(names)}{hint(given, names)}")
        found = given or next((name for name in candidates if name in names), "")
        if not found:
            more = _about_indicators(names, settings, key) if what == "label" else ""
            raise ConfigError(f"{setting}: no column found; name one of {', '.join(names)}{more}")
        if wrong := _wrong_kind(features[found], what, settings.problem_type):
            raise ConfigError(f"{setting}: column {found!r} holds {wrong}; name another one of {', '.join(names)}")
        return found

    site = pick("site", settings.site, ()) if shared and settings.site else ""
    if task == "image":
        images = [name for name in names if isinstance(features[name], Image)]
        usual = [name for name in IMAGE_NAMES if not images or name in images]
        image = pick("image", settings.image, images if len(images) == 1 else usual)
        return Columns(image=image, site=site, **_labels(features, settings, pick))
    if task == "language":
        response = pick("response", settings.response, ())
        text = pick("text", settings.text, [name for name in PROMPT_NAMES if name != response])
        return Columns(text=text, text_pair=_pair(names, settings, "", pick), response=response, site=site)
    paired = [first for first, second in PAIRS.items() if second in names]  # before "sentence", which is also a second text
    text = pick("text", settings.text, [*paired, *TEXT_NAMES])
    pair = _pair(names, settings, PAIRS.get(text, ""), pick)
    return Columns(text=text, text_pair=pair, site=site, **_labels(features, settings, pick))


def _wrong_kind(feature: FeatureType, key: str, problem_type: str) -> str:
    """What a column holds, if that is no use: bytes and lists would be read as Python spells them."""
    if isinstance(feature, Value):
        return "bytes, not text" if "binary" in feature.dtype and key != "image" else ""
    if key == "image":
        return "" if not isinstance(feature, dict) or {"bytes", "path"} & set(feature) else "values with neither bytes nor path"
    if isinstance(feature, list | List | LargeList) and key == "label":
        if problem_type == "multi-label":
            return ""
        return "lists: several classes of one record need problem-type multi-label; classes of tokens are not supported"
    return "" if isinstance(feature, ClassLabel) else f"values of type {type(feature).__name__}, not text"


def _pair(names: list[str], settings: DataSettings, usual: str, pick: Pick) -> str:
    if settings.text_pair == "none":
        return ""
    return pick("text-pair", settings.text_pair, (usual,)) if settings.text_pair or usual in names else ""


class _Labels(TypedDict, total=False):
    label: str
    indicators: tuple[str, ...]


def _labels(features: Features, settings: DataSettings, pick: Pick) -> _Labels:
    classes = declared_labels(settings)
    if settings.problem_type == "multi-label" and not settings.label and classes and set(classes) <= set(features):
        return {"indicators": classes}
    return {"label": _label(features, settings, pick)}


def _about_indicators(names: Sequence[str], settings: DataSettings, key: str) -> str:
    """What keeps the classes from being columns of 0 and 1, if some are or nearly are."""
    missing = [name for name in declared_labels(settings) if name not in names]
    near = hint(missing[0], names) if missing else ""
    if settings.problem_type != "multi-label" or not (near or 0 < len(missing) < len(declared_labels(settings))):
        return ""
    setting = key.format("labels") if key.startswith("data.") else "labels"
    return f"; or all of {setting} must be columns, and {missing[0]!r} is none{near}"


def _label(features: Features, settings: DataSettings, pick: Pick) -> str:
    typed = [name for name in features if isinstance(features[name], ClassLabel)]
    usual = [*(name for name in LABEL_NAMES if name in typed), *LABEL_NAMES]
    return pick("label", settings.label, typed if len(typed) == 1 else usual)
