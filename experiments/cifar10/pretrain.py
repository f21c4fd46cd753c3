"""Pretrain a small Swin transformer on the public animals of CIFAR-10 and save it as a timm folder.

    python -m experiments.cifar10.pretrain OUT MODEL_FOLDER [--epochs N] [--threads N] [--device DEVICE]

OUT is the folder written by `experiments.cifar10.prepare`. The result loads with
`timm.create_model("local-dir:MODEL_FOLDER", pretrained=True)`, or with `num_classes=4` for a fresh head.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from datasets import disable_progress_bars, load_dataset
from timm.models import save_for_hf
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.247, 0.2435, 0.2616)
BATCH = 128
RATE = 2e-3
ARCHITECTURE = "swin_tiny_patch4_window7_224"
SIZES: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 96,
    "depths": (4, 2),
    "num_heads": (4, 8),
}


def load(file: Path) -> tuple[Tensor, Tensor, list[str]]:
    """All images of a part decoded to one uint8 tensor (N, 3, 32, 32), their labels and the label names."""
    if not file.is_file():
        sys.exit(f"error: {file} does not exist; write it with `python -m experiments.cifar10.prepare`")
    data = load_dataset("parquet", data_files=str(file), split="train")
    images = np.stack([np.asarray(image.convert("RGB")) for image in data["image"]])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(data["label"][:]), data.features["label"].names


def normalise(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augment(images: Tensor, padding: int = 4) -> Tensor:
    """A random crop of each zero-padded image, and a mirror image of every second one."""
    count, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1))  # on the CPU: the same images on any device
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    flipped = torch.rand(count, 1) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    crops = padded.permute(0, 2, 3, 1)[torch.arange(count).view(-1, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1)]
    return crops.permute(0, 3, 1, 2)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = 0
    for chunk, target in zip(images.split(500), labels.split(500), strict=True):
        with torch.autocast(images.device.type, torch.bfloat16):
            right += int((model(normalise(chunk)).argmax(1) == target).sum())
    return right / len(labels)


def train(model: nn.Module, images: Tensor, labels: Tensor, test: tuple[Tensor, Tensor], epochs: int) -> float:
    """AdamW with a warm-up over the first 5 % of the steps and a cosine to zero; the final accuracy on `test`."""
    optimiser = torch.optim.AdamW(param_groups_weight_decay(model, 0.05, model.no_weight_decay()), lr=RATE)
    steps = epochs * (len(images) // BATCH)
    warm_up = max(1, steps // 20)

    def factor(step: int) -> float:
        return (step + 1) / warm_up if step < warm_up else (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    start, result = time.perf_counter(), 0.0
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        batches = torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]
        for batch in batches:
            with torch.autocast(images.device.type, torch.bfloat16):
                scores = model(normalise(augment(images[batch])))
            loss = F.cross_entropy(scores.float(), labels[batch], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += loss.item()
        result = accuracy(model, *test)
        minutes = (time.perf_counter() - start) / 60
        loss_mean = total / len(batches)
        print(f"epoch {epoch}/{epochs}: loss {loss_mean:.3f}, test accuracy {result:.4f}, {minutes:.1f} min", flush=True)
    return result


def pretrain(out: Path, folder: Path, epochs: int, device: str = "cpu") -> None:
    disable_progress_bars()
    images, labels, names = load(out / "public.parquet")
    test_images, test_labels, _ = load(out / "public-test.parquet")
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, num_classes=len(names), drop_path_rate=0.05, **SIZES)
    print(f"{sum(weight.numel() for weight in model.parameters())} parameters, {len(images)} training images", flush=True)
    model, images, labels = model.to(device), images.to(device), labels.to(device)
    result = train(model, images, labels, (test_images.to(device), test_labels.to(device)), epochs)
    model.cpu()
    training = {"data": "CIFAR-10 animals", "epochs": epochs, "test_accuracy": result}
    save_for_hf(
        model,
        str(folder),
        model_config={"label_names": names, "training": training, "pretrained_cfg": {"tag": "cifar10_animals", "license": None}},
        model_args=SIZES,
        safe_serialization=True,
        data_config={"input_size": (3, 32, 32), "mean": MEAN, "std": STD, "crop_pct": 1.0, "interpolation": "bicubic"},
    )
    print(f"saved {folder}: test accuracy {result:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pretrain a small Swin transformer on CIFAR-10's animals.")
    parser.add_argument("out", type=Path, help="folder written by experiments.cifar10.prepare")
    parser.add_argument("model_folder", type=Path, help="folder for config.json and model.safetensors")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pretrain(arguments.out, arguments.model_folder, arguments.epochs, arguments.device)
