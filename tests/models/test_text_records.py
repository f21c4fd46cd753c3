"""Texts as a model's tokens, and records that do not touch each other whatever they are batched with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from lalora_flwr.data.cleaning import Rows
from lalora_flwr.data.columns import Columns
from lalora_flwr.data.data_set import Facts
from lalora_flwr.data.own_records import _known_tokens
from lalora_flwr.data.texts import IGNORED, TextRecords
from lalora_flwr.gradients.dropout import remove_dropout
from lalora_flwr.models import load_base_model
from lalora_flwr.privacy.clip import clip
from lalora_flwr.settings import LoraSettings, ModelSettings
from tests.adapters import BOTH, attach_adapter, engine_for, set_active
from tests.models.folders import CLS, SEP, save_hf

TEXTS = ["good", "the film is very good", "bad plot and poor actor", "a long film", "unheard words here"]
OTHERS = ["fine", "not good", "the long plot is bad and the short film is not", "very", "a"]
ANSWERS = ["good", "a very long and good answer", "#### 4", "bad", "the answer is #### 1 2"]
PAIRED = Columns(text="text", text_pair="other", label="label")


def base_of(folder: Path, family: str, *, language: bool = False, max_tokens: int = 16, pad: bool = True, **config: Any) -> Any:
    save_hf(folder, family, "causal" if language else "classifier", pad=pad, **config)
    facts = Facts("language", ()) if language else Facts("text", ("a", "b"))
    return load_base_model(ModelSettings(name=f"hf/{folder}"), facts, max_tokens)


def rows(columns: Columns, **values: Any) -> Rows:
    columns_of = {"text": TEXTS, "other": OTHERS, "answer": ANSWERS, **values}
    count = min(len(column) for column in columns_of.values())
    table = Dataset.from_dict({name: column[:count] for name, column in columns_of.items()})
    return Rows(table, columns, torch.arange(count) % 2)


def ids_of(base: Any, text: str) -> list[int]:
    return list(base.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_a_text_is_framed_as_the_model_wants_it_and_cut(tmp_path: Path, family: str) -> None:
    base = base_of(tmp_path, family, max_tokens=4)
    records = base.encode(rows(Columns(text="text", label="label")))
    end = [SEP] if family != "llama" else []
    for text, tokens in zip(TEXTS, records.tokens, strict=True):
        assert tokens.tolist() == [CLS, *ids_of(base, text)[: 3 - len(end)], *end]
    assert records.types is None and records.labels.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_both_texts_of_a_pair_are_there_and_segments_only_where_the_model_has_them(tmp_path: Path, family: str) -> None:
    base = base_of(tmp_path, family, max_tokens=40)
    # a tokenizer that hands out segments whatever the model
    base.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    records = base.encode(rows(PAIRED))
    for i, (text, other) in enumerate(zip(TEXTS[:3], OTHERS, strict=False)):
        end = [SEP] if family != "llama" else []
        first, second = [CLS, *ids_of(base, text), SEP], [*ids_of(base, other), *end]
        assert records.tokens[i].tolist() == [*first, *second]
        if family == "bert":
            assert records.types[i].tolist() == [0] * len(first) + [1] * len(second)
    assert (records.types is None) == (family != "bert")
    inputs, _ = records.batch(torch.arange(len(records)))
    assert base.logits(base.module, inputs).shape == (len(records), 2)


def test_a_prompt_bears_no_loss_and_a_response_ends(tmp_path: Path) -> None:
    base = base_of(tmp_path, "llama", language=True, max_tokens=32)
    records = base.encode(rows(Columns(text="text", text_pair="other", response="answer")))
    for i in range(len(TEXTS)):
        asked = [CLS, *ids_of(base, f"{TEXTS[i]}\n{OTHERS[i]}\n")]
        said = [*ids_of(base, ANSWERS[i]), SEP]
        assert records.tokens[i].tolist() == asked + said
        assert records.labels[i].tolist() == [IGNORED] * len(asked) + said
    assert list(records.references) == ANSWERS


@pytest.mark.parametrize("most", [2, 3, 5, 8])
def test_a_cut_prompt_loses_its_start_and_a_cut_response_its_end(tmp_path: Path, most: int) -> None:
    base = base_of(tmp_path, "llama", language=True, max_tokens=most)
    records = base.encode(rows(Columns(text="text", response="answer")))
    for i, (tokens, labels) in enumerate(zip(records.tokens, records.labels, strict=True)):
        said = [*ids_of(base, ANSWERS[i]), SEP][: most - 1]
        asked = [CLS, *ids_of(base, TEXTS[i])][-(most - len(said)) :]
        assert tokens.tolist() == asked + said and len(asked) >= 1
        assert labels.tolist() == [IGNORED] * len(asked) + said


def test_numbers_are_texts_and_a_missing_second_text_is_none(tmp_path: Path) -> None:
    """A column of answers that are all numbers is read as numbers; 0 is an answer too."""
    base = base_of(tmp_path, "llama", language=True)
    columns = Columns(text="text", text_pair="other", response="answer")
    records = base.encode(rows(columns, answer=[0, 1, 2, 3, 4], other=["how", None, "", "much", "a"]))
    assert list(records.references) == ["0", "1", "2", "3", "4"]
    assert records.tokens[0].tolist()[-2:] == [*ids_of(base, "0"), SEP]
    assert records.tokens[1].tolist() == [CLS, *ids_of(base, TEXTS[1]), *ids_of(base, "1"), SEP]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("bert", {}),
    ("roberta", {}),
    ("distilbert", {}),
    ("gpt2", {}),
    ("llama", {}),
    ("gpt2", {"pad": False}),
    ("llama", {"pad": False, "pad_token_id": 1}),  # as Llama-2: a configuration with padding, a tokenizer without
    ("llama", {"pad_token_id": 1}),
]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_a_texts_logits_do_not_depend_on_what_it_is_batched_with(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    base = base_of(tmp_path, family, **options)
    base.module.double()
    records = base.encode(rows(PAIRED))
    with torch.no_grad():
        together = base.logits(base.module, records.batch(torch.arange(len(records)))[0])
        for i in range(len(records)):
            alone = base.logits(base.module, records.batch(torch.tensor([i]))[0])
            assert torch.allclose(alone[0], together[i], atol=1e-10), i


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("factors", ["A", "B", "AB"])
def test_one_example_of_a_language_model_is_one_record(tmp_path: Path, family: str, factors: str) -> None:
    """Gradients and clipped sums of examples of all lengths, together, are those of one at a time."""
    base = base_of(tmp_path, family, language=True, max_tokens=32)
    base.module.double()
    model = attach_adapter(base, LoraSettings(rank=2), seed=0)
    remove_dropout(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3
    records = base.encode(rows(Columns(text="text", text_pair="other", response="answer")))
    active = set_active(model, frozenset(factors))
    alone = []
    for i in range(len(records)):
        inputs, labels = records.batch(torch.tensor([i]))
        alone.append(torch.autograd.grad(base.losses(model, inputs, labels).sum(), list(active.values())))
    engine = engine_for(model)
    set_active(model, frozenset(factors))
    inputs, labels = records.batch(torch.arange(len(records)))
    together = engine(len(records), lambda: base.losses(model, inputs, labels))
    norms = [float(torch.cat([g.flatten() for g in gradients]).norm()) for gradients in alone]
    bound = sorted(norms)[2]
    sums, _ = clip(together, bound)
    for k, name in enumerate(active):
        expected = torch.stack([gradients[k] for gradients in alone])
        assert torch.allclose(together[name], expected, rtol=1e-9, atol=1e-12), name
        clipped = sum(g[k] * min(1.0, bound / norm) for g, norm in zip(alone, norms, strict=True))
        assert torch.allclose(sums[name].double(), clipped, rtol=1e-4, atol=1e-6 * bound), name


def test_an_examples_loss_is_the_mean_over_its_response(tmp_path: Path) -> None:
    base = base_of(tmp_path, "llama", language=True, max_tokens=32)
    records = base.encode(rows(Columns(text="text", response="answer")))
    inputs, labels = records.batch(torch.arange(len(records)))
    losses = base.losses(base.module, inputs, labels)
    for i, tokens in enumerate(records.tokens):
        logits = base.module(tokens.unsqueeze(0)).logits[0].log_softmax(-1)
        wanted = [j for j in range(1, len(tokens)) if records.labels[i][j] != IGNORED]
        assert torch.allclose(losses[i], -torch.stack([logits[j - 1, tokens[j]] for j in wanted]).mean(), atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_response_is_the_likeliest_token_after_token_until_the_end(tmp_path: Path, family: str) -> None:
    base = base_of(tmp_path, family, language=True, max_tokens=32)
    model = attach_adapter(base, LoraSettings(), seed=0).eval()
    prompt = torch.tensor([CLS, *ids_of(base, "how much is 1 plus 2")])
    tokens = prompt.tolist()
    while len(tokens) < len(prompt) + 6 and (len(tokens) == len(prompt) or tokens[-1] != SEP):
        tokens.append(int(base.module(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert base.generate(model, prompt, 6) == base.tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)


def test_a_response_stays_within_the_models_positions(tmp_path: Path) -> None:
    base = base_of(tmp_path, "gpt2", language=True, max_tokens=40)
    model = attach_adapter(base, LoraSettings(), seed=0).eval()
    prompt = torch.full((38,), 5)
    assert len(base.generate(model, prompt, 64).split()) <= 2


def test_all_of_the_adapter_trains_on_pairs(tmp_path: Path) -> None:
    base = base_of(tmp_path, "bert")
    model = attach_adapter(base, LoraSettings(rank=2, head="trained"), seed=0)
    engine = engine_for(model)
    set_active(model, BOTH)
    inputs, labels = base.encode(rows(PAIRED)).batch(torch.arange(4))
    gradients = engine(4, lambda: base.losses(model, inputs, labels))
    assert any("classifier" in name for name in gradients) and all(len(g) == 4 for g in gradients.values())


@pytest.mark.parametrize("most", [2, 3, 4])
def test_no_text_is_longer_than_allowed_even_where_the_tokenizer_does_not_cut(tmp_path: Path, most: int) -> None:
    """A pair needs three special tokens: with room for two, the tokenizer leaves the texts as long as they are."""
    records = base_of(tmp_path, "bert", max_tokens=most).encode(rows(PAIRED, text=[" ".join(TEXTS) * 20] * 5))
    assert max(len(tokens) for tokens in records.tokens) <= most
    assert records.types is not None and [len(t) for t in records.types] == [len(t) for t in records.tokens]


def test_a_token_of_a_type_that_the_network_lacks_is_found(tmp_path: Path) -> None:
    records = base_of(tmp_path, "bert", max_tokens=8).encode(rows(PAIRED))
    assert list(_known_tokens(records, 0, 2)) == list(range(5)) and list(_known_tokens(records, 0, 1)) == []


@pytest.mark.parametrize(
    "columns", [PAIRED, Columns(text="text", label="label"), Columns(text="text", response="answer")], ids=str
)
def test_texts_encoded_one_by_one_are_the_texts_encoded_together(tmp_path: Path, columns: Columns) -> None:
    base = base_of(tmp_path, "gpt2" if columns.response else "bert", language=bool(columns.response))
    whole = rows(columns)
    together = base.encode(whole)
    apart = TextRecords.joined([base.encode(whole.take([i])) for i in range(len(whole))])
    some = together.take([3, 0])
    for found, places in ((apart, list(range(len(whole)))), (some, [3, 0])):
        assert list(found.references) == [together.references[i] for i in places if together.references]
        (inputs, labels), (wanted, targets) = found.batch(torch.arange(len(places))), together.batch(torch.tensor(places))
        assert set(inputs) == set(wanted) and all(torch.equal(inputs[name], wanted[name]) for name in wanted)
        assert torch.equal(labels, targets) and found.padding == together.padding
