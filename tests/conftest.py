"""Small whole runs that many tests look at, each made once and then only read."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from hypothesis import settings as hypothesis_settings
from safetensors.torch import load_file
from torch import Tensor

from lalora_flwr.engines.inline import run_inline, simulated_app
from lalora_flwr.settings import Settings, settings_from
from lalora_flwr.training.learner import ModelStore
from lalora_flwr.wire.orders import ARRAYS
from tests.adapters import factor_of

os.environ["LALORA_CACHE"] = ""  # of no test but those that hand one in
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background without Ctrl-C
hypothesis_settings.register_profile("shared-machine", deadline=None)
hypothesis_settings.load_profile("shared-machine")

SMALL: dict[str, Any] = {  # every key that shapes a result, so that no test depends on a default
    "strategy": "la-lora",
    "num-rounds": 2,
    "num-supernodes": 3,
    "fraction-train": 1.0,
    "max-failures": 1,
    "seed": 0,
    "model.name": "embedded/vit-digits",
    "lora.rank": 2,
    "lora.alpha": 4.0,
    "lora.targets": "attn.qkv",
    "lora.head": "frozen",
    "lora.schedule": "auto",
    "data.partition": "iid",
    "train.local-steps": 2,
    "train.batch-size": 40,
    "train.optimizer": "sgd",
    "train.lr": 0.5,
    "privacy.epsilon": 4.0,
    "privacy.delta": 1e-4,
    "privacy.clip-norm": 1.0,
    "privacy.accountant": "pld",
    "privacy.max-rounds": 0,
    "filter.name": "auto",
}

MODELS = ModelStore()  # one frozen model for all small runs of a test process
SITES = simulated_app(MODELS)
AppCall = Callable[[Message, Context], Message]


def rounded(figures: Any) -> Any:
    """Without the last digits: the accountant's Fourier transform adds in an order that depends on where memory lies."""
    if isinstance(figures, dict):
        return {key: rounded(value) for key, value in figures.items()}
    if isinstance(figures, list):
        return [rounded(value) for value in figures]
    return float(f"{figures:.12g}") if isinstance(figures, float) else figures


def small(folder: Path, **overrides: Any) -> Settings:
    """Settings of a run of seconds under ``folder``; ``num_rounds=1`` and ``train__lr=0.1`` override keys."""
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in overrides.items()}
    return settings_from({**SMALL, "output-dir": str(folder), "run-name": "run", **named})


def strict_json(text: str) -> Any:
    """JSON as the standard has it: NaN and Infinity are errors."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def files_in(folder: Path) -> dict[str, bytes]:
    """All that lies under a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass
class Spy:
    """A ClientApp's call that keeps all messages; ``behaviour`` may replace a site's answer."""

    behaviour: Callable[[Message, Context, AppCall], Message] = lambda message, context, app: app(message, context)
    exchange: list[tuple[Message, Message]] = field(default_factory=list)
    contexts: dict[int, Context] = field(default_factory=dict)

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self.behaviour(message, context, SITES)
        self.exchange.append((message, reply))
        self.contexts[int(context.node_config["partition-id"])] = context
        return reply

    def training(self, server_round: int) -> list[tuple[Message, Message]]:
        """Orders and replies of a round, by site."""
        return [
            (order, reply)
            for order, reply in self.exchange
            if order.metadata.message_type == "train" and order.content["config"]["server-round"] == server_round
        ]


@dataclass(frozen=True)
class Finished:
    """A finished run, as it lies on disk, and what its sites were asked and said."""

    path: Path
    settings: Settings
    spy: Spy

    @property
    def summary(self) -> dict[str, Any]:
        return strict_json((self.path / "summary.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [strict_json(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def checkpoint(self) -> dict[str, Tensor]:
        return load_file(self.path / "checkpoint" / "adapter.safetensors")


def run_spied(settings: Settings, spy: Spy) -> Path:
    """The inline engine with a spy for a ClientApp."""
    app: Any = spy  # the engine only calls it
    return run_inline(settings, app=app, models=MODELS)


def arrays_of(message: Message) -> dict[str, Tensor]:
    """The tensors that travel in a message."""
    return dict(message.content[ARRAYS].to_torch_state_dict())


def factors_of(names: Any) -> set[str]:
    return {factor_of(name) for name in names}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """A run with the given overrides of `SMALL`; equal overrides share one run."""
    made: dict[str, Finished] = {}

    def make(**overrides: Any) -> Finished:
        name = repr(sorted(overrides.items()))
        if name not in made:
            settings, spy = small(tmp_path_factory.mktemp("run"), **overrides), Spy()
            made[name] = Finished(run_spied(settings, spy), settings, spy)
        return made[name]

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def context() -> Callable[[Settings], Context]:
    """A fresh context of site 0."""
    from lalora_flwr.settings import flatten

    def make(settings: Settings) -> Context:
        return Context(
            run_id=1,
            node_id=7,
            node_config={"partition-id": 0, "num-partitions": settings.num_supernodes},
            state=RecordDict(),
            run_config=dict(flatten(settings)),
        )

    return make
