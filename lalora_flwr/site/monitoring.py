"""What the owner of a site can watch: the site's state as a file for Prometheus (``metrics-path``).

ε and rounds are read from the ledger each time, so that the file is right again after a crash. What no ledger holds (refusals and
seconds) goes on from the file itself, which is replaced as a whole.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from lalora_flwr.ground.errors import LaloraError, subject_of
from lalora_flwr.ground.files import expanded
from lalora_flwr.ground.prometheus import Family, Labels, Samples, labels, samples_of, write_metrics

log = logging.getLogger("lalora_flwr.site")
REFUSALS, SECONDS, MESSAGES = "lalora_site_refusals_total", "lalora_site_seconds_total", "lalora_site_messages_total"
CONTACT = "lalora_site_last_contact_timestamp_seconds"
USABLE = "lalora_site_ledger_usable", "Whether the ledger could be read."
NOTHING = [Family(*USABLE, {(): 0})], 0.0  # where the ledger cannot be read
LOCK_TRIES, LOCK_PAUSE = 50, 0.02  # a second at most: a message is worth more than a count
NodeConfig = Mapping[str, bool | int | float | str]
_warned: set[str] = set()


def noted(node_config: NodeConfig, reason: str, seconds: float, clock: Callable[[], float] = time.time) -> None:
    """Bring a site's file up to date after a message; a site without ``metrics-path`` has none. Never raises.

    Guarantee: nothing in it follows from the records that a server does not learn too: ε and rounds from the ledger, the fixed
    reasons, and ``seconds``, if the caller gives the time at which the reply leaves and not the time that the work took.

    Args:
        node_config: the owner's.
        reason: the fixed reason that the server gets; empty for an answer.
        seconds: from the message to its answer.
        clock: seconds since 1970.
    """
    readable = subject_of(reason) != "node-config"  # else the log would say once more what cannot be used
    _update(node_config, lambda before: _after(before, reason, seconds, clock()), readable)


def refreshed(node_config: NodeConfig) -> None:
    """The same without a message, as when a site starts."""
    _update(node_config, lambda before: before)


def _update(node_config: NodeConfig, change: Callable[[Samples], Samples], readable: bool = True) -> None:
    path = Path(str(node_config.get("metrics-path", "")))
    if not path.name:
        return
    try:
        path = expanded(path)
        with _alone(path.parent):
            before = samples_of(path.read_text(encoding="utf-8")) if path.is_file() else {}
            write_metrics(path, _families(change(before), *(_of_ledger(node_config) if readable else NOTHING)))
    except Exception as error:  # whatever a disk, a ledger or an owner's file has come to: the message is answered
        if str(path) not in _warned:
            reason = error.strerror if isinstance(error, OSError) else type(error).__name__
            log.warning("metrics-path = %r: cannot be written (%s); the site goes on", str(path), reason)
        _warned.add(str(path))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep the site's other processes from the file meanwhile, by a lock on its folder that leaves nothing behind."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(LOCK_PAUSE)
        yield
    finally:
        os.close(handle)


def _after(before: Samples, reason: str, seconds: float, now: float) -> Samples:
    """The counts with one more message."""
    found = {**before, (CONTACT, ()): now}
    added: list[tuple[str, Labels, float]] = [(MESSAGES, (), 1), (SECONDS, (), seconds)]
    if reason:
        added.append((REFUSALS, labels(reason=subject_of(reason)), 1))
    for name, of, more in added:
        found[name, of] = found.get((name, of), 0) + more
    return found


def _of_ledger(node_config: NodeConfig) -> tuple[list[Family], float]:
    """What the ledger says, and when it was last added to; without a usable one only that."""
    from lalora_flwr.ledger.caps import caps_from  # these need torch, which a process without a metrics file is spared
    from lalora_flwr.ledger.file import LedgerFile
    from lalora_flwr.settings import Settings
    from lalora_flwr.site.admission import ledger_for, request_for

    try:
        caps = caps_from(node_config, needed=True)
        assert caps is not None
        spent = ledger_for(caps, request_for(caps, Settings(), 0, 0, "", clip_norm=1.0)).spent()
        book = LedgerFile(caps.ledger_path, witness=caps.witness_path).state().book
    except LaloraError:  # the message's own answer and log say why
        return NOTHING
    of = labels(dataset=caps.dataset)
    rounds, evaluations = book.served(caps.dataset)
    records = book.records_of(caps.dataset)
    alert = caps.alert_epsilon if caps.alert_epsilon < math.inf else None
    alerted = None if alert is None else int(spent >= alert)
    families = [
        Family(*USABLE, {(): 1}),
        Family("lalora_site_epsilon_spent", "Spent on the records, over all runs and servers.", {of: spent}),
        Family("lalora_site_epsilon_left", "What max-epsilon leaves.", {of: max(0.0, caps.max_epsilon - spent)}),
        Family("lalora_site_alert_epsilon", "The owner's alert-epsilon.", {of: alert}),
        Family("lalora_site_alert", "Whether epsilon has reached alert-epsilon.", {of: alerted}),
        Family("lalora_site_rounds_total", "Rounds that the ledger counts.", {of: rounds}),
        Family("lalora_site_evaluations_total", "Evaluations that the ledger counts.", {of: evaluations}),
    ]
    return families, datetime.fromisoformat(records.until).timestamp() if records else 0.0


def _families(counts: Samples, of_ledger: list[Family], entered: float) -> list[Family]:
    def kept(name: str) -> dict[Labels, float | None]:
        return {of: value for (found, of), value in sorted(counts.items()) if found == name}

    contact = max(entered, counts.get((CONTACT, ()), 0.0))
    return [
        *of_ledger,
        Family(MESSAGES, "Messages that were answered, refusals among them.", kept(MESSAGES)),
        Family(REFUSALS, "Refused and failed messages, by what their reason is about.", kept(REFUSALS)),
        Family(SECONDS, "Time from messages to their answers.", kept(SECONDS)),
        Family(CONTACT, "When a server last asked for work.", {(): contact or None}),
    ]
