"""DiSK as published: two gradients a record against a transcription, one clip, and what it cannot be combined with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lalora_flwr.data.inputs import Inputs
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.filters import filter_of
from lalora_flwr.methods.kalman import GAMMA
from lalora_flwr.methods.schedules import schedule_of
from lalora_flwr.privacy.mechanism import Mechanism, PrivateSum
from lalora_flwr.server.plan import make_plan
from lalora_flwr.settings import TrainSettings
from lalora_flwr.training.learner import Learner
from lalora_flwr.training.local import LocalRound, Memory, train_round
from tests.adapters import factor_of
from tests.algorithm1 import mlp_loss, mlp_weights
from tests.conftest import Finished, small
from tests.reference import Bench, Everyone, Nobody, OpenLedger, Replay, bench, generator, joint_norm
from tests.server.test_resume import killed_after, result, resumed
from tests.training.rounds import NON_PRIVATE, PRIVATE, SCALE, SIGMAS

ETA = 0.3
RUN: dict[str, Any] = {"strategy": "dp-lora", "filter__name": "kalman", "num_rounds": 3, "privacy__accountant": "rdp"}
Weights = dict[str, Tensor]


def fresh() -> Memory:
    return {}


def serve(b: Bench, memory: Memory, name: str = "kalman", mechanism: Mechanism = PRIVATE, **choices: Any) -> None:
    """A round of three steps of A and B."""
    layout = b.learner.adapter.layout
    masks = schedule_of(choices.get("schedule", "both")).masks(layout, 1, 3, {})
    train_round(
        choices.get("learner", b.learner),
        choices.get("records", b.records),
        LocalRound(1, layout, masks, filter_of(name), TrainSettings(local_steps=3, lr=ETA), tolerant="learner" in choices),
        mechanism=mechanism,
        ledger=OpenLedger(),
        source=choices.get("source") or Replay(),
        memory=memory,
        make_sum=choices.get("make_sum", PrivateSum),
    )


def moved(b: Bench, by: float) -> Weights:
    """As a server's merge moves the adapter between two rounds."""
    draw = generator(7)
    state = {name: value + by * torch.randn(value.shape, generator=draw) for name, value in sorted(b.state().items())}
    b.learner.adapter.load(state)
    return state


class Naive:
    """The paper's recursion in its words, one record after the other, in float64."""

    def __init__(self, b: Bench, kappa: float, mechanism: Mechanism) -> None:
        self.b, self.kappa, self.mechanism = b, kappa, mechanism
        self.x = mlp_weights(b.model)
        self.last: Weights | None = None
        self.m: Weights = {}

    def gradient(self, at: Weights, names: list[str], j: int) -> Weights:
        leaves = {n: at[n].clone().requires_grad_() for n in names}
        loss = mlp_loss({**at, **leaves}, SCALE, self.b.records.inputs[j].double(), int(self.b.records.labels[j]))
        return dict(zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def round(self, source: Replay) -> None:
        kappa, run = self.kappa, self.mechanism
        names = [n for n in self.x if n[-2:] in (".A", ".B")]
        for _ in range(3):
            drawn = [j for j, u in enumerate(source.uniform(len(self.b.records)).tolist()) if u < run.sample_rate]
            total = {n: torch.zeros_like(self.x[n]) for n in names}
            ahead = {**self.x}
            if self.last is not None:
                ahead |= {n: self.x[n] + GAMMA * (self.x[n] - self.last[n]) for n in names}
            for j in drawn:
                there, here = self.gradient(ahead, names, j), self.gradient(self.x, names, j)
                w = (1 - kappa) / (kappa * GAMMA)
                g = {n: w * there[n] + (1 - w) * here[n] for n in names}
                shrink = max(1.0, joint_norm(g) / run.clip_norm) if run.private else 1.0
                total = {n: total[n] + g[n] / shrink for n in names}
            self.last = {n: self.x[n].clone() for n in names}
            for n in names:
                noise = run.noise_std * source.normal(self.x[n].shape).double()
                g_hat = (total[n] + noise) / run.expected_batch
                self.m[n] = (1 - kappa) * self.m[n] + kappa * g_hat if n in self.m else g_hat
                self.x[n] = self.x[n] - ETA * self.m[n]


@SIGMAS
@pytest.mark.parametrize(("name", "kappa"), [("kalman", 0.7), ("kalman:0.3", 0.3)])
def test_it_is_the_published_recursion_over_steps_and_rounds(name: str, kappa: float, mechanism: Mechanism) -> None:
    b, memory = bench(), fresh()
    naive = Naive(b, kappa, mechanism)
    for seed in (0, 1):
        serve(b, memory, name, mechanism, source=Replay(seed))
        naive.round(Replay(seed))
        for n, want in naive.x.items():
            if n[-2:] in (".A", ".B"):
                (own,) = [v for m, v in b.state().items() if f"{n[:-2]}." in m and factor_of(m) == n[-1]]
                torch.testing.assert_close(own.double(), want, rtol=1e-4, atol=1e-5)
        moved(b, 0.05)
        naive.x = mlp_weights(b.model)


def test_it_is_more_than_the_average_of_gradients_at_the_adapter() -> None:
    one, other = bench(), bench()
    serve(one, {}, "kalman", NON_PRIVATE, source=Everyone())
    serve(other, {}, "disk:0.7", NON_PRIVATE, source=Everyone())
    assert max(float((one.state()[n] - other.state()[n]).norm() / other.state()[n].norm()) for n in one.state()) > 1e-3


def test_ahead_alone_it_is_the_running_average_of_plain_steps() -> None:
    """κ = 1/(1 + γ). The first gradient counts in full, so that the plain walk's first step is as long as 1/κ of them."""
    kappa, b, plain = 0.666667, bench(), bench()
    states: list[Weights] = []
    serve(b, {}, f"kalman:{kappa}", NON_PRIVATE, source=Everyone())
    layout = plain.learner.adapter.layout
    average = plain.state()
    for step in range(3):
        train = TrainSettings(local_steps=1, lr=ETA / kappa if step == 0 else ETA)
        what = LocalRound(1, layout, schedule_of("both").masks(layout, 1, 1, {}), filter_of("none"), train)
        ledger, source = OpenLedger(), Everyone()
        train_round(plain.learner, plain.records, what, mechanism=NON_PRIVATE, ledger=ledger, source=source, memory={})
        average = {n: (1 - kappa) * average[n] + kappa * value for n, value in plain.state().items()}
        states.append(average)
    for name, value in b.state().items():
        torch.testing.assert_close(value, states[-1][name], rtol=1e-3, atol=1e-4)


class Summed(PrivateSum):
    """Keeps what it is about to noise; for tests that look at sensitivity."""

    totals: list[Tensor]

    def _taken(self, ledger: Any) -> Any:
        total, shapes = super()._taken(ledger)
        self.totals.append(total.clone())
        return total, shapes


@pytest.mark.parametrize("by", [0.0, 1.0, 1e4, 1e30])
def test_one_record_moves_the_sum_by_the_clip_norm_at_most_wherever_the_server_moves_the_adapter(by: float) -> None:
    """Both points are the server's choice; the combination is clipped, not the two gradients."""

    def sums(count: int) -> list[Tensor]:
        b, memory, found = bench(), fresh(), list[Tensor]()
        serve(b, memory, source=Nobody())  # what is remembered follows from noise alone
        moved(b, by)
        own = type("Own", (Summed,), {"totals": found})
        serve(b, memory, source=Everyone(), records=b.records.take(torch.arange(count)), make_sum=own)
        return found

    with_it, without = sums(12)[0], sums(11)[0]  # of the first step, before which nothing differs
    assert with_it.isfinite().all()
    assert float((with_it - without).norm()) <= PRIVATE.clip_norm * (1 + 1e-12)
    if by <= 1.0:
        assert float((with_it - without).norm()) > 0


@dataclass(frozen=True)
class FailsAt(Learner):
    """Raises at every second point, which follows the first: `at` notes where it was."""

    at: list[Weights]

    def gradients(self, inputs: Inputs, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        self.at.append({name: value.detach().clone() for name, value in self.adapter.parameters.items()})
        if len(self.at) % 2 == 0:
            raise RuntimeError("a record does not fit")
        return super().gradients(inputs, labels)


def test_a_pass_that_fails_ahead_leaves_the_adapter_where_it_was() -> None:
    """Else the step would go on from a point that no one has released."""
    b, memory = bench(), fresh()
    serve(b, memory, source=Nobody())
    moved(b, 0.1)
    plain, same = b.state(), {slot: dict(state) for slot, state in memory.items()}
    own = b.learner
    failing = FailsAt(own.base, own.adapter, own.engine, own.initial, [])
    serve(b, memory, source=Everyone(), learner=failing)
    after = b.state()
    assert all(torch.equal(failing.at[0][name], value) for name, value in plain.items())
    assert not any(torch.equal(failing.at[1][name], value) for name, value in plain.items())
    own.adapter.load(plain)
    serve(b, same, source=Nobody())  # every record has counted as zero
    assert all(torch.equal(after[name], value) for name, value in b.state().items())


def test_a_resumed_run_remembers_where_the_last_gradient_was(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    killed_after(small(tmp_path, **RUN), 2)
    assert result(run_inline(resumed(tmp_path, **RUN))) == result(finished(**RUN).path)


def test_it_costs_a_second_pass_and_no_privacy(tmp_path: Path) -> None:
    one, two = (make_plan(small(tmp_path, **{**RUN, "filter__name": name})) for name in ("kalman", "disk"))
    assert one.mechanism == two.mechanism and one.rate == two.rate and one.bytes_up == two.bytes_up


@pytest.mark.parametrize(
    ("keys", "refusal"),
    [
        (
            {"train__local_steps": 1, "train__step_at": "server"},
            r"sites take gradients ahead of the adapter, so the step is theirs",
        ),
        ({"train__local_steps": 1, "trust": "secure-sum"}, r"sites take gradients ahead of the adapter, so the step is theirs"),
        ({"lora__dropout": 0.1}, r"each of another dropout; set lora\.dropout = 0"),
        ({"strategy": "la-lora"}, r"the same slots must train at every step; set lora\.schedule = 'both', 'B' or 'A'"),
        ({"strategy": "rolora"}, r"the same slots must train at every step"),
        ({"strategy": "flora"}, r"kalman remembers gradients, of factors that 'stack' turns after each round"),
        ({"filter__name": "kalman:1.5"}, r"must be kalman, or with a number between 0 and 1, both excluded, as kalman:0\.7"),
    ],
)
def test_what_it_cannot_be_combined_with(keys: dict[str, Any], refusal: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=refusal) as said:
        make_plan(small(tmp_path, **{**RUN, **keys}))
    assert "\n" not in str(said.value)
    make_plan(small(tmp_path, **RUN, lora__schedule="B"))
