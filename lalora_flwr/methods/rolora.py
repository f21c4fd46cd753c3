"""RoLoRA: alternating minimisation by round (arXiv 2502.01755).

    round t odd:   sites train B, A frozen; reply with B_i;   server: B = mean of B_i
    round t even:  sites train A, B frozen; reply with A_i;   server: A = mean of A_i

Averaging is exact in every round, since the other factor is the same everywhere. The parity comes from the server's
round, not from a counter on the site, so a site that misses a round stays in step. Sites keep no state between rounds:
both factors travel down, only the trained one travels up.
"""

from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import schedule_of
from lalora_flwr.methods.travel import TRAINED

METHOD = Method(schedule=schedule_of("round:BA"), travel=TRAINED)
