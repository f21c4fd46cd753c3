"""A private ridge head on frozen features: no LoRA, no learning rate, best in one round of one step on all records.

    server:   c = mean features of public records; sends c
    site i:   G_i = Σ_j √w x_j x_jᵀ,  R_i = Σ_j √(1 - w) y_j x_jᵀ, each record clipped to C;  + N(0, σ²C² I);  sends both
    server:   means;  head = R (G with eigenvalues of at least λ)⁻¹

`lalora_flwr.adapter.ridge` has the formulas. Any number of rounds and steps is one long sum; the noise is least for one step with
``train.batch-size`` at least the records of a site.
"""

from lalora_flwr.adapter.ridge import CROSS, GRAM, LENGTH
from lalora_flwr.adapter.slots import Layout, Mask
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import Schedule
from lalora_flwr.methods.travel import EVERYTHING_DOWN
from lalora_flwr.settings import Settings
from lalora_flwr.wire.public import Public

RATE = 0.1  # any would do
MOST_STEPS = 100.0  # times LENGTH: no sum can then grow beyond what a server takes for sane


class Sums(Schedule):
    """Both sums, at every step."""

    text, period = "sums", 1

    def mask(self, layout: Layout, server_round: int, step: int, directive: Public) -> Mask:
        return layout.of(GRAM, CROSS)

    def ever(self, layout: Layout) -> Mask:
        return layout.of(GRAM, CROSS)


class RidgeHead(Method):
    """The method, which needs steps that are sums of gradients and nothing else."""

    def check(self, settings: Settings) -> None:
        super().check(settings)
        if settings.train.optimizer != "sgd":
            raise ConfigError(f"train.optimizer = {settings.train.optimizer!r}: must be 'sgd' for strategy = 'ridge-head'")
        if settings.lora.schedule != "auto":
            raise ConfigError(f"lora.schedule = {settings.lora.schedule!r}: must be 'auto' for strategy = 'ridge-head'")
        if settings.lora.form not in ("auto", "ridge-head"):
            raise ConfigError(f"lora.form = {settings.lora.form!r}: must be 'auto' for strategy = 'ridge-head'")
        if settings.privacy.clip_norm > LENGTH:
            raise ConfigError(
                f"privacy.clip-norm = {settings.privacy.clip_norm:g}: at most {LENGTH:g} for strategy = 'ridge-head'"
            )
        if (settings.train.lr or RATE) * settings.num_rounds * settings.train.local_steps > MOST_STEPS:
            raise ConfigError(
                f"train.lr = {settings.train.lr:g}: times all local steps at most {MOST_STEPS:g} for strategy = 'ridge-head', "
                "whose result does not depend on it"
            )


METHOD = RidgeHead(schedule=Sums(), travel=EVERYTHING_DOWN, form="ridge-head", full_batch=True, own_rate=RATE)
