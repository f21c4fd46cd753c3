"""Whole runs whose sites share one noise: the sum is right, a site that is missing spoils its attempt and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict

from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import RunFailed
from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.events import SampledGaussian
from lalora_flwr.privacy.randomness import SeededRandom
from lalora_flwr.server.counts import SiteCounts
from lalora_flwr.server.folder import ASKED, RunFolder
from lalora_flwr.server.metrics import Summary
from lalora_flwr.server.plan import make_plan
from lalora_flwr.wire.orders import ARRAYS
from tests.conftest import AppCall, Finished, Spy, arrays_of, run_spied, small
from tests.server.federations import REASON, failing, lying, site_of, stopped
from tests.server.test_resume import killed_after, result, resumed

MakeFinished = Callable[..., Finished]
SHARED: dict[str, Any] = {"trust": "secure-sum", "train__local_steps": 1, "num_rounds": 4, "num_supernodes": 4}
OWN: dict[str, Any] = {"train__step_at": "server", "train__local_steps": 1, "num_rounds": 4, "num_supernodes": 4}


def words_of(order: Message) -> dict[str, Any]:
    return json.loads(str(order.content["config"]["exchange"]))


def run(folder: Path, behaviour: Callable[[Message, Context, AppCall], Message], **changed: Any) -> Finished:
    settings, spy = small(folder, **{**SHARED, **changed}), Spy(behaviour)
    return Finished(run_spied(settings, spy), settings, spy)


@pytest.mark.parametrize("strategy", ["la-lora", "dp-lora", "ffa-lora", "rolora", "ridge-head"])
def test_the_server_gets_the_sum_of_the_clipped_gradients_and_one_noise(strategy: str, tmp_path: Path) -> None:
    """With hardly any noise the run ends where one with own noise does: masks, grid and divisor are exact."""
    same: dict[str, Any] = {"strategy": strategy, "privacy__epsilon": 100.0, "privacy__delta": 0.05, "train__batch_size": 200}
    same |= {"train__lr": 0.1, "num_rounds": 2}
    spy, own = Spy(), Spy()
    shared = Finished(run_spied(small(tmp_path / "a", **{**SHARED, **same}), spy), small(tmp_path / "a", **SHARED), spy)
    alone = Finished(run_spied(small(tmp_path / "b", **{**OWN, **same}), own), small(tmp_path / "b", **OWN), own)
    for name, value in alone.checkpoint.items():
        start = arrays_of(own.training(1)[0][0]).get(name, value)
        size = float((value - start).norm())
        assert float((shared.checkpoint[name] - value).norm()) <= 0.5 * size + 1e-6


def test_the_noise_of_the_mean_is_that_of_the_plan(tmp_path: Path) -> None:
    """Batches of next to nobody: what moves the adapter is noise of standard deviation σC√(n/(n-t)) over the batches."""
    changed: dict[str, Any] = {"num_rounds": 1, "privacy__max_rounds": 1, "train__lr": 1.0, "filter__name": "none"}
    done = run(tmp_path, lambda message, context, app: app(message, context), privacy__epsilon=0.02, **changed)
    start, plan = arrays_of(done.spy.training(1)[0][0]), make_plan(done.settings)
    moved = torch.cat([(done.checkpoint[n] - start[n]).flatten() for n in start if not torch.equal(done.checkpoint[n], start[n])])
    expected = plan.share * 2 * done.settings.privacy.clip_norm / (4 * 40)
    assert float(moved.std()) == pytest.approx(expected, rel=0.1)
    assert plan.share == pytest.approx(plan.mechanism.noise_multiplier / math.sqrt(3), rel=2e-3)


def test_replies_are_masks_and_orders_name_the_attempt(finished: MakeFinished) -> None:
    done = finished(**SHARED)
    for server_round in (1, 2):
        for order, reply in done.spy.training(server_round):
            words = words_of(order)
            assert (words["attempt"], words["sites"], words["batch"]) == (1, ["0", "1", "2", "3"], 160.0)
            arrays: Any = reply.content[ARRAYS]
            assert all(arrays[name].dtype == "uint64" for name in arrays)
            assert all((arrays[name].numpy() > 2**62).any() for name in arrays)


def test_both_epsilons_stand_everywhere(finished: MakeFinished) -> None:
    done = finished(**SHARED)
    plan, delta = make_plan(done.settings), done.settings.privacy.delta
    q = plan.mechanism.sample_rate
    summary = Summary.from_json(done.summary)
    assert (summary.trust, summary.colluders, summary.repeats) == ("secure-sum", 1, 0)
    assert summary.epsilon == pytest.approx(epsilon_spent([SampledGaussian(plan.mechanism.noise_multiplier, q, 4)], delta))
    assert summary.epsilon_alone == pytest.approx(epsilon_spent([SampledGaussian(plan.share, q, 4)], delta))
    assert [line["epsilon_alone"] for line in done.metrics][-1] == summary.epsilon_alone > 2 * summary.epsilon
    card = (done.path / "adapter" / "README.md").read_text()
    assert f"if all others did, ε = {summary.epsilon_alone:.4g}" in card and "at most 1 other site told" in card
    curve = plan.collusion(done.settings)
    steps = done.settings.rounds_per_site
    assert len(curve) == 4 and curve == sorted(curve) and steps == 5
    assert curve[1] == pytest.approx(epsilon_spent([SampledGaussian(plan.mechanism.noise_multiplier, q, steps)], delta), rel=5e-3)
    assert "epsilon_alone" not in finished(**OWN).summary and "trust" not in finished(**OWN).summary


def test_what_stays_at_a_site_is_no_better_hidden_if_nobody_colludes(tmp_path: Path) -> None:
    """Later gradients depend on B, which has the noise of its site alone, however many others add theirs to the sum of A."""
    found = []
    for strategy in ("dp-lora", "fedsa-lora"):
        settings = small(tmp_path, **SHARED, strategy=strategy, colluders=2)
        found.append((make_plan(settings), make_plan(settings).collusion(settings)))
    (plan, of_all), (_, of_a) = found
    events = [SampledGaussian(plan.mechanism.noise_multiplier, plan.mechanism.sample_rate, plan.steps)]
    whole = epsilon_spent(events, 1e-4)
    assert of_all[0] < of_all[1] < 0.9 * whole
    assert of_a[:3] == pytest.approx([whole] * 3, rel=5e-3) and min(of_a[:2]) == whole
    assert of_a[3] == of_all[3] > whole


def drops(site: int, server_round: int, attempts: tuple[int, ...] = (1,)) -> Callable[[Message, Context, AppCall], Message]:
    """A site that answers some attempts of a round with an error."""

    def behave(message: Message, context: Context, app: AppCall) -> Message:
        if message.metadata.message_type == "train" and site_of(context) == site:
            order = message.content["config"]
            if order["server-round"] == server_round and words_of(message)["attempt"] in attempts:
                return Message(Error(code=2, reason=REASON), reply_to=message)
        return app(message, context)

    return behave


def test_a_site_that_drops_out_spoils_the_attempt_and_the_others_repeat_it(tmp_path: Path) -> None:
    done = run(tmp_path, drops(2, 2))
    lines = done.metrics
    assert [(line["sites"], line["failures"], line["repeats"]) for line in lines] == [(4, 0, 0), (3, 1, 1), (4, 0, 0), (4, 0, 0)]
    asked = [(words_of(order)["attempt"], words_of(order)["sites"]) for order, _ in done.spy.training(2)]
    assert asked == [(1, ["0", "1", "2", "3"])] * 4 + [(2, ["0", "1", "3"])] * 3
    sites = done.summary["sites"]
    assert {site: report["steps"] for site, report in sites.items()} == {"0": 5, "1": 5, "2": 4, "3": 5}
    assert all(report["claimed_steps"] == report["steps"] for site, report in sites.items() if site != "2")
    first, second = (words_of(done.spy.training(2)[i][0])["share"] for i in (0, 4))
    assert second == pytest.approx(first * math.sqrt(3 / 2))  # three sites, of which one may collude


def test_where_b_stays_the_others_go_on_from_what_the_spoilt_attempt_left_them(tmp_path: Path) -> None:
    """It was paid for. The site that dropped out goes on from the round before."""
    done = run(tmp_path, drops(2, 2), strategy="fedsa-lora")
    assert [(line["sites"], line["repeats"]) for line in done.metrics] == [(4, 0), (3, 1), (4, 0), (4, 0)]
    assert {site: report["steps"] for site, report in done.summary["sites"].items()} == {"0": 5, "1": 5, "2": 4, "3": 5}

    def memories(messages: list[Message]) -> list[dict[str, torch.Tensor]]:
        return [dict(message.content["memory"].to_torch_state_dict()) for message in messages]  # type: ignore[union-attr]

    replies, orders = (memories([pair[place] for pair in done.spy.training(r)]) for r, place in ((1, 1), (3, 0)))
    again = memories([order for order, _ in done.spy.training(2)[4:]])
    spoilt = memories([reply for reply in (r for _, r in done.spy.training(2)[:4]) if reply.has_content()])
    repeated = memories([reply for _, reply in done.spy.training(2)[4:]])
    for given, found in ((spoilt, again), (repeated, [orders[0], orders[1], orders[3]]), ([replies[2]], [orders[2]])):
        for one, other in zip(given, found, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_repeat_has_draws_and_masks_of_its_own(tmp_path: Path) -> None:
    done = run(tmp_path, drops(2, 1))
    pairs = done.spy.training(1)
    one, two = (pairs[i][1].content[ARRAYS] for i in (0, 4))
    arrays: Any = one
    again: Any = two
    for name in arrays:
        difference = arrays[name].numpy() - again[name].numpy()
        assert not (np.abs(difference.view(np.int64).astype(float)) < 2**55).all()


def test_virtual_sites_draw_anew_for_each_attempt_and_as_ever_for_the_first() -> None:
    first, again, other = (SeededRandom(0, 1, 2, attempt) for attempt in (1, 1, 2))
    for draw in ("uniform", "normal"):
        size: Any = 9 if draw == "uniform" else torch.Size([9])
        one, same, new = (getattr(source, draw)(size) for source in (first, again, other))
        assert torch.equal(one, same) and not torch.equal(one, new)
    assert torch.equal(SeededRandom(0, 1, 2).uniform(9), SeededRandom(0, 1, 2, 1).uniform(9))


def test_without_room_for_a_repeat_the_run_stops_and_says_what_to_do(tmp_path: Path) -> None:
    settings = small(tmp_path, **{**SHARED, "privacy__max_rounds": 4, "max_failures": 3})
    why = stopped(settings, Spy(drops(1, 4)))
    assert why.startswith("round 4: the secure sum of the sites is spoilt, and 0 of them may serve another attempt, but 2 must")


def test_with_too_few_sites_left_the_run_stops(tmp_path: Path) -> None:
    settings = small(tmp_path, **{**SHARED, "max_failures": 3, "colluders": 2, "privacy__max_rounds": 9})
    why = stopped(settings, Spy(failing(0, 1)))
    assert "2 of them may serve another attempt, but 3 must" in why


def test_more_failures_than_allowed_stop_the_run_before_it_asks_again(tmp_path: Path) -> None:
    spy = Spy(failing(0, 1))
    assert "2 of 4 sites failed, max-failures = 1" in stopped(small(tmp_path, **SHARED), spy)
    assert len(spy.training(1)) == 4


def garbage(content: RecordDict) -> None:
    arrays: Any = content[ARRAYS]
    draw = np.random.default_rng(1)
    content[ARRAYS] = ArrayRecord({n: Array(draw.integers(0, 2**64, arrays[n].shape, np.uint64)) for n in arrays})


def test_a_site_that_sends_garbage_stops_the_run_in_place_of_ruining_it(tmp_path: Path) -> None:
    spy = Spy(lying(1, garbage))
    why = stopped(small(tmp_path, **SHARED), spy)
    assert why.startswith("round 1: the sum is none that these sites can have: one sent something else")
    assert [words_of(order)["attempt"] for order, _ in spy.training(1)] == [1] * 4 + [2] * 4


def test_garbage_once_costs_one_attempt(tmp_path: Path) -> None:
    def once(message: Message, context: Context, app: AppCall) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train" and site_of(context) == 1:
            order = message.content["config"]
            if (order["server-round"], words_of(message)["attempt"]) == (3, 1):
                garbage(reply.content)
        return reply

    assert [(line["sites"], line["repeats"]) for line in run(tmp_path, once).metrics] == [(4, 0), (4, 0), (4, 1), (4, 0)]


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_resumed_run_ends_like_one_that_was_never_stopped(rounds: int, tmp_path: Path, finished: MakeFinished) -> None:
    more: dict[str, Any] = {**SHARED, "train__optimizer": "adamw", "train__lr": 0.01}
    killed_after(small(tmp_path, **more), rounds)
    assert result(run_inline(resumed(tmp_path, **more))) == result(finished(**more).path)


def test_a_sum_that_was_asked_for_and_lost_counts_with_its_share(tmp_path: Path) -> None:
    """As a killed server leaves it: the next attempt of the run finds what it asked for."""
    settings = small(tmp_path, **SHARED)
    counts = SiteCounts(settings)
    counts.of(7).heard = True
    counts.of(7).rounds, counts.of(7).sample_rate = 1, 0.2
    counts.of(7).add_share(0.8)
    before, state = counts.epsilon_alone_of(7), json.loads(json.dumps(counts.state()))
    counts.of(7).rounds = 2
    counts.of(7).add_share(0.9)
    folder = RunFolder(settings)
    folder.save_asked(counts.asked())
    again = SiteCounts(settings)
    again.restore(state, folder.load_asked())
    assert again.epsilon_alone_of(7) == counts.epsilon_alone_of(7) > before
    assert again.of(7).rounds == 2 and again.asked() == counts.asked()
    for damaged in (
        '{"7": {"rounds": 1, "evaluations": 0, "shares": 3}}',
        '{"7": {"rounds": 1, "evaluations": 0, "shares": {"x": 1}}}',
    ):
        (folder.path / ASKED).write_text(damaged)
        with pytest.raises(RunFailed, match="is damaged"):
            folder.load_asked()
