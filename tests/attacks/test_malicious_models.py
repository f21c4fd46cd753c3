"""Models in which a record's gradient is not its own, and that a careless check lets pass (holes 4 and 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import settings_from
from tests.adapters import check
from tests.attacks.attacker import RUN, Site, table
from tests.attacks.orders import order
from tests.attacks.problems import problems
from tests.conftest import MODELS
from tests.models.folders import CONFIGS, save_hf, save_tokenizer
from tests.reference import adapted

WORDS = "the film is good and the plot is not bad but the actor is a very fine one in a long short film and much more of it"
SHORT = tuple(
    (f"{WORDS} {word} a the", ("good", "bad")[i % 2]) for i, word in enumerate(("good", "bad", "fine", "poor", "how", "much"))
)
LONG = (
    " ".join(["film"] * 33),
    "bad",
)  # longer than the threshold of the ropes below, and near enough for the same part of a batch


def llama(folder: Path, rope: dict[str, Any], pretrained: int) -> Path:
    """A tiny Llama with a rope that depends on how long a text is."""
    config = {"max_position_embeddings": 128, "rope_parameters": {"rope_theta": 10000.0, **rope}}
    made = CONFIGS["llama"]()
    made = transformers.LlamaConfig(**{**made.to_dict(), **config, "original_max_position_embeddings": pretrained})
    made.initializer_range = 0.3
    made.pad_token_id = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.AutoModelForSequenceClassification.from_config(made)
    model.save_pretrained(folder)
    save_tokenizer(folder, "llama")
    return folder


HALF = 4  # of a head's 8 dimensions, which turn in pairs
ROPES: dict[str, dict[str, Any]] = {
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * HALF,
        "long_factor": [1.0, 4.0, 16.0, 64.0],
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("rope", ROPES)
def test_one_long_record_does_not_turn_all_the_others(rope: str, tmp_path: Path) -> None:
    """Hole 4: the longest text of a batch chose the rope for all; one record less moved the sum by 4.35 C."""
    model = llama(tmp_path / "model", ROPES[rope], 32)
    run = {**RUN, "lora.targets": "q_proj,v_proj", "privacy.clip-norm": 0.01, "data.max-tokens": 64}
    whole = Site(table(tmp_path / "with.csv", [*SHORT, LONG]), model)
    without = Site(table(tmp_path / "without.csv", SHORT), model)
    assert problems(order(run, model), run, whole, without) == []


class Silent(nn.Module):
    """A model whose head sees nothing: all gradients of an adapter are zero, and so is every difference of two."""

    def __init__(self, mixes: bool, loud: float) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(7, 5), nn.Linear(5, 3)
        self.mixes, self.loud = mixes, loud

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        if self.mixes:
            hidden = hidden - hidden.mean(0)
        return self.head(self.loud * hidden)


@pytest.mark.parametrize("loud", [0.0, 1e-12, 1e-20, 1e-30])
def test_gradients_of_nothing_prove_nothing(loud: float) -> None:
    """Hole 5: zeros equal zeros, and a floor under the norm hid small gradients; a model that mixes records passed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = BaseModel("test/silent", Silent(True, loud).eval(), "head", ("first",), (7,), 3)
    model = adapted(base)
    with pytest.raises(ConfigError):
        check(base, model)


def test_half_precision_hides_no_mixing() -> None:
    """Hole 5: on a bfloat16 base the check allowed 15 %."""

    class Leaky(Silent):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            return self.head(hidden - 0.05 * hidden.mean(0))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = BaseModel("test/leaky", Leaky(True, 1.0).eval().to(torch.bfloat16), "head", ("first",), (7,), 3)
    model = adapted(base)
    with pytest.raises(ConfigError):
        check(base, model)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_a_long_record_leaves_the_others_alone_in_every_family(family: str, tmp_path: Path) -> None:
    """Hole 4: padding and length are a record's own affair in all that is admitted."""
    model = tmp_path / "model"
    save_hf(model, family, "classifier", initializer_range=0.3)
    run = {**RUN, "lora.targets": "auto", "privacy.clip-norm": 0.01}
    whole, without = table(tmp_path / "with.csv", [*SHORT, LONG]), table(tmp_path / "without.csv", SHORT)
    assert problems(order(run, model), run, Site(whole, model), Site(without, model)) == []


def test_below_the_threshold_a_long_rope_is_exact(tmp_path: Path) -> None:
    """Hole 4: a run may cut texts where the rope changes; the record beyond is then as long as all others."""
    model = llama(tmp_path / "model", ROPES["longrope"], 32)
    run = {**RUN, "lora.targets": "q_proj,v_proj", "privacy.clip-norm": 0.01, "data.max-tokens": 32}
    whole = Site(table(tmp_path / "with.csv", [*SHORT, LONG]), model)
    assert problems(order(run, model), run, whole, Site(table(tmp_path / "without.csv", SHORT), model)) == []
    assert not whole.serve(order(run, model), run).reason


def test_a_model_that_mixes_is_refused_by_the_site(tmp_path: Path) -> None:
    """Hole 4: whatever the check says, a site that trains must be right, so a long rope is refused or exact."""
    model = llama(tmp_path / "model", ROPES["longrope"], 32)
    settings = settings_from({**RUN, "model.name": f"hf/{model}", "lora.targets": "q_proj", "data.max-tokens": 64})
    run = {**RUN, "lora.targets": "q_proj", "data.max-tokens": 64}
    try:
        MODELS.learner(settings, "cpu")
    except ConfigError:
        served = Site(table(tmp_path / "records.csv", SHORT), model).serve(order(run, model), run)
        assert served.reason and not served.reserved
