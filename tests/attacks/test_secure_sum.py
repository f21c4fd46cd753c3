"""A server, and sites, that cheat in a secure sum: against what each owner's ledger says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from lalora_flwr.ledger.entries import SharedReserve
from lalora_flwr.ledger.file import LedgerFile, create
from lalora_flwr.ledger.verify import verify
from lalora_flwr.methods.secure_sum import share_of
from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.events import SampledGaussian
from lalora_flwr.wire.replies import COUNTERS
from lalora_flwr.wire.sharing import Member, public_bytes, read_roster
from tests.attacks.attacker import RECORDS, Draws, Signs, reserved_in, table, text_model
from tests.attacks.circles import NAMES, Circle, sent, summed
from tests.curve25519 import aliases

C = 1.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def circle(tmp_path: Path, model: Path) -> Circle:
    return Circle(tmp_path / "circle", model)


def reserved(circle: Circle, name: str = "north") -> list[SharedReserve]:
    found = reserved_in(circle.folder / f"{name}.ledger")
    return [entry for entry in found if isinstance(entry, SharedReserve)]


def test_an_honest_attempt_is_counted_with_share_roster_and_both_epsilons(circle: Circle) -> None:
    attempt = circle.attempt()
    replies = [circle.ask(name, attempt) for name in NAMES]
    total = summed([sent(reply) for reply in replies], share_of(attempt, C))
    assert np.linalg.norm(total) < 6 * circle.sigma * C * math.sqrt(total.size) + 4 * len(RECORDS) * C
    (entry,) = reserved(circle)
    q = 4 / len(RECORDS)
    assert (entry.share, entry.sites, entry.colluders, entry.attempt) == (attempt.share, 4, 1, 1)
    assert any(entry.key in line for line in circle.lines() if line.startswith("north "))
    assert entry.sigma == circle.sigma <= entry.share * math.sqrt(3) and len(entry.roster) == 64
    assert entry.epsilon == epsilon_spent([SampledGaussian(entry.sigma, q, 1)], entry.delta)
    alone = epsilon_spent([SampledGaussian(entry.share, q, 1)], entry.delta)
    assert entry.epsilon < alone <= entry.alone_epsilon < 1.02 * alone
    verify(LedgerFile(circle.folder / "north.ledger"))
    assert replies[0].counters["noise-multiplier"] == circle.sigma and set(replies[0].reply.content) == {"arrays", COUNTERS}


def test_one_record_moves_what_a_site_sends_by_at_most_c_behind_any_masks(circle: Circle, tmp_path: Path) -> None:
    """Same keys, attempt and draws: the masks cancel in the difference, and what is left is one record's clipped gradient."""
    attempt = circle.attempt()
    without = table(tmp_path / "without.csv", RECORDS[:-1])
    for seed in range(8):
        both = []
        for number, data in enumerate((circle.data, without)):
            create(ledger := tmp_path / f"{seed}.{number}.ledger")
            both.append(sent(circle.ask("north", attempt, draws=Draws(seed), data=data, ledger=ledger)))
        step = share_of(attempt, C).step
        moved = np.concatenate([(both[0][n] - both[1][n]).view(np.int64).reshape(-1) for n in sorted(both[0])]) * step
        assert np.linalg.norm(moved) <= C * (1 + 1e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a smaller share": ({"share": 0.9}, "share of the noise is too small"),
    "next to no share": ({"share": 1e-9}, "words of the attempt"),
    "an endless share": ({"share": 1e9}, "words of the attempt"),
    "a site that no owner knows": ({"sites": ("east", "mallory", "north", "south")}, "names a site that is not in"),
    "a larger roster than there is": ({"sites": (*sorted([*NAMES, "zz"]),)}, "names a site that is not in"),
    "without this site": ({"sites": ("east", "south", "west")}, "does not name this site"),
    "too few sites": ({"sites": ("east", "north")}, "fewer sites than min-sharing-sites"),
    "this site alone": ({"sites": ("north",), "share": 99.0}, "fewer sites than min-sharing-sites"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_owner_does_not_allow_is_refused_and_not_counted(name: str, circle: Circle) -> None:
    changed, reason = REFUSED[name]
    if "share" in changed and 0.1 < changed["share"] < 1:
        changed = {"share": circle.attempt().share * changed["share"]}
    assert reason in circle.ask("north", circle.attempt(**changed)).reason
    assert not reserved(circle)


WORDS: dict[str, dict[str, Any]] = {
    "the same site twice": {"sites": ["east", "east", "north", "south", "west"]},
    "not in order": {"sites": ["west", "north", "east", "south"]},
    "names that are none": {"sites": ["east", "north", 3]},
    "attempt 0": {"attempt": 0},
    "attempt 1.5": {"attempt": 1.5},
    "attempt true": {"attempt": True},
    "share nan": {"share": "nan"},
    "share below zero": {"share": -1.0},
    "keys of the server's": {"keys": {"east": "AAAA"}},
    "attempt of 400 digits": {"attempt": 10**400},
    "more records than float64 holds": {"records": 10**400},
    "a batch that float64 does not hold": {"batch": 10**400},
    "nothing": {"attempt": None},
}


@pytest.mark.parametrize("name", WORDS)
def test_words_that_are_no_attempts_are_refused(name: str, circle: Circle) -> None:
    words = {**circle.attempt().words(), **WORDS[name]}
    assert circle.ask("north", words).reason.startswith("order: its directive or its exchange") or "sharing: the words" in (
        circle.ask("north", words).reason
    )
    assert not reserved(circle)


def test_an_attempt_is_answered_once_whatever_else_is_said_of_it(circle: Circle) -> None:
    """Two answers under one mask would give away their difference; another roster, share or adapter is no other attempt."""
    attempt = circle.attempt(number=2)
    assert not circle.ask("north", attempt).reason
    again = [
        attempt,
        circle.attempt(number=2, names=("east", "north", "south")),
        circle.attempt(number=2, share=30.0),
        circle.attempt(number=1),
    ]
    for other in again:
        assert circle.ask("north", other).reason == "sharing: the site has answered this attempt, or a later one, before"
    assert len(reserved(circle)) == 1
    assert not circle.ask("north", circle.attempt(number=3)).reason
    assert not circle.ask("north", circle.attempt(number=1), server_round=2).reason
    assert "before" in circle.ask("north", circle.attempt(number=9), server_round=1).reason
    assert not circle.ask("north", circle.attempt(number=1), run_id=2).reason  # a new run has masks of its own
    assert len(reserved(circle)) == 4


def test_every_attempt_round_and_run_has_masks_of_its_own(circle: Circle) -> None:
    """The same sites, share and draws: what is sent would be the same but for the masks."""
    about = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]
    parts = [
        np.concatenate([part.reshape(-1) for _, part in sorted(sent(circle.ask("north", attempt, round_, **more)).items())])
        for number, round_, run in about
        for attempt, more in [(circle.attempt(number=number), {"run_id": run, "draws": Draws(3)})]
    ]
    for other in parts[1:]:
        assert (np.abs((parts[0] - other).view(np.int64).astype(float)) > 2**55).mean() > 0.9


def test_the_ledger_remembers_across_datasets_and_processes(circle: Circle) -> None:
    """A site's key is one for all its datasets: under another dataset's name the masks would be the same."""
    assert not circle.ask("north", circle.attempt()).reason
    circle.owner = {"dataset": "another"}
    other = table(circle.folder / "other.csv", RECORDS[:5])
    assert "before" in circle.ask("north", circle.attempt(), data=other).reason


def test_two_attempts_of_which_a_server_takes_the_difference_have_noise_of_their_own_and_are_both_counted(circle: Circle) -> None:
    sums = []
    for number in (1, 2):
        attempt = circle.attempt(number=number)
        sums.append(summed([sent(circle.ask(name, attempt)) for name in NAMES], share_of(attempt, C)))
    difference = sums[0] - sums[1]
    assert difference.std() > 1.2 * circle.sigma * C  # √2 σC and what the batches differ by
    assert len(reserved(circle)) == 2 and reserved(circle)[1].epsilon > reserved(circle)[0].epsilon


def honest_or_noise(parts: list[dict[str, Any]], circle: Circle) -> float:
    return float(np.abs(summed(parts, share_of(circle.attempt(), C))).max())


def test_a_smaller_share_told_to_the_others_makes_the_sum_noise(circle: Circle) -> None:
    """An owner with many records needs less noise, and would accept it; the one with few never sums with it."""
    circle.owner = {"num-records": 800}
    less = circle.attempt(share=circle.attempt().share / 4)
    others = [sent(circle.ask(name, less)) for name in ("east", "south", "west")]
    circle.owner = {}
    mine = sent(circle.ask("north", circle.attempt()))
    assert honest_or_noise([mine, *others], circle) > 1e6


def test_subsets_of_replies_are_noise(circle: Circle) -> None:
    attempt = circle.attempt()
    parts = [sent(circle.ask(name, attempt)) for name in NAMES]
    for left_out in range(4):
        assert honest_or_noise([part for number, part in enumerate(parts) if number != left_out], circle) > 1e6
    smaller = circle.attempt(number=2, names=("east", "north", "south"))
    three = [sent(circle.ask(name, smaller)) for name in ("east", "north", "south")]
    assert honest_or_noise([*three, parts[3]], circle) > 1e6  # a late reply of the attempt before
    assert honest_or_noise(three, circle) < 1e3


def test_an_owner_whose_key_is_a_twin_of_anothers_sums_with_nobody(circle: Circle) -> None:
    lines = {line.split()[0]: line for line in circle.lines()}
    (east,) = (member.key for member in read_roster(lines["east"]).members)
    twin = Member("west", aliases(east)[3]).line
    circle.roster("\n".join([lines["north"], lines["east"], lines["south"], twin]))
    assert "cannot use its key or its roster" in circle.ask("north", circle.attempt()).reason
    assert not reserved(circle)


def test_a_key_that_somebody_swapped_in_one_roster_makes_the_sum_noise(circle: Circle) -> None:
    own = X25519PrivateKey.generate()
    lines = [line for line in circle.lines() if not line.startswith("east ")]
    circle.roster("\n".join([*lines, Member("east", public_bytes(own)).line]), "south")
    attempt = circle.attempt()
    assert honest_or_noise([sent(circle.ask(name, attempt)) for name in NAMES], circle) > 1e6


@pytest.mark.parametrize("colluders", [1, 2, 3])
def test_what_colluders_leave_has_the_noise_that_the_ledger_counts(colluders: int, tmp_path: Path, model: Path) -> None:
    """Colluders keep to the protocol but add no noise, and what they add is known. n = 4, up to t = n - 1."""
    circle = Circle(tmp_path / "circle", model, owner={"sharing-colluders": colluders})
    attempt = circle.attempt(share=circle.sigma / math.sqrt(4 - colluders) * (1 + 1e-9))
    refused = circle.ask("north", circle.attempt(share=attempt.share * 0.99))
    assert "too small for the site's sharing-colluders" in refused.reason
    values = []
    for number in range(1, 13):
        one = circle.attempt(number=number, share=attempt.share)
        silent = {name: Signs(0.0) for name in NAMES[4 - colluders :]}
        parts = [sent(circle.ask(name, one, draws=silent.get(name))) for name in NAMES]
        values.append(summed(parts, share_of(one, C)))
    spread = np.sqrt((np.stack(values).std(axis=0, ddof=1) ** 2).mean())
    assert 0.85 * circle.sigma * C < spread < 1.2 * circle.sigma * C  # one colluder more or less moves it by 1.22 at least
    assert all(entry.sigma <= entry.share * math.sqrt(4 - colluders) for entry in reserved(circle))


def test_owners_with_two_sites_can_sum_but_gain_nothing_with_one_colluder(tmp_path: Path, model: Path) -> None:
    circle = Circle(tmp_path / "circle", model, owner={"min-sharing-sites": 2})
    pair = ("east", "north")
    attempt = circle.attempt(names=pair)
    assert attempt.share >= circle.sigma
    total = summed([sent(circle.ask(name, attempt)) for name in pair], share_of(attempt, C))
    assert np.isfinite(total).all() and reserved(circle)[0].alone_epsilon <= 1.01 * reserved(circle)[0].epsilon
    assert "fewer sites" in circle.ask("north", circle.attempt(number=2, names=("north",), share=99.0)).reason


def test_the_budget_for_the_worst_case_is_the_owners_too(tmp_path: Path, model: Path) -> None:
    circle = Circle(tmp_path / "circle", model)
    assert not circle.ask("north", circle.attempt()).reason
    circle.owner = {"max-epsilon-alone": reserved(circle)[0].alone_epsilon * 1.01}
    assert circle.ask("north", circle.attempt(number=2)).reason.startswith("budget: ")
    assert len(reserved(circle)) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sharing-key": None, "sharing-roster": None}, "names no sharing-key"),
        ({"sharing-roster": "/no/such/file"}, "cannot use its key or its roster"),
        ({"sharing-key": "/no/such/file"}, "cannot use its key or its roster"),
        ({"sharing-roster": None}, "one needs the other"),
    ],
    ids=str,
)
def test_a_site_without_its_own_keys_takes_no_part(change: dict[str, Any], reason: str, circle: Circle) -> None:
    circle.owner = change
    assert reason in circle.ask("north", circle.attempt()).reason
    assert not reserved(circle)


def test_with_more_than_one_local_step_there_is_no_sum(circle: Circle) -> None:
    attempt = circle.attempt()
    circle.run |= {"train.local-steps": 2}
    assert circle.ask("north", attempt).reason.startswith("configuration: ")
    assert not reserved(circle)
