"""A site with one record more than it has: a canary, for audits. The site's host gets other records; nothing is patched."""

from __future__ import annotations

import torch
from torch import Tensor

from lalora_flwr.data.inputs import Inputs
from lalora_flwr.data.records import RecordSet
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import Settings
from lalora_flwr.site.app import make_client_app
from lalora_flwr.site.host import Host
from lalora_flwr.site.records import NodeConfig, RecordStore


class WithCanary:
    """The records of a set and one more: bright everywhere, of class 3."""

    def __init__(self, records: RecordSet) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records) + 1

    def batch(self, indices: Tensor) -> tuple[Inputs, Tensor]:
        inputs, labels = self._records.batch(indices[indices < len(self._records)])
        assert isinstance(inputs, Tensor)
        canaries = int((indices == len(self._records)).sum())
        bright = torch.full((canaries, *inputs.shape[1:]), 5.0)
        return torch.cat([inputs, bright]), torch.cat([labels, torch.full((canaries,), 3)])

    def parts(self, indices: Tensor, most: int) -> list[Tensor]:
        return list(indices.split(most or max(1, len(indices))))


class CanaryStore:
    """Records of site 0 hold the canary."""

    def __init__(self) -> None:
        self._store = RecordStore()

    def __call__(self, settings: Settings, node_config: NodeConfig, base: BaseModel) -> RecordSet:
        records = self._store(settings, node_config, base)
        return WithCanary(records) if node_config.get("partition-id") == 0 else records


app = make_client_app(lambda: Host(simulated=True, records=CanaryStore()))
