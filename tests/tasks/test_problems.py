"""Losses, metrics and labels of each kind, against the libraries that define them and against naive loops."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mean_absolute_error, r2_score, roc_auc_score, root_mean_squared_error
from torch import Tensor, nn

from lalora_flwr.data.labels import _is_collection
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.ground.lists import ends_of
from lalora_flwr.server.metrics import HEADLINE_OF, HEADLINES
from lalora_flwr.settings import KEYS, DataSettings
from lalora_flwr.tasks import problem_of
from lalora_flwr.tasks.label_text import as_text
from lalora_flwr.tasks.multi_label import LONGEST, MultiLabel
from lalora_flwr.tasks.problem import Problem
from lalora_flwr.tasks.regression import Regression
from lalora_flwr.tasks.single_label import SingleLabel
from tests.reference import generator

PROBLEMS: dict[str, tuple[Problem, int]] = {
    "single-label": (SingleLabel(), 4),
    "multi-label": (MultiLabel(), 4),
    "regression": (Regression(-20.0, 100.0), 1),
}
CLASSES = {"effusion": 0, "mass, large": 1, "1": 2, "true": 3}
KINDS = st.sampled_from(sorted(PROBLEMS))


def outputs(kind: str, n: int = 12) -> tuple[Problem, Tensor, Tensor]:
    problem, width = PROBLEMS[kind]
    return problem, torch.randn(n, width, generator=generator(n), dtype=torch.float64), problem.made_up(n, width)


def test_each_value_of_the_key_is_a_problem_with_a_headline() -> None:
    values = KEYS["data.problem-type"].allowed.removeprefix("one of ").split(", ")
    assert set(values) == set(PROBLEMS) == set(HEADLINE_OF)
    for kind in values:
        problem, logits, targets = outputs(kind)
        bounds = "-20,100" if kind == "regression" else ""
        assert problem_of(DataSettings(problem_type=kind, label_range=bounds)) == problem and problem.name == kind
        found = problem.metrics(logits, targets)
        assert next(iter(found)) == HEADLINE_OF[kind] and [name for name in HEADLINES if name in found] == [HEADLINE_OF[kind]]


@pytest.mark.parametrize("kind", ["multi-label", "regression"])
def test_losses_are_those_of_transformers(kind: str) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    problem, logits, targets = outputs(kind, 7)
    tiny: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = BertConfig(vocab_size=9, num_labels=logits.shape[1], problem_type=problem.transformers_name, **tiny)  # type: ignore[arg-type]
    model = BertForSequenceClassification(config).eval()
    ids = torch.arange(14).reshape(7, 2) % 9
    with torch.no_grad():
        said = model(input_ids=ids, labels=targets)
    assert float(said.loss) == pytest.approx(float(problem.losses(said.logits, targets).mean()), rel=1e-5)


@given(KINDS, st.integers(1, 6))
def test_each_record_has_a_loss_and_a_gradient_of_its_own(kind: str, n: int) -> None:
    problem, _, targets = outputs(kind, n)
    layer = nn.Linear(5, PROBLEMS[kind][1])
    values = torch.randn(n, 5, generator=generator(3))
    together = PerSampleGradients(layer, dict(layer.named_parameters()))(n, lambda: problem.losses(layer(values), targets))
    for j in range(n):
        layer.zero_grad()
        problem.losses(layer(values[j : j + 1]), targets[j : j + 1]).sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(together[name][j], parameter.grad, rtol=1e-5, atol=1e-6)


@given(KINDS, st.integers(2, 9))
def test_whether_a_record_is_right_is_its_own_affair(kind: str, n: int) -> None:
    """A site tells a noised count of them, of which one record may move only its own part."""
    problem, logits, targets = outputs(kind, n)
    together = problem.right(logits, targets)
    assert together.shape == (n,) and together.dtype == torch.bool
    assert [bool(problem.right(logits[j : j + 1], targets[j : j + 1])) for j in range(n)] == together.tolist()


def test_metrics_of_several_classes_leave_out_a_class_that_all_or_none_have() -> None:
    targets = torch.tensor([[1.0, 0, 1, 0], [0, 0, 1, 1], [1, 0, 1, 0], [1, 0, 1, 0]])
    logits = torch.tensor([[2.0, 1, 1, 1], [1, -1, 1, 0.5], [3, -1, 1, -2], [-1, -1, 1, -3]])
    found = MultiLabel().metrics(logits, targets)
    areas = [roc_auc_score(targets[:, c], logits[:, c]) for c in (0, 3)]
    assert found["auroc"] == pytest.approx(sum(areas) / 2) and found["exact_match"] == 1 / 4
    assert found["f1"] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)  # of classes 0, 2 and 3
    perfect = MultiLabel().metrics(2 * targets - 1, targets)
    assert (perfect["auroc"], perfect["f1"], perfect["exact_match"]) == (1, 1, 1)
    assert math.isnan(MultiLabel().metrics(logits, torch.zeros(4, 4))["auroc"])
    assert math.isnan(MultiLabel().metrics(logits * math.nan, targets)["auroc"])


@given(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=9).filter(lambda v: np.std(v) > 0.01), st.integers(0, 99))
def test_metrics_of_numbers_are_in_their_unit(targets: Sequence[float], seed: int) -> None:
    problem = Regression(-20.0, 100.0)
    truth = torch.tensor(targets)
    guesses = torch.randn(len(truth), 1, generator=generator(seed))
    found = problem.metrics(guesses, truth)
    units = 40 + 60 * truth.double(), 40 + 60 * guesses.squeeze(1).double()
    assert found["r2"] == pytest.approx(r2_score(*units)) and found["mae"] == pytest.approx(mean_absolute_error(*units))
    assert found["rmse"] == pytest.approx(root_mean_squared_error(*units))
    assert found["pearson"] == pytest.approx(float(np.corrcoef(*units)[0, 1]))
    assert found["within_tenth"] == pytest.approx(float(((units[0] - units[1]).abs() <= 12).double().mean()), abs=1e-9)


def test_numbers_that_are_all_the_same_have_no_r2() -> None:
    assert math.isnan(Regression(0.0, 1.0).metrics(torch.randn(3, 1), torch.ones(3))["r2"])


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("effusion", [0]),
        ("mass, large", [1]),  # a class as a whole, before its comma separates anything
        ("effusion|mass, large", [0, 1]),
        ("effusion; 1.0", [0, 2]),
        ("TRUE, effusion", [0, 3]),
        ('["effusion", "mass, large"]', [0, 1]),
        ("[1, true]", [2, 3]),
        ("[1.0]", [2]),
        ("[]", []),
        ("cough", None),
        ("effusion|", None),
        ("effusion|effusion", None),
        ('["effusion", "effusion"]', None),
        ('["effusion", null]', None),
        ('[["effusion"]]', None),
        ("[effusion]", None),
        ("[effusion]|true", None),
        ("[" * 5000, None),
    ],
)
def test_several_classes_in_one_field(text: str, numbers: list[int] | None) -> None:
    wanted = None if numbers is None else bytes(n in numbers for n in range(4))
    assert MultiLabel().target(text, CLASSES) == wanted


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.sets(st.integers(0, n - 1)), max_size=12))))
def test_targets_together_are_a_0_or_1_for_each_class(drawn: tuple[int, list[set[int]]]) -> None:
    count, records = drawn
    classes, problem = {f"c{n}": n for n in range(count)}, MultiLabel()
    targets = [problem.target(json.dumps([f"c{n}" for n in own]), classes) for own in records]
    stacked = problem.stacked([target for target in targets if target is not None], count)
    naive = torch.tensor([[float(n in own) for n in range(count)] for own in records]).reshape(len(records), count)
    assert torch.equal(stacked, naive) and stacked.dtype == problem.dtype and not problem.refusal(stacked, count)


def test_a_target_takes_a_byte_a_class() -> None:
    """As Python's numbers, 14 classes of 100,000 records took 45 MB and a tensor of them 5.6."""
    classes = {f"c{n}": n for n in range(1000)}
    assert sys.getsizeof(MultiLabel().target("c1|c5", classes)) < 1100


@pytest.mark.parametrize("depth", [2, 500, 900, 950, 980, 990, 1000, 1100, 100_000])
@pytest.mark.parametrize("inner", ["", "1", '"effusion"', "1e999", "9" * 5000])
def test_no_field_makes_a_site_fail(depth: int, inner: str) -> None:
    """However deep it is: what is read may be too deep to be written again."""
    text = "[" * depth + inner + "]" * depth
    assert MultiLabel().target(text, CLASSES) is None
    assert all(isinstance(name, str) for name in MultiLabel().parts(text, CLASSES))


@pytest.mark.parametrize("text", ["|" * LONGEST, "ab;" * LONGEST, "[" + "1," * LONGEST + "1]"], ids=["blank", "names", "list"])
def test_a_field_that_would_take_long_is_not_taken_apart(text: str) -> None:
    """16 MB of separators took a site 13 seconds, which a server that waits for the answer would see."""
    assert MultiLabel().parts(text + "|", CLASSES) == [""] and MultiLabel().target(text + "|", CLASSES) is None
    assert len(MultiLabel().parts("|".join(["effusion"] * 500), CLASSES)) == 500


@given(st.lists(st.sampled_from(sorted(CLASSES)), unique=True), st.sampled_from("|;"))
def test_lists_and_separators_mean_the_same(names: list[str], separator: str) -> None:
    problem = MultiLabel()
    target = problem.target(json.dumps(names), CLASSES)
    assert target is not None and [name for name, n in CLASSES.items() if target[n]] == [n for n in CLASSES if n in names]
    if names:
        assert problem.target(separator.join(names), CLASSES) == target


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("-20", -1.0),
        ("100.0", 1.0),
        ("40", 0.0),
        (" 1e1", -0.5),
        *((t, None) for t in ("-20.1", "101", "nan", "inf", "4_0", "3,5", "true", "")),
    ],
)
def test_a_number_is_placed_in_its_range(text: str, target: float | None) -> None:
    assert Regression(-20.0, 100.0).target(text, {}) == target


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.sampled_from([np.float16, np.float32, np.float64]))
def test_the_ends_of_a_range_belong_to_it_in_columns_of_any_width(low: float, width: float, kind: type[np.floating[Any]]) -> None:
    problem = Regression(low, low + width)
    with np.errstate(over="ignore"):
        ends = [str(float(kind(end))) for end in (problem.low, problem.high)]
    found = [problem.target(end, {}) for end in ends]
    assert all(target is not None and abs(target) < 1 + 1e-9 for target in found)
    if kind is np.float64:
        assert found == pytest.approx([-1.0, 1.0])
    assert Regression(1000.0, 1000.001).target("1000", {}) == -1.0  # what the upper end is in float16, too


@pytest.mark.parametrize("text", ["0.1000000014", "0.10000000150", "0.1001", "-3.0000001", "inf"])
def test_no_other_number_beyond_an_end_belongs_to_its_range(text: str) -> None:
    assert Regression(-3.0, 0.1).target(text, {}) is None and Regression(-1e300, 1e300).target("inf", {}) is None


@pytest.mark.parametrize("kind", PROBLEMS)
def test_tensors_of_other_labels_are_refused(kind: str) -> None:
    problem, _, targets = outputs(kind)
    width = PROBLEMS[kind][1]
    assert not problem.refusal(targets, width)
    assert problem.refusal(targets + 4, width) and problem.refusal(targets.unsqueeze(0), width)


def test_a_label_of_combining_marks_takes_no_longer_than_another() -> None:
    """Bringing a text to NFC takes the square of its marks in a row: 80 kB took a site five seconds, 16 MB would take days."""
    marks = "a" + "\u0301\u0327" * 2_000_000
    assert as_text(marks) == marks and as_text(f" {marks} ") == marks
    assert as_text("e\u0301" * 300) == "\u00e9" * 300
    assert MultiLabel().target("e|" + marks, {"e": 0}) is None and MultiLabel().target("e|" + marks[:60000], {"e": 0}) is None


def test_outputs_that_are_not_finite_are_not_right() -> None:
    outputs = torch.tensor([[math.nan, -1.0], [-1.0, -1.0], [-math.inf, -1.0]])
    assert MultiLabel().right(outputs, torch.zeros(3, 2)).tolist() == [False, True, False]


@pytest.mark.parametrize("text", ["0,5e-324", "1,1.0000000000000002", "3,3", "4,3"])
def test_bounds_with_nothing_between_them_are_no_range(text: str) -> None:
    with pytest.raises(ValueError, match="not two numbers"):
        ends_of(text)


def test_a_label_that_is_nested_too_deeply_is_no_collection() -> None:
    assert not _is_collection("[" * 100_000) and _is_collection("[1]")
