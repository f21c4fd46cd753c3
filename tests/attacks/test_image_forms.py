"""Forms for images at a real site: clipped and noised as a whole, whatever adapter a server sends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.attacks.attacker import RUN, Site
from tests.attacks.orders import order
from tests.attacks.test_malicious_server import HUGE, Attack, Target
from tests.data.files import png
from tests.models.folders import save_timm

FORMS = ["visual-prompt", "pixel-prompt", "bitfit", "bottleneck", "head-only"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("site")
    save_timm(folder / "model", "vit", classes=2)
    for name, count in (("with", 5), ("without", 4)):
        for number in range(count):
            path = folder / name / "train" / ("cat" if number % 2 else "dog") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(50 * number))
    about = {"task": "image", "labels": "cat,dog"}
    return Target(folder / "model", *(Site(folder / name, folder / "model", about) for name in ("with", "without")))


def asked(strategy: str) -> dict[str, Any]:
    usual = {"lora.rank": 4, "lora.alpha": 8.0, "lora.targets": "auto"}
    return {"strategy": strategy, "model.name": "timm/model", "data.labels": "cat,dog", **usual}


@pytest.mark.parametrize("strategy", FORMS)
def test_no_adapter_switches_the_noise_off(strategy: str, target: Target) -> None:
    run: dict[str, Any] = {**RUN, **asked(strategy)}
    served = target.whole.serve(order(run, Path(target.model)), run)
    assert not served.reason and any(step.records and step.total.norm() > 0 for step in served.steps)
    for size in (1e-45, 1.0, 1e4, HUGE):
        assert Attack(asked(strategy), adapter=("everything", size)).problems(target) == [], size
