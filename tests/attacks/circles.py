"""Real sites with keys, rosters and ledgers of their own, and a server that may ask them for any attempt of a secure sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import Message
from numpy.typing import NDArray

from lalora_flwr.ledger.file import create
from lalora_flwr.methods.secure_sum import Attempt, share_for
from lalora_flwr.privacy.mechanism import Share
from lalora_flwr.privacy.noise import mechanism_for
from lalora_flwr.settings import settings_from
from lalora_flwr.wire.orders import ARRAYS
from lalora_flwr.wire.sharing import Member, public_bytes, written_key
from tests.attacks.attacker import RECORDS, RUN, Draws, Served, Site, table
from tests.attacks.orders import order

SHARED: dict[str, Any] = {
    **RUN,
    "trust": "secure-sum",
    "num-supernodes": 4,
    "num-rounds": 10,
    "train.batch-size": 4,
    "privacy.max-rounds": 20,
}
NAMES = ("north", "east", "south", "west")
Sent = Mapping[str, NDArray[np.uint64]]


@dataclass
class Circle:
    """Four owners that sum with each other, each with the same records."""

    folder: Path
    model: Path
    run: dict[str, Any] = field(default_factory=lambda: dict(SHARED))
    owner: dict[str, Any] = field(default_factory=dict)  # what each node-config says besides

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = table(self.folder / "records.csv")
        keys = {name: X25519PrivateKey.generate() for name in NAMES}
        for name, key in keys.items():
            (self.folder / f"{name}.key").write_bytes(written_key(key))
            create(self.folder / f"{name}.ledger")
        self.roster("\n".join(Member(name, public_bytes(key)).line for name, key in keys.items()))

    def roster(self, text: str, *names: str) -> None:
        """Give some sites, by default all, this roster file."""
        for name in names or NAMES:
            (self.folder / f"{name}.roster").write_text(text)

    def lines(self) -> list[str]:
        return (self.folder / "north.roster").read_text().splitlines()

    def site(self, name: str, data: Path | None = None) -> Site:
        files = {"sharing-key": str(self.folder / f"{name}.key"), "sharing-roster": str(self.folder / f"{name}.roster")}
        return Site(data or self.data, self.model, {**files, **self.owner})

    @property
    def sigma(self) -> float:
        """What the ledgers count with."""
        return mechanism_for(settings_from({**self.run, "model.name": f"hf/{self.model}"}), len(RECORDS)).noise_multiplier

    def attempt(self, number: int = 1, names: Sequence[str] = NAMES, **changed: Any) -> Attempt:
        """What an honest server says, with some of it replaced."""
        share = share_for(self.sigma, max(2, len(names)), 1)
        return Attempt(
            **{"number": number, "sites": tuple(sorted(names)), "share": share, "batch": 16.0, "records": 32, **changed}
        )

    def order(self, attempt: Attempt | Mapping[str, Any], server_round: int = 1, **fields: Any) -> Message:
        words = attempt.words() if isinstance(attempt, Attempt) else attempt
        return order(self.run, self.model, exchange=words, server_round=server_round, **fields)

    def ask(
        self,
        name: str,
        attempt: Attempt | Mapping[str, Any],
        server_round: int = 1,
        *,
        run_id: int = 1,
        draws: Draws | None = None,
        data: Path | None = None,
        ledger: Path | None = None,
    ) -> Served:
        """Ask one site, with its own ledger."""
        message = self.order(attempt, server_round)
        own = ledger or self.folder / f"{name}.ledger"
        return self.site(name, data).serve(message, self.run, ledger=own, draws=draws, watch=False, run_id=run_id)


def sent(served: Served) -> dict[str, NDArray[np.uint64]]:
    assert not served.reason
    arrays = served.reply.content[ARRAYS]
    return {name: arrays[name].numpy() for name in arrays}


def summed(parts: Sequence[Sent], share: Share) -> NDArray[np.float64]:
    """What the server reads of replies: their sum in the unit of gradients, all tensors one after the other."""
    total = [np.sum([part[name] for part in parts], axis=0, dtype=np.uint64).view(np.int64) for name in sorted(parts[0])]
    return np.concatenate([value.reshape(-1) for value in total]) * share.step
