from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lalora_flwr.data.inputs import Inputs
from lalora_flwr.data.records import Records
from lalora_flwr.ground.errors import BudgetExhausted
from lalora_flwr.methods.filters import Filter
from lalora_flwr.methods.schedules import schedule_of
from lalora_flwr.models.base import BaseModel
from lalora_flwr.privacy.mechanism import Mechanism
from lalora_flwr.settings import TrainSettings
from lalora_flwr.settings.choices import FILTERS
from lalora_flwr.training.local import LocalRound, train_round
from tests.adapters import adapter_parameters, factor_of
from tests.reference import (
    Algorithm1,
    Bench,
    Everyone,
    Nobody,
    OpenLedger,
    Replay,
    algorithm_1,
    bench,
    joint_norm,
    mlp_weights,
)

RECORDS, SCALE = 12, 3.0 / 2  # alpha / rank of `tests.reference.adapted`
PRIVATE = Mechanism(noise_multiplier=0.8, clip_norm=0.25, sample_rate=0.5, expected_batch=6.0)
NON_PRIVATE = Mechanism(noise_multiplier=0.0, clip_norm=0.25, sample_rate=0.5, expected_batch=6.0)
STEPS = TrainSettings(local_steps=5, lr=0.3)


def serve(b: Bench, mechanism: Mechanism = PRIVATE, train: TrainSettings = STEPS, **choices: Any) -> int:
    """One round of LA-LoRA with fixed draws, unless told otherwise."""
    layout, server_round = b.learner.adapter.layout, choices.get("server_round", 1)
    masks = schedule_of(choices.get("schedule", "step:BA")).masks(layout, server_round, train.local_steps, {})
    gradient_filter = FILTERS.get(choices.get("filter_name", "gauss5"), Filter)
    return train_round(
        b.learner,
        choices.get("records", b.records),
        LocalRound(server_round, layout, masks, gradient_filter, train),
        mechanism=mechanism,
        ledger=choices.get("ledger") or OpenLedger(),
        source=choices.get("source") or Replay(),
        memory={},
    )


def snapshots(b: Bench, *args: Any, **choices: Any) -> list[dict[str, Tensor]]:
    """The adapter before every step and after the last."""
    states: list[dict[str, Tensor]] = []
    serve(b, *args, ledger=OpenLedger(on_step=lambda: states.append(b.state())), **choices)
    return [*states, b.state()]


def follows(b: Bench, run: Algorithm1, mechanism: Mechanism, train: TrainSettings, **choices: Any) -> None:
    """Check the round against the transcription of Algorithm 1, after every step."""
    w = mlp_weights(b.model)
    start = dict(w)
    states = snapshots(b, mechanism, train, **choices)[1:]
    source = choices.get("source") or Replay()
    for state, _ in zip(states, algorithm_1(w, SCALE, b.records, run, Replay(source.seed)), strict=True):
        for name, tensor in state.items():
            _, _, rest = name.rpartition("model.")
            layer, _, kind = rest.partition(".")
            short = f"{layer}.{factor_of(name)}" if factor_of(name) != "head" else f"{layer}.{kind.split('.')[-1]}"
            torch.testing.assert_close(tensor.double(), w[short], rtol=1e-4, atol=1e-5)
    moved = {n for n in w if not torch.equal(w[n], start[n])}
    assert moved  # the reference went somewhere


SIGMAS = pytest.mark.parametrize("mechanism", [PRIVATE, NON_PRIVATE], ids=["private", "non-private"])
LA_LORA = Algorithm1(steps=5, q=0.5, clip_norm=0.25, sigma=0.8, eta=0.3)


def for_mechanism(run: Algorithm1, mechanism: Mechanism) -> Algorithm1:
    return replace(run, sigma=mechanism.noise_multiplier)


@SIGMAS
@pytest.mark.parametrize("physical", [0, 1, 3])
def test_la_lora_is_algorithm_1(mechanism: Mechanism, physical: int) -> None:
    follows(bench(), for_mechanism(LA_LORA, mechanism), mechanism, replace(STEPS, max_physical_batch=physical))


def test_the_clip_bound_of_these_tests_binds_for_some_records_only() -> None:
    b = bench()
    w = mlp_weights(b.model)
    step = Algorithm1(steps=1, q=1.0, clip_norm=1.0, sigma=0.0, eta=1.0, filtered=False)  # w - after is the gradient
    norms = []
    for j in range(RECORDS):
        after = dict(w)
        list(algorithm_1(after, SCALE, b.records.take(torch.tensor([j])), step, Everyone()))
        norms.append(joint_norm({n: after[n] - w[n] for n in w}))
    assert min(norms) < PRIVATE.clip_norm < max(norms)


@SIGMAS
@pytest.mark.parametrize("filter_name", ["none", "gauss5"])
@pytest.mark.parametrize(
    ("schedule", "server_round", "order"),
    [
        ("both", 1, "*"),
        ("B", 1, "B"),
        ("A", 1, "A"),
        ("step:AB", 1, "AB"),
        ("step:B2A", 7, "BBA"),
        ("round:BA", 1, "B"),
        ("round:BA", 2, "A"),
    ],
)
def test_other_schedules_and_filters(
    mechanism: Mechanism, filter_name: str, schedule: str, server_round: int, order: str
) -> None:
    run = replace(for_mechanism(LA_LORA, mechanism), order=order, filtered=filter_name == "gauss5")
    follows(bench(), run, mechanism, STEPS, schedule=schedule, filter_name=filter_name, server_round=server_round)


@SIGMAS
@pytest.mark.parametrize("schedule", ["step:BA", "both"])
def test_a_trained_head_takes_part_in_every_step_and_in_the_joint_clip(mechanism: Mechanism, schedule: str) -> None:
    order = "*" if schedule == "both" else "BA"
    run = replace(for_mechanism(LA_LORA, mechanism), head=True, order=order)
    follows(bench(head="trained"), run, mechanism, STEPS, schedule=schedule)


@pytest.mark.parametrize("schedule", ["step:BA", "step:B2A", "both"])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_momentum_and_decay_of_a_factor_stand_still_while_it_is_frozen(schedule: str, head: str) -> None:
    order = {"step:BA": "BA", "step:B2A": "BBA", "both": "*"}[schedule]
    run = replace(LA_LORA, steps=7, order=order, head=head == "trained", momentum=0.9, decay=0.05, eta=0.1)
    train = TrainSettings(local_steps=7, lr=0.1, momentum=0.9, weight_decay=0.05)
    follows(bench(head=head), run, PRIVATE, train, schedule=schedule)


@pytest.mark.parametrize("schedule", ["step:BA", "step:B2A", "both"])
def test_adamw_counts_only_the_steps_of_each_factor(schedule: str) -> None:
    order = {"step:BA": "BA", "step:B2A": "BBA", "both": "*"}[schedule]
    run = replace(LA_LORA, steps=7, order=order, adamw=True, decay=0.05, eta=0.02)
    train = TrainSettings(local_steps=7, lr=0.02, optimizer="adamw", weight_decay=0.05)
    follows(bench(), run, PRIVATE, train, schedule=schedule)


def test_every_round_starts_with_a_fresh_optimizer() -> None:
    b = bench()
    train = TrainSettings(local_steps=3, lr=0.1, momentum=0.9)
    run = replace(LA_LORA, steps=3, momentum=0.9, eta=0.1)
    for server_round in (1, 2):
        follows(b, run, PRIVATE, train, server_round=server_round, source=Replay(server_round))


OPTIMIZERS = [
    TrainSettings(local_steps=6, lr=0.05),
    TrainSettings(local_steps=6, lr=0.05, momentum=0.9, weight_decay=0.1),
    TrainSettings(local_steps=6, lr=0.01, optimizer="adamw", weight_decay=0.1),
]
BY_OPTIMIZER = pytest.mark.parametrize("train", OPTIMIZERS, ids=["sgd", "momentum", "adamw"])


@BY_OPTIMIZER
@SIGMAS
@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("schedule", ["step:BA", "step:AB", "step:B2A2", "B", "A", "both"])
def test_each_step_moves_the_active_factor_and_nothing_else(
    train: TrainSettings, mechanism: Mechanism, head: str, schedule: str
) -> None:
    b = bench("vit", head=head)
    states = snapshots(b, mechanism, train, schedule=schedule, source=Everyone())
    assert len(states) == 7
    for step in range(6):
        trained = schedule_of(schedule).mask(b.learner.adapter.layout, 1, step, {})
        for name, before in states[step].items():
            assert torch.equal(before, states[step + 1][name]) == (name not in trained), (step, name)


@BY_OPTIMIZER
def test_rounds_of_b_leave_a_bitwise_and_rounds_of_a_leave_b(train: TrainSettings) -> None:
    b = bench("vit")
    for server_round, moving in ((1, "B"), (2, "A"), (3, "B"), (4, "A")):
        before = b.state()
        serve(b, PRIVATE, train, schedule="round:BA", filter_name="none", server_round=server_round)
        after = b.state()
        assert all(torch.equal(before[n], after[n]) == (factor_of(n) != moving) for n in before)


def test_the_base_model_never_changes() -> None:
    b = bench("vit", head="trained")
    adapter = adapter_parameters(b.model)
    base = {n: p.detach().clone() for n, p in b.model.named_parameters() if n not in adapter}
    serve(b, train=OPTIMIZERS[1])
    assert len(base) > 20
    for n, p in b.model.named_parameters():
        assert n in adapter or (torch.equal(p, base[n]) and p.grad is None and not p.requires_grad)


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
    assert not b.base.module.training
    serve(b)
    assert b.base.module.training


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
