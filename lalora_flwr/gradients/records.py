"""How many records a forward pass holds, and each record's own view of the trainable parameters."""

from __future__ import annotations

from torch import Tensor


class RecordPass:
    """The state of one forward pass, shared by all layers of a model; ``records`` is 0 outside of one."""

    def __init__(self) -> None:
        self.records = 0
        self.views: dict[int, Tensor] = {}

    def view(self, parameter: Tensor) -> Tensor:
        """(records, *shape), one view a pass even if the layer runs twice: its gradients then add up, as they must."""
        key = id(parameter)
        if key not in self.views:
            self.views[key] = parameter.detach().expand(self.records, *parameter.shape).requires_grad_()
        return self.views[key]

    def check(self, x: Tensor) -> None:
        """Refuse an input whose first axis cannot hold the records one after the other."""
        if x.shape[0] % self.records:
            raise RuntimeError(f"a layer got {x.shape[0]} rows for {self.records} records: its record axis cannot be determined")
