"""A server that wants what stays at a site, or wants it mixed up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from safetensors.torch import load_file

from lalora_flwr.adapter.slots import LORA_A, LORA_B
from lalora_flwr.ledger.file import create
from lalora_flwr.site.own_part import digest_of
from lalora_flwr.wire.orders import ARRAYS, CONFIG, MEMORY
from lalora_flwr.wire.replies import COUNTERS
from lalora_flwr.wire.tensors import to_arrays
from tests.attacks.attacker import RECORDS, RUN, Draws, Served, Site, table, text_model
from tests.attacks.orders import order
from tests.conftest import arrays_of, small
from tests.ledger.site_ledgers import owned, steps_in
from tests.site.failures import MakeContext
from tests.site.test_own_part import FEDSA, folder_of, kept, name_of, steady
from tests.site.test_own_part import order as fedsa_order
from tests.sites import REAL, servers_learner, train_order


def test_an_order_that_brings_b_or_asks_for_it_is_refused(tmp_path: Path, context: MakeContext) -> None:
    settings = small(tmp_path, **FEDSA)
    layout, held = servers_learner(settings).adapter.layout, owned(context(settings), tmp_path)
    more, fewer = train_order(settings), fedsa_order(settings)
    assert set(arrays_of(more)) == layout.names
    fewer.content[ARRAYS] = to_arrays({})
    for message in (more, fewer):
        assert "the tensors sent are not those that the run's method sends" in REAL(message, held).error.reason
    assert steps_in(held) == 0


def test_a_memory_that_a_server_sends_is_no_memory_of_a_real_site(tmp_path: Path, context: MakeContext) -> None:
    """In a simulation the slots go to and fro in it."""
    settings = small(tmp_path, **FEDSA)
    layout = servers_learner(settings).adapter.layout
    replies = []
    for planted in (False, True):
        (folder := tmp_path / str(planted)).mkdir()
        message = fedsa_order(settings)
        if planted:
            chosen = {name: torch.ones(layout[name].shape) for name in layout.of(LORA_B)}
            message.content[MEMORY] = to_arrays(chosen)
        reply = steady()(message, owned(context(settings), folder))
        assert set(reply.content) == {ARRAYS, COUNTERS} and set(arrays_of(reply)) == layout.of(LORA_A)
        replies.append(arrays_of(reply))
    assert all(torch.equal(replies[0][name], replies[1][name]) for name in replies[0])


def test_another_strategy_under_the_same_run_id_does_not_see_b(tmp_path: Path, context: MakeContext) -> None:
    settings, open_settings = small(tmp_path, **FEDSA), small(tmp_path, **{**FEDSA, "strategy": "dp-lora"})
    replies = []
    for served_before in (False, True):
        (folder := tmp_path / str(served_before)).mkdir()
        if served_before:
            assert not REAL(fedsa_order(settings), owned(context(settings), folder)).has_error()
        replies.append(arrays_of(steady()(train_order(open_settings), owned(context(open_settings), folder))))
    assert all(torch.equal(replies[0][name], replies[1][name]) for name in replies[0])


@pytest.mark.parametrize("name", ["*", "../1/1-x", "0" * 63, "0" * 65, "A" * 64, "0" * 64 + "\n", 5, True, b"0" * 64])
def test_a_name_that_is_no_digest_is_refused(name: Any, tmp_path: Path, context: MakeContext) -> None:
    """It becomes part of a path."""
    settings = small(tmp_path, **FEDSA)
    held = owned(context(settings), tmp_path)
    message = fedsa_order(settings)
    config = message.content[CONFIG]
    assert isinstance(config, ConfigRecord)
    config["own"] = name
    assert REAL(message, held).error.reason == "order: a digest in it is not what it must be"
    assert steps_in(held) == 0 and not folder_of(held).parent.exists()


def test_an_order_that_is_refused_leaves_no_folder(tmp_path: Path, context: MakeContext) -> None:
    """It costs the server nothing, and any number of run ids would fill the disk with them."""
    settings = small(tmp_path, **FEDSA)
    held = owned(context(settings), tmp_path)
    assert "differs from the server's" in REAL(fedsa_order(settings, adapter_digest="0" * 64), held).error.reason
    assert steps_in(held) == 0 and not folder_of(held).parent.exists()


def test_folders_that_others_may_enter_are_closed_to_them(tmp_path: Path, context: MakeContext) -> None:
    """As they are after a backup was put back without their modes."""
    settings = small(tmp_path, **FEDSA)
    held = owned(context(settings), tmp_path)
    folder_of(held).mkdir(parents=True)
    for folder in (places := (folder_of(held), folder_of(held).parent)):
        folder.chmod(0o755)
    assert not REAL(fedsa_order(settings), held).has_error()
    assert [folder.stat().st_mode & 0o777 for folder in places] == [0o700, 0o700]


def test_a_run_cannot_spoil_what_another_runs_rounds_left(tmp_path: Path, context: MakeContext) -> None:
    """Two runs of the same settings by turns, each told to go on from the other's: what each run left stays there."""
    settings = small(tmp_path, **FEDSA)

    def served(run: int, server_round: int, own: str) -> Message:
        reply = REAL(fedsa_order(settings, server_round, own), owned(context(settings), tmp_path, run_id=run))
        assert not reply.has_error(), reply.error
        return reply

    first = name_of(served(1, 1, ""))
    held = owned(context(settings), tmp_path)
    before = kept(held)[1]
    for server_round in (1, 2):
        served(2, server_round, first)
    assert all(torch.equal(kept(held)[1][name], value) for name, value in before.items())
    went_on = steady()(fedsa_order(settings, 2, first), owned(context(settings), tmp_path))
    shutil.rmtree(folder_of(owned(context(settings), tmp_path, run_id=2)))
    for path in folder_of(held).glob("2-*"):
        path.unlink()
    again = steady()(fedsa_order(settings, 2, first), owned(context(settings), tmp_path))
    assert all(torch.equal(value, arrays_of(again)[name]) for name, value in arrays_of(went_on).items())


def test_what_stays_tells_no_more_than_what_was_released(tmp_path: Path) -> None:
    """Two rounds with a record and without it: from the same releases, the same reply and the same B, to the last bit."""
    model = text_model(tmp_path / "model")
    sites = [Site(table(tmp_path / f"{n}.csv", RECORDS[:n]), model) for n in (len(RECORDS), len(RECORDS) - 1)]
    run = {**RUN, "strategy": "fedsa-lora", "num-rounds": 2, "train.local-steps": 2}
    ledgers = [tmp_path / f"ledger-{number}" for number in range(2)]
    for ledger in ledgers:
        create(ledger)
    own, script = "", None
    for server_round in (1, 2):
        found: list[Served] = []
        for site, ledger in zip(sites, ledgers, strict=True):
            message = order(run, model, server_round=server_round, own=own)
            script = found[0].steps if found else None
            found.append(site.serve(message, run, ledger=ledger, draws=Draws(server_round), script=script))
            assert not found[-1].reason, found[-1].reason
        one, two = found
        assert all(torch.equal(value, two.tensors[name]) for name, value in one.tensors.items())
        own = digest_of({name: value.numpy() for name, value in one.tensors.items()})
        stays = [load_file(next(Path(f"{ledger}.own").glob(f"1/{server_round}-{own}.safetensors"))) for ledger in ledgers]
        assert stays[0].keys() == stays[1].keys() and all(torch.equal(v, stays[1][n]) for n, v in stays[0].items())
        assert all(isinstance(one.reply.content[ARRAYS], ArrayRecord) and "lora_A" in name for name in one.tensors)
