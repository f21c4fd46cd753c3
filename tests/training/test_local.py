"""A site's round is Algorithm 1 of the paper, for every schedule, filter and optimizer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lalora_flwr.adapter.slots import LORA_A
from lalora_flwr.methods.precondition import DAMPING
from lalora_flwr.methods.schedules import schedule_of
from lalora_flwr.privacy.mechanism import APART, Mechanism
from lalora_flwr.settings import TrainSettings
from tests.adapters import adapter_parameters, factor_of
from tests.algorithm1 import Algorithm1, algorithm_1, mlp_weights
from tests.reference import Bench, Everyone, OpenLedger, Replay, bench, joint_norm
from tests.training.rounds import NON_PRIVATE, PRIVATE, RECORDS, SCALE, SIGMAS, STEPS, serve


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
@pytest.mark.parametrize(("schedule", "order"), [("step:BA", "BA"), ("step:AB", "AB"), ("both", "*"), ("B", "B")])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_the_step_of_theorem_2_uses_the_other_factor_as_it_is_then(
    mechanism: Mechanism, schedule: str, order: str, head: str
) -> None:
    run = replace(for_mechanism(LA_LORA, mechanism), order=order, filtered=False, damping=DAMPING, eta=0.05)
    train = replace(STEPS, lr=0.05)
    follows(
        bench(head=head), replace(run, head=head == "trained"), mechanism, train, schedule=schedule, filter_name="precondition"
    )


@SIGMAS
@pytest.mark.parametrize("schedule", ["step:BA", "both"])
def test_a_trained_head_takes_part_in_every_step_and_in_the_joint_clip(mechanism: Mechanism, schedule: str) -> None:
    order = "*" if schedule == "both" else "BA"
    run = replace(for_mechanism(LA_LORA, mechanism), head=True, order=order)
    follows(bench(head="trained"), run, mechanism, STEPS, schedule=schedule)


def test_auto_s_divides_by_the_norm_of_each_record() -> None:
    follows(bench(), replace(LA_LORA, gamma=0.01), replace(PRIVATE, stability=0.01), STEPS)
    plain = for_mechanism(LA_LORA, NON_PRIVATE)
    follows(bench(), plain, replace(NON_PRIVATE, stability=0.01), STEPS)  # without privacy nothing is scaled


@SIGMAS
@pytest.mark.parametrize(("schedule", "order"), [("both", "*"), ("step:BA", "BA")])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_a_may_be_clipped_apart_and_have_a_rate_of_its_own(mechanism: Mechanism, schedule: str, order: str, head: str) -> None:
    run = replace(for_mechanism(LA_LORA, mechanism), order=order, filtered=False, head=head == "trained", apart=APART, slow=0.25)
    apart = replace(mechanism, apart=LORA_A)
    follows(bench(head=head), run, apart, STEPS, schedule=schedule, filter_name="slow-a:0.25")


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
