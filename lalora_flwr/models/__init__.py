"""Base models by name.

embedded/vit-digits          the small vision transformer that ships with the package
timm/<name or folder>        an image classifier of timm
hf/<repository or folder>    a text model of transformers
"""

from __future__ import annotations

import torch

from lalora_flwr.data.data_set import Facts
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import ModelSettings

FRESH_SEED = 0  # of random weights: the same on every site and in every run, so that their digest can be compared


def load_base_model(
    settings: ModelSettings, facts: Facts, max_tokens: int = 128, answer: str = "", *, weights: bool = True
) -> BaseModel:
    """Load a frozen base model for a data set.

    Args:
        settings: which model.
        facts: what it is built for.
        max_tokens, answer: of the data settings, for text models.
        weights: False builds only the architecture on the ``meta`` device, to count and to plan: no hub, no memory.

    Raises:
        ConfigError: unknown model, or one that cannot be built for the data set or be loaded.
    """
    if settings.name == "embedded/vit-digits":
        from lalora_flwr.models.embedded import embedded_model

        return embedded_model(settings, facts)
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if weights else "meta"):
        torch.manual_seed(FRESH_SEED)
        if settings.name.startswith("timm/"):
            from lalora_flwr.models.timm_models import timm_model

            return timm_model(settings, facts, weights=weights)
        from lalora_flwr.models.hf_models import hf_model

        return hf_model(settings, facts, max_tokens, answer, weights=weights)
