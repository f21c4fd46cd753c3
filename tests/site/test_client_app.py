"""A site's answers: what fails on it stays on it, and what it spent stays counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from lalora_flwr.ground.errors import ConfigError, RunFailed, SiteRefusal
from lalora_flwr.privacy.mechanism import PrivateSum
from lalora_flwr.privacy.randomness import RandomSource, SeededRandom, SystemRandom
from lalora_flwr.settings import Settings, flatten
from lalora_flwr.site.app import answer
from lalora_flwr.site.host import in_ray_worker
from lalora_flwr.site.round import Site
from lalora_flwr.training.learner import Learner, LearnerCache
from lalora_flwr.wire.orders import ARRAYS, CONFIG, TrainOrder
from lalora_flwr.wire.replies import COUNTERS
from lalora_flwr.wire.tensors import to_arrays
from tests.conftest import MODELS, AppCall, Spy, arrays_of, files_in, run_spied, small, strict_json
from tests.ledger.site_ledgers import DIGITS_SITE, owned, steps_in
from tests.sites import REAL, VIRTUAL, host, real_app, virtual_app
from tests.sites import train_order as order

SECRET = "patient 17 has blood group AB"
FIXED = "failure: the site's own log says why"
LEDGER_FAULT = "ledger: the site cannot use it; its own log says why"
MakeContext = Callable[[Settings], Context]
MakeReal = Callable[..., Context]


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


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


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


class FailsAt:
    """Makes the sums of a round's steps, of which one fails; the first when it is made, as the optimizer would."""

    def __init__(self, step: int) -> None:
        self._step, self._made = step, 0

    def __call__(self, *arguments: Any) -> PrivateSum:
        self._made += 1
        if self._step == 0:
            raise RuntimeError(SECRET)
        return Failing(*arguments) if self._made == self._step else PrivateSum(*arguments)


class Failing(PrivateSum):
    def release(self, *_: Any) -> dict[str, torch.Tensor]:
        raise RuntimeError(SECRET)


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


def test_in_a_simulation_the_seed_decides_and_the_counters_say_so(tmp_path: Path, context: MakeContext) -> None:
    settings = small(tmp_path)
    one, two = (VIRTUAL(order(settings), context(settings)) for _ in range(2))
    assert one.content[COUNTERS]["seeded"] == two.content[COUNTERS]["seeded"] == 1
    assert all(torch.equal(tensor, arrays_of(two)[name]) for name, tensor in arrays_of(one).items())


def test_outside_of_a_simulation_the_seed_decides_nothing(tmp_path: Path, real: MakeReal) -> None:
    settings = small(tmp_path, seed=3)
    replies = []
    for _ in range(2):
        torch.manual_seed(0)
        replies.append(REAL(order(settings), real(settings)))
    one, two = replies
    assert one.content[COUNTERS]["seeded"] == two.content[COUNTERS]["seeded"] == 0
    assert not any(torch.equal(tensor, arrays_of(two)[name]) for name, tensor in arrays_of(one).items())


def test_only_a_ray_worker_makes_a_simulation_of_flowers_own_process() -> None:
    """The inline engine says so by value, as `tests.sites` does."""
    started = False
    fake: Any = SimpleNamespace(is_initialized=lambda: started)
    assert not in_ray_worker({})
    assert not in_ray_worker({"ray": fake})
    started = True
    assert in_ray_worker({"ray": fake})


def source(simulated: bool, settings: Settings, site: int, server_round: int) -> RandomSource:
    owner = {} if simulated else {**DIGITS_SITE, "ledger-path": "ledger"}
    node_config = {"partition-id": site, "num-partitions": 2, **owner}
    context = Context(1, 7, node_config, RecordDict(), dict(flatten(settings)))
    return Site.of(host(simulated=simulated), context).source(settings, server_round)


def test_a_real_site_draws_from_the_operating_system_and_a_virtual_one_from_the_seed(tmp_path: Path) -> None:
    settings = small(tmp_path, seed=3)
    assert isinstance(source(False, settings, 0, 1), SystemRandom)
    assert isinstance(source(True, settings, 0, 1), SeededRandom)


def test_simulated_draws_differ_by_seed_by_site_and_by_round(tmp_path: Path) -> None:
    cases = [(True, small(tmp_path, seed=seed), number, r) for seed in (0, 1) for number in (0, 1) for r in (1, 2)]
    noise = {tuple(source(*case).normal(torch.Size([8])).tolist()) for case in cases}
    sampling = {tuple(source(*case).uniform(8).tolist()) for case in cases}
    assert len(noise) == len(sampling) == 8


def test_in_a_simulation_the_count_travels_in_the_sites_state_and_nothing_else_does(tmp_path: Path, context: MakeContext) -> None:
    held = context(settings := small(tmp_path))
    VIRTUAL(order(settings), held)
    assert set(held.state) == {"ledger"} and isinstance(held.state["ledger"], ConfigRecord)
    assert set(held.state["ledger"]) == {"noise-multiplier", "sample-rate", "steps"}


class Untouchable(LearnerCache):
    """Of a site that must not need its model."""

    def __init__(self) -> None:
        super().__init__(MODELS)

    def learner(self, *_: Any) -> Learner:
        pytest.fail("the model was made")


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
    asked: dict[str, Any], reason: str, tmp_path: Path, real: MakeReal
) -> None:
    app = real_app(learners=Untouchable(), records=raising(AssertionError("something was read")))
    run = {"model__name": "hf/x", "data__name": "file:/etc/*.csv", "data__num_classes": 2, "data__max_tokens": 64, **asked}
    settings = small(tmp_path, **run)
    config = TrainOrder(1, "", "").to_record()
    message = Message(RecordDict({ARRAYS: to_arrays({}), CONFIG: config}), dst_node_id=7, message_type="train")
    held = real(settings, task="text", labels="a,b", **{"max-tokens": 64})
    assert app(message, held).error.reason == reason
    assert steps_in(held) == 0
