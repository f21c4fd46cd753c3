"""Which floating-point numbers a reply can hold gives nothing away (Mironov 2012), by attacks that work elsewhere.

An attacker who knows both candidate sums, with a record and without it, sees one reply and says which it was. What the
Gaussian mechanism itself allows here is right in 55 of 100 replies; an attacker who looks at the last bits was right in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from numpy.typing import NDArray
from scipy.stats import binom, norm

from tests.attacks.attacker import RECORDS, RUN, Site, table, text_model
from tests.attacks.orders import order

Doubles = NDArray[np.float64]
Singles = NDArray[np.float32]
Mechanism = Callable[[Doubles, float, np.random.Generator], Doubles]  # sum, standard deviation, draws -> noised sum
Test = Callable[
    [Doubles, Doubles, float], NDArray[np.bool_]
]  # noised sum, candidate sum, deviation -> what refutes the candidate
GRID = 2.0**-17  # of the deviation: the coarsest grid that noise is rounded to
REPLIES = 200
FLUKE = 1e-6


def _neighbours(values: Doubles, reach: int) -> Singles:
    """The float32 numbers around some numbers: (2 reach + 1, n)."""
    nearest = values.astype(np.float32)
    rows = [nearest]
    up = down = nearest
    for _ in range(reach):
        up, down = np.nextafter(up, np.float32(np.inf)), np.nextafter(down, np.float32(-np.inf))
        rows += [up, down]
    return np.stack(rows)


def float32_refutes(noised: Doubles, candidate: Doubles, std: float) -> NDArray[np.bool_]:
    """Where no float32 draw z gives fl(s + fl(std z)): z and the product take only some of the float32 numbers.

    An entry whose noise is much finer than the result could be anything and refutes nothing.
    """
    v, s, scale = noised.astype(np.float32), candidate.astype(np.float32), np.float32(std)
    noise = _neighbours(noised - candidate, 6)  # (13, n): all noises that may lead from the candidate to what was seen
    leads = s + noise == v
    draws = np.concatenate(list(_neighbours(noise.astype(np.float64).ravel() / float(scale), 1))).reshape(3, *noise.shape)
    reachable = (scale * draws == noise).any(0)
    known = np.spacing(np.abs(noised - candidate).astype(np.float32)) * 4 >= np.spacing(np.abs(v))
    return known & ~(leads & reachable).any(0)


def grid_refutes(noised: Doubles, candidate: Doubles, std: float) -> NDArray[np.bool_]:
    """Where the noise is not on a grid: right if only the noise was rounded to it, and the sum added afterwards."""
    grid = 2.0 ** math.floor(math.log2(GRID * std))
    off = (noised - candidate) / grid
    return np.abs(off - np.rint(off)) > 1e-3


def grid_float32_refutes(noised: Doubles, candidate: Doubles, std: float) -> NDArray[np.bool_]:
    """The same where the result was rounded once more, to float32."""
    grid = 2.0 ** math.floor(math.log2(GRID * std))
    nearest = candidate + np.rint((noised - candidate) / grid) * grid
    return nearest.astype(np.float32) != noised.astype(np.float32)


TESTS: dict[str, Test] = {"float32": float32_refutes, "grid": grid_refutes, "grid in float32": grid_float32_refutes}


def guess(test: Test, noised: Doubles, candidates: tuple[Doubles, Doubles], std: float, draw: np.random.Generator) -> int:
    """The candidate that fewer entries refute; a coin if as many refute both."""
    against = [int(test(noised, candidate, std).sum()) for candidate in candidates]
    return int(draw.integers(2)) if against[0] == against[1] else int(against[1] < against[0])


def most_right(replies: int, share: float) -> int:
    """How many right guesses nobody exceeds by luck, but once in a million, who is right with a probability of ``share``."""
    return int(binom.ppf(1 - FLUKE, replies, share))


@dataclass(frozen=True)
class Known:
    """What the attacker knows: two sites, one order, and the sum without noise of each."""

    sites: tuple[Site, Site]
    message: Message
    run: dict[str, Any]
    sums: tuple[Doubles, Doubles]
    names: list[str]  # of the tensors in the sums, in order
    std: float

    @property
    def allowed(self) -> float:
        """Share of right guesses that the Gaussian noise itself allows: Φ(Δ / 2σ)."""
        apart = float(np.linalg.norm(self.sums[0] - self.sums[1]))
        return float(norm.cdf(apart / self.std / 2))


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """As in hole 2: every record in every batch, one step, one reply, ε = 1; SGD at rate 1 from B = 0 shows the step."""
    folder = tmp_path_factory.mktemp("site")
    model = text_model(folder / "model", hidden_size=32, intermediate_size=48)
    rows = [*(RECORDS[:-1] * 9)[:59], RECORDS[-1]]
    files = table(folder / "60.csv", rows), table(folder / "59.csv", rows[:-1])
    sites = tuple(Site(file, model, {"num-records": 64}) for file in files)
    targets = "query,key,value,attention.output.dense,intermediate.dense,output.dense"
    run = {**RUN, "train.batch-size": 64, "lora.rank": 32, "lora.alpha": 32.0, "lora.targets": targets}
    message = order(run, model)
    served = [own.serve(message, run) for own in sites]
    assert not any(one.reason for one in served)
    charged = served[0].reserved[0]
    sums = tuple(one.steps[0].total.numpy() for one in served)
    assert len(sums[0]) > 5000
    names = [name.replace(".default", "") for name in served[0].steps[0].released]
    return Known((sites[0], sites[1]), message, run, (sums[0], sums[1]), names, charged.sigma * charged.clip_norm)


def seen(known: Known, number: int) -> Doubles:
    """A reply of one of the sites as the server reads it: the noised sum."""
    served = known.sites[number].serve(known.message, known.run, watch=False)
    start = known.message.content["arrays"].to_torch_state_dict()
    steps = [start[name].double() - served.tensors[name].double() for name in known.names]
    return 64 * np.concatenate([step.numpy().ravel() for step in steps])


@pytest.fixture(scope="module")
def replies(known: Known) -> list[tuple[int, Doubles]]:
    draw = np.random.default_rng(1)
    return [(number, seen(known, number)) for number in draw.integers(2, size=REPLIES).tolist()]


@pytest.mark.parametrize("name", TESTS)
def test_a_reply_does_not_tell_two_neighbouring_sites_apart(name: str, known: Known, replies: list[tuple[int, Doubles]]) -> None:
    """Hole 2: 10 of 10 replies were told apart by the float32 numbers in them."""
    draw = np.random.default_rng(2)
    right = sum(guess(TESTS[name], reply, known.sums, known.std, draw) == number for number, reply in replies)
    assert known.allowed < 0.57
    assert right <= most_right(REPLIES, known.allowed)
    assert right >= REPLIES - most_right(REPLIES, known.allowed)  # always wrong would be as good as always right


def float32_noise(total: Doubles, std: float, draw: np.random.Generator) -> Doubles:
    """The first version's: float32 draws, scaled and added in float32."""
    z = draw.standard_normal(total.shape).astype(np.float32)
    return (total.astype(np.float32) + np.float32(std) * z).astype(np.float64)


def noise_on_a_grid(total: Doubles, std: float, draw: np.random.Generator) -> Doubles:
    """Noise rounded to a grid before it is added: the sum's own last bits stay."""
    grid = 2.0 ** math.floor(math.log2(GRID * std))
    return total + np.rint(draw.standard_normal(total.shape) * std / grid) * grid


def noise_on_a_grid_in_float32(total: Doubles, std: float, draw: np.random.Generator) -> Doubles:
    return noise_on_a_grid(total, std, draw).astype(np.float32).astype(np.float64)


def all_on_a_grid(total: Doubles, std: float, draw: np.random.Generator) -> Doubles:
    """Drawn and added in float64, the result rounded once to a grid: a function of the exact mechanism's."""
    grid = 2.0 ** math.floor(math.log2(GRID * std))
    return np.rint((total + std * draw.standard_normal(total.shape)) / grid) * grid


NAIVE: dict[str, Mechanism] = {
    "float32": float32_noise,
    "grid": noise_on_a_grid,
    "grid in float32": noise_on_a_grid_in_float32,
}


def rightly(test: Test, mechanism: Mechanism, known: Known, count: int) -> int:
    draw = np.random.default_rng(3)
    truth = draw.integers(2, size=count).tolist()
    return sum(guess(test, mechanism(known.sums[n], known.std, draw), known.sums, known.std, draw) == n for n in truth)


@pytest.mark.parametrize("name", TESTS)
def test_the_attacker_has_teeth(name: str, known: Known) -> None:
    """The same attackers on mechanisms with the fault they look for, and on one that has none."""
    assert rightly(TESTS[name], NAIVE[name], known, 20) == 20
    assert rightly(TESTS[name], all_on_a_grid, known, 100) <= most_right(100, known.allowed)
