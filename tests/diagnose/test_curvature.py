"""The largest eigenvalue against torch's own full Hessian, and slices against the loss itself."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from lalora_flwr.diagnose.curvature import MeanLoss, _product, largest_eigenvalue, merged_weights
from lalora_flwr.diagnose.landscape import direction, landscape
from lalora_flwr.training.learner import Learner
from tests.conftest import Finished
from tests.diagnose.runs import again


def symmetric(values: list[float], seed: int = 0) -> Tensor:
    drawn = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turn = torch.linalg.qr(drawn).Q
    matrix: Tensor = turn @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turn.T
    return matrix


@pytest.mark.parametrize("values", [[5.0, 3, 1, -2], [2.0, 1, 0, -7], [3.0, 0, 0, -3], [-1.0, -2, -4, -8], [0.0, 0, 0, 0]])
def test_the_largest_eigenvalue_is_the_largest_and_not_that_of_the_largest_magnitude(values: list[float]) -> None:
    matrix = symmetric(values)
    found = largest_eigenvalue(lambda v: matrix @ v, torch.zeros(4, dtype=torch.float64), close=1e-6, most=2000)
    assert found.converged and found.value == pytest.approx(max(values), abs=1e-5)


def test_one_that_does_not_settle_says_so() -> None:
    matrix = symmetric([1.0, 0.999, 0.998, -1.0])
    found = largest_eigenvalue(lambda v: matrix @ v, torch.zeros(4, dtype=torch.float64), close=1e-9, most=3)
    assert not found.converged and found.products == 9 and found.residual > 0


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.unused, self.last = nn.Linear(3, 4), nn.Linear(2, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x)))
        return out


def test_hessian_vector_products_are_those_of_the_full_hessian() -> None:
    model = Tiny().double()
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 2
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]

    def loss_of(flat: Tensor) -> Tensor:
        named = {n: piece.view_as(p) for (n, p), piece in zip(model.named_parameters(), torch.split(flat, sizes), strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, named, x), y)

    flat = torch.cat([p.detach().flatten() for p in parameters])
    hessian = torch.func.hessian(loss_of)(flat)

    def times(v: Tensor) -> Tensor:
        pieces = [piece.view_as(p) for p, piece in zip(parameters, torch.split(v, sizes), strict=True)]
        return _product(nn.functional.cross_entropy(model(x), y), parameters, pieces)

    v = torch.randn(flat.shape, dtype=torch.float64)
    assert torch.allclose(times(v), hessian @ v, atol=1e-12)
    found = largest_eigenvalue(times, torch.zeros_like(flat), close=1e-5, most=3000)
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-6)


FOUR_BITS = {"model__dtype": "nf4", "lora__targets": "mlp.fc2"}  # whose rows are whole blocks


@pytest.fixture(scope="module", params=[{}, FOUR_BITS], ids=["float32", "four bits"])
def model(finished: Callable[..., Finished], request: pytest.FixtureRequest) -> tuple[Learner, MeanLoss]:
    learner, records = again(finished(strategy="dp-lora", num_rounds=1, **request.param).path)
    return learner, MeanLoss(learner, records, 12)


def test_a_run_in_four_bits_is_diagnosed_on_their_weights(finished: Callable[..., Finished]) -> None:
    learner, _ = again(finished(strategy="dp-lora", num_rounds=1, **FOUR_BITS).path)
    weights = merged_weights(learner.adapter)
    assert len(weights) == 2 and {weight.dtype for weight in weights} == {torch.float32}
    assert all(len(block.unique()) <= 16 for weight in weights for block in weight.reshape(-1, 64))


def test_the_curvature_of_merged_weights_is_that_of_a_model_with_merged_weights(model: tuple[Learner, MeanLoss]) -> None:
    """H v by finite differences of the gradients of a model whose weights hold the product of the factors."""
    learner, loss = model
    weights = merged_weights(learner.adapter)
    vector = torch.randn(sum(w.numel() for w in weights), generator=torch.Generator().manual_seed(2))
    vector /= vector.norm()
    found = loss.hessian(weights)(vector)
    merged = _merged(learner)
    at = [w.detach().clone() for w in merged[1]]
    sizes = [w.numel() for w in weights]
    pieces = [p.view_as(w) for p, w in zip(torch.split(vector, sizes), weights, strict=True)]
    gradients = []
    for sign in (1, -1):
        held = [w + sign * 1e-4 * p.double() for w, p in zip(at, pieces, strict=True)]
        gradients.append(_gradient(learner, loss, merged[0], merged[1], held))
    assert torch.allclose(found.double(), (gradients[0] - gradients[1]) / 2e-4, atol=2e-4 * float(found.norm()))


def _merged(learner: Learner) -> tuple[nn.Module, list[nn.Parameter]]:
    """A plain model in float64 with the factors in its weights, and those weights in the order of `merged_weights`."""
    names = {id(p): name for name, p in learner.adapter.model.named_parameters()}
    plain = copy.deepcopy(learner.adapter.model)
    assert isinstance(plain, PeftModel)
    merged = plain.merge_and_unload().double()
    own = dict(merged.named_parameters())
    wanted = [names[id(weight)] for weight in merged_weights(learner.adapter)]
    return merged, [own[name.removeprefix("base_model.model.").replace("base_layer.", "")] for name in wanted]


def _gradient(learner: Learner, loss: MeanLoss, plain: nn.Module, weights: list[nn.Parameter], held: list[Tensor]) -> Tensor:
    with torch.no_grad():
        for weight, value in zip(weights, held, strict=True):
            weight.copy_(value)
            weight.requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    for inputs, labels in loss.parts:
        assert isinstance(inputs, Tensor)
        total = total + learner.base.problem.losses(plain(inputs.double()), labels).sum() / loss.records
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, weights)])


def test_rows_of_a_direction_have_the_lengths_of_the_weights_rows() -> None:
    weights = [torch.randn(3, 5), torch.randn(4), torch.zeros(2, 2)]
    found = direction(weights, 1)
    assert torch.allclose(found[0].norm(dim=1), weights[0].norm(dim=1)) and torch.allclose(found[1].norm(), weights[1].norm())
    assert not found[2].any() and torch.equal(found[0], direction(weights, 1)[0])
    assert not torch.allclose(found[0], direction(weights, 2)[0])


def test_a_landscape_is_the_loss_where_it_says_and_leaves_the_weights_alone(model: tuple[Learner, MeanLoss]) -> None:
    learner, loss = model
    weights = merged_weights(learner.adapter)
    before, here = [w.detach().clone() for w in weights], loss()
    found = landscape(loss, weights, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    assert found.at == pytest.approx((-1, -0.5, 0, 0.5, 1)) and found.coarse == pytest.approx((-1, 0, 1))
    assert found.line[2] == pytest.approx(here) and found.plane[1] == found.line[::2]
    with torch.no_grad():
        for w, a, b in zip(weights, direction(before, 0), direction(before, 1), strict=True):
            w.add_(a - b)
    assert found.plane[0][2] == pytest.approx(loss(), rel=1e-4)
    with torch.no_grad():
        for w, own in zip(weights, before, strict=True):
            w.copy_(own)
