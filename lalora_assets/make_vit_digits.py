"""Pretrain the embedded vision transformer on the public upright digits and write its weights.

Usage: ``python -m lalora_assets.make_vit_digits [--output PATH]``; under a minute on one CPU thread. Private and
test records play no part in training; the accuracy on the test part is only printed, to show how much the shift costs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lalora_flwr.data import digits
from lalora_flwr.models.embedded import ASSET_NAME, vit_digits_architecture

SEED = 0
HELD_OUT = 60  # public records kept from training, to see that the model generalises
EPOCHS = 500
BATCH_SIZE = 85
PEAK_LR = 4e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
PIXEL_NOISE = 0.2  # standard deviation, in units of the [-1, 1] range


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Stretch and shift each image (n, 1, 8, 8) at random and add pixel noise; no turning, which is the task."""
    scale = 0.8 + 0.45 * torch.rand(len(images), 2, generator=generator)
    offset = 0.6 * torch.rand(len(images), 2, generator=generator) - 0.3  # half-widths of the image: up to 1.2 pixels
    warped = digits.warp(images, torch.cat([torch.diag_embed(scale), offset.unsqueeze(2)], dim=2))
    return warped + PIXEL_NOISE * torch.randn(images.shape, generator=generator)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images (n, 1, 8, 8) whose largest logit is at the label."""
    return float((model.eval()(images).argmax(dim=1) == labels).float().mean())


def pretrain(images: Tensor, labels: Tensor) -> nn.Module:
    """The architecture trained on the given records with AdamW under a one-cycle learning rate."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = vit_digits_architecture().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    batches = len(images) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=EPOCHS * batches)
    for _ in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        for batch in order[: batches * BATCH_SIZE].view(batches, BATCH_SIZE):
            logits = model(augment(images[batch], generator))
            optimizer.zero_grad()
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model


def main() -> None:
    """Pretrain, report two accuracies, write the weights as float16."""
    parser = argparse.ArgumentParser(description="Pretrain the embedded vision transformer.")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name(ASSET_NAME), help="file to write")
    output: Path = parser.parse_args().output

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    images, labels = digits.public_part()
    model = pretrain(images[:-HELD_OUT], labels[:-HELD_OUT])
    print(f"upright public digits, held out: {accuracy(model, images[-HELD_OUT:], labels[-HELD_OUT:]):.3f}")
    print(f"tilted test digits: {accuracy(model, *digits.test_part()):.3f}")
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, output)
    print(f"wrote {output} ({output.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
