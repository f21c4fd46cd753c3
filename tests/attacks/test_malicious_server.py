"""A server that asks for anything: every key, order and adapter, against what the site's ledger charges for the answer."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lalora_flwr.settings import KEYS
from lalora_flwr.wire.packed import WHOLE
from tests.adapters import factor_of
from tests.attacks.attacker import RECORDS, RUN, Draws, Site, table, text_model
from tests.attacks.named import NAMED
from tests.attacks.orders import order
from tests.attacks.problems import problems
from tests.reference import generator

EXAMPLES = int(os.environ.get("LALORA_ATTACK_EXAMPLES", "2000"))  # a nightly job asks for more, drawn anew each time
HUGE = 3e38


RIDGE = {"strategy": "ridge-head", "train.lr": 1.0}


@dataclass(frozen=True)
class Target:
    """A site with all of `RECORDS` and the same site without the last."""

    model: Path
    whole: Site
    without: Site


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("site")
    model = text_model(folder / "model")
    whole, without = table(folder / "with.csv"), table(folder / "without.csv", RECORDS[:-1])
    return Target(model, Site(whole, model), Site(without, model))


@dataclass(frozen=True)
class Attack:
    """An order: the run's keys, the order's fields, and the adapter to start from."""

    run: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    adapter: tuple[str, float] = ("initial", 1.0)
    sent: str | None = None  # factors that travel; none: those of the method

    def change(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        kind, size = self.adapter
        draw, out = generator(5), {}
        for name, tensor in state.items():
            noise = (torch.randn(tensor.shape, generator=draw) * size).clamp(-HUGE, HUGE) if abs(size) <= HUGE else tensor + size
            if kind == "everything" or factor_of(name) == kind:
                out[name] = noise
            elif kind == "one" and tensor.numel():
                out[name] = tensor.clone()
                out[name].view(-1)[0] = torch.tensor(size, dtype=torch.float64).float()
            else:
                out[name] = tensor
        return out

    def problems(self, target: Target, seed: int = 0) -> list[str]:
        run = {**RUN, **self.run}
        sent = None if self.sent is None else lambda n: factor_of(n) in (*self.sent, "head")
        message = order(run, target.model, self.change, sent=sent, **self.fields)
        return problems(message, run, target.whole, target.without, seed=seed)


# The attacks of hole 1, and their kin: each was let pass, and cost nothing beyond its ε in the ledger.


@pytest.mark.parametrize("name", NAMED)
def test_a_configuration_does_not_switch_the_noise_off(name: str, target: Target) -> None:
    """Hole 1: a run's keys alone made clip and noise vanish in float32 while the ledger counted a small ε."""
    assert Attack(NAMED[name]).problems(target) == []


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-23, 1e-22, 1e-12, 1e12, 1e18, 1e19, 1e25, 1e30, HUGE])
@pytest.mark.parametrize("kind", ["A", "B", "everything", "one"])
def test_the_adapter_to_start_from_does_not_switch_the_noise_off(kind: str, size: float, target: Target) -> None:
    """Hole 1: the server also chooses the scale of the gradients by the adapter it sends."""
    assert Attack({"strategy": "dp-lora"}, adapter=(kind, size)).problems(target) == []


@pytest.mark.parametrize("size", [1e-45, 1e-12, 1.0, 1e4, 1e30, HUGE, float("nan"), float("inf")])
def test_the_sums_to_start_from_do_not_switch_the_noise_off(size: float, target: Target) -> None:
    """A relative of hole 1 for a form whose gradients depend on the record alone: the server chooses gram and cross."""
    assert Attack({"strategy": "ridge-head", "train.lr": 1.0}, adapter=("everything", size)).problems(target) == []


@pytest.mark.parametrize("size", [3.0, 1e4])
@pytest.mark.parametrize("alpha", [100.0, 1000.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_amplifies_rounding_does_not_tie_records_together(size: float, alpha: float, dtype: str, target: Target) -> None:
    """A relative of holes 1 and 4: a gradient that is mostly rounding may not change with the size of its batch."""
    run = {"strategy": "dp-lora", "lora.alpha": alpha, "privacy.clip-norm": 0.01, "model.dtype": dtype}
    assert Attack(run, adapter=("everything", size)).problems(target) == []


@pytest.mark.parametrize("size", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["A", "B", "one"])
def test_an_adapter_that_is_not_finite_gets_noise_or_nothing(kind: str, size: float, target: Target) -> None:
    """Hole 1: no record's gradient is finite there; that may not turn clip or noise off either."""
    assert Attack({"strategy": "dp-lora"}, adapter=(kind, size)).problems(target) == []


def test_an_honest_run_is_answered(target: Target) -> None:
    """Else all of this would pass on a site that refuses everything."""
    for run in ({}, {"strategy": "la-lora", "train.local-steps": 3}, {"lora.head": "trained", "train.optimizer": "adamw"}, RIDGE):
        asked = {**RUN, **run}
        served = target.whole.serve(order(asked, target.model), asked)
        assert not served.reason and len(served.steps) == served.reserved[0].steps


@pytest.mark.parametrize("junk", [b"", b"\xff" * 64, b"\x08" + bytes(7) + b"{broken}", bytes(64)])
def test_tensors_that_cannot_be_read_are_refused_before_anything_is_counted(junk: bytes, target: Target) -> None:
    message = order(RUN, target.model)
    message.content["arrays"] = ArrayRecord({WHOLE: Array(np.frombuffer(junk, dtype=np.uint8))})
    served = target.whole.serve(message, RUN)
    assert served.reason == "order: its tensors cannot be read" and not served.reserved and not served.steps


def reply_against_the_raw_gradient(run: dict[str, Any], target: Target) -> float:
    """Cosine of what a reply says of the step and the sum without noise, as the server computes the first."""
    run = {**RUN, **run}
    message = order(run, target.model)
    served = target.whole.serve(message, run, draws=Draws(7))
    if served.reason:
        return 0.0
    start = dict(message.content["arrays"].to_torch_state_dict())
    trained = [name for name in served.tensors if factor_of(name) == "B"]
    said = torch.cat([(start[n].double() - served.tensors[n].double()).flatten() for n in trained]) / run["train.lr"]
    truth = served.steps[0].total
    return float((said / said.norm()) @ (truth / truth.norm()))


@pytest.mark.parametrize("name", ["tiny alpha and clip norm, huge rate", "tiny alpha"])
def test_a_reply_is_not_the_gradient(name: str, target: Target) -> None:
    """Hole 1: over TLS a reply equalled the un-noised gradient, with cosine 0.99999997."""
    assert abs(reply_against_the_raw_gradient(NAMED[name], target)) < 0.9


# What hypothesis draws from. Extremes come with every draw; a run that asks for too many of them is refused at once.

MAGNITUDES = st.floats(-45, 38).map(lambda e: 10.0**e)
SIZES = st.one_of(st.just(1.0), MAGNITUDES, st.sampled_from([0.0, float("nan"), float("inf"), -1.0, 1e-45, HUGE, 1e300, 5e-324]))

# α, and C below it
SCALES = st.tuples(st.floats(-44, 38), st.floats(-44, 0)).map(lambda e: (10.0 ** e[0], 10.0 ** (e[0] + e[1])))


def within(low: float, high: float) -> st.SearchStrategy[float]:
    """Values of all magnitudes that a careful owner may still allow, and now and then any at all."""
    allowed = st.floats(low, high).map(lambda e: 10.0**e)
    return st.one_of(allowed, allowed, SIZES)


def mostly(usual: Any, other: st.SearchStrategy[Any], share: int = 4) -> st.SearchStrategy[Any]:
    """``usual``, and once in ``share`` draws something else."""
    return st.integers(1, share).flatmap(lambda n: other if n == 1 else st.just(usual))


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """A run-config: a core that is mostly sane, with one or two wild values anywhere."""
    alpha, clip_norm = draw(mostly((4.0, 1.0), st.one_of(st.tuples(within(-1, 3), within(-2, 2)), SCALES), 2))
    run: dict[str, Any] = {
        "strategy": draw(st.sampled_from(["la-lora", "dp-lora", "ffa-lora", "rolora", "dynamic-rank", "fedsa-lora"])),
        "lora.alpha": alpha,
        "lora.head": draw(st.sampled_from(["auto", "frozen", "trained", "ridge"])),
        "lora.schedule": draw(
            mostly("auto", st.sampled_from(["both", "B", "A", "step:BA", "round:AB", "step:B3A2", "step:", "AB"]))
        ),
        "train.lr": draw(mostly(1.0, within(-6, 2))),
        "train.momentum": draw(mostly(0.0, st.sampled_from([0.5, 0.9, 0.999, 0.5, 0.999999, 1.0, -0.5, 1e-45]))),
        "train.weight-decay": draw(mostly(0.0, within(-6, 1))),
        "train.optimizer": draw(st.sampled_from(["sgd", "sgd", "adamw"])),
        "train.batch-size": draw(st.sampled_from([2, 8, 8, 10**9])),
        "train.max-physical-batch": draw(st.sampled_from([0, 0, 1, 3, 10**12])),
        "train.local-steps": draw(st.sampled_from([1, 1, 3])),
        "model.dtype": draw(mostly("float32", st.sampled_from(["bfloat16", "auto"]), 8)),
        "privacy.clip-norm": clip_norm,
        "privacy.epsilon": draw(mostly(1.0, st.sampled_from([8.0, 100.0, float("inf"), float("nan"), 0.0, -1.0]), 6)),
        "privacy.delta": draw(mostly(1e-5, st.sampled_from([1e-6, 0.5, 1e-300, 0.0, 1.0]), 8)),
        "privacy.accountant": draw(mostly("pld", st.sampled_from(["rdp", "rdp", "prv"]), 6)),
        "filter.name": draw(
            st.sampled_from(["auto", "none", "gauss5", "gauss:3", "gauss-adaptive", "wiener", "doppler", "disk", "kalman"])
        ),
    }
    if run["train.optimizer"] == "adamw":
        run["train.momentum"] = 0.0
    if run["lora.head"] == "ridge":
        run["num-rounds"] = 3
    for name in draw(mostly([], st.lists(st.sampled_from(sorted(set(KEYS) - LEFT_ALONE)), max_size=2), 2)):
        run[name] = draw(wild(name))
    return run


# A fresh model for each of these would take the time of many attacks; threads would be the machine's.
LEFT_ALONE = {
    "train.num-threads",
    "lora.rank",
    "lora.targets",
    "model.name",
    "lora.dropout",
    *(k for k in KEYS if "num-rounds" in k),
}
WORDS = ("", "text", "label", "nothing", "none", "train", "test", "good", "bad,good", "good,bad", "bad", "actor,film", "x" * 999)


def wild(name: str) -> st.SearchStrategy[Any]:
    """Any value for a key: of its type, out of its range, or of another type."""
    default = KEYS[name].default
    whole = st.sampled_from([-1, 0, 1, 2, 3, 7, 2**31, 2**63, 10**30])
    own: dict[type, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: whole if name not in ("data.max-tokens", "seed") else st.sampled_from([0, 2, 3, 12, 40]),
        float: st.one_of(SIZES, SIZES.map(lambda v: -v)),
        str: st.sampled_from([*WORDS, str(default)]),
    }
    return st.one_of(own[type(default)], own[type(default)], st.sampled_from([True, 0, 1.5, "", "x"]))


@st.composite
def attacks(draw: st.DrawFn) -> Attack:
    fields = {
        "server_round": st.sampled_from([1, 2, 0, -1, 10**18]),
        "directive": st.sampled_from(
            [{}, {"mask": []}, {"ranks": {}}, {"ranks": {"x": 1}}, {"schedule": "A"}, {"lr": 1e30}, {"": None}]
        ),
        "exchange": st.sampled_from([{}, {"sites": []}, {"share": 0.0}, {"": {}}]),
        "counted_steps": st.sampled_from([0, 1, -1, -(10**18), 10**18]),
        "counted_before": st.sampled_from([0, 1, -1, 10**18]),
        "adapter_digest": st.sampled_from(["", "0" * 64]),
        "model_digest": st.sampled_from(["", "0" * 64]),
        "own": st.sampled_from(["0" * 64, "*", "../1/1-x"]),
    }
    changed = draw(mostly([], st.lists(st.sampled_from(sorted(fields)), max_size=2, unique=True), 2))
    adapter = draw(mostly(("initial", 1.0), st.tuples(st.sampled_from(["A", "B", "everything", "one", "head"]), SIZES), 2))
    sent = draw(mostly(None, st.sampled_from(["A", "B", "AB", ""]), 8))
    return Attack(draw(runs()), {name: draw(fields[name]) for name in changed}, adapter, sent)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="LALORA_ATTACK_EXAMPLES" not in os.environ,
    database=None,
    phases=[Phase.generate],  # an attack that succeeds is reported as it was drawn
    suppress_health_check=list(HealthCheck),
)
@given(attack=attacks(), seed=st.integers(0, 2**31))
def test_whatever_the_server_asks_the_answer_is_worth_what_the_ledger_charged(target: Target, attack: Attack, seed: int) -> None:
    """Hole 1: any key, any order, any adapter, on records and on the same records but one."""
    assert attack.problems(target, seed) == []
