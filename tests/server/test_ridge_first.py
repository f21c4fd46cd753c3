"""A run whose first round releases a ridge head: one budget, one run folder, and the other rounds go on from the head."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Error, Message

from lalora_flwr.adapter.ridge import SPREAD
from lalora_flwr.adapter.slots import HEAD, LORA_B
from lalora_flwr.data.data_set import data_set
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.events import SampledGaussian
from lalora_flwr.server.counts import SiteCounts
from lalora_flwr.server.folder import RunFolder
from lalora_flwr.server.plan import make_plan
from lalora_flwr.server.ridge_stage import RidgeStage
from lalora_flwr.settings.stages import ridge_stage
from tests.conftest import MODELS, AppCall, Finished, Spy, arrays_of, run_spied, small
from tests.server.federations import failing, stopped
from tests.server.test_resume import killed_after, result, resumed

MakeFinished = Callable[..., Finished]
FIRST: dict[str, Any] = {"lora__head": "ridge", "num_rounds": 3}
SHARED: dict[str, Any] = {**FIRST, "trust": "secure-sum", "train__local_steps": 1, "num_supernodes": 4}


def test_its_first_round_is_a_ridge_head_of_its_share_of_epsilon(finished: MakeFinished, tmp_path: Path) -> None:
    """The same draws as the strategy alone, so the same head."""
    both = finished(**FIRST)
    stage = dataclasses.replace(ridge_stage(both.settings), output_dir=str(tmp_path), run_name="alone")
    assert (stage.strategy, stage.num_rounds, stage.privacy.epsilon) == ("ridge-head", 1, 0.5 * both.settings.privacy.epsilon)
    alone = Finished(run_inline(stage, models=MODELS), stage, Spy())
    assert both.metrics[0]["accuracy"] == alone.summary["accuracy"]
    assert both.metrics[0]["epsilon"] == pytest.approx(alone.summary["epsilon"], rel=1e-9)
    assert both.summary["head_noise_multiplier"] == pytest.approx(alone.summary["noise_multiplier"], rel=1e-9)


def test_the_model_card_tells_the_two_stages_apart(finished: MakeFinished) -> None:
    card = (finished(**FIRST).path / "adapter" / "README.md").read_text(encoding="utf-8")
    sigma = finished(**FIRST).summary["head_noise_multiplier"]
    assert "one round that released a ridge head from all records, then 2 rounds of 2 local steps" in card
    assert f"the ridge head's release among them, whose noise multiplier is {sigma:.4g}, in place of" in card


def test_the_other_rounds_start_from_the_released_head(finished: MakeFinished) -> None:
    """Argmax of the network with the head, and B at zero, is that of the ridge head; logits deviate as a cross-entropy likes."""
    done, learner = finished(**FIRST), MODELS.learner(finished(**FIRST).settings)
    (order, _), *_ = done.spy.training(2)
    learner.adapter.load(learner.initial)
    learner.adapter.load(arrays_of(order))
    assert not any(learner.adapter.parameters[name].any() for name in learner.adapter.layout.of(LORA_B))
    records = data_set(done.settings).public(learner.base.encode)
    inputs, labels = records.batch(torch.arange(len(records)))
    with torch.inference_mode():
        logits = learner.base.logits(learner.adapter.model.eval(), inputs)
    assert float((logits.argmax(1) == labels).float().mean()) == pytest.approx(done.metrics[0]["accuracy"], abs=1e-6)
    assert float((logits - logits.mean(1, keepdim=True)).square().mean().sqrt()) == pytest.approx(SPREAD, rel=1e-3)
    head = learner.adapter.layout.of(HEAD)
    assert head and all(not torch.equal(arrays_of(order)[name], learner.initial[name]) for name in head)


@pytest.mark.parametrize("changed", [FIRST, SHARED, {**FIRST, "strategy": "rolora", "train__local_steps": 1}], ids=str)
def test_all_of_it_costs_at_most_the_runs_epsilon(changed: dict[str, Any], finished: MakeFinished) -> None:
    done = finished(**changed)
    plan, settings, summary = make_plan(done.settings), done.settings, done.summary
    assert [line["round"] for line in done.metrics] == [1, 2, 3]
    main = SampledGaussian(summary["noise_multiplier"], summary["sample_rate"], 2 * settings.train.local_steps)
    head = SampledGaussian(summary["head_noise_multiplier"], 1.0, 1)
    spent = epsilon_spent([head, main], settings.privacy.delta, settings.privacy.accountant)
    assert summary["epsilon"] == pytest.approx(spent, rel=1e-9) and spent <= settings.privacy.epsilon
    assert plan.epsilon_after(3, settings) == pytest.approx(spent, rel=0.02)
    for site in summary["sites"].values():
        assert site["claimed_epsilon"] <= settings.privacy.epsilon
        assert site["steps"] == site["claimed_steps"] == 1 + 2 * settings.train.local_steps
    if plan.ridge_steps == 1:
        assert spent > 0.99 * settings.privacy.epsilon
    if plan.sharing:
        curve = plan.collusion(settings)
        assert curve[plan.colluders] <= settings.privacy.epsilon < curve[-1]


def test_the_schedule_begins_after_the_head(finished: MakeFinished) -> None:
    """B before A, which has no gradient while B is zero."""
    done = finished(**{**FIRST, "strategy": "rolora", "train__local_steps": 1})
    moved = []
    for server_round in (2, 3):
        order, reply = done.spy.training(server_round)[0]
        before, after = arrays_of(order), arrays_of(reply)
        moved.append({name.split(".")[-2] for name in after if name in before and not torch.equal(before[name], after[name])})
    assert "lora_B" in moved[0] and "lora_A" not in moved[0]
    assert "lora_A" in moved[1] and "lora_B" not in moved[1]


@pytest.mark.parametrize(("changed", "rounds"), [(FIRST, 1), (FIRST, 2), (SHARED, 1), (SHARED, 2)], ids=str)
def test_a_resumed_run_ends_like_one_that_was_never_stopped(
    changed: dict[str, Any], rounds: int, tmp_path: Path, finished: MakeFinished
) -> None:
    killed_after(small(tmp_path, **changed), rounds)
    run_inline(resumed(tmp_path, **changed))
    assert result(tmp_path / "run") == result(finished(**changed).path)


def test_a_site_that_is_missing_in_the_first_round_spoils_it_once(tmp_path: Path) -> None:
    """With a secure sum there is room for one repeat, and it is calibrated for."""
    settings, gone = small(tmp_path, **{**SHARED, "max_failures": 1}), []

    def behave(message: Message, context: Context, app: AppCall) -> Message:
        training = message.metadata.message_type == "train" and message.content["config"]["server-round"] == 1
        if training and int(context.node_config["partition-id"]) == 3:
            gone.append(1)
            return failing(3, rounds=(1,))(message, context, app)
        return app(message, context)

    done = Finished(run_spied(settings, Spy(behave)), settings, Spy())
    assert gone == [1] and done.metrics[0]["repeats"] == 1
    assert done.summary["epsilon"] <= settings.privacy.epsilon
    assert done.summary["sites"]["0"]["steps"] == 4


def test_without_room_for_a_repeat_a_spoilt_first_round_stops_the_run(tmp_path: Path) -> None:
    spy = Spy(failing(3, rounds=(1,)))
    assert "spoilt" in stopped(small(tmp_path, **{**SHARED, "privacy__max_rounds": 3}), spy)


def test_the_frozen_model_is_that_of_the_other_rounds(finished: MakeFinished) -> None:
    plain = finished(num_rounds=3, lora__head="trained")
    assert finished(**FIRST).summary["frozen_accuracy"] == plain.summary["frozen_accuracy"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"strategy": "ridge-head"}, "is that head alone"),
        ({"num_rounds": 1}, "at least 2"),
        ({"privacy__max_rounds": 1, "num_rounds": 2, "num_supernodes": 4, "fraction_train": 0.25}, "must leave a round after"),
        ({"privacy__clip_norm": 101.0}, "at most 100"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changed: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        small(tmp_path, **{**FIRST, **changed})


def test_an_adapter_without_a_place_for_the_head_is_refused(tmp_path: Path) -> None:
    settings = small(tmp_path, **FIRST)
    adapter = MODELS.learner(small(tmp_path, lora__head="frozen")).adapter
    stage = RidgeStage(settings, MODELS, data_set(settings).public(MODELS.learner(settings).base.encode))
    with pytest.raises(ConfigError, match="trains no"):
        stage.check(adapter)


def test_what_was_asked_of_both_stages_is_kept_and_counted(tmp_path: Path) -> None:
    settings = small(tmp_path, **SHARED)
    counts = SiteCounts.of_run(settings, real=True)
    assert counts.before is not None
    counts.before.of(5).rounds, counts.of(5).rounds = 2, 3
    counts.before.of(5).add_share(2.5)
    with RunFolder(settings) as folder:
        folder.save_asked(counts.asked())
        kept = folder.load_asked()
    again = SiteCounts.of_run(settings, real=True)
    again.restore({}, kept)
    assert (again.steps_before(5), again.steps_of(5), again.asked()) == (2, 5, counts.asked())
    assert SiteCounts.of_run(settings, real=True).steps_of(5) == 0
    again.restore(json.loads(json.dumps(counts.state())), {})
    assert again.asked() == counts.asked()


def lost(site: int) -> Callable[[Message, Context, AppCall], Message]:
    """A site serves the first round, and its reply is lost."""

    def behave(message: Message, context: Context, app: AppCall) -> Message:
        reply = app(message, context)
        training = message.metadata.message_type == "train" and message.content["config"]["server-round"] == 1
        if training and int(context.node_config["partition-id"]) == site:
            return Message(Error(code=3, reason="node unavailable"), reply_to=message)
        return reply

    return behave


def test_a_head_whose_reply_was_lost_was_released_all_the_same(tmp_path: Path) -> None:
    settings = small(tmp_path, **{**FIRST, "max_failures": 1})
    done = Finished(run_spied(settings, Spy(lost(1))), settings, Spy())
    for site in done.summary["sites"].values():
        assert site["epsilon"] == pytest.approx(site["claimed_epsilon"], rel=1e-6) and site["steps"] == site["claimed_steps"]


def test_so_it_is_if_all_others_collude(tmp_path: Path) -> None:
    settings = small(tmp_path, **{**SHARED, "max_failures": 1})
    done = Finished(run_spied(settings, Spy(lost(1))), settings, Spy())
    whole = done.summary["sites"]["0"]
    assert done.metrics[0]["repeats"] == 1 and done.summary["sites"]["1"]["epsilon_alone"] > 0
    assert done.summary["sites"]["1"]["steps"] < whole["steps"] and done.summary["sites"]["1"]["epsilon"] < whole["epsilon"]


def test_a_repeat_of_another_round_has_its_room_beside_the_heads(tmp_path: Path) -> None:
    settings = small(tmp_path, **{**SHARED, "num_rounds": 5, "max_failures": 1})
    assert (settings.ridge_rounds, settings.rounds_per_site) == (2, 5)
    done = Finished(run_spied(settings, Spy(failing(3, rounds=(3,)))), settings, Spy())
    assert [line["repeats"] for line in done.metrics] == [0, 0, 1, 0, 0]
    assert done.summary["epsilon"] <= settings.privacy.epsilon
    named = small(tmp_path, **{**FIRST, "privacy__max_rounds": 4})
    assert (named.ridge_rounds, named.rounds_per_site) == (1, 3)


def test_a_share_that_no_noise_reaches_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^privacy.ridge-share = 1e-05"):
        make_plan(small(tmp_path, **{**FIRST, "privacy__ridge_share": 1e-5, "privacy__accountant": "rdp"}))


def test_a_head_on_features_that_hardly_differ_stays_sane(tmp_path: Path) -> None:
    """As of a model that was never trained: what it says has to be scaled by anything, and is not."""
    settings = small(tmp_path, **FIRST)
    main = MODELS.learner(settings)
    stage = RidgeStage(settings, MODELS, data_set(settings).public(main.base.encode))
    state = stage.prepared()
    cross = next(name for name in state if name.endswith("cross"))
    gram = next(name for name in state if name.endswith("gram"))
    for size in (1e-9, 1.0, 1e9):
        state[gram] = torch.eye(len(state[gram]))
        state[cross] = torch.zeros_like(state[cross])
        state[cross][:, -1] = size * torch.arange(len(state[cross]))  # an intercept alone, the same for every record
        state[cross][0, 0] = 1e-7 * size
        stage.quality(state)
        start = stage.start(main.adapter)
        assert all(torch.isfinite(value).all() and float(value.abs().max()) <= 1000 for value in start.values())
