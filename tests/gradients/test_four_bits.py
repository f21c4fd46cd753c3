"""On a base in four bits each record's gradient is its own, as exactly as on any other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.architectures import WIDE, build_wide
from lalora_flwr.adapter.form import Adapter, AdapterForm
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.gradients.few_rows import FEWEST, SteadyFourBitLinear, keep_steady
from lalora_flwr.gradients.fused import FusedLoraLinear
from lalora_flwr.gradients.self_check import check_precision, self_check
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.four_bits import FourBitLinear, in_four_bits
from lalora_flwr.models.targets import CAUSAL
from lalora_flwr.settings import LoraSettings
from lalora_flwr.settings.choices import FORMS

NO_LAYERS = ("falcon", "falcon-classifier")
FLOAT32_INSIDE = ("bloom", "gemma2")  # a softmax, whatever the weights
NAMES = [name for name in WIDE if name not in NO_LAYERS]
EVERY_LAYER = {
    "vit": "qkv,attn.proj,fc1,fc2",
    "swin": "attn.qkv,attn.proj,mlp.fc1,mlp.fc2,downsample.reduction",
    "llama": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
    "bert": "query,key,value,dense",
}


def attached(
    name: str, form: str = "lora", dtype: torch.dtype = torch.float64, scale: float = 0.3, **lora: str
) -> tuple[BaseModel, Adapter]:
    base = build_wide(name)
    base.module.requires_grad_(False)
    base = in_four_bits(base)
    base.module.to(dtype)
    settings = LoraSettings(**{"rank": 3, "alpha": 6.0, "size": 3, **lora})  # type: ignore[arg-type]
    adapter = FORMS.get(form, AdapterForm).attach(base, settings, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # off zero, or A's gradients are zero
        for parameter in adapter.parameters.values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return base, adapter


def assert_exact(name: str, form: str = "lora", dtype: torch.dtype = torch.float64, **lora: str) -> None:
    base, adapter = attached(name, form, dtype, **lora)
    *_, (inputs, labels) = base.check_batches(torch.Generator().manual_seed(3))
    inputs = inputs.to(dtype) if isinstance(inputs, Tensor) else inputs
    active = adapter.activate(adapter.trainable)
    adapter.model.eval()
    expected = []  # by plain autograd, on a model that the engine has not touched
    for j in range(len(labels)):
        loss = adapter.losses(base, *base.single(inputs, labels, j)).sum()
        found = torch.autograd.grad(loss, list(active.values()), allow_unused=True)
        expected.append({key: torch.zeros_like(p) if g is None else g for (key, p), g in zip(active.items(), found, strict=True)})
    together = PerSampleGradients(adapter.model, adapter.parameters)(len(labels), lambda: adapter.losses(base, inputs, labels))
    assert set(together) == adapter.trainable
    tolerance = 1e-4 if dtype == torch.float32 else 1e-5 if name.startswith(FLOAT32_INSIDE) else 1e-10
    for key, gradient in together.items():
        alone = torch.stack([record[key] for record in expected])
        assert (gradient - alone).abs().max() <= tolerance * max(float(alone.abs().max()), 1e-6), key
    assert any(gradient.any() for gradient in together.values())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gemma2"])  # which is NaN in float64, four bits or not
def test_gradients_are_those_of_single_records(name: str) -> None:
    assert_exact(name, head="frozen" if name in CAUSAL or name.replace("-", "_") in CAUSAL else "trained")


@pytest.mark.parametrize("name", EVERY_LAYER)
def test_with_an_adapter_on_every_layer(name: str) -> None:
    assert_exact(name, targets=EVERY_LAYER[name])


@pytest.mark.parametrize(
    ("form", "name"),
    [
        *((form, name) for form in ("bitfit", "bottleneck") for name in ("vit", "bert", "opt-classifier")),
        *(("soft-prompt", "llama"), ("visual-prompt", "vit"), ("pixel-prompt", "swin"), ("head", "bert")),
    ],
)
def test_other_forms(form: str, name: str) -> None:
    assert_exact(name, form)


@pytest.mark.parametrize(("form", "name"), [("lora-residual", "bert"), ("lora-sb", "vit")])
def test_forms_that_keep_what_is_their_own_in_float32(form: str, name: str) -> None:
    assert_exact(name, form, torch.float32)


def test_biases_of_layers_in_four_bits_train_with_the_others() -> None:
    base = build_wide("bert")
    wanted = FORMS.get("bitfit", AdapterForm).attach(base, LoraSettings(), 1).layout
    _, adapter = attached("bert", "bitfit")
    assert set(adapter.layout) == set(wanted)


def test_lora_layers_run_fused() -> None:
    _, adapter = attached("bert")
    PerSampleGradients(adapter.model, adapter.parameters)
    fused = [module for module in adapter.model.modules() if isinstance(module, FusedLoraLinear)]
    assert fused and all(isinstance(module.base_layer, FourBitLinear) for module in fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["vit", "swin", "distilbert", "llama", "albert", "modernbert"])
def test_the_check_before_training_passes_and_leaves_all_as_it_was(name: str, dtype: torch.dtype) -> None:
    base, adapter = attached(name, dtype=dtype)
    before = {key: value.clone() for key, value in adapter.model.state_dict().items()}
    engine = PerSampleGradients(adapter.model, adapter.parameters)
    self_check(base, adapter, engine)
    off = check_precision(base, adapter, engine, "nf4")
    assert off < 1e-5 if dtype == torch.float32 else 1e-4 < off < 0.5
    for key, value in adapter.model.state_dict().items():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key]), key


class Leaky(nn.Module):
    """Each record also sees a thousandth of the one before it in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.second(y + 0.1 * y.roll(1, 0))))


def test_the_check_refuses_what_mixes_records() -> None:
    torch.manual_seed(0)
    base = in_four_bits(BaseModel("test/leaky", Leaky().requires_grad_(False), "head", ("first",), (64,), 3))
    base.module.bfloat16()
    adapter = FORMS.get("lora", AdapterForm).attach(base, LoraSettings(rank=2), 1)
    with pytest.raises(ConfigError, match="changes with its batch; this model mixes records"):
        self_check(base, adapter, PerSampleGradients(adapter.model, adapter.parameters))


def test_products_too_rough_for_training_are_refused_by_the_word_that_was_chosen() -> None:
    base, adapter = attached("llama", dtype=torch.bfloat16, scale=1e3)
    engine = PerSampleGradients(adapter.model, adapter.parameters)
    with pytest.raises(ConfigError, match=r"^model.dtype = 'nf4': gradients of 'hf/llama' are off by"):
        check_precision(base, adapter, engine, "nf4")


def test_activations_computed_again_give_the_same_gradients() -> None:
    found = []
    for again in (False, True):
        base, adapter = attached("llama", targets=EVERY_LAYER["llama"])
        if again:
            base.checkpoint_activations()
        adapter.activate(adapter.trainable)
        adapter.model.train()
        engine = PerSampleGradients(adapter.model, adapter.parameters)
        inputs, labels = base.synthetic_batch(3, torch.Generator().manual_seed(3))
        found.append(engine(3, lambda: adapter.losses(base, inputs, labels)))  # noqa: B023
    plain, recomputed = found
    assert all(torch.allclose(value, recomputed[name], rtol=1e-12) for name, value in plain.items())


def test_a_pass_keeps_no_whole_weight() -> None:
    base, adapter = attached("bert", dtype=torch.float32, targets=EVERY_LAYER["bert"])
    adapter.activate(adapter.trainable)
    engine = PerSampleGradients(adapter.model, adapter.parameters)
    own = {t.untyped_storage().data_ptr() for t in (*adapter.model.parameters(), *adapter.model.buffers())}
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    inputs, labels = base.synthetic_batch(2, torch.Generator().manual_seed(3))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine(2, lambda: adapter.losses(base, inputs, labels))
    assert kept and (64, 64) not in kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_have_the_bits_of_many(dtype: torch.dtype) -> None:
    base = in_four_bits(BaseModel("test", nn.Sequential(nn.Linear(384, 384)).requires_grad_(False), "", (), (), 0))
    model = base.module.to(dtype)
    keep_steady(model)
    x = torch.randn(FEWEST, 384).to(dtype)
    assert type(model[0]) is SteadyFourBitLinear
    assert all(torch.equal(model(x[:rows]), model(x)[:rows]) for rows in range(1, FEWEST))
