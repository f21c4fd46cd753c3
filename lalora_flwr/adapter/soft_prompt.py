"""Prompt tuning: trained vectors before the tokens of a text (Lester et al., arXiv 2104.08691).

As in PEFT they come before every token, also before an encoder's [CLS], whose place the first of them takes for a head that
reads the first vector. They start as rows of the table of tokens that the seed draws, a public choice; private data never
choose them. Safe under record-level DP as published (private prompts by DP-SGD: arXiv 2305.15594, PromptDPSGD).

The folder is PEFT's. Decoders that classify read the vector of a text's last token; PEFT hands them vectors in place of ids,
from which they cannot tell padding, so that there a batch of several texts needs padding on the left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType
from safetensors.torch import save
from torch import Tensor, nn

from lalora_flwr.adapter.form import Adapter, AdapterForm
from lalora_flwr.adapter.lora import refuse_batch_norm
from lalora_flwr.adapter.peft_folder import finish_folder
from lalora_flwr.adapter.plain import NOT_FACTORS, Slots, own_head
from lalora_flwr.adapter.saved import WEIGHTS
from lalora_flwr.adapter.slots import Slot
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import PUBLIC, replace_file
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.hf_models import long_rope, positions_of
from lalora_flwr.models.published import CAUSAL_LM
from lalora_flwr.models.text import CausalLanguageModel, TextModel
from lalora_flwr.settings import LoraSettings, Settings

PROMPT = "prompt"
TOKENS = 10
NAME, PREFIX = "prompt_embeddings", "base_model."  # in PEFT's folders


class PromptedEmbedding(nn.Module):
    """A table of token vectors, in whose place the trained ones stand for ids that the table does not have.

    Attributes:
        prompt: (tokens, d).
    """

    prompt: nn.Parameter

    def __init__(self, table: nn.Module, tokens: int) -> None:
        super().__init__()
        self.table = table
        like = self.weight
        kind = torch.promote_types(like.dtype, torch.float32)
        self.prompt = nn.Parameter(torch.zeros(tokens, like.shape[1], device=like.device, dtype=kind))

    @property
    def weight(self) -> Tensor:
        """Of the table."""
        weight = self.table.weight
        assert isinstance(weight, Tensor)
        return weight

    @torch.no_grad()
    def start(self, seed: int) -> None:
        """Rows of the table, in the coarsest precision that a base may be kept in."""
        rows = torch.randint(len(self.weight), (len(self.prompt),), generator=torch.Generator().manual_seed(seed))
        self.prompt.copy_(self.weight[rows.to(self.weight.device)].to(torch.bfloat16))

    def trained(self, count: int) -> Tensor:
        """The trained vectors of so many texts, (count, tokens, d)."""
        return self.prompt.expand(count, -1, -1)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (n, t) to vectors (n, t, d); a text either begins with all the ids beyond the table or has none of them."""
        beyond = ids >= len(self.weight)
        vectors: Tensor = self.table(ids.masked_fill(beyond, 0))
        if not bool(beyond[:1, :1].any()):
            return vectors
        return torch.cat([self.trained(len(ids)).to(vectors.dtype), vectors[:, len(self.prompt) :]], 1)


class Prompted(nn.Module):
    """A network of transformers whose texts begin with the trained vectors."""

    def __init__(self, network: nn.Module, embedding: PromptedEmbedding, most: int, *, language: bool) -> None:
        """
        Args:
            network: holds the embedding.
            embedding: the trained vectors.
            most: positions of the network; 0: it counts none.
            language: whether there are logits of every token; those of the trained vectors are left out.
        """
        super().__init__()
        self.network, self.embedding = network, embedding
        self.config = network.config
        self._most, self._language = most, language

    def _before(self, tokens: Tensor, value: int) -> Tensor:
        """Tokens' numbers (n, t) with those of the trained vectors before them."""
        return torch.cat([tokens.new_full((len(tokens), len(self.embedding.prompt)), value), tokens], 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> Any:
        ids = self._before(input_ids, len(self.embedding.weight))
        more = {name: self._before(value, 0) for name, value in more.items()}
        said = self.network(input_ids=ids, attention_mask=self._before(attention_mask, 1), **more)
        if self._language:
            said.logits = said.logits[:, len(self.embedding.prompt) :]
        return said

    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """As transformers' own: the ids of the prompt and the response."""
        ids = self._before(input_ids, len(self.embedding.weight))
        room = max(1, self._most - ids.shape[1]) if self._most else max_new_tokens
        made: Tensor = self.network.generate(  # type: ignore[operator]
            inputs_embeds=self.embedding(ids),
            attention_mask=self._before(attention_mask, 1),
            max_new_tokens=min(max_new_tokens, room),
            **options,
        )
        return torch.cat([input_ids, made], 1)


class SoftPromptAdapter(Adapter):
    """The trained vectors, and a trained head."""

    in_peft = True

    def __init__(self, base: BaseModel, model: Prompted, slots: Slots, head: Slots) -> None:
        super().__init__(model, {**slots, **head})
        self._base, self._tokens = base, len(model.embedding.prompt)
        self.of_base = {slot.name: slot.name for slot in head}

    def save(self, folder: Path) -> None:
        """A folder of PEFT's prompt tuning; see `finish_folder`."""
        folder.mkdir(parents=True)
        prompt = self.state()[NAME]
        kind = CAUSAL_LM if isinstance(self._base, CausalLanguageModel) else TaskType.SEQ_CLS
        shape: Any = self._base.module.config
        PromptTuningConfig(
            task_type=kind,
            inference_mode=True,
            num_virtual_tokens=self._tokens,
            token_dim=prompt.shape[1],
            num_transformer_submodules=1,
            num_attention_heads=shape.num_attention_heads,
            num_layers=shape.num_hidden_layers,
        ).save_pretrained(str(folder))
        replace_file(folder / WEIGHTS, save({NAME: prompt.contiguous()}), mode=PUBLIC)
        finish_folder(folder, self._base, trained=False, prefix=PREFIX)


class SoftPrompt(AdapterForm):
    """``lora.size`` vectors."""

    parts = frozenset({PROMPT})
    unused = NOT_FACTORS | {"targets"}

    def check(self, name: str, settings: Settings) -> None:
        super().check(name, settings)
        if settings.task == "image":
            raise ConfigError(f"lora.form = {name!r}: is for texts; take 'visual-prompt' or 'pixel-prompt' for images")
        if settings.ridge_first:
            raise ConfigError(
                f"lora.head = 'ridge': is a head for the features without a prompt, which the form {name!r} changes from the "
                "start; choose 'trained'"
            )

    def attach(self, base: BaseModel, settings: LoraSettings, seed: int) -> SoftPromptAdapter:
        """As `AdapterForm.attach`.

        Raises:
            ConfigError: the model averages the tokens of a text, its positions do not suffice, or there is no head to train.
        """
        refuse_batch_norm(base)
        tokens = settings.size or TOKENS
        if not isinstance(base, TextModel):
            raise ConfigError(f"lora.form = 'soft-prompt': {base.name} takes no texts; take 'visual-prompt' or 'pixel-prompt'")
        if base.published.inside:
            raise ConfigError(
                "lora.form = 'soft-prompt': with model.pooling = 'mean' the prompt would be averaged with the text; choose "
                "another form, or 'model'"
            )
        limits = [limit for limit in (positions_of(base.config), long_rope(base.config)) if limit]
        if limits and base.max_tokens + tokens > min(limits):
            raise ConfigError(
                f"lora.size = {tokens}: with texts of {base.max_tokens} tokens above the {min(limits)} positions of {base.name}; "
                f"set data.max-tokens to at most {min(limits) - tokens}"
            )
        network: Any = base.module
        embedding = PromptedEmbedding(network.get_input_embeddings(), tokens)
        if not embedding.prompt.is_meta:
            embedding.start(seed)
        network.set_input_embeddings(embedding)
        model = Prompted(network, embedding, positions_of(base.config), language=isinstance(base, CausalLanguageModel))
        slot = Slot(NAME, "prompt", PROMPT, tuple(embedding.prompt.shape), 1)
        return SoftPromptAdapter(base, model, {slot: embedding.prompt}, own_head(base, settings, seed))


SOFT_PROMPT = SoftPrompt()
