"""Tools of the attacks: a real site that an attacker may order about, and what it lets out.

The site is driven as a SuperNode drives it: a real site's ClientApp with a message and a context, a
ledger file and an owner's node-config. Its records are a file that an attacker of record-level privacy knows but for one
record: `Site.serve` is called on the file with the record and on the file without it.

Two values are handed to the site's host: the source of its draws, so that both files meet the same ones, and what makes
its sums, so that every step's sum is seen with and without noise. `Watched` gives the second
file the releases of the first: from the same history onwards, all that may differ between the two is one record's
clipped gradient in each sum, and the replies must be equal to the last bit.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from lalora_flwr.ground.errors import LedgerError
from lalora_flwr.ledger.entries import Reserve
from lalora_flwr.ledger.file import LedgerFile, create
from lalora_flwr.privacy.mechanism import PrivateSum
from lalora_flwr.privacy.randomness import SystemRandom
from lalora_flwr.wire.orders import ARRAYS
from lalora_flwr.wire.packed import is_packed, packed, unpacked
from lalora_flwr.wire.replies import COUNTERS
from tests.models.folders import save_hf
from tests.reference import OpenLedger
from tests.sites import real_app, stamp

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where ledgers of thousands of attacks need no disk
LABELS = "bad,good"
RECORDS = (  # the last one is the attacker's: as long as the model takes, of the class it least believes in
    *(("the film is very good", "good"), ("the plot is bad", "bad"), ("a fine actor", "good"), ("poor and long", "bad")),
    *(("not short not long", "good"), ("very very bad film", "bad"), ("good", "good")),
    ("actor " * 34 + "####", "bad"),
)
RUN: dict[str, Any] = {  # an honest run on those records; attacks change it
    "strategy": "ffa-lora",
    "num-rounds": 1,
    "num-supernodes": 1,
    "model.name": "hf/model",
    "lora.rank": 2,
    "lora.alpha": 4.0,
    "lora.targets": "query",
    "data.name": "sites",
    "data.labels": LABELS,
    "data.test": "file:public.csv",
    "train.local-steps": 1,
    "train.batch-size": 8,
    "train.lr": 1.0,
    "privacy.epsilon": 1.0,
    "privacy.delta": 1e-5,
    "privacy.clip-norm": 1.0,
}


def text_model(folder: Path, **config: Any) -> Path:
    """A folder with a small text classifier whose head believes in something, so that gradients are of ordinary size."""
    if not folder.exists():
        save_hf(folder, "bert", "classifier", initializer_range=0.3, **config)
    return folder


def table(path: Path, rows: Iterable[Sequence[str]] = RECORDS, names: str = "text,label") -> Path:
    """A CSV file of records, every field quoted."""
    lines = [",".join(f'"{value}"' for value in row) for row in rows]
    path.write_text("\n".join([names, *lines]) + "\n")
    return path


class Draws:
    """A random source of fixed draws, the same for all files: record j meets the same uniform whoever comes after it."""

    seeded = False

    def __init__(self, seed: int = 0) -> None:
        self._uniform, self._normal = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
        self.uniforms: list[Tensor] = []  # of each step, for the records there were

    def uniform(self, n: int) -> Tensor:
        drawn = torch.from_numpy(self._uniform.random(4096))[:n]
        self.uniforms.append(drawn)
        return drawn

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self._typed(self._normal.standard_normal(tuple(shape)))

    @staticmethod
    def _typed(drawn: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(drawn).to(SystemRandom().normal(torch.Size([1])).dtype)


class Signs(Draws):
    """Draws of one size, or of none: what they are multiplied with before they are added can be read off the result."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self._size = size

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self._typed(self._size * self._normal.choice([-1.0, 1.0], tuple(shape)))


@dataclass
class Step:
    """One release as an attacker inside of the site would see it. Vectors are float64, all tensors one after the other.

    Attributes:
        total: the clipped sum without noise.
        noise: what is added to it when every draw is 1 or -1.
        records: how many records the sum holds.
        released: what left `PrivateSum`, by name.
    """

    total: Tensor
    noise: Tensor
    records: int
    released: dict[str, Tensor]


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def watched(steps: list[Step], script: Sequence[Step] | None, expected: list[float]) -> type[PrivateSum]:
    """A `PrivateSum` that adds to ``steps`` what it releases, and releases what ``script`` says if there is one."""

    class Watched(PrivateSum):
        def __init__(self, mechanism: Any, *arguments: Any) -> None:
            super().__init__(mechanism, *arguments)
            expected.append(mechanism.expected_batch)
            self._rows = 0

        def add(self, per_sample: Mapping[str, Tensor]) -> None:
            self._rows += len(next(iter(per_sample.values())))
            super().add(per_sample)

        def release(self, ledger: Any, source: Any) -> dict[str, Tensor]:
            exact = copy.deepcopy(self)  # with hardly any noise the grid that sums are rounded to is fine, too
            exact._mechanism = dataclasses.replace(self._mechanism, noise_multiplier=1e-9)
            total = expected[-1] * _flat(PrivateSum.release(exact, OpenLedger(), Signs(0.0)).values())
            noised = expected[-1] * _flat(PrivateSum.release(copy.deepcopy(self), OpenLedger(), Signs(1.0)).values())
            released = super().release(ledger, source)
            if script and len(steps) < len(script):
                released = {name: tensor.clone() for name, tensor in script[len(steps)].released.items()}
            kept = {name: tensor.clone() for name, tensor in released.items()}
            steps.append(Step(total, noised - total, self._rows, kept))
            return released

    return Watched


@dataclass
class Served:
    """What came of one message.

    Attributes:
        reply: the site's answer.
        reserved: what its ledger counted for it.
        steps: the releases behind it.
        draws: the source it drew from.
    """

    reply: Message
    reserved: list[Reserve]
    steps: list[Step]
    draws: Draws | None

    @property
    def reason(self) -> str:
        """Why the site refused; empty if it did not."""
        return str(self.reply.error.reason) if self.reply.has_error() else ""

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(self.reply.content[ARRAYS].to_torch_state_dict())

    @property
    def counters(self) -> dict[str, Any]:
        return dict(self.reply.content[COUNTERS])


@dataclass
class Site:
    """A real site: a file of records, a model, a ledger that is made anew for each `serve` unless it names one."""

    data: Path | str
    model: Path | str
    node_config: dict[str, Any] = field(default_factory=dict)
    entropy: Callable[[], Any] | None = None  # makes its source of draws; none: the operating system's
    handed: dict[str, Any] = field(default_factory=dict)  # what else its host gets

    def owner(self, ledger: Path) -> dict[str, Any]:
        """The node-config of a careful owner."""
        owner = {
            "ledger-path": str(ledger),
            "max-epsilon": 20.0,
            "delta": 1e-5,
            "num-records": len(RECORDS),
            "data-path": str(self.data),
            "model-path": str(self.model),
            "device": "cpu",
            "task": "text",
            "labels": LABELS,
            "answer-seconds": 0,
            "max-queries-per-day": 10**6,
            **self.node_config,
        }
        return {key: value for key, value in owner.items() if value is not None}

    def serve(
        self,
        message: Message,
        run: Mapping[str, Any],
        *,
        ledger: Path | None = None,
        draws: Draws | None = None,
        script: Sequence[Step] | None = None,
        watch: bool = True,
        run_id: int = 1,
    ) -> Served:
        """Hand the site a message of a run.

        Args:
            message: from the server.
            run: the run-config that came with it.
            ledger: the site's ledger file; a new one if none is named.
            draws: the source to draw from instead of the site's own.
            script: releases to give out in place of the site's own.
            watch: whether to look at every step.
            run_id: Flower's.
        """
        stamp()
        steps: list[Step] = []
        handed: dict[str, Any] = {"make_sum": watched(steps, script, [])} if watch else {}
        if draws is not None:
            handed["entropy"] = lambda: draws
        elif self.entropy:
            handed["entropy"] = self.entropy
        with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
            if ledger is None:
                create(ledger := Path(scratch) / "ledger")
            before = len(_counted(ledger))
            context = Context(run_id, 7, self.owner(ledger), RecordDict(), dict(run))
            reply = real_app(**{**handed, **self.handed})(_as_it_travels(message), context)
            if reply.has_content():
                reply.content = unpacked(reply.content)
            return Served(reply, _counted(ledger)[before:], steps, draws)


def _as_it_travels(message: Message) -> Message:
    """The message as a server of real sites sends it: its arrays as one."""
    if is_packed(message.content):
        return message
    said = message.metadata
    return Message(packed(message.content), dst_node_id=said.dst_node_id, message_type=said.message_type)


def reserved_in(ledger: Path) -> list[Reserve]:
    """All reservations in a ledger file."""
    return [entry for entry in LedgerFile(ledger).read().entries if isinstance(entry, Reserve)]


def _counted(ledger: Path) -> list[Reserve]:
    try:
        return reserved_in(ledger)
    except LedgerError:
        return []
