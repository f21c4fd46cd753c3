"""LA-LoRA: local alternating low-rank adaptation (arXiv 2602.19926, Algorithm 1).

Adapted weight: W = W0 + (α/r) B A, with A of shape (r, n) and B of shape (m, r), B = 0 at the start.

    server, round t:  send A, B to the participating sites
    site i:           for k = 1 … K:
                          k odd:  train B, A frozen;   k even: train A, B frozen
                          g = Σ_j clip(∇ℓ_j, C) + N(0, σ²C² I),  divided by the expected batch size
                          ĝ = gauss5 * g   (rows of A along n, columns of B along m; never across r)
                          step on ĝ
                      reply with A_i, B_i
    server:           A = mean of A_i,  B = mean of B_i

B goes first because at B = 0 the gradient of A is exactly zero: an A-first step would release only noise. The order
is a switch (``lora.schedule = "step:AB"``), and the filter another (``filter.name = "none"``).
"""

from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import schedule_of
from lalora_flwr.methods.smoothing import GAUSS5

METHOD = Method(schedule=schedule_of("step:BA"), filter=GAUSS5)
