"""Serves the orders of a round to several virtual sites at once, in passes that they share."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from lalora_flwr.ground.errors import LaloraError
from lalora_flwr.ground.meeting import Meeting
from lalora_flwr.settings import Settings, settings_again
from lalora_flwr.settings.stages import stage_of
from lalora_flwr.site.app import SiteApp, make_client_app
from lalora_flwr.site.host import Host
from lalora_flwr.training.company import company
from lalora_flwr.training.learner import Learner, LearnerCache
from lalora_flwr.training.together import ALONE, WORTH_IT, Company, Gradients, Pass, SharedPasses, site_learner
from lalora_flwr.wire.orders import TrainOrder
from lalora_flwr.wire.profile import Words

log = logging.getLogger(__name__)
Order = tuple[Message, Context]
Serve = Callable[[Message, Context], Message]


class _OfSites(LearnerCache):
    """Learners of sites that share one model; each call makes a site's own."""

    def __init__(self, whole: LearnerCache, ask: Callable[[Pass], Gradients]) -> None:
        self._whole, self._ask = whole, ask

    def learner(self, settings: Settings, device: str = "") -> Learner:
        return site_learner(self._whole.learner(settings, device), self._ask)


def even(orders: Sequence[Order], parts: int) -> list[Sequence[Order]]:
    """Cut into so many parts of about the same length."""
    ends = [len(orders) * part // parts for part in range(parts + 1)]
    return [orders[first:last] for first, last in itertools.pairwise(ends)]


@lru_cache(maxsize=8)
def _words(profiles: str) -> list[Words]:
    """What the sites' profiles say, in the run's settings."""
    return [Words.of(text) for text in profiles.split(";")]


class SitesTogether:
    """Virtual sites of this process, which train as if each were alone: to the bit, or as far as ``train.share-passes`` says."""

    def __init__(
        self,
        host: Host,
        find: Callable[[Learner, float, bool], Company] = company,
        worth_it: int = WORTH_IT,
    ) -> None:
        """
        Args:
            host: what the process hands to its sites.
            find: how many sites are worth one pass, by the learner, the records of a site's pass and whether rounding may differ.
            worth_it: steps of all sites in a run that is long enough to find out.
        """
        self._host, self._find, self._worth_it = host, find, worth_it
        self._apps: dict[Company, tuple[ClientApp, Meeting[Pass, Gradients]]] = {}
        self._companies: dict[object, tuple[Company, Learner]] = {}  # with the learner, so that its id stays its own

    def __call__(self, orders: Sequence[Order], alone: Serve) -> list[Message]:
        """The sites' replies to orders to train, in their order; ``alone`` serves one by itself, where that is as fast."""
        found = self.company(*orders[0]) if len(orders) > 1 else ALONE
        if found.sites == 1:
            return [alone(message, context) for message, context in orders]
        app, meeting = self._app(found)
        replies: list[Message] = []
        for part in even(orders, math.ceil(len(orders) / found.sites)):
            replies += meeting.run([partial(app, message, context) for message, context in part])
        return replies

    def company(self, message: Message, context: Context) -> Company:
        """How many sites are worth one pass of the run, by an order to train; one if that cannot be determined: the sites say
        what is wrong."""
        try:
            settings = stage_of(settings_again(context.run_config), TrainOrder.of(message.content).server_round)
            train = settings.train
            if settings.num_rounds * settings.sites_per_round * train.local_steps < self._worth_it or settings.lora.dropout:
                return ALONE  # the masks of dropout come from one generator, site after site
            if train.share_passes == "off" or any(told.batch or told.precision for told in _words(settings.profiles)):
                return ALONE
            learner = self._host.learners.learner(settings)
        except LaloraError:
            return ALONE
        records = min(train.batch_size, train.max_physical_batch or train.batch_size)
        rounding = train.share_passes == "rounding"
        key = (id(learner), records, train.augmentations, train.num_threads, rounding)
        if key not in self._companies:
            found = self._find(learner, records * train.augmentations, rounding)
            self._companies[key] = found, learner
            log.info("up to %d sites share a pass%s", found.sites, ", to float32 rounding" if found.rounding else "")
        return self._companies[key][0]

    def _app(self, found: Company) -> tuple[ClientApp, Meeting[Pass, Gradients]]:
        if found not in self._apps:
            meeting: Meeting[Pass, Gradients] = Meeting(SharedPasses(found), found.sites)
            host = replace(self._host, learners=_OfSites(self._host.learners, meeting.ask))
            self._apps[found] = make_client_app(lambda: host), meeting
        return self._apps[found]


def shared_passes(app: ClientApp) -> SitesTogether | None:
    """Several sites at once; one after the other if the app does more than its host says."""
    return SitesTogether(app.host()) if isinstance(app, SiteApp) else None
