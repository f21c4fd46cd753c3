"""What the owner of a site pins and allows, as the site's node-config says it. No run can change or raise any of it.

`Caps` is the one list of the keys; ``docs/site.md`` explains them. A key that nobody knows is refused: it may be a cap with a
typing error. A cap has one line in `Caps` and one in `RULES`.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from lalora_flwr.ground.errors import SiteRefusal
from lalora_flwr.ledger.forms import form_allowed
from lalora_flwr.ledger.node_values import (
    RESIDENT_SECONDS,
    Reader,
    any_range,
    at_least,
    below,
    names,
    number,
    one_of,
    place,
    positive_range,
    seconds,
    short_text,
    switch,
    text,
)
from lalora_flwr.privacy.mechanism import Mechanism
from lalora_flwr.settings import KEYS, Settings
from lalora_flwr.settings.choices import FORMS, METHODS, passes_of

log = logging.getLogger("lalora_flwr.site")
LEAST_DELTA = 1e-12  # below it the PRV accountant understates ε
MOST_EPSILON, USUAL_EPSILON = 100.0, 10.0  # above the first refused: no protection is left; above the second warned
LANGUAGE, REGRESSION = "language", "regression"


def _key(read: Reader, default: Any = MISSING, *, cap: bool = True) -> Any:
    """A node-config key: how it is read, and its default if it need not be given.

    ``cap``: it limits runs; a simulated site that is given one such key keeps to all of them.
    """
    return field(default=default, metadata={"read": read, "cap": cap})


@dataclass(frozen=True)
class Caps:
    """The owner's word, checked: the ledger and the budget, what the records are, and what a run may ask for."""

    ledger_path: str = _key(place)
    max_epsilon: float = _key(number)
    delta: float = _key(below(1))
    num_records: int = _key(at_least(1))
    task: str = _key(one_of("image", "text", LANGUAGE))
    labels: tuple[str, ...] = _key(names, ())
    problem_type: str = _key(one_of("single-label", "multi-label", REGRESSION), "single-label")
    label_range: str = _key(any_range, "")
    dataset: str = _key(text, "default")
    witness_path: str = _key(place, "")

    split: str = _key(text, "train")
    image_column: str = _key(text, "")
    text_column: str = _key(text, "")
    text_pair_column: str = _key(text, "")
    label_column: str = _key(text, "")
    response_column: str = _key(text, "")
    max_tokens: float = _key(at_least(2), math.inf)

    allowed_strategies: tuple[str, ...] = _key(names, ())  # none: all
    allowed_forms: tuple[str, ...] = _key(names, ())  # none: see `form_allowed`
    min_noise_multiplier: float = _key(number, 0.3)
    max_steps_per_round: int = _key(at_least(1), 1000)
    max_physical_batches: int = _key(at_least(1), 4096)
    max_queries_per_day: int = _key(at_least(1), 1000)
    clip_norm_range: tuple[float, float] = _key(positive_range, (0.01, 100.0))
    alpha_range: tuple[float, float] = _key(positive_range, (0.1, 1024.0))
    lr_range: tuple[float, float] = _key(positive_range, (1e-6, 100.0))
    answer_seconds: float = _key(seconds, 5.0)
    evaluation_noise: float = _key(number, 0.0)
    approved_code: tuple[str, ...] = _key(names, ())  # none: any
    sharing_colluders: int = _key(at_least(0), 1)
    min_sharing_sites: int = _key(at_least(2), 3)
    max_epsilon_alone: float = _key(number, math.inf)

    data_path: str = _key(place, "", cap=False)
    model_path: str = _key(place, "", cap=False)
    device: str = _key(one_of("auto", "cpu", "cuda"), "", cap=False)
    allow_run_model: bool = _key(switch, False, cap=False)
    records_at_once: int = _key(at_least(1), 1, cap=False)
    allow_evaluation: bool = _key(switch, False, cap=False)
    profile: str = _key(short_text, "", cap=False)
    sharing_key: str = _key(text, "", cap=False)
    sharing_roster: str = _key(text, "", cap=False)
    resident_seconds: float = _key(seconds, RESIDENT_SECONDS, cap=False)
    metrics_path: str = _key(text, "", cap=False)
    alert_epsilon: float = _key(number, math.inf, cap=False)

    @property
    def has_classes(self) -> bool:
        return self.task != LANGUAGE and self.problem_type != REGRESSION


READERS: dict[str, Reader] = {f.name.replace("_", "-"): f.metadata["read"] for f in fields(Caps)}
NEEDED = tuple(f.name.replace("_", "-") for f in fields(Caps) if f.default is MISSING)
CAP_KEYS = tuple(f.name.replace("_", "-") for f in fields(Caps) if f.metadata["cap"])
DEMONSTRATION = ("partition-id", "num-partitions")  # which share of the embedded digits a site without records of its own holds


def caps_from(node_config: Mapping[str, object], *, needed: bool) -> Caps | None:
    """The caps of a node-config; None if it names none and they are not ``needed`` (in a simulation).

    Raises:
        SiteRefusal: naming the key that is missing or cannot be used, never its value.
    """
    if not needed and not any(key in node_config for key in CAP_KEYS):
        return None
    if unknown := sorted(set(node_config) - {*READERS, *DEMONSTRATION}):
        log.error("node-config: unknown keys: %s", ", ".join(unknown))
        raise SiteRefusal("node-config: a key is unknown; the site's own log names it")
    for key in NEEDED:
        if key not in node_config:
            raise SiteRefusal(f"node-config: {key} is missing")
    values: dict[str, Any] = {}
    for key, read in READERS.items():
        if key in node_config:
            try:
                values[key.replace("-", "_")] = read(node_config[key])
            except ValueError as wanted:
                raise SiteRefusal(f"node-config: {key} must be {wanted}") from None
    caps = Caps(**values)
    for reason, holds in TOGETHER:
        if not holds(caps):
            raise SiteRefusal(f"node-config: {reason}")
    if caps.max_epsilon > USUAL_EPSILON:
        _warn_of(caps.max_epsilon)
    return caps


def answer_seconds(node_config: Mapping[str, object]) -> float:
    """At multiples of how many seconds a real site's replies leave; 0: at once, as if nothing but the node-config is refused."""
    if any(key not in node_config for key in NEEDED):
        return 0.0
    try:
        return float(READERS["answer-seconds"](node_config.get("answer-seconds", Caps.answer_seconds)))
    except ValueError:
        return 0.0


RANGED = {"clip_norm": "privacy.clip-norm", "alpha": "lora.alpha", "lr": "train.lr"}


def _some_value(key: str, name: str) -> Callable[[Caps], bool]:
    """Whether the owner's range meets what the settings allow, judged by its ends, its middle and the default."""

    def holds(caps: Caps) -> bool:
        low, high = getattr(caps, f"{key}_range")
        default = KEYS[name].default
        return any(map(KEYS[name].check, (low, high, math.sqrt(low) * math.sqrt(high)))) or low <= default <= high

    return holds


TOGETHER: tuple[tuple[str, Callable[[Caps], bool]], ...] = (
    ("labels are missing: the names of the classes, in order", lambda caps: bool(caps.labels) or not caps.has_classes),
    ("labels are for classes: task image or text, and no regression", lambda caps: not caps.labels or caps.has_classes),
    ("problem-type is for task image or text", lambda caps: caps.problem_type == "single-label" or caps.task != LANGUAGE),
    (
        "label-range is missing: problem-type regression needs it",
        lambda caps: bool(caps.label_range) or caps.problem_type != REGRESSION,
    ),
    ("label-range is for problem-type regression", lambda caps: not caps.label_range or caps.problem_type == REGRESSION),
    ("response-column is missing: task language needs it", lambda caps: bool(caps.response_column) or caps.task != LANGUAGE),
    ("response-column is for task language", lambda caps: not caps.response_column or caps.task == LANGUAGE),
    ("delta is below 1e-12, where the accountant is not right", lambda caps: caps.delta >= LEAST_DELTA),
    (
        "delta must be below 1 / num-records, since a larger one permits publishing a record outright",
        lambda caps: caps.delta * caps.num_records < 1,
    ),
    (
        "alert-epsilon must be below max-epsilon, which is never passed",
        lambda caps: caps.alert_epsilon == math.inf or caps.alert_epsilon < caps.max_epsilon,
    ),
    ("max-epsilon is above 100, which protects nobody", lambda caps: caps.max_epsilon <= MOST_EPSILON),
    (
        "model-path is missing; a model of the run's choosing could ask the records questions (allow-run-model=true lets it)",
        lambda caps: bool(caps.model_path or caps.allow_run_model) or not caps.data_path,
    ),
    (
        "allowed-strategies names an unknown strategy; `lalora keys` lists them",
        lambda caps: set(caps.allowed_strategies) <= set(METHODS.names()),
    ),
    ("allowed-forms names an unknown form", lambda caps: set(caps.allowed_forms) <= set(FORMS.names())),
    *(
        (f"{key.replace('_', '-')}-range holds no value that a run can have", _some_value(key, name))
        for key, name in RANGED.items()
    ),
    (
        "approved-code must be digests of 64 hexadecimal digits; `lalora site approve BUNDLE` prints the line",
        lambda caps: all(re.fullmatch("[0-9a-f]{64}", digest) for digest in caps.approved_code),
    ),
    ("sharing-key and sharing-roster: one needs the other", lambda caps: bool(caps.sharing_key) == bool(caps.sharing_roster)),
    (
        "evaluation-noise is missing: allow-evaluation needs it",
        lambda caps: not caps.allow_evaluation or caps.evaluation_noise > 0,
    ),
)


@functools.cache
def _warn_of(max_epsilon: float) -> None:
    """Once in a process."""
    log.warning(
        "node-config: max-epsilon = %g is a weak promise to the people behind the records; usual are 1 to 10", max_epsilon
    )


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def at_once(caps: Caps, settings: Settings) -> int:
    """How many records go through the model together: the owner's number, or fewer if the run wants fewer.

    Guarantee: with the default of 1, what a record contributes to a step depends on this record, the adapter and the model alone.
    Computed together, records move each other by rounding, and a server that sends a chaotic adapter makes that as large
    as it likes (``docs/privacy.md``, *Each record alone*).
    """
    return min(caps.records_at_once, settings.train.max_physical_batch or caps.records_at_once)


def _physical_batches(caps: Caps, settings: Settings) -> int:
    """Passes through the model for an expected batch; each view of a record is one, or two where the filter looks ahead."""
    passes = math.ceil(min(settings.train.batch_size, caps.num_records) / at_once(caps, settings))
    return passes * settings.train.augmentations * passes_of(settings)


RATE_OUTSIDE = "the run's train.lr is outside the site's lr-range"
Rule = tuple[str, Callable[[Caps, Settings], bool]]
RULES: tuple[Rule, ...] = (
    ("the site does not allow this strategy", lambda c, s: not c.allowed_strategies or s.strategy in c.allowed_strategies),
    ("the site does not allow the run's form", lambda c, s: form_allowed(c.allowed_strategies, c.allowed_forms, s)),
    ("the run's privacy.epsilon is above the site's max-epsilon", lambda c, s: s.privacy.epsilon <= c.max_epsilon),
    ("the run's privacy.delta is above the site's delta", lambda c, s: s.privacy.delta <= c.delta),
    (
        "the run's privacy.clip-norm is outside the site's clip-norm-range",
        lambda c, s: _within(s.privacy.clip_norm, c.clip_norm_range),
    ),
    ("the run's lora.alpha is outside the site's alpha-range", lambda c, s: _within(s.lora.alpha, c.alpha_range)),
    (RATE_OUTSIDE, lambda c, s: not s.train.lr or _within(s.train.lr, c.lr_range)),  # by rule: see `check_rate`
    (
        "the run's train.local-steps are above the site's max-steps-per-round",
        lambda c, s: s.train.local_steps <= c.max_steps_per_round,
    ),
    (
        "the run's train.batch-size needs more passes in a step than the site's max-physical-batches",
        lambda c, s: _physical_batches(c, s) <= c.max_physical_batches,
    ),
    # masks are drawn one after the other: with a record less, the others would meet other masks
    ("the run's lora.dropout must be 0 on a real site", lambda c, s: s.lora.dropout == 0),
)


def check_run(caps: Caps, settings: Settings) -> None:
    """Refuse a run that asks for more than the owner allows. Looks at the run's settings only.

    Raises:
        SiteRefusal: with a fixed reason that holds no cap's value.
    """
    for reason, holds in RULES:
        if not holds(caps, settings):
            raise SiteRefusal(f"cap: {reason}")


def check_rate(caps: Caps, rate: float) -> None:
    """Refuse a learning rate that the owner does not allow.

    Raises:
        SiteRefusal: with a fixed reason.
    """
    if not _within(rate, caps.lr_range):
        raise SiteRefusal(f"cap: {RATE_OUTSIDE}")


def check_mechanism(caps: Caps, mechanism: Mechanism) -> None:
    """Refuse steps with less noise than the owner allows.

    Raises:
        SiteRefusal: with a fixed reason.
    """
    if not mechanism.noise_multiplier >= caps.min_noise_multiplier or not mechanism.private:
        raise SiteRefusal("cap: the run's noise multiplier is below the site's min-noise-multiplier")
