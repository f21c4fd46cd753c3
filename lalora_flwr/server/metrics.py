"""What a run tells of itself: one line per round in ``metrics.jsonl``, and ``summary.json``. Writer and readers meet here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, get_origin, get_type_hints

from lalora_flwr.server.round_signals import IF_SET, Signals

Quality = Mapping[str, float | None]  # headline, loss, and what the task has besides; None: not evaluated, or not finite
HEADLINES = {"accuracy": "accuracy", "auroc": "AUROC", "r2": "R²"}  # a task has one; each grows with the quality, up to 1
HEADLINE_OF = {"single-label": "accuracy", "multi-label": "auroc", "regression": "r2"}  # by data.problem-type
Record = TypeVar("Record", "RoundMetrics", "SiteReport", "Summary")
METRICS, SUMMARY, FAILURE, CONFIG = "metrics.jsonl", "summary.json", "failure.json", "config.toml"  # in a run's folder
# Fields that are several numbers, and what stands before their names.
QUALITIES = {"quality": "", "frozen": "frozen_", "last": "last_", "best": "best_", "personal": "personal_"}


@dataclass(frozen=True, kw_only=True)
class RoundMetrics(Signals):
    """One line of ``metrics.jsonl``, the signals of the round's updates among it.

    Attributes:
        round: from 1.
        quality: on public records, and ``site_accuracy`` if the run asks its sites for theirs.
        epsilon: spent so far, the largest over the sites; infinite without privacy.
        sites, failures: how many sites served the round, and how many failed.
        failed_sites: reason by site.
        left_sites: those whose budget is spent.
        seconds: of the round.
        bytes_up, bytes_down: sent by all sites, and to them, in the round.
        private: whether ε bounds anything.
        seeded: whether all draws follow from the run's seed, as only in a simulation.
        epsilon_alone: as ``epsilon``, if all other sites of a secure sum side with the server.
        repeats: attempts of the round after the first, since a secure sum that misses a site is thrown away.
        peak_memory_mb: of the server's process so far; in the inline engine it is the sites' too.
    """

    round: int
    quality: Quality = field(default_factory=dict)
    epsilon: float = math.inf
    sites: int = 0
    failures: int = 0
    failed_sites: Mapping[str, str] = field(default_factory=dict)
    left_sites: Sequence[str] = ()
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    private: bool = False
    seeded: bool = True
    epsilon_alone: float | None = field(default=None, metadata=IF_SET)
    repeats: int | None = field(default=None, metadata=IF_SET)
    peak_memory_mb: float | None = field(default=None, metadata=IF_SET)

    @property
    def score(self) -> float | None:
        """The headline metric; None if the round was not evaluated."""
        return self.quality.get(headline(self.quality))

    def to_json(self) -> dict[str, object]:
        return _flat(self)

    def numbers(self) -> dict[str, float | None]:
        """All plain numbers by name, those that are not finite as None."""
        return _numbers(self)

    @staticmethod
    def from_json(line: Mapping[str, object]) -> RoundMetrics:
        """Also of a line of an older version, which lacks fields.

        Raises:
            ValueError: if it is no such line.
        """
        return _read(RoundMetrics, line)


def headline(quality: Quality) -> str:
    """The metric by which a task's runs are compared."""
    return next((name for name in HEADLINES if name in quality), "accuracy")


OnRound = Callable[[RoundMetrics], None]


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """The server's count of a site, with the site's own beside it; as `SiteCount`."""

    steps: int = 0
    epsilon: float = math.inf
    noise_multiplier: float | None = None
    sample_rate: float | None = None
    seeded: bool = True
    claimed_steps: int | None = None
    claimed_epsilon: float | None = None
    evaluations: int | None = field(default=None, metadata=IF_SET)
    evaluation_noise: float | None = field(default=None, metadata=IF_SET)
    epsilon_alone: float | None = field(default=None, metadata=IF_SET)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """``summary.json``: the result of a run that finished.

    Attributes:
        model_revision, model_files, model_digest: where the frozen model came from.
        labels: names of the classes in order.
        date: when it finished, UTC.
        commit: of this package's checkout, if it runs from one.
        rounds: the last round.
        ended_early: why a resumed run lacks rounds.
        test_records: on how many public records it was evaluated.
        test_left_out: how many others were of no use, by reason.
        quality: of the last round.
        last: the quality of the last round's own adapter, if ``quality`` is that of an average; marked ``last_``.
        best_round, best: the round whose adapter did best on the public records, if a later one is the last, and its quality,
            marked ``best_``; chosen by the same records, so a little too good.
        personal, personal_is: of a simulation in which slots stay at the sites: the mean quality of the sites' own models after
            the last round, marked ``personal_``, and what it is.
        started_from: SHA-256 of the weights of ``lora.start-from``.
        frozen: the quality before training; in the file each name has ``frozen_`` before it.
        epsilon, delta: the guarantee; ε is the server's own count, the largest over the sites.
        noise_multiplier, sample_rate: of the site that ε belongs to.
        head_noise_multiplier: of the round that released a ridge head, in which all records took part.
        trust, colluders, epsilon_alone, repeats: of secure sums: ``epsilon`` holds if at most so many sites side with the
            server, ``epsilon_alone`` if all others do; attempts that were thrown away.
        leaks: which numbers of this summary ε does not cover.
        site_accuracy_is: what makes ``site_accuracy`` private.
        centralised: whether the run had one site, which held all records.
        share_passes: how sites may have shared passes of the model, if that shows in the last digits: ``rounding``.
        failures: of sites, over all rounds.
        peak_memory_mb: of the server's process.
        sites: by number.
        versions: of packages.
    """

    strategy: str = ""
    model: str = ""
    model_revision: str | None = None
    model_files: Mapping[str, str] = field(default_factory=dict)
    model_digest: str | None = None
    data: str = ""
    labels: Sequence[str] = ()
    date: str = ""
    commit: str = ""
    seed: int = 0
    rounds: int = 0
    ended_early: str = field(default="", metadata=IF_SET)
    test_records: int = 0
    test_left_out: Mapping[str, int] = field(default_factory=dict)
    quality: Quality = field(default_factory=dict)
    frozen: Quality = field(default_factory=dict)
    last: Quality = field(default_factory=dict)
    best_round: int | None = field(default=None, metadata=IF_SET)
    best: Quality = field(default_factory=dict)
    personal: Quality = field(default_factory=dict)
    personal_is: str = field(default="", metadata=IF_SET)
    started_from: str = field(default="", metadata=IF_SET)
    epsilon: float = math.inf
    delta: float = 0.0
    noise_multiplier: float | None = None
    sample_rate: float | None = None
    head_noise_multiplier: float | None = field(default=None, metadata=IF_SET)
    clip_norm: float = 0.0
    accountant: str = ""
    trust: str = field(default="", metadata=IF_SET)
    colluders: int | None = field(default=None, metadata=IF_SET)
    epsilon_alone: float | None = field(default=None, metadata=IF_SET)
    repeats: int | None = field(default=None, metadata=IF_SET)
    private: bool = True
    seeded: bool = False
    leaks: str = field(default="", metadata=IF_SET)
    site_accuracy_is: str = field(default="", metadata=IF_SET)
    centralised: bool | None = field(default=None, metadata=IF_SET)
    share_passes: str = field(default="", metadata=IF_SET)
    failures: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    sites: Mapping[str, SiteReport] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """The name of the headline metric."""
        return headline(self.quality)

    @property
    def score(self) -> float | None:
        """The headline metric of the last round; None if it diverged."""
        return self.quality.get(self.metric)

    @property
    def frozen_score(self) -> float | None:
        """The same before training."""
        return self.frozen.get(self.metric)

    @property
    def best_score(self) -> float | None:
        """The same of the best round, if that is not the last."""
        return self.best.get(self.metric)

    @property
    def earlier(self) -> str:
        """What ε leaves out of an adapter that began as another one."""
        return f"what the adapter cost that the run started from (weights {self.started_from})" if self.started_from else ""

    def to_json(self) -> dict[str, object]:
        return {**_flat(self), "sites": {site: _flat(report) for site, report in self.sites.items()}}

    @staticmethod
    def from_json(content: Mapping[str, object]) -> Summary:
        """Also of a summary of an older version, which lacks fields.

        Raises:
            ValueError: if it is no summary.
        """
        return _read(Summary, content)

    def numbers(self) -> dict[str, float | None]:
        """All plain numbers by name, those that are not finite as None."""
        return _numbers(self)


def _flat(record: RoundMetrics | SiteReport | Summary) -> dict[str, object]:
    """As JSON holds it: the names of the quality stand among the others."""
    found: dict[str, object] = {}
    for f in sorted(fields(record), key=lambda f: "signal" in f.metadata):
        value = getattr(record, f.name)
        if f.name in QUALITIES:
            found.update((f"{QUALITIES[f.name]}{name}", number) for name, number in value.items())
        elif not f.metadata or value not in (None, ""):
            found[f.name] = value
    return found


def _numbers(record: RoundMetrics | Summary) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, value in record.to_json().items():
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            found[name] = value if value is None or math.isfinite(value) else None
    return found


def _read(cls: type[Record], content: Mapping[str, object]) -> Record:
    if not isinstance(content, Mapping):
        raise ValueError(f"{cls.__name__}: not a table of names")
    hints = get_type_hints(cls)
    known: dict[str, Any] = {
        f.name: _value(f.name, hints[f.name], content[f.name])
        for f in fields(cls)
        if f.name in content and f.name not in QUALITIES
    }
    rest = {name: value for name, value in content.items() if name not in hints and (value is None or _is(float, value))}
    for field_name in sorted(QUALITIES, key=QUALITIES.__getitem__, reverse=True):  # that without a mark takes what is left
        if field_name in hints:
            mark = QUALITIES[field_name]
            known[field_name] = {name.removeprefix(mark): rest.pop(name) for name in list(rest) if name.startswith(mark)}
    try:
        return cls(**known)
    except TypeError as missing:
        raise ValueError(f"{cls.__name__}: {missing}") from None


def _value(name: str, hint: Any, value: object) -> object:
    """A field's value, checked."""
    if hint is float and value is None:
        return math.inf  # JSON has no word for it
    if name == "sites" and get_origin(hint) is Mapping and isinstance(value, Mapping):
        return {site: _read(SiteReport, report) for site, report in value.items()}
    kinds = getattr(hint, "__args__", None) if get_origin(hint) not in (Mapping, Sequence) else None
    if not any(_is(kind, value) for kind in kinds or (hint,)):
        raise ValueError(f"{name}: {value!r} is not a value of it")
    return tuple(value) if isinstance(value, list) else value


LONGEST = 2**63  # no count is beyond; a larger whole number may be no float


def _is(kind: Any, value: object) -> bool:
    if kind in (float, int):
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < LONGEST
        return whole or (kind is float and isinstance(value, float))
    return isinstance(value, get_origin(kind) or kind)
