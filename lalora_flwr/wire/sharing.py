"""Keys, rosters and masks of a secure sum: what lets a server see the sum of the sites' updates and nothing else.

Every two sites of a roster draw one stream of masks from their X25519 keys, which one of them adds to what it sends and the
other subtracts (Bonawitz et al., CCS 2017, without the shares for sites that drop out: a sum that misses a site is thrown
away). The keys come from the owners; no message holds one. ``docs/secure_sum.md`` has the protocol and what it promises.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_pem_private_key
from numpy.typing import NDArray

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.wire.profile import NAME, NAMES

PROTOCOL = b"lalora-flwr secure sum 1\n"
NONCE = bytes(16)  # each key of a stream is used once
LONGEST_ROSTER = 1 << 20  # letters


@dataclass(frozen=True)
class Member:
    """A site of a roster: its name, and its X25519 public key, 32 bytes."""

    name: str
    key: bytes

    @property
    def line(self) -> str:
        """As it stands in a roster file."""
        return f"{self.name} {base64.b64encode(self.key).decode()}"


@dataclass(frozen=True)
class SharingRoster:
    """Sites that an owner is willing to sum with, in the order of their keys."""

    members: tuple[Member, ...]

    @staticmethod
    def of(members: Iterable[Member]) -> SharingRoster:
        return SharingRoster(tuple(sorted(members, key=lambda member: member.key)))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(member.name for member in self.members)

    @property
    def digest(self) -> str:
        """SHA-256 over all names and keys: the same for every site that means the same roster."""
        return hashlib.sha256("\n".join(member.line for member in self.members).encode()).hexdigest()

    def only(self, names: Iterable[str]) -> SharingRoster:
        """The members with these names.

        Raises:
            KeyError: one is not a member's.
        """
        by_name = {member.name: member for member in self.members}
        return SharingRoster.of(by_name[name] for name in names)


def read_roster(text: str) -> SharingRoster:
    """The roster of a file: a line per site, its name and its public key as `lalora site keys` prints it; # begins a comment.

    Raises:
        ConfigError: naming the line that is none, or the name or key that stands there twice.
    """
    if len(text) > LONGEST_ROSTER:
        raise ConfigError("roster: longer than any roster of sites")
    members: list[Member] = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r").replace("\t", " ")
        if not (line.isascii() and (line.isprintable() or not line)):  # some programs show as one line what others take for two
            raise ConfigError(f"roster: line {number} holds other signs than plain ASCII")
        words = line.partition("#")[0].split()
        if not words:
            continue
        key = _decoded(words[1]) if len(words) == 2 else b""
        if len(key) != 32 or not NAME.fullmatch(words[0]):
            raise ConfigError(f"roster: line {number} is not a name ({NAMES}) and a public key as `lalora site keys` prints them")
        if any(member.name == words[0] or member.key == key for member in members):
            raise ConfigError(f"roster: line {number} has a name or a key that stands there before")
        members.append(Member(words[0], key))
    if not members:
        raise ConfigError("roster: it names no site")
    return SharingRoster.of(members)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        return b""


def public_bytes(key: X25519PrivateKey) -> bytes:
    """The public key that belongs to it, 32 bytes."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def written_public(key: X25519PrivateKey) -> str:
    """The same in base64, as rosters have it."""
    return base64.b64encode(public_bytes(key)).decode()


def written_key(key: X25519PrivateKey) -> bytes:
    """The private key as a PEM file."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read_key(content: bytes) -> X25519PrivateKey:
    """The private key of a PEM file.

    Raises:
        ConfigError: it holds none of the right kind, or one behind a password.
    """
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError("the file holds no private key without a password; `lalora site keys` makes one") from None
    if not isinstance(key, X25519PrivateKey):
        raise ConfigError("the file holds a private key of another kind; `lalora site keys` makes one")
    return key


def seeded_key(seed: int, site: int) -> X25519PrivateKey:
    """The key of a virtual site: no secret at all, since everybody who knows the seed has it."""
    return X25519PrivateKey.from_private_bytes(hashlib.sha256(f"lalora-flwr simulated site {seed} {site}".encode()).digest())


@dataclass(frozen=True)
class Secrets:
    """What a site masks with.

    Attributes:
        own: its private key.
        roster: all sites that its owner is willing to sum with, itself among them.
        run: the run's id.
    """

    own: X25519PrivateKey
    roster: SharingRoster
    run: str

    @property
    def name(self) -> str:
        """The site's own name in the roster; empty if its key is not there."""
        key = public_bytes(self.own)
        return next((member.name for member in self.roster.members if member.key == key), "")

    def check(self) -> None:
        """
        Raises:
            ConfigError: the site is not in its own roster, or a key there is no key to make a secret with, or another form of
                somebody else's: X25519 gives the same secret for a key, for it plus a point of small order, and for other
                writings of it. Whoever publishes such a key poses as another site without knowing its private key.
        """
        if not self.name:
            raise ConfigError("roster: the public key of the site's own key file is not in it")
        secrets: dict[bytes, str] = {}
        for member in self.roster.members:
            try:
                secret = self.own.exchange(X25519PublicKey.from_public_bytes(member.key))
            except ValueError:
                raise ConfigError(f"roster: the key of {member.name} is no public key that anybody has") from None
            if (other := secrets.setdefault(secret, member.name)) != member.name:
                raise ConfigError(f"roster: the keys of {other} and {member.name} are two forms of one key; ask both owners")


def masked(
    units: Mapping[str, NDArray[np.int64]], secrets: Secrets, roster: SharingRoster, bound: Mapping[str, object]
) -> dict[str, NDArray[np.uint64]]:
    """A site's whole numbers under masks that cancel in the sum over a roster, modulo 2^64.

    Guarantee: without the private key of this site or of another one of the roster the result looks uniform, whatever the
    units are, as long as X25519, HKDF-SHA256 and ChaCha20 are what they are taken for, and as long as the site masks once only
    under the same ``bound`` and roster: the streams follow from them and from the keys. Two sites whose ``bound`` or roster
    differ have other streams, and the sum over them is noise.

    Args:
        units: by slot.
        secrets: the site's.
        roster: the sites of this sum, the site itself among them.
        bound: all that the sites must agree on, as JSON takes it.
    """
    names = sorted(units)
    total = np.concatenate([np.ascontiguousarray(units[name]).reshape(-1) for name in names]).view(np.uint64)
    total = total.copy()
    own = public_bytes(secrets.own)
    layout = [[name, list(units[name].shape)] for name in names]
    said = json.dumps({**bound, "run": secrets.run, "roster": roster.digest, "layout": layout}, sort_keys=True, allow_nan=False)
    for member in roster.members:
        if member.key == own:
            continue
        secret = secrets.own.exchange(X25519PublicKey.from_public_bytes(member.key))
        pair = min(own, member.key) + max(own, member.key)  # two keys can have one secret with a third: see `Secrets.check`
        key = HKDF(SHA256(), length=32, salt=None, info=PROTOCOL + pair + said.encode()).derive(secret)
        stream = Cipher(ChaCha20(key, NONCE), mode=None).encryptor().update(bytes(total.nbytes))
        mask = np.frombuffer(stream, dtype="<u8")
        if own < member.key:
            total += mask
        else:
            total -= mask
    sizes = np.cumsum([units[name].size for name in names])[:-1]
    return {name: part.reshape(units[name].shape) for name, part in zip(names, np.split(total, sizes), strict=True)}
