"""How a model of transformers is loaded elsewhere. In the lines ``adapter`` is the adapter's folder."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import PretrainedConfig

from lalora_flwr.models.published import CAUSAL_LM, FEATURE_EXTRACTION, SEQ_CLS, Published

WITH_POOLER = ("bert", "roberta", "xlm-roberta", "albert", "mobilebert")  # which the mean over tokens has no use for
INSIDE = "encoder."  # where `MeanPooledClassifier` keeps the published model


def hf_published(
    config: PretrainedConfig, source: str, revision: str | None, task: str, *, mean: bool, weights: bool
) -> Published:
    """How a model is loaded elsewhere.

    Args:
        config: the model's.
        source: a folder, or a repository of the hub.
        revision: of the repository.
        task: ``text`` or ``language``.
        mean: whether the text's vector is the mean over its tokens.
        weights: whether it has its published weights.
    """
    folder = Path(source)
    name = str(folder.absolute()) if folder.is_dir() else source  # what a folder says it came from may be long past
    at = f"{name!r}, revision={revision!r}" if revision else repr(name)
    kind, task_type, more = "AutoModelForSequenceClassification", SEQ_CLS, ", config=config, ignore_mismatched_sizes=True"
    if task == "language":
        kind, task_type, more = "AutoModelForCausalLM", CAUSAL_LM, ""
    elif mean:
        without = ", add_pooling_layer=False" if config.model_type in WITH_POOLER else ""
        kind, task_type, more = "AutoModel", FEATURE_EXTRACTION, without
    configured = ("config = AutoConfig.from_pretrained(adapter)",) if "config=" in more or not weights else ()
    loading = (f"from transformers import {'AutoConfig, ' if configured else ''}{kind}", *configured)
    if weights:
        loading += (f"base = {kind}.from_pretrained({at}{more})",)
    else:
        seed = "torch.manual_seed(0)  # its weights are random: those of this torch version"
        loading += ("import torch", seed, f"base = {kind}.from_config(config{more.partition(', config')[0]})")
    return Published(name, task_type, loading, _license(folder), INSIDE if mean else "")


def _license(folder: Path) -> str:
    """The licence in the front matter of a folder's model card; empty if it names none."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    front = re.match(r"---\n(.*?)\n---", card, re.S)
    found = re.search(r"^license: *([\w.-]+)", front[1], re.M) if front else None
    return found[1] if found else ""
