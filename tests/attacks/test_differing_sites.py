"""A server that wants a site to hold or train other than its owner's profile says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from torch import Tensor

from lalora_flwr.adapter.slots import corner, digest
from lalora_flwr.methods.parts import PARTS
from lalora_flwr.settings import Settings
from lalora_flwr.wire.profile import Profile
from lalora_flwr.wire.tensors import to_arrays
from tests.conftest import arrays_of, small
from tests.ledger.site_ledgers import owned
from tests.sites import REAL, servers_learner, train_order

Contexts = Callable[[Settings], Context]


def order_of(settings: Settings, words: str) -> tuple[Message, Mapping[str, Tensor]]:
    """An order as for a site of this profile, and what such a site starts from."""
    learner = servers_learner(settings)
    held = PARTS.held(learner.adapter.layout, Profile(0, words))
    start = {name: corner(learner.initial[name], slot) for name, slot in held.items()}
    order = train_order(settings, adapter_digest=digest(start))
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
