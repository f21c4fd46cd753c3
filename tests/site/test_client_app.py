"""What a site's failures tell the server: a fixed reason, and nothing of its records."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from lalora_flwr.ground.errors import ConfigError, RunFailed, SiteRefusal
from lalora_flwr.site.app import answer
from lalora_flwr.wire.orders import ARRAYS
from lalora_flwr.wire.replies import COUNTERS
from lalora_flwr.wire.tensors import to_arrays
from tests.conftest import AppCall, Spy, arrays_of, files_in, run_spied, small, strict_json
from tests.ledger.site_ledgers import steps_in
from tests.site.failures import FIXED, SECRET, FailsAt, Heard, MakeContext, MakeReal, raising
from tests.sites import REAL, VIRTUAL, real_app, virtual_app
from tests.sites import train_order as order

LEDGER_FAULT = "ledger: the site cannot use it; its own log says why"


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


def failing(error: BaseException) -> Callable[[RecordDict, Context], RecordDict]:
    """A site's work that ends in an error."""
    return raising(error)


@pytest.mark.parametrize(
    "error", [RuntimeError(SECRET), KeyError(SECRET), ConfigError(SECRET), RunFailed(SECRET)], ids=lambda e: type(e).__name__
)
def test_an_exceptions_text_stays_in_the_sites_own_log(
    error: Exception, tmp_path: Path, context: MakeContext, heard: Callable[[str], Heard]
) -> None:
    own = heard("lalora_flwr.site")
    reply = answer(failing(error), order(settings := small(tmp_path)), context(settings), lambda: 0.0)
    assert reply.has_error() and not reply.has_content()
    configuration = "configuration: the site cannot use it; its own log says why"
    assert reply.error.reason == (configuration if isinstance(error, ConfigError) else FIXED)
    assert SECRET not in str(vars(reply.error)) and SECRET not in str(vars(reply.metadata))
    assert SECRET in own.text


def test_an_exception_while_loading_records_is_answered_with_noise_and_counted(
    tmp_path: Path, real: MakeReal, heard: Callable[[str], Heard]
) -> None:
    own, held = heard("lalora_flwr.site"), real(settings := small(tmp_path))
    assert not real_app(records=raising(OSError(SECRET)))(order(settings), held).has_error()
    assert steps_in(held) == 2
    assert SECRET in own.text and "NO USABLE RECORD" in own.text


def test_another_base_model_is_refused_before_the_records_are_read(tmp_path: Path, context: MakeContext) -> None:
    app = virtual_app(records=raising(OSError(SECRET)))
    held = context(settings := small(tmp_path))
    assert app(order(settings, model_digest="0" * 64), held).error.reason.startswith("model: the site's base model differs")
    assert "ledger" not in held.state


@pytest.mark.parametrize("app", [REAL, VIRTUAL], ids=["real", "virtual"])
def test_a_message_without_an_order_is_refused(app: AppCall, tmp_path: Path, context: MakeContext, real: MakeReal) -> None:
    empty = Message(RecordDict(), dst_node_id=7, message_type="train")
    settings = small(tmp_path)
    held = real(settings) if app is REAL else context(settings)
    assert app(empty, held).error.reason == "order: its values are not the declared ones"


@pytest.mark.parametrize("sites_that_fail", [1, 3])
def test_an_exceptions_text_reaches_no_file_and_no_log_of_the_server(
    sites_that_fail: int, tmp_path: Path, heard: Callable[[str], Heard]
) -> None:
    def behaviour(message: Message, context: Context, app: AppCall) -> Message:
        if message.metadata.message_type == "train" and int(context.node_config["partition-id"]) < sites_that_fail:
            return answer(failing(RuntimeError(SECRET)), message, context, lambda: 0.0)
        return app(message, context)

    server, spy = heard("lalora_flwr.server"), Spy(behaviour)
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


def test_a_refusals_text_passes(tmp_path: Path, context: MakeContext) -> None:
    settings = small(tmp_path)
    reply = answer(failing(SiteRefusal("budget: spent")), order(settings), context(settings), lambda: 0.0)
    assert reply.error.reason == "budget: spent"


def test_a_site_that_knows_no_partition_refuses(tmp_path: Path, real: MakeReal) -> None:
    held = real(settings := small(tmp_path))
    del held.node_config["partition-id"]
    assert REAL(order(settings), held).error.reason == "data: the site's node-config names no data-path"


@pytest.mark.parametrize("step", [0, 2])
def test_steps_counted_before_a_failure_stay_counted(step: int, tmp_path: Path, context: MakeContext) -> None:
    held = context(settings := small(tmp_path))
    assert virtual_app(make_sum=FailsAt(step))(order(settings), held).error.reason == FIXED
    assert held.state["ledger"]["steps"] == [2]
    after = VIRTUAL(order(settings, 2), held)
    assert after.content[COUNTERS]["steps"] == 4
    assert after.content[COUNTERS]["epsilon"] == pytest.approx(4.0, abs=0.05)


def test_a_site_serves_no_more_steps_than_its_noise_is_made_for(tmp_path: Path, context: MakeContext) -> None:
    held = context(settings := small(tmp_path, num_rounds=1))
    assert not VIRTUAL(order(settings), held).has_error()
    spent = dict(held.state["ledger"])
    assert VIRTUAL(order(settings, 2), held).error.reason.startswith("budget: ")
    assert dict(held.state["ledger"]) == spent


def test_a_start_other_than_the_servers_is_refused(tmp_path: Path, context: MakeContext) -> None:
    settings = small(tmp_path)
    moved = order(settings)
    values = {name: tensor + 1e-6 for name, tensor in arrays_of(moved).items()}
    moved.content[ARRAYS] = to_arrays(values)
    half = order(settings)
    half.content[ARRAYS] = to_arrays({n: t for n, t in arrays_of(half).items() if ".lora_B." in n})
    wide = order(settings)
    wide.content[ARRAYS] = to_arrays({n: t.repeat(2, 2) for n, t in arrays_of(wide).items()})
    for bad in (order(settings, adapter_digest="0" * 64), moved, half, wide):
        held = context(settings)
        assert VIRTUAL(bad, held).error.reason.startswith("adapter: ")
        assert "ledger" not in held.state
