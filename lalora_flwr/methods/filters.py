"""Maps applied to a gradient after the noise. Post-processing: free under differential privacy."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lalora_flwr.adapter.lora import factor_of

BINOMIAL = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16  # 5-tap approximation of a Gaussian, arXiv 2602.19926


def _smooth_rows(x: Tensor) -> Tensor:
    """Convolve each row of x (rows, features) with the binomial; symmetric padding repeats the edge: … b a | a b c …"""
    indices = torch.arange(-2, x.shape[1] + 2, device=x.device)
    period = 2 * x.shape[1]
    mirrored = indices % period  # also right for fewer than two features
    padded = x[:, torch.where(mirrored < x.shape[1], mirrored, period - 1 - mirrored)]
    return F.conv1d(padded.unsqueeze(1), BINOMIAL.to(x).view(1, 1, 5)).squeeze(1)


def gauss5(name: str, gradient: Tensor) -> Tensor:
    """LA-LoRA's low-pass filter (arXiv 2602.19926): replaces the noised gradient by its smoothed copy.

    Along the input features for A (r, n), along the output features for B (m, r); rank components never mix. A trained
    head has no filter in the paper and keeps its gradient. White noise keeps 27 % of its variance; so does a signal
    without correlation between neighbouring features.

    Args:
        name: the parameter's name, which tells A, B and head apart.
        gradient: the noised gradient, of the parameter's shape.
    """
    return _along_features(_smooth_rows, name, gradient)


def gauss5_permuted(name: str, gradient: Tensor) -> Tensor:
    """`gauss5` along the features in a fixed random order: the control that tells what their own order contributes.

    It treats white noise exactly as `gauss5` does. What `gauss5` gains over it, it gains from neighbouring features that
    are alike; what both gain over no filter is a smaller step.

    Args:
        name, gradient: as for `gauss5`.
    """
    return _along_features(_smooth_shuffled_rows, name, gradient)


def _smooth_shuffled_rows(x: Tensor) -> Tensor:
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(x.shape[1])).to(x.device)
    smoothed = torch.empty_like(x)
    smoothed[:, order] = _smooth_rows(x[:, order])
    return smoothed


def _along_features(rows: Callable[[Tensor], Tensor], name: str, gradient: Tensor) -> Tensor:
    match factor_of(name):
        case "A":
            return rows(gradient)
        case "B":
            return rows(gradient.T).T.contiguous()
        case _:
            return gradient


FILTERS: dict[str, Callable[[str, Tensor], Tensor]] = {
    "none": lambda _, gradient: gradient,
    "gauss5": gauss5,
    "gauss5-permuted": gauss5_permuted,
}
