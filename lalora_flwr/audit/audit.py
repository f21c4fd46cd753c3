"""One audit: the run's own server and sites, in this process, over records made for it."""

from __future__ import annotations

import dataclasses
import datetime
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lalora_flwr import __version__
from lalora_flwr.audit import bounds
from lalora_flwr.audit.canaries import CanaryLearners
from lalora_flwr.audit.contracts import checks
from lalora_flwr.audit.observer import Observer, ReplayedSum, Step, Watched
from lalora_flwr.audit.record import AuditRecord
from lalora_flwr.audit.replay import Replaying, Serve, Work
from lalora_flwr.data.data_set import data_set
from lalora_flwr.data.partition import site_rows
from lalora_flwr.engines.inline import InlineGrid, logs_in
from lalora_flwr.ground.errors import ConfigError, RunFailed
from lalora_flwr.methods.method import method_of
from lalora_flwr.privacy.events import SampledGaussian
from lalora_flwr.privacy.mechanism import PrivateSum
from lalora_flwr.privacy.randomness import RandomSource, SystemRandom
from lalora_flwr.server.folder import LOG
from lalora_flwr.server.run import run_federation
from lalora_flwr.settings import Settings, flatten
from lalora_flwr.site.app import make_client_app
from lalora_flwr.site.host import Host
from lalora_flwr.site.round import train
from lalora_flwr.training.learner import ModelStore
from lalora_flwr.training.local import MakeSum

REPLAYED = 8  # messages that are served twice
FEWEST_ENTRIES = 16  # of a step's tensors
FEWEST = 8  # canaries of each kind


class _AsOfAVirtualSite(SystemRandom):
    """A real site's draws, under the word with which a simulation's server takes them. What it writes is thrown away."""

    seeded = True


def _app(host: Host) -> Serve:
    app = make_client_app(lambda: host)
    return lambda message, context: app(message, context)


@dataclass(frozen=True)
class Parts:
    """The parts of a site that an audit is of; others than the package's own show what an audit notices.

    Attributes:
        make_sum: what clips, adds and noises.
        draws: makes the random source of each message.
        app: serves a host's messages.
    """

    make_sum: MakeSum = PrivateSum
    draws: Callable[[], RandomSource] = _AsOfAVirtualSite
    app: Callable[[Host], Serve] = _app


def audit(
    settings: Settings,
    parts: Parts = Parts(),
    random: np.random.Generator | None = None,
    models: ModelStore | None = None,
    sizes: Mapping[int, int] | None = None,
) -> AuditRecord:
    """Run the federation once over canaries and say whether what its sites let out keeps the claimed ε.

    All code of a virtual site is the run's own, and so are the server, the sampler, the clip, the noise and the merge; handed in
    are the records, their gradients (a canary's is a direction of its own), a watch on what each step lets out, and the
    operating system's random numbers, which a real site draws, in place of the run's seed.

    Args:
        settings: of the run that is audited.
        parts: what is audited.
        random: of the coins and of simulated curves; default: from the operating system.
        models: where the frozen model comes from; default: a store of its own.
        sizes: records of each site; default: as the run's data are split.

    Raises:
        ConfigError: there is nothing to audit, or the settings cannot be used.
        RunFailed: the run stopped.
    """
    begun = time.monotonic()
    if not settings.private:
        raise ConfigError("privacy.epsilon = inf: the run claims nothing that an audit could test")
    random = random or np.random.default_rng()
    models = models or ModelStore()
    shares = method_of(settings).transport.hides_updates
    sizes, entries = sizes or _sizes(settings), _fewest_entries(settings, models)
    views, ahead = settings.train.augmentations, method_of(settings).filter.ahead_share > 0
    observer = Observer(random, entries, sizes, only_first=shares, make_sum=parts.make_sum, views=views, ahead=ahead)
    fault, stopped = _run(settings, models, observer, parts)
    for site in observer.sites.values():  # a site that failed in the middle of a step let nothing out
        site.steps = [step for step in site.steps if step.released]
    groups, tests = _tests(settings, observer, shares, random)
    delta = settings.privacy.delta
    plain = tests[0]
    if min(len(plain.inside), len(plain.outside)) < FEWEST:
        few = f"{len(plain.inside)} canaries inside and {len(plain.outside)} outside"
        raise ConfigError(f"{few} are too few for an audit: the sites have too few records, or too little trains")
    pair = bounds.gaussian_pair(plain.inside, plain.outside, delta)
    bound = bounds.clopper_pearson(tests, groups, delta, random)
    found = {
        check.name: check.fault
        for check in checks(list(observer.sites.values()), parts.make_sum, by_replay=fault, stopped=stopped)
    }
    return AuditRecord(
        version=__version__,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        strategy=settings.strategy,
        trust=settings.trust,
        epsilon=settings.privacy.epsilon,
        delta=delta,
        steps=max(len(site.steps) for site in observer.sites.values()),
        sites=len(sizes),
        canaries=len(plain.inside) + len(plain.outside),
        clopper_pearson=bound,
        gaussian_pair=pair.estimate,
        gaussian_pair_lower=pair.lower,
        one_run=bounds.one_run(plain.inside, plain.outside, delta),
        contracts=found,
        survived=bound <= settings.privacy.epsilon and not any(found.values()),
        seconds=round(time.monotonic() - begun, 1),
    )


def _sizes(settings: Settings) -> dict[int, int]:
    """Records of each virtual site."""
    data = data_set(settings)
    rows = site_rows(data.classes(), settings.data, settings.seed, settings.num_supernodes, data.owners())
    return {site: len(own) for site, own in enumerate(rows)}


def _fewest_entries(settings: Settings, models: ModelStore) -> int:
    """Of the tensors that train at a step of the first rounds."""
    method = method_of(settings)
    layout = models.learner(settings).adapter.layout
    entries = {name: math.prod(slot.shape) for name, slot in layout.items()}
    parts = [layout.of(part) & layout.trainable for part in layout.parts]
    sizes = [sum(entries[name] for name in part) for part in parts if part]  # of steps that a directive decides about
    return max(FEWEST_ENTRIES, min(sizes)) if method.form == "lora" else max(FEWEST_ENTRIES, sum(sizes))


def _run(settings: Settings, models: ModelStore, observer: Observer, parts: Parts) -> tuple[str, str]:
    """The whole federation over the observer's records. Returns what is wrong with replies, and why the run stopped early."""

    def entropy(seed: int, site: int, server_round: int, attempt: int) -> RandomSource:
        return parts.draws()

    learners = CanaryLearners(models, observer.count, observer.drawn, settings.privacy.clip_norm)
    host = Host(simulated=True, learners=learners, records=observer.records, seeded=entropy, make_sum=observer.make_sum)

    def again(site: Watched, first: int) -> Work:
        left = iter(site.steps[first:])
        empty = dataclasses.replace(site.canaries, inside=np.zeros_like(site.canaries.inside)).as_records()
        quiet = CanaryLearners(models, lambda: site.canaries.count, lambda labels: None, settings.privacy.clip_norm)
        replay = Host(
            simulated=True,
            learners=quiet,
            records=lambda *about: empty,
            seeded=entropy,
            make_sum=lambda *about: ReplayedSum(next(left)),
        )
        return partial(train, replay)

    stopped = ""
    app: Any = Replaying(parts.app(host), again, observer, REPLAYED)  # the grid only calls it
    with tempfile.TemporaryDirectory() as folder, logs_in(Path(folder) / "audit" / LOG):
        own = dataclasses.replace(settings, output_dir=str(Path(folder)), run_name="audit", resume=False)
        own = dataclasses.replace(own, track="", metrics_file="", evaluate_every=settings.num_rounds, evaluate_sites=False)
        grid = InlineGrid(app, own.num_supernodes, dict(flatten(own)))
        try:
            sizes = [site.canaries.records for site in observer.sites.values()]
            run_federation(own, grid, models=models, records=sizes)
        except RunFailed as reason:  # a site whose steps were watched did what the server refuses
            if not any(step.released for site in observer.sites.values() for step in site.steps):
                raise
            stopped = str(reason)
    return str(app.fault) if app.compared else "no reply was compared", stopped


def _tests(
    settings: Settings, observer: Observer, shares: bool, random: np.random.Generator
) -> tuple[list[bounds.Group], list[bounds.Separation]]:
    """The scores of all canaries, under each suspected noise, and what they went through."""
    releases = [_summed(settings, observer)] if shares else [(site, site.steps) for site in observer.sites.values() if site.steps]
    groups = [
        bounds.Group(tuple(SampledGaussian(step.noise, step.mechanism.sample_rate, 1) for step in steps), site.canaries.count)
        for site, steps in releases
    ]
    tests = []
    for noise in bounds.SUSPECTED:
        inside, outside = [], []
        for site, steps in releases:
            scores = np.zeros(site.canaries.count)
            for step in steps:
                scores += bounds.log_likelihood_ratio(step.projections, noise * step.noise, step.mechanism.sample_rate)
            inside.append(scores[site.canaries.inside])
            outside.append(scores[~site.canaries.inside])
        tests.append(bounds.Separation(np.concatenate(inside), np.concatenate(outside), bounds.cuts_of(groups, noise, random)))
    return groups, tests


def _summed(settings: Settings, observer: Observer) -> tuple[Watched, Sequence[Step]]:
    """The first site, and what the sum of all sites' releases says, without the noise of those that collude."""
    first, *others = observer.sites.values()
    honest = others[: len(others) - settings.colluders]
    steps = []
    for number, step in enumerate(first.steps):
        together = [step, *(other.steps[number] for other in honest if number < len(other.steps))]
        noise = math.sqrt(sum(one.noise**2 for one in together))
        projections = np.sum([one.projections for one in together], axis=0)
        steps.append(dataclasses.replace(step, noise=noise, projections=projections))
    return first, steps
