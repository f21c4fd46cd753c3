"""What a site does with one train message. No Flower runtime in here: records in, records out."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, RecordDict

from lalora_flwr.adapter.lora import adapter_state, digest, load_adapter_state, select
from lalora_flwr.data.data_set import data_set
from lalora_flwr.data.own_records import own_records
from lalora_flwr.data.partition import site_rows
from lalora_flwr.data.pins import check_pins, pinned
from lalora_flwr.data.records import RecordSet, no_records
from lalora_flwr.ground.errors import ConfigError, SiteRefusal
from lalora_flwr.ground.seeds import derive_seed
from lalora_flwr.ledger.caps import DEMONSTRATION, Caps, at_once, caps_from, check_mechanism, check_run
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.ledger.fingerprint import fingerprint_of_files, fingerprint_of_share
from lalora_flwr.ledger.site_ledger import Request, SiteLedger
from lalora_flwr.methods import METHODS
from lalora_flwr.methods.schedules import BOTH, parse_schedule
from lalora_flwr.models.base import BaseModel
from lalora_flwr.privacy.accounting import Segment, noise_multiplier_for
from lalora_flwr.privacy.counting import RunLedger, at_least, history_from
from lalora_flwr.privacy.mechanism import Mechanism
from lalora_flwr.privacy.randomness import RandomSource, SeededRandom, SystemRandom
from lalora_flwr.server.strategy import resolved_choices
from lalora_flwr.settings import Settings, flatten, settings_from
from lalora_flwr.training.learner import Adapted, adapted_model
from lalora_flwr.training.local import train_round
from lalora_flwr.wire.messages import ARRAYS, CONFIG, COUNTERS, Counters, TrainOrder, to_arrays, to_tensors

log = logging.getLogger("lalora_flwr.site")  # the site's own log; the server never sees it
LEDGER = "ledger"  # record of Flower's per-site state that holds the counted steps

_inline_simulation = False  # set by the inline engine in its own process; no message can set it


def in_simulation() -> bool:
    """Whether this process simulates sites: a Ray worker or the inline engine. A real site's process is neither."""
    ray = sys.modules.get("ray")
    return _inline_simulation or bool(ray is not None and ray.is_initialized())


def site_settings(context: Context) -> Settings:
    """The run's settings, with what the site's node-config says of its own machine: ``model-path``."""
    settings = settings_from(context.run_config)
    if path := str(context.node_config.get("model-path", "")):
        family = settings.model.name.partition("/")[0]
        own = dataclasses.replace(settings.model, name=f"{family}/{path}", revision="")  # the run's would choose the files
        return dataclasses.replace(settings, model=own)
    return settings


def own_settings(caps: Caps, settings: Settings, node_config: Mapping[str, Any]) -> Settings:
    """The run's settings as a site with caps takes them: what the records are comes from its node-config.

    A virtual site has no files of its own: it keeps the run's data set. A real site without any serves its share of the
    embedded digits, which are public, and nothing else that a run could name.

    Raises:
        SiteRefusal: the run takes the records for something else, or the site has none for it.
    """
    check_pins(caps, settings)
    if caps.data_path:
        if settings.data.name == "digits":
            raise SiteRefusal("data: the run is about the embedded digits; the site has records of its own")
        return pinned(caps, settings)
    if not in_simulation() and (settings.data.name != "digits" or not set(DEMONSTRATION) <= set(node_config)):
        raise SiteRefusal("data: the site's node-config names no data-path")
    return settings


def load_records(settings: Settings, node_config: Mapping[str, Any], base: BaseModel) -> RecordSet:
    """The site's records: those under its own ``data-path``, or its share of the run's data set; possibly none.

    Raises:
        SiteRefusal: if the node-config names neither.
        ConfigError: if what it names does not exist, may not be opened or lacks a column.
    """
    if path := str(node_config.get("data-path", "")):
        key = (path, settings.data, settings.model, 0, 0)
    elif "partition-id" in node_config and "num-partitions" in node_config:
        key = ("", settings.data, settings.model, int(node_config["partition-id"]), int(node_config["num-partitions"]))
    else:
        raise SiteRefusal("data: the site's node-config names no data-path")
    if (key, settings.seed) not in _kept:
        while len(_kept) >= KEPT_SITES:
            del _kept[next(iter(_kept))]
        _kept[key, settings.seed] = _read_records(settings, base, *key[:1], *key[3:])
    return _kept[key, settings.seed]


def owned_records(settings: Settings, node_config: Mapping[str, Any], base: BaseModel) -> RecordSet:
    """The records of a site with caps, whatever state they are in.

    Guarantee: whether this refuses depends on the node-config and on the layout of the files it names (that they are there, may
    be opened and have the columns), never on a record. Any other failure leaves no records, and the site answers with noise.

    Raises:
        SiteRefusal: with a fixed reason.
    """
    try:
        records = load_records(settings, node_config, base)
    except SiteRefusal:
        raise
    except ConfigError as fault:
        log.error("the site's records: %s", fault)
        raise SiteRefusal("data: the site cannot open what its node-config names; its own log says why") from None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic of a Rust library is no Exception
        log.exception("the site's records cannot be read")
        records = no_records()
    if not len(records):
        log.error("THE SITE HAS NO USABLE RECORD: it answers with noise alone, which is counted; see `lalora site check`")
    return records


KEPT_SITES = 64  # sites whose encoded records a process keeps
_kept: dict[Any, RecordSet] = {}


def _read_records(settings: Settings, base: BaseModel, path: str, site: int, sites: int) -> RecordSet:
    if path:
        return own_records(settings, path, base.encode, getattr(base, "vocabulary", 0), getattr(base, "segments", 0)).records
    data = data_set(settings)
    return data.private(site_rows(data.classes(), settings.data, settings.seed, sites, data.owners())[site], base.encode)


def sample_rate_for(settings: Settings, records: int) -> float:
    """q, each record's probability of joining a step."""
    return min(1.0, settings.train.batch_size / records)


def mechanism_for(settings: Settings, records: int, sigma: float | None = None) -> Mechanism:
    """The constants of a site's steps, from the settings and its number of records, which is taken as public.

    Guarantee: σ is calibrated for the most steps the site may take in the run, without amplification by the drawing of
    sites: the server sees who takes part. ``sigma``: the result, if it is known from before.
    """
    sample_rate, privacy = sample_rate_for(settings, records), settings.privacy
    if sigma is None:
        sigma = noise_multiplier_for(privacy.epsilon, privacy.delta, sample_rate, settings.steps_per_site, privacy.accountant)
    return Mechanism(sigma, privacy.clip_norm, sample_rate, expected_batch=sample_rate * records)


MODEL_DIFFERS = (
    "model: the site's base model differs from the server's or cannot be used; take the same files and package versions"
)


def own_model(settings: Settings, node_config: Mapping[str, Any], model_digest: str, *, quiet: bool) -> Adapted:
    """The run's model on this site.

    Args:
        settings: the run's, as the site takes them.
        node_config: the site's.
        model_digest: of the server's model.
        quiet: whatever is wrong has the same fixed reason. Without ``model-path`` the run names the place of the model, and
            different reasons would say which files there are on the site's machine.

    Raises:
        SiteRefusal: it is not the server's, or cannot be used.
        ConfigError: it cannot be used, unless ``quiet``.
    """
    try:
        adapted = adapted_model(settings, str(node_config.get("device", "")))
    except Exception:
        if not quiet:
            raise
        log.exception("the site cannot use the run's model")
        raise SiteRefusal(MODEL_DIFFERS) from None
    if adapted.base.provenance.digest != model_digest:
        raise SiteRefusal(MODEL_DIFFERS)
    return adapted


def _start_from(adapted: Adapted, order: TrainOrder, received: dict[str, torch.Tensor]) -> None:
    load_adapter_state(adapted.model, {**adapted.initial, **received})
    if digest(adapter_state(adapted.model), BOTH | {"head"}) != order.adapter_digest:
        raise SiteRefusal("adapter: the site's start differs from the server's; use the same package versions")


def random_source(settings: Settings, site: int, server_round: int) -> RandomSource:
    """Where a site's draws for a round come from: the operating system, or in a simulation the run's seed."""
    if not in_simulation():
        return SystemRandom()
    torch.manual_seed(derive_seed(settings.seed, "dropout", site, server_round))
    return SeededRandom(settings.seed, site, server_round)


def request_for(caps: Caps, settings: Settings, run_id: int, server_round: int, schedule: str, **more: Any) -> Request:
    """What a run asks for, as the ledger takes it; ``more`` replaces single fields."""
    privacy = settings.privacy
    request = Request(
        run=str(run_id),
        strategy=settings.strategy,
        server_round=server_round,
        schedule=schedule,
        dataset=caps.dataset,
        clip_norm=privacy.clip_norm,
        run_epsilon=privacy.epsilon,
        run_delta=privacy.delta,
        run_steps=settings.steps_per_site,
        run_accountant=privacy.accountant,
    )
    return dataclasses.replace(request, **more)


def ledger_for(caps: Caps, request: Request) -> SiteLedger:
    """The owner's ledger with the owner's limits."""
    file = LedgerFile(caps.ledger_path, witness=caps.witness_path)
    return SiteLedger(file, request, caps.max_epsilon, caps.delta, max_queries_per_day=caps.max_queries_per_day)


def _admitted(caps: Caps, settings: Settings, order: TrainOrder, run_id: int) -> tuple[Mechanism, SiteLedger]:
    """What a site with caps trains with, once all that can be checked without its records has been checked.

    Raises:
        SiteRefusal, LedgerError: the owner does not allow the round, has no budget left for it, or the ledger is unusable.
    """
    method = METHODS[settings.strategy]
    own = (order.schedule, order.filter, order.share) == (*resolved_choices(settings), method.share)
    check_run(caps, settings, is_strategys_own=own)
    request = request_for(caps, settings, run_id, order.server_round, order.schedule, counted_steps=order.counted_steps)
    ledger = ledger_for(caps, request)
    known = ledger.known_noise(sample_rate_for(settings, caps.num_records))
    mechanism = mechanism_for(settings, caps.num_records, known)
    check_mechanism(caps, mechanism)
    ledger.check(mechanism.noise_multiplier, mechanism.sample_rate, settings.train.local_steps)
    return mechanism, ledger


def fingerprint(settings: Settings, node_config: Mapping[str, Any]) -> str:
    """What the ledger knows the site's records by; files that cannot be read are known by their place."""
    if path := str(node_config.get("data-path", "")):
        try:
            return fingerprint_of_files(path)
        except OSError:
            log.exception("the site's records cannot be read for their fingerprint")
            return fingerprint_of_share({"unreadable": path})
    share = {"site": int(node_config["partition-id"]), "sites": int(node_config["num-partitions"])}
    return fingerprint_of_share({**flatten(settings.data), "seed": settings.seed, **share})


def _run_ledger(settings: Settings, history: list[Segment]) -> RunLedger:
    privacy = settings.privacy
    return RunLedger(privacy.epsilon, settings.steps_per_site, privacy.delta, privacy.accountant, history)


def train(content: RecordDict, context: Context) -> RecordDict:
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
    settings = site_settings(context)
    torch.set_num_threads(settings.train.num_threads)
    order = TrainOrder.from_record(content[CONFIG])  # type: ignore[arg-type]
    schedule = parse_schedule(order.schedule)
    caps = caps_from(context.node_config, needed=not in_simulation())
    admitted = None
    if caps:
        admitted = _admitted(caps, settings, order, context.run_id)
        settings = own_settings(caps, settings, context.node_config)
    adapted = own_model(settings, context.node_config, order.model_digest, quiet=caps is not None)
    _start_from(adapted, order, to_tensors(content[ARRAYS]))  # type: ignore[arg-type]
    ledger: RunLedger | SiteLedger
    training = settings.train
    if caps and admitted:
        training = dataclasses.replace(training, max_physical_batch=at_once(caps, settings))
        records = owned_records(settings, context.node_config, adapted.base)
        mechanism, ledger = admitted
        if not 0.5 <= len(records) / caps.num_records <= 2:
            log.warning("node-config: num-records = %d, but there are %d usable records", caps.num_records, len(records))
        ledger.identify(fingerprint(settings, context.node_config))
    else:
        records = load_records(settings, context.node_config, adapted.base)
        if not len(records):
            raise SiteRefusal("data: the site has no usable record")
        mechanism = mechanism_for(settings, len(records))
        history = history_from(context.state[LEDGER]) if LEDGER in context.state else []  # type: ignore[arg-type]
        # a worker that died or a resumed run has lost the virtual site's own count
        history = at_least(history, order.counted_steps, mechanism.noise_multiplier, mechanism.sample_rate)
        ledger = _run_ledger(settings, history)
    source = random_source(settings, int(context.node_config.get("partition-id", 0)), order.server_round)
    try:
        not_finite = train_round(
            adapted.base,
            adapted.model,
            adapted.engine,
            records,
            server_round=order.server_round,
            schedule=schedule,
            filter_name=order.filter,
            train=training,
            mechanism=mechanism,
            ledger=ledger,
            source=source,
            tolerant=caps is not None,
        )
    finally:
        if isinstance(ledger, RunLedger):
            context.state[LEDGER] = ConfigRecord(ledger.state())  # type: ignore[arg-type]
    if not_finite:
        log.warning("round %d: %d record gradients were not finite and counted as zero", order.server_round, not_finite)
    state = adapter_state(adapted.model)
    factors = schedule.trained_in(order.server_round, settings.train.local_steps) if order.share == "trained" else BOTH
    counters = Counters(ledger.steps, ledger.epsilon(), mechanism.noise_multiplier, mechanism.sample_rate, source.seeded)
    return RecordDict({ARRAYS: to_arrays({n: state[n] for n in select(state, factors)}), COUNTERS: counters.to_record()})
