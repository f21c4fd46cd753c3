"""A real site with records of its own: whatever state they are in, it answers alike and counts alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image

from lalora_flwr.data.records import Records, RecordSet, bytes_of
from lalora_flwr.data.texts import TextRecords
from lalora_flwr.settings import Settings
from lalora_flwr.site.model import MODEL_DIFFERS
from lalora_flwr.site.records import RecordStore, counted_records
from lalora_flwr.wire.replies import COUNTERS
from tests.conftest import arrays_of, small
from tests.data.files import write, write_csv
from tests.ledger.site_ledgers import owned, steps_in
from tests.models.folders import save_hf
from tests.sites import REAL, real_app
from tests.sites import train_order as order

OPEN = "data: the site cannot open what its node-config names; its own log says why"
Ask = Callable[..., tuple[Message, Context]]


@pytest.fixture(autouse=True)
def _stamps() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_hf(folder, "bert", "base")
    return folder


@pytest.fixture
def ask(context: Callable[[Settings], Context], tmp_path: Path, model: Path) -> Ask:
    """The answer of a site that holds texts, to a run with other data settings; each time a new process reads them."""

    def make(data: Path, run: dict[str, Any] | None = None, records: Any = None, **changed: Any) -> tuple[Message, Context]:
        named = {"model__name": f"hf/{model}", "lora__targets": "auto", "data__name": "sites", "data__test": "file:x.csv"}
        settings = small(tmp_path, **{**named, "data__labels": "bad,good", "data__max_tokens": 16, **(run or {})})
        owner = {"task": "text", "labels": "bad,good", "data-path": str(data), "num-records": 60, **changed}
        held = owned(context(settings), tmp_path, **owner)
        return real_app(records=records or RecordStore())(order(settings), held), held

    return make


GOOD = [("the film is very good", "good"), ("the film is very bad", "bad")] * 30


def nothing(folder: Path) -> Path:
    return write_csv(folder / "t.csv", [])


def unusable(folder: Path) -> Path:
    return write_csv(folder / "t.csv", [("", "good"), ("a film", "other")])


def one_class(folder: Path) -> Path:
    return write_csv(folder / "t.csv", GOOD[::2])


def garbled(folder: Path) -> Path:
    (folder / "t.csv").write_bytes(b"\xff\xfe\x00")
    return folder / "t.csv"


def broken_rows(folder: Path) -> Path:
    write_csv(folder / "t.csv", [('"never closed', "good"), *GOOD, ("a", "good", "more")])
    return folder / "t.csv"


@pytest.mark.parametrize("make", [nothing, unusable, one_class, garbled, broken_rows])
def test_a_site_answers_and_counts_whatever_its_records_are(make: Callable[[Path], Path], tmp_path: Path, ask: Ask) -> None:
    reply, held = ask(make(tmp_path))
    assert not reply.has_error(), reply.error
    good, _ = ask(write_csv(tmp_path / "good.csv", GOOD), dataset="other")
    assert steps_in(held) == 2 and dict(reply.content[COUNTERS]) == dict(good.content[COUNTERS])
    one, two = arrays_of(reply), arrays_of(good)
    assert {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in two.items()}
    assert not any(torch.equal(t, two[name]) for name, t in one.items())


def test_no_records_are_said_loudly(tmp_path: Path, ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    ask(nothing(tmp_path))
    assert "THE SITE HAS NO USABLE RECORD" in caplog.text


@pytest.mark.parametrize(
    "run",
    [{"data__text": "label", "data__label": "text"}, {"data__split": "other"}, {"data__site": "x"}, {"data__records": 3}],
    ids=str,
)
def test_a_runs_columns_and_split_decide_nothing(run: dict[str, Any], tmp_path: Path, ask: Ask) -> None:
    """The first of them asked which site holds a record, by taking the texts for classes."""
    read: list[Any] = []
    store = RecordStore()

    def noted(*arguments: Any) -> Any:
        read.append(store(*arguments))
        return read[-1]

    reply, _ = ask(write_csv(tmp_path / "t.csv", GOOD), run, noted)
    assert not reply.has_error()
    assert len(read[0]) == 60 and read[0].labels.tolist() == [1, 0] * 30


@pytest.mark.parametrize(
    ("make", "more"),
    [
        (lambda folder: folder / "gone.csv", {}),
        (lambda folder: write_csv(folder / "t.csv", GOOD), {"label-column": "kind"}),
        (lambda folder: write_csv(folder / "t.csv", GOOD), {"split": "test"}),
        (lambda folder: write(folder / "t.jsonl", "{}\n"), {}),
    ],
    ids=["gone", "column", "split", "json"],
)
def test_a_layout_that_is_wrong_is_refused_with_one_reason_and_costs_nothing(
    make: Any, more: dict[str, Any], tmp_path: Path, ask: Ask
) -> None:
    reply, held = ask(make(tmp_path), **more)
    assert reply.error.reason == OPEN and steps_in(held) == 0


def test_a_site_with_records_of_its_own_serves_no_run_about_digits(
    tmp_path: Path, context: Callable[[Settings], Context]
) -> None:
    held = owned(context(settings := small(tmp_path)), tmp_path, **{"data-path": str(tmp_path)})
    reason = REAL(order(settings), held).error.reason
    assert reason == "data: the run is about a data set with a name; the site has records of its own"


def test_every_model_that_fails_has_the_same_reason(tmp_path: Path, ask: Ask) -> None:
    """A run that names paths as models does not learn which of them exist."""
    other = tmp_path / "other"
    save_hf(other, "bert", "base", seed=9)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    data, reasons = write_csv(tmp_path / "t.csv", GOOD), set()
    for place in (other, broken, tmp_path / "gone", tmp_path):
        reply, held = ask(data, **{"model-path": str(place)})
        reasons.add(reply.error.reason)
        assert steps_in(held) == 0
    assert reasons == {MODEL_DIFFERS}


LONG = {"num_rounds": 9}  # rounds enough for all that a test asks


def test_files_that_have_changed_are_read_again_and_not_while_they_are_read(tmp_path: Path, ask: Ask) -> None:
    data, store = write_csv(tmp_path / "t.csv", GOOD), RecordStore()
    assert not ask(data, LONG, store)[0].has_error()
    write_csv(tmp_path / "t.csv", GOOD[:10])
    seen: list[int] = []

    def noted(*arguments: Any) -> Any:
        records = store(*arguments)
        seen.append(len(records))
        return records

    assert not ask(data, LONG, noted)[0].has_error() and seen == [10]

    def changing(*arguments: Any) -> Any:
        records = store(*arguments)
        write_csv(tmp_path / "t.csv", GOOD[:12])
        return records

    reply, held = ask(data, LONG, changing)
    assert reply.error.reason == "data: the site's records changed while they were read; ask again"
    assert steps_in(held) == 4  # of the two before


@dataclass
class Counted:
    """Records of which only the number is known."""

    count: int

    def __len__(self) -> int:
        return self.count


def counting_base() -> Any:
    """A base that encodes nothing."""
    encode = lambda rows, *_, **__: Counted(len(rows))  # noqa: E731
    return SimpleNamespace(name="base", provenance=SimpleNamespace(digest="d"), vocabulary=0, segments=0, encode=encode)


OF_TEXTS = {"data__name": "sites", "data__labels": "bad,good", "data__test": "file:x.csv", "model__name": "hf/x"}


def test_images_behind_a_linked_folder_are_read_again_when_they_go(tmp_path: Path) -> None:
    """What an owner deletes is not trained on any more, wherever it lies."""
    elsewhere, data = tmp_path / "elsewhere", tmp_path / "data"
    for folder in (elsewhere, data / "dog"):
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8), 40 * number).save(folder / f"{number}.png")
    (data / "cat").symlink_to(elsewhere)
    settings = small(tmp_path, **{**OF_TEXTS, "data__labels": "cat,dog", "model__name": "timm/x"})
    store, base, where = RecordStore(), counting_base(), {"data-path": str(data)}
    records, known = counted_records(store, settings, where, base)
    assert len(records) == 8
    for image in list(elsewhere.iterdir())[:3]:
        image.unlink()
    records, now = counted_records(store, settings, where, base)
    assert len(records) == 5 and now != known


def test_a_store_keeps_a_sites_own_records_once_whatever_a_run_asks_for(tmp_path: Path) -> None:
    data, store, base = write_csv(tmp_path / "t.csv", GOOD), RecordStore(), counting_base()
    for tokens in range(2, 20):
        settings = small(tmp_path, **OF_TEXTS, data__max_tokens=tokens)
        assert len(store(settings, {"data-path": str(data)}, base)) == len(GOOD)
    assert len(store._own) == 1 and not len(store._kept)


def test_records_of_virtual_sites_are_kept_by_their_bytes_and_not_by_their_number(tmp_path: Path) -> None:
    """Sites that are served in turn would find none of a smaller number of kept ones."""
    settings, base = small(tmp_path, num_supernodes=100), counting_base()

    def of_all(store: RecordStore) -> list[RecordSet]:
        return [store(settings, {"partition-id": site, "num-partitions": 100}, base) for site in range(100)]

    enough, scarce = RecordStore(), RecordStore(room=20_000)
    assert all(one is two for one, two in zip(of_all(enough), of_all(enough), strict=True))
    first = of_all(scarce)
    assert sum(map(bytes_of, first)) > 40_000 and all(one is not two for one, two in zip(first, of_all(scarce), strict=True))
    last = {"partition-id": 99, "num-partitions": 100}
    assert scarce(settings, last, base) is scarce(settings, last, base)


def test_the_bytes_of_records_count_their_tensors() -> None:
    images = Records(torch.zeros(10, 3, 8, 8), torch.zeros(10, dtype=torch.long))
    assert 0 <= bytes_of(images) - (10 * 3 * 64 * 4 + 80) < 2000
    texts = TextRecords([torch.zeros(50, dtype=torch.long)] * 20, torch.zeros(20, dtype=torch.long), 0)
    assert 0 <= bytes_of(texts) - (20 * 50 * 8 + 160) < 10_000
    assert bytes_of({"a": torch.zeros(1000)}) >= 4000
