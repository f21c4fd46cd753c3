"""What of an adapter stays at a real site: files of its owner beside the ledger, by run.

    <ledger-path>.own/<run>/<round>-<digest>.safetensors    the slots after a round, by the digest of the reply of that round
    <ledger-path>.own/<run>/adapter/                        the site's own model as it has last trained it, a folder for PEFT

The server names the reply of the site that it merged last, and the site goes on from what it held then: after a reply that was
lost, in a repeated round and in a resumed run alike. A name of no file of the same settings, records and model, or of a damaged
one, starts the slots anew, as the seed draws them. Whatever the server names, the log says so if that is not the newest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lalora_flwr.adapter.slots import Layout, digest
from lalora_flwr.ground.errors import SiteRefusal
from lalora_flwr.ground.files import check_place, expanded, replace_file, sync_folder
from lalora_flwr.ledger.caps import Caps
from lalora_flwr.settings import Kind, Settings, flatten, keys_of

log = logging.getLogger("lalora_flwr.site")
FOLDER, ADAPTER, SUFFIX = ".own", "adapter", ".safetensors"
UNWRITABLE = "own: the site cannot keep what stays with it; its own log says why"
OF_PLACE = frozenset({"model.name", "model.revision"})  # a site may name its own; the digest of the model is compared


def digest_of(sent: Mapping[str, NDArray[np.generic]]) -> str:
    """By which server and site know a reply."""
    return digest({name: torch.from_numpy(value) for name, value in sent.items()})


def about(settings: Settings, dataset: str, model_digest: str) -> str:
    """Digest of all that must be the same for what stayed at a site to be of use: everything but where a run lies."""
    left_out = keys_of(Kind.PLACE) | OF_PLACE
    kept = {name: repr(value) for name, value in flatten(settings).items() if name not in left_out}
    return hashlib.sha256(json.dumps([kept, dataset, model_digest], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _State:
    """A file of slots that stayed at the site."""

    path: Path

    @property
    def server_round(self) -> int:
        number = self.path.name.partition("-")[0]
        return int(number) if number.isdecimal() else 0

    @property
    def run(self) -> str:
        return self.path.parent.name

    def read(self, about: str, layout: Layout) -> dict[str, Tensor]:
        """
        Raises:
            ValueError: it is damaged, of other settings, or of other slots.
        """
        try:
            with safe_open(self.path, "pt") as file:
                said, found = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises its own
            raise ValueError(f"is damaged ({type(error).__name__})") from None
        if said.get("about") != about:
            raise ValueError("is of a run of other settings, records or model")
        fits = found.keys() == layout.names and all(found[name].shape == slot.shape for name, slot in layout.items())
        if not fits or not all(value.isfinite().all() for value in found.values()):
            raise ValueError("holds other slots")
        return found


class OwnPart:
    """The slots that stay at a real site in one run.

    Guarantee: they are on disk before the reply leaves that goes with them, whole or not at all, in folders that the owner's user
    alone may enter. They are made of noised gradients as the reply is, and never travel.
    """

    def __init__(self, caps: Caps, settings: Settings, run: int, model_digest: str) -> None:
        """
        Args:
            caps: the owner's.
            settings: the run's.
            run: its id.
            model_digest: of the frozen weights.
        """
        ledger = expanded(caps.ledger_path)
        self._all = ledger.with_name(ledger.name + FOLDER)
        self._folder = self._all / str(run)
        self._about = about(settings, caps.dataset, model_digest)
        self._start: Path | None = None

    def prepare(self) -> None:
        """Make the run's folder before anything is spent; one that is there, as from a backup, is closed to others.

        Raises:
            SiteRefusal: nothing can be written there.
        """
        try:
            for folder in (self._all, self._folder):
                folder.mkdir(mode=0o700, exist_ok=True)
                folder.chmod(0o700)
                sync_folder(folder.parent)
            check_place(self._folder / "state")
        except OSError as error:
            log.error("%s: %s", self._folder, error.strerror or error)
            raise SiteRefusal(UNWRITABLE) from None

    def load(self, name: str, server_round: int, layout: Layout) -> dict[str, Tensor]:
        """The slots of ``layout`` as they were when the site sent the reply of that digest; empty: they start anew.

        Args:
            name: the digest; empty if the server has merged no reply of the site.
            server_round: of the order, for the log.
            layout: the slots that stay at the site, as it holds them.
        """
        say = f"run {self._folder.name}, round {server_round}"
        own = sorted(map(_State, self._folder.glob(f"*-*{SUFFIX}")), key=lambda state: state.server_round)
        if not name:
            if own:
                log.warning("%s: the server has merged no reply of this run: what stays at the site starts anew", say)
            return {}
        for state in sorted(
            map(_State, self._all.glob(f"*/*-{name}{SUFFIX}")), key=lambda state: state.path.parent != self._folder
        ):
            try:
                found = state.read(self._about, layout)
            except ValueError as fault:
                log.warning("%s: %s %s", say, state.path, fault)
                continue
            self._start = state.path
            if state.run != self._folder.name:
                log.warning(
                    "%s: goes on from what stayed at the site after round %d of run %s", say, state.server_round, state.run
                )
            if own and own[-1].path != state.path:
                log.warning(
                    "%s: goes back to what stayed at the site after round %d; what came of round %d is given up",
                    *(say, state.server_round, own[-1].server_round),
                )
            return found
        log.warning("%s: what stayed at the site after the reply that the server names is not there: it starts anew", say)
        return {}

    def save(self, name: str, server_round: int, slots: Mapping[str, Tensor]) -> None:
        """Keep the slots for the round after the reply of that digest, and those that the round began from.

        Raises:
            SiteRefusal: they cannot be written.
        """
        path = self._folder / f"{server_round}-{name}{SUFFIX}"
        try:
            replace_file(path, save({n: value.contiguous() for n, value in slots.items()}, metadata={"about": self._about}))
            for other in self._folder.glob(f"*-*{SUFFIX}"):
                if other not in (path, self._start):
                    other.unlink(missing_ok=True)
        except OSError as error:
            log.error("%s: %s", path, error.strerror or error)
            raise SiteRefusal(UNWRITABLE) from None

    def save_adapter(self, write: Callable[[Path], None]) -> None:
        """Put the site's own model in place of that of the round before; a failure is only logged.

        ``write`` writes it into a folder that is not there yet.
        """
        made, old, last = (self._folder / name for name in (".made", ".old", ADAPTER))
        try:
            for folder in (made, old):
                shutil.rmtree(folder, ignore_errors=True)
            write(made)
            for path in made.rglob("*"):
                path.chmod(0o700 if path.is_dir() else 0o600)
            made.chmod(0o700)
            if last.exists():
                os.rename(last, old)
            os.rename(made, last)
            shutil.rmtree(old, ignore_errors=True)
        except Exception:
            log.exception("%s: the site's own adapter cannot be written", last)
