"""Text models of transformers, from a folder or the hub: safetensors only, never a repository's own code."""

from __future__ import annotations

import json
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
    PreTrainedTokenizerBase,
)

from lalora_flwr.data.data_set import Facts
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import expanded
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.hf_published import WITH_POOLER, hf_published
from lalora_flwr.models.known import known_config
from lalora_flwr.models.mean_pooling import MeanPooledClassifier, wants_mean
from lalora_flwr.models.provenance import Provenance, commit_of, provenance
from lalora_flwr.models.quiet import quiet_transformers
from lalora_flwr.models.targets import CAUSAL, TRANSFORMERS_TARGETS
from lalora_flwr.models.text import CausalLanguageModel, SequenceClassifier, embedding_rows
from lalora_flwr.settings import ModelSettings

TOKENS = 12  # length of made-up texts
SAFE = {"trust_remote_code": False}
HubPlace = dict[str, str | None]  # arguments that say which state of a repository; empty for a folder
# Those whose attention keeps the records of a batch apart; the others pack them into one sequence, or were not tried.
ATTENTION = (None, "eager", "sdpa")
POSITIONS_BEHIND_PADDING = ("roberta", "xlm-roberta")  # the first token's position is the number of the padding plus 1
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
FILES = ("config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")
# of a configuration: what does not change what the network computes
NAMES = ("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "id2label", "label2id")


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
    source, place = _place(settings)
    try:
        with quiet_transformers():
            config = _config(source, place, weights)
            kinds = CAUSAL if facts.task == "language" else tuple(TRANSFORMERS_TARGETS)
            if config.model_type not in kinds:
                wanted = ", ".join(kinds) + (" for language modelling" if facts.task == "language" else "")
                raise ConfigError(f"model.name = {settings.name!r}: architecture {config.model_type!r}; must be one of {wanted}")
            if facts.task == "language" and getattr(config, "use_bidirectional_attention", False):
                raise ConfigError(f"model.name = {settings.name!r}: its tokens see those after them; it is no language model")
            tokenizer = _tokenizer(settings, facts, source, place, config) if weights else None
            module, fresh = _module(settings, facts, source, place, config, weights)
            if tokenizer is not None:
                _check_vocabulary(settings, tokenizer, module)
            files, revision = _files(settings, source, place) if weights else ([], "")
    except ConfigError:
        raise
    except Exception as error:  # no network, missing or broken files: transformers raises many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model.name = {settings.name!r}: cannot be loaded: {reason}; a folder needs config.json, the tokenizer's files and "
            "weights as safetensors"
        ) from None
    known = Provenance() if tokenizer is None else provenance(module, files, revision, _about(config, tokenizer))
    longest = _longest(settings, config, max_tokens)
    targets = TRANSFORMERS_TARGETS[config.model_type]
    mean = isinstance(module, MeanPooledClassifier)
    public = hf_published(config, source, place.get("revision"), facts.task, mean=mean, weights=settings.pretrained)
    shape = (min(TOKENS, longest),)
    if facts.task == "language":
        vocabulary = int(config.vocab_size)
        return CausalLanguageModel(
            *(settings.name, module, "", targets, shape, vocabulary, False, known, tokenizer, longest, answer), published=public
        )
    return SequenceClassifier(
        *(settings.name, module, _head(module), targets, shape, facts.outputs, fresh, known, tokenizer, longest),
        labels=facts.labels,
        problem=facts.problem,
        published=public,
    )


def _place(settings: ModelSettings) -> tuple[str, HubPlace]:
    """A folder, or a repository of the hub and the arguments that say which state of it."""
    name = settings.name.removeprefix("hf/")
    folder = expanded(name)
    if folder.is_dir():
        return str(folder), {}
    if name.startswith(("/", "~", ".")) or name.count("/") > 1:
        raise ConfigError(f"model.name = {settings.name!r}: no such folder, and no name of a repository")
    return name, {"revision": settings.revision or None}


def _tokenizer(
    settings: ModelSettings, facts: Facts, source: str, place: HubPlace, config: PretrainedConfig
) -> PreTrainedTokenizerBase:
    """The model's tokenizer; the configuration gets an id for padding if it has none that can be one.

    Raises:
        ConfigError: if there is none: transformers then makes one without words; or it lacks the end of a response.
    """
    tokenizer = AutoTokenizer.from_pretrained(source, **place, **SAFE)
    if set(tokenizer.get_vocab()) <= {*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder}:
        raise ConfigError(f"model.name = {settings.name!r}: its tokenizer's files are missing: tokenizer.json, or vocab.txt")
    if facts.task == "language" and tokenizer.eos_token_id is None:
        raise ConfigError(f"model.name = {settings.name!r}: its tokenizer has no token that ends a text")
    known = (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # padding is masked; any token will do
    config.pad_token_id = next(number for number in known if number is not None and 0 <= number < config.vocab_size)
    return tokenizer


def _check_vocabulary(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, module: nn.Module) -> None:
    """
    Raises:
        ConfigError: the tokenizer makes tokens for which the model has no embedding.
    """
    rows = embedding_rows(module)
    beyond = sorted((number, word) for word, number in tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        number, word = beyond[0]
        raise ConfigError(
            f"model.name = {settings.name!r}: its tokenizer knows {word!r} as token {number}, and the model has embeddings for "
            f"{rows}; take the tokenizer that it was published with"
        )


def positions_of(config: PretrainedConfig) -> int:
    """For how many tokens of a text a model has positions; 0: it counts none (BLOOM)."""
    positions = int(getattr(config, "max_position_embeddings", None) or 0)
    if positions and config.model_type in POSITIONS_BEHIND_PADDING:
        positions -= 1 + (config.pad_token_id or 0)
    return positions


def _longest(settings: ModelSettings, config: PretrainedConfig, max_tokens: int) -> int:
    """How many tokens a text may have: what is asked for, as far as the model has positions.

    Raises:
        ConfigError: if texts as long as that would change what the model does to the others of their batch. Long-rope takes its
            factors from the longest text; up to the length that decides it is exact. (Dynamic rope changes beyond the
            model's positions, which no text reaches.)
    """
    longest = min(max_tokens, positions_of(config) or max_tokens)
    switch = long_rope(config)
    if switch is not None and longest > switch:
        raise ConfigError(
            f"model.name = {settings.name!r}: its long-rope mixes the records of a batch when texts exceed {switch} tokens; "
            f"set data.max-tokens to at most {switch}"
        )
    return longest


def long_rope(config: PretrainedConfig) -> int | None:
    """The number of tokens from which on long-rope takes its other factors; None for a model without it."""
    rope = getattr(config, "rope_parameters", None) or {}
    known = getattr(config, "original_max_position_embeddings", None) or getattr(config, "max_position_embeddings", None) or 0
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict) and kind.get("rope_type") == "longrope"]
    return min((int(kind.get("original_max_position_embeddings") or known) for kind in kinds), default=None)


def _about(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """What decides what the model computes, apart from its weights."""
    shaping = {name: value for name, value in config.to_dict().items() if name not in NAMES}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return json.dumps([shaping, words, tokenizer.special_tokens_map], sort_keys=True, default=str)


def _config(source: str, place: HubPlace, weights: bool) -> PretrainedConfig:
    known = None if weights or not place else known_config(source)  # a plan does not ask the hub for what is known
    config = known or AutoConfig.from_pretrained(source, **place, **SAFE)
    for kernel in (config._attn_implementation, config._experts_implementation):
        if "/" in str(kernel):  # a repository of the hub with compiled code, which transformers would fetch and run
            raise ConfigError(f"model.name = 'hf/{source}': its config.json asks for code of {kernel}, which is never run")
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"model.name = 'hf/{source}': its weights are quantised already; take those that they were made from, and "
            "model.dtype = 'nf4' for four bits"
        )
    if config._attn_implementation not in ATTENTION:
        raise ConfigError(
            f"model.name = 'hf/{source}': its config.json asks for the attention {config._attn_implementation!r}, which may pack "
            "the records of a batch into one; must be eager or sdpa"
        )
    config._experts_implementation = "eager"  # one expert after the other, each on its own tokens
    config.chunk_size_feed_forward = 0  # a saving of memory that fails unless it divides the length of every batch
    return config


def _module(
    settings: ModelSettings, facts: Facts, source: str, place: HubPlace, config: PretrainedConfig, weights: bool
) -> tuple[nn.Module, bool]:
    """The network, and whether its head is random."""
    mean = settings.pooling == "mean" or (settings.pooling == "auto" and wants_mean(Path(source)))
    mean = mean and facts.task == "text"
    kind: Any = AutoModelForSequenceClassification  # one of three classes without types
    if facts.task == "language":
        kind = AutoModelForCausalLM
    elif mean:
        kind = AutoModel
    usable = facts.task == "language" or (facts.problem.named and not _learns_numbers(config))
    headed = any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ())
    headed = headed and config.num_labels == facts.outputs and usable
    if kind is AutoModelForSequenceClassification:
        config.num_labels = facts.outputs
    extra = {"add_pooling_layer": False} if mean and config.model_type in WITH_POOLER else {}
    if not (weights and settings.pretrained):
        module, missing = kind.from_config(config, **SAFE, **extra), [] if headed and settings.pretrained else [""]
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
            remedy = "model.pooling = 'mean' does without" if "pooler" in body[0] else "they are of another architecture"
            raise ConfigError(f"model.name = {settings.name!r}: the weights lack {body[0]}; {remedy}")
    module = module.eval()
    if mean:
        return MeanPooledClassifier(module, facts.outputs).to(next(module.parameters()).dtype), True
    if not usable:
        for part in module.get_submodule(_head(module)).modules():
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()
    return module, bool(missing) or not usable


def _head(module: nn.Module) -> str:
    return "classifier" if hasattr(module, "classifier") else "score"


def _learns_numbers(config: PretrainedConfig) -> bool:
    """Whether the published model predicts numbers, which have a unit of their own; as transformers decides it."""
    return config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)


def _files(settings: ModelSettings, source: str, place: HubPlace) -> tuple[list[Path], str]:
    """The files that were read, and the commit of a hub repository."""
    if not place:
        folder = Path(source)
    else:
        from huggingface_hub import hf_hub_download

        folder = Path(hf_hub_download(source, "config.json", revision=place["revision"], local_files_only=True)).parent
    names = (*WEIGHTS, *FILES) if settings.pretrained else FILES
    files = sorted({file for name in names for file in folder.glob(name) if file.is_file()})
    return files, commit_of(folder / "config.json") if place else ""
