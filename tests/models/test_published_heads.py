"""Which published heads of text models a run takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lalora_flwr.data.data_set import Facts
from lalora_flwr.tasks.multi_label import MultiLabel
from lalora_flwr.tasks.regression import Regression
from tests.models.folders import save_hf
from tests.models.test_hf_models import assert_has, load

NUMBERS = Facts("text", (), problem=Regression(0.0, 10.0))
ONE_OF_SEVERAL = Facts("text", ("fever",), problem=MultiLabel())


@pytest.mark.parametrize("facts", [NUMBERS, ONE_OF_SEVERAL], ids=["numbers", "a class"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "llama"])
def test_a_published_head_of_numbers_is_not_used(family: str, facts: Facts, tmp_path: Path) -> None:
    """It has a unit of its own, which nobody knows, even where it has as many outputs."""
    saved = save_hf(tmp_path, family, "classifier", num_labels=1)
    base = load(tmp_path, facts)
    assert base.fresh_head and load(tmp_path, facts, weights=False).fresh_head
    assert_has(base, saved, but=base.head)
    loaded, again = base.module.state_dict(), load(tmp_path, facts).module.state_dict()
    own = [name for name in loaded if name.startswith(base.head + ".") and name.endswith("weight")]
    assert own
    for name in own:
        assert not torch.equal(loaded[name], saved.state_dict()[name]) and torch.equal(loaded[name], again[name])


def test_a_published_head_of_one_class_among_several_is_used(tmp_path: Path) -> None:
    saved = save_hf(tmp_path, "bert", "classifier", num_labels=1, problem_type="multi_label_classification")
    base = load(tmp_path, ONE_OF_SEVERAL)
    assert not base.fresh_head
    assert_has(base, saved)
