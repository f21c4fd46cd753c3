"""What a run leaves on disk. Every file is written whole or not at all; metrics grow by a line a round."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lalora_flwr.ground.errors import ConfigError, RunFailed
from lalora_flwr.ground.extras import missing
from lalora_flwr.ground.figures import MODULE, rendered
from lalora_flwr.ground.files import PUBLIC, append, lock, replace_file
from lalora_flwr.server.certificate import CERTIFICATE, READABLE, digests, readable, sealed
from lalora_flwr.server.metrics import CONFIG, FAILURE, METRICS, SUMMARY, RoundMetrics, Summary
from lalora_flwr.server.place import LOCK, folder_for
from lalora_flwr.server.site_count import Asked
from lalora_flwr.settings import Settings, Value, flatten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("lalora_flwr.server")
ASKED = "checkpoint/asked.json"
WORKER_DIED = "worker-died"  # kind of a failure
CHECKPOINT = "checkpoint/adapter.safetensors"
MORE = "more/"  # what names of tensors begin with that are no adapter's
LOG = "flower.log"


def _write(path: Path, content: str | bytes) -> None:
    replace_file(path, content, mode=PUBLIC)


def to_json(value: object, *, indent: int | None = None) -> str:
    """JSON that any reader takes: an infinite ε becomes null."""

    def clean(item: object) -> object:
        if isinstance(item, Mapping):
            return {key: clean(part) for key, part in item.items()}
        if isinstance(item, list | tuple):
            return [clean(part) for part in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(clean(value), allow_nan=False, indent=indent)


def _asked(said: Mapping[str, Any]) -> dict[str, Any]:
    """How often a site was asked, checked.

    Raises:
        ValueError, AttributeError, TypeError, KeyError: for anything else.
    """
    shares = {repr(float(share)): int(rounds) for share, rounds in said.get("shares", {}).items()}
    before = {"before": _asked(said["before"])} if "before" in said else {}
    own = {"rounds": int(said["rounds"]), "evaluations": int(said["evaluations"])}
    return {**own, **({"shares": shares} if shares else {}), **before}


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on after a round.

    Attributes:
        server_round: the last finished round.
        adapter: the whole adapter after it.
        state: the rest, as plain JSON: how much of the metrics belongs to it, and what the strategy knows of its sites.
    """

    server_round: int
    adapter: dict[str, Tensor]
    state: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)


class RunFolder:
    """``<output-dir>/<run-name>/`` with the files of design contract: config, metrics, checkpoint, adapter, summary.

    A context that holds the folder: of two processes that write one run, the second is refused.
    """

    def __init__(self, settings: Settings) -> None:
        """Make the folder and write the resolved settings.

        Raises:
            ConfigError: if the folder holds a run already, or cannot be made.
        """
        self.path, self.metrics_size = folder_for(settings), 0  # bytes
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path / LOCK)
            (self.path / FAILURE).unlink(missing_ok=True)  # of the attempt that is resumed
            if not settings.resume:
                self.go_on_after(0)
                _write(self.path / CONFIG, tomli_w.dumps(_nested(flatten(settings))))
        except BlockingIOError:
            raise ConfigError(
                f"run-name = {settings.run_name!r}: another process still writes {self.path}; wait for it, or end it"
            ) from None
        except OSError as error:
            raise ConfigError(f"output-dir = {settings.output_dir!r}: {error.strerror}") from None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @property
    def ended(self) -> bool:
        """Whether it holds a result or says why there is none; the process of a run with neither was killed, or still runs."""
        return (self.path / SUMMARY).exists() or (self.path / FAILURE).exists()

    def add_metrics(self, *lines: RoundMetrics) -> None:
        """A round's line, at the end of the file: on disk when this returns, and so before the checkpoint that counts it."""
        added = "".join(to_json(line.to_json()) + "\n" for line in lines).encode()
        append(self.path / METRICS, added, mode=PUBLIC)
        self.metrics_size += len(added)

    def go_on_after(self, size: int) -> list[RoundMetrics]:
        """The lines in the first ``size`` bytes of metrics; what a round wrote whose checkpoint is missing is cut off.

        Raises:
            RunFailed: they are not there.
        """
        if not size:
            (self.path / METRICS).unlink(missing_ok=True)
            return []
        path = self.path / METRICS
        try:
            kept = path.read_bytes()[:size]
            lines = [RoundMetrics.from_json(json.loads(line)) for line in kept.splitlines()]
            if len(kept) < size:
                raise ValueError("too short")
        except (OSError, ValueError) as error:
            raise RunFailed(f"{path} is damaged ({error}); the run cannot go on without it") from None
        os.truncate(path, size)
        self.metrics_size = size
        return lines

    def metrics_of(self, state: Mapping[str, Any]) -> list[RoundMetrics]:
        """The lines that belong to a checkpoint's state; the file then holds no others.

        Raises:
            RunFailed: as `go_on_after`.
        """
        if "metrics" not in state:
            return self.go_on_after(state["metrics_size"])
        lines = [RoundMetrics.from_json(line) for line in state["metrics"]]  # of an older version, which kept them there
        self.go_on_after(0)
        self.add_metrics(*lines)
        return lines

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Everything in one file, so that adapter and state are always of the same round."""
        (self.path / CHECKPOINT).parent.mkdir(exist_ok=True)
        about = {"round": str(checkpoint.server_round), "state": json.dumps(checkpoint.state)}  # Python's JSON keeps inf
        more = {MORE + name: value for name, value in checkpoint.tensors.items()}
        _write(self.path / CHECKPOINT, save({**checkpoint.adapter, **more}, metadata=about))

    def save_asked(self, asked: Asked) -> None:
        """How often each real site was asked for what, before it is asked: what it sends counts even if the server dies."""
        (self.path / ASKED).parent.mkdir(exist_ok=True)
        _write(self.path / ASKED, json.dumps(asked) + "\n")

    def load_asked(self) -> Asked:
        """What `save_asked` wrote last; empty if it never did.

        Raises:
            RunFailed: if it is damaged.
        """
        path = self.path / ASKED
        try:
            sites = json.loads(path.read_text()).items() if path.exists() else ()
            return {str(site): _asked(said) for site, said in sites}
        except (ValueError, AttributeError, TypeError, KeyError):
            raise RunFailed(f"{path} is damaged; the run cannot go on without it") from None

    def load_checkpoint(self) -> Checkpoint | None:
        """The last checkpoint; None if the run had none yet.

        Raises:
            RunFailed: if it is damaged.
        """
        return read_checkpoint(self.path)

    def save_adapter(self, save: Callable[[Path], None], card: str, name: str = "adapter") -> None:
        """The adapter's folder: ``save`` writes it, and the model card joins it."""
        part, folder = self.path / f".{name}.part", self.path / name
        shutil.rmtree(part, ignore_errors=True)
        save(part)
        _write(part / "README.md", card)
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that died after it; the checkpoint holds the same
        part.replace(folder)

    def save_plot(self, name: str, draw: Callable[[], Figure]) -> None:
        """A figure as ``plots/<name>.png``, ``.svg`` and ``.pdf``; only a line in the log if matplotlib is not installed."""
        if without := missing(MODULE, "plots"):
            log.warning(without)
            return
        (self.path / "plots").mkdir(exist_ok=True)
        for suffix, content in rendered(draw()).items():
            _write(self.path / "plots" / (name + suffix), content)

    def finish(self, summary: Summary, about: Mapping[str, Any] | None = None) -> None:
        """The certificate, and the last file, the summary: its presence says that the run is complete.

        Args:
            summary: of the run.
            about: of `lalora_flwr.server.certificate.certificate`; None: there is none.
        """
        text = to_json(summary.to_json(), indent=2) + "\n"
        if about is not None:
            whole = sealed(about, digests(self.path, {SUMMARY: text.encode()}))
            _write(self.path / CERTIFICATE, whole)
            _write(self.path / READABLE, readable(json.loads(whole)))
        _write(self.path / SUMMARY, text)

    def fail(self, reason: str, kind: str = "") -> None:
        """Why the run stopped, in one line; ``kind`` names what a caller may mend."""
        _write(self.path / FAILURE, to_json({"error": reason, **({"kind": kind} if kind else {})}) + "\n")


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The last checkpoint of a run's folder; None if the run had none yet.

    Raises:
        RunFailed: if it is damaged.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        adapter = {name: value for name, value in found.items() if not name.startswith(MORE)}
        more = {name.removeprefix(MORE): value for name, value in found.items() if name.startswith(MORE)}
        return Checkpoint(int(about["round"]), adapter, json.loads(about["state"]), more)
    except Exception as error:  # safetensors and JSON raise their own
        raise RunFailed(f"{path} is damaged ({type(error).__name__}); the run cannot go on from it") from None


def _nested(flat: Mapping[str, Value]) -> dict[str, object]:
    """Dotted keys as tables, the form a person writes."""
    top: dict[str, object] = {}
    tables: dict[str, dict[str, object]] = {}
    for name, value in flat.items():
        group, _, key = name.rpartition(".")
        (tables.setdefault(group, {}) if group else top)[key] = value
    return {**top, **tables}
