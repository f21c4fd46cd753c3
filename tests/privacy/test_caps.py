"""An owner's caps: read strictly, and no run gets past them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.errors import SiteRefusal
from lalora_flwr.privacy.caps import Caps, caps_from, check_mechanism, check_run
from lalora_flwr.privacy.fingerprint import fingerprint_of_files, fingerprint_of_share
from lalora_flwr.privacy.mechanism import Mechanism
from tests.conftest import small

NEEDED: dict[str, Any] = {"ledger-path": "l", "max-epsilon": 3.0, "delta": 1e-4, "num-records": 500}
WANTED = "text|number above 0( and below 1)?|whole number of at least 1"
OTHERS = {"data-path": "d", "device": "cpu", "model-path": "m", "allow-evaluation": "true"}


def test_the_least_a_real_site_has_to_say() -> None:
    assert caps_from({**NEEDED, **OTHERS}, needed=True) == Caps("l", 3.0, 1e-4, 500)


def test_everything_an_owner_can_say() -> None:
    more = {"dataset": "ward 7", "min-noise-multiplier": 1, "max-steps-per-round": 20, "allowed-strategies": " la-lora, rolora"}
    caps = caps_from({**NEEDED, "max-epsilon": 3, **more}, needed=True)
    assert caps == Caps("l", 3.0, 1e-4, 500, "ward 7", 1.0, 20, frozenset({"la-lora", "rolora"}))
    assert type(caps.max_epsilon) is type(caps.min_noise_multiplier) is float


def test_a_simulated_site_needs_none_but_half_of_them_are_refused() -> None:
    nothing = {"partition-id": 0, "num-partitions": 3, "more": 1}
    assert caps_from(nothing, needed=False) is None
    with pytest.raises(SiteRefusal, match="node-config: ledger-path is missing"):
        caps_from({"partition-id": 0, "max-epsilon": 3.0}, needed=False)
    assert caps_from(NEEDED, needed=False) == Caps("l", 3.0, 1e-4, 500)


@pytest.mark.parametrize("key", NEEDED)
def test_what_is_missing_is_named(key: str) -> None:
    with pytest.raises(SiteRefusal, match=f"^node-config: {key} is missing$"):
        caps_from({name: value for name, value in NEEDED.items() if name != key}, needed=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("max-epsilon", bad) for bad in (0, -1.0, math.inf, math.nan, "3", True, None)],
        *[("delta", bad) for bad in (0.0, 1.0, 1, math.nan, "1e-5")],
        *[("num-records", bad) for bad in (0, 2.5, "500", True, -3)],
        *[("min-noise-multiplier", bad) for bad in (0, -1, math.nan, "1", math.inf)],
        *[("max-steps-per-round", bad) for bad in (0, 1.5, "3", True)],
        *[("allowed-strategies", bad) for bad in ("", " ", 3)],
        *[("dataset", bad) for bad in ("", 3)],
        *[("ledger-path", bad) for bad in ("", 3)],
    ],
)
def test_what_cannot_be_used_is_named_without_its_value(key: str, value: Any) -> None:
    with pytest.raises(SiteRefusal, match=rf"^node-config: {key} must be a ({WANTED})$"):
        caps_from({**NEEDED, key: value}, needed=True)


@pytest.mark.parametrize("key", ["max-step-per-round", "min-noise", "allowed_strategies", "epsilon"])
def test_a_cap_with_a_typing_error_is_no_cap_that_is_ignored(key: str) -> None:
    with pytest.raises(SiteRefusal, match=r"^node-config: a key is unknown; the site's own log names it$"):
        caps_from({**NEEDED, key: 1}, needed=True)


CAPS = Caps("l", 3.0, 1e-4, 500, min_noise_multiplier=1.0, max_steps_per_round=5, allowed_strategies=frozenset({"la-lora"}))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"strategy": "dp-lora"}, "does not allow this strategy"),
        ({"privacy__epsilon": 3.01}, "privacy.epsilon is above"),
        ({"privacy__epsilon": math.inf}, "privacy.epsilon is above"),
        ({"privacy__delta": 1.1e-4}, "privacy.delta is above"),
        ({"train__local_steps": 6}, "local-steps are above"),
    ],
)
def test_a_run_that_asks_for_more_is_refused(asked: dict[str, Any], says: str, tmp_path: Path) -> None:
    within: dict[str, Any] = {"privacy__epsilon": 3.0, "train__local_steps": 5}
    check_run(CAPS, small(tmp_path, **within), is_strategys_own=True)
    with pytest.raises(SiteRefusal, match=f"^cap: .*{says}"):
        check_run(CAPS, small(tmp_path, **{**within, **asked}), is_strategys_own=True)


def test_an_order_that_is_not_the_strategys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SiteRefusal, match=r"^cap: the order's schedule"):
        check_run(CAPS, small(tmp_path, privacy__epsilon=3.0), is_strategys_own=False)


@pytest.mark.parametrize("sigma", [0.0, 0.99, math.nan])
def test_less_noise_than_the_owner_wants_is_refused(sigma: float) -> None:
    check_mechanism(CAPS, Mechanism(1.0, 1.0, 0.1, 4.0))
    with pytest.raises(SiteRefusal, match=r"^cap: the run's noise multiplier"):
        check_mechanism(CAPS, Mechanism(sigma, 1.0, 0.1, 4.0))
    if sigma == 0.0:
        with pytest.raises(SiteRefusal, match=r"^cap: the run's noise multiplier"):
            check_mechanism(Caps("l", 3.0, 1e-4, 500), Mechanism(sigma, 1.0, 0.1, 4.0))


def test_a_fingerprint_is_that_of_the_contents(tmp_path: Path) -> None:
    (tmp_path / "one" / "sub").mkdir(parents=True)
    (tmp_path / "one" / "a.csv").write_text("1,2")
    (tmp_path / "one" / "sub" / "b.csv").write_text("3,4")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "z.csv").write_text("1,2")
    (tmp_path / "two" / "y.csv").write_text("3,4")
    same = fingerprint_of_files(str(tmp_path / "one"))
    assert fingerprint_of_files(str(tmp_path / "two")) == fingerprint_of_files(str(tmp_path / "two" / "*.csv")) == same
    (tmp_path / "two" / "y.csv").write_text("3,5")
    assert fingerprint_of_files(str(tmp_path / "two")) != same
    assert fingerprint_of_files(str(tmp_path / "two" / "z.csv")) not in (same, fingerprint_of_files(str(tmp_path / "two")))


def test_a_share_is_known_by_what_defines_it() -> None:
    assert fingerprint_of_share({"a": 1, "b": 2}) == fingerprint_of_share({"b": 2, "a": 1})
    assert fingerprint_of_share({"a": 1, "b": 2}) != fingerprint_of_share({"a": 1, "b": 3})
