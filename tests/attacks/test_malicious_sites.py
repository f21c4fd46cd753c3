"""Sites that lie to the server: in their counters, in their tensors, in what they say of the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from lalora_flwr.ground.errors import LaloraError
from lalora_flwr.wire.orders import ARRAYS
from lalora_flwr.wire.replies import COUNTERS, SITE_METRICS
from lalora_flwr.wire.tensors import to_arrays
from tests.conftest import AppCall, Finished, Spy, arrays_of, run_spied, small

LIAR = 1  # the site that lies; the two others are honest


def spied(folder: Path, lie: Callable[[Message, Message], Message], **overrides: Any) -> Finished:
    """A run of three sites in which one replaces its answers to training orders."""

    def behaviour(message: Message, context: Context, app: AppCall) -> Message:
        reply = app(message, context)
        training = message.metadata.message_type == "train"
        return lie(message, reply) if training and context.node_config["partition-id"] == LIAR else reply

    settings, spy = small(folder, **overrides), Spy(behaviour)
    return Finished(run_spied(settings, spy), settings, spy)


def counting(**said: float) -> Callable[[Message, Message], Message]:
    def lie(message: Message, reply: Message) -> Message:
        counters = {**reply.content[COUNTERS], **{name.replace("_", "-"): value for name, value in said.items()}}
        return Message(RecordDict({ARRAYS: reply.content[ARRAYS], COUNTERS: MetricRecord(counters)}), reply_to=message)

    return lie


def sending(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Message, Message], Message]:
    """``change`` makes of the tensor that came and of the honest one what is sent back."""

    def lie(message: Message, reply: Message) -> Message:
        came, honest = arrays_of(message), arrays_of(reply)
        arrays = to_arrays({name: change(came[name], tensor) for name, tensor in honest.items()})
        return Message(RecordDict({ARRAYS: arrays, COUNTERS: reply.content[COUNTERS]}), reply_to=message)

    return lie


COUNTS: dict[str, dict[str, float]] = {
    "infinite epsilon": {"epsilon": math.inf},
    "huge epsilon": {"epsilon": 1e6},
    "no epsilon": {"epsilon": 0.0},
    "epsilon is no number": {"epsilon": math.nan},
    "negative epsilon": {"epsilon": -1.0},
    "steps never taken": {"steps": 10**12},
    "no steps": {"steps": 0},
    "half a step": {"steps": 1.5},
    "no noise": {"noise-multiplier": 0.0},
    "too much noise": {"noise-multiplier": 1e30},
    "a rate above 1": {"sample-rate": 7.0},
    "a tiny rate": {"sample-rate": 1e-9},
    "not seeded": {"seeded": 0},
    "seeded as nobody is": {"seeded": 17},
}


@pytest.mark.parametrize("name", COUNTS)
def test_what_a_site_counts_is_not_what_a_run_claims(name: str, tmp_path: Path, finished: Callable[..., Finished]) -> None:
    """Hole 9: a site's "ε = inf" became the headline of the run. The summary's figures are the server's own."""
    honest = finished(num_rounds=1).summary
    run = spied(tmp_path, counting(**COUNTS[name]), num_rounds=1)
    for figure in ("epsilon", "noise_multiplier", "sample_rate"):  # of sites of 366 or 367 records
        said = run.summary[figure]  # the noise of a site that tells none is not known
        assert said == pytest.approx(honest[figure], rel=0.01) or (said is None and figure != "epsilon"), figure
    assert run.metrics[0]["epsilon"] == run.summary["epsilon"] <= 4.0
    assert run.summary["seeded"] is True
    said = run.summary["sites"].get(str(LIAR), honest["sites"][str(LIAR)])
    assert said["epsilon"] == pytest.approx(honest["epsilon"], rel=0.01)
    assert said["steps"] == honest["sites"][str(LIAR)]["steps"]


GARBAGE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "NaN": lambda came, honest: honest.masked_fill(torch.arange(honest.numel()).view(honest.shape) == 0, math.nan),
    "infinite": lambda came, honest: torch.full_like(honest, math.inf),
    "above every bound": lambda came, honest: honest * 1e30,
    "another shape": lambda came, honest: honest.flatten()[:1],
    "transposed": lambda came, honest: honest.T.contiguous(),
    "unchanged": lambda came, honest: came,
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_rejected_and_its_sender_counted_out(name: str, tmp_path: Path, finished: Callable[..., Finished]) -> None:
    """Hole 9: tensors that are none of a site's never reach the mean, and the round says who sent them."""
    run = spied(tmp_path, sending(GARBAGE[name]), num_rounds=1)
    assert run.metrics[0]["failed_sites"].keys() == {str(LIAR)} and run.metrics[0]["sites"] == 2
    two = [arrays_of(reply) for number, (_, reply) in enumerate(run.spy.training(1)) if number != LIAR]
    for tensor_name, merged in run.checkpoint.items():
        torch.testing.assert_close(merged, sum(t[tensor_name] for t in two) / 2, msg=tensor_name)


def moved(run: Finished) -> float:
    """How far the adapter of a run of one round is from where it started."""
    start = arrays_of(run.spy.training(1)[0][0])
    return math.sqrt(sum(float((run.checkpoint[n] - t).double().square().sum()) for n, t in start.items()))


DEFENCES: dict[str, dict[str, Any]] = {
    "median": {"merge__name": "median"},
    "trimmed mean": {"merge__name": "trimmed-mean", "merge__trim": 0.34},
    "bounded updates": {"merge__max_update_norm": 5.0},
    "bounded median": {"merge__name": "median", "merge__max_update_norm": 5.0},
}


@pytest.mark.parametrize("name", DEFENCES)
@pytest.mark.parametrize("factor", [1000.0, -1000.0, 10.0])
def test_one_site_cannot_carry_the_adapter_away(
    factor: float, name: str, tmp_path: Path, finished: Callable[..., Finished]
) -> None:
    """Hole 9: a reply whose update is a thousand times the honest one was averaged with the others. Times ten is not too long."""
    run = spied(tmp_path, sending(lambda came, honest: came + factor * (honest - came)), num_rounds=1, **DEFENCES[name])
    honest = moved(finished(num_rounds=1))
    assert 0 < moved(run) <= 3 * max(honest, DEFENCES[name].get("merge__max_update_norm", 0.0))


@pytest.mark.parametrize("share", [1.001, 0.999])
def test_an_update_counts_up_to_the_longest_honest_one(share: float, tmp_path: Path) -> None:
    """A site that knows the bound sends one just below it: the mean moves by that over the number of sites, and no more."""
    told = spied(tmp_path / "first", sending(lambda came, honest: torch.full_like(honest, 99.0)), num_rounds=1)
    longest = float(told.metrics[0]["failed_sites"][str(LIAR)].partition("above ")[2].partition(",")[0])

    def lie(message: Message, reply: Message) -> Message:
        came, honest = arrays_of(message), arrays_of(reply)
        length = math.sqrt(sum(float((honest[n] - came[n]).double().square().sum()) for n in came))
        return sending(lambda start, own: start + (own - start) * (share * longest / length))(message, reply)

    run = spied(tmp_path / "second", lie, num_rounds=1)
    assert run.metrics[0]["failures"] == (share > 1)
    assert moved(run) <= longest / 3 + 1


RECORDS: dict[str, Callable[[Message], RecordDict]] = {
    "nothing": lambda reply: RecordDict(),
    "counters as arrays": lambda reply: RecordDict({ARRAYS: reply.content[ARRAYS], COUNTERS: ArrayRecord()}),
    "a record more": lambda reply: RecordDict({**reply.content, "note": MetricRecord({"x": 1})}),
    "a counter more": lambda reply: RecordDict(
        {ARRAYS: reply.content[ARRAYS], COUNTERS: MetricRecord({**reply.content[COUNTERS], "records": 300})}
    ),
    "no array": lambda reply: RecordDict(
        {
            ARRAYS: ArrayRecord({n: Array("float32", (1,), "numpy.ndarray", b"junk") for n in reply.content[ARRAYS]}),
            COUNTERS: reply.content[COUNTERS],
        }
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_reply_of_another_form_is_rejected(name: str, tmp_path: Path) -> None:
    """Hole 9: the contract of a reply holds for every byte of it."""
    run = spied(tmp_path, lambda message, reply: Message(RECORDS[name](reply), reply_to=message), num_rounds=1)
    assert run.metrics[0]["failed_sites"].keys() == {str(LIAR)} and run.metrics[0]["sites"] == 2


@pytest.mark.parametrize("accuracy", [math.nan, math.inf, 1e9, -1.0])
def test_a_site_may_not_invent_an_accuracy(accuracy: float, tmp_path: Path) -> None:
    """Hole 9: the mean accuracy of the sites stays one, whatever one of them says."""

    def behaviour(message: Message, context: Context, app: AppCall) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "evaluate" and context.node_config["partition-id"] == LIAR:
            said = MetricRecord({**reply.content[SITE_METRICS], "accuracy": accuracy})
            return Message(RecordDict({SITE_METRICS: said}), reply_to=message)
        return reply

    settings = small(tmp_path, num_rounds=1, evaluate_sites=True)
    run = Finished(run_spied(settings, spy := Spy(behaviour)), settings, spy)
    assert 0 <= run.metrics[0]["site_accuracy"] <= 1


def test_a_majority_of_garbage_ends_the_run(tmp_path: Path) -> None:
    """Hole 9: what is left after rejections is no run of the wanted number of sites."""

    def behaviour(message: Message, context: Context, app: AppCall) -> Message:
        reply = app(message, context)
        honest = context.node_config["partition-id"] == 0 or message.metadata.message_type != "train"
        return reply if honest else sending(GARBAGE["NaN"])(message, reply)

    with pytest.raises(LaloraError):
        run_spied(small(tmp_path), Spy(behaviour))
