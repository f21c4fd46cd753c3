"""Dropout of a model and its like, found by their rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def remove_dropout(model: nn.Module) -> Callable[[], None]:
    """Set every rate of dropout, drop-path and jitter (of the router of a mixture of experts) in the model to zero.

    Returns:
        A function that puts the rates back.
    """
    holders: list[Any] = list(model.modules())
    configurations = {id(c): c for module in holders if (c := vars(module).get("config")) is not None}
    rates = [
        (holder, name, value)
        for holder in (*holders, *configurations.values())  # Falcon asks its configuration at every pass
        for name, value in vars(holder).items()
        if isinstance(value, float) and ("drop" in name or "jitter" in name or (name == "p" and isinstance(holder, _DropoutNd)))
    ]
    for holder, name, _ in rates:
        setattr(holder, name, 0.0)

    def put_back() -> None:
        for holder, name, value in rates:
            setattr(holder, name, value)

    return put_back
