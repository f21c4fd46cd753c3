"""A server of secure sums whose sites keep B: what it sees and what stays are together one mechanism of the ledger's noise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lalora_flwr.adapter.slots import LORA_A, LORA_B
from lalora_flwr.ledger.entries import SharedReserve
from lalora_flwr.ledger.file import create
from lalora_flwr.methods.secure_sum import Attempt, share_of
from lalora_flwr.site.own_part import digest_of
from tests.attacks.attacker import RECORDS, RUN, Draws, Served, Signs, reserved_in, table, text_model
from tests.attacks.circles import SHARED, Circle, sent

C, Q = 1.0, 4 / len(RECORDS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def circle(tmp_path: Path, model: Path) -> Circle:
    return Circle(tmp_path / "circle", model, {**SHARED, "strategy": "fedsa-lora"})


def ask(
    circle: Circle,
    attempt: Attempt,
    server_round: int,
    ledger: Path,
    own: str = "",
    draws: Draws | None = None,
    data: Path | None = None,
) -> Served:
    message = circle.order(attempt, server_round, own=own)
    found = circle.site("north", data).serve(message, circle.run, ledger=ledger, draws=draws, watch=False)
    assert not found.reason, found.reason
    return found


def name_of(served: Served) -> str:
    return digest_of(sent(served))


def kept(ledger: Path, server_round: int, name: str) -> dict[str, Tensor]:
    return load_file(Path(f"{ledger}.own") / "1" / f"{server_round}-{name}.safetensors")


def unlike(seed: int) -> bool:
    """Whether draws of this seed leave out the last record."""
    return bool(Draws(seed).uniform(len(RECORDS))[-1] >= Q)


def moved(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([(one[name].double() - other[name].double()).flatten() for name in sorted(one)])


def test_one_record_moves_what_is_sent_and_what_stays_by_c_together(circle: Circle, tmp_path: Path) -> None:
    """Two sites that differ in a record which the first round leaves out, so that both go on from one B, not zero."""
    without = table(tmp_path / "without.csv", RECORDS[:-1])
    first = next(seed for seed in range(20) if unlike(seed))
    longest = 0.0
    for seed in (seed for seed in range(20) if not unlike(seed)):
        sums, stays = [], []
        for number, data in enumerate((circle.data, without)):
            create(ledger := tmp_path / f"{seed}.{number}.ledger")
            begun = ask(circle, circle.attempt(), 1, ledger, draws=Draws(first), data=data)
            own = name_of(begun)
            found = ask(circle, circle.attempt(), 2, ledger, own, Draws(seed), data)
            sums.append(sent(found))
            stays.append(kept(ledger, 2, name_of(found)))
        step = share_of(circle.attempt(), C).step
        of_a = np.concatenate([(sums[0][n] - sums[1][n]).view(np.int64).reshape(-1) for n in sorted(sums[0])]) * step
        of_b = moved(*stays) * 4 / RUN["train.lr"]
        length = float(np.hypot(np.linalg.norm(of_a), float(of_b.norm())))
        assert np.linalg.norm(of_a) > 0 and float(of_b.norm()) > 0
        assert length <= C * (1 + 1e-4)
        longest = max(longest, length)
    assert longest > 0.1 * C


def test_what_stays_has_the_noise_of_a_site_alone(circle: Circle, tmp_path: Path) -> None:
    """Draws of ±1 in place of normal ones, and of none: the difference is the deviation of the noise."""
    found = []
    for size in (0.0, 1.0):
        create(ledger := tmp_path / f"{size}.ledger")
        found.append(kept(ledger, 1, name_of(ask(circle, circle.attempt(), 1, ledger, draws=Signs(size)))))
    noise = moved(*found).abs() * 4 / RUN["train.lr"]
    assert circle.sigma > circle.attempt().share
    torch.testing.assert_close(noise, torch.full_like(noise, circle.sigma * C), rtol=1e-3, atol=1e-4)


def test_a_server_that_raises_the_share_raises_the_noise_of_what_stays_with_it(circle: Circle, tmp_path: Path) -> None:
    """Else the worst case, in which the ledger counts with the share, would be counted too low."""
    attempt, found = circle.attempt(share=9.0), []
    for size in (0.0, 1.0):
        create(ledger := tmp_path / f"{size}.ledger")
        found.append(kept(ledger, 1, name_of(ask(circle, attempt, 1, ledger, draws=Signs(size)))))
    noise = moved(*found).abs() * 4 / RUN["train.lr"]
    assert circle.sigma < 9.0
    torch.testing.assert_close(noise, torch.full_like(noise, 9.0 * C), rtol=1e-3, atol=1e-4)


def test_both_are_one_entry_of_the_ledger_like_any_secure_sums(circle: Circle, tmp_path: Path, model: Path) -> None:
    entries = []
    for number, other in enumerate((circle, Circle(tmp_path / "plain", model))):
        create(ledger := tmp_path / f"{number}.ledger")
        ask(other, other.attempt(), 1, ledger)
        (entry,) = reserved_in(ledger)
        assert isinstance(entry, SharedReserve)
        entries.append(entry)
    names = ("sigma", "q", "share", "sites", "colluders", "epsilon", "alone_epsilon")
    assert [getattr(entries[0], name) for name in names] == [getattr(entries[1], name) for name in names]


def test_b_never_leaves_and_other_draws_are_another_b(circle: Circle, tmp_path: Path) -> None:
    """Also of one attempt that is asked again of a ledger which was put back."""
    found = []
    for number in range(2):
        create(ledger := tmp_path / f"{number}.ledger")
        served = ask(circle, circle.attempt(), 1, ledger)
        assert set(sent(served)) == {name for name in sent(served) if LORA_A in name}
        stays = kept(ledger, 1, name_of(served))
        assert stays and all(LORA_B in name for name in stays)
        found.append(stays)
    assert float(moved(*found).abs().min()) > 0


def test_every_attempt_of_a_round_begins_from_the_b_that_the_server_names_and_is_counted(circle: Circle, tmp_path: Path) -> None:
    create(ledger := tmp_path / "ledger")
    first = name_of(ask(circle, circle.attempt(), 1, ledger))
    start = kept(ledger, 1, first)
    steps = []
    for number in (1, 2):  # the first attempt is spoilt: a site was missing
        attempt = circle.attempt(number)
        found = ask(circle, attempt, 2, ledger, first, Signs(0.0))
        steps.append(moved(kept(ledger, 2, name_of(found)), start))
        assert kept(ledger, 1, first).keys() == start.keys()  # still there to begin from
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=1e-6)  # without noise both are one step from one B
    assert len(reserved_in(ledger)) == 3
