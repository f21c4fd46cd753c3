"""FFA-LoRA: A is drawn once from the run's seed and never trains (arXiv 2403.12313).

    site i:   for k = 1 … K:  g = Σ_j clip(∇_B ℓ_j, C) + N(0, σ²C² I), divided by the expected batch size;  step on B
    server:   B = mean of B_i        (exact: mean(B_i) A = mean(B_i A))

Only B travels, in both directions: every site draws the same A from the public seed, and refuses if it differs.
"""

from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import ONLY_B
from lalora_flwr.methods.travel import TRAINED

METHOD = Method(schedule=ONLY_B, travel=TRAINED)
