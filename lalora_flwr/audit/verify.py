"""Verify a run's folder: every digest, every ε by two accountants, and what the sites' ledgers say of the run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lalora_flwr.audit import membership_record
from lalora_flwr.audit.agreement import Files
from lalora_flwr.audit.record import FILE, read
from lalora_flwr.ground.errors import ConfigError, LaloraError, RunFailed
from lalora_flwr.ground.files import file_digest, read_small
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.ledger.verify import ERROR, SAME, SECOND
from lalora_flwr.ledger.verify import verify as verify_ledger
from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.events import SampledGaussian
from lalora_flwr.server.certificate import CERTIFICATE, READABLE, code_digest, readable, seal
from lalora_flwr.server.metrics import CONFIG, METRICS, SUMMARY


def verify(folder: Path, ledgers: Sequence[Path] = ()) -> Iterator[str]:
    """One line for each thing that was recomputed and found right.

    Guarantee: if it ends, every file that the certificate names has the bytes that it had when the run ended, and every number in
    it follows from the steps that it lists. Whoever can write the whole folder can also make another certificate for it: only the
    ledgers, which their owners keep, and whose entries are chained, tell that from the run's own.

    Args:
        folder: of the run.
        ledgers: of its sites, each of which must hold the run.

    Raises:
        ConfigError: there is no certificate, or no such ledger.
        RunFailed: naming the first difference.
    """
    whole = _read(folder)
    for path in ledgers:  # a mistyped name is no difference
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; name the ledgers of the run's sites")
    try:
        yield from _folder(folder, whole)
        files = Files.of(folder)
        files.check(whole)
        yield from _numbers(folder, whole)
        yield from _audited(folder, files)
        yield from _attacked(folder, files)
        for path in ledgers:
            yield _ledger(path, whole)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError, RecursionError) as fault:
        raise RunFailed(f"{folder / CERTIFICATE}: is not what a run writes ({type(fault).__name__}: {fault})") from None


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CERTIFICATE
    if not path.is_file():
        raise ConfigError(f"{folder}: holds no {CERTIFICATE}; name the folder of a run that finished, of this version or newer")
    try:
        whole = json.loads(read_small(path))
        if not isinstance(whole, dict):
            raise ValueError("not a table")
        return whole
    except (OSError, ValueError, RecursionError) as fault:
        raise RunFailed(f"{path}: cannot be read: {' '.join(str(fault).split())}") from None


def _folder(folder: Path, whole: dict[str, Any]) -> Iterator[str]:
    rest = {name: value for name, value in whole.items() if name != "digest"}
    text = json.dumps({**rest, "digest": seal(rest)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if read_small(folder / CERTIFICATE) != text.encode():
        raise RunFailed(f"{folder / CERTIFICATE}: was changed: its digest is not that of its content")
    for name, digest in whole["files"].items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise RunFailed(f"{folder / CERTIFICATE}: names a file outside of the run's folder")
        if not path.is_file():
            raise RunFailed(f"{path}: is gone")
        if file_digest(path) != digest:
            raise RunFailed(f"{path}: was changed: its digest is not the certificate's")
    for name in (CONFIG, SUMMARY, METRICS, "adapter/", "checkpoint/"):
        if not any(file == name or (name.endswith("/") and file.startswith(name)) for file in whole["files"]):
            raise RunFailed(f"{folder / CERTIFICATE}: is not about {name}")
    for part in ("adapter", "best", "checkpoint"):  # plots may be added by `lalora diagnose`
        for path in sorted((folder / part).rglob("*")):
            if (path.is_symlink() or not path.is_dir()) and path.relative_to(folder).as_posix() not in whole["files"]:
                raise RunFailed(f"{path}: was added after the run ended")
    yield f"{len(whole['files'])} files have the bytes that they had when the run ended"
    if not (folder / READABLE).is_file() or read_small(folder / READABLE) != readable(whole).encode():
        raise RunFailed(f"{folder / READABLE}: does not say what {CERTIFICATE} says")
    yield f"{READABLE} says what {CERTIFICATE} says"


def _numbers(folder: Path, whole: dict[str, Any]) -> Iterator[str]:
    """ε of every site from its steps."""
    if whole["code"]["digest"] == code_digest():
        yield "the code that ran is the one that is installed here"
    else:
        yield f"another code ran than is installed here: version {whole['code']['version']}, digest {whole['code']['digest']}"
    if not whole["differentially_private"]:
        yield "the run was not differentially private, and says so"
        return
    delta, first, second = whole["delta"], whole["accountant"], whole["second_accountant"]
    largest = alone = 0.0
    known = [site for site, own in whole["sites"].items() if own["steps"] is not None]
    for site, own in whole["sites"].items():
        largest = max(largest, own["epsilon"])
        if own["steps"] is None:
            continue
        _check(folder, f"site {site}", own["steps"], own["epsilon"], delta, first, own["epsilon_by_second_accountant"])
        if "steps_alone" in own:
            worst = own["epsilon_if_all_others_collude"]
            alone = max(alone, worst)
            _same(folder, f"site {site}, if all others collude", _epsilon(own["steps_alone"], delta, first), worst)
    _same(folder, "epsilon", largest, whole["epsilon"])
    if whole["epsilon_if_all_others_collude"] is not None:
        _same(folder, "epsilon_if_all_others_collude", alone, whole["epsilon_if_all_others_collude"])
    yield f"epsilon of {len(known)} sites follows from their steps by {first}, and {second} does not contradict it"
    for site in sorted(set(whole["sites"]) - set(known)):
        yield f"site {site}: its noise is not known; the run's epsilon stands for it"


def _check(folder: Path, who: str, steps: Any, epsilon: float, delta: float, first: str, second_epsilon: float) -> None:
    """As a ledger's entries are verified."""
    found, other = _epsilon(steps, delta, first), _epsilon(steps, delta, SECOND[first])
    _same(folder, who, found, epsilon)
    _same(folder, f"{who}, by the second accountant", other, second_epsilon)
    tight, rdp = (other, found) if first == "rdp" else (found, other)
    if not tight - ERROR <= rdp <= 3 * tight + 20:
        raise RunFailed(f"{folder / CERTIFICATE}: {who}: the accountants contradict each other: {found:g}, {other:g}")


def _epsilon(steps: Any, delta: float, accountant: str) -> float:
    return epsilon_spent([SampledGaussian(float(sigma), float(q), int(count)) for sigma, q, count in steps], delta, accountant)


def _same(folder: Path, what: str, found: float, said: float) -> None:
    if not math.isclose(found, said, rel_tol=SAME):
        raise RunFailed(f"{folder / CERTIFICATE}: {what}: {said!r}, but the steps cost {found!r}")


def _audited(folder: Path, files: Files) -> Iterator[str]:
    """An audit may come after the certificate, which is therefore not about it."""
    if not (folder / FILE).exists():
        yield f"not audited (`lalora audit {folder}`)"
        return
    try:
        audit = read(folder / FILE)
    except ConfigError as fault:
        raise RunFailed(str(fault)) from None
    files.audited(audit)
    yield f"audited: {audit.sentence}"


def _attacked(folder: Path, files: Files) -> Iterator[str]:
    """Membership inference on a run's own adapter refutes nothing, but it is said."""
    path = folder / membership_record.FILE
    if path.exists():
        try:
            attack = membership_record.read(path)
        except ConfigError as fault:
            raise RunFailed(str(fault)) from None
        files.attacked(attack)
        yield f"attacked: {attack.sentence}"


def _ledger(path: Path, whole: dict[str, Any]) -> str:
    """A site's ledger is good, and what it counts for the run costs no more than the certificate says of one of its sites."""
    try:
        content = verify_ledger(LedgerFile(path)).content
    except LaloraError as fault:
        raise RunFailed(str(fault)) from None
    if not whole["run_ids"]:
        raise RunFailed(f"{path}: the run was a simulation, which no ledger knows")
    found = [
        events
        for dataset in content.book.datasets
        if (events := [event for run in whole["run_ids"] for event in content.book.run_segments(dataset, run)])
    ]
    if not found:
        raise RunFailed(f"{path}: holds nothing of this run")
    for events in found:
        if not any(_covers(own, events, whole) for own in whole["sites"].values()):
            raise RunFailed(f"{path}: counts {_words(events)} for this run, which no site of the certificate covers")
    return f"{path}: good, head {content.head}; of this run it counts {'; '.join(map(_words, found))}"


def _covers(own: Any, counted: Sequence[SampledGaussian], whole: dict[str, Any]) -> bool:
    """Whether a site of the certificate took as many steps as a ledger counts, and at no smaller ε."""
    if own["steps"] is None or {event.sample_rate for event in counted} - {q for _, q, _ in own["steps"]}:
        return False
    if sum(event.steps for event in counted) > sum(count for _, _, count in own["steps"]):
        return False
    spent = _epsilon(counted, whole["delta"], whole["accountant"])
    return not whole["differentially_private"] or spent <= own["epsilon"] * (1 + SAME)


def _words(steps: Sequence[SampledGaussian]) -> str:
    return ", ".join(f"{count} steps at σ = {sigma:.4g} and q = {q:.4g}" for sigma, q, count in steps)
