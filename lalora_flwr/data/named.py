"""Data sets that ``data.name`` takes by a name of their own: those of this package, and those of any other that is installed.

A package adds one through the entry-point group ``lalora.datasets``; `DATASETS.register` adds one in this process only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lalora_flwr.data.records import Records
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.lists import ends_of, joined, listed
from lalora_flwr.ground.words import is_text
from lalora_flwr.settings import Settings
from lalora_flwr.settings.choices import DATASETS
from lalora_flwr.tasks.label_text import as_text

if TYPE_CHECKING:
    from datasets import Dataset

PROBLEMS = ("single-label", "multi-label", "regression")
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
        if self.task not in MODELS:
            raise ValueError(f"task = {self.task!r}: must be one of {', '.join(MODELS)}")
        kinds = PROBLEMS[:1] if self.task == "language" else PROBLEMS
        if self.problem_type not in kinds:
            raise ValueError(f"problem_type = {self.problem_type!r}: must be one of {', '.join(kinds)}")
        self._check_range()
        self._check_labels()
        shape = self.input_shape
        if shape is not None and (self.task != "image" or len(shape) != 3 or any(type(n) is not int or n < 1 for n in shape)):
            raise ValueError("input_shape: only for images, (channels, height, width), each at least 1")
        if self.owners is not None and self.input_shape is None:
            raise ValueError("owners: only for tensors; of a table data.site names the column")
        if type(self.records) is not int or self.records < 1:
            raise ValueError("records: must be a whole number of at least 1")
        if not isinstance(self.license, str) or not self.license.strip():
            raise ValueError("license: must be given")
        if self.private is self.public:
            raise ValueError("public: reads the private records; the server evaluates on others")

    def _check_range(self) -> None:
        if (self.problem_type == "regression") != bool(self.label_range):
            raise ValueError("label_range: needed for regression, and only there")
        try:
            ends_of(self.label_range or "0,1")
        except ValueError:
            raise ValueError(f"label_range = {self.label_range!r}: must be low,high: two numbers, the smaller first") from None

    def _check_labels(self) -> None:
        if not isinstance(self.labels, tuple) or not all(isinstance(name, str) and is_text(name) for name in self.labels):
            raise ValueError("labels: must be a tuple of texts")
        nameless = self.task == "language" or self.problem_type == "regression"
        names = {as_text(name) for name in self.labels}
        if bool(self.labels) == nameless or len(names) < len(self.labels) or None in names:
            raise ValueError("labels: must name each class once, and none for language modelling or regression")
        if len(self.labels) == 1 and self.problem_type == "single-label":
            raise ValueError("labels: must be two at least where a record has one class")

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
        if settings.data.labels and listed(settings.data.labels) != list(self.labels):
            own = joined(self.labels)
            raise ConfigError(f"data.labels = {settings.data.labels!r}: must be {own!r} or empty for data.name = {name!r}")
        if settings.data.num_classes not in (0, len(self.labels)):
            raise ConfigError(f"data.num-classes = {settings.data.num_classes}: {name} has {len(self.labels)} classes")
        if settings.num_supernodes > self.records:
            most = f"more sites than the {self.records} records; use at most {self.records}"
            raise ConfigError(f"num-supernodes = {settings.num_supernodes}: {most}")
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
