"""Maps applied to a gradient after the noise. Post-processing: free under differential privacy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lalora_flwr.adapter.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor

TAPS = (1.0, 4.0, 6.0, 4.0, 1.0)  # over 16: 5-tap approximation of a Gaussian, arXiv 2602.19926

State = dict[str, "Tensor"]


class Filter:
    """What happens to the noised gradient of one slot before the optimizer's step.

    Guarantee: post-processing. A filter gets released gradients and its own memory of them, nothing else of a site.

    Attributes:
        name: as ``filter.name`` and summaries write it.
        remembers: whether it keeps state; sites then carry it from round to round.
        keeps: share of the variance of white noise that is left, as far as it is known.
    """

    name: str = ""
    remembers: bool = False
    keeps: float = 1.0

    def __call__(self, slot: Slot, gradient: Tensor, state: State) -> Tensor:
        """The gradient to step along.

        Args:
            slot: what the gradient is of.
            gradient: float32, of the slot's shape; must not be changed.
            state: the site's memory for this slot, empty at first. What the filter puts there (tensors by name) it finds
                there at the slot's next step, also in a later round or after the run was resumed. A real site that was
                started again begins with an empty one.
        """
        raise NotImplementedError


class Nothing(Filter):
    """The gradient as it is."""

    name = "none"

    def __call__(self, slot: Slot, gradient: Tensor, state: State) -> Tensor:
        return gradient


class Gauss5(Filter):
    """LA-LoRA's low-pass filter (arXiv 2602.19926): replaces the noised gradient by its smoothed copy.

    Along the feature axis: the input features for A (r, n), the output features for B (m, r); rank components never mix. A
    trained head has no filter in the paper and keeps its gradient. White noise keeps 27 % of its variance; so does a signal
    without correlation between neighbouring features.
    """

    name = "gauss5"
    keeps = sum(tap**2 for tap in TAPS) / sum(TAPS) ** 2

    def __call__(self, slot: Slot, gradient: Tensor, state: State) -> Tensor:
        if slot.feature_axis is None:
            return gradient
        rows = gradient.movedim(slot.feature_axis, -1)  # (…, features)
        smoothed = self._rows(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)
        return smoothed.movedim(-1, slot.feature_axis).contiguous()

    def _rows(self, x: Tensor) -> Tensor:
        return smooth_rows(x)


class Gauss5Permuted(Gauss5):
    """`Gauss5` along the features in a fixed random order: the control that tells what their own order contributes.

    It treats white noise exactly as `Gauss5` does. What `Gauss5` gains over it, it gains from neighbouring features that
    are alike; what both gain over no filter is a smaller step.
    """

    name = "gauss5-permuted"

    def _rows(self, x: Tensor) -> Tensor:
        import torch

        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(x.shape[1])).to(x.device)
        smoothed = torch.empty_like(x)
        smoothed[:, order] = smooth_rows(x[:, order])
        return smoothed


def smooth_rows(x: Tensor) -> Tensor:
    """Convolve each row of x (rows, features) with the binomial; symmetric padding repeats the edge: … b a | a b c …"""
    import torch  # here and above only: the names of filters are checked before torch is needed
    import torch.nn.functional as F

    indices = torch.arange(-2, x.shape[1] + 2, device=x.device)
    period = 2 * x.shape[1]
    mirrored = indices % period  # also right for fewer than two features
    padded = x[:, torch.where(mirrored < x.shape[1], mirrored, period - 1 - mirrored)]
    return F.conv1d(padded.unsqueeze(1), (torch.tensor(TAPS) / 16).to(x).view(1, 1, 5)).squeeze(1)


NONE = Nothing()
GAUSS5 = Gauss5()
GAUSS5_PERMUTED = Gauss5Permuted()
