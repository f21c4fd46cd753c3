"""A Poisson batch may be empty. It is a step like any other: noise, no record, and no error that would tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image

from lalora_flwr.data.images import ImageRecords
from lalora_flwr.data.records import Records, RecordSet, Subset
from lalora_flwr.data.texts import TextRecords
from tests.conftest import Finished, Spy, run_spied, small
from tests.data.files import picture, red
from tests.training.test_tasks import RUN, text

NONE = torch.empty(0, dtype=torch.long)


def texts(*, of_tokens: bool = False) -> TextRecords:
    tokens = [torch.arange(length) for length in (3, 1, 4)]
    return TextRecords(tokens, [t + 1 for t in tokens] if of_tokens else torch.arange(3), 0, [t * 0 for t in tokens])


def images() -> ImageRecords:
    table = Dataset.from_dict({"image": [picture(i) for i in range(3)]}, Features({"image": Image()}))
    return ImageRecords(table, "image", torch.arange(3), red, "RGB")


SETS: dict[str, RecordSet] = {
    "tensors": Records(torch.zeros(3, 2), torch.arange(3)),
    "named tensors": Records({"x": torch.zeros(3, 2)}, torch.arange(3)),
    "texts": texts(),
    "language": texts(of_tokens=True),
    "images": images(),
}


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("most", [0, 1, 5])
def test_an_empty_batch_has_no_record(kind: str, most: int) -> None:
    for records in (SETS[kind], Subset(SETS[kind], torch.tensor([2, 0]))):
        for part in records.parts(NONE, most):
            assert not len(part) and not len(records.batch(part)[1])
        inputs, labels = records.batch(NONE)
        assert not len(labels) and not any(len(x) for x in (inputs.values() if isinstance(inputs, dict) else [inputs]))


def test_a_run_with_empty_batches_goes_on(tmp_path: Path) -> None:
    run = {**RUN, **text(tmp_path), "num_rounds": 1, "train__batch_size": 1, "train__local_steps": 12}
    settings, spy = small(tmp_path, **run), Spy()
    finished = Finished(run_spied(settings, spy), settings, spy)
    assert finished.metrics[0]["failures"] == 0 and finished.metrics[0]["sites"] == 2
