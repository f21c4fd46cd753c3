"""Maps applied to a gradient after the noise. Post-processing: free under differential privacy. One of them also says where it
is taken.

Values of the run-config key ``filter.name``:

    none                 the gradient as it is
    gauss5  gauss:W      low-pass filter along the features, of W taps (`smoothing`); …-permuted: its control
    gauss-adaptive       the same of a width that follows the noise (`adaptive`)
    wiener               each rank component shrunk by how much more of it is noise than of the best (`wiener`)
    precondition         the step of LA-LoRA's Theorem 2 (`precondition`)
    slow-a  slow-a:S     S times the gradient of lora_A, which so has a learning rate of its own (`slower`)
    doppler  doppler:β   low-pass filter over the steps; disk, disk:κ: an average over them (`over_time`)
    kalman  kalman:κ     that average, of gradients at the adapter and a little ahead of it (`kalman`)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from lalora_flwr.adapter.slots import Layout, Slot, factors_of
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings.choices import FILTERS

if TYPE_CHECKING:  # the names of filters are checked before torch is needed
    from torch import Tensor

    from lalora_flwr.methods.method import Method
    from lalora_flwr.settings import Settings

State = dict[str, "Tensor"]


@dataclass(frozen=True)
class Around:
    """What is public about the step that a gradient is of.

    Attributes:
        noise: standard deviation of the noise on each entry of the gradient, independent of all others; 0 without privacy.
        other: the layer's other factor as the step finds it, float32; None if the slot is no factor. Must not be changed.
    """

    noise: float = 0.0
    other: Tensor | None = None


class Filter:
    """What happens to the noised gradient of one slot before the optimizer's step.

    Guarantee: post-processing. A filter gets released gradients, its own memory of them, what they made of
    the layer's other factor, and public constants, nothing else of a site.

    Attributes:
        name: with its argument, as ``filter.name`` and summaries write it.
        remembers: whether it keeps state; sites then carry it from round to round.
        keeps: share that is left of the variance of a walk whose steps are white noise, as far as it is known: of any one entry,
            over many more steps than the filter remembers. 1 where it depends on the gradients; the learning rate by rule is
            then no longer than without the filter. 0 where it may be above 1: a run then has to name its rate.
        stretch: how many times as long as the longest gradient so far a filtered one can be, over all slots of a part together;
            inf: not known, and the server then has no bound on what a site sends.
        only_scales: whether all that it does to a gradient is to multiply it by a constant.
        ahead_share: weight of a record's gradient at the point that `ahead` names; that at the adapter has the rest of 1. 0:
            gradients are taken at the adapter alone, in one pass in place of two.
    """

    name: str = ""
    remembers: bool = False
    keeps: float = 1.0
    stretch: float = math.inf
    only_scales: bool = False

    @property
    def ahead_share(self) -> float:
        return 0.0

    def fits(self, layout: Layout) -> None:
        """Check that there is something for it to do.

        Raises:
            ConfigError: if there is not.
        """

    def check(self, method: Method, layout: Layout, settings: Settings) -> None:
        """Refuse a run in which it cannot do what it is for.

        Raises:
            ConfigError: naming the key, the value and what is allowed.
        """

    def ahead(self, value: Tensor, state: State) -> Tensor | None:
        """Where else the step's gradients of the slot are taken, before they are clipped; None: at the adapter alone.

        Called once a step, only where ``ahead_share`` is not 0. The point must be a function of releases, as ``value`` is.

        Args:
            value: of the slot, as the step finds it; must not be changed.
            state: the memory for this slot, as in a call of the filter.
        """
        return None

    def parse(self, argument: str) -> Filter:
        """The filter of this kind with an argument, the text behind the colon.

        Raises:
            ValueError: the argument is not one of its own; with what the key "must be".
        """
        if argument:
            raise ValueError(f"{self.name}, with nothing behind a colon")
        return self

    def kept(self, slot: Slot) -> float:
        """`keeps` of one slot; more of one that the filter leaves alone."""
        return self.keeps

    def scale(self, slot: Slot) -> float:
        """What the filter does to every part of a slot's gradient alike: the length of its steps in units of those without it."""
        return 1.0

    def __call__(self, slot: Slot, gradient: Tensor, state: State, around: Around) -> Tensor:
        """The gradient to step along.

        Args:
            slot: what the gradient is of.
            gradient: float32, of the slot's shape; must not be changed.
            state: the site's memory for this slot, empty at first. What the filter puts there (tensors by name) it finds
                there at the slot's next step, also in a later round or after the run was resumed. A real site that was
                started again begins with an empty one. A site may hold the slot in another shape by then.
            around: of the step.

        Returns:
            Of the gradient's shape. Not zero where the gradient is not: a slot that trains is expected to move.
        """
        raise NotImplementedError


class Nothing(Filter):
    """The gradient as it is."""

    name, stretch = "none", 1.0

    def __call__(self, slot: Slot, gradient: Tensor, state: State, around: Around) -> Tensor:
        return gradient


class Share(Filter):
    """A filter with one number between 0 and 1, which has a usual value."""

    def __init__(self, kind: str, usual: float, text: str = "") -> None:
        """
        Args:
            kind: its name without the number.
            usual: the number where none is named.
            text: the number as it is written.
        """
        self.name, self._kind, self._usual = f"{kind}:{text}" if text else kind, kind, usual
        self.share = float(text) if text else usual

    def parse(self, argument: str) -> Self:
        if argument and not (re.fullmatch(r"0\.\d{1,6}", argument) and float(argument)):
            raise ValueError(f"{self._kind}, or with a number between 0 and 1, both excluded, as {self._kind}:{self._usual}")
        return type(self)(self._kind, self._usual, argument)


def others_of(layout: Layout) -> dict[str, str]:
    """The other factor of each factor, by name."""
    return {one: other for pair in factors_of(layout) for one, other in (pair, pair[::-1])}


def remembered(state: State, name: str, like: Tensor) -> Tensor:
    """What a filter put there, where ``like`` is; zeros at first, and where the slot has another shape than then."""
    kept = state.get(name)
    return like.new_zeros(like.shape) if kept is None or kept.shape != like.shape else kept.to(like)


def filter_of(text: str) -> Filter:
    """The filter that a value of ``filter.name`` names.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    name, _, argument = text.partition(":")
    wanted = f"one of {FILTERS.suggest(name, 'auto')}"
    if name in FILTERS:
        try:
            found = FILTERS.get(name, Filter).parse(argument)
            if found.name == text:
                return found
        except ValueError as problem:
            wanted = str(problem)
    raise ConfigError(f"filter.name = {text!r}: must be {wanted}")


NONE = Nothing()
