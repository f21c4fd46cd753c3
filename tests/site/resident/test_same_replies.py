"""What a trainer answers to one message after the other is what a fresh process answers to each, byte for byte."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from flwr.app import Context, Message

from lalora_flwr.privacy.randomness import SeededRandom
from lalora_flwr.settings import Settings
from lalora_flwr.site.app import make_client_app, told
from lalora_flwr.site.resident.hand_over import Patience
from lalora_flwr.site.resident.words import Order
from tests.conftest import small
from tests.ledger.site_ledgers import owned
from tests.site.failures import MakeContext
from tests.site.resident.trainers import Site
from tests.sites import host, train_order


def draws() -> SeededRandom:
    """The same for every message, in place of the operating system's."""
    return SeededRandom(0, 0, 1)


def in_bytes(reply: Message, held: Context) -> bytes:
    return Order(b"n" * 16, "train", reply.content, Context(1, 7, {}, held.state, {})).to_bytes()


def test_trainer_and_fresh_process_reply_alike(tmp_path: Path, context: MakeContext) -> None:
    def fresh(settings: Settings, folder: str) -> Context:
        (tmp_path / folder).mkdir()
        return owned(context(settings), tmp_path / folder)

    settings = small(tmp_path, num_rounds=3)
    kept = host(simulated=False, entropy=draws)
    site = Site(tmp_path / "home", partial(told, host=lambda: kept))
    here, there = fresh(settings, "here"), fresh(settings, "there")
    alone = make_client_app(lambda: host(simulated=False, entropy=draws))
    patient = replace(site.resident, patience=Patience())
    through = make_client_app(lambda: pytest.fail("served by the short process"), patient)
    for server_round in (1, 2, 3):
        order = train_order(settings, server_round)
        first, second = alone(order, here), through(order, there)
        assert in_bytes(first, here) == in_bytes(second, there)
        assert first.metadata.reply_to_message_id == second.metadata.reply_to_message_id
    wrong = train_order(settings, 4, adapter_digest="0" * 64)
    assert alone(wrong, here).error.reason == through(wrong, there).error.reason
    assert len(site.started) == 1
