"""Text models that look beyond a record's own tokens are refused: long ropes, lengths, padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from lalora_flwr.data.inputs import Inputs, rows
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.made_up import telling_lengths
from lalora_flwr.models.targets import TRANSFORMERS_TARGETS
from lalora_flwr.models.text import SequenceClassifier
from tests.gradients.mixing import check
from tests.reference import generator


def text_base(longest: int, name: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> BaseModel:
    """A tiny text model with random weights and no files."""
    values = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    made = transformers.AutoConfig.for_model(name, **{**values, "pad_token_id": 1, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.AutoModelForSequenceClassification.from_config(made)
    targets = TRANSFORMERS_TARGETS[name]
    return SequenceClassifier(f"hf/{name}", module.to(dtype), "score", targets, (12,), 2, max_tokens=longest)


FACTORS = {"short_factor": [1.0] * 6, "long_factor": [float(i) for i in range(2, 8)], "original_max_position_embeddings": 32}


LONG_ROPE = {
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **FACTORS},
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("longest", [33, 64, 128])
def test_long_rope_is_refused_if_a_text_can_be_longer_than_its_threshold(longest: int, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match="mixes records"):
        check(text_base(longest, dtype=dtype, **LONG_ROPE))


@pytest.mark.parametrize("longest", [12, 32])
def test_long_rope_below_its_threshold_keeps_records_apart(longest: int) -> None:
    check(text_base(longest, **LONG_ROPE))


def test_texts_of_twelve_tokens_and_a_common_padding_do_not_show_long_rope() -> None:
    """What the check was once: three texts of up to twelve tokens, each alone with the padding of the batch."""

    class Short(SequenceClassifier):
        def check_batches(self, generator: torch.Generator) -> Iterator[tuple[Inputs, Tensor]]:
            yield self.synthetic_batch(3, generator)

        def single(self, inputs: Inputs, labels: Tensor, j: int) -> tuple[Inputs, Tensor]:
            return rows(inputs, slice(j, j + 1)), labels[j : j + 1]

    base = text_base(128, **LONG_ROPE)
    check(Short(base.name, base.module, base.head, base.targets, base.input_shape, 2, max_tokens=128))


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_dynamic_rope_is_exact_up_to_the_models_positions(factor: float) -> None:
    check(
        text_base(64, max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": factor})
    )


def test_dynamic_rope_beyond_the_models_positions_is_refused() -> None:
    """No loaded model gets there: texts are cut to its positions."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(ConfigError, match="mixes records"):
        check(text_base(64, max_position_embeddings=32, rope_parameters=rope))


@pytest.mark.parametrize("rope_type", ["linear", "yarn", "llama3"])
def test_other_ropes_are_exact(rope_type: str) -> None:
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope_type == "llama3" else {}
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, **more}
    check(text_base(64, max_position_embeddings=64, rope_parameters={k: v for k, v in rope.items() if v}))


class Watching(nn.Module):
    """A text model whose tokens get an offset if the batch is longer than a threshold, or the padding's share of the mean."""

    def __init__(self, offset: Callable[[Tensor], Tensor | float]) -> None:
        super().__init__()
        self.offset, self.config = offset, transformers.LlamaConfig(vocab_size=30, pad_token_id=1, sliding_window=20)
        self.embedding, self.first, self.score = nn.Embedding(30, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        x = torch.tanh(self.first(self.embedding(input_ids) + self.offset(attention_mask)))
        kept = attention_mask.unsqueeze(-1)
        return SequenceClassifierOutput(logits=self.score((x * kept).sum(1) / kept.sum(1)))  # type: ignore[arg-type]


def watching(offset: Callable[[Tensor], Tensor | float], longest: int = 40) -> BaseModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SequenceClassifier("test/watching", Watching(offset), "score", ("first",), (12,), 2, max_tokens=longest)


def test_a_text_model_that_looks_at_nothing_else_passes() -> None:
    check(watching(lambda mask: 0.0))


@pytest.mark.parametrize(
    "offset",
    [
        lambda mask: float(mask.shape[1] > 39),
        lambda mask: float(mask.shape[1] > 12),
        lambda mask: mask.shape[1] / 100,
        lambda mask: (mask.shape[1] - mask.sum(1)).view(-1, 1, 1) / 100,  # its own padding
        lambda mask: float(len(mask) > 4),
        lambda mask: float(len(mask) > 1) * mask.sum(1).max() / 100,
    ],
)
def test_a_model_that_looks_at_the_batchs_length_size_or_padding_is_refused(offset: Callable[[Tensor], Tensor | float]) -> None:
    with pytest.raises(ConfigError, match="mixes records"):
        check(watching(offset))


def test_the_made_up_texts_lie_on_both_sides_of_what_the_configuration_names() -> None:
    base = watching(lambda mask: 0.0)
    lengths = [mask["attention_mask"].sum(1).tolist() for mask, _ in base.check_batches(generator())]  # type: ignore[call-overload, index]
    assert lengths[0][0] == 12 and lengths[0][-1] == 2
    assert set(lengths[1]) == {40, 11, 20, 21}


@given(longest=st.integers(2, 40_000), window=st.integers(1, 40_000))
def test_the_longest_text_always_meets_a_short_one_and_the_cost_is_bounded(longest: int, window: int) -> None:
    lengths = telling_lengths(transformers.LlamaConfig(sliding_window=window), longest)
    assert max(lengths) == longest == lengths[0] and min(lengths) >= 2
    assert longest <= 11 or min(lengths) <= 11
    assert len(lengths) <= 5 and len(lengths) * longest <= max(2 * longest, 4096)
