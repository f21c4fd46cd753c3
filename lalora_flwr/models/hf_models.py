"""Text models of transformers, from a folder or the hub: safetensors only, never a repository's own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
)
from transformers import logging as transformers_logging

from lalora_flwr.config import ModelSettings
from lalora_flwr.data.data_set import Facts
from lalora_flwr.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.known import known_config
from lalora_flwr.models.mean_pooling import MeanPooledClassifier, wants_mean
from lalora_flwr.models.provenance import Provenance, commit_of, provenance
from lalora_flwr.models.targets import TRANSFORMERS_TARGETS
from lalora_flwr.models.text import CausalLanguageModel, SequenceClassifier

CHECK_TOKENS = 12  # length of the made-up texts of the check before training
SAFE: dict[str, Any] = {"trust_remote_code": False}


def hf_model(settings: ModelSettings, facts: Facts, max_tokens: int, answer: str, *, weights: bool) -> BaseModel:
    """A text model for a task.

    Args:
        settings: ``hf/<repository or folder>``, revision, pooling, whether the published weights are wanted.
        facts: the data set's.
        max_tokens, answer: of the data settings.
        weights: False builds the architecture only, on whatever device is the default, without a tokenizer.

    Raises:
        ConfigError: an unknown architecture, or files that are missing, out of reach or no safetensors.
    """
    source = settings.name.removeprefix("hf/")
    place: dict[str, Any] = {} if Path(source).expanduser().is_dir() else {"revision": settings.revision or None}
    source = str(Path(source).expanduser()) if not place else source
    transformers_logging.set_verbosity_error()  # its advice on missing heads is what fresh_head means
    try:
        config = _config(source, place, weights)
        if config.model_type not in TRANSFORMERS_TARGETS:
            kinds = ", ".join(TRANSFORMERS_TARGETS)
            raise ConfigError(f"model.name = {settings.name!r}: architecture {config.model_type!r}; must be one of {kinds}")
        tokenizer = AutoTokenizer.from_pretrained(source, **place, **SAFE) if weights else None
        if tokenizer is not None and tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked; any token will do
        if config.pad_token_id is None and tokenizer is not None:
            config.pad_token_id = tokenizer.pad_token_id
        module, fresh = _module(settings, facts, source, place, config, weights)
        files, revision = _files(source, place) if weights else ([], "")
    except ConfigError:
        raise
    except Exception as error:  # no network, missing or broken files: transformers raises many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model.name = {settings.name!r}: cannot be loaded: {reason}; a folder needs config.json, the tokenizer's files and "
            "weights as safetensors"
        ) from None
    finally:
        transformers_logging.set_verbosity_warning()
    known = provenance(module, files, revision) if weights else Provenance()
    longest = min(max_tokens, int(getattr(config, "max_position_embeddings", max_tokens)))
    if config.model_type == "roberta":
        longest = min(max_tokens, config.max_position_embeddings - 2)  # its positions start at 2
    targets = TRANSFORMERS_TARGETS[config.model_type]
    shape = (min(CHECK_TOKENS, longest),)
    if facts.task == "language":
        vocabulary = int(config.vocab_size)
        return CausalLanguageModel(
            settings.name, module, "", targets, shape, vocabulary, False, known, tokenizer, longest, answer
        )
    head = "classifier" if hasattr(module, "classifier") else "score"
    return SequenceClassifier(settings.name, module, head, targets, shape, len(facts.labels), fresh, known, tokenizer, longest)


def _config(source: str, place: dict[str, Any], weights: bool) -> PretrainedConfig:
    known = None if weights or not place else known_config(source)  # a plan does not ask the hub for what is known
    return known or AutoConfig.from_pretrained(source, **place, **SAFE)


def _module(
    settings: ModelSettings, facts: Facts, source: str, place: dict[str, Any], config: PretrainedConfig, weights: bool
) -> tuple[nn.Module, bool]:
    """The network, and whether its head is random."""
    mean = settings.pooling == "mean" or (settings.pooling == "auto" and wants_mean(Path(source)))
    kind: Any = AutoModelForSequenceClassification
    if facts.task == "language":
        kind = AutoModelForCausalLM
    elif mean:
        kind = AutoModel
    else:
        config.num_labels = len(facts.labels)
    extra = {"add_pooling_layer": False} if mean and config.model_type in ("bert", "roberta") else {}
    if not (weights and settings.pretrained):
        module, missing = kind.from_config(config, **SAFE, **extra), [""]
    else:
        module, report = kind.from_pretrained(
            source,
            config=config,
            use_safetensors=True,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a published head of other classes; anything else is refused below
            **place,
            **SAFE,
            **extra,
        )
        missing = [*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])]
        body = [name for name in missing if not name.startswith(("classifier.", "score.", "pre_classifier."))]
        if body:
            raise ConfigError(f"model.name = {settings.name!r}: the weights lack {body[0]}; they are of another architecture")
    module = module.eval()
    if mean:
        return MeanPooledClassifier(module, len(facts.labels)).to(next(module.parameters()).dtype), True
    return module, bool(missing)


def _files(source: str, place: dict[str, Any]) -> tuple[list[Path], str]:
    """The files that were read, and the commit of a hub repository."""
    if not place:
        folder = Path(source)
    else:
        from huggingface_hub import hf_hub_download

        folder = Path(hf_hub_download(source, "config.json", **place, local_files_only=True)).parent
    names = ("*.safetensors", "config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")
    files = sorted({file for name in names for file in folder.glob(name) if file.is_file()})
    return files, commit_of(folder / "config.json") if place else ""
