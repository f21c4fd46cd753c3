"""What a site's owner allows, checked before any record is read."""

from __future__ import annotations

from dataclasses import replace

from lalora_flwr.ledger.caps import Caps, check_mechanism, check_run
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.ledger.site_ledger import Request, SiteLedger
from lalora_flwr.methods.method import Method
from lalora_flwr.privacy.mechanism import Mechanism
from lalora_flwr.privacy.noise import mechanism_for, target_of
from lalora_flwr.settings import Settings
from lalora_flwr.site.sharing import sharing_of
from lalora_flwr.wire.orders import TrainOrder
from lalora_flwr.wire.sharing import Secrets


def request_for(
    caps: Caps,
    settings: Settings,
    run_id: int,
    server_round: int,
    schedule: str,
    clip_norm: float,
    counted: tuple[int, int] = (0, 0),
) -> Request:
    """What a run asks for, as the ledger takes it."""
    return Request(
        run=str(run_id),
        strategy=settings.strategy,
        server_round=server_round,
        schedule=schedule,
        dataset=caps.dataset,
        clip_norm=clip_norm,
        target=target_of(settings),
        counted_steps=counted[0],
        counted_before=counted[1],
    )


def ledger_for(caps: Caps, request: Request) -> SiteLedger:
    """The owner's ledger with the owner's limits."""
    file = LedgerFile(caps.ledger_path, witness=caps.witness_path)
    return SiteLedger(
        file,
        request,
        caps.max_epsilon,
        caps.delta,
        max_queries_per_day=caps.max_queries_per_day,
        max_epsilon_alone=caps.max_epsilon_alone,
        alert_epsilon=caps.alert_epsilon,
    )


def admitted(
    caps: Caps, settings: Settings, method: Method, order: TrainOrder, run_id: int, secrets: Secrets | None = None
) -> tuple[Mechanism, SiteLedger]:
    """What a site with caps trains with, once all that can be checked without its records has been checked.

    Args:
        caps: the owner's.
        settings: the run's as the site serves them: of its local steps, which may be fewer than the run's.
        method: the run's.
        order: of the server.
        run_id: Flower's.
        secrets: what the site masks with, in a run whose sites share one noise.

    Raises:
        SiteRefusal, LedgerError: the owner does not allow the round, has no budget left for it, or the ledger is unusable.
    """
    check_run(caps, settings)
    clip_norm = settings.privacy.clip_norm
    counted = order.counted_steps, order.counted_before
    request = request_for(caps, settings, run_id, order.server_round, method.schedule.text, clip_norm, counted)
    ledger = ledger_for(caps, request)
    mechanism = mechanism_for(settings, caps.num_records)
    check_mechanism(caps, mechanism)
    if secrets:
        ledger = ledger_for(caps, replace(request, sharing=sharing_of(settings, caps, order, secrets, mechanism)))
    ledger.check(mechanism.noise_multiplier, mechanism.sample_rate, settings.train.local_steps)
    return mechanism, ledger
