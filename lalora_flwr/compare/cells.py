"""The single runs of a comparison: which settings, under which name, and for what."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lalora_flwr.compare.grid import EPSILON, RESERVED, SEED, VARIANT, Grid, label_of
from lalora_flwr.ground.words import epsilon_label
from lalora_flwr.settings import Settings, Value, flatten, settings_from

TUNING, FINAL = "tuning", "final"
TRACK = "track"
Labels = tuple[tuple[str, str], ...]  # axis -> label, in the order of the grid
Tuned = tuple[tuple[str, Value], ...]


@dataclass(frozen=True)
class Cell:
    """One run. Cells of equal settings are equal, whatever stage asks for them."""

    name: str
    settings: Settings

    @property
    def group(self) -> str:
        """Equal for cells that a process serves best one after the other: same base model, adapter and data."""
        return repr((self.settings.model, self.settings.data, self.settings.lora))


@dataclass(frozen=True)
class Role:
    """What a cell is for: a combination of the compared keys, tuned values and a seed, in a stage."""

    labels: Labels
    tuned: Tuned
    stage: str
    cell: Cell

    @property
    def method(self) -> str:
        return method_label(self.labels, self.cell.settings.strategy)

    @property
    def epsilon(self) -> float:
        return self.cell.settings.privacy.epsilon

    @property
    def row(self) -> str:
        """The combination in words."""
        return f"{self.method}, {epsilon_label(self.epsilon)}"


def short(key: str) -> str:
    """A key as tables show it: ``train.lr`` is ``lr``, ``filter.name`` is ``filter``."""
    group, _, last = key.rpartition(".")
    return group if group and last == "name" else last


def method_label(labels: Iterable[tuple[str, str]], strategy: str, without: Iterable[str] = ()) -> str:
    """What a table's row is called: all compared keys but ε and the seed."""
    hidden = {EPSILON, SEED, *without}
    shown = [(axis, label) for axis, label in labels if axis not in hidden]
    head = [label for axis, label in shown if axis in ("strategy", VARIANT)] or [strategy]
    return ", ".join(head + [f"{short(axis)} {label}" for axis, label in shown if axis not in ("strategy", VARIANT)])


def tuned_label(tuned: Tuned) -> str:
    return ", ".join(f"{short(key)} {label_of(value)}" for key, value in tuned)


def shaping(settings: Settings) -> dict[str, Value]:
    """The resolved settings without those that only say where results go."""
    return {name: value for name, value in flatten(settings).items() if name not in RESERVED}


def make_cell(values: Mapping[str, object], runs: Path, early: Callable[[Settings], None] = lambda settings: None) -> Cell:
    """The cell of these values below the folder ``runs``; ``early`` as in `settings_from`.

    Raises:
        ConfigError: if the values cannot be used, alone or together.
    """
    kept = {name: value for name, value in values.items() if name not in RESERVED}
    settings = settings_from(kept, early)
    text = json.dumps(shaping(settings), sort_keys=True)  # an infinite ε is the word Infinity here, which a hash may hold
    rate = f"-lr{settings.train.lr:g}" if settings.train.lr else ""
    plain = f"{settings.strategy}-eps{settings.privacy.epsilon:g}{rate}-seed{settings.seed}"
    name = re.sub(r"[^\w.+-]", "_", plain) + "-" + hashlib.sha256(text.encode()).hexdigest()[:8]
    followed = {TRACK: values[TRACK]} if TRACK in values else {}  # who follows the runs is no difference between them
    return Cell(name, settings_from({**kept, **followed, "output-dir": str(runs), "run-name": name}))


@dataclass(frozen=True)
class Plan:
    """All roles of a comparison; ``final`` holds those of every value that tuning may choose.

    Attributes:
        early: may refuse the settings of a cell before its method and data set are imported.
    """

    grid: Grid
    runs: Path
    early: Callable[[Settings], None] = lambda settings: None

    def _combinations(self) -> Iterator[tuple[Labels, dict[str, Value], int | None]]:
        """Labels without the seed, values without it, and the seed (None: that of the base)."""
        axes = list(self.grid.over.items())
        for choice in itertools.product(*(options for _, options in axes)):
            labels = tuple((name, option.label) for (name, _), option in zip(axes, choice, strict=True) if name != SEED)
            values = {key: value for option in choice for key, value in option.values.items()}
            seed = values.pop(SEED, None)
            yield labels, values, None if seed is None else int(seed)

    def _tune_values(self) -> list[Tuned]:
        names = list(self.grid.tune)
        return [tuple(zip(names, choice, strict=True)) for choice in itertools.product(*self.grid.tune.values())]

    def _role(
        self, labels: Labels, values: Mapping[str, Value], tuned: Tuned, seed: int | None, stage: str, only: Mapping[str, Value]
    ) -> Role:
        seeded = {} if seed is None else {SEED: seed}
        cell = make_cell({**self.grid.base, **values, **dict(tuned), **seeded, **only}, self.runs, self.early)
        return Role(labels, tuned, stage, cell)

    @cached_property
    def tuning(self) -> tuple[Role, ...]:
        """Stage 1; empty if nothing is tuned."""
        if not self.grid.tune:
            return ()
        roles: dict[Role, None] = {}
        for labels, values, seed in self._combinations():
            for tuned, own in itertools.product(self._tune_values(), self.grid.tuning_seeds or (seed,)):
                roles[self._role(labels, values, tuned, own, TUNING, self.grid.tuning_set)] = None
        return tuple(roles)

    @cached_property
    def final(self) -> tuple[Role, ...]:
        """Stage 2 for each value that could be chosen."""
        return tuple(
            self._role(labels, values, tuned, seed, FINAL, {})
            for labels, values, seed in self._combinations()
            for tuned in self._tune_values()
        )

    def validate(self) -> None:
        """Build every cell.

        Raises:
            ConfigError: for the first combination that cannot be used.
        """
        _ = self.tuning, self.final

    def rows(self) -> list[str]:
        """The combinations without the seed, in words."""
        return list(dict.fromkeys(role.row for role in self.final))


def unique(roles: Iterable[Role]) -> list[Cell]:
    """The roles' cells, each once, those together that share model, adapter and data."""
    cells = list(dict.fromkeys(role.cell for role in roles))
    groups = {group: place for place, group in enumerate(dict.fromkeys(cell.group for cell in cells))}
    return sorted(cells, key=lambda cell: groups[cell.group])
