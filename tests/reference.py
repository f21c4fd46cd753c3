"""Small models, fakes, and slow, naive versions of what the package computes fast."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from lalora_flwr.adapter.lora import LORA, LoraAdapter
from lalora_flwr.data.records import Records
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.ground.errors import BudgetExhausted
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import LoraSettings
from lalora_flwr.training.learner import Learner
from tests.adapters import adapter_parameters, factor_of

torch.set_num_threads(1)
CLASSES = 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Mlp(nn.Module):
    """Two linear layers and a head: 7 → 5 → 4 → 3. With rank 2 all factors have different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(7, 5), nn.Linear(5, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def mlp_base(seed: int = 0) -> BaseModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BaseModel("test/mlp", Mlp().eval(), "head", ("first", "second"), (7,), CLASSES)


def vit_base(seed: int = 0) -> BaseModel:
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = VisionTransformer(
            img_size=8, patch_size=4, in_chans=1, num_classes=CLASSES, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2.0
        )
    return BaseModel("test/vit", module.eval(), "head", ("attn.qkv", "attn.proj", "mlp.fc1"), (1, 8, 8), CLASSES)


def swin_base(seed: int = 0) -> BaseModel:
    """Shifted windows, folded into the first axis of the attention's linear layers."""
    from timm.models.swin_transformer import SwinTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = SwinTransformer(
            img_size=16,
            patch_size=2,
            in_chans=1,
            num_classes=CLASSES,
            embed_dim=8,
            depths=(2, 1),
            num_heads=(2, 2),
            window_size=4,
        )
    return BaseModel("test/swin", module.eval(), "head.fc", ("attn.qkv", "attn.proj"), (1, 16, 16), CLASSES)


BASES: dict[str, Callable[[], BaseModel]] = {"mlp": mlp_base, "vit": vit_base, "swin": swin_base}


def move_off_zero(model: nn.Module, seed: int = 1) -> None:
    """Give B values: at B = 0 the gradient of A is zero and says nothing."""
    draw = generator(seed)
    with torch.no_grad():
        for name, p in adapter_parameters(model).items():
            if factor_of(name) == "B":
                p.copy_(torch.randn(p.shape, generator=draw) * 0.3)


def adapter(base: BaseModel, seed: int = 0, **lora: Any) -> LoraAdapter:
    return LORA.attach(base, LoraSettings(**{"rank": 2, "alpha": 3.0, **lora}), seed)


def adapted(base: BaseModel, seed: int = 0, **lora: Any) -> PeftModel:
    return adapter(base, seed, **lora).model


def records_for(base: BaseModel, count: int, seed: int = 0) -> Records:
    draw = generator(seed)
    inputs = torch.randn(count, *base.input_shape, generator=draw)
    return Records(inputs, torch.randint(base.num_classes, (count,), generator=draw))


@dataclass
class Bench:
    """A small model, ready for `train_round`."""

    learner: Learner
    records: Records

    @property
    def base(self) -> BaseModel:
        return self.learner.base

    @property
    def model(self) -> nn.Module:
        return self.learner.adapter.model

    def state(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.learner.adapter.parameters.items()}


def bench(kind: str = "mlp", records: int = 12, **lora: Any) -> Bench:
    base = BASES[kind]()
    on_it = adapter(base, **lora)
    move_off_zero(on_it.model)
    engine = PerSampleGradients(on_it.model, on_it.parameters)
    return Bench(Learner(base, on_it, engine, on_it.state()), records_for(base, records))


def one_by_one(model: nn.Module, losses: Callable[[nn.Module, int], Tensor], records: int) -> dict[str, Tensor]:
    """Gradient of each record's loss by plain autograd, one record at a time; (records, *shape) by name.

    Args:
        model: a model that no engine ever touched.
        losses: the loss of record j, run alone through the model.
        records: how many there are.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = []
    for j in range(records):
        gradients = torch.autograd.grad(losses(model, j), list(trainable.values()), allow_unused=True)
        pairs = zip(gradients, trainable.values(), strict=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in pairs])
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(trainable)}


def assert_same_gradients(fast: Mapping[str, Tensor], slow: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    assert fast.keys() == slow.keys()
    for name, want in slow.items():
        assert fast[name].shape == want.shape
        scale = max(float(want.abs().max()), 1e-30)
        assert float((fast[name] - want).abs().max()) <= tolerance * scale, name


def double_pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model in float64 and a copy of it for the naive reference."""
    model = model.double()
    return model, copy.deepcopy(model)


def joint_norm(tensors: Mapping[str, Tensor]) -> float:
    """L2 norm of all tensors as one vector, in float64."""
    return sum(float(t.double().square().sum()) for t in tensors.values()) ** 0.5


class Replay:
    """A random source of fixed draws: the noise of step k is a function of k and the tensor's shape alone.

    So a reference may ask for it in any order; every step begins with its draw of a batch.
    """

    seeded = True

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.step = seed, 0

    def uniform(self, n: int) -> Tensor:
        self.step += 1
        return torch.from_numpy(np.random.default_rng([self.seed, self.step, 0]).random(n))

    def normal(self, shape: Sequence[int]) -> Tensor:
        drawn = np.random.default_rng([self.seed, self.step, 1, *shape]).standard_normal(tuple(shape))
        return torch.from_numpy(drawn).float()


class Everyone(Replay):
    """Takes every record into every batch, whatever q > 0."""

    def uniform(self, n: int) -> Tensor:
        return super().uniform(n) * 0.0


class Nobody(Replay):
    """Takes no record into any batch, whatever q < 1."""

    def uniform(self, n: int) -> Tensor:
        return super().uniform(n) * 0.0 + (1 - 2**-53)


@dataclass
class OpenLedger:
    """A ledger that lets ``limit`` steps pass and notes every call; ``on_step`` runs at each `take_step`."""

    limit: int = 10**9
    on_step: Callable[[], None] = lambda: None
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def reserve(self, noise_multiplier: float, sample_rate: float, steps: int) -> None:
        self.calls.append(("reserve", noise_multiplier, sample_rate, steps))
        if steps > self.limit:
            raise BudgetExhausted("budget: test")

    def take_step(self) -> None:
        self.on_step()
        self.calls.append(("take",))

    def commit(self) -> None:
        self.calls.append(("commit",))

    def epsilon(self) -> float:
        return 0.0

    @property
    def taken(self) -> int:
        return self.calls.count(("take",))
