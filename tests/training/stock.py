"""Run in a process of its own, without the package: for each run the lines of its model card, and what the model then says.

python stock.py FOLDER...   prints {folder: {"same": …, "merged": …, "accuracy": …}} as JSON; a folder holds `inputs.pt`
"""

import json
import re
import sys
import warnings
from pathlib import Path

import torch

warnings.simplefilter("ignore")


def said(names, inputs):
    if "logits" in names:  # a head of its own
        return names["logits"](**inputs)
    if isinstance(inputs, dict):
        return names["model"](**inputs).logits
    return names["model"](inputs)


def checked(folder):
    card = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", card, re.S):
        exec(block.replace('adapter = "."', f"adapter = {str(folder / 'adapter')!r}"), names)
    kept = torch.load(folder / "inputs.pt")
    with torch.no_grad():
        logits = said(names, kept["inputs"])
        whole = type(names["model"]).__name__
        names["model"] = names["model"].merge_and_unload()
        merged = said(names, kept["inputs"])
    labels = kept["labels"]
    right, loss = torch.tensor(0.0), torch.tensor(0.0)
    if labels.dtype == torch.long and labels.dim() == 1:
        right = (logits.argmax(-1) == labels).float().mean()
    elif labels.dim() == 2 and labels.dtype == torch.float:  # several classes
        right = ((logits > 0) == (labels > 0.5)).all(1).float().mean()
    elif labels.dtype == torch.float:
        loss = (logits.squeeze(1) - labels).square().mean()
    return {
        "same": float((logits - kept["logits"]).abs().max()),
        "merged": float((merged - kept["logits"]).abs().max()),
        "accuracy": float(right),
        "loss": float(loss),
        "kind": whole,
    }


found = {folder: checked(Path(folder)) for folder in sys.argv[1:]}
assert not any(name.split(".")[0] == "lalora_flwr" for name in sys.modules)
print(json.dumps(found))
