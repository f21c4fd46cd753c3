"""Gradients of zero, tiny ones and low precision hide no mixing from the check before training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.gradients.precision import full_precision
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from tests.adapters import check as check_model
from tests.gradients.mixing import Mixing, check, keep, mixing, neighbour_in_batch
from tests.reference import BASES, CLASSES, adapted


class Zero(Mixing):
    """Its blocks add nothing, as with norms that start at zero."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.mean(1) @ torch.ones(4, 5)) + 0 * self.second(torch.tanh(self.first(x))).mean(1))


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_gradients_that_are_all_zero_are_no_agreement(head: str) -> None:
    base = BaseModel("test/zero", Zero(keep, 6), "head", ("first", "second"), (6, 4), CLASSES)
    with pytest.raises(ConfigError, match="zero for every made-up record") as refusal:
        check(base, head=head)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("scale", [1e-12, 1e-20])
def test_tiny_gradients_that_mix_are_refused(scale: float) -> None:
    class Tiny(Mixing):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * scale

    base = BaseModel("test/tiny", Tiny(neighbour_in_batch, 6), "head", ("first", "second"), (6, 4), CLASSES)
    with pytest.raises(ConfigError, match="mixes records"):
        check(base)
    check(BaseModel("test/tiny", Tiny(keep, 6), "head", ("first", "second"), (6, 4), CLASSES))


def test_the_runs_alpha_does_not_decide_what_the_check_sees() -> None:
    """An alpha of 1024 would drive attention into its limits, where gradients vanish; the adapter's share stays the same."""
    shares = []

    class Seeing(PerSampleGradients):
        def __call__(self, records: int, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
            first = next(p for name, p in model.named_parameters() if ".lora_B." in name)
            shares.append(first.detach() * model.peft_config["default"].lora_alpha / 2)
            return super().__call__(records, losses)

    for alpha in (0.1, 3.0, 1024.0):
        base = BASES["vit"]()
        model = adapted(base, alpha=alpha, rank=2)
        check_model(base, model, Seeing)
    assert shares[0].any() and all(torch.allclose(share, shares[0], rtol=1e-5) for share in shares)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_base_has_every_bit_again_afterwards(dtype: torch.dtype) -> None:
    base = BASES["swin"]()
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    everything = nn.Parameter(bits[bits.isfinite()].clone(), requires_grad=False)
    base.module.to(dtype).register_parameter("everything", everything)
    base.module.register_buffer("buffer", everything.detach().clone())
    model = adapted(base)
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    with full_precision(model):
        assert all(p.dtype == torch.float32 for p in (*model.parameters(), *model.buffers()) if p.is_floating_point())
    after = model.state_dict()
    for name, t in before.items():
        assert after[name].dtype == t.dtype
        assert torch.equal(after[name].view(torch.uint8), t.view(torch.uint8)) if t.dim() else torch.equal(after[name], t), name


def test_a_slight_mixing_in_low_precision_is_refused() -> None:
    """Smaller than the rounding of bfloat16, in which the check could not see it."""
    base = mixing(lambda _, x: x + 0.003 * x.roll(1, dims=0))
    base.module.bfloat16()
    with pytest.raises(ConfigError, match="mixes records"):
        check(base)
