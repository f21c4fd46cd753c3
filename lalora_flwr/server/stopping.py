"""When a run stops: too many sites failed, too few are left, a process that simulates them died, or a merge made no adapter."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Collection, Mapping

import numpy as np

from lalora_flwr.adapter.slots import Layout
from lalora_flwr.ground.errors import NoSiteLeft, RunFailed, WorkerDied
from lalora_flwr.methods.merges import Merged
from lalora_flwr.server.exchange import RoundReport
from lalora_flwr.settings import Settings
from lalora_flwr.wire.public import written
from lalora_flwr.wire.tensors import LARGEST

log = logging.getLogger("lalora_flwr.server")
RAY_DEATHS = ("ActorDiedError", "ActorUnavailableError", "WorkerCrashedError", "OutOfMemoryError")


def stop_on_dead_worker(report: RoundReport) -> None:
    """Flower puts a dead Ray actor back into its pool, where it fails message after message. Only for virtual sites.

    Raises:
        WorkerDied: if a reply says that one died.
    """
    for site, reason in report.failed.items():
        if any(error in reason for error in RAY_DEATHS):
            raise WorkerDied(
                f"round {report.server_round}: the Ray worker that served site {site} died, perhaps for lack of memory; "
                "lalora run --resume goes on after the last finished round, with fewer --num-actors if it recurs"
            )


def stop_on_failures(report: RoundReport, asked: int, settings: Settings, said: Collection[int] = ()) -> None:
    """
    Args:
        report: of the round, before anything is merged.
        asked: how many sites were asked.
        settings: the run's.
        said: sites whose failure the log names already.

    Raises:
        RunFailed: fewer sites served the round than ``min-sites``, or more failed than ``max-failures``.
    """
    for site, reason in report.failed.items():
        if site not in said:
            log.error("round %d: site %d failed (%s)", report.server_round, site, reason)
    allowed, least = settings.max_failures, settings.min_sites
    if len(report.served) >= least and len(report.failed) <= allowed:
        return
    if not asked:
        raise NoSiteLeft(
            f"round {report.server_round}: no site may serve another round; see privacy.max-rounds and the sites' budgets"
        )
    who = "; ".join(f"site {site}: {reason}" for site, reason in report.failed.items())
    limit = f"max-failures = {allowed}" if len(report.failed) > allowed else f"min-sites = {least}"
    if not report.served:
        limit = "no site is left"
    gone = f" and {len(report.left)} left for lack of budget" if report.left else ""
    failed = f"{len(report.failed)} of {asked} sites failed{gone}"
    raise RunFailed(f"round {report.server_round}: {failed}, {limit}" + (f" ({who})" if who else ""))


def check_merged(server_round: int, merge: str, layout: Layout, merged: Merged) -> None:
    """Hold a merge, which may be another package's, to its interface before anything is kept of what it made.

    Raises:
        RunFailed: it named an unknown slot, or made values of another shape or that are not finite, or a directive that
            cannot travel.
    """
    fault = ""
    for name, value in merged.tensors.items():
        if name not in layout:
            fault = f"{name} is no slot of the adapter"
        elif np.shape(value) != layout[name].shape:
            fault = f"{name} has the shape {np.shape(value)}, not {layout[name].shape}"
        elif not np.isfinite(value).all():
            fault = f"{name} holds values that are not finite"
    try:
        written(merged.directive)
        written(merged.memory.notes)
    except (TypeError, ValueError) as error:
        fault = f"its directive or its notes cannot be written: {error}"
    if fault:
        raise RunFailed(f"round {server_round}: the merge {merge!r} is broken: {fault}")


def too_large(merged: Merged) -> bool:
    """Whether a merge made a value next to which all that sites could answer is refused.

    Each reply is within bounds, so no mean is beyond them; products of two factors can be.
    """
    return any((np.abs(value) > LARGEST).any() for value in merged.tensors.values())


def check_size(server_round: int, merge: str, merged: Merged) -> None:
    """Stop before sites are asked to start from values that are `too_large`.

    Raises:
        RunFailed: there is one.
    """
    if too_large(merged):
        raise RunFailed(
            f"round {server_round}: the merge {merge!r} made values above {LARGEST:g}, next to which what sites send is refused: "
            "one of them sent too much, or train.lr is too large"
        )


FAR_LONGER = 10.0  # times the middle one of the others


def far_longer(lengths: Mapping[int, float]) -> int | None:
    """The site whose update is far longer than those of the others; None if they are alike.

    ``lengths``: of the updates, by site.
    """
    if len(lengths) < 2:
        return None
    longest = max(lengths, key=lambda site: lengths[site])
    others = statistics.median(length for site, length in lengths.items() if site != longest)
    return longest if lengths[longest] > FAR_LONGER * others else None
