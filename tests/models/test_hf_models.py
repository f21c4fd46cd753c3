"""Text models from folders: the saved weights, a head for the task, the model's own tokenizer, and refusals in one line."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lalora_flwr.data.data_set import Facts
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models import load_base_model
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import LoraSettings, ModelSettings
from tests.adapters import attach_adapter
from tests.models.folders import CLS, CONFIGS, PAD, SEP, VOCABULARY, save_hf, save_tokenizer

LANGUAGE = Facts("language", ())


def of(classes: int) -> Facts:
    return Facts("text", tuple(str(i) for i in range(classes)))


def load(folder: Path, facts: Facts, max_tokens: int = 16, **settings: Any) -> Any:
    weights = settings.pop("weights", True)
    return load_base_model(ModelSettings(name=f"hf/{folder}", **settings), facts, max_tokens, weights=weights)


def assert_has(base: BaseModel, saved: torch.nn.Module, but: str = "no") -> None:
    """All saved weights, outside of the head ``but``, are the loaded ones."""
    loaded = base.module.state_dict()
    names = [name for name in saved.state_dict() if not name.startswith(but + ".")]
    assert names
    for name in names:
        assert torch.equal(loaded[name], saved.state_dict()[name]), name


@pytest.mark.parametrize(("family", "head"), [("bert", "classifier"), ("roberta", "classifier"), ("llama", "score")])
def test_a_classifier_keeps_its_weights_and_its_head(tmp_path: Path, family: str, head: str) -> None:
    saved = save_hf(tmp_path, family, "classifier", num_labels=3)
    base = load(tmp_path, of(3))
    assert_has(base, saved)
    assert (base.head, base.fresh_head, base.num_classes) == (head, False, 3)


def test_a_tokenizer_beyond_the_embeddings_is_refused_by_its_first_word(tmp_path: Path) -> None:
    save_hf(tmp_path, "bert", "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["later", "beyond"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"its tokenizer knows 'later' as token {VOCABULARY}, and the model has"):
        load(tmp_path, Facts("text", ("a", "b")))


@pytest.mark.parametrize(("family", "head"), [("bert", "classifier"), ("roberta", "classifier"), ("llama", "score")])
def test_other_classes_get_a_fresh_head_of_their_number(tmp_path: Path, family: str, head: str) -> None:
    saved = save_hf(tmp_path, family, "classifier", num_labels=2)
    base = load(tmp_path, of(5))
    assert_has(base, saved, but=head)
    assert base.fresh_head
    inputs, _ = base.synthetic_batch(3, torch.Generator().manual_seed(0))
    assert base.logits(base.module, inputs).shape == (3, 5)


def test_a_model_without_a_head_gets_one(tmp_path: Path) -> None:
    saved = save_hf(tmp_path, "bert", "base")
    base = load(tmp_path, of(4))
    for name, tensor in saved.state_dict().items():
        assert torch.equal(base.module.state_dict()[f"bert.{name}"], tensor), name
    assert base.fresh_head and base.module.classifier.out_features == 4


def test_a_language_model_keeps_its_weights(tmp_path: Path) -> None:
    saved = save_hf(tmp_path, "llama", "causal")
    base = load(tmp_path, LANGUAGE)
    assert_has(base, saved)
    ids = torch.arange(4, 12).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(base.module(ids).logits, saved(ids).logits)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "llama"])
@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_the_vocabulary_counts_the_rows_of_the_embedding(tmp_path: Path, family: str, pooling: str) -> None:
    """Whatever the configuration or the tokenizer say: an id beyond the rows fails in the first pass."""
    save_hf(tmp_path, family, "classifier")
    base = load(tmp_path, of(2), pooling=pooling)
    model = attach_adapter(base, LoraSettings(head="trained"), seed=0)
    assert base.vocabulary == len(dict(base.tokenizer.get_vocab()))
    for number, fits in ((base.vocabulary - 1, True), (base.vocabulary, False)):
        ids = torch.tensor([[4, number, 5]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if fits:
            base.logits(model, inputs)
        else:
            with pytest.raises(IndexError):
                base.logits(model, inputs)


def test_sharded_weights_are_read_and_named(tmp_path: Path) -> None:
    saved = save_hf(tmp_path, "bert", "classifier")
    saved.save_pretrained(tmp_path, max_shard_size="5KB")
    (tmp_path / "model.safetensors").unlink()
    base = load(tmp_path, of(2))
    assert_has(base, saved)
    assert {f.name for f in tmp_path.glob("model*")} <= set(base.provenance.files)


def test_loading_is_the_same_each_time_and_draws_nothing_from_the_callers_generator(tmp_path: Path) -> None:
    save_hf(tmp_path, "roberta", "base")
    state = torch.get_rng_state()
    first = load(tmp_path, of(3))
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    assert_has(load(tmp_path, of(3)), first.module)


def test_random_weights_on_request(tmp_path: Path) -> None:
    saved = save_hf(tmp_path, "bert", "classifier")
    base = load(tmp_path, of(2), pretrained=False)
    assert base.fresh_head
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(base.module.state_dict()[name], saved.state_dict()[name])
    assert "model.safetensors" not in base.provenance.files


def test_a_plan_builds_no_weights_and_reads_no_tokenizer(tmp_path: Path) -> None:
    CONFIGS["llama"]().save_pretrained(tmp_path)
    base = load(tmp_path, LANGUAGE, weights=False)
    assert all(p.is_meta for p in base.module.parameters())
    assert base.tokenizer is None and base.provenance.digest == ""


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_the_tokenizer_is_the_models_own(tmp_path: Path, family: str) -> None:
    save_hf(tmp_path, family, "classifier")
    base = load(tmp_path, of(2))
    ids = base.tokenizer("good film")["input_ids"]
    assert ids[0] == CLS and (ids[-1] == SEP) == (family != "llama")
    assert base.tokenizer.convert_ids_to_tokens(ids)[1:3] == ["good", "film"]


@pytest.mark.parametrize(("config", "pad", "expected"), [(None, True, PAD), (1, True, 1), (-1, False, SEP), (None, False, SEP)])
def test_padding_is_what_the_network_takes_for_it(tmp_path: Path, config: int | None, pad: bool, expected: int) -> None:
    save_hf(tmp_path, "llama", "classifier", pad=pad, pad_token_id=config)
    base = load(tmp_path, of(2))
    assert base.padding == base.module.config.pad_token_id == expected


def test_a_roberta_takes_texts_as_long_as_its_positions_and_no_longer(tmp_path: Path) -> None:
    """Its positions start behind the number of its padding."""
    save_hf(tmp_path, "roberta", "classifier")
    base = load(tmp_path, of(2), max_tokens=100)
    assert base.max_tokens == base.module.config.max_position_embeddings - 1 - PAD
    ids = torch.full((1, base.max_tokens), 5)
    base.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    with pytest.raises((IndexError, RuntimeError)):
        base.module(input_ids=ids.repeat(1, 2), attention_mask=torch.ones_like(ids).repeat(1, 2))


def test_loading_prints_nothing_and_warns_of_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_hf(tmp_path, "bert", "base")
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for weights in (True, False):
            attach_adapter(load(tmp_path, of(2), weights=weights), LoraSettings(), seed=0)
        base = load(tmp_path, of(2))
        base.checkpoint_activations()
        attach_adapter(base, LoraSettings(), seed=0)
    printed = capfd.readouterr()
    assert (printed.out, printed.err, [str(w.message) for w in caught]) == ("", "", [])


def no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def one_tensor_less(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["bert.encoder.layer.1.output.dense.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def other_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "t5"}')


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "only pickled weights": (no_safetensors, "safetensors"),
    "broken weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"broken"), "safetensors"),
    "a tensor is missing": (one_tensor_less, "the weights lack bert.encoder.layer.1.output.dense.weight"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "no tokenizer": (no_tokenizer, "tokenizer.json"),
    "unknown architecture": (other_architecture, "must be one of roberta, xlm-roberta, bert"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    damage, advice = BROKEN[case]
    save_hf(tmp_path, "bert", "classifier")
    damage(tmp_path)
    with pytest.raises(ConfigError, match=advice) as caught:
        load(tmp_path, of(2))
    assert str(caught.value).startswith("model.name = ") and "\n" not in str(caught.value)


def test_a_missing_folder_is_refused_and_no_hub_is_asked_for_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        load(tmp_path / "nothing", of(2))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_an_encoder_is_no_language_model(tmp_path: Path, family: str) -> None:
    """Its tokens see those after them: it would read the answer that it should predict."""
    save_hf(tmp_path, family, "masked")
    with pytest.raises(ConfigError, match=r"must be one of gpt2, .* for language modelling"):
        load(tmp_path, LANGUAGE)


def test_a_language_model_needs_an_end_of_text(tmp_path: Path) -> None:
    save_hf(tmp_path, "llama", "causal")
    edit(tmp_path / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ConfigError, match="no token that ends a text"):
        load(tmp_path, LANGUAGE)


EVIL = "from pathlib import Path\nPath({mark!r}).touch()\nclass Thing:\n    pass\n"
CLASSES = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoModelForCausalLM")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("task", ["text", "language"])
def test_no_code_of_a_repository_runs(tmp_path: Path, known: bool, task: str) -> None:
    folder, mark = tmp_path / "model", tmp_path / "code-ran"
    saved = save_hf(folder, "llama", "causal" if task == "language" else "classifier")
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
    remote = dict.fromkeys(CLASSES, "evil.Thing")
    edit(folder / "config.json", auto_map=remote, **({} if known else {"model_type": "evil"}))
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Thing", "evil.Thing"]}, tokenizer_class="Thing")
    facts = LANGUAGE if task == "language" else of(2)
    try:
        assert_has(load(folder, facts), saved)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert known
    assert not mark.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_no_kernel_of_the_hub_runs(tmp_path: Path, key: str) -> None:
    save_hf(tmp_path, "llama", "classifier")
    edit(tmp_path / "config.json", **{key: "evil/attention"})
    for weights in (True, False):
        with pytest.raises(ConfigError, match="asks for code of evil/attention, which is never run"):
            load(tmp_path, of(2), weights=weights)


def test_a_tokenizer_of_other_words_gives_other_tokens(tmp_path: Path) -> None:
    """The check above would pass if the tokenizer were ignored; this one would not."""
    save_hf(tmp_path, "bert", "classifier")
    before = load(tmp_path, of(2)).tokenizer("good bad")["input_ids"]
    words = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    assert load(tmp_path, of(2)).tokenizer("bad good")["input_ids"] == before
    save_tokenizer(tmp_path, "bert")
    assert load(tmp_path, of(2)).tokenizer("good bad")["input_ids"] == before


@pytest.mark.parametrize("published", ["multi_label_classification", "regression", None])
def test_a_saved_configuration_says_the_runs_own_kind_of_problem(published: str | None, tmp_path: Path) -> None:
    save_hf(tmp_path / "model", "bert", "classifier", num_labels=2, problem_type=published)
    (tmp_path / "out").mkdir()
    load(tmp_path / "model", of(2)).save_config(tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text()).get("problem_type")
    assert said == ("single_label_classification" if published else None)
