"""Every admitted architecture from a folder, and what is refused of them, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.models import save_for_hf

from benchmarks.architectures import ARCHITECTURES, SMALL_ONLY, build
from lalora_flwr.data.data_set import Facts
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models import load_base_model
from lalora_flwr.models.text import CausalLanguageModel
from lalora_flwr.settings import LoraSettings, ModelSettings
from tests.adapters import BOTH, adapter_state, attach_adapter, check, engine_for, set_active
from tests.conftest import Finished, Spy, run_spied, small
from tests.models.files import save_rows, sums, texts
from tests.models.folders import save_hf, save_tokenizer

TEXT, LANGUAGE = Facts("text", ("bad", "good")), Facts("language", ())
BUILT = {
    name: build(name, small=True) for name in (*ARCHITECTURES, *SMALL_ONLY) if not name.endswith(("-base", "-large", "tiny"))
}
NEW = {name: base for name, base in BUILT.items() if name in SMALL_ONLY}


def load(folder: Path, facts: Facts = TEXT, max_tokens: int = 24, **settings: Any) -> Any:
    return load_base_model(ModelSettings(name=f"hf/{folder}", **settings), facts, max_tokens)


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def saved(folder: Path, name: str) -> tuple[Path, Facts]:
    BUILT[name].module.save_pretrained(folder)
    encoder = not BUILT[name].module.config.model_type.startswith(tuple(t for t in ("gpt", "llama")))
    save_tokenizer(folder, "roberta" if encoder else "llama")
    return folder, LANGUAGE if isinstance(BUILT[name], CausalLanguageModel) else TEXT


@pytest.mark.parametrize("name", NEW)
def test_a_folder_of_each_is_loaded_and_passes_the_check(tmp_path: Path, name: str) -> None:
    base = load(*saved(tmp_path, name))
    want, got = BUILT[name].module.state_dict(), base.module.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
    assert not base.fresh_head and base.head == BUILT[name].head and base.max_tokens == 24 and base.vocabulary == 60
    model = attach_adapter(base, LoraSettings(rank=2), seed=0)
    check(base, model)
    if isinstance(base, CausalLanguageModel):
        base.generate(model.eval(), torch.tensor([4, 5, 6]), 2)


@pytest.mark.parametrize("name", ["xlm-roberta", "albert", "electra", "mobilebert", "modernbert"])
def test_with_mean_pooling_no_adapter_is_idle(tmp_path: Path, name: str) -> None:
    """A pooler that the mean has no use for would get an adapter without a gradient."""
    base = load(*saved(tmp_path, name), pooling="mean")
    model = attach_adapter(base, LoraSettings(rank=2, head="trained"), seed=0)
    check(base, model)


def test_a_chunk_size_changes_nothing_and_fails_at_no_length(tmp_path: Path) -> None:
    saved(tmp_path, "xlm-roberta")
    inputs, _ = BUILT["xlm-roberta"].synthetic_batch(3, torch.Generator().manual_seed(0))
    inputs = {key: value[:, :11] for key, value in inputs.items()}  # type: ignore[union-attr]
    plain = load(tmp_path)
    edit(tmp_path, chunk_size_feed_forward=4)
    assert torch.equal(load(tmp_path).logits(load(tmp_path).module, inputs), plain.logits(plain.module, inputs))


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa", "nonsense"])
def test_an_attention_that_may_pack_records_is_refused(tmp_path: Path, attention: str) -> None:
    saved(tmp_path, "modernbert")
    edit(tmp_path, attn_implementation=attention)
    with pytest.raises(ConfigError, match="must be eager or sdpa") as refusal:
        load(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe-classifier"])
def test_experts_run_one_after_the_other_and_their_balance_is_no_loss(tmp_path: Path, name: str) -> None:
    folder, facts = saved(tmp_path, name)
    edit(folder, output_router_logits=True, router_aux_loss_coef=10.0, router_jitter_noise=0.4)
    base = load(folder, facts)
    assert base.module.config._experts_implementation == "eager"
    model = attach_adapter(base, LoraSettings(rank=2), seed=0)
    check(base, model)
    plain = BUILT[name]
    inputs, labels = plain.synthetic_batch(4, torch.Generator().manual_seed(0))
    assert torch.allclose(base.losses(model.eval(), inputs, labels), plain.losses(plain.module.eval(), inputs, labels), atol=1e-6)


ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
LONG = {**ROPE, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}


@pytest.mark.parametrize("tokens", [16, 17])
@pytest.mark.parametrize(("family", "where"), [("llama", "rope"), ("phi3", "rope"), ("phi3", "config")])
def test_long_rope_is_taken_for_texts_up_to_its_threshold(tmp_path: Path, family: str, tokens: int, where: str) -> None:
    saved(tmp_path, f"{family}-classifier")
    rope = {**LONG, "original_max_position_embeddings": 16} if where == "rope" else LONG
    edit(tmp_path, rope_parameters=rope, max_position_embeddings=64, original_max_position_embeddings=16)
    if tokens <= 16:
        base = load(tmp_path, max_tokens=tokens)
        model = attach_adapter(base, LoraSettings(rank=2), seed=0)
        check(base, model)
    else:
        with pytest.raises(ConfigError, match=r"set data\.max-tokens to at most 16") as refusal:
            load(tmp_path, max_tokens=tokens)
        assert "\n" not in str(refusal.value)


def test_texts_stay_within_the_positions_of_each_kind(tmp_path: Path) -> None:
    longest = {}
    for name in ("xlm-roberta", "opt-classifier", "bloom-classifier", "falcon-classifier", "albert"):
        saved(tmp_path / name, name)
        if name != "bloom-classifier":
            edit(tmp_path / name, max_position_embeddings=20)
        base = load(tmp_path / name, max_tokens=64, pretrained=False)
        longest[name] = base.max_tokens
        model = attach_adapter(base, LoraSettings(rank=2), seed=0)
        check(base, model)  # with texts as long as that
    assert longest == {"xlm-roberta": 18, "opt-classifier": 20, "bloom-classifier": 64, "falcon-classifier": 20, "albert": 20}


def test_albert_cannot_recompute_and_says_so(tmp_path: Path) -> None:
    for pooling in ("model", "mean"):
        with pytest.raises(ConfigError, match="cannot recompute its activations"):
            load(*saved(tmp_path, "albert"), pooling=pooling).checkpoint_activations()


@pytest.mark.parametrize("model_type", ["funnel", "convbert", "deberta-v2", "xlnet", "longformer", "big_bird", "t5"])
def test_what_was_not_exact_is_not_admitted(tmp_path: Path, model_type: str) -> None:
    transformers.AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="must be one of") as refusal:
        load(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_two_part_head_is_trained_whole_and_is_no_target(tmp_path: Path) -> None:
    save_hf(tmp_path, "distilbert", "classifier")
    with pytest.raises(ConfigError, match=r"'pre_classifier' matches no linear layer") as refusal:
        attach_adapter(load(tmp_path), LoraSettings(targets="q_lin,pre_classifier", head="trained"), seed=0)
    assert "\n" not in str(refusal.value)
    trained = attach_adapter(load(tmp_path), LoraSettings(targets="q_lin", head="trained"), seed=0)
    assert {name.split(".")[-2] for name in adapter_state(trained) if "lora" not in name} == {"pre_classifier", "classifier"}
    base = load(tmp_path)
    model = attach_adapter(base, LoraSettings(targets="q_lin,pre_classifier"), seed=0)
    check(base, model)


def test_a_language_model_has_no_head_to_train(tmp_path: Path) -> None:
    save_hf(tmp_path, "gpt2", "causal")
    with pytest.raises(ConfigError, match=r"lora\.head = 'trained'") as refusal:
        attach_adapter(load(tmp_path, LANGUAGE), LoraSettings(head="trained"), seed=0)
    assert "\n" not in str(refusal.value)


def test_a_gemma_whose_tokens_see_the_answer_is_no_language_model(tmp_path: Path) -> None:
    folder, facts = saved(tmp_path, "gemma3-text")
    edit(folder, use_bidirectional_attention=True)
    with pytest.raises(ConfigError, match="no language model"):
        load(folder, facts)


SWIN2 = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2]}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("swinv2_tiny_window8_256", SWIN2),
        ("beit_base_patch16_224", VIT),
        ("eva02_tiny_patch14_224", VIT),
        ("eva02_base_patch14_224", VIT),
    ],
)
def test_attention_that_reads_a_layers_weight_gives_the_adapter_its_part(
    tmp_path: Path, name: str, arguments: dict[str, Any]
) -> None:
    module = timm.create_model(name, num_classes=2, **arguments)
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    save_for_hf(module, str(tmp_path), model_args=arguments, safe_serialization=True)
    base = load_base_model(ModelSettings(name=f"timm/{tmp_path}"), Facts("image", ("a", "b")))
    inputs, labels = base.synthetic_batch(3, torch.Generator().manual_seed(0))
    assert torch.allclose(base.logits(base.module.eval(), inputs), module.eval()(inputs), atol=1e-6)
    model = attach_adapter(base, LoraSettings(rank=2), seed=0)
    check(base, model)
    engine = engine_for(model)
    set_active(model, BOTH)
    gradients = engine(3, lambda: base.losses(model, inputs, labels))
    assert all(g.any() for key, g in gradients.items() if ".lora_B." in key)


RUN: dict[str, Any] = {
    "num_rounds": 1,
    "num_supernodes": 2,
    "train__batch_size": 8,
    "lora__targets": "auto",
    "data__max_tokens": 24,
    "data__min_records": 1,
    "privacy__accountant": "rdp",
}


@pytest.mark.parametrize("name", ["modernbert", "qwen3"])
def test_a_run_with_a_new_architecture(tmp_path: Path, name: str) -> None:
    folder, facts = saved(tmp_path / "model", name)
    data: dict[str, Any] = {"data__name": save_rows(tmp_path / "train.jsonl", texts(40)), "data__test": "hold-out:0.2"}
    if facts is LANGUAGE:
        data = {"data__name": save_rows(tmp_path / "train.jsonl", sums(30)), "data__test": "hold-out:0.2"}
        data |= {"data__text": "prompt", "data__response": "response"}
    else:
        data["lora__head"] = "trained"
    settings = small(tmp_path, **{**RUN, **data, "model__name": f"hf/{folder}"})
    spy = Spy()
    run = Finished(run_spied(settings, spy), settings, spy)
    assert run.summary["rounds"] == 1 and run.summary["failures"] == 0
    assert all(bool(t.any()) for key, t in run.checkpoint.items() if "lora_B" in key)
