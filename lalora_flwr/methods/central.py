"""Centralised DP-LoRA: one site holds all records, and nothing is averaged. What federated methods are measured against.

    site:     for k = 1 … K:  g = Σ_j clip((∇_A ℓ_j, ∇_B ℓ_j), C) + N(0, σ²C² I), divided by the expected batch size;
              step on A and B together
    server:   A, B = those of the site

The same noise falls on the sum over all records once, and not on each site's. ε is that of any site. Every other strategy is
centralised too with ``num-supernodes = 1``; this one is there so that a table of strategies can name it, and refuses more sites.
"""

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import BOTH
from lalora_flwr.settings import Settings


class Central(Method):
    """The method, which has one site."""

    def check(self, settings: Settings) -> None:
        super().check(settings)
        if settings.num_supernodes != 1:
            raise ConfigError(
                f"num-supernodes = {settings.num_supernodes}: must be 1 for strategy = 'central-dp-lora', whose one site holds "
                "all records"
            )


METHOD = Central(schedule=BOTH)
