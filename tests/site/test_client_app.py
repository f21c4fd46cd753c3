"""A site's answers: what fails on it stays on it, and what it spent stays counted."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from lalora_flwr.adapter.lora import digest
from lalora_flwr.client_app import app
from lalora_flwr.ground.errors import ConfigError, RunFailed, SiteRefusal
from lalora_flwr.methods.schedules import BOTH
from lalora_flwr.privacy.mechanism import PrivateSum
from lalora_flwr.privacy.randomness import SeededRandom, SystemRandom
from lalora_flwr.server.strategy import resolved_choices
from lalora_flwr.settings import Settings
from lalora_flwr.site import round as site
from lalora_flwr.training import local as training
from lalora_flwr.training.learner import adapted_model
from lalora_flwr.wire.messages import ARRAYS, CONFIG, COUNTERS, TrainOrder, to_arrays
from tests.conftest import Spy, arrays_of, files_in, run_spied, small, strict_json
from tests.ledger.site_ledgers import owned, steps_in

SECRET = "patient 17 has blood group AB"
FIXED = "failure: the site's own log says why"
LEDGER_FAULT = "ledger: the site cannot use it; its own log says why"
MakeContext = Callable[[Settings], Context]
MakeReal = Callable[..., Context]


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "_inline_simulation", True)


@pytest.fixture(autouse=True)
def _stamps() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # Flower stamps messages with them


@pytest.fixture
def real(context: MakeContext, tmp_path: Path) -> MakeReal:
    """The context of a real site, with a ledger and caps; ``changed`` is what its node-config says differently."""
    return lambda settings, **changed: owned(context(settings), tmp_path, **changed)


class Heard(logging.Handler):
    """Everything that a logger says, as text."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += logging.Formatter().format(record) + "\n"


@pytest.fixture
def heard() -> Iterator[Callable[[str], Heard]]:
    """What a logger says from now on."""
    added: list[tuple[logging.Logger, Heard]] = []

    def listen(name: str) -> Heard:
        added.append((logging.getLogger(name), Heard()))
        added[-1][0].addHandler(added[-1][1])
        return added[-1][1]

    yield listen
    for logger, handler in added:
        logger.removeHandler(handler)


def order(settings: Settings, server_round: int = 1, **changed: Any) -> Message:
    """The server's order for a round that starts from the initial adapter."""
    initial = adapted_model(settings).initial
    schedule, filter_name = resolved_choices(settings)
    fields = {"schedule": schedule, "filter": filter_name, "share": "both", "adapter_digest": digest(initial, BOTH | {"head"})}
    fields["model_digest"] = adapted_model(settings).base.provenance.digest
    record = TrainOrder(server_round, **{**fields, **changed}).to_record()
    return Message(RecordDict({ARRAYS: to_arrays(initial), CONFIG: record}), dst_node_id=7, message_type="train")


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [RuntimeError(SECRET), KeyError(SECRET), ConfigError(SECRET), RunFailed(SECRET)], ids=lambda e: type(e).__name__
)
def test_an_exceptions_text_stays_in_the_sites_own_log(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    context: MakeContext,
    heard: Callable[[str], Heard],
) -> None:
    monkeypatch.setattr(site, "train", raising(error))
    own = heard("lalora_flwr.site.round")
    reply = app(order(settings := small(tmp_path)), context(settings))
    assert reply.has_error() and not reply.has_content()
    configuration = "configuration: the site cannot use it; its own log says why"
    assert reply.error.reason == (configuration if isinstance(error, ConfigError) else FIXED)
    assert SECRET not in str(vars(reply.error)) and SECRET not in str(vars(reply.metadata))
    assert SECRET in own.text


def test_an_exception_while_loading_records_is_answered_with_noise_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: MakeReal, heard: Callable[[str], Heard]
) -> None:
    monkeypatch.setattr(site, "load_records", raising(OSError(SECRET)))
    own, held = heard("lalora_flwr.site.round"), real(settings := small(tmp_path))
    assert not app(order(settings), held).has_error()
    assert steps_in(held) == 2
    assert SECRET in own.text and "NO USABLE RECORD" in own.text


@pytest.mark.usefixtures("simulated")
def test_another_base_model_is_refused_before_the_records_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: MakeContext
) -> None:
    monkeypatch.setattr(site, "load_records", raising(OSError(SECRET)))
    held = context(settings := small(tmp_path))
    assert app(order(settings, model_digest="0" * 64), held).error.reason.startswith("model: the site's base model differs")
    assert "ledger" not in held.state


def test_a_message_without_an_order_gets_the_fixed_reason(tmp_path: Path, context: MakeContext) -> None:
    empty = Message(RecordDict(), dst_node_id=7, message_type="train")
    assert app(empty, context(small(tmp_path))).error.reason == FIXED


@pytest.mark.parametrize("sites_that_fail", [1, 3])
def test_an_exceptions_text_reaches_no_file_and_no_log_of_the_server(
    sites_that_fail: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: Callable[[str], Heard]
) -> None:
    real = site.train

    def train(content: RecordDict, context: Context) -> RecordDict:
        if int(context.node_config["partition-id"]) < sites_that_fail:
            raise RuntimeError(SECRET)
        return real(content, context)

    monkeypatch.setattr(site, "train", train)
    server, spy = heard("lalora_flwr.server"), Spy()
    settings = small(tmp_path, num_rounds=1)
    if sites_that_fail == 3:
        with pytest.raises(RunFailed) as stopped:
            run_spied(settings, spy)
        assert SECRET not in str(stopped.value)
        assert FIXED in strict_json((tmp_path / "run" / "failure.json").read_text())["error"]
    else:
        run_spied(settings, spy)
        assert strict_json((tmp_path / "run" / "metrics.jsonl").read_text())["failed_sites"] == {"0": FIXED}
    assert FIXED in server.text and SECRET not in server.text
    assert sum(reply.has_error() for _, reply in spy.training(1)) == sites_that_fail
    for name, content in files_in(tmp_path).items():
        if name == "run/flower.log":  # one process, so the sites' own log lies in it too
            content = b"\n".join(line for line in content.splitlines() if b"INFO flwr:" in line or b"server:" in line)
        assert SECRET.encode() not in content, name


def test_a_refusals_text_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: MakeContext) -> None:
    monkeypatch.setattr(site, "train", raising(SiteRefusal("budget: spent")))
    assert app(order(settings := small(tmp_path)), context(settings)).error.reason == "budget: spent"


def test_a_site_that_knows_no_partition_refuses(tmp_path: Path, real: MakeReal) -> None:
    held = real(settings := small(tmp_path))
    del held.node_config["partition-id"]
    assert app(order(settings), held).error.reason == "data: the site's node-config names no data-path"


@pytest.mark.parametrize("fails_at", ["the optimizer", "the second release"])
@pytest.mark.usefixtures("simulated")
def test_steps_counted_before_a_failure_stay_counted(
    fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: MakeContext
) -> None:
    held, releases, release = context(settings := small(tmp_path)), [], PrivateSum.release

    def second_fails(self: PrivateSum, *arguments: Any) -> dict[str, torch.Tensor]:
        releases.append(self)
        if len(releases) == 2:
            raise RuntimeError(SECRET)
        return release(self, *arguments)

    with monkeypatch.context() as broken:
        if fails_at == "the optimizer":
            broken.setattr(training, "make_optimizer", raising(RuntimeError(SECRET)))
        else:
            broken.setattr(PrivateSum, "release", second_fails)
        assert app(order(settings), held).error.reason == FIXED
    assert held.state["ledger"]["steps"] == [2]
    after = app(order(settings, 2), held)
    assert after.content[COUNTERS]["steps"] == 4
    assert after.content[COUNTERS]["epsilon"] == pytest.approx(4.0, abs=0.05)


@pytest.mark.usefixtures("simulated")
def test_a_site_serves_no_more_steps_than_its_noise_is_made_for(tmp_path: Path, context: MakeContext) -> None:
    held = context(settings := small(tmp_path, num_rounds=1))
    assert not app(order(settings), held).has_error()
    spent = dict(held.state["ledger"])
    assert app(order(settings, 2), held).error.reason.startswith("budget: ")
    assert dict(held.state["ledger"]) == spent


@pytest.mark.usefixtures("simulated")
def test_a_start_other_than_the_servers_is_refused(tmp_path: Path, context: MakeContext) -> None:
    settings = small(tmp_path)
    moved = order(settings)
    values = {name: tensor + 1e-6 for name, tensor in arrays_of(moved).items()}
    moved.content[ARRAYS] = to_arrays(values)
    elsewhere = order(small(tmp_path, strategy="ffa-lora", seed=1), share="trained")
    elsewhere.content[ARRAYS] = to_arrays({n: t for n, t in arrays_of(elsewhere).items() if ".lora_B." in n})
    for bad in (order(settings, adapter_digest="0" * 64), moved, elsewhere):
        held = context(settings)
        assert app(bad, held).error.reason.startswith("adapter: ")
        assert "ledger" not in held.state


@pytest.mark.usefixtures("simulated")
def test_in_a_simulation_the_seed_decides_and_the_counters_say_so(tmp_path: Path, context: MakeContext) -> None:
    settings = small(tmp_path)
    one, two = (app(order(settings), context(settings)) for _ in range(2))
    assert one.content[COUNTERS]["seeded"] == two.content[COUNTERS]["seeded"] == 1
    assert all(torch.equal(tensor, arrays_of(two)[name]) for name, tensor in arrays_of(one).items())


def test_outside_of_a_simulation_the_seed_decides_nothing(tmp_path: Path, real: MakeReal) -> None:
    settings = small(tmp_path, seed=3)
    replies = []
    for _ in range(2):
        torch.manual_seed(0)
        replies.append(app(order(settings), real(settings)))
    one, two = replies
    assert one.content[COUNTERS]["seeded"] == two.content[COUNTERS]["seeded"] == 0
    assert not any(torch.equal(tensor, arrays_of(two)[name]) for name, tensor in arrays_of(one).items())


def test_only_a_ray_worker_or_the_inline_engine_is_a_simulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(tmp_path, seed=3)
    started = False
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    assert not site.in_simulation()
    assert isinstance(site.random_source(settings, 0, 1), SystemRandom)
    fake: Any = SimpleNamespace(is_initialized=lambda: started)
    monkeypatch.setitem(sys.modules, "ray", fake)
    assert not site.in_simulation()
    assert isinstance(site.random_source(settings, 0, 1), SystemRandom)
    started = True
    assert site.in_simulation()
    assert isinstance(site.random_source(settings, 0, 1), SeededRandom)
    monkeypatch.delitem(sys.modules, "ray")
    monkeypatch.setattr(site, "_inline_simulation", True)
    assert isinstance(site.random_source(settings, 0, 1), SeededRandom)


@pytest.mark.usefixtures("simulated")
def test_simulated_draws_differ_by_seed_by_site_and_by_round(tmp_path: Path) -> None:
    cases = [(small(tmp_path, seed=seed), number, r) for seed in (0, 1) for number in (0, 1) for r in (1, 2)]
    noise = {tuple(site.random_source(*case).normal(torch.Size([8])).tolist()) for case in cases}
    sampling = {tuple(site.random_source(*case).uniform(8).tolist()) for case in cases}
    assert len(noise) == len(sampling) == 8


@pytest.mark.usefixtures("simulated")
def test_in_a_simulation_the_count_travels_in_the_sites_state_and_nothing_else_does(tmp_path: Path, context: MakeContext) -> None:
    held = context(settings := small(tmp_path))
    app(order(settings), held)
    assert set(held.state) == {"ledger"} and isinstance(held.state["ledger"], ConfigRecord)
    assert set(held.state["ledger"]) == {"noise-multiplier", "sample-rate", "steps"}


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({}, "data: the run's data.labels are not the classes that the site's node-config names, in its order"),
        (
            {"data__labels": "b,a"},
            "data: the run's data.labels are not the classes that the site's node-config names, in its order",
        ),
        (
            {"data__labels": "a,b,c"},
            "data: the run's data.labels are not the classes that the site's node-config names, in its order",
        ),
        ({"data__response": "r"}, "data: the run's task is not the one that the site's node-config names"),
        ({"model__name": "timm/x"}, "data: the run's task is not the one that the site's node-config names"),
        ({"data__labels": "a,b"}, "data: the site's node-config names no data-path"),
        ({"data__labels": "a,b", "data__max_tokens": 65}, "data: the run's data.max-tokens are above the site's max-tokens"),
    ],
    ids=str,
)
def test_a_run_cannot_make_a_real_site_read_files_or_count_other_classes(
    asked: dict[str, Any], reason: str, tmp_path: Path, real: MakeReal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "adapted_model", lambda *_: pytest.fail("something was read"))
    run = {"model__name": "hf/x", "data__name": "file:/etc/*.csv", "data__num_classes": 2, "data__max_tokens": 64, **asked}
    settings = small(tmp_path, **run)
    config = TrainOrder(1, "step:BA", "gauss5", "both", "", "").to_record()
    message = Message(RecordDict({ARRAYS: to_arrays({}), CONFIG: config}), dst_node_id=7, message_type="train")
    held = real(settings, task="text", labels="a,b", **{"max-tokens": 64})
    assert app(message, held).error.reason == reason
    assert steps_in(held) == 0
