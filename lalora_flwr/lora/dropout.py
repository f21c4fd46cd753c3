"""Dropout of a model, found by its rates."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def remove_dropout(model: nn.Module) -> Callable[[], None]:
    """Set every rate of dropout and drop-path in the model to zero.

    Returns:
        A function that puts the rates back.
    """
    rates = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(module, _DropoutNd)))
    ]
    for module, name, _ in rates:
        setattr(module, name, 0.0)

    def put_back() -> None:
        for module, name, value in rates:
            setattr(module, name, value)

    return put_back
