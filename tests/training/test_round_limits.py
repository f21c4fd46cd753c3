"""Batches of any size, what the ledger decides, records that are absent, and what is logged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lalora_flwr.data.inputs import Inputs
from lalora_flwr.data.records import Records
from lalora_flwr.ground.errors import BudgetExhausted
from lalora_flwr.models.base import BaseModel
from lalora_flwr.privacy.mechanism import Mechanism
from lalora_flwr.settings import TrainSettings, settings_from
from lalora_flwr.training.learner import ModelStore
from tests.adapters import factor_of
from tests.reference import (
    Everyone,
    Nobody,
    OpenLedger,
    Replay,
    bench,
    joint_norm,
)
from tests.training.rounds import NON_PRIVATE, PRIVATE, RECORDS, SIGMAS, STEPS, serve


@pytest.mark.parametrize("physical", [1, 3, 5])
@pytest.mark.parametrize("schedule", ["step:BA", "both"])
def test_the_physical_batch_does_not_change_the_result(physical: int, schedule: str) -> None:
    whole, parts = bench("vit", head="trained"), bench("vit", head="trained")
    serve(whole, schedule=schedule, train=replace(STEPS, max_physical_batch=0))
    serve(parts, schedule=schedule, train=replace(STEPS, max_physical_batch=physical))
    for name, tensor in whole.state().items():
        torch.testing.assert_close(parts.state()[name], tensor, rtol=1e-4, atol=1e-6)


class Named(BaseModel):
    """Takes its inputs as a text model does, by name."""

    def logits(self, model: nn.Module, inputs: Inputs) -> Tensor:
        assert isinstance(inputs, dict)
        return super().logits(model, inputs["half"] + inputs["rest"])


@pytest.mark.parametrize("physical", [0, 2])
def test_named_inputs_are_cut_into_the_same_batches(physical: int) -> None:
    plain, named = bench(), bench()
    named.learner = replace(named.learner, base=Named(**vars(named.base)))
    whole = named.records.inputs
    records = Records({"half": whole / 2, "rest": whole - whole / 2}, named.records.labels)
    serve(plain)
    serve(named, records=records, train=replace(STEPS, max_physical_batch=physical))
    for name, tensor in plain.state().items():
        torch.testing.assert_close(named.state()[name], tensor, rtol=1e-4, atol=1e-6)


def test_no_more_than_the_physical_batch_is_processed_at_once() -> None:
    b = bench("mlp", records=10)
    seen: list[int] = []
    b.base.module.first.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    serve(b, train=TrainSettings(local_steps=1, max_physical_batch=4), source=Everyone())
    assert seen == [4, 4, 2]


def test_a_round_reserves_takes_every_step_and_commits() -> None:
    ledger = OpenLedger()
    serve(bench(), ledger=ledger)
    assert ledger.calls == [("reserve", 0.8, 0.5, 5), *[("take",)] * 5, ("commit",)]


def test_a_refused_round_touches_neither_the_adapter_nor_the_records() -> None:
    b, source = bench(), Replay()
    before = b.state()
    with pytest.raises(BudgetExhausted):
        serve(b, ledger=OpenLedger(limit=4), source=source)
    assert all(torch.equal(t, before[n]) for n, t in b.state().items())
    assert source.step == 0


def test_a_step_that_the_ledger_refuses_does_not_move_the_adapter() -> None:
    b = bench()
    states: list[dict[str, Tensor]] = []

    def stop_at_third() -> None:
        states.append(b.state())
        if len(states) == 3:
            raise BudgetExhausted("budget: test")

    ledger = OpenLedger(on_step=stop_at_third)
    with pytest.raises(BudgetExhausted):
        serve(b, ledger=ledger)
    assert all(torch.equal(t, states[-1][n]) for n, t in b.state().items())
    assert ("commit",) not in ledger.calls


def test_empty_batches_step_on_pure_noise_and_are_counted() -> None:
    """Step on B of std lr σ C / expected batch, whatever the records; 5 steps, no filter."""
    ledger, b = OpenLedger(), bench("vit")
    before = b.state()
    serve(b, train=replace(STEPS, lr=0.5), schedule="B", filter_name="none", source=Nobody(), ledger=ledger)
    moved = torch.cat([(t - before[n]).flatten() for n, t in b.state().items() if factor_of(n) == "B"])
    want = 0.5 * 0.8 * 0.25 / 6 * 5**0.5
    assert len(moved) == 192
    assert float(moved.square().mean().sqrt()) == pytest.approx(want, rel=0.2)  # 4 standard errors
    assert ledger.taken == 5


def test_empty_batches_without_privacy_move_nothing_but_are_counted() -> None:
    ledger, b = OpenLedger(), bench()
    before = b.state()
    serve(b, NON_PRIVATE, source=Nobody(), ledger=ledger)
    assert all(torch.equal(t, before[n]) for n, t in b.state().items())
    assert ledger.taken == 5


def test_a_site_without_records_steps_on_pure_noise() -> None:
    b, ledger = bench(), OpenLedger()
    before = b.state()
    nothing = Records(b.records.inputs[:0], b.records.labels[:0])
    serve(b, records=nothing, ledger=ledger)
    assert ledger.taken == 5
    assert not any(torch.equal(t, before[n]) for n, t in b.state().items())


@SIGMAS
@pytest.mark.parametrize("physical", [0, 2])
def test_a_record_that_is_not_finite_counts_as_absent_and_is_reported(mechanism: Mechanism, physical: int) -> None:
    train = replace(STEPS, max_physical_batch=physical)
    broken, without = bench(), bench()
    broken.records.inputs[-1] = float("nan")
    rest = Records(without.records.inputs[:-1], without.records.labels[:-1])
    draws = Replay()
    sampled = sum(bool(draws.uniform(RECORDS)[-1] < 0.5) for _ in range(5))
    assert serve(broken, mechanism, train) == sampled > 0
    assert serve(without, mechanism, train, records=rest) == 0  # the same draws for the records before the last
    for name, tensor in without.state().items():
        torch.testing.assert_close(broken.state()[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["B", "A", "both"])
def test_one_record_moves_a_step_by_at_most_lr_c_over_the_expected_batch(schedule: str) -> None:
    most = 0.0
    one_step = TrainSettings(local_steps=1, lr=0.5)
    for gone in range(RECORDS):
        moves = []
        for keep in (list(range(RECORDS)), [j for j in range(RECORDS) if j != gone]):
            b = bench(head="trained")
            records = Records(30 * b.records.inputs[keep], b.records.labels[keep])
            serve(b, train=one_step, schedule=schedule, filter_name="none", records=records, source=Everyone())
            moves.append(b.state())
        most = max(most, joint_norm({n: moves[0][n].double() - moves[1][n].double() for n in moves[0]}))
    bound = 0.5 * PRIVATE.clip_norm / PRIVATE.expected_batch
    assert 0.9 * bound < most <= bound * (1 + 1e-4)


def test_the_divisor_is_the_expected_batch_however_many_came() -> None:
    """The whole of 12 records comes, 6 are expected: without noise twice the mean gradient."""
    few, many = bench(), bench()
    start = few.state()
    one_step = TrainSettings(local_steps=1, lr=0.01)
    serve(few, replace(NON_PRIVATE, expected_batch=12.0), one_step, source=Everyone())
    serve(many, NON_PRIVATE, one_step, source=Everyone())
    for name in start:
        moved, moved_less = many.state()[name] - start[name], few.state()[name] - start[name]
        torch.testing.assert_close(moved, 2 * moved_less, rtol=1e-3, atol=1e-6)


def test_the_model_trains_in_training_mode() -> None:
    b = bench("vit")
    b.learner.adapter.model.eval()  # as an evaluation leaves it
    serve(b)
    assert all(module.training for module in b.learner.adapter.model.modules())


def test_all_parts_of_a_learner_are_in_training_mode_before_its_first_round() -> None:
    learner = ModelStore().learner(settings_from({}))
    assert all(module.training for module in learner.adapter.model.modules())


def test_the_sites_own_log_tells_the_mean_loss_and_the_reply_does_not(caplog: pytest.LogCaptureFixture) -> None:
    """At a learning rate that moves nothing every step sees the same losses."""
    b = bench()
    inputs, labels = b.records.batch(torch.arange(len(b.records)))
    with torch.no_grad():
        mean = float(b.base.losses(b.model.eval(), inputs, labels).mean())
    with caplog.at_level("INFO", "lalora_flwr.site"):
        result = serve(b, train=replace(STEPS, lr=1e-30, local_steps=2), source=Everyone())
    (line,) = [record.getMessage() for record in caplog.records if "mean loss" in record.getMessage()]
    assert line == f"round 1: mean loss {mean:.4f} over {2 * RECORDS} drawn records" and result == 0


def test_a_round_without_a_record_logs_no_loss(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lalora_flwr.site"):
        serve(bench(), source=Nobody())
    assert "loss" not in caplog.text
