"""A composed history: everything that ε and the composition of further steps need, small enough to be kept in a file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lalora_flwr.privacy.composition.lattice import NOTHING, Lattice, Totals, choose_lattice
from lalora_flwr.privacy.composition.spectrum import Spectrum, compose
from lalora_flwr.privacy.composition.step import ADD, REMOVE, Pair
from lalora_flwr.privacy.composition.tail import epsilon_at

Steps = tuple[tuple[Pair, int], ...]  # ((σ, q), count), sorted, no pair twice, every count at least 1
DIRECTIONS = (REMOVE, ADD)


@dataclass(frozen=True)
class Composition:
    """All steps of a history, composed for ε at one δ. ``lattices``, ``spectra``: a record removed, a record added."""

    steps: Steps
    delta: float
    totals: Totals
    lattices: tuple[Lattice, Lattice]
    spectra: tuple[Spectrum, Spectrum]

    def epsilon(self) -> float:
        """Guarantee: an upper bound on ε at δ, in both directions."""
        return max(epsilon_at(self.delta, self.spectra[d], self.lattices[d]) for d in DIRECTIONS)


def missing(base: Steps, steps: Steps) -> Steps | None:
    """What the base lacks to be ``steps``; None if it holds steps that they do not."""
    wanted = dict(steps)
    lacks = dict(steps)
    for pair, times in base:
        if times > wanted.get(pair, 0):
            return None
        lacks[pair] -= times
    return tuple((pair, times) for pair, times in lacks.items() if times)


def composition(steps: Steps, delta: float, bases: Iterable[Composition] = ()) -> Composition:
    """Compose the steps, going on from a base for the same δ: the first that lacks one pair at most, or the nearest."""
    best: Composition | None = None
    lacking = steps
    for base in bases:
        lacks = missing(base.steps, steps)
        if lacks is not None and len(lacks) < len(lacking):
            best, lacking = base, lacks
        if len(lacking) <= 1:
            break
    totals, held = (best.totals, {pair for pair, _ in best.steps}) if best else (NOTHING, set())
    for pair, times in lacking:
        totals = totals.plus(pair, times, pair not in held)
    lattices = (choose_lattice(totals, REMOVE, delta), choose_lattice(totals, ADD, delta))
    spectra = []
    for direction in DIRECTIONS:
        if best and best.lattices[direction] == lattices[direction]:
            spectra.append(compose(lacking, direction, lattices[direction], best.spectra[direction]))
        else:
            spectra.append(compose(steps, direction, lattices[direction]))
    return Composition(steps, delta, totals, lattices, (spectra[0], spectra[1]))
