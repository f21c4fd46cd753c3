"""What the forward pass keeps for the backward pass: nothing below the first adapter, nothing that only a frozen factor needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lalora_flwr.settings import LoraSettings
from tests.adapters import attach_adapter, engine_for, set_active
from tests.reference import vit_base

RECORDS = 4
FEATURES, TOKENS, RANK = 8, 5, 2  # of the reference transformer: 4 patches and the class token


def kept(targets: str, factors: str) -> dict[int, Tensor]:
    """Tensors kept for the backward pass by storage, parameters aside."""
    base = vit_base()
    model = attach_adapter(base, LoraSettings(rank=RANK, targets=targets), seed=0)
    engine = engine_for(model)
    set_active(model, frozenset(factors))
    inputs, labels = base.synthetic_batch(RECORDS, torch.Generator().manual_seed(0))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            found.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        engine(RECORDS, lambda: base.losses(model, inputs, labels))
    return found


def size(tensors: dict[int, Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors.values())


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
def test_blocks_below_the_first_adapter_keep_nothing(factors: str) -> None:
    last, both = kept("blocks.1.attn.proj", factors), kept("blocks.0.attn.qkv,blocks.1.attn.proj", factors)
    assert len(last) < len(both) / 2 and size(last) < size(both) / 2


def test_a_layers_input_is_kept_only_if_a_trains() -> None:
    inputs = RECORDS * TOKENS * FEATURES * 4  # bytes of the one adapted layer's input; no other layer keeps it
    with_a, without = kept("blocks.1.attn.proj", "AB"), kept("blocks.1.attn.proj", "B")
    assert size(with_a) - size(without) == inputs


def test_the_rank_r_activation_is_kept_only_if_b_trains() -> None:
    activation = RECORDS * TOKENS * RANK * 4
    with_b, without = kept("blocks.1.attn.proj", "AB"), kept("blocks.1.attn.proj", "A")
    assert size(with_b) - size(without) == activation
