"""The folder of composed histories: it saves work, survives whatever happens to it, and never decides anything."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest

from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.composition.composer import Composer
from lalora_flwr.privacy.composition.history import Composition, composition
from lalora_flwr.privacy.composition.store import MOST_FILES, Store
from lalora_flwr.privacy.events import SampledGaussian

DELTA = 1e-5
HISTORY: list[SampledGaussian] = [(1.0, 0.05, 30), (2.0, 0.1, 20), (4.0, 0.3, 10)]
MORE: list[SampledGaussian] = [*HISTORY, (1.5, 0.02, 40)]


def composed(history: list[SampledGaussian] = HISTORY) -> Composition:
    return composition(tuple(sorted(((s, q), n) for s, q, n in history)), DELTA)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_what_comes_out_is_what_was_put_in(tmp_path: Path) -> None:
    Store(tmp_path).put(composed())
    (out,) = Store(tmp_path).bases(DELTA)
    assert (out.steps, out.delta, out.lattices) == (composed().steps, DELTA, composed().lattices)
    assert out.epsilon() == composed().epsilon()
    assert list(Store(tmp_path).bases(2 * DELTA)) == []


def test_a_new_process_goes_on_from_the_last_ones_and_finds_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "when needed"
    first = Composer(folder)(HISTORY, DELTA, "pld")
    assert first == Composer(folder)(HISTORY, DELTA, "pld") == pytest.approx(epsilon_spent(HISTORY, DELTA), rel=1e-12)
    assert Composer(folder)(MORE, DELTA, "pld") == pytest.approx(epsilon_spent(MORE, DELTA), rel=1e-12)


def test_the_folder_is_used(tmp_path: Path) -> None:
    """Shown by a file that holds something else, with a good digest: the owner of the folder is trusted, as the ledger's is."""
    other = composed()
    spectra = tuple(replace(spectrum, infinite=0.5) for spectrum in other.spectra)
    Store(tmp_path).put(replace(other, spectra=(spectra[0], spectra[1])))
    assert Composer(tmp_path)(HISTORY, DELTA, "pld") == float("inf")


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_other_accountants_are_as_without_it(tmp_path: Path, accountant: str) -> None:
    assert Composer(tmp_path)(HISTORY, DELTA, accountant) == epsilon_spent(HISTORY, DELTA, accountant)
    assert files(tmp_path) == []


@pytest.mark.parametrize("where", [0.0, 0.01, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "doubled"])
def test_a_damaged_file_is_composed_anew(tmp_path: Path, where: float, damage: str) -> None:
    Store(tmp_path).put(composed())
    (path,) = files(tmp_path)
    content = path.read_bytes()
    at = int(where * len(content))
    path.write_bytes(
        {
            "flipped": content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :],
            "cut": content[:at],
            "emptied": b"",
            "doubled": content + content,
        }[damage]
    )
    assert list(Store(tmp_path).bases(DELTA)) == []
    expected = epsilon_spent(MORE, DELTA)
    assert Composer(tmp_path)(MORE, DELTA, "pld") == pytest.approx(expected, rel=1e-12)


def test_a_file_under_another_files_name_is_what_it_holds(tmp_path: Path) -> None:
    """Names only find candidates: steps and δ are read from the file."""
    Store(tmp_path).put(composed(MORE))
    (path,) = files(tmp_path)
    Store(tmp_path).put(composed(HISTORY))
    (wanted,) = [other for other in files(tmp_path) if other != path]
    wanted.write_bytes(path.read_bytes())
    assert Composer(tmp_path)(HISTORY, DELTA, "pld") == pytest.approx(epsilon_spent(HISTORY, DELTA), rel=1e-12)


def test_a_folder_that_cannot_be_used_changes_nothing(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    assert Composer(in_the_way)(HISTORY, DELTA, "pld") == epsilon_spent(HISTORY, DELTA)
    assert in_the_way.read_text() == "not a folder"


def test_steps_given_back_are_composed_from_an_older_file(tmp_path: Path) -> None:
    Composer(tmp_path)(HISTORY, DELTA, "pld")
    Composer(tmp_path)(MORE, DELTA, "pld")
    fewer = [*HISTORY, (1.5, 0.02, 7)]
    assert Composer(tmp_path)(fewer, DELTA, "pld") == pytest.approx(epsilon_spent(fewer, DELTA), rel=1e-12)


def test_the_number_of_files_is_bounded_and_the_newest_stay(tmp_path: Path) -> None:
    compose = Composer(tmp_path)
    for steps in range(1, MOST_FILES + 6):
        compose([*HISTORY, (1.5, 0.02, steps)], DELTA, "pld")
    assert len(files(tmp_path)) == MOST_FILES
    newest = next(iter(Store(tmp_path).bases(DELTA)))
    assert dict(newest.steps)[1.5, 0.02] == MOST_FILES + 5
    assert all(path.name.endswith(".composed") for path in files(tmp_path))


def test_what_a_killed_process_left_is_taken_away_after_an_hour(tmp_path: Path) -> None:
    old, new = tmp_path / ".old.partial", tmp_path / ".new.partial"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (0, 0))
    Composer(tmp_path)(HISTORY, DELTA, "pld")
    assert not old.exists() and new.exists()


def test_one_pair_needs_no_file(tmp_path: Path) -> None:
    Composer(tmp_path)(HISTORY[:1], DELTA, "pld")
    assert files(tmp_path) == []


def _many(folder: Path, worker: int) -> None:
    compose = Composer(folder)
    for steps in range(1, 30):
        history = [*HISTORY, (1.5, 0.02, steps * (1 + worker % 2))]
        assert compose(history, DELTA, "pld") == pytest.approx(epsilon_spent(history, DELTA), rel=1e-10)


def test_processes_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_many, args=(tmp_path, worker)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(files(tmp_path)) <= MOST_FILES + len(workers)
    assert not [path for path in files(tmp_path) if path.name.startswith(".")]
    assert os.access(files(tmp_path)[0], os.R_OK)
