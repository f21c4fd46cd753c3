"""The check before training refuses models that mix records, and passes those that keep them apart."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.gradients.self_check import self_check
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from tests.adapters import adapter_parameters, lora_of
from tests.adapters import check as check_model
from tests.gradients.mixing import check, keep, mixing, neighbour_in_batch
from tests.reference import BASES, CLASSES, adapted, generator


def batch_statistics(_: nn.Module, x: Tensor) -> Tensor:
    return F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2)


def batch_statistics_in_training(module: nn.Module, x: Tensor) -> Tensor:
    mean, var = (None, None) if module.training else (torch.zeros(5), torch.ones(5))
    return F.batch_norm(x.transpose(1, 2), mean, var, training=module.training).transpose(1, 2)


def mean_over_batch(_: nn.Module, x: Tensor) -> Tensor:
    return x - x.mean(0, keepdim=True)


def standardised_over_batch(_: nn.Module, x: Tensor) -> Tensor:
    return (x - x.mean(0, keepdim=True)) / x.std(0, keepdim=True)  # NaN for a batch of one


class TokensFirst(nn.Module):
    """The first axis of the adapted layers' input is the token, as in a sequence-first transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.tanh(self.first(x.transpose(0, 1))))  # (tokens, n, 5)
        return self.head(y.mean(0))


class WindowsFirst(TokensFirst):
    """Folds windows outermost, so that a record's rows are not next to each other."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.transpose(0, 1).reshape(-1, x.shape[-1])  # (tokens * n, 4)
        y = self.second(torch.tanh(self.first(rows)))
        return self.head(y.reshape(x.shape[1], x.shape[0], -1).mean(0))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("kind", ["mlp", "vit", "swin"])
def test_models_that_keep_records_apart_pass(kind: str, head: str, training: bool) -> None:
    check(BASES[kind](), training, head=head)
    check(mixing(keep), training, head=head)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mix", [batch_statistics, mean_over_batch, neighbour_in_batch])
def test_models_that_mix_records_are_refused(mix: Callable[[nn.Module, Tensor], Tensor], training: bool) -> None:
    with pytest.raises(ConfigError, match="mixes records"):
        check(mixing(mix), training)


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_that_mixes_records_only_in_training_mode_is_refused(training: bool) -> None:
    """`train_round` trains in training mode, whatever mode the model was in when it was checked."""
    with pytest.raises(ConfigError, match="mixes records"):
        check(mixing(batch_statistics_in_training), training)


def test_gradients_that_are_not_finite_are_no_agreement() -> None:
    """One record alone gives NaN, which is not larger than any tolerance; three together mix."""
    with pytest.raises(ConfigError):
        check(mixing(standardised_over_batch))


@pytest.mark.parametrize("tokens", [3, 4, 6])
@pytest.mark.parametrize("module", [TokensFirst, WindowsFirst])
def test_a_batch_axis_that_is_not_outermost_is_refused(module: type[nn.Module], tokens: int) -> None:
    with pytest.raises(ConfigError):
        check(BaseModel("test/axis", module(), "head", ("first", "second"), (tokens, 4), CLASSES))


def test_batch_statistics_that_one_record_alone_cannot_have_are_refused() -> None:
    def mix(_: nn.Module, x: Tensor) -> Tensor:
        return F.batch_norm(x.flatten(1), None, None, training=True).view_as(x)  # raises for a batch of one

    with pytest.raises(ConfigError):
        check(mixing(mix))


class Spare(TokensFirst):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)).mean(1))


def test_an_adapted_layer_that_takes_no_part_is_refused() -> None:
    with pytest.raises(ConfigError):
        check(BaseModel("test/spare", Spare(), "head", ("first", "second"), (3, 4), CLASSES))


def test_dropout_is_no_reason_to_refuse() -> None:
    base = BASES["vit"]()
    base.module.blocks[0].attn.proj_drop = nn.Dropout(0.5)
    check(base, training=True, dropout=0.3)


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_models_in_low_precision_pass(kind: str, head: str) -> None:
    base = BASES[kind]()
    base.module.bfloat16()
    check(base, head=head)


@pytest.mark.parametrize("mix", [batch_statistics, mean_over_batch])
def test_models_in_low_precision_that_mix_records_are_refused(mix: Callable[[nn.Module, Tensor], Tensor]) -> None:
    base = mixing(mix)
    base.module.bfloat16()
    with pytest.raises(ConfigError, match="mixes records"):
        check(base)


def test_rates_of_dropout_and_drop_path_are_as_before() -> None:
    base = BASES["swin"]()
    base.module.layers[0].blocks[0].attn.proj_drop = nn.Dropout(0.25)

    def rates(model: nn.Module) -> dict[str, float]:
        modules = dict(model.named_modules()).items()
        return {n: getattr(m, "p", None) or getattr(m, "drop_prob", None) for n, m in modules if "drop" in n}

    before = rates(adapted(base, dropout=0.3))
    base = BASES["swin"]()
    base.module.layers[0].blocks[0].attn.proj_drop = nn.Dropout(0.25)
    assert rates(check(base, dropout=0.3)) == before
    values = {round(rate, 3) for rate in before.values() if rate}
    assert {0.25, 0.3, 0.1} <= values  # the projection's, the adapter's, Swin's own drop-path


class Broken(PerSampleGradients):
    """An engine that gives each record its neighbour's gradient."""

    def __call__(self, records: int, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
        return {name: g.roll(1, 0) for name, g in super().__call__(records, losses).items()}


def test_an_engine_that_confuses_records_is_refused() -> None:
    base = BASES["vit"]()
    model = adapted(base)
    with pytest.raises(ConfigError, match="mixes records"):
        check_model(base, model, Broken)


class Slight(PerSampleGradients):
    """An engine with a small error in the gradients of A, which at B = 0 nobody would see."""

    error = 0.05

    def __call__(self, records: int, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
        gradients = super().__call__(records, losses)
        return {name: g * (1 + self.error) if ".lora_A." in name else g for name, g in gradients.items()}


@pytest.mark.parametrize("error", [0.05, 2e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_error_in_a_is_found_although_b_starts_at_zero(dtype: torch.dtype, error: float) -> None:
    base = BASES["vit"]()
    base.module.to(dtype)
    model = adapted(base)
    whole = lora_of(model)
    engine = Slight(model, whole.parameters)
    engine.error = error
    with pytest.raises(ConfigError, match="lora_A"):
        self_check(base, whole, engine)


@pytest.mark.parametrize("outcome", ["good", "mixes", "cannot be determined"])
def test_parameters_modes_and_the_global_generator_are_as_before(outcome: str) -> None:
    base = {
        "good": mixing(keep),
        "mixes": mixing(mean_over_batch),
        "cannot be determined": BaseModel("test/axis", TokensFirst(), "head", ("first", "second"), (4, 4), CLASSES),
    }[outcome]
    model = adapted(base, head="trained", dropout=0.1)
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p.copy_(torch.randn(p.shape, generator=generator()))
    whole = lora_of(model)
    engine = PerSampleGradients(model, whole.parameters)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    if outcome == "good":
        self_check(base, whole, engine)
    else:
        with pytest.raises(ConfigError, match=outcome):
            self_check(base, whole, engine)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())


class OnlySometimes(PerSampleGradients):
    """An engine that adds a neighbour's gradient to a record's in batches of some sizes or with texts of some lengths."""

    fewest = 0

    def __call__(self, records: int, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
        gradients = super().__call__(records, losses)
        return {n: g + 0.01 * g.roll(1, 0) for n, g in gradients.items()} if records >= self.fewest else gradients


@pytest.mark.parametrize(("fewest", "found"), [(4, True), (5, True), (6, False)])
def test_an_engine_that_mixes_in_batches_of_five_or_fewer_is_refused(fewest: int, found: bool) -> None:
    base = BASES["vit"]()
    model = adapted(base)
    whole = lora_of(model)
    engine = OnlySometimes(model, whole.parameters)
    engine.fewest = fewest
    with pytest.raises(ConfigError, match="mixes records") if found else nullcontext():
        self_check(base, whole, engine)
