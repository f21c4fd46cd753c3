"""Each extension runs a whole federation in this process, and a run that was killed ends like one that was not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message

from lalora_flwr.adapter.slots import LORA_A, LORA_B, corner, digest
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import ConfigError, RunFailed
from lalora_flwr.server.plan import make_plan
from lalora_flwr.settings import settings_from
from lalora_flwr.wire.tensors import to_arrays
from tests.conftest import MODELS, AppCall, Finished, Spy, arrays_of, run_spied, small, strict_json
from tests.ledger.site_ledgers import owned
from tests.probes.runs import PROBES, adapter_of, killed_after, run, settings_of, sites_of
from tests.sites import REAL, servers_learner, train_order

pytestmark = pytest.mark.usefixtures("probes")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, probes: Path) -> Callable[[str], Finished]:
    """The uninterrupted run of a probe."""
    made: dict[str, Finished] = {}

    def make(probe: str) -> Finished:
        if probe not in made:
            made[probe] = run(probe, tmp_path_factory.mktemp("whole"))
        return made[probe]

    return make


@pytest.mark.parametrize("probe", PROBES)
def test_it_trains(probe: str, whole: Callable[[str], Finished]) -> None:
    done = whole(probe)
    assert [line["sites"] for line in done.metrics] == [3, 3, 3] and done.summary["failures"] == 0
    initial = servers_learner(done.settings).initial
    after = adapter_of(done.path)
    assert after.keys() == initial.keys() and any(not torch.equal(after[name], initial[name]) for name in initial)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("probe", PROBES)
def test_a_resumed_run_ends_like_one_that_was_never_stopped(
    probe: str, rounds: int, tmp_path: Path, whole: Callable[[str], Finished]
) -> None:
    killed_after(probe, tmp_path, rounds)
    app: Any = sites_of(probe)
    folder = run_inline(settings_of(probe, tmp_path, resume=True), app=app, models=MODELS)
    resumed, straight = adapter_of(folder), adapter_of(whole(probe).path)
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.parametrize("probe", PROBES)
def test_the_plan_prices_it(probe: str, whole: Callable[[str], Finished]) -> None:
    done = whole(probe)
    plan = make_plan(done.settings)
    assert plan.trainable > 0
    if probe != "rank per site":  # whose sites differ
        assert done.metrics[0]["bytes_up"] == 3 * plan.bytes_up[0] and done.metrics[0]["bytes_down"] == 3 * plan.bytes_down


def test_the_servers_factors_are_orthonormal_and_the_product_is_the_mean(whole: Callable[[str], Finished]) -> None:
    done = whole("server-side SVD")
    layout = servers_learner(done.settings).adapter.layout
    ((order, _), *_), exchanged = done.spy.training(3), done.spy.training(2)
    after, before = arrays_of(order), arrays_of(exchanged[0][0])
    for A in layout.of(LORA_A):
        (B,) = (name for name in layout.of(LORA_B) if layout[name].layer == layout[A].layer)
        torch.testing.assert_close(after[A] @ after[A].T, torch.eye(3), atol=1e-5, rtol=0)
        mean = torch.stack([arrays_of(reply)[B] for _, reply in exchanged]).mean(0)
        torch.testing.assert_close(after[B] @ after[A], mean @ before[A], atol=1e-5, rtol=1e-4)
    assert all(set(arrays_of(reply)) == layout.of(LORA_B) for _, reply in exchanged)


def test_only_the_layers_that_the_server_named_train_and_travel(whole: Callable[[str], Finished]) -> None:
    done = whole("mask per layer")
    layout = servers_learner(done.settings).adapter.layout
    layers = {slot.layer for slot in layout.values()}
    for server_round in (1, 2, 3):
        for order, reply in done.spy.training(server_round):
            told = strict_json(str(order.content["config"]["directive"]))
            assert set(told.get("layers", layers)) == ({*layers} if server_round == 1 else {*told["layers"]})
            assert len(told.get("layers", [])) == (0 if server_round == 1 else len(layers) // 2)
            sent = {layout[name].layer for name in arrays_of(reply)}
            assert sent == set(told.get("layers", layers))


def test_a_site_takes_no_directive_of_other_layers(tmp_path: Path, context: Callable[..., Context]) -> None:
    settings = settings_of("mask per layer", tmp_path)
    for bad in ({"layers": ["no such layer"]}, {"layers": []}, {"layers": "all"}, {"lr": 3.0}):
        held = owned(context(settings), tmp_path)
        assert REAL(train_order(settings, directive=bad), held).error.reason.startswith("order: ")


def test_every_site_sends_factors_of_its_own_rank(whole: Callable[[str], Finished]) -> None:
    done = whole("rank per site")
    layout = servers_learner(done.settings).adapter.layout
    for site, (order, reply) in enumerate(done.spy.training(2)):
        for message in (order, reply):
            shapes = {name: tuple(tensor.shape) for name, tensor in arrays_of(message).items()}
            assert {shapes[name][0] for name in layout.of(LORA_A)} == {1 + site}
            assert {shapes[name][1] for name in layout.of(LORA_B)} == {1 + site}


def test_a_real_sites_rank_is_its_owners_word(tmp_path: Path, context: Callable[..., Context]) -> None:
    """The server knows it from the greeting, so that both mean the same corner."""
    settings = settings_of("rank per site", tmp_path)
    learner = servers_learner(settings)
    layout = learner.adapter.layout.resized(LORA_A, axis=0, size=2).resized(LORA_B, axis=1, size=2)
    start = {name: corner(learner.initial[name], slot) for name, slot in layout.items()}
    order = train_order(settings, adapter_digest=digest(start))
    order.content["arrays"] = to_arrays(start)
    reply = REAL(order, owned(context(settings), tmp_path, profile="rank=2"))
    assert {tuple(t.shape) for t in arrays_of(reply).values()} == {tuple(t.shape) for t in start.values()}
    told = REAL(
        Message(order.content.__class__(), dst_node_id=7, message_type="query.identity"),
        owned(context(settings), tmp_path, profile="rank=2"),
    )
    assert dict(told.content["profile"]) == {"words": "rank=2"}


def test_bitfit_trains_biases_alone_and_leaves_the_frozen_model_as_it_is(whole: Callable[[str], Finished]) -> None:
    done = whole("BitFit")
    learner = servers_learner(done.settings)
    assert learner.adapter.layout.parts == {"bias"} and len(learner.initial) == 8
    plain = servers_learner(small(done.path.parent)).base  # of the same store
    for name, tensor in learner.initial.items():
        assert torch.equal(plain.module.get_parameter(name.replace("bias", "base_layer.bias") if "qkv" in name else name), tensor)


def test_a_form_without_factors_has_no_schedule_of_factors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.schedule = 'step:BA': the form trains no lora_A; take 'both'"):
        make_plan(settings_of("BitFit", tmp_path, lora__schedule="step:BA"))


def test_the_server_sees_masks_and_their_sum_is_the_mean(whole: Callable[[str], Finished], tmp_path: Path) -> None:
    done = whole("masked sum")
    plain = run("masked sum", tmp_path, strategy="la-lora", filter__name="none")
    for (_, reply), (_, clear) in zip(done.spy.training(1), plain.spy.training(1), strict=True):
        sent, open_ = reply.content["arrays"], arrays_of(clear)
        for name in open_:
            assert sent[name].dtype == "uint64" and sent[name].numpy().shape == tuple(open_[name].shape)
            alone = torch.from_numpy(sent[name].numpy().view("int64") * 2.0**-32)
            assert not torch.allclose(alone, open_[name].double(), atol=1e-2)
    one, two = adapter_of(done.path), adapter_of(plain.path)
    for name in two:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=0)


def test_a_site_that_is_missing_spoils_the_sum_and_the_others_are_asked_again(tmp_path: Path) -> None:
    app = sites_of("masked sum")

    def behaviour(message: Message, context: Context, _: AppCall) -> Message:
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            context.node_config["partition-id"] = 99  # it fails
        return app(message, context)

    with pytest.raises(RunFailed, match="round 1: the secure sum of the sites is spoilt, and 0 of them may serve another"):
        run_spied(settings_of("masked sum", tmp_path / "one", num_rounds=1), Spy(behaviour))
    settings, spy = settings_of("masked sum", tmp_path, num_rounds=1, privacy__max_rounds=2), Spy(behaviour)
    (line,) = Finished(run_spied(settings, spy), settings, spy).metrics
    assert (line["sites"], line["failures"], line["repeats"]) == (2, 1, 1)
    assert [len(order.content["config"]["exchange"]) for order, _ in spy.training(1)] == [len('{"sites":[0,1,2]}')] * 3 + [
        len('{"sites":[0,2]}')
    ] * 2


@pytest.mark.parametrize("more", [{"merge__name": "median"}, {"merge__max_update_norm": 1.0}], ids=lambda more: next(iter(more)))
def test_what_needs_single_updates_does_not_go_with_a_sum(more: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="masked-sum"):
        settings_of("masked sum", tmp_path, **more)


def test_the_canary_is_in_the_batches_of_its_site_alone(whole: Callable[[str], Finished], tmp_path: Path) -> None:
    with_it, without = whole("canary"), run("filter over time", tmp_path, filter__name="auto")
    for site in range(3):
        one, two = (arrays_of(done.spy.training(1)[site][1]) for done in (with_it, without))
        assert all(torch.equal(one[name], two[name]) for name in one) == (site != 0)
    assert with_it.summary["sites"]["0"]["sample_rate"] < without.summary["sites"]["0"]["sample_rate"]


def test_the_filters_memory_is_the_virtual_sites_and_a_real_site_keeps_its_own(
    whole: Callable[[str], Finished], tmp_path: Path, context: Callable[..., Context]
) -> None:
    done = whole("filter over time")
    for server_round in (1, 2):
        for order, reply in done.spy.training(server_round):
            assert bool(order.content["memory"]) == (server_round > 1) and isinstance(reply.content["memory"], ArrayRecord)
    settings = settings_of("filter over time", tmp_path)
    held = owned(context(settings), tmp_path)
    reply = REAL(train_order(settings), held)
    assert set(reply.content) == {"arrays", "counters"} and len(held.state["memory"]) == len(reply.content["arrays"])
    brought = train_order(settings, 2)
    brought.content["memory"] = ArrayRecord(dict(held.state["memory"].items()))
    kept = {name: array.numpy().copy() for name, array in held.state["memory"].items()}
    assert not REAL(brought, held).has_error()
    assert all((held.state["memory"][name].numpy() != kept[name]).any() for name in kept)


def test_a_broken_package_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"strategy = 'probe-broken': lalora_probes\.nothing:METHOD cannot be loaded: "):
        settings_from({"strategy": "probe-broken"})
    with pytest.raises(ConfigError, match=r"strategy = 'probe-wrong': it is a function, not a "):
        settings_from({"strategy": "probe-wrong"})
