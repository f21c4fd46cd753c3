"""DP-SGD on something else than LoRA: ``bitfit``, ``bottleneck``, three kinds of prompts, ``head-only``.

    site i:   for k = 1 … K:  g = Σ_j clip(∇ℓ_j, C) + N(0, σ²C² I), divided by the expected batch size;
              step on all that the form trains
    server:   the mean of the sites' tensors

With one step a round this is DP-SGD over all sites, else local steps with noise at the site. Each strategy is a form and nothing
more: ``lora.form`` puts the same forms under other strategies. `lalora_flwr.adapter` has the forms and their papers. Safe under
record-level DP: what leaves a site is clipped and noised before anything else happens to it.
"""

from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import BOTH
from lalora_flwr.methods.travel import TRAINED


def _of(form: str) -> Method:
    return Method(schedule=BOTH, travel=TRAINED, form=form)


BITFIT = _of("bitfit")
BOTTLENECK = _of("bottleneck")
SOFT_PROMPT = _of("soft-prompt")
VISUAL_PROMPT = _of("visual-prompt")
PIXEL_PROMPT = _of("pixel-prompt")
HEAD_ONLY = _of("head")
