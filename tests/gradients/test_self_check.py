from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from lalora_flwr.data.inputs import Inputs, rows
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.gradients.precision import full_precision
from lalora_flwr.gradients.self_check import self_check
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.made_up import telling_lengths
from lalora_flwr.models.targets import TRANSFORMERS_TARGETS
from lalora_flwr.models.text import SequenceClassifier
from tests.adapters import adapter_parameters, lora_of
from tests.adapters import check as check_model
from tests.reference import BASES, CLASSES, adapted, generator


class Mixing(nn.Module):
    """(n, tokens, 4) through a layer that may mix, then two adapted layers, then the mean over the tokens."""

    def __init__(self, mix: Callable[[nn.Module, Tensor], Tensor], tokens: int) -> None:
        super().__init__()
        self.mix, self.tokens = mix, tokens
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.mix(self, torch.tanh(self.first(x))))
        return self.head(y.mean(1))


def mixing(mix: Callable[[nn.Module, Tensor], Tensor], tokens: int = 6) -> BaseModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BaseModel("test/mixing", Mixing(mix, tokens), "head", ("first", "second"), (tokens, 4), CLASSES)


def check(base: BaseModel, training: bool = False, **lora: object) -> nn.Module:
    model = adapted(base, **lora)
    model.train(training)
    check_model(base, model)
    return model


def keep(_: nn.Module, x: Tensor) -> Tensor:
    return x


def batch_statistics(_: nn.Module, x: Tensor) -> Tensor:
    return F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2)


def batch_statistics_in_training(module: nn.Module, x: Tensor) -> Tensor:
    mean, var = (None, None) if module.training else (torch.zeros(5), torch.ones(5))
    return F.batch_norm(x.transpose(1, 2), mean, var, training=module.training).transpose(1, 2)


def mean_over_batch(_: nn.Module, x: Tensor) -> Tensor:
    return x - x.mean(0, keepdim=True)


def standardised_over_batch(_: nn.Module, x: Tensor) -> Tensor:
    return (x - x.mean(0, keepdim=True)) / x.std(0, keepdim=True)  # NaN for a batch of one


def neighbour_in_batch(_: nn.Module, x: Tensor) -> Tensor:
    return x + 0.1 * x.roll(1, dims=0)


class TokensFirst(nn.Module):
    """The first axis of the adapted layers' input is the token, as in a sequence-first transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.tanh(self.first(x.transpose(0, 1))))  # (tokens, n, 5)
        return self.head(y.mean(0))


class WindowsFirst(TokensFirst):
    """Folds windows outermost, so that a record's rows are not next to each other."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.transpose(0, 1).reshape(-1, x.shape[-1])  # (tokens * n, 4)
        y = self.second(torch.tanh(self.first(rows)))
        return self.head(y.reshape(x.shape[1], x.shape[0], -1).mean(0))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("kind", ["mlp", "vit", "swin"])
def test_models_that_keep_records_apart_pass(kind: str, head: str, training: bool) -> None:
    check(BASES[kind](), training, head=head)
    check(mixing(keep), training, head=head)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mix", [batch_statistics, mean_over_batch, neighbour_in_batch])
def test_models_that_mix_records_are_refused(mix: Callable[[nn.Module, Tensor], Tensor], training: bool) -> None:
    with pytest.raises(ConfigError, match="mixes records"):
        check(mixing(mix), training)


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_that_mixes_records_only_in_training_mode_is_refused(training: bool) -> None:
    """`train_round` trains in training mode, whatever mode the model was in when it was checked."""
    with pytest.raises(ConfigError, match="mixes records"):
        check(mixing(batch_statistics_in_training), training)


def test_gradients_that_are_not_finite_are_no_agreement() -> None:
    """One record alone gives NaN, which is not larger than any tolerance; three together mix."""
    with pytest.raises(ConfigError):
        check(mixing(standardised_over_batch))


@pytest.mark.parametrize("tokens", [3, 4, 6])
@pytest.mark.parametrize("module", [TokensFirst, WindowsFirst])
def test_a_batch_axis_that_is_not_outermost_is_refused(module: type[nn.Module], tokens: int) -> None:
    with pytest.raises(ConfigError):
        check(BaseModel("test/axis", module(), "head", ("first", "second"), (tokens, 4), CLASSES))


def test_batch_statistics_that_one_record_alone_cannot_have_are_refused() -> None:
    def mix(_: nn.Module, x: Tensor) -> Tensor:
        return F.batch_norm(x.flatten(1), None, None, training=True).view_as(x)  # raises for a batch of one

    with pytest.raises(ConfigError):
        check(mixing(mix))


class Spare(TokensFirst):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)).mean(1))


def test_an_adapted_layer_that_takes_no_part_is_refused() -> None:
    with pytest.raises(ConfigError):
        check(BaseModel("test/spare", Spare(), "head", ("first", "second"), (3, 4), CLASSES))


def test_dropout_is_no_reason_to_refuse() -> None:
    base = BASES["vit"]()
    base.module.blocks[0].attn.proj_drop = nn.Dropout(0.5)
    check(base, training=True, dropout=0.3)


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_models_in_low_precision_pass(kind: str, head: str) -> None:
    base = BASES[kind]()
    base.module.bfloat16()
    check(base, head=head)


@pytest.mark.parametrize("mix", [batch_statistics, mean_over_batch])
def test_models_in_low_precision_that_mix_records_are_refused(mix: Callable[[nn.Module, Tensor], Tensor]) -> None:
    base = mixing(mix)
    base.module.bfloat16()
    with pytest.raises(ConfigError, match="mixes records"):
        check(base)


def test_rates_of_dropout_and_drop_path_are_as_before() -> None:
    base = BASES["swin"]()
    base.module.layers[0].blocks[0].attn.proj_drop = nn.Dropout(0.25)

    def rates(model: nn.Module) -> dict[str, float]:
        modules = dict(model.named_modules()).items()
        return {n: getattr(m, "p", None) or getattr(m, "drop_prob", None) for n, m in modules if "drop" in n}

    before = rates(adapted(base, dropout=0.3))
    base = BASES["swin"]()
    base.module.layers[0].blocks[0].attn.proj_drop = nn.Dropout(0.25)
    assert rates(check(base, dropout=0.3)) == before
    values = {round(rate, 3) for rate in before.values() if rate}
    assert {0.25, 0.3, 0.1} <= values  # the projection's, the adapter's, Swin's own drop-path


class Broken(PerSampleGradients):
    """An engine that gives each record its neighbour's gradient."""

    def __call__(self, records: int, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
        return {name: g.roll(1, 0) for name, g in super().__call__(records, losses).items()}


def test_an_engine_that_confuses_records_is_refused() -> None:
    base = BASES["vit"]()
    model = adapted(base)
    with pytest.raises(ConfigError, match="mixes records"):
        check_model(base, model, Broken)


class Slight(PerSampleGradients):
    """An engine with a small error in the gradients of A, which at B = 0 nobody would see."""

    error = 0.05

    def __call__(self, records: int, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
        gradients = super().__call__(records, losses)
        return {name: g * (1 + self.error) if ".lora_A." in name else g for name, g in gradients.items()}


@pytest.mark.parametrize("error", [0.05, 2e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_error_in_a_is_found_although_b_starts_at_zero(dtype: torch.dtype, error: float) -> None:
    base = BASES["vit"]()
    base.module.to(dtype)
    model = adapted(base)
    whole = lora_of(model)
    engine = Slight(model, whole.parameters)
    engine.error = error
    with pytest.raises(ConfigError, match="lora_A"):
        self_check(base, whole, engine)


@pytest.mark.parametrize("outcome", ["good", "mixes", "cannot be determined"])
def test_parameters_modes_and_the_global_generator_are_as_before(outcome: str) -> None:
    base = {
        "good": mixing(keep),
        "mixes": mixing(mean_over_batch),
        "cannot be determined": BaseModel("test/axis", TokensFirst(), "head", ("first", "second"), (4, 4), CLASSES),
    }[outcome]
    model = adapted(base, head="trained", dropout=0.1)
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p.copy_(torch.randn(p.shape, generator=generator()))
    whole = lora_of(model)
    engine = PerSampleGradients(model, whole.parameters)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    if outcome == "good":
        self_check(base, whole, engine)
    else:
        with pytest.raises(ConfigError, match=outcome):
            self_check(base, whole, engine)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())


class OnlySometimes(PerSampleGradients):
    """An engine that adds a neighbour's gradient to a record's in batches of some sizes or with texts of some lengths."""

    fewest = 0

    def __call__(self, records: int, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
        gradients = super().__call__(records, losses)
        return {n: g + 0.01 * g.roll(1, 0) for n, g in gradients.items()} if records >= self.fewest else gradients


@pytest.mark.parametrize(("fewest", "found"), [(4, True), (5, True), (6, False)])
def test_an_engine_that_mixes_in_batches_of_five_or_fewer_is_refused(fewest: int, found: bool) -> None:
    base = BASES["vit"]()
    model = adapted(base)
    whole = lora_of(model)
    engine = OnlySometimes(model, whole.parameters)
    engine.fewest = fewest
    with pytest.raises(ConfigError, match="mixes records") if found else nullcontext():
        self_check(base, whole, engine)


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


class Zero(Mixing):
    """Its blocks add nothing, as with norms that start at zero."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.mean(1) @ torch.ones(4, 5)) + 0 * self.second(torch.tanh(self.first(x))).mean(1))


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_gradients_that_are_all_zero_are_no_agreement(head: str) -> None:
    base = BaseModel("test/zero", Zero(keep, 6), "head", ("first", "second"), (6, 4), CLASSES)
    with pytest.raises(ConfigError, match="zero for every made-up record") as refusal:
        check(base, head=head)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("scale", [1e-12, 1e-20])
def test_tiny_gradients_that_mix_are_refused(scale: float) -> None:
    class Tiny(Mixing):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * scale

    base = BaseModel("test/tiny", Tiny(neighbour_in_batch, 6), "head", ("first", "second"), (6, 4), CLASSES)
    with pytest.raises(ConfigError, match="mixes records"):
        check(base)
    check(BaseModel("test/tiny", Tiny(keep, 6), "head", ("first", "second"), (6, 4), CLASSES))


def test_the_runs_alpha_does_not_decide_what_the_check_sees() -> None:
    """An alpha of 1024 would drive attention into its limits, where gradients vanish; the adapter's share stays the same."""
    shares = []

    class Seeing(PerSampleGradients):
        def __call__(self, records: int, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
            first = next(p for name, p in model.named_parameters() if ".lora_B." in name)
            shares.append(first.detach() * model.peft_config["default"].lora_alpha / 2)
            return super().__call__(records, losses)

    for alpha in (0.1, 3.0, 1024.0):
        base = BASES["vit"]()
        model = adapted(base, alpha=alpha, rank=2)
        check_model(base, model, Seeing)
    assert shares[0].any() and all(torch.allclose(share, shares[0], rtol=1e-5) for share in shares)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_base_has_every_bit_again_afterwards(dtype: torch.dtype) -> None:
    base = BASES["swin"]()
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    everything = nn.Parameter(bits[bits.isfinite()].clone(), requires_grad=False)
    base.module.to(dtype).register_parameter("everything", everything)
    base.module.register_buffer("buffer", everything.detach().clone())
    model = adapted(base)
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    with full_precision(model):
        assert all(p.dtype == torch.float32 for p in (*model.parameters(), *model.buffers()) if p.is_floating_point())
    after = model.state_dict()
    for name, t in before.items():
        assert after[name].dtype == t.dtype
        assert torch.equal(after[name].view(torch.uint8), t.view(torch.uint8)) if t.dim() else torch.equal(after[name], t), name


def test_a_slight_mixing_in_low_precision_is_refused() -> None:
    """Smaller than the rounding of bfloat16, in which the check could not see it."""
    base = mixing(lambda _, x: x + 0.003 * x.roll(1, dims=0))
    base.module.bfloat16()
    with pytest.raises(ConfigError, match="mixes records"):
        check(base)
