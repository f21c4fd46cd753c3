"""The keys of local training."""

from __future__ import annotations

from dataclasses import dataclass

from lalora_flwr.settings.keys import Kind, at_least, choice, key, non_negative, whole, within

BUDGET, PERFORMANCE = Kind.BUDGET, Kind.PERFORMANCE


@dataclass(frozen=True)
class TrainSettings:
    """Local training on a site."""

    local_steps: int = whole(1, 100_000, 10, "noisy steps K a site takes in a round", kind=BUDGET)
    batch_size: int = whole(
        1,
        10**9,
        40,
        "expected records of a Poisson batch; a site of n records samples at rate batch-size / n",
        kind=BUDGET,
    )
    augmentations: int = whole(
        1,
        64,
        1,
        "views of each image, shifted at random by up to an eighth of its side, whose gradients are averaged before the clip; 1: "
        "the image as it is. The price is time, not ε",
    )
    flips: bool = key(False, "half of the views of train.augmentations are mirrored left to right")
    optimizer: str = choice("sgd", "optimizer; a site's is made afresh each round (see train.step-at)", "sgd", "adamw")
    lr: float = key(
        0.0,
        "learning rate; 0: by a rule from the noise (lalora plan shows it), so that there is nothing to tune on private records",
        "0, or a number from 1e-08 to 10000",
        lambda v: v == 0 or 1e-8 <= v <= 1e4,
    )
    momentum: float = within(0, 0.999, 0.0, "SGD momentum")
    weight_decay: float = within(0, 10, 0.0, "weight decay of the optimizer")
    step_at: str = choice(
        "auto",
        "who takes the optimizer's step: site; server (needs train.local-steps = 1): sites send gradients with noise, and the "
        "optimizer's momentum and the filter's memory go on from round to round; auto: server with trust = secure-sum, else site",
        "auto",
        "site",
        "server",
    )
    decay: str = choice(
        "none", "learning rate over the rounds, where the server steps: none, or linear down to 0", "none", "linear"
    )
    max_physical_batch: int = at_least(
        0, 0, "records processed at once; 0 takes the whole batch (same result, more memory)", kind=PERFORMANCE
    )
    gradient_checkpointing: bool = key(
        False, "recompute activations in the backward pass (same result, less memory, slower)", kind=PERFORMANCE
    )
    device: str = choice(
        "auto", "where a site trains: auto takes the GPU it can see, else the CPU", "auto", "cpu", "cuda", kind=PERFORMANCE
    )
    num_gpus: float = non_negative(
        0.0, "share of a GPU that Ray reserves for a site; with 0 it hides GPUs from sites", kind=PERFORMANCE
    )
    num_threads: int = at_least(1, 1, "CPU threads a site computes with; Ray reserves as many CPUs for it", kind=PERFORMANCE)
    share_passes: str = choice(
        "exact",
        "several sites in one pass of the model, in the inline engine where it is faster. exact: with the bits of one after the "
        "other, on CPUs alone; rounding: up to rounding, which varies from run to run, also on GPUs, few records and texts of "
        "different lengths; off: never",
        "exact",
        "rounding",
        "off",
        kind=PERFORMANCE,
    )
