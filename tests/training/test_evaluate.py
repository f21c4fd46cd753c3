"""Metrics against scikit-learn's and against loops over single records and tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sklearn.metrics
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lalora_flwr.adapter.form import Adapter
from lalora_flwr.data.records import Records
from lalora_flwr.data.texts import IGNORED, TextRecords
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.text import CausalLanguageModel
from lalora_flwr.training.evaluate import evaluate
from lalora_flwr.training.learner import Learner


class Look(nn.Module):
    """Logits from a table: by the record's number, or by the token."""

    def __init__(self, table: Tensor, *, text: bool = False) -> None:
        super().__init__()
        self.table, self._text = nn.Parameter(table), text

    def forward(self, x: Tensor | None = None, *, input_ids: Tensor | None = None, attention_mask: Tensor | None = None) -> Any:
        if self._text:
            return SimpleNamespace(logits=self.table[input_ids])
        assert x is not None
        return self.table[x.long()]


def learner(base: BaseModel) -> Learner:
    model: Any = base.module.requires_grad_(False)  # no adapter is needed to evaluate
    return Learner(base, Adapter(model, {}), PerSampleGradients(model, {}), {})


def of_classes(logits: Tensor) -> Learner:
    return learner(BaseModel("table", Look(logits), "", (), (), logits.shape[1]))


def numbered(labels: list[int]) -> Records:
    return Records(torch.arange(len(labels), dtype=torch.float32), torch.tensor(labels))


@hypothesis_settings(max_examples=60)
@given(data=st.data(), classes=st.integers(2, 4), batch=st.integers(1, 40))
def test_metrics_of_classification_are_scikit_learns(data: st.DataObject, classes: int, batch: int) -> None:
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=30))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    logits = torch.randn(len(labels), classes)
    guesses = logits.argmax(1).tolist()
    found = evaluate(of_classes(logits), numbered(labels), batch=batch)
    average = "binary" if classes == 2 else "macro"
    assert set(found) == {"accuracy", "loss", "f1", "matthews"}
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, guesses))
    assert found["f1"] == pytest.approx(sklearn.metrics.f1_score(labels, guesses, average=average, zero_division=0))
    assert found["matthews"] == pytest.approx(sklearn.metrics.matthews_corrcoef(labels, guesses))
    losses = [-float(torch.log_softmax(row.double(), 0)[label]) for row, label in zip(logits, labels, strict=True)]
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_f1_and_matthews_by_hand() -> None:
    """Class 1 is the positive one: 2 found, 1 missed, 1 false alarm, 1 rightly left alone."""
    labels, guesses = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]
    found = evaluate(of_classes(torch.eye(2)[guesses]), numbered(labels))
    assert found["accuracy"] == 3 / 5
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)


class Unreadable:
    """Records of which some, or all, cannot be read."""

    def __init__(self, labels: list[int], lost: set[int]) -> None:
        self._labels, self._lost = torch.tensor(labels), lost

    def __len__(self) -> int:
        return len(self._labels)

    def parts(self, indices: Tensor, most: int) -> list[Tensor]:
        return list(indices.split(most))

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        read = torch.tensor([i for i in indices.tolist() if i not in self._lost], dtype=torch.long)
        return read.float(), self._labels[read]


@given(labels=st.lists(st.integers(0, 2), min_size=1, max_size=12), lost=st.sets(st.integers(0, 11)))
def test_records_that_cannot_be_read_do_not_count(labels: list[int], lost: set[int]) -> None:
    read = [i for i in range(len(labels)) if i not in lost]
    assume(read)
    torch.manual_seed(0)
    logits = torch.randn(len(labels), 3)
    found = evaluate(of_classes(logits), Unreadable(labels, lost), batch=2)
    assert found == pytest.approx(evaluate(of_classes(logits[read]), numbered([labels[i] for i in read])))


def test_nothing_to_read_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"data\.test: none of the records can be read"):
        evaluate(of_classes(torch.randn(2, 3)), Unreadable([0, 1], {0, 1}))


class Says(CausalLanguageModel):
    """A language model whose response to a prompt is known."""

    def generate(self, model: nn.Module, prompt: Tensor, most: int) -> str:
        return dict(SPOKEN)[tuple(prompt.tolist())]


SPOKEN = [((1, 2), "so #### 4"), ((2, 2, 3), "#### 5"), ((3,), "nothing"), ((5,), "####  7 ")]
REFERENCES = ["4 #### 4", "#### 6", "#### 1", "#### 7", "no answer at all"]
PROMPTS = [[1, 2], [2, 2, 3], [3], [5], [9, 9]]
RESPONSES = [[7, 8, 0], [4, 0], [6, 6, 6, 6, 0], [1, 0], [0]]


def of_tokens(table: Tensor, answer: str = "") -> Learner:
    return learner(Says("table", Look(table, text=True), "", (), (4,), table.shape[1], answer=answer))


def sequences(prompts: list[list[int]], responses: list[list[int]], references: list[str] | None = None) -> TextRecords:
    tokens = [torch.tensor(p + r) for p, r in zip(prompts, responses, strict=True)]
    labels = [torch.tensor([IGNORED] * len(p) + r) for p, r in zip(prompts, responses, strict=True)]
    return TextRecords(tokens, labels, 0, references=references or [""] * len(tokens))


_words = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@hypothesis_settings(max_examples=60)
@given(texts=st.lists(st.tuples(_words, _words), min_size=1, max_size=9), batch=st.integers(4, 40))
def test_loss_and_accuracy_of_a_language_model_are_means_over_response_tokens(
    texts: list[tuple[list[int], list[int]]], batch: int
) -> None:
    torch.manual_seed(1)
    table = torch.randn(10, 10)
    found = evaluate(of_tokens(table), sequences([p for p, _ in texts], [r for _, r in texts]), batch=batch)
    losses, right = [], []
    for prompt, response in texts:
        whole = prompt + response
        for place in range(len(prompt), len(whole)):
            logits = table[whole[place - 1]].double()
            losses.append(-float(torch.log_softmax(logits, 0)[whole[place]]))
            right.append(int(logits.argmax()) == whole[place])
    assert found == {
        "loss": pytest.approx(sum(losses) / len(losses), rel=1e-5),
        "accuracy": pytest.approx(sum(right) / len(right)),
    }


def test_exact_match_is_the_share_of_right_answers_among_responses_that_have_one() -> None:
    """4 = 4, 5 ≠ 6, none ≠ 1, 7 = 7 whatever the spaces; the last response has no answer and is not graded."""
    found = evaluate(of_tokens(torch.randn(10, 10), answer=r"#### *(\S+)"), sequences(PROMPTS, RESPONSES, REFERENCES))
    assert found["exact_match"] == found["accuracy"] == 2 / 4
    assert found["loss"] > 0


def test_an_answer_group_that_did_not_match_is_no_answer() -> None:
    base: Any = of_tokens(torch.randn(10, 10), answer=r"yes|no: (\d+)").base
    assert [base.answer_in(text) for text in ("yes", "no: 3", "perhaps")] == [None, "3", None]


def test_without_an_expression_nothing_is_generated() -> None:
    found = evaluate(of_tokens(torch.randn(10, 10)), sequences(PROMPTS, RESPONSES, REFERENCES))
    assert set(found) == {"accuracy", "loss"}


def test_evaluation_leaves_no_gradient_and_is_in_evaluation_mode() -> None:
    seen: list[tuple[bool, bool]] = []

    class Watching(Look):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(*args, **kwargs)

    base = BaseModel("table", Watching(torch.randn(3, 2)), "", (), (), 2)
    base.module.train()
    evaluate(learner(base), numbered([0, 1, 1]))
    assert seen == [(False, False)]
