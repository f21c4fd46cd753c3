"""``summary.json`` of a run that finished."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from lalora_flwr.models.base import BaseModel
from lalora_flwr.privacy.noise import head_event
from lalora_flwr.server.best import Best
from lalora_flwr.server.counts import SiteCounts
from lalora_flwr.server.metrics import Quality, RoundMetrics, Summary
from lalora_flwr.server.personal import IN_SIMULATION
from lalora_flwr.server.versions import commit, versions
from lalora_flwr.settings import Settings

SITE_ACCURACY_LEAK = "site_accuracy: exact accuracy on the sites' private records, which no epsilon covers"
SITE_ACCURACY_NOISED = "noised by each site; counted in its ledger and in the epsilon of this run"


def summary_of(
    settings: Settings,
    base: BaseModel,
    counts: SiteCounts,
    *,
    quality: Quality,
    frozen: Quality,
    last: Quality,
    best: Best,
    personal: Quality,
    started_from: str,
    rounds: Sequence[RoundMetrics],
    seconds: float,
    ended_early: str,
    tested: Mapping[str, Any],
) -> Summary:
    """
    Args:
        settings: the run's.
        base: its frozen model.
        counts: of its sites.
        best: the round that did best.
        quality, frozen, last, personal, started_from: as `Summary` has them.
        rounds: the lines of all of its rounds.
        seconds: that it took.
        ended_early: why a resumed run lacks rounds.
        tested: what `lalora_flwr.server.tested` says of the test records.
    """
    largest, exact = counts.of(counts.most()), counts.exact_accuracy
    return Summary(
        strategy=settings.strategy,
        model=settings.model.name,
        model_revision=base.provenance.revision,
        model_files=base.provenance.files,
        model_digest=base.provenance.digest,
        data=settings.data.name,
        labels=base.labels,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        seed=settings.seed,
        rounds=rounds[-1].round,
        ended_early=ended_early,
        **tested,
        quality=quality,
        frozen=frozen,
        last=last,
        best_round=best.round if (earlier := 0 < best.round < rounds[-1].round) else None,
        best=best.quality if earlier else {},
        personal=personal,
        personal_is=IN_SIMULATION if personal else "",
        started_from=started_from,
        epsilon=counts.epsilon(),
        delta=settings.privacy.delta,
        noise_multiplier=largest.noise_multiplier,
        sample_rate=largest.sample_rate,
        head_noise_multiplier=head_event(settings).noise_multiplier if settings.ridge_first else None,
        clip_norm=settings.privacy.clip_norm,
        accountant=settings.privacy.accountant,
        **_sharing(settings, counts, rounds),
        private=settings.private,
        seeded=not counts.real,
        leaks=SITE_ACCURACY_LEAK if settings.evaluate_sites and exact else "",
        site_accuracy_is=SITE_ACCURACY_NOISED if settings.evaluate_sites and not exact else "",
        centralised=True if settings.num_supernodes == 1 else None,
        share_passes="rounding" if settings.train.share_passes == "rounding" else "",
        failures=sum(line.failures for line in rounds),
        bytes_up=sum(line.bytes_up for line in rounds),
        bytes_down=sum(line.bytes_down for line in rounds),
        seconds=seconds,
        peak_memory_mb=peak_memory_mb(),
        sites=counts.report(),
        versions=versions(),
    )


def peak_memory_mb() -> float:
    """The most memory that this process has held so far, in MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def _sharing(settings: Settings, counts: SiteCounts, rounds: Sequence[RoundMetrics]) -> dict[str, Any]:
    """What a summary says of a noise that sites share."""
    if not settings.shares_noise:
        return {}
    return {
        "trust": settings.trust,
        "colluders": settings.colluders,
        "epsilon_alone": counts.epsilon_alone(),
        "repeats": sum(line.repeats or 0 for line in rounds),
    }
