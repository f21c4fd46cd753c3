"""An adapter's folder, so that stock PEFT with the published base model gives the run's own model from it alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lalora_flwr.adapter.saved import CONFIG, HEAD_FILE, WEIGHTS
from lalora_flwr.ground.files import PUBLIC, replace_file
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.published import SEQ_CLS

WRAPPED = "base_model.model."  # where PEFT keeps the base model, and what its tensor names begin with


def head_modules(base: BaseModel) -> dict[str, nn.Module]:
    """The modules that a head consists of, by name: PEFT takes all whose name ends with the head's."""
    return {name: module for name, module in base.module.named_modules() if base.head and name.endswith(base.head)}


def finish_folder(folder: Path, base: BaseModel, *, trained: bool, prefix: str = WRAPPED) -> None:
    """Complete what PEFT has written of an adapter.

    A head that the published weights lack is saved, trained or not. The configuration names the task, the class names and the
    base model by its public name. Of a network that is a wrapper of this package, the adapter becomes that of the model inside,
    and the head a file of its own.

    Args:
        folder: as ``PeftModel.save_pretrained`` has left it.
        base: of the adapter.
        trained: whether the head is among PEFT's tensors.
        prefix: what their names begin with before those of the base model; for prompts another one.
    """
    public = base.published
    tensors = load_file(folder / WEIGHTS)
    whole = trained or base.fresh_head or public.task_type == SEQ_CLS  # for which PEFT asks for one in any case
    if whole and not trained:
        tensors.update({prefix + name: value for name, value in head_tensors(base).items()})
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = public.name or None
    config["revision"] = base.provenance.revision or None
    config["modules_to_save"] = [base.head] if whole and base.head and not public.inside else None
    if public.task_type:
        config["task_type"], config["auto_mapping"] = public.task_type, None
    if public.inside:
        config["exclude_modules"] = None  # it says what belongs to the head, which the model inside has not
        head = {name: value for name, value in tensors.items() if not name.startswith(WRAPPED + public.inside)}
        prefix = f"{WRAPPED}{base.head}."
        replace_file(folder / HEAD_FILE, save({name.removeprefix(prefix): value for name, value in head.items()}), mode=PUBLIC)
        tensors = {name.replace(public.inside, "", 1): value for name, value in tensors.items() if name not in head}
    replace_file(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}), mode=PUBLIC)
    replace_file(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n", mode=PUBLIC)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card, a form to fill in
    base.save_config(folder)


def head_tensors(base: BaseModel) -> dict[str, Tensor]:
    """What the network's head now holds, by name in the network, on the CPU in float32 or better."""
    found = {}
    for name, module in head_modules(base).items():
        for own, value in module.state_dict().items():
            found[f"{name}.{own}"] = value.detach().cpu().to(torch.promote_types(value.dtype, torch.float32))
    return found
