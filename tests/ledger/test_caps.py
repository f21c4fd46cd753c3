"""An owner's caps: read strictly, and no run gets past them."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.ground.errors import SiteRefusal
from lalora_flwr.ledger.caps import NEEDED as CAPS_NEEDED
from lalora_flwr.ledger.caps import READERS, Caps, answer_seconds, at_once, caps_from, check_mechanism, check_run
from lalora_flwr.ledger.fingerprint import fingerprint_of_files, fingerprint_of_share
from lalora_flwr.privacy.mechanism import Mechanism
from tests.conftest import small

NEEDED: dict[str, Any] = {"ledger-path": "l", "max-epsilon": 3.0, "delta": 1e-4, "num-records": 500, "task": "image"}
LABELS: dict[str, Any] = {"labels": "cat, dog"}
LEAST = Caps("l", 3.0, 1e-4, 500, "image", ("cat", "dog"))
OTHERS = {"data-path": "d", "device": "cpu", "model-path": "m", "allow-evaluation": "false"}


def test_the_least_a_real_site_has_to_say() -> None:
    caps = caps_from({**NEEDED, **LABELS, **OTHERS}, needed=True)
    assert caps == replace(LEAST, data_path="d", device="cpu", model_path="m")


def test_what_an_owner_does_not_say_is_limited_all_the_same() -> None:
    assert (LEAST.min_noise_multiplier, LEAST.max_steps_per_round, LEAST.max_physical_batches) == (0.3, 1000, 4096)
    assert (LEAST.clip_norm_range, LEAST.alpha_range, LEAST.lr_range) == ((0.01, 100), (0.1, 1024), (1e-6, 100))
    assert (LEAST.max_queries_per_day, LEAST.answer_seconds, LEAST.allow_evaluation) == (1000, 5.0, False)


SAID: dict[str, tuple[Any, Any]] = {  # of every key: a value as Flower parses it, and what it means
    "ledger-path": ("x", "x"),
    "max-epsilon": (3, 3.0),
    "delta": (1e-5, 1e-5),
    "num-records": (20, 20),
    "task": ("language", "language"),
    "labels": ("b, a", ("b", "a")),
    "problem-type": ("multi-label", "multi-label"),
    "label-range": ("-1.5, 2", "-1.5, 2"),
    "dataset": ("ward 7", "ward 7"),
    "witness-path": ("w", "w"),
    "split": ("test", "test"),
    "image-column": ("i", "i"),
    "text-column": ("t", "t"),
    "text-pair-column": ("none", "none"),
    "label-column": ("l", "l"),
    "response-column": ("r", "r"),
    "max-tokens": (64, 64),
    "allowed-strategies": (" la-lora, rolora", ("la-lora", "rolora")),
    "allowed-forms": ("lora, head", ("lora", "head")),
    "min-noise-multiplier": (1, 1.0),
    "max-steps-per-round": (20, 20),
    "max-physical-batches": (3, 3),
    "records-at-once": (8, 8),
    "max-queries-per-day": (4, 4),
    "clip-norm-range": ("0.5,2", (0.5, 2.0)),
    "alpha-range": ("1, 1", (1.0, 1.0)),
    "lr-range": ("1e-3,1e1", (0.001, 10.0)),
    "answer-seconds": (0, 0.0),
    "resident-seconds": (60, 60.0),
    "evaluation-noise": (10, 10.0),
    "approved-code": (f"{'a1' * 32}, {'0b' * 32}", ("a1" * 32, "0b" * 32)),
    "data-path": ("d", "d"),
    "allow-run-model": ("true", True),
    "model-path": ("m", "m"),
    "device": ("cuda", "cuda"),
    "allow-evaluation": (True, True),
    "profile": ("rank=2", "rank=2"),
    **dict.fromkeys(("sharing-key", "sharing-roster", "metrics-path"), ("p", "p")),
    "sharing-colluders": (0, 0),
    "min-sharing-sites": (2, 2),
    "max-epsilon-alone": (40, 40.0),
    "alert-epsilon": (0.5, 0.5),
}


def test_everything_an_owner_can_say() -> None:
    assert set(SAID) == set(READERS)
    for key, (said, means) in SAID.items():
        together: dict[str, Any] = {"evaluation-noise": 1.0, "model-path": "m", **LABELS}
        if key in ("task", "response-column"):
            together = {"response-column": "r", "task": "language", "model-path": "m"}
        if key.startswith("sharing-"):
            together |= {"sharing-key": "k", "sharing-roster": "r"}
        if key == "label-range":
            together = {"problem-type": "regression", "model-path": "m"}
        caps = caps_from({**NEEDED, **together, key: said}, needed=True)
        value = getattr(caps, key.replace("-", "_"))
        assert value == means and type(value) is type(means), key


def test_the_documentation_has_every_key_and_every_default() -> None:
    rows = (Path(__file__).parents[2] / "docs" / "site.md").read_text().splitlines()
    table = {
        key: row.split("|")[2].strip()
        for row in rows
        if row.startswith("| `")
        for key in re.findall("`([a-z-]+)`", row.split("|")[1])
    }
    assert set(table) == set(READERS)
    for key, said in table.items():
        assert (said == "needed") == (key in CAPS_NEEDED), key
    for key in ("clip-norm-range", "alpha-range", "lr-range"):
        assert READERS[key](table[key].strip('`"')) == getattr(LEAST, key.replace("-", "_"))
    for key in ("min-noise-multiplier", "max-steps-per-round", "max-physical-batches", "max-queries-per-day", "answer-seconds"):
        assert float(table[key].strip("`")) == getattr(LEAST, key.replace("-", "_"))


def test_a_simulated_site_needs_none_but_half_of_them_are_refused() -> None:
    nothing = {"partition-id": 0, "num-partitions": 3, "more": 1}
    assert caps_from(nothing, needed=False) is None
    with pytest.raises(SiteRefusal, match="node-config: ledger-path is missing"):
        caps_from({"partition-id": 0, "max-epsilon": 3.0}, needed=False)
    assert caps_from({**NEEDED, **LABELS}, needed=False) == LEAST


@pytest.mark.parametrize("key", NEEDED)
def test_what_is_missing_is_named(key: str) -> None:
    with pytest.raises(SiteRefusal, match=f"^node-config: {key} is missing$"):
        caps_from({name: value for name, value in {**NEEDED, **LABELS}.items() if name != key}, needed=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("max-epsilon", bad) for bad in (0, -1.0, math.inf, math.nan, "3", True, None)],
        *[("delta", bad) for bad in (0.0, 1.0, 1, math.nan, "1e-5")],
        *[("num-records", bad) for bad in (0, 2.5, "500", True, -3)],
        *[(key, bad) for key, values in (("task", ("", "images", 3)), ("labels", ("", ",", "a,a", 3))) for bad in values],
        *[(key, "~nobody-here/x") for key in ("ledger-path", "witness-path", "data-path", "model-path")],
        *[("min-noise-multiplier", bad) for bad in (0, -1, math.nan, "1", math.inf)],
        *[
            (key, bad)
            for key in ("max-steps-per-round", "max-physical-batches", "max-queries-per-day", "records-at-once")
            for bad in (0, 1.5, "3", True)
        ],
        *[
            (f"{key}-range", bad)
            for key in ("alpha", "lr", "clip-norm")
            for bad in ("", "1", "2,1", "0,1", "1,inf", "1,2,3", "a,b", 3)
        ],
        *[("answer-seconds", bad) for bad in (-1, math.nan, math.inf, "5", True)],
        *[("max-tokens", bad) for bad in (1, "64", 2.0)],
        *[("allowed-strategies", bad) for bad in ("", " ", 3)],
        *[(key, bad) for key in ("dataset", "ledger-path", "metrics-path") for bad in ("", 3)],
        *[("label-range", bad) for bad in ("", "1", "2,1", "1,1", "nan,1", "0,inf", 3)],
        *[("problem-type", bad) for bad in ("", "classes", 3)],
        *[("device", bad) for bad in ("gpu", 3)],
        *[("allow-evaluation", bad) for bad in ("", "yes", 1)],
    ],
)
def test_what_cannot_be_used_is_named_without_its_value(key: str, value: Any) -> None:
    with pytest.raises(SiteRefusal, match=rf"^node-config: {key} must be (a|one of|true)[^:]+$") as refusal:
        caps_from({**NEEDED, **LABELS, key: value}, needed=True)
    assert str(value) not in str(refusal.value).split("must be")[1] or len(str(value)) < 3


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"labels": None}, "labels are missing: the names of the classes, in order"),
        ({"task": "language", "response-column": "r"}, "labels are for classes: task image or text, and no regression"),
        ({"problem-type": "regression", "label-range": "0,1"}, "labels are for classes: task image or text, and no regression"),
        ({"alert-epsilon": 3.0}, "alert-epsilon must be below max-epsilon, which is never passed"),
        ({"problem-type": "regression", "labels": None}, "label-range is missing: problem-type regression needs it"),
        ({"problem-type": "multi-label", "label-range": "0,1"}, "label-range is for problem-type regression"),
        (
            {"problem-type": "multi-label", "task": "language", "response-column": "r", "labels": None},
            "problem-type is for task image or text",
        ),
        ({"task": "language", "labels": None}, "response-column is missing: task language needs it"),
        ({"response-column": "r"}, "response-column is for task language"),
        ({"delta": 9e-13}, "delta is below 1e-12, where the accountant is not right"),
        ({"delta": 1 / 500}, "delta must be below 1 / num-records, since a larger one permits publishing a record outright"),
        ({"max-epsilon": 100.1}, "max-epsilon is above 100, which protects nobody"),
        ({"allow-evaluation": "true"}, "evaluation-noise is missing: allow-evaluation needs it"),
        (
            {"data-path": "records.csv"},
            "model-path is missing; a model of the run's choosing could ask the records questions (allow-run-model=true lets it)",
        ),
        ({"allowed-strategies": "la_lora"}, "allowed-strategies names an unknown strategy; `lalora keys` lists them"),
        ({"sharing-key": "k"}, "sharing-key and sharing-roster: one needs the other"),
        ({"sharing-roster": "r"}, "sharing-key and sharing-roster: one needs the other"),
        ({"alpha-range": "5e6,6e6"}, "alpha-range holds no value that a run can have"),
        (
            {"approved-code": "abc"},
            "approved-code must be digests of 64 hexadecimal digits; `lalora site approve BUNDLE` prints the line",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_values_that_cannot_go_together_are_refused_with_the_reason(said: dict[str, Any], reason: str) -> None:
    config = {key: value for key, value in {**NEEDED, **LABELS, **said}.items() if value is not None}
    with pytest.raises(SiteRefusal, match=f"^node-config: {re.escape(reason)}$"):
        caps_from(config, needed=True)


def test_a_weak_promise_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    for epsilon in (9.0, 10.0, 77.25, 77.25, 100):
        assert caps_from({**NEEDED, **LABELS, "max-epsilon": epsilon}, needed=True)
    assert caplog.text.count("max-epsilon = 77.25") == 1 and "max-epsilon = 10" not in caplog.text.replace("= 100 ", "")


@pytest.mark.parametrize("key", ["max-step-per-round", "min-noise", "allowed_strategies", "epsilon"])
def test_a_cap_with_a_typing_error_is_no_cap_that_is_ignored(key: str) -> None:
    with pytest.raises(SiteRefusal, match=r"^node-config: a key is unknown; the site's own log names it$"):
        caps_from({**NEEDED, **LABELS, key: 1}, needed=True)


@pytest.mark.parametrize(
    ("node_config", "wanted"),
    [
        ({}, 5.0),
        ({"answer-seconds": 0}, 0.0),
        ({"answer-seconds": 2}, 2.0),
        ({"answer-seconds": "2"}, 0.0),
        ({"task": None}, 0.0),
    ],
    ids=str,
)
def test_a_node_config_that_is_refused_as_a_whole_is_refused_at_once(node_config: dict[str, Any], wanted: float) -> None:
    said = {key: value for key, value in {**NEEDED, **node_config}.items() if value is not None}
    assert answer_seconds(said) == wanted


CAPS = replace(
    LEAST,
    min_noise_multiplier=1.0,
    max_steps_per_round=5,
    allowed_strategies=("la-lora",),
    clip_norm_range=(0.5, 2.0),
    alpha_range=(2.0, 8.0),
    lr_range=(0.1, 1.0),
    max_physical_batches=4,
    records_at_once=10,
)
PASSES = {"train__max_physical_batch": 9, "train__augmentations": 2, "filter__name": "kalman:0.5"}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"strategy": "dp-lora"}, "does not allow this strategy"),
        ({"privacy__epsilon": 3.01}, "privacy.epsilon is above"),
        ({"privacy__epsilon": math.inf}, "privacy.epsilon is above"),
        ({"privacy__delta": 1.1e-4}, "privacy.delta is above"),
        ({"train__local_steps": 6}, "local-steps are above"),
        *[({"privacy__clip_norm": bad}, "clip-norm is outside the site's clip-norm-range$") for bad in (0.49, 2.01, 1e-6, 1e6)],
        *[({"lora__alpha": bad}, "lora.alpha is outside the site's alpha-range$") for bad in (1.9, 8.1, 1e-3, 1e5)],
        *[({"train__lr": bad}, "train.lr is outside the site's lr-range$") for bad in (0.09, 1.1, 1e-8, 1e4)],
        *[({key: more}, "more passes in a step than the site's max-physical-batches$") for key, more in PASSES.items()],
        ({"lora__dropout": 0.1}, "lora.dropout must be 0 on a real site$"),
    ],
)
def test_a_run_that_asks_for_more_is_refused(asked: dict[str, Any], says: str, tmp_path: Path) -> None:
    within: dict[str, Any] = {"privacy__epsilon": 3.0, "train__local_steps": 5}
    check_run(CAPS, small(tmp_path, **within))
    with pytest.raises(SiteRefusal, match=f"^cap: .*{says}"):
        check_run(CAPS, small(tmp_path, **{**within, **asked}))


def test_records_go_through_the_model_alone_unless_the_owner_says_otherwise(tmp_path: Path) -> None:
    for owners, runs, together in ((1, 0, 1), (1, 40, 1), (10, 0, 10), (10, 3, 3), (10, 40, 10)):
        assert at_once(replace(LEAST, records_at_once=owners), small(tmp_path, train__max_physical_batch=runs)) == together
    assert LEAST.records_at_once == 1


@pytest.mark.parametrize("sigma", [0.0, 0.99])
def test_less_noise_than_the_owner_wants_is_refused(sigma: float) -> None:
    check_mechanism(CAPS, Mechanism(1.0, 1.0, 0.1, 4.0))
    with pytest.raises(SiteRefusal, match=r"^cap: the run's noise multiplier"):
        check_mechanism(CAPS, Mechanism(sigma, 1.0, 0.1, 4.0))
    if sigma == 0.0:
        with pytest.raises(SiteRefusal, match=r"^cap: the run's noise multiplier"):
            check_mechanism(LEAST, Mechanism(sigma, 1.0, 0.1, 4.0))


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
