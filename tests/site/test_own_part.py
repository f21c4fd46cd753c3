"""What stays at a real site: it survives deaths, restarts and resumed runs, and no other round's is used in silence."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from lalora_flwr.adapter.slots import HEAD, LORA_A, LORA_B, digest
from lalora_flwr.models.embedded import build_vit_digits
from lalora_flwr.privacy.randomness import SeededRandom
from lalora_flwr.settings import Settings
from lalora_flwr.site.own_part import digest_of
from lalora_flwr.wire.npy import values_of
from lalora_flwr.wire.orders import ARRAYS, CONFIG, TrainOrder
from lalora_flwr.wire.replies import COUNTERS
from lalora_flwr.wire.tensors import to_arrays
from tests.conftest import arrays_of, small
from tests.ledger.site_ledgers import owned, steps_in
from tests.site.failures import Heard, MakeReal
from tests.sites import REAL, real_app, servers_learner, stamp

FEDSA: dict[str, Any] = {"strategy": "fedsa-lora", "num_rounds": 4, "lora__head": "trained"}


@pytest.fixture
def heard() -> Iterator[Heard]:
    """What the site's own log says from a warning on, but of the generous budget of the tests."""
    logger, added = logging.getLogger("lalora_flwr.site"), Heard()
    added.setLevel(logging.WARNING)
    added.addFilter(lambda record: "weak promise" not in record.getMessage())
    logger.addHandler(added)
    yield added
    logger.removeHandler(added)


def order(settings: Settings, server_round: int = 1, own: str = "", **changed: Any) -> Message:
    """The server's order for a round that starts from the initial A."""
    stamp()
    learner = servers_learner(settings)
    shared = {name: learner.initial[name] for name in learner.adapter.layout.of(LORA_A)}
    fields = {"adapter_digest": digest(shared), "model_digest": learner.base.provenance.digest, "own": own, **changed}
    content = RecordDict({ARRAYS: to_arrays(shared), CONFIG: TrainOrder(server_round, **fields).to_record()})
    return Message(content, dst_node_id=7, message_type="train")


def name_of(reply: Message) -> str:
    """The digest by which a server that merged the reply names it."""
    arrays = reply.content[ARRAYS]
    assert isinstance(arrays, ArrayRecord)
    return digest_of({name: values_of(array) for name, array in arrays.items()})


def folder_of(context: Context) -> Path:
    return Path(f"{context.node_config['ledger-path']}.own") / str(context.run_id)


def kept(context: Context) -> dict[int, dict[str, Tensor]]:
    """The slots in the site's folder, by round."""
    return {int(path.name.partition("-")[0]): load_file(path) for path in folder_of(context).glob("*.safetensors")}


def steady(seed: int = 0) -> Any:
    """A real site whose draws are always the same."""
    return real_app(entropy=lambda: SeededRandom(seed, 0, 1))


def moved(settings: Settings, held: Context, own: str, server_round: int = 9) -> dict[str, Tensor]:
    """What a round at fixed draws makes of the slots that the site goes on from: equal only if it begins at the same ones."""
    reply = steady(5)(order(settings, server_round, own), held)
    assert not reply.has_error(), reply.error
    return arrays_of(reply)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_goes_on_from_what_it_held_and_nothing_of_it_leaves(tmp_path: Path, real: MakeReal, heard: Heard) -> None:
    settings, own = small(tmp_path, **FEDSA), ""
    layout = servers_learner(settings).adapter.layout
    for server_round in (1, 2, 3):
        held = real(settings)  # a new context, as after a restart of site and trainer
        reply = REAL(order(settings, server_round, own), held)
        assert not reply.has_error(), reply.error
        assert set(reply.content) == {ARRAYS, COUNTERS} and set(arrays_of(reply)) == layout.of(LORA_A)
        own = name_of(reply)
        states = kept(held)
        assert sorted(states) == [1] if server_round == 1 else sorted(states) == [server_round - 1, server_round]
        assert set(states[server_round]) == layout.of(LORA_B, HEAD)
        assert all(value.any() for value in states[server_round].values())
        sent = {value.numpy().tobytes() for value in arrays_of(reply).values()}
        assert not any(value.numpy().tobytes() in sent for value in states[server_round].values())
        assert not any(isinstance(record, ArrayRecord) and len(record) for record in held.state.values())
    assert not heard.text
    names = {stat: path for path in folder_of(held).rglob("*") if (stat := path.stat().st_mode & 0o077)}
    assert not names and folder_of(held).stat().st_mode & 0o077 == 0 == folder_of(held).parent.stat().st_mode & 0o077


def test_the_rounds_depend_on_what_stayed(tmp_path: Path, real: MakeReal) -> None:
    """Else the tests below would not see which state a round began from."""
    settings = small(tmp_path, **FEDSA)
    first = REAL(order(settings), real(settings))
    went_on = moved(settings, real(settings), name_of(first), 2)
    (other := tmp_path / "other").mkdir()
    anew = moved(settings, owned(real(settings), other), "", 2)
    assert not same(went_on, anew)


def test_a_reply_that_was_lost_is_gone_back_from_and_the_log_says_so(tmp_path: Path, real: MakeReal, heard: Heard) -> None:
    settings = small(tmp_path, **FEDSA)
    held = real(settings)
    first = name_of(REAL(order(settings), held))
    before = kept(held)[1]
    lost = REAL(order(settings, 2, first), held)  # served and kept, and its reply never arrives
    assert not lost.has_error() and not heard.text
    shutil.copytree(folder_of(held), saved := tmp_path / "saved")
    again = moved(settings, held, first, 2)
    assert "goes back to what stayed at the site after round 1; what came of round 2 is given up" in heard.text
    shutil.rmtree(folder_of(held))
    shutil.copytree(saved, folder_of(held))
    for path in folder_of(held).glob("2-*"):
        path.unlink()
    assert same(again, moved(settings, real(settings), first, 2))  # as if the lost reply had never been
    assert same(kept(held)[1], before)


def test_a_site_that_lost_its_part_starts_anew_and_says_so_in_one_line(tmp_path: Path, real: MakeReal, heard: Heard) -> None:
    settings = small(tmp_path, **FEDSA)
    held = real(settings)
    first = name_of(REAL(order(settings), held))
    anew = moved(settings, owned(real(settings), _new(tmp_path / "fresh")), "", 2)
    shutil.rmtree(folder_of(held).parent)
    assert same(moved(settings, real(settings), first, 2), anew)
    assert heard.text.count("\n") == 1 and "run 1, round 2: what stayed at the site after the reply" in heard.text
    assert "is not there: it starts anew" in heard.text


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another file"])
def test_a_damaged_file_is_not_used(damage: str, tmp_path: Path, real: MakeReal, heard: Heard) -> None:
    settings = small(tmp_path, **FEDSA)
    held = real(settings)
    first = name_of(REAL(order(settings), held))
    anew = moved(settings, owned(real(settings), _new(tmp_path / "fresh")), "", 2)
    path = next(folder_of(held).glob("1-*"))
    content = path.read_bytes()
    made = {"cut": content[:-4], "flipped": b"\xff" + content[1:], "empty": b"", "another file": b"{}" * 40}
    path.write_bytes(made[damage])
    assert same(moved(settings, real(settings), first, 2), anew)
    assert "is damaged" in heard.text and "it starts anew" in heard.text


def test_a_resumed_run_goes_on_under_a_new_id_and_the_log_says_so(tmp_path: Path, real: MakeReal, heard: Heard) -> None:
    settings = small(tmp_path, **FEDSA)
    first = name_of(REAL(order(settings), real(settings)))
    shutil.copytree(tmp_path / "own-ledger.own", _new(tmp_path / "twin") / "own-ledger.own")
    went_on = moved(settings, owned(real(settings), tmp_path / "twin"), first, 2)
    assert not heard.text
    resumed = small(tmp_path, resume=True, **FEDSA)  # where a run lies may differ, nothing else
    assert same(moved(resumed, real(resumed, run_id=2), first, 2), went_on)
    assert "run 2, round 2: goes on from what stayed at the site after round 1 of run 1" in heard.text
    assert list(kept(real(settings, run_id=2))) == [2] and list(kept(real(settings))) == [1]


@pytest.mark.parametrize("other", [{"seed": 1}, {"lora__alpha": 2.0}, {"train__lr": 0.25}, {"dataset": "another"}])
def test_a_run_of_other_settings_or_records_gets_nothing(
    other: dict[str, Any], tmp_path: Path, real: MakeReal, heard: Heard
) -> None:
    settings = small(tmp_path, **FEDSA)
    first = name_of(REAL(order(settings), real(settings)))
    owner = {"dataset": other["dataset"]} if "dataset" in other else {}
    changed = small(tmp_path, **{**FEDSA, **({} if owner else other)})
    fresh = moved(changed, owned(real(changed), _new(tmp_path / "fresh"), **owner), "", 2)
    (twin := _new(tmp_path / "twin"))
    shutil.copytree(tmp_path / "own-ledger.own", twin / "own-ledger.own")
    assert same(moved(changed, owned(real(changed), twin, run_id=2, **owner), first, 2), fresh)
    assert "is of a run of other settings, records or model" in heard.text and "it starts anew" in heard.text


def test_nothing_is_spent_where_nothing_can_be_kept(tmp_path: Path, real: MakeReal) -> None:
    settings = small(tmp_path, **FEDSA)
    held = real(settings)
    folder_of(held).parent.write_text("in the way")
    reply = REAL(order(settings), held)
    assert reply.error.reason == "own: the site cannot keep what stays with it; its own log says why"
    assert steps_in(held) == 0


def test_the_site_finds_its_own_model_as_a_folder_for_peft(tmp_path: Path, real: MakeReal) -> None:
    settings = small(tmp_path, **FEDSA)
    held = real(settings)
    first = REAL(order(settings), held)
    second = REAL(order(settings, 2, name_of(first)), held)
    made = PeftModel.from_pretrained(build_vit_digits(), str(folder_of(held) / "adapter")).eval()
    learner = servers_learner(settings)
    learner.adapter.load({**arrays_of(second), **kept(held)[2]})
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(made(images), learner.adapter.model.eval()(images))
        assert not torch.allclose(made(images), build_vit_digits()(images), atol=1e-3)


KILLED = """
import os, signal, sys
from pathlib import Path
from lalora_flwr.site import own_part
sys.path.insert(0, {root!r})
from tests.conftest import small
from tests.ledger.site_ledgers import owned
from tests.sites import REAL
from tests.site.test_own_part import order
from flwr.app import Context, RecordDict
from lalora_flwr.settings import flatten

place = Path({folder!r})
settings = small(place, **{settings!r})
write, seen = own_part.replace_file, []

def dying(path, content, **more):
    seen.append(path)
    if {moment!r} == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content, **more)
    os.kill(os.getpid(), signal.SIGKILL)

own_part.replace_file = dying
node = {{"partition-id": 0, "num-partitions": settings.num_supernodes}}
held = Context(run_id=1, node_id=7, node_config=node, state=RecordDict(), run_config=dict(flatten(settings)))
REAL(order(settings, 2, {own!r}), owned(held, place))
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_site_killed_around_the_write_goes_on(moment: str, tmp_path: Path, real: MakeReal) -> None:
    """kill -9 in the middle of round 2: the round is counted, and asked again it begins where round 1 ended."""
    settings = small(tmp_path, **FEDSA)
    held = real(settings)
    first = name_of(REAL(order(settings), held))
    shutil.copytree(folder_of(held).parent, _new(tmp_path / "twin") / "own-ledger.own")
    root = str(Path(__file__).parents[2])
    script = KILLED.format(root=root, folder=str(tmp_path), settings=FEDSA, moment=moment, own=first)
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, env={**os.environ})
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert sorted(kept(held)) == ([1] if moment == "before" else [1, 2])
    undisturbed = moved(settings, owned(real(settings), tmp_path / "twin"), first, 2)
    assert same(moved(settings, real(settings), first, 2), undisturbed)


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder
