"""A server that wants a site to hold or train other than its owner's profile says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from torch import Tensor

from lalora_flwr.adapter.slots import corner, digest
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.parts import PARTS
from lalora_flwr.privacy.accounting import noise_multiplier_for
from lalora_flwr.privacy.mechanism import PrivateSum
from lalora_flwr.settings import Settings
from lalora_flwr.wire.profile import Profile
from lalora_flwr.wire.tensors import to_arrays
from tests.attacks.attacker import reserved_in
from tests.conftest import arrays_of, small
from tests.ledger.site_ledgers import owned
from tests.sites import REAL, real_app, servers_learner, train_order

Contexts = Callable[[Settings], Context]


def order_of(settings: Settings, words: str, server_round: int = 1) -> tuple[Message, Mapping[str, Tensor]]:
    """An order as for a site of this profile, and what such a site starts from."""
    learner = servers_learner(settings)
    held = PARTS.held(learner.adapter.layout, Profile(0, words))
    start = {name: corner(learner.initial[name], slot) for name, slot in held.items()}
    order = train_order(settings, server_round, adapter_digest=digest(start))
    order.content["arrays"] = to_arrays(start)
    return order, start


def said(words: str) -> dict[str, Any]:
    """A node-config that has the key only where there is something to say."""
    return {"profile": words} if words else {}


def test_a_real_site_trains_what_its_owner_says_at_the_same_price(tmp_path: Path, context: Contexts) -> None:
    settings = small(tmp_path, strategy="hetlora")
    counters = []
    for words in ("", "rank=1 layers=1"):
        folder = tmp_path / f"site {words}"
        folder.mkdir()
        order, start = order_of(settings, words)
        reply = REAL(order, owned(context(settings), folder, **said(words)))
        layout = servers_learner(settings).adapter.layout
        assert set(arrays_of(reply)) == PARTS.trains(PARTS.held(layout, Profile(0, words)), Profile(0, words))
        assert all(value.shape == start[name].shape for name, value in arrays_of(reply).items())
        counters.append(dict(reply.content["counters"]))
    assert counters[0] == counters[1]


@pytest.mark.parametrize(("own", "meant"), [("rank=1", ""), ("", "rank=1"), ("rank=2", "rank=1")])
def test_an_order_for_another_profile_is_refused(own: str, meant: str, tmp_path: Path, context: Contexts) -> None:
    settings = small(tmp_path, strategy="hetlora")
    order, _ = order_of(settings, meant)
    reply = REAL(order, owned(context(settings), tmp_path, **said(own)))
    assert reply.has_error() and "the tensors sent are not those" in str(reply.error.reason)


def test_a_run_cannot_say_a_real_sites_profile(tmp_path: Path, context: Contexts) -> None:
    settings = small(tmp_path, strategy="hetlora", profiles="rank=1")
    order, _ = order_of(settings, "rank=1")
    reply = REAL(order, owned(context(settings), tmp_path, profile="rank=2"))
    assert reply.has_error() and "the tensors sent are not those" in str(reply.error.reason)


def test_a_profile_that_the_method_does_not_know_is_refused(tmp_path: Path, context: Contexts) -> None:
    settings = small(tmp_path, strategy="hetlora")
    reply = REAL(order_of(settings, "")[0], owned(context(settings), tmp_path, profile="a strong one"))
    assert reply.has_error() and "profile: the method can make nothing of" in str(reply.error.reason)


def reserved(tmp_path: Path, context: Context, settings: Settings, order: Message, **owner: Any) -> tuple[Message, list[Any]]:
    """The site's answer, and what its ledger counts for it."""
    reply = REAL(order, owned(context, tmp_path, **owner))
    return reply, reserved_in(Path(str(context.node_config["ledger-path"])))


@pytest.mark.parametrize(
    ("words", "taken"), [("", 2), ("steps=1", 1), ("steps=2", 2), ("steps=100", 2), ("steps=1 batch=7 precision=float32", 1)]
)
def test_a_site_takes_its_owners_steps_and_pays_for_these(words: str, taken: int, tmp_path: Path, context: Contexts) -> None:
    """The run has two steps a round and two rounds. Never more than that, and σ is for the steps that are taken."""
    settings = small(tmp_path, strategy="hetlora")
    reply, entries = reserved(tmp_path, context(settings), settings, order_of(settings, words)[0], **said(words))
    assert [(entry.steps, entry.run_steps) for entry in entries] == [(taken, 2 * taken)]
    assert entries[0].sigma == noise_multiplier_for(4.0, 1e-4, 40 / 300, 2 * taken, "pld")
    counters = dict(reply.content["counters"])
    assert counters["steps"] == taken and counters["noise-multiplier"] == entries[0].sigma and counters["epsilon"] <= 4.0


def test_rounds_without_end_spend_no_more_than_the_run_has(tmp_path: Path, context: Contexts) -> None:
    """A server that asks a site of one step a round as often as it likes, whatever it says was counted before."""
    settings = small(tmp_path, strategy="hetlora")
    site = context(settings)
    owned(site, tmp_path, profile="steps=1")
    answers = []
    for server_round in (1, 2, 3, 1, 10**6):
        order, _ = order_of(settings, "steps=1", server_round)
        answers.append(REAL(order, site))
    assert [answer.has_error() for answer in answers] == [False, False, True, True, True]
    assert all("budget: the site has served all the steps" in str(answer.error.reason) for answer in answers[2:])
    assert sum(entry.steps for entry in reserved_in(Path(str(site.node_config["ledger-path"])))) == 2


@pytest.mark.parametrize("claimed", ["steps=1", "steps=2 batch=1", "precision=bfloat16", "batch=300"])
def test_a_run_cannot_say_a_real_sites_steps_batch_or_precision(claimed: str, tmp_path: Path, context: Contexts) -> None:
    settings = small(tmp_path, strategy="hetlora", profiles=claimed)
    reply, entries = reserved(tmp_path, context(settings), settings, order_of(settings, "")[0])
    plain = small(tmp_path, strategy="hetlora")
    (other := tmp_path / "other").mkdir()
    _, expected = reserved(other, context(plain), plain, order_of(plain, "")[0])
    assert not reply.has_error()
    assert [(e.steps, e.sigma, e.q) for e in entries] == [(e.steps, e.sigma, e.q) for e in expected]


def test_fewer_steps_lift_no_cap_but_that_on_steps(tmp_path: Path, context: Contexts) -> None:
    """The cap on steps is about the steps that the site takes; all others are as they were."""
    settings = small(tmp_path, strategy="hetlora", train__local_steps=9)
    order, _ = order_of(settings, "steps=3")
    told: dict[str, Any] = {"max-steps-per-round": 3, "profile": "steps=3"}
    caps: dict[str, dict[str, Any]] = {
        "": {},
        "max-steps-per-round": {"max-steps-per-round": 2},
        "min-noise-multiplier": {"min-noise-multiplier": 50.0},
        "epsilon is above": {"max-epsilon": 3.0},
        "lr-range": {"lr-range": "0.6,1"},
        "max-physical-batches": {"max-physical-batches": 39},
    }
    for reason, cap in caps.items():
        (folder := tmp_path / (reason or "none")).mkdir()
        reply, entries = reserved(folder, context(settings), settings, order, **{**told, **cap})
        assert (reason in str(reply.error.reason) and not entries) if reason else not reply.has_error(), reason


def test_no_profile_lets_a_secure_sum_have_more_than_one_step() -> None:
    with pytest.raises(ConfigError, match=r"train.local-steps = 2: must be 1 for trust = 'secure-sum'"):
        small(Path("x"), strategy="hetlora", trust="secure-sum", profiles="steps=1")


def test_a_batch_above_the_owners_records_at_once_changes_nothing(tmp_path: Path, context: Contexts) -> None:
    """The owner's word that each record goes alone is not undone by what the site tells of its strength."""
    settings = small(tmp_path, strategy="hetlora")
    replies = []
    for words in ("", "batch=40"):
        (folder := tmp_path / f"site {words}").mkdir()
        seen: list[int] = []
        app = real_app(make_sum=counting(seen))
        replies.append(app(order_of(settings, words)[0], owned(context(settings), folder, **said(words))))
        assert set(seen) == {1}


def counting(seen: list[int]) -> Any:
    """Sums that note how many records came together."""

    class Counting(PrivateSum):
        def add(self, per_sample: Mapping[str, Tensor]) -> None:
            seen.append(len(next(iter(per_sample.values()))))
            super().add(per_sample)

    return Counting
