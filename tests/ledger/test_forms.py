"""What the owner of a site lets runs train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.ground.errors import SiteRefusal
from lalora_flwr.ledger.caps import caps_from, check_run
from tests.conftest import small
from tests.ledger.test_caps import LABELS, LEAST, NEEDED

PLAIN = {"lora__rank": 4, "lora__alpha": 8.0, "lora__targets": "auto", "lora__head": "auto"}


@pytest.mark.parametrize(
    ("forms", "strategies", "asked", "allowed"),
    [
        ((), (), {"lora__form": "bitfit"}, True),
        ((), ("dp-lora",), {"lora__form": "bitfit"}, False),  # its name promises LoRA
        ((), ("dp-lora",), {"lora__form": "lora"}, True),
        ((), ("dp-lora", "bitfit"), {"strategy": "bitfit"}, True),
        ((), ("dp-lora", "bitfit"), {"lora__form": "bitfit"}, False),
        (("bitfit",), ("dp-lora",), {"lora__form": "bitfit"}, True),
        (("bitfit",), (), {"strategy": "bitfit"}, True),
        (("bitfit",), (), {}, False),
        (("lora",), (), {}, True),
        (("lora",), (), {"strategy": "head-only"}, False),
    ],
)
def test_the_owner_says_what_trains(
    forms: tuple[str, ...], strategies: tuple[str, ...], asked: dict[str, Any], allowed: bool, tmp_path: Path
) -> None:
    caps = replace(LEAST, allowed_forms=forms, allowed_strategies=strategies)
    settings = small(tmp_path, **{"strategy": "dp-lora", "privacy__epsilon": 1.0, **PLAIN, **asked})
    if allowed:
        check_run(caps, settings)
        return
    with pytest.raises(SiteRefusal, match=r"^cap: the site does not allow (the run's form|this strategy)$"):
        check_run(caps, settings)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(SiteRefusal, match="allowed-forms names an unknown form"):
        caps_from({**NEEDED, **LABELS, "model-path": "m", "allowed-forms": "lora,prompts"}, needed=True)
