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
        by_record: whether products with them are batched over the records, and so rounded otherwise than those of a site alone:
            a GPU then starts one kernel in place of one a site.
    """

    counts: Sequence[int]
    values: Mapping[int, Tensor]
    by_record: bool = False


@dataclass(frozen=True)
class Spans:
    """Each site's rows, by the same products as if they were alone.

    Attributes:
        ends: a site's first row and the one after its last.
    """

    ends: Sequence[tuple[int, int]]

    def times(self, rows: Tensor, factors: Tensor) -> Tensor:
        """Each site's rows times its own factor: (rows, a), (sites, a, b) -> (rows, b)."""
        if len(self.ends) == 1:
            return rows @ factors[0]
        return torch.cat([rows[first:last] @ factor for (first, last), factor in zip(self.ends, factors, strict=True)])

    def add(self, y: Tensor, rows: Tensor, factors: Tensor, scaling: float) -> Tensor:
        """Add to y (rows, b), in place, each site's rows times its own factor times ``scaling``; returns y."""
        if len(self.ends) == 1:
            return y.addmm_(rows, factors[0], alpha=scaling)
        for (first, last), factor in zip(self.ends, factors, strict=True):
            y[first:last].addmm_(rows[first:last], factor, alpha=scaling)
        return y


@dataclass(frozen=True)
class EachRecord:
    """The same in one product over all records.

    Attributes:
        owner: int64 (records,), each record's site.
    """

    owner: Tensor

    def times(self, rows: Tensor, factors: Tensor) -> Tensor:
        """As `Spans.times`."""
        return torch.bmm(rows.view(len(self.owner), -1, rows.shape[1]), factors[self.owner]).flatten(0, 1)

    def add(self, y: Tensor, rows: Tensor, factors: Tensor, scaling: float) -> Tensor:
        """As `Spans.add`."""
        records = len(self.owner)
        y.view(records, -1, y.shape[1]).baddbmm_(rows.view(records, -1, rows.shape[1]), factors[self.owner], alpha=scaling)
        return y


Whose = Spans | EachRecord


class RecordPass:
    """The state of one forward pass, shared by all layers of a model; ``records`` is 0 outside of one."""

    def __init__(self) -> None:
        self.records = 0
        self.views: dict[int, Tensor] = {}
        self._values: Mapping[int, Tensor] = {}
        self._counts: Sequence[int] = ()
        self._owner: Tensor | None = None
        self._by_record = False

    def begin(self, records: int, owners: Owners | None = None) -> None:
        """Start a pass over ``records``, all of which meet the model's own parameters unless there are ``owners``."""
        self.records, self.views = records, {}
        self._values = owners.values if owners else {}
        self._counts = owners.counts if owners else (records,)
        self._by_record = owners is not None and owners.by_record
        self._owner = _owner(owners) if owners else None

    def end(self) -> None:
        """Hold nothing."""
        self.records, self.views = 0, {}
        self._values, self._counts, self._owner, self._by_record = {}, (), None, False

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
                own = self._values[key][self._owner]
            self.views[key] = own.requires_grad_() if parameter.requires_grad else own
        return self.views[key]

    def leaf(self, parameter: Tensor) -> Tensor:
        """(records, *shape), to take the gradients of a layer that has the values from `values`; its own are not to be read."""
        key = id(parameter)
        if key not in self.views:
            self.views[key] = self.values(parameter)[:1].expand(self.records, *self.shape(parameter)).requires_grad_()
        return self.views[key]

    def values(self, parameter: Tensor) -> Tensor:
        """(sites, *shape): one for each site of `whose`."""
        own = self._values.get(id(parameter))
        return parameter.detach().expand(len(self._counts), *parameter.shape) if own is None else own

    def shape(self, parameter: Tensor) -> torch.Size:
        """Of each record's own."""
        return self.values(parameter).shape[1:]

    def whose(self, rows: int) -> Whose:
        """Which rows are which site's, where all records have together so many ``rows``."""
        if self._by_record and self._owner is not None:
            return EachRecord(self._owner)
        per_record, ends = rows // self.records, [0]
        for count in self._counts:
            ends.append(ends[-1] + count * per_record)
        return Spans(list(itertools.pairwise(ends)))

    def check(self, x: Tensor) -> None:
        """Refuse an input whose first axis cannot hold the records one after the other."""
        if x.shape[0] % self.records:
            raise RuntimeError(f"a layer got {x.shape[0]} rows for {self.records} records: its record axis cannot be determined")


def _owner(owners: Owners) -> Tensor:
    """Each record's site, int64 (records,), where the sites' values are."""
    sites = torch.arange(len(owners.counts)).repeat_interleave(torch.tensor(owners.counts))
    return sites.to(next(iter(owners.values.values())).device) if owners.values else sites
