"""Data sets that ``data.name`` takes by a name of their own: those of this package, and those of any other that is installed.

A package adds one through the entry-point group ``lalora.datasets``; `DATASETS.register` adds one in this process only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lalora_flwr.data.records import Records
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings import Settings
from lalora_flwr.settings.choices import DATASETS

if TYPE_CHECKING:
    from datasets import Dataset

MODELS = {"image": ("images", "a timm/ model"), "text": ("texts", "an hf/ model"), "language": ("texts", "an hf/ model")}


@dataclass(frozen=True)
class NamedDataSet:
    """What a data set with a name gives. It is for virtual sites, which share its private records.

    Records are tensors that a model takes as they are, or a table whose columns are found or named as those of a file. Nothing is
    read before ``private``, ``public`` or ``owners`` is called; each has to give the same records in every process.

    Attributes:
        task: ``image``, ``text`` or ``language``.
        labels: names of the classes, in the order of their numbers; empty for language modelling.
        records: how many private records there are, so that a run can be priced without them. Of a table this counts the rows
            that can be used: those with all that the task needs.
        license: of the records, in a few words.
        private: reads the private records: images (records, *input_shape), as float32, with labels (records,), as int64; or a
            table.
        public: reads the records that the server evaluates on, of the same kind; none of them is private.
        input_shape: shape of one image (channels, height, width) if the records are tensors; None for a table.
        owners: reads whose each private record is, for ``data.partition = natural``; None: nobody knows. Only for tensors: of a
            table ``data.site`` names the column.
        problem_type, label_range: what ``data.problem-type`` and ``data.label-range`` have to be. The labels of tensors are
            float32 unless a record has one class: 0 or 1 of shape (records, classes), or numbers from -1 to 1, the ends of the
            range.
        mixed: the private records lie in a random order already, so that equal parts are runs of them.
    """

    task: str
    labels: tuple[str, ...]
    records: int
    license: str
    private: Callable[[], Records | Dataset]
    public: Callable[[], Records | Dataset]
    input_shape: tuple[int, ...] | None = None
    owners: Callable[[], Sequence[str]] | None = None
    mixed: bool = False
    problem_type: str = "single-label"
    label_range: str = ""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: the facts contradict each other.
        """
        if not isinstance(self.labels, tuple):
            raise ValueError("labels: must be a tuple")
        if self.task not in MODELS:
            raise ValueError(f"task = {self.task!r}: must be one of {', '.join(MODELS)}")
        nameless = self.task == "language" or self.problem_type == "regression"
        if bool(self.labels) == nameless or len(set(self.labels)) < len(self.labels):
            raise ValueError("labels: must name each class once, and none for language modelling or regression")
        if self.input_shape is not None and (self.task != "image" or len(self.input_shape) != 3):
            raise ValueError("input_shape: only for images, (channels, height, width)")
        if self.owners is not None and self.input_shape is None:
            raise ValueError("owners: only for tensors; of a table data.site names the column")
        if self.records < 1 or not self.license:
            raise ValueError("records and license: must be given")

    def check(self, settings: Settings) -> None:
        """Refuse settings that the data set does not fit. Reads nothing.

        Raises:
            ConfigError: naming the key, the value and what is allowed.
        """
        name = settings.data.name
        if settings.task != self.task:
            what, model = MODELS[self.task]
            if (settings.task == "image") != (self.task == "image"):
                raise ConfigError(f"model.name = {settings.model.name!r}: data.name = {name!r} holds {what}; choose {model}")
            wanted = "must name the column of the responses" if self.task == "language" else "must be empty"
            raise ConfigError(f"data.response = {settings.data.response!r}: {wanted} for data.name = {name!r}")
        for key, value, own in (
            ("problem-type", settings.data.problem_type, self.problem_type),
            ("label-range", settings.data.label_range, self.label_range),
        ):
            if value != own:
                raise ConfigError(f"data.{key} = {value!r}: must be {own!r} for data.name = {name!r}")
        if settings.data.test not in ("auto", "split:test"):
            raise ConfigError(f"data.test = {settings.data.test!r}: {name} has test records of its own; leave it auto")


def named_data_set(name: str) -> NamedDataSet | None:
    """The data set that has this name; None for ``hub:…``, ``file:…`` and ``sites``.

    Raises:
        ConfigError: the package that provides it is broken.
    """
    if name == "sites" or ":" in name or name not in DATASETS:  # in this order: other packages are looked for last, on the disk
        return None
    return DATASETS.get(name, NamedDataSet)
