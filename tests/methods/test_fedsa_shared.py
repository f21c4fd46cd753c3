"""FedSA-LoRA where the server takes the step on A: B's own step at its site, with own noise and with a noise that sites share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lalora_flwr.adapter.slots import LORA_A, LORA_B
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.secure_sum import SLACK
from lalora_flwr.privacy.noise import mechanism_for
from lalora_flwr.privacy.randomness import SeededRandom
from lalora_flwr.server.plan import make_plan
from lalora_flwr.settings import Settings
from lalora_flwr.site.records import RecordStore
from lalora_flwr.training.learner import Learner
from lalora_flwr.wire.orders import ARRAYS
from tests.conftest import MODELS, Finished, arrays_of, small
from tests.server.test_resume import killed_after, result, resumed

ONE: dict[str, Any] = {"strategy": "fedsa-lora", "num_rounds": 3, "train__local_steps": 1}
SHARED: dict[str, Any] = {**ONE, "trust": "secure-sum", "colluders": 1}
Make = Callable[..., Finished]


def stayed(done: Finished, server_round: int) -> list[dict[str, Tensor]]:
    """What each site kept of the round."""
    replies = [reply for _, reply in done.spy.training(server_round)]
    return [dict(reply.content["memory"].to_torch_state_dict()) for reply in replies]  # type: ignore[union-attr]


def test_with_own_noise_the_servers_step_on_a_is_the_sites(finished: Make) -> None:
    """Sites that send the gradient of A and step along that of B are sites that step along both."""
    own, servers = finished(**ONE), finished(**ONE, train__step_at="server")
    for name, value in own.checkpoint.items():
        torch.testing.assert_close(servers.checkpoint[name], value, rtol=0, atol=1e-5)
    for one, other in zip(stayed(own, 3), stayed(servers, 3), strict=True):
        assert one.keys() == other.keys() and any(value.any() for value in one.values())
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5)
    assert servers.summary["epsilon"] == own.summary["epsilon"]


def clipped_sum(learner: Learner, settings: Settings, site: int, state: Mapping[str, Tensor], source: SeededRandom) -> Any:
    """Σ clip((∇_A ℓ_j, ∇_B ℓ_j), C) over a Poisson sample, one record after the other; with the site's mechanism."""
    records = RecordStore()(settings, {"partition-id": site, "num-partitions": settings.num_supernodes}, learner.base)
    mechanism = mechanism_for(settings, len(records))
    learner.adapter.load({name: value.float() for name, value in state.items()})
    learner.adapter.activate(learner.adapter.trainable)
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in state.items()}
    for j in torch.nonzero(source.uniform(len(records)) < mechanism.sample_rate).flatten():
        x, y = records.batch(j[None])
        loss = nn.functional.cross_entropy(learner.adapter.model(x), y)
        found = torch.autograd.grad(loss, list(learner.adapter.parameters.values()))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in found))
        for name, g in zip(learner.adapter.parameters, found, strict=True):
            total[name] += g.double() * min(1.0, mechanism.clip_norm / norm)
    return total, mechanism


def test_a_is_stepped_along_the_sum_with_one_noise_and_each_b_along_its_own(finished: Make) -> None:
    """Round by round, with the sites' own draws: s for what is summed, σ for what stays."""
    done = finished(**SHARED)
    learner, settings = MODELS.learner(done.settings), done.settings
    layout = learner.adapter.layout
    a, b = ([name for name in layout if layout[name].part == part] for part in (LORA_A, LORA_B))
    common = {name: learner.initial[name].double() for name in a}
    own = [{name: learner.initial[name].double() for name in b} for _ in range(3)]
    for server_round in (1, 2, 3):
        mean, batches = {name: torch.zeros_like(common[name]) for name in a}, 0.0
        found = []
        for site in range(3):
            source = SeededRandom(settings.seed, site, server_round)
            total, mechanism = clipped_sum(learner, settings, site, {**common, **own[site]}, source)
            found.append((total, mechanism, source))
        needed = max(mechanism.noise_multiplier for _, mechanism, _ in found)
        share = needed / math.sqrt(2) * SLACK  # of three sites one may collude
        for site, (total, mechanism, source) in enumerate(found):
            C, batch = mechanism.clip_norm, mechanism.expected_batch
            for names, multiplier in ((a, share), (b, max(share, mechanism.noise_multiplier))):
                for name in names:
                    total[name] += source.normal(total[name].shape) * multiplier * C
                    source.normal(total[name].shape)  # the draw that decides on which side of the grid a sum falls
            for name in a:
                mean[name] += total[name]
            for name in b:
                own[site][name] = own[site][name] - settings.train.lr * total[name] / batch
            batches += batch
        common = {name: common[name] - settings.train.lr * mean[name] / batches for name in a}
        for site, kept in enumerate(stayed(done, server_round)):
            for name in b:
                torch.testing.assert_close(kept[name].double(), own[site][name], rtol=0, atol=2e-5)
    for name in a:
        torch.testing.assert_close(done.checkpoint[name].double(), common[name], rtol=0, atol=2e-5)
    assert not any(done.checkpoint[name].any() for name in b)


def test_nothing_but_the_masked_gradient_of_a_leaves_a_site(finished: Make) -> None:
    done = finished(**SHARED)
    layout = MODELS.learner(done.settings).adapter.layout
    for order, reply in done.spy.training(2):
        sent = reply.content[ARRAYS]
        assert arrays_of(order).keys() == set(sent) == layout.of(LORA_A)
        assert all(sent[name].dtype == "uint64" for name in sent)  # type: ignore[union-attr, call-overload, index]


def test_it_costs_what_another_secure_sum_costs(finished: Make, tmp_path: Path) -> None:
    done, plan = finished(**SHARED), make_plan(small(tmp_path, **SHARED))
    other = make_plan(small(tmp_path, **{**SHARED, "strategy": "dp-lora"}))
    assert plan.mechanism == other.mechanism and plan.share == other.share
    plain = finished(**{**SHARED, "strategy": "dp-lora"}).summary
    assert [done.summary[name] for name in ("epsilon", "epsilon_alone")] == [plain[name] for name in ("epsilon", "epsilon_alone")]
    assert done.metrics[0]["bytes_up"] == 3 * plan.bytes_up[0] < 3 * other.bytes_up[0]
    assert done.summary["personal_accuracy"] != done.summary["accuracy"]


def test_it_goes_on_after_a_death(tmp_path: Path, finished: Make) -> None:
    killed_after(small(tmp_path, **SHARED), 2)
    run_inline(resumed(tmp_path, **SHARED))
    assert result(tmp_path / "run") == result(finished(**SHARED).path)


@pytest.mark.parametrize("at", [{"train__step_at": "server"}, {"trust": "secure-sum"}], ids=str)
@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"train__momentum": 0.9}, r"train\.momentum = 0\.9"),
        ({"train__weight_decay": 0.1}, r"train\.weight-decay = 0\.1"),
        ({"train__optimizer": "adamw", "train__lr": 0.01}, r"train\.optimizer = 'adamw'"),
        ({"train__decay": "linear"}, r"train\.decay = 'linear'"),
        ({"filter__name": "doppler"}, r"filter\.name = 'doppler'"),
    ],
)
def test_what_is_more_than_a_plain_step_is_refused(keys: dict[str, Any], said: str, at: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said + r": where the server steps, a site's step on what stays with it is plain SGD"):
        small(tmp_path, **ONE, **at, **keys)
