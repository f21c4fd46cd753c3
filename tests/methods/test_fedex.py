"""FedEx-LoRA and FLoRA: the mean of the sites' models is what the next round starts from, and what is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context
from peft import PeftModel
from torch import nn

from lalora_flwr.adapter.lora_residual import LORA_D, residuals_of
from lalora_flwr.adapter.slots import HEAD, LORA_A, LORA_B, Layout, Slot
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.merges import Memory, Now
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.updates import Update, together
from lalora_flwr.models.embedded import build_vit_digits
from lalora_flwr.server.plan import make_plan
from lalora_flwr.settings.choices import METHODS
from lalora_flwr.settings.schema import MergeSettings
from lalora_flwr.wire.tensors import ARRAY_HEADER
from tests.conftest import Finished, arrays_of, small
from tests.ledger.site_ledgers import owned
from tests.server.test_outputs import public_test_part
from tests.server.test_resume import killed_after, result, resumed
from tests.sites import REAL, servers_learner, train_order

STRATEGIES = pytest.mark.parametrize("strategy", ["fedex-lora", "flora"])
MORE: dict[str, Any] = {"lora__head": "trained", "num_rounds": 3, "privacy__accountant": "rdp"}


def weight_change(state: dict[str, Any], names: tuple[str, str, str]) -> Any:
    """B A + D of a layer, float64."""
    A, B, D = (state[name].double().numpy() for name in names)
    return B @ A + D


@STRATEGIES
def test_the_next_round_starts_from_the_mean_of_the_sites_models(strategy: str, finished: Callable[..., Finished]) -> None:
    """In the paper's words: W0 + s mean(B_i A_i) over what W0 had become, layer by layer, whatever the factors are."""
    done = finished(strategy=strategy, **MORE)
    layout = servers_learner(done.settings).adapter.layout
    for server_round in (1, 2):
        exchanged, after = done.spy.training(server_round), arrays_of(done.spy.training(server_round + 1)[0][0])
        start, replies = arrays_of(exchanged[0][0]), [arrays_of(reply) for _, reply in exchanged]
        assert after.keys() == layout.names == start.keys()
        assert all(reply.keys() == layout.trainable == layout.of(LORA_A, LORA_B, HEAD) for reply in replies)
        for names in residuals_of(layout):
            models = [weight_change({**start, **reply}, names) for reply in replies]
            np.testing.assert_allclose(weight_change(after, names), np.mean(models, axis=0), rtol=0, atol=1e-7)
            name_A, name_B, name_D = names
            means = [torch.stack([reply[name].double() for reply in replies]).mean(0).float() for name in (name_A, name_B)]
            bias = np.mean(models, axis=0) - (means[1].double() @ means[0].double() + start[name_D].double()).numpy()
            assert np.abs(bias).max() > 1e-4  # what plain averaging would have lost
            if strategy == "fedex-lora":
                assert torch.allclose(after[name_A], means[0], atol=1e-7) and torch.allclose(after[name_B], means[1], atol=1e-7)
            else:
                stacked = np.hstack([reply[name_B].double().numpy() for reply in replies]) / 3
                product = stacked @ np.vstack([reply[name_A].double().numpy() for reply in replies])
                np.testing.assert_allclose((after[name_D] - start[name_D]).double().numpy(), product, atol=1e-6)
                assert not after[name_B].any() and not torch.allclose(after[name_A], start[name_A], atol=1e-2)
                bound = after[name_A].shape[1] ** -0.5
                assert 0.9 * bound < float(after[name_A].abs().max()) <= bound
        for name in layout.of(HEAD):
            mean = torch.stack([reply[name].double() for reply in replies]).mean(0).float()
            torch.testing.assert_close(after[name], mean, rtol=0, atol=1e-7)


@STRATEGIES
def test_stock_peft_loads_what_the_run_saved(strategy: str, finished: Callable[..., Finished]) -> None:
    done = finished(strategy=strategy, **MORE)
    images, labels = public_test_part()
    with torch.inference_mode():
        logits = PeftModel.from_pretrained(build_vit_digits(), str(done.path / "adapter")).eval()(images)
    assert done.summary["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()), abs=1e-6)
    assert done.summary["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    assert done.summary["loss"] < done.summary["frozen_loss"]


def test_it_goes_on_after_a_death(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    killed_after(small(tmp_path, strategy="flora", **MORE), 2)
    run_inline(resumed(tmp_path, strategy="flora", **MORE))
    assert result(tmp_path / "run") == result(finished(strategy="flora", **MORE).path)


@STRATEGIES
def test_no_average_goes_across_new_factors(strategy: str) -> None:
    """FLoRA's mean something else in every round, while FedEx's go on."""
    layout = Layout([Slot("a", "x", LORA_A, (1, 3), 1), Slot("b", "x", LORA_B, (2, 1), 0), Slot("d", "x", LORA_D, (2, 3))])
    current = {name: np.ones(slot.shape) for name, slot in layout.items()}
    updates = together([Update(site, {"a": current["a"] * site, "b": current["b"] * site}) for site in (1, 2)])
    merged = METHODS.get(strategy, Method).merge(current, updates, Memory(), Now(1, layout, MergeSettings(), {}))
    assert merged.rewritten == (strategy == "flora")
    np.testing.assert_allclose(merged.tensors["d"], 1 + (1 + 4) / 2 - (1.5**2 if strategy == "fedex-lora" else 0))


def test_a_plan_prices_the_residual_down_and_not_up(finished: Callable[..., Finished]) -> None:
    done = finished(strategy="fedex-lora", **MORE)
    plan, plain = make_plan(done.settings), make_plan(small(Path("x"), strategy="dp-lora", **MORE))
    layout = servers_learner(done.settings).adapter.layout
    dense = sum(4 * np.prod(layout[name].shape) + ARRAY_HEADER for name in layout.of(LORA_D))
    assert plan.bytes_up == plain.bytes_up and plan.bytes_down == plain.bytes_down + dense
    assert plan.trainable == plain.trainable
    assert done.metrics[0]["bytes_down"] == 3 * plan.bytes_down and done.metrics[0]["bytes_up"] == 3 * plan.bytes_up[0]


def test_a_site_that_does_not_get_the_residual_refuses(tmp_path: Path, context: Callable[..., Context]) -> None:
    """What the server has changed is part of the digest; a server that leaves it out, or sends another one, is not served."""
    settings = small(tmp_path, strategy="fedex-lora")
    held = owned(context(settings), tmp_path)
    order = train_order(settings)
    (name, *_) = sorted(servers_learner(settings).adapter.layout.of(LORA_D))
    kept = dict(order.content["arrays"])
    assert REAL(order, held).has_content()
    del order.content["arrays"][name]
    assert REAL(order, held).error.reason.startswith("adapter: the tensors sent")
    changed = train_order(settings)
    values = kept[name].numpy().copy()
    values[0, 0] = 1.0
    changed.content["arrays"][name] = type(kept[name])(values)
    assert REAL(changed, held).error.reason.startswith("adapter: the site's start differs")


@pytest.mark.parametrize(
    ("keys", "refusal"),
    [
        ({"merge__name": "mean"}, r"merge\.name = 'mean': must be 'auto' for strategy = 'fedex-lora'"),
        ({"trust": "secure-sum", "train__local_steps": 1}, "combines adapters, and no gradients"),
        ({"lora__schedule": "B"}, r"lora\.schedule = 'B': no round trains A and B"),
        ({"lora__schedule": "step:BA", "train__local_steps": 1}, r"lora\.schedule = 'step:BA': no round trains A and B"),
    ],
)
def test_what_leaves_no_residual_is_refused(keys: dict[str, Any], refusal: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=refusal):
        make_plan(small(tmp_path, strategy="fedex-lora", **keys))


def test_a_filter_that_remembers_gradients_is_refused_where_factors_begin_anew(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="disk remembers gradients, of factors that 'stack'"):
        small(tmp_path, strategy="flora", filter__name="disk")
    small(tmp_path, strategy="fedex-lora", filter__name="disk")
