"""Run configuration: the documented keys, their defaults, and the checks they pass before any data is touched.

The key of a field is its name in kebab-case behind the name of its group: ``settings.privacy.clip_norm`` is
``privacy.clip-norm``. Flower hands the keys over flat (``context.run_config``); a TOML file may nest them.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from lalora_flwr.errors import ConfigError

Value = bool | int | float | str


def _one_group(pattern: str) -> bool:
    try:
        return re.compile(pattern).groups == 1
    except re.error:
        return False


def _key(default: Value, doc: str, allowed: str = "", check: Callable[[Any], bool] = lambda _: True) -> Any:
    """A config key: its default, one line of documentation, what is allowed in words, and the same as a test."""
    return field(default=default, metadata={"doc": doc, "allowed": allowed, "check": check})


def _choice(default: str, doc: str, *values: str) -> Any:
    return _key(default, doc, "one of " + ", ".join(values), lambda v: v in values)


def _at_least(low: int, default: int, doc: str) -> Any:
    return _key(default, doc, f"a whole number of at least {low}", lambda v: v >= low)


def _whole(low: int, high: int, default: int, doc: str) -> Any:
    return _key(default, doc, f"a whole number from {low} to {high}", lambda v: low <= v <= high)


def _positive(default: float, doc: str) -> Any:
    return _key(default, doc, "a finite number above 0", lambda v: v > 0 and math.isfinite(v))


def _within(low: float, high: float, default: float, doc: str) -> Any:
    """A number in a range wider than any use of it: beyond lie only numbers that float32 cannot compute with."""
    return _key(default, doc, f"a number from {low:g} to {high:g}", lambda v: low <= v <= high)


def _non_negative(default: float, doc: str) -> Any:
    return _key(default, doc, "a finite number of at least 0", lambda v: v >= 0 and math.isfinite(v))


@dataclass(frozen=True)
class ModelSettings:
    """The frozen base model."""

    name: str = _key(
        "embedded/vit-digits",
        "embedded/vit-digits; timm/<name or folder>, an image classifier; hf/<repository or folder>, a text model",
        "embedded/vit-digits, timm/<name or folder> or hf/<repository or folder>",
        lambda v: v == "embedded/vit-digits" or any(v.startswith(f) and len(v) > len(f) for f in ("timm/", "hf/")),
    )
    revision: str = _key("", "commit, tag or branch of a model from the hub; empty: its main branch")
    dtype: str = _choice(
        "float32",
        "precision of the frozen weights (factors, norms, clip and noise stay float32); auto: bfloat16 where it is fast",
        "float32",
        "bfloat16",
        "auto",
    )
    pretrained: bool = _key(True, "load the published weights (from a folder, or once from the hub); false: random weights")
    pooling: str = _choice(
        "auto",
        "how hf/ text classifiers make one vector of a text: model (the architecture's own), mean (over its tokens); auto: mean "
        "for sentence-transformers folders that say so",
        "auto",
        "model",
        "mean",
    )


@dataclass(frozen=True)
class LoraSettings:
    """The adapter."""

    rank: int = _whole(1, 4096, 4, "rank r of every adapter")
    alpha: float = _within(1e-3, 1e5, 8.0, "the adapter's output is scaled by alpha / rank")
    targets: str = _key("auto", "comma-separated module names that get an adapter; auto takes the model's usual ones")
    dropout: float = _key(0.0, "dropout on the adapter's input", "a number in [0, 1)", lambda v: 0 <= v < 1)
    head: str = _choice(
        "frozen", "classification head: frozen, or trained at every step inside the same joint clip", "frozen", "trained"
    )
    schedule: str = _key("auto", "which factor trains when: auto (the strategy's own), both, B, step:BA, step:BBA, round:BA, …")


@dataclass(frozen=True)
class DataSettings:
    """The private records, how virtual sites share them, and the public records that the server evaluates on."""

    name: str = _key(
        "digits",
        "digits (embedded); hub:<dataset>[/<config>][@revision]; file:<glob or folder> of CSV, TSV, JSON lines, Parquet or "
        "images; sites: each real site reads its own data-path",
        "digits, hub:<dataset>, file:<glob or folder> or sites",
        lambda v: v in ("digits", "sites") or any(v.startswith(f) and len(v) > len(f) for f in ("hub:", "file:")),
    )
    split: str = _key("train", "split of the data set that the sites share")
    test: str = _key(
        "auto",
        "public records for evaluation: auto (the split test, else validation), split:<name>, file:<glob or folder>, or "
        "hold-out:<share> of the private records",
        "auto, split:<name>, file:<glob or folder> or hold-out:<share between 0 and 1>",
        lambda v: v == "auto" or bool(re.fullmatch(r"(split|file):.+|hold-out:0?\.\d+", v)),
    )
    test_records: int = _at_least(0, 0, "evaluate on at most so many of them, drawn with a fixed seed; 0: all")
    image: str = _key("", "column of the images; empty: found by its type or name")
    text: str = _key("", "column of the texts (of the prompts, for language modelling); empty: found by its name")
    text_pair: str = _key("", "column of the second texts; empty: found by its name; none: there is none")
    label: str = _key("", "column of the labels; empty: found by its type or name")
    response: str = _key("", "column of the responses; naming it makes the task language modelling, with loss on them only")
    site: str = _key("", "column that says whose record it is, for data.partition = natural")
    labels: str = _key("", "comma-separated label names in the order of the classes; empty: those of the data set")
    num_classes: int = _at_least(0, 0, "how many classes there are, for lalora plan without the data; 0: count them")
    records: int = _at_least(0, 0, "how many private records there are, for lalora plan without the data; 0: count them")
    max_tokens: int = _whole(2, 2**20, 128, "texts are cut to so many tokens (a prompt at its start, so that the response stays)")
    answer: str = _key(
        "",
        "regular expression whose first group is the answer in a response; language models are then also graded by exact match",
        "a regular expression with one group",
        lambda v: not v or _one_group(v),
    )
    partition: str = _choice(
        "iid",
        "how virtual sites share the records: iid (equal parts), dirichlet (by label), pathological (few classes a site), "
        "shards (of records sorted by label), size-skewed, natural (by data.site)",
        "iid",
        "dirichlet",
        "pathological",
        "shards",
        "size-skewed",
        "natural",
    )
    beta: float = _positive(1.0, "Dirichlet concentration: the smaller, the more the sites differ")
    min_records: int = _at_least(1, 10, "fewest records a site may hold; Dirichlet splits are drawn again until all hold as many")
    classes_per_site: int = _at_least(1, 2, "classes of a site, for data.partition = pathological")
    shards_per_site: int = _at_least(1, 2, "shards of a site, for data.partition = shards")
    size_skew: str = _choice(
        "linear", "how the sizes of size-skewed sites grow with their number", "linear", "square", "exponential"
    )


@dataclass(frozen=True)
class TrainSettings:
    """Local training on a site."""

    local_steps: int = _whole(1, 100_000, 10, "noisy steps K a site takes in a round")
    batch_size: int = _whole(
        1, 10**9, 40, "expected records of a Poisson batch; a site of n records samples at rate batch-size / n"
    )
    optimizer: str = _choice("sgd", "local optimizer, made afresh each round", "sgd", "adamw")
    lr: float = _within(1e-8, 1e4, 0.35, "learning rate")
    momentum: float = _within(0, 0.999, 0.0, "SGD momentum")
    weight_decay: float = _within(0, 10, 0.0, "weight decay of the optimizer")
    max_physical_batch: int = _at_least(0, 0, "records processed at once; 0 takes the whole batch (same result, more memory)")
    gradient_checkpointing: bool = _key(False, "recompute activations in the backward pass (same result, less memory, slower)")
    device: str = _choice("auto", "where a site trains: auto takes the GPU it can see, else the CPU", "auto", "cpu", "cuda")
    num_gpus: float = _non_negative(0.0, "share of a GPU that Ray reserves for a site; with 0 it hides GPUs from sites")
    num_threads: int = _at_least(1, 1, "CPU threads a site computes with; Ray reserves as many CPUs for it")


@dataclass(frozen=True)
class PrivacySettings:
    """The record-level guarantee. Nothing here may be chosen by looking at private records."""

    epsilon: float = _key(
        3.0,
        "largest ε any site may spend in the run; inf trains without privacy",
        "a number from 0.01 to 100, or inf",
        lambda v: 0.01 <= v <= 100 or v == math.inf,
    )
    delta: float = _key(
        1e-4,
        "δ of the guarantee; choose it well below 1 / records of a site",
        "a number from 1e-12 (below it the accountants are not exact) to 0.1",
        lambda v: 1e-12 <= v <= 0.1,
    )
    clip_norm: float = _within(1e-6, 1e6, 2.0, "L2 bound C on what one record adds to a step, over all its tensors together")
    accountant: str = _choice(
        "pld",
        "accountant that calibrates the noise and reports ε (rdp: looser, more noise; prv: slow, for old runs)",
        "pld",
        "rdp",
        "prv",
    )
    max_rounds: int = _at_least(
        0,
        0,
        "rounds any one site may serve; the noise is calibrated for them; 0: all rounds; more than all leaves room for rounds "
        "that real sites serve twice because the server died",
    )


@dataclass(frozen=True)
class FilterSettings:
    """What happens to a gradient after the noise (free under differential privacy)."""

    name: str = _choice(
        "auto",
        "auto (the strategy's own), none, gauss5 (5-tap binomial along the features), or gauss5-permuted (its control: the same "
        "along the features in a fixed random order)",
        "auto",
        "none",
        "gauss5",
        "gauss5-permuted",
    )


@dataclass(frozen=True)
class MergeSettings:
    """How the server combines the replies, and how far it trusts a single one (free under differential privacy)."""

    name: str = _choice(
        "auto",
        "auto (the strategy's own), mean, or of each coordinate over the sites: median or trimmed-mean, which a few lying sites "
        "cannot move far",
        "auto",
        "mean",
        "median",
        "trimmed-mean",
    )
    trim: float = _key(
        0.2,
        "share of the replies that merge.name = trimmed-mean leaves out at each end of a coordinate",
        "a number between 0 and 0.5, both excluded",
        lambda v: 0 < v < 0.5,
    )
    max_update_norm: float = _non_negative(
        0.0, "L2 bound on a site's update, over all it sends together: a longer one is scaled down to it; 0: no bound"
    )


@dataclass(frozen=True)
class Settings:
    """Every run-config key, validated. Build it with `settings_from`."""

    strategy: str = _key("la-lora", "la-lora, dp-lora, ffa-lora or rolora")
    num_rounds: int = _at_least(1, 15, "communication rounds")
    num_supernodes: int = _at_least(1, 4, "sites the run waits for (virtual sites in a simulation)")
    fraction_train: float = _key(1.0, "share of the sites drawn each round", "a number in (0, 1]", lambda v: 0 < v <= 1)
    max_failures: int = _at_least(0, 1, "sites a round may lose before the run stops; a site whose budget is spent is not lost")
    min_sites: int = _at_least(1, 1, "sites a round must merge; with fewer the run stops")
    evaluate_every: int = _at_least(1, 1, "the server evaluates every so many rounds, and after the last")
    evaluate_sites: bool = _key(
        False,
        "sites also report the accuracy on their own records: in a simulation exact, a LEAK that no ε covers; real sites add "
        "noise and count it in their ledgers, if their owners allow it",
    )
    seed: int = _at_least(0, 0, "seed of the initial adapter, the partition and, in simulation only, of noise and sampling")
    output_dir: str = _key("runs", "folder under which the run's own folder is made")
    run_name: str = _key(
        "",
        "name of the run's folder; empty: strategy, ε, seed and time",
        "a name without slashes that does not start with a dot",
        lambda v: not v.startswith(".") and "/" not in v and "\\" not in v,
    )
    resume: bool = _key(False, "go on with the run of this run-name after its last checkpoint; all other keys must be the same")
    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    filter: FilterSettings = field(default_factory=FilterSettings)
    merge: MergeSettings = field(default_factory=MergeSettings)

    @property
    def private(self) -> bool:
        """Whether the run clips and adds noise (finite ε)."""
        return math.isfinite(self.privacy.epsilon)

    @property
    def task(self) -> str:
        """``image``, ``text`` (classification both) or ``language`` (modelling); follows from the settings alone."""
        if not self.model.name.startswith("hf/"):
            return "image"
        return "language" if self.data.response else "text"

    @property
    def sites_per_round(self) -> int:
        """Sites drawn each round."""
        return max(1, round(self.fraction_train * self.num_supernodes))

    def evaluates_after(self, server_round: int) -> bool:
        """Whether the model is evaluated after this round."""
        return server_round % self.evaluate_every == 0 or server_round == self.num_rounds

    @property
    def rounds_per_site(self) -> int:
        """Most rounds any one site may serve; the noise is calibrated for them."""
        return self.privacy.max_rounds or self.num_rounds

    @property
    def steps_per_site(self) -> int:
        """Most noisy steps any one site may take in the run."""
        return self.rounds_per_site * self.train.local_steps


@dataclass(frozen=True)
class Key:
    """One documented run-config key."""

    name: str
    default: Value
    doc: str
    allowed: str
    check: Callable[[Any], bool]


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _walk(cls: type, prefix: str = "") -> list[Key]:
    keys: list[Key] = []
    for f in fields(cls):
        if f.metadata:
            keys.append(Key(prefix + _kebab(f.name), f.default, *(f.metadata[m] for m in ("doc", "allowed", "check"))))  # type: ignore[arg-type]
        else:
            keys += _walk(f.default_factory, f"{prefix}{_kebab(f.name)}.")  # type: ignore[arg-type]
    return keys


KEYS: dict[str, Key] = {k.name: k for k in _walk(Settings)}


def _typed(key: Key, value: Any) -> Value:
    want = type(key.default)
    if want is float and type(value) is int:
        value = float(value)
    if type(value) is not want:
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[want]
        raise ConfigError(f"{key.name} = {value!r}: must be {kind}")
    if not key.check(value):  # NaN fails every comparison and ends here too
        raise ConfigError(f"{key.name} = {value!r}: must be {key.allowed}")
    return value


def check_values(flat: Mapping[str, Any]) -> dict[str, Value]:
    """Check names, types and ranges of flat run-config values.

    Raises:
        ConfigError: one line naming the key, the value and what is allowed; for an unknown key the nearest known one.
    """
    checked: dict[str, Value] = {}
    for name, value in flat.items():
        if name not in KEYS:
            near = difflib.get_close_matches(name, KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else "`lalora keys` lists all keys"
            raise ConfigError(f"{name}: unknown key; {hint}")
        checked[name] = _typed(KEYS[name], value)
    return checked


def _build(cls: type, values: Mapping[str, Value], prefix: str = "") -> Any:
    arguments = {}
    for f in fields(cls):
        name = prefix + _kebab(f.name)
        if not f.metadata:
            arguments[f.name] = _build(f.default_factory, values, name + ".")  # type: ignore[arg-type]
        elif name in values:
            arguments[f.name] = values[name]
    return cls(**arguments)


def settings_from(flat: Mapping[str, Any]) -> Settings:
    """Typed settings from flat run-config values; what is not named keeps its default.

    Raises:
        ConfigError: for the first key that cannot be used, or for two keys that cannot go together.
    """
    settings: Settings = _build(Settings, check_values(flat))
    _check_together(settings)
    return settings


def _check_together(settings: Settings) -> None:
    """Checks that need more than one key, or a registry that this module must not import at load time."""
    from lalora_flwr.lora.schedule import parse_schedule
    from lalora_flwr.strategies import METHODS
    from lalora_flwr.strategies.base import least_replies

    if settings.strategy not in METHODS:
        near = difflib.get_close_matches(settings.strategy, METHODS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"strategy = {settings.strategy!r}: must be one of {', '.join(METHODS)}{hint}")
    if (settings.model.name == "embedded/vit-digits") and settings.data.name != "digits":
        raise ConfigError(f"data.name = {settings.data.name!r}: embedded/vit-digits only takes digits; set model.name")
    if settings.data.name == "digits" and settings.task != "image":
        raise ConfigError(f"model.name = {settings.model.name!r}: data.name = 'digits' holds images; choose a timm/ model")
    if settings.data.answer and settings.task != "language":
        raise ConfigError("data.answer: only for language modelling; name data.response, or leave it empty")
    if settings.data.name == "sites" and (settings.data.test == "auto" or settings.data.test.startswith(("split:", "hold-out:"))):
        raise ConfigError("data.test: the server holds no records of data.name = 'sites'; set data.test = 'file:…'")
    if settings.data.name == "sites" and not settings.data.labels and settings.task != "language":
        raise ConfigError("data.labels: must name the classes for data.name = 'sites', in the same order for every site")
    if settings.data.partition == "natural" and not settings.data.site:
        raise ConfigError("data.site: must name the column that tells the sites apart for data.partition = 'natural'")
    if settings.min_sites > settings.sites_per_round:
        raise ConfigError(f"min-sites = {settings.min_sites}: only {settings.sites_per_round} sites are drawn for a round")
    merge = METHODS[settings.strategy].merge_named(settings.merge.name)
    if settings.sites_per_round < (needed := least_replies(merge, settings.merge.trim)):
        raise ConfigError(f"merge.name = {merge!r}: needs {needed} sites a round, but {settings.sites_per_round} are drawn")
    if settings.resume and not settings.run_name:
        raise ConfigError("run-name: must name the run that resume = true goes on with")
    if settings.lora.schedule != "auto":
        parse_schedule(settings.lora.schedule)
    if settings.train.optimizer == "adamw" and settings.train.momentum:
        raise ConfigError(f"train.momentum = {settings.train.momentum}: only for train.optimizer = 'sgd'; leave it 0 for adamw")
    if settings.rounds_per_site * settings.num_supernodes < settings.num_rounds * settings.sites_per_round:
        raise ConfigError(
            f"privacy.max-rounds = {settings.privacy.max_rounds}: too few for {settings.num_rounds} rounds of "
            f"{settings.sites_per_round} of {settings.num_supernodes} sites; raise it or lower fraction-train"
        )


def flatten(settings: Any, prefix: str = "") -> dict[str, Value]:
    """All keys of the settings with their resolved values, flat."""
    flat: dict[str, Value] = {}
    for f in fields(settings):
        value = getattr(settings, f.name)
        name = prefix + _kebab(f.name)
        flat.update(flatten(value, name + ".") if is_dataclass(value) else {name: value})
    return flat


def _flatten_toml(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat.update(_flatten_toml(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def read_toml(path: Path) -> dict[str, Any]:
    """Flat values of a TOML experiment file (nested tables and dotted keys alike).

    Raises:
        ConfigError: if the file is missing or is not TOML.
    """
    try:
        return _flatten_toml(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or 'cannot be read'}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not valid TOML: {error}") from None


# A key, then a value in double quotes, in single quotes, or without either
_PAIR = re.compile(r"""([^\s=]+)=("(?:[^"\\]|\\.)*"|'[^']*'|[^\s'"]\S*|)(?=\s|$)""")


def parse_override(text: str) -> dict[str, Any]:
    """Flat values of one ``-c`` argument: ``key=value`` pairs, separated by spaces, values as in TOML or bare words.

    Raises:
        ConfigError: if a part is not ``key=value``.
    """
    values: dict[str, Any] = {}
    rest = text.strip()
    while rest:
        match = _PAIR.match(rest)
        if match is None:
            raise ConfigError(f"-c {rest}: must be key=value, with quotes around a value that holds spaces")
        name, raw = match.groups()
        try:
            values[name] = tomllib.loads(f"v = {raw}")["v"]
        except tomllib.TOMLDecodeError:
            values[name] = raw  # a bare word: strategy=ffa-lora
        rest = rest[match.end() :].lstrip()
    return values
