"""Keys, rosters and masks: what cancels in the sum, and what a server sees without it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare, kstest

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.wire.sharing import (
    PROTOCOL,
    Member,
    Secrets,
    SharingRoster,
    masked,
    public_bytes,
    read_key,
    read_roster,
    seeded_key,
    written_key,
)
from tests.curve25519 import aliases
from tests.reference_masks import chacha20, hkdf_sha256, sha256

Units = Mapping[str, NDArray[np.int64]]
BOUND: dict[str, Any] = {"round": 3, "attempt": 1, "share": (0.7).hex(), "clip-norm": (2.0).hex()}
SHAPES = {"x.lora_A.w": (2, 7), "x.lora_B.w": (5, 2), "head.bias": (3,)}


def members(count: int, seed: int = 0, run: str = "9") -> list[Secrets]:
    keys = [seeded_key(seed, site) for site in range(count)]
    roster = SharingRoster.of(Member(f"site{i}", public_bytes(key)) for i, key in enumerate(keys))
    return [Secrets(key, roster, run) for key in keys]


def units(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, most: int = 2**50) -> dict[str, NDArray[np.int64]]:
    draw = np.random.default_rng(seed)
    return {name: draw.integers(-most, most, shape) for name, shape in shapes.items()}


def total(sent: list[dict[str, NDArray[np.uint64]]]) -> dict[str, NDArray[np.int64]]:
    return {name: np.sum([one[name] for one in sent], axis=0, dtype=np.uint64).view(np.int64) for name in sent[0]}


@given(count=st.integers(1, 6), seed=st.integers(0, 2**32), shape=st.lists(st.integers(1, 5), max_size=3))
def test_masks_cancel_in_the_sum_over_the_roster(count: int, seed: int, shape: list[int]) -> None:
    sites, shapes = members(count, seed), {"a": tuple(shape), "b": (4,)}
    plain = [units(seed + i, shapes) for i in range(count)]
    sent = [masked(one, site, site.roster, BOUND) for one, site in zip(plain, sites, strict=True)]
    for name, value in total(sent).items():
        np.testing.assert_array_equal(value, sum(one[name] for one in plain))


def test_a_mask_is_that_of_the_standards() -> None:
    """HKDF and ChaCha20 by their RFCs, X25519 on both sides, the sign by the order of the keys."""
    one, two, three = members(3)
    plain = units(1)
    sent = masked(plain, one, one.roster, BOUND)
    layout = [[name, list(SHAPES[name])] for name in sorted(SHAPES)]
    lines = "\n".join(member.line for member in sorted(one.roster.members, key=lambda member: member.key))
    said = json.dumps({**BOUND, "run": "9", "roster": sha256(lines), "layout": layout}, sort_keys=True)
    expected = np.concatenate([plain[name].reshape(-1) for name in sorted(plain)]).view(np.uint64).copy()
    for other in (two, three):
        secret = other.own.exchange(X25519PublicKey.from_public_bytes(public_bytes(one.own)))
        pair = b"".join(sorted([public_bytes(one.own), public_bytes(other.own)]))
        stream = chacha20(hkdf_sha256(secret, PROTOCOL + pair + said.encode(), 32), 8 * expected.size)
        mask = np.frombuffer(stream, dtype="<u8")
        expected += mask if public_bytes(one.own) < public_bytes(other.own) else np.uint64(0) - mask
    got = np.concatenate([sent[name].reshape(-1) for name in sorted(sent)])
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    "other",
    [
        {"round": 4},
        {"attempt": 2},
        {"share": (0.1).hex()},
        {"clip-norm": (2.5).hex()},
        {"run": "10"},
        {"layout": 1},
        {"roster": 1},
    ],
    ids=lambda other: next(iter(other)),
)
def test_sites_that_do_not_mean_the_same_have_no_sum(other: dict[str, Any]) -> None:
    """A server that tells one site another share, bound, attempt or roster than the others learns nothing from it."""
    sites = members(4)
    shapes = {**SHAPES, "more": (2,)} if "layout" in other else SHAPES
    sent = [masked(units(i), site, site.roster, BOUND) for i, site in enumerate(sites)]
    odd, roster = sites[0], sites[0].roster
    if "run" in other:
        odd = Secrets(odd.own, odd.roster, other["run"])
    if "roster" in other:
        roster = roster.only(["site0", "site1", "site2"])
    bound = {**BOUND, **{key: value for key, value in other.items() if key in BOUND}}
    sent[0] = masked(units(0, shapes), odd, roster, bound)
    for name in SHAPES:
        found = np.abs(np.sum([one[name] for one in sent], axis=0, dtype=np.uint64).view(np.int64).astype(float))
        assert found.max() > 2**56  # four times 2^50 at most, if it were a sum


def streams(plain: Units, count: int = 200, **changed: Any) -> NDArray[np.uint64]:
    """What one site sends in many attempts, all of the same update."""
    one = members(2)[0]
    sent = [masked(plain, one, one.roster, {**BOUND, "attempt": attempt, **changed}) for attempt in range(1, count + 1)]
    return np.stack([np.concatenate([part[name].reshape(-1) for name in sorted(part)]) for part in sent])


@pytest.mark.parametrize("plain", [units(0, most=1), units(0), {name: np.full(s, 2**51) for name, s in SHAPES.items()}])
def test_what_a_site_sends_looks_uniform_whatever_it_is(plain: Units) -> None:
    sent = streams(plain)
    assert chisquare(np.bincount(sent.view(np.uint8).reshape(-1), minlength=256)).pvalue > 1e-6
    assert kstest(sent.reshape(-1) / 2.0**64, "uniform").pvalue > 1e-6
    differences = sent[1:] - sent[:-1]  # of the same update: no trace of it is left between two attempts
    assert kstest(differences.reshape(-1) / 2.0**64, "uniform").pvalue > 1e-6
    bits = np.unpackbits((sent[1:] ^ sent[:-1]).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(bits.size)


def test_the_same_test_sees_an_update_without_masks() -> None:
    """With a roster of itself alone a site adds no mask: the tests above must notice."""
    one = members(1)[0]
    sent = masked(units(0), one, one.roster, BOUND)
    values = np.concatenate([part.reshape(-1) for part in sent.values()])
    assert kstest(values / 2.0**64, "uniform").pvalue < 1e-6


def test_a_key_survives_its_file_and_other_files_are_refused() -> None:
    key = X25519PrivateKey.generate()
    assert public_bytes(read_key(written_key(key))) == public_bytes(key)
    other = generate_private_key(SECP256R1())
    wrong = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    for content, said in (
        (wrong, "of another kind"),
        (locked, "no private key"),
        (b"", "no private key"),
        (b"\xff", "no private"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_key(content)


LINES = [member.line for member in members(3)[0].roster.members]


def test_a_roster_is_the_same_in_any_order_and_with_comments() -> None:
    one = read_roster("\n".join(LINES))
    other = read_roster("# hospitals\n\n" + "\n".join(f"  {line}   # since May" for line in reversed(LINES)) + "\n")
    assert one == other and one.digest == other.digest and one.names == {"site0", "site1", "site2"}
    assert one.only(["site1", "site0"]).digest == one.only(["site0", "site1"]).digest != one.digest
    with pytest.raises(KeyError):
        one.only(["site0", "stranger"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no site"),
        ("# nothing", "names no site"),
        ("north", "line 1 is not a name"),
        ("north abc", "line 1 is not a name"),
        (f"{LINES[0]}\nnorth {LINES[1].split()[1]} more", "line 2 is not a name"),
        (f"-north {LINES[0].split()[1]}", "line 1 is not a name"),
        (f"{'n' * 65} {LINES[0].split()[1]}", "line 1 is not a name"),
        (f"{LINES[0]}\n{LINES[0]}", "line 2 has a name or a key that stands there before"),
        (f"{LINES[0]}\nother {LINES[0].split()[1]}", "line 2 has a name or a key"),
        (f"{LINES[0]}\nsite0 {LINES[1].split()[1]}", "line 2 has a name or a key") if "site0" in LINES[0] else ("", "no site"),
        ("x" * (2**20 + 1), "longer than any roster"),
    ],
)
def test_a_roster_that_is_none_is_refused_with_the_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_roster(text)


def test_a_key_that_poses_as_anothers_takes_no_mask_away() -> None:
    """X25519 gives one secret for a key and for it plus a point of small order: a colluder could publish such a twin of an
    honest site's key, whose stream then met the honest one's with the other sign."""
    tried = 0
    for seed in range(12):
        honest, twinned, _ = members(3, seed)
        victim, imitated = public_bytes(honest.own), public_bytes(twinned.own)
        for twin in aliases(imitated):
            if (twin < victim) == (imitated < victim):
                continue
            secret = honest.own.exchange(X25519PublicKey.from_public_bytes(imitated))
            assert honest.own.exchange(X25519PublicKey.from_public_bytes(twin)) == secret  # the attack's premise
            roster = SharingRoster.of([*(Member(n, k) for n, k in (("a", victim), ("b", imitated), ("evil", twin)))])
            site = Secrets(honest.own, roster, "9")
            plain = units(seed, most=2**20)
            for name, value in masked(plain, site, roster, BOUND).items():
                assert (np.abs((value.view(np.int64) - plain[name]).astype(float)) > 2**50).any()
            with pytest.raises(ConfigError, match="are two forms of one key"):
                site.check()
            tried += 1
    assert tried > 10


def test_another_writing_of_a_key_is_not_another_key() -> None:
    one, two, _ = members(3)
    flipped = public_bytes(two.own)[:31] + bytes([public_bytes(two.own)[31] ^ 128])
    roster = SharingRoster.of([*one.roster.members, Member("evil", flipped)])
    with pytest.raises(ConfigError, match="are two forms of one key"):
        Secrets(one.own, roster, "9").check()
    own = public_bytes(one.own)[:31] + bytes([public_bytes(one.own)[31] ^ 128])
    with pytest.raises(ConfigError, match="are two forms of one key"):
        Secrets(one.own, SharingRoster.of([*one.roster.members, Member("evil", own)]), "9").check()


@pytest.mark.parametrize(
    "sign", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\r", "\x00", "\u202e", "é"]
)
def test_a_line_hides_no_second_member(sign: str) -> None:
    with pytest.raises(ConfigError, match="line 1 holds other signs than plain ASCII"):
        read_roster(f"{LINES[0]}  # St Mary{sign}{LINES[1]}")
    assert len(read_roster(f"{LINES[0]}\t# St Mary\r\n{LINES[1]}\r\n").members) == 2


def test_a_site_must_be_in_its_roster_and_every_key_somebodys() -> None:
    one, two, _ = members(3)
    one.check()
    assert one.name == "site0"
    with pytest.raises(ConfigError, match="the site's own key file is not in it"):
        Secrets(X25519PrivateKey.generate(), one.roster, "1").check()
    null = SharingRoster.of([*one.roster.members[:1], Member("null", bytes(32))])
    own = next(s for s in (one, two, members(3)[2]) if public_bytes(s.own) == one.roster.members[0].key)
    with pytest.raises(ConfigError, match="the key of null is no public key that anybody has"):
        Secrets(own.own, null, "1").check()
