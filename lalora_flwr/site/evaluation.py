"""What a site does when asked to evaluate the shared model on its own records. Off unless run and site both allow it."""

from __future__ import annotations

import dataclasses
import logging

import torch
from flwr.app import Context, MetricRecord, RecordDict
from torch import Tensor

from lalora_flwr.data.inputs import to_device
from lalora_flwr.data.records import RecordSet
from lalora_flwr.data.texts import IGNORED
from lalora_flwr.ground.errors import SiteRefusal
from lalora_flwr.ground.processors import processors
from lalora_flwr.ground.seeds import derive_seed
from lalora_flwr.ledger.caps import Caps, check_run
from lalora_flwr.ledger.entries import EVALUATE
from lalora_flwr.methods.method import method_of
from lalora_flwr.models.text import CausalLanguageModel
from lalora_flwr.privacy.randomness import RandomSource
from lalora_flwr.settings import Settings
from lalora_flwr.site.admission import ledger_for, request_for
from lalora_flwr.site.host import Host
from lalora_flwr.site.model import own_model, start_from, tensors_of
from lalora_flwr.site.pins import own_settings
from lalora_flwr.site.records import counted_records
from lalora_flwr.site.round import Site, own_part, own_slots
from lalora_flwr.training.evaluate import evaluate
from lalora_flwr.training.learner import Learner
from lalora_flwr.wire.orders import EvaluateOrder
from lalora_flwr.wire.replies import SITE_METRICS

SHARES = ("accuracy", "exact_match", "within_tenth")  # of right answers: what each kind of label calls it
log = logging.getLogger("lalora_flwr.site")


def evaluate_on_site(host: Host, content: RecordDict, context: Context) -> RecordDict:
    """Accuracy of the server's adapter on the site's private records.

    Guarantee: a site with caps, as every real one, releases one number by the Gaussian mechanism with its owner's
    evaluation-noise (`noisy_accuracy`), after it has passed the owner's caps and is counted in the ledger. A refusal does not
    depend on a record. In a simulation without caps there is none: the reply holds exact accuracy and loss, a leak.

    Raises:
        SiteRefusal: with a fixed reason, if the site will not evaluate.
        LedgerError: if the site's ledger cannot be used.
    """
    site = Site.of(host, context)
    settings, caps = site.served, site.caps
    if not settings.evaluate_sites or (caps and not caps.allow_evaluation):
        raise SiteRefusal("evaluation: not allowed by the site's node-config (allow-evaluation)")
    torch.set_num_threads(min(settings.train.num_threads, processors()))
    order = EvaluateOrder.of(content)
    if not caps:
        learner = _learner(site, settings, order, content)
        quality = evaluate(learner, host.records(settings, context.node_config, learner.base))
        right = next(quality[name] for name in SHARES if name in quality)
        return RecordDict({SITE_METRICS: MetricRecord({"accuracy": right, "loss": quality["loss"]})})
    check_run(caps, settings)
    asked = request_for(caps, settings, context.run_id, order.server_round, EVALUATE, clip_norm=1.0)
    ledger = ledger_for(caps, asked)
    ledger.check(caps.evaluation_noise, 1.0, 1)
    settings = own_settings(caps, settings, context.node_config, simulated=host.simulated)
    learner = _learner(site, settings, order, content)
    own_seed = dataclasses.replace(settings, seed=derive_seed(settings.seed, "evaluation"))  # not the draws of training
    source = site.source(own_seed, order.server_round)
    records, known_by = counted_records(host.records, settings, context.node_config, learner.base)
    ledger.identify(known_by)
    ledger.reserve(caps.evaluation_noise, 1.0, 1)
    right = right_answers(learner, records)
    ledger.take_step()
    accuracy = noisy_accuracy(right, caps, source)
    ledger.commit()
    return RecordDict({SITE_METRICS: MetricRecord({"accuracy": accuracy, "noise-multiplier": caps.evaluation_noise})})


def _learner(site: Site, settings: Settings, order: EvaluateOrder, content: RecordDict) -> Learner:
    """The model to evaluate: with the server's adapter, as far as a site of this profile holds it, and what stays at the site."""
    quiet = site.caps is not None
    learner = own_model(site.host, settings, site.node_config, order.model_digest, quiet=quiet)
    method = method_of(site.settings)
    held = method.travel.held(learner.adapter.layout, site.profile)
    kept = held.only(method.travel.kept(held))
    own = own_part(site, order.model_digest) if kept else None
    stayed = own_slots(site, own, content, order.own, order.server_round, kept)
    start_from(learner, held, tensors_of(content), method.travel.down(method.at_rest(held)), stayed)
    return learner


def right_answers(learner: Learner, records: RecordSet) -> int:
    """How many records the model gets right; for language modelling those with every token of the response, with several
    classes those with all of them and no other, of numbers those within a tenth of the range.

    Guarantee: adding or removing one record changes this by at most 1. Each record goes through the model alone: in a batch
    the rounding of a logit depends on the other records, and a server that sends a model full of near ties would turn one record
    more into many answers changed. A record that the model fails on is not right.
    """
    learner.adapter.model.eval()
    with torch.inference_mode():
        return sum(_is_right(learner, records, torch.tensor([i])) for i in range(len(records)))


def _is_right(learner: Learner, records: RecordSet, one: Tensor) -> bool:
    try:
        inputs, labels = records.batch(one)
        if not len(labels):
            return False
        device = learner.adapter.device
        logits = learner.base.logits(learner.adapter.model, to_device(inputs, device)).cpu()
        if isinstance(learner.base, CausalLanguageModel):
            guesses, labels = logits.argmax(-1)[:, :-1], labels[:, 1:]
            asked = labels != IGNORED
            return bool(asked.any() and (guesses[asked] == labels[asked]).all())
        return bool(learner.base.problem.right(logits, labels).all())
    except Exception:
        log.exception("a record makes the model fail and counts as not right")
        return False


def noisy_accuracy(right: int, caps: Caps, source: RandomSource) -> float:
    """The share of right answers that a site tells.

    Guarantee: the Gaussian mechanism with σ = evaluation-noise on a count of sensitivity 1, q = 1, one step. The noise is drawn
    in float64 and rounded to a whole number, the divisor is the public num-records, and the result is cut to [0, 1]: all of
    it happens after the noise. A whole count plus a rounded draw is the rounded noisy count, so no float is there to tell more.

    Returns:
        A number in [0, 1].
    """
    noise = float(source.normal(torch.Size([1])).double()) * caps.evaluation_noise
    return min(1.0, max(0.0, (right + round(noise)) / caps.num_records))
