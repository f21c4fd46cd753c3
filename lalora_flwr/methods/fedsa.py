"""FedSA-LoRA (arXiv 2410.01463): A and B train together, A alone is shared, and B stays at its site.

    site i:   A from the server, B_i as it was after the site's last round, zero before the first
              for k = 1 … K:  g = Σ_j clip((∇_A ℓ_j, ∇_B ℓ_j), C) + N(0, σ²C² I), divided by the expected batch size;
                              step on A and B_i together
              keeps B_i;  sends A_i
    server:   A = mean of A_i

A trained head stays at its site, too, as in the paper's experiments on GLUE. There is no common model: the server holds A, and
what it evaluates and saves is A with B = 0, the frozen model. Each site's own model is (A, B_i): the site evaluates and keeps it
(`lalora_flwr.site.own_part`); a simulation, which holds all sites, tells the mean quality of theirs.

With one local step a round the server may take the step on A (``train.step-at = "server"``, ``trust = "secure-sum"``): the site
sends the noised gradient of A and takes a step of plain SGD along that of B_i. In a secure sum A has a share of the noise and B_i
all of the site's own (`PrivateSum.release_share`; ``docs/secure_sum.md`` has the argument): less noise in A, as much in B_i.

Safe under record-level DP as published only with clip and noise on both factors at every step: the next A_i is a function of B_i,
and a B_i without noise would let records out by way of A. So (A_i, B_i) of all rounds together have the site's (ε, δ). What is
released is A; ε holds against whoever gets to see B as well, and that B stays at the site is not counted in its favour.
"""

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import BOTH
from lalora_flwr.methods.travel import SHARE_A
from lalora_flwr.settings import Settings


class FedSA(Method):
    """The method, whose name is an owner's reason to believe that B stays."""

    def check(self, settings: Settings) -> None:
        super().check(settings)
        if settings.merge.travel not in ("auto", "share-a"):
            raise ConfigError(
                f"merge.travel = {settings.merge.travel!r}: must be 'auto' for strategy = 'fedsa-lora', which shares A alone"
            )


METHOD = FedSA(schedule=BOTH, travel=SHARE_A)
