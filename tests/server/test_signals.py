"""What a round's updates say of themselves, against products formed in full and one pair of sites at a time."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lalora_flwr.adapter.slots import HEAD, LORA_A, LORA_B, Layout, Slot
from lalora_flwr.methods.filters import NONE, Around, Filter
from lalora_flwr.methods.method import method_of
from lalora_flwr.methods.smoothing import GAUSS5
from lalora_flwr.methods.updates import Update, Updates, together
from lalora_flwr.server.signals import Round, kept_by, noise_energy, signals_of, trained_times
from lalora_flwr.settings import Settings, settings_from

LAYERS = {"one": (3, 7, 5), "two": (2, 4, 9)}  # rank, inputs, outputs
LAYOUT = Layout(
    [
        *(Slot(f"{name}.A", name, LORA_A, (r, n), 1) for name, (r, n, _) in LAYERS.items()),
        *(Slot(f"{name}.B", name, LORA_B, (m, r), 0) for name, (r, _, m) in LAYERS.items()),
        Slot("head", "head", HEAD, (4, 6)),
    ]
)
SITES = 3
Values = dict[str, NDArray[np.float32]]


def drawn(seed: int, scale: float = 1.0) -> Values:
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.standard_normal(slot.shape)).astype(np.float32) for name, slot in LAYOUT.items()}


def moved(start: Values, names: set[str] | frozenset[str], seed: int = 5) -> list[Update]:
    steps = [drawn(seed + site, 0.3) for site in range(SITES)]
    return [Update(i, {n: start[n] + step[n] * (n in names) for n in LAYOUT}) for i, step in enumerate(steps)]


def settings(**keys: Any) -> Settings:
    given = {"strategy": "dp-lora", "train.lr": 0.5, "num-supernodes": SITES, **keys}
    return settings_from(given)


def at(run: Settings, noise: float = 0.1, server_round: int = 1) -> Round:
    return Round(run, method_of(run), LAYOUT, server_round, {}, noise, SITES)


def flat(tensors: Mapping[str, Any], part: str) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(tensors[n], dtype=np.float64).ravel() for n, s in LAYOUT.items() if s.part == part])


def test_signals_are_those_of_products_formed_in_full() -> None:
    start = drawn(1)
    updates = moved(start, LAYOUT.names)
    found = signals_of(at(settings()), start, together(updates))
    steps = [{n: u.tensors[n].astype(float) - start[n] for n in LAYOUT} for u in updates]
    for part, cosine in ((LORA_A, found.cosine_A), (LORA_B, found.cosine_B)):
        pairs = [flat(a, part) @ flat(b, part) for a, b in itertools.combinations(steps, 2)]
        assert cosine == pytest.approx(np.mean(pairs) / np.mean([flat(s, part) @ flat(s, part) for s in steps]))
    mean = {n: np.mean([s[n] for s in steps], axis=0) for n in LAYOUT}
    by_A, by_B, cross, off, product = [], [], [], [], []
    for layer in LAYERS:
        A, B, a, b = start[f"{layer}.A"].astype(float), start[f"{layer}.B"].astype(float), mean[f"{layer}.A"], mean[f"{layer}.B"]
        by_A.append((B @ a).ravel())
        by_B.append((b @ A).ravel())
        cross.append((b @ a).ravel())
        products = [u.tensors[f"{layer}.B"].astype(float) @ u.tensors[f"{layer}.A"] for u in updates]
        product.append(((B + b) @ (A + a)).ravel())
        off.append(np.mean(products, axis=0).ravel() - product[-1])
    x, y, z, o, p = (np.concatenate(parts) for parts in (by_A, by_B, cross, off, product))
    norm = np.linalg.norm
    assert found.coupling == pytest.approx(x @ y / norm(x) / norm(y))
    assert found.cross_term == pytest.approx(norm(z) / norm(x + y))
    assert found.aggregation_bias == pytest.approx(norm(o) / norm(p))


@pytest.mark.parametrize("filter", ["none", "gauss5"])
def test_the_noise_of_an_update_is_what_it_is_expected_to_be(filter: str) -> None:
    """Updates of pure noise, step by step through the filter: their signal is zero within what chance allows."""
    run = settings(**{"strategy": "la-lora", "filter.name": filter, "train.local-steps": 3})
    now, generator = at(run, noise=0.2), torch.Generator().manual_seed(3)
    expected = noise_energy(now, trained_times(now))
    energy = dict.fromkeys(LAYOUT, 0.0)
    draws = 500
    for _, step in itertools.product(range(draws), range(3)):
        for name in now.method.schedule.mask(LAYOUT, 1, step, {}):
            noise = 0.2 * torch.randn(LAYOUT[name].shape, generator=generator)
            energy[name] += float((0.5 * now.method.filter(LAYOUT[name], noise, {}, Around())).square().sum()) / draws
    assert energy == pytest.approx(expected, rel=0.1)


def test_signal_to_noise_takes_the_noise_away_once() -> None:
    run, start = settings(), drawn(1)
    now, updates = at(run), moved(start, LAYOUT.names)
    found, energies = signals_of(now, start, together(updates)), noise_energy(now, trained_times(now))
    mean = {n: np.mean([u.tensors[n].astype(float) for u in updates], axis=0) - start[n] for n in LAYOUT}
    of_A = sum(energies[n] for n in LAYOUT.of(LORA_A))
    assert found.snr_A == pytest.approx((np.square(flat(mean, LORA_A)).sum() - of_A) / of_A)
    everything = sum(energies.values())
    assert found.snr == pytest.approx((sum(np.square(v).sum() for v in mean.values()) - everything) / everything)
    assert everything == pytest.approx(
        (0.5 * 0.1) ** 2 * run.train.local_steps * sum(math.prod(s.shape) for s in LAYOUT.values())
    )


def test_a_factor_that_rests_has_no_cosine_and_makes_no_bias() -> None:
    run, start = settings(strategy="rolora"), drawn(1)
    names = LAYOUT.of(LORA_B, HEAD)
    found = signals_of(at(run), start, together(moved(start, names)))
    assert found.cosine_A is None and found.cosine_B is not None and found.coupling is None and found.cross_term is None
    assert found.aggregation_bias == 0 and found.snr_A is None


def test_of_a_sum_only_what_the_sum_says() -> None:
    start = drawn(1)
    updates = moved(start, LAYOUT.names)
    known, hidden = together(updates), Updates(dict(together(updates).total), SITES)
    each, total = signals_of(at(settings()), start, known), signals_of(at(settings()), start, hidden)
    assert total.cosine_A is total.cosine_B is total.aggregation_bias is None
    assert (total.snr, total.coupling, total.cross_term) == pytest.approx((each.snr, each.coupling, each.cross_term))


def test_where_the_server_steps_updates_are_gradients() -> None:
    run = settings(**{"train.local-steps": 1, "train.step-at": "server"})
    gradients = [Update(i, drawn(i)) for i in range(SITES)]
    found = signals_of(at(run), drawn(9), together(gradients))
    mean = {n: np.mean([u.tensors[n].astype(float) for u in gradients], axis=0) for n in LAYOUT}
    noise = 0.1**2 * sum(math.prod(s.shape) for s in LAYOUT.values())
    assert found.snr == pytest.approx((sum(np.square(v).sum() for v in mean.values()) - noise) / noise)
    assert found.cross_term is found.aggregation_bias is None and found.coupling is not None


@pytest.mark.parametrize(
    "keys", [{"train.optimizer": "adamw"}, {"train.momentum": 0.5}, {"train.weight-decay": 0.1}, {"privacy.epsilon": math.inf}]
)
def test_noise_that_is_not_known_is_left_out(keys: dict[str, Any]) -> None:
    start = drawn(1)
    found = signals_of(at(settings(**keys)), start, together(moved(start, LAYOUT.names)))
    assert found.snr is found.snr_A is None and found.cosine_A is not None


def test_sites_that_differ_have_none() -> None:
    start = drawn(1)
    updates = moved(start, LAYOUT.names)
    smaller = Update(2, {**updates[2].tensors, "one.A": updates[2].tensors["one.A"][:2]})
    assert signals_of(at(settings()), start, together([*updates[:2], smaller])).cosine_A is None


class Squares(Filter):
    def __call__(self, slot: Slot, gradient: Any, state: Any, around: Around) -> Any:
        return gradient * gradient.abs()


def test_what_a_filter_keeps_is_measured() -> None:
    wide = Slot("a", "a", LORA_A, (16, 512), 1)
    assert kept_by(NONE, wide) == 1.0 and kept_by(Squares(), wide) is None
    assert kept_by(GAUSS5, wide) == pytest.approx(70 / 256, rel=0.03)
    narrow = Slot("b", "b", LORA_A, (8, 4), 1)  # where the mirrored edge keeps more
    matrix = np.array([GAUSS5(narrow, torch.eye(4)[i].repeat(8, 1), {}, Around())[0].numpy() for i in range(4)])
    assert kept_by(GAUSS5, narrow) == pytest.approx(float(np.square(matrix).sum()) / 4, rel=0.03)


def test_a_site_that_fails_leaves_the_others_rates_as_they_are() -> None:
    """Rates by rule follow from the noise of all sites of a round: with fewer the mean has more noise, and no other rate."""
    run = settings(**{"train.lr": 0.0})
    all_sites, two = at(run, 0.1), dataclasses.replace(at(run, 0.1 * math.sqrt(SITES / 2)), sites=2)
    energies = [noise_energy(now, trained_times(now)) for now in (all_sites, two)]
    assert energies[0] and energies[1] == pytest.approx({name: e * SITES / 2 for name, e in energies[0].items()})
