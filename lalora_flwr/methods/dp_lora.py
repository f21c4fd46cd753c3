"""DP-LoRA: both factors at every step, as FedIT (arXiv 2305.05644) under DP-SGD (DP-LoRA: arXiv 2312.17493).

    site i:   for k = 1 … K:  g = Σ_j clip((∇_A ℓ_j, ∇_B ℓ_j), C) + N(0, σ²C² I), divided by the expected batch size;
              step on A and B together
    server:   A = mean of A_i,  B = mean of B_i

One clip norm bounds A and B jointly. The noise enters the product twice: (B + N_B)(A + N_A) holds the term N_B N_A.
"""

from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import BOTH

METHOD = Method(schedule=BOTH)
