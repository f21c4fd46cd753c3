"""What the owner of a site allows, as the site's node-config says it. No run can raise any of it.

    ledger-path           the site's ledger, made with `lalora ledger create`             needed
    max-epsilon, delta    the most ε at δ that the dataset may ever spend                 needed
    num-records           public (rounded) number of records; σ and q follow from it      needed
    dataset               the owner's name for the records                                "default"
    min-noise-multiplier  smallest σ                                                      no limit
    max-steps-per-round   most local steps of a round                                     no limit
    allowed-strategies    comma-separated                                                 all

A key that nobody knows is refused: it may be a cap with a typing error.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lalora_flwr.config import Settings
from lalora_flwr.errors import SiteRefusal
from lalora_flwr.privacy.mechanism import Mechanism

log = logging.getLogger("lalora_flwr.site")
NEEDED = ("ledger-path", "max-epsilon", "delta", "num-records")
OPTIONAL = ("dataset", "min-noise-multiplier", "max-steps-per-round", "allowed-strategies")
OTHER_KEYS = (
    "data-path",
    "model-path",
    "device",
    "allow-evaluation",
    "approved-code",
    "task",
    "labels",
    "partition-id",
    "num-partitions",
)  # node-config, but no caps


@dataclass(frozen=True)
class Caps:
    """The owner's word, checked."""

    ledger_path: str
    max_epsilon: float
    delta: float
    num_records: int
    dataset: str = "default"
    min_noise_multiplier: float = 0.0
    max_steps_per_round: float = math.inf
    allowed_strategies: frozenset[str] | None = None  # None: all


def caps_from(node_config: Mapping[str, Any], *, needed: bool) -> Caps | None:
    """The caps of a node-config; None if it names none and they are not ``needed`` (in a simulation).

    Raises:
        SiteRefusal: naming the key that is missing or cannot be used, never its value.
    """
    if not needed and not any(key in node_config for key in (*NEEDED, *OPTIONAL)):
        return None
    if unknown := sorted(set(node_config) - {*NEEDED, *OPTIONAL, *OTHER_KEYS}):
        log.error("node-config: unknown keys: %s", ", ".join(unknown))
        raise SiteRefusal("node-config: a key is unknown; the site's own log names it")
    for key in NEEDED:
        if key not in node_config:
            raise SiteRefusal(f"node-config: {key} is missing")
    return Caps(
        ledger_path=_text(node_config, "ledger-path"),
        max_epsilon=_number(node_config, "max-epsilon"),
        delta=_number(node_config, "delta", below=1),
        num_records=_whole(node_config, "num-records"),
        dataset=_text(node_config, "dataset") if "dataset" in node_config else "default",
        min_noise_multiplier=_number(node_config, "min-noise-multiplier") if "min-noise-multiplier" in node_config else 0.0,
        max_steps_per_round=_whole(node_config, "max-steps-per-round") if "max-steps-per-round" in node_config else math.inf,
        allowed_strategies=_names(node_config, "allowed-strategies") if "allowed-strategies" in node_config else None,
    )


def _text(node_config: Mapping[str, Any], key: str) -> str:
    value = node_config[key]
    if not isinstance(value, str) or not value.strip():
        raise SiteRefusal(f"node-config: {key} must be a text")
    return value


def _number(node_config: Mapping[str, Any], key: str, below: float = math.inf) -> float:
    value = node_config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < below:
        raise SiteRefusal(f"node-config: {key} must be a number above 0" + (f" and below {below:g}" if below < math.inf else ""))
    return float(value)


def _whole(node_config: Mapping[str, Any], key: str) -> int:
    value = node_config[key]
    if type(value) is not int or value < 1:
        raise SiteRefusal(f"node-config: {key} must be a whole number of at least 1")
    return value


def _names(node_config: Mapping[str, Any], key: str) -> frozenset[str]:
    return frozenset(name.strip() for name in _text(node_config, key).split(","))


def check_run(caps: Caps, settings: Settings, *, is_strategys_own: bool) -> None:
    """Refuse a run that asks for more than the owner allows. Looks at the run's settings only.

    Args:
        caps: the owner's.
        settings: the run's.
        is_strategys_own: the order's schedule, filter and share are the strategy's, or what the settings override.

    Raises:
        SiteRefusal: with a fixed reason that holds no cap's value.
    """
    privacy = settings.privacy
    if caps.allowed_strategies is not None and settings.strategy not in caps.allowed_strategies:
        raise SiteRefusal("cap: the site does not allow this strategy")
    if not is_strategys_own:
        raise SiteRefusal("cap: the order's schedule, filter or share are not those of the run's strategy")
    if not privacy.epsilon <= caps.max_epsilon:
        raise SiteRefusal("cap: the run's privacy.epsilon is above the site's max-epsilon")
    if not privacy.delta <= caps.delta:
        raise SiteRefusal("cap: the run's privacy.delta is above the site's delta")
    if settings.train.local_steps > caps.max_steps_per_round:
        raise SiteRefusal("cap: the run's train.local-steps are above the site's max-steps-per-round")


def check_mechanism(caps: Caps, mechanism: Mechanism) -> None:
    """Refuse steps with less noise than the owner allows.

    Raises:
        SiteRefusal: with a fixed reason.
    """
    if not mechanism.noise_multiplier >= caps.min_noise_multiplier or not mechanism.private:
        raise SiteRefusal("cap: the run's noise multiplier is below the site's min-noise-multiplier")
