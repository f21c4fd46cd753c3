"""How many records a forward pass holds, whose values each of them meets, and its own view of the trainable parameters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Owners:
    """Whose the records of a pass are, if they are several sites'.

    Attributes:
        counts: records of each site; a site's lie one after the other.
        values: the sites' own tensors in place of the model's, (sites, *shape), by the ``id`` of the model's parameter.
    """

    counts: Sequence[int]
    values: Mapping[int, Tensor]


class RecordPass:
    """The state of one forward pass, shared by all layers of a model; ``records`` is 0 outside of one."""

    def __init__(self) -> None:
        self.records = 0
        self.views: dict[int, Tensor] = {}
        self._values: Mapping[int, Tensor] = {}
        self._counts: Sequence[int] = ()
        self._owner: Tensor | None = None

    def begin(self, records: int, owners: Owners | None = None) -> None:
        """Start a pass over ``records``, all of which meet the model's own parameters unless there are ``owners``."""
        self.records, self.views = records, {}
        self._values = owners.values if owners else {}
        self._counts = owners.counts if owners else (records,)
        self._owner = torch.arange(len(self._counts)).repeat_interleave(torch.tensor(self._counts)) if owners else None

    def end(self) -> None:
        """Hold nothing."""
        self.records, self.views = 0, {}
        self._values, self._counts, self._owner = {}, (), None

    def each(self, parameter: Tensor) -> bool:
        """Whether a layer must use `view` for it: it trains, or sites have values of their own."""
        return parameter.requires_grad or id(parameter) in self._values

    def view(self, parameter: Tensor) -> Tensor:
        """(records, *shape), one view a pass even if the layer runs twice: its gradients then add up, as they must."""
        key = id(parameter)
        if key not in self.views:
            if self._owner is None or key not in self._values:
                own = parameter.detach().expand(self.records, *parameter.shape)
            else:
                own = self._values[key][self._owner.to(parameter.device)]
            self.views[key] = own.requires_grad_() if parameter.requires_grad else own
        return self.views[key]

    def leaf(self, parameter: Tensor) -> Tensor:
        """(records, *shape), to take the gradients of a layer that has the values from `values`; its own are not to be read."""
        key = id(parameter)
        if key not in self.views:
            self.views[key] = self.values(parameter)[:1].expand(self.records, *self.shape(parameter)).requires_grad_()
        return self.views[key]

    def values(self, parameter: Tensor) -> Tensor:
        """(sites, *shape): one for each of `spans`."""
        own = self._values.get(id(parameter))
        return parameter.detach().expand(len(self._counts), *parameter.shape) if own is None else own

    def shape(self, parameter: Tensor) -> torch.Size:
        """Of each record's own."""
        return self.values(parameter).shape[1:]

    def spans(self, rows: int) -> list[tuple[int, int]]:
        """First and last row, excluded, of each site, where all records have together so many ``rows``."""
        per_record, ends = rows // self.records, [0]
        for count in self._counts:
            ends.append(ends[-1] + count * per_record)
        return list(itertools.pairwise(ends))

    def check(self, x: Tensor) -> None:
        """Refuse an input whose first axis cannot hold the records one after the other."""
        if x.shape[0] % self.records:
            raise RuntimeError(f"a layer got {x.shape[0]} rows for {self.records} records: its record axis cannot be determined")
