"""What a site does with one train message. No Flower runtime in here: records in, records out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from flwr.app import ConfigRecord, Context, RecordDict
from torch import Tensor

from lalora_flwr.adapter.slots import Layout, Mask
from lalora_flwr.data.records import RecordSet
from lalora_flwr.ground.errors import ConfigError, SiteRefusal
from lalora_flwr.ground.processors import processors
from lalora_flwr.ground.seeds import derive_seed
from lalora_flwr.ledger.caps import Caps, at_once, caps_from, check_rate, check_run
from lalora_flwr.ledger.site_ledger import SiteLedger
from lalora_flwr.methods.filters import State
from lalora_flwr.methods.method import Method, method_of, served_by
from lalora_flwr.methods.transport import Exchange, Sender
from lalora_flwr.privacy.counting import RunLedger, at_least, history_from
from lalora_flwr.privacy.mechanism import Mechanism
from lalora_flwr.privacy.noise import mechanism_for, target_of
from lalora_flwr.privacy.randomness import RandomSource
from lalora_flwr.settings import Settings, settings_again, settings_from
from lalora_flwr.settings.stages import stage_of
from lalora_flwr.site import memory
from lalora_flwr.site.admission import admitted
from lalora_flwr.site.host import Host
from lalora_flwr.site.model import check_start, own_model, start_from, tensors_of
from lalora_flwr.site.own_part import OwnPart, digest_of
from lalora_flwr.site.pins import own_settings, with_own_model
from lalora_flwr.site.records import NodeConfig, counted_records
from lalora_flwr.site.sharing import secrets_of, sharing_of
from lalora_flwr.training.learner import Learner
from lalora_flwr.training.local import LocalRound, gradient_round, step_along, train_round
from lalora_flwr.training.rate import noise_at_all, rate_for
from lalora_flwr.wire.npy import record_of
from lalora_flwr.wire.orders import ARRAYS, MEMORY, TrainOrder
from lalora_flwr.wire.profile import Profile
from lalora_flwr.wire.replies import COUNTERS, Counters
from lalora_flwr.wire.sharing import Secrets

log = logging.getLogger("lalora_flwr.site")  # the site's own log; the server never sees it
LEDGER = "ledger"  # record of Flower's per-site state that holds the counted steps


@dataclass(frozen=True)
class Site:
    """One site for the time of one message: where it runs, what its owner says, and what the run wants.

    Attributes:
        host: handed to it by its process.
        context: Flower's.
        settings: the run's, or those of its stage, with the site's own model.
        caps: the owner's; None only in a simulation.
    """

    host: Host
    context: Context
    settings: Settings
    caps: Caps | None

    @staticmethod
    def of(host: Host, context: Context) -> Site:
        """
        Raises:
            SiteRefusal: the node-config of a real site cannot be used.
            ConfigError: the run's settings cannot be used.
        """
        read = settings_again if host.simulated else settings_from
        settings = with_own_model(read(context.run_config), context.node_config)
        return Site(host, context, settings, caps_from(context.node_config, needed=not host.simulated))

    @property
    def node_config(self) -> NodeConfig:
        return self.context.node_config

    @property
    def profile(self) -> Profile:
        """As the server knows it."""
        if self.host.simulated and "partition-id" in self.node_config:
            number = int(self.node_config["partition-id"])
            return Profile(number, self.settings.words_of(number))
        return Profile(self.context.node_id, self.caps.profile if self.caps else "")

    @property
    def served(self) -> Settings:
        """What it makes of the run's settings."""
        return served_by(self.settings, self.profile)

    def source(self, settings: Settings, server_round: int, attempt: int = 1) -> RandomSource:
        """Where the site's draws for an attempt of a round come from: the operating system, or in a simulation the run's seed."""
        if not self.host.simulated:
            return self.host.entropy()
        site = int(self.node_config.get("partition-id", 0))
        if settings.lora.dropout:
            torch.manual_seed(derive_seed(settings.seed, "dropout", site, server_round))
        return self.host.seeded(settings.seed, site, server_round, attempt)


def train(host: Host, content: RecordDict, context: Context) -> RecordDict:
    """Serve one round: start from the server's adapter, train privately on the site's records, reply.

    Guarantee: the reply holds adapter tensors after clipping and noise, and public counters. The steps are counted
    before training and stay counted if it fails: in the site's ledger file, where σ, q and the expected batch follow
    from the number of records that the owner declares; in a simulation without caps in ``context.state``. With caps neither
    a refusal nor a failure depends on a record: what the owner allows is checked before any is read, and from then on the site
    answers whatever state they are in.

    Raises:
        SiteRefusal: with a fixed reason, if the site will not train.
        LedgerError: if the site's ledger cannot be used; its text is for the site only.
    """
    site, order = Site.of(host, context), TrainOrder.of(content)
    if site.caps:  # the owner's word is about the whole run, whatever its first stage asks for
        check_run(site.caps, site.served)
    site = dataclasses.replace(site, settings=stage_of(site.settings, order.server_round))
    settings, caps = site.served, site.caps
    torch.set_num_threads(min(settings.train.num_threads, processors()))
    secrets = _secrets(site)
    if caps:
        mechanism, ledger = admitted(caps, settings, method_of(site.settings), order, context.run_id, secrets)
        settings = own_settings(caps, settings, context.node_config, simulated=host.simulated)
    learner = own_model(host, settings, context.node_config, order.model_digest, quiet=caps is not None)
    start = _start(site, settings, learner, order, content, secrets)
    if caps:
        start = start.at_rate(mechanism)
        if (start.kept or not start.method.server_steps) and not start.method.own_rate:
            check_rate(caps, start.settings.train.lr)
        records, known_by = counted_records(host.records, settings, context.node_config, learner.base)
        _warn_of_size(caps, records)
        ledger.identify(known_by)
        return _answer(site, start, records, mechanism, ledger)
    records = host.records(settings, context.node_config, learner.base)
    if not len(records):
        raise SiteRefusal("data: the site has no usable record")
    mechanism = mechanism_for(settings, len(records))
    if secrets:
        sharing_of(settings, None, order, secrets, mechanism)
    run_ledger = _virtual_ledger(context, settings, mechanism, order)
    try:
        return _answer(site, start.at_rate(mechanism), records, mechanism, run_ledger)
    finally:
        context.state[LEDGER] = ConfigRecord({**run_ledger.state()})


@dataclass(frozen=True)
class _Start:
    """Where a round starts from: the learner holds the server's adapter, and what trains is settled."""

    settings: Settings
    order: TrainOrder
    method: Method
    learner: Learner
    layout: Layout
    masks: Sequence[Mask]
    up: Mask
    memory: dict[str, State]
    kept: Mask
    own: OwnPart | None
    sender: Sender

    def at_rate(self, mechanism: Mechanism) -> _Start:
        """With the learning rate that the run's rule gives if it names none."""
        noise = noise_at_all(mechanism, self.settings.sites_per_round)
        rate = rate_for(self.settings, self.method, self.learner.adapter.layout, noise)
        train = dataclasses.replace(self.settings.train, lr=rate)
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, train=train))


def _secrets(site: Site) -> Secrets | None:
    """What the site masks with, in a run whose sites share one noise."""
    if not site.settings.shares_noise:
        return None
    simulated = site.host.simulated
    return secrets_of(site.settings, site.caps, site.node_config, site.context.run_id, simulated=simulated)


def _start(
    site: Site, settings: Settings, learner: Learner, order: TrainOrder, content: RecordDict, secrets: Secrets | None
) -> _Start:
    """
    Raises:
        SiteRefusal: the order is not one that the run's own method gives.
    """
    method = method_of(site.settings)
    try:
        method.travel.check(site.profile)
    except ConfigError as problem:
        log.error("node-config: %s", problem)
        raise SiteRefusal("profile: the method can make nothing of the site's") from None
    layout = method.travel.held(learner.adapter.layout, site.profile)
    if not method.schedule.accepts(layout, order.directive) or not method.transport.accepts(order.exchange):
        raise SiteRefusal("order: its directive or its exchange is not one of the run's method")
    layout = method.schedule.within(layout, order.directive)
    steps = site.settings.train.local_steps
    masks = method.masks(layout, order.server_round, steps, order.directive, site.profile)
    if any(not mask or mask - layout.trainable for mask in masks):
        raise SiteRefusal("order: a step would train nothing, or what the adapter does not have")
    turn = method.turn(layout, order.server_round, steps, order.directive, site.profile)
    remembered: dict[str, State] = {}
    if method.sites_remember:
        remembered = memory.from_record((content if site.host.simulated else site.context.state).get(MEMORY))
    kept = method.travel.kept(layout)
    own = own_part(site, order.model_digest) if kept else None
    stayed = own_slots(site, own, content, order.own, order.server_round, layout.only(kept))
    start_from(learner, layout, tensors_of(content), method.travel.down(turn), stayed)
    check_start(learner, order.adapter_digest, kept)
    if own:  # not sooner: an order that is refused leaves no folder
        own.prepare()
    sender = Sender(site.profile.site, secrets)
    return _Start(settings, order, method, learner, layout, masks, method.travel.up(turn), remembered, kept, own, sender)


def own_part(site: Site, model_digest: str) -> OwnPart | None:
    """Where a real site keeps the slots that stay with it; a virtual one's go to and fro with the simulated server."""
    if site.host.simulated or not site.caps:
        return None
    return OwnPart(site.caps, site.settings, site.context.run_id, model_digest)


def own_slots(
    site: Site, own: OwnPart | None, content: RecordDict, name: str, server_round: int, held: Layout
) -> dict[str, Tensor]:
    """The slots of ``held``, which stay at the site, as its last round has left them; empty: they start anew."""
    if own:
        return own.load(name, server_round, held)
    return memory.kept_from(content.get(MEMORY)) if held and site.host.simulated else {}


def _answer(site: Site, start: _Start, records: RecordSet, mechanism: Mechanism, ledger: RunLedger | SiteLedger) -> RecordDict:
    """Train and reply."""
    settings, order, method, adapter = start.settings, start.order, start.method, start.learner.adapter
    exchange = Exchange(order.server_round, order.exchange, settings.privacy.clip_norm)
    source = site.source(settings, order.server_round, method.transport.attempt(exchange))
    train = settings.train
    if site.caps:
        train = dataclasses.replace(train, max_physical_batch=at_once(site.caps, settings))
    what = LocalRound(order.server_round, start.layout, start.masks, method.filter, train, tolerant=site.caps is not None)
    make_sum = site.host.make_sum
    if method.server_steps:
        release = partial(method.transport.released, ledger=ledger, source=source, exchange=exchange, kept=start.kept)
        released, not_finite = gradient_round(
            start.learner, records, what, release, mechanism=mechanism, ledger=ledger, source=source, make_sum=make_sum
        )
        step_along(adapter, {name: released[name] for name in released.keys() & start.kept}, train)
        state = adapter.state() if start.kept else {}
        out = {name: released[name].cpu().numpy() for name in sorted(start.up)}
    else:
        not_finite = train_round(
            start.learner,
            records,
            what,
            mechanism=mechanism,
            ledger=ledger,
            source=source,
            memory=start.memory,
            make_sum=make_sum,
        )
        state = adapter.state()
        out = {name: state[name].numpy() for name in sorted(start.up)}
    if not_finite:
        log.warning("round %d: %d record gradients were not finite and counted as zero", order.server_round, not_finite)
    sent = method.transport.pack(out, start.sender, exchange)
    counters = Counters(ledger.steps, ledger.epsilon(), mechanism.noise_multiplier, mechanism.sample_rate, source.seeded)
    reply = RecordDict({ARRAYS: record_of({n: sent[n] for n in sorted(sent)}), COUNTERS: counters.to_record()})
    stays = {name: state[name] for name in sorted(start.kept)}
    if start.own:
        start.own.save(digest_of(sent), order.server_round, stays)
        start.own.save_adapter(adapter.save)
    if method.sites_remember:
        simulated = site.host.simulated
        (reply if simulated else site.context.state)[MEMORY] = memory.to_record(start.memory, stays if simulated else None)
    return reply


def _warn_of_size(caps: Caps, records: RecordSet) -> None:
    if not 0.5 <= len(records) / caps.num_records <= 2:
        log.warning("node-config: num-records = %d, but there are %d usable records", caps.num_records, len(records))


def _virtual_ledger(context: Context, settings: Settings, mechanism: Mechanism, order: TrainOrder) -> RunLedger:
    """The count of a virtual site without caps, which Flower keeps; a worker that died or a resumed run has lost it."""
    kept = context.state.get(LEDGER)
    history = history_from(kept) if isinstance(kept, ConfigRecord) else []
    target = target_of(settings)
    sigma, q, before = mechanism.noise_multiplier, mechanism.sample_rate, target.begun(order.counted_before)
    history = at_least(history, order.counted_steps, sigma, q, before)
    return RunLedger(target, history)
