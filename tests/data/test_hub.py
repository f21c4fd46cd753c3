"""Data sets of the hub."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from lalora_flwr.data.tables import from_hub
from lalora_flwr.ground.errors import ConfigError


class FakeHub:
    """A hub that holds one data set, in place of ``datasets.load_dataset``."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.error: Exception | None = None

    def __call__(self, **options: Any) -> DatasetDict:
        self.asked.append(options)
        if self.error:
            raise self.error
        return DatasetDict({s: Dataset.from_dict({"text": [s, "b", "a"], "label": ["x", "y", "x"]}) for s in ("train", "test")})


@pytest.fixture
def hub() -> FakeHub:
    return FakeHub()


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("imdb", {"path": "imdb", "name": None}),
        ("owner/set", {"path": "owner/set", "name": None}),
        ("owner/set/config", {"path": "owner/set", "name": "config"}),
        ("owner/set/config@v1", {"path": "owner/set", "name": "config", "revision": "v1"}),
        ("imdb@0a1b", {"path": "imdb", "name": None, "revision": "0a1b"}),
    ],
)
def test_a_data_set_of_the_hub_is_asked_for_by_name(hub: FakeHub, name: str, asked: dict[str, Any]) -> None:
    read = from_hub(name, "test", hub)
    assert read is not None and read["text"][:] == ["test", "b", "a"]
    assert hub.asked == [asked]


def test_a_split_that_the_hub_lacks_is_none(hub: FakeHub) -> None:
    assert from_hub("owner/set", "validation", hub) is None


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no network\nand more"),
        ValueError("BuilderConfig 'x' not found; splits are no use"),
        RuntimeError("\n  Dataset scripts are no longer supported"),
        FileNotFoundError(),
    ],
)
def test_a_hub_out_of_reach_is_one_line(hub: FakeHub, error: Exception) -> None:
    hub.error = error
    reason = str(error).strip().split("\n")[0] or "unknown reason"
    with pytest.raises(ConfigError) as caught:
        from_hub("owner/set", "train", hub)
    assert str(caught.value) == f"data.name = 'hub:owner/set': cannot be loaded: {reason}"
