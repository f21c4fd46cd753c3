"""Steady LoRA: what strict ε asks for (`docs/results.md`), made of known parts, with nothing to tune.

    site i:   g_i = Σ_j clip(∇_B ℓ_j, C) + noise, over a Poisson sample at the server's B; one step's sum, and no step of its own
    server:   B = B - η mean of g_i / batch;   the model is a running average of B over about the last quarter of the rounds

A stays as the seed draws it, so that the noise enters the product once (FFA-LoRA, arXiv 2403.12313). One step a round is gradient
descent on all records at once: no site drifts away, and with ``trust = "secure-sum"`` the sites need one noise between them. η
follows from the noise (`lalora_flwr.training.rate`). ``lora.head = "ridge"`` lets the first round release a head to start from.
"""

from dataclasses import dataclass

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import ONLY_B
from lalora_flwr.methods.travel import TRAINED
from lalora_flwr.settings import Settings


@dataclass(frozen=True)
class SteadyLora(Method):
    """The method, which is made for rounds of one step."""

    def check(self, settings: Settings) -> None:
        super().check(settings)
        if settings.train.local_steps != 1:
            raise ConfigError(
                f"train.local-steps = {settings.train.local_steps}: must be 1 for strategy = 'steady-lora'; num-rounds is then "
                "the number of steps, such as 150"
            )


METHOD = SteadyLora(schedule=ONLY_B, travel=TRAINED, average=True)
"""Sites send the step as an adapter, or with ``train.step-at = "server"`` as a gradient: the same numbers."""
