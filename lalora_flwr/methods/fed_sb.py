"""Fed-SB (arXiv 2502.15436): a core between two fixed factors, W = W0 + (α/r) B R A, of which only R (r, r) trains.

    site i:   for k = 1 … K:  g = Σ_j clip(∇_R ℓ_j, C) + N(0, σ²C² I), divided by the expected batch size;  step on R
    server:   R = mean of R_i        (exact: B mean(R_i) A = mean(B R_i A))

Only R travels, r² numbers a layer however wide it is, so that noise falls on few of them and r can be large: 64 to 200 in the
paper. Safe under record-level DP but for its start, the singular vectors of a gradient of private records. Left out: here the
seed draws orthonormal A and B (`lalora_flwr.adapter.lora_sb`).
"""

from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import BOTH
from lalora_flwr.methods.travel import TRAINED

METHOD = Method(schedule=BOTH, travel=TRAINED, form="lora-sb")
