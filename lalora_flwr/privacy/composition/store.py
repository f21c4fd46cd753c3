"""Composed histories in a folder, so that a new process goes on from the last one's.

A file is one line with the SHA-256 of what follows, one line of JSON, and the arrays as raw float64. Its name says for which
δ and versions it was made, and for which steps. Files appear complete or not at all (temporary file, then rename).
Whatever is wrong with a file, it counts as missing: the folder saves time and decides nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lalora_flwr.privacy.composition.history import Composition, Steps
from lalora_flwr.privacy.composition.lattice import Lattice, Totals
from lalora_flwr.privacy.composition.spectrum import Spectrum
from lalora_flwr.privacy.composition.step import ORDERS, Array

FORMAT = 1
SUFFIX, PARTIAL = ".composed", ".partial"
MOST_FILES = 16
_ARRAYS = ("log_magnitude", "turns", "doubt")


class Store:
    """The newest composed histories in one folder.

    Guarantee: what it gives back is what was put in, by the same versions on the same kind of machine.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, composed: Composition) -> None:
        """Keep it; if the folder cannot be written, do nothing."""
        temporary = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", suffix=PARTIAL, delete=False) as file:
                temporary = file.name
                file.write(_to_bytes(composed))
            os.replace(temporary, self._folder / _name(composed.steps, composed.delta))
            self._drop_old()
        except OSError:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def bases(self, delta: float) -> Iterator[Composition]:
        """Those kept for the δ, newest first."""
        for path in self._newest_first(_prefix(delta)):
            try:
                yield _from_bytes(path.read_bytes(), delta)
            except (OSError, ValueError, KeyError, TypeError, IndexError):
                continue  # another process took it away, or it is damaged

    def _newest_first(self, prefix: str) -> list[Path]:
        found = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._folder):
                if entry.name.startswith(prefix) and entry.name.endswith(SUFFIX):
                    with contextlib.suppress(OSError):
                        found.append((entry.stat().st_mtime_ns, Path(entry.path)))
        return [path for _, path in sorted(found, reverse=True)]

    def _drop_old(self) -> None:
        for path in self._newest_first("")[MOST_FILES:]:
            with contextlib.suppress(OSError):
                path.unlink()
        for left_over in self._folder.glob(f".*{PARTIAL}"):  # by a process that was killed
            with contextlib.suppress(OSError):
                if time.time() - left_over.stat().st_mtime > 3600:
                    left_over.unlink()


def _prefix(delta: float) -> str:
    made_by = json.dumps([FORMAT, np.__version__, platform.machine(), delta])
    return hashlib.sha256(made_by.encode()).hexdigest()[:16] + "-"


def _name(steps: Steps, delta: float) -> str:
    return _prefix(delta) + hashlib.sha256(json.dumps(steps).encode()).hexdigest()[:32] + SUFFIX


def _to_bytes(composed: Composition) -> bytes:
    arrays = [composed.totals.of_loss, *(getattr(spectrum, name) for spectrum in composed.spectra for name in _ARRAYS)]
    scalars = [{k: v for k, v in vars(spectrum).items() if k not in _ARRAYS} for spectrum in composed.spectra]
    header = {
        "delta": composed.delta,
        "steps": composed.steps,
        "totals": {k: v for k, v in vars(composed.totals).items() if k != "of_loss"},
        "lattices": [asdict(lattice) for lattice in composed.lattices],
        "spectra": scalars,
        "lengths": [len(spectrum.turns) for spectrum in composed.spectra],
    }
    body = json.dumps(header).encode() + b"\n" + b"".join(np.ascontiguousarray(array, dtype="<f8").tobytes() for array in arrays)
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _from_bytes(content: bytes, delta: float) -> Composition:
    """Raises: ValueError, KeyError, TypeError, IndexError if it is not what `_to_bytes` wrote for the δ."""
    digest, _, body = content.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("damaged")
    line, _, raw = body.partition(b"\n")
    header: dict[str, Any] = json.loads(line)
    if header["delta"] != delta:
        raise ValueError("for another δ")
    lengths = [8 * len(ORDERS), *(length for length in header["lengths"] for _ in _ARRAYS)]
    arrays: list[Array] = np.split(np.frombuffer(raw, dtype="<f8"), np.cumsum(lengths)[:-1])
    spectra = [Spectrum(*_three(arrays[1 + 3 * d : 4 + 3 * d]), **header["spectra"][d]) for d in (0, 1)]
    steps = tuple(((float(sigma), float(q)), int(times)) for (sigma, q), times in header["steps"])
    totals = Totals(arrays[0].reshape(2, 4, len(ORDERS)), **header["totals"])
    first, second = (Lattice(**lattice) for lattice in header["lattices"])
    return Composition(steps, delta, totals, (first, second), (spectra[0], spectra[1]))


def _three(arrays: list[Array]) -> tuple[Array, Array, Array]:
    first, second, third = arrays
    return first, second, third
