"""Membership inference on finished adapters: of runs made for it, whose members fair coins choose, or of a run that is there."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lalora_flwr import __version__
from lalora_flwr.audit import attacks, bounds
from lalora_flwr.audit.bounds import Scores
from lalora_flwr.audit.membership_record import Attacked, MembershipRecord
from lalora_flwr.audit.planted import GRADIENT, KINDS, REAL, pool_of
from lalora_flwr.audit.shadows import Runs, Told, all_runs, confidences
from lalora_flwr.diagnose.opened import differs, opened
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.seeds import derive_seed
from lalora_flwr.settings import Settings
from lalora_flwr.training.evaluate import evaluate

RUNS = 18  # that are trained
FEWEST = 3
CONFIDENCE = 0.95


class Found(NamedTuple):
    """Scores of an attack on one kind of records."""

    records: str
    attack: str
    inside: Scores
    outside: Scores


def attack_settings(settings: Settings, runs: int = RUNS, workers: int = 0, told: Told = lambda done: None) -> MembershipRecord:
    """Attack the adapters of runs that are made for it, over real records and canaries, each inside by a fair coin.

    The last third of the runs is attacked with the help of the others. For given others, the attacked runs together keep (ε, δ)
    for each of their coins, so that Steinke's bound on all guesses at once holds whatever their records do to each other.

    Args:
        settings: of the runs.
        runs: that are trained, at least 3.
        workers: processes; 0: as many as the processors carry.
        told: hears how many runs are done.

    Raises:
        ConfigError: the records are not here, or are too few, or the settings cannot be used.
        RunFailed: a run stopped.
    """
    begun = time.monotonic()
    _check(runs)
    shadows = runs - runs // 3
    made = all_runs(settings, runs, canaries=True, workers=workers, told=told)
    found = [one for one in _by_kind(made, shadows) if len(one.inside) and len(one.outside)]
    if not found:
        raise ConfigError("data: too few records for an attack on membership")
    return _record(settings, found, runs - shadows, shadows, begun)


def attack_run(path: Path, runs: int = RUNS, workers: int = 0, told: Told = lambda done: None) -> MembershipRecord:
    """Attack the adapter of a finished run of virtual sites: its records against its test records, by the loss and offline LiRA.

    Args:
        path: the run's folder.
        runs, workers, told: as `attack_settings` has them; all runs are shadows.

    Raises:
        ConfigError: it is no run's folder, the records are not here, or are not the run's.
        RunFailed: the run is not finished, or a shadow run stopped.
    """
    begun = time.monotonic()
    _check(runs)
    run = opened(path)
    settings = run.settings
    learner, test = run.model()
    if changed := differs(run.summary, evaluate(learner, test)):
        raise ConfigError(f"{path}: {changed}")
    pool = pool_of(settings, learner, plant=False)
    own = np.concatenate([confidences(learner, site) for site in pool.sites])
    others = confidences(learner, test)
    learner.adapter.load(learner.initial)
    before = attacks.auc(np.concatenate([confidences(learner, site) for site in pool.sites]), confidences(learner, test))
    made = all_runs(settings, runs, canaries=False, workers=workers, told=told)
    members = len(own)
    random = np.random.default_rng(derive_seed(settings.seed, "coins of test records"))
    outside = np.concatenate([~made.inside, random.random((runs, len(others))) < 0.5], axis=1)  # as many runs for both
    scores = attacks.offline(np.concatenate([own, others]), made.confidences, outside)
    found = [
        Found(KINDS[REAL], "loss", own, others),
        Found(KINDS[REAL], "lira offline", scores[:members], scores[members:]),
    ]
    return _record(settings, found, 1, runs, begun, before)


def _check(runs: int) -> None:
    if runs < FEWEST:
        raise ConfigError(f"--runs {runs}: must be {FEWEST} or more")


def _by_kind(made: Runs, shadows: int) -> Iterator[Found]:
    """The scores of each attack on each kind of records, over all attacked runs."""
    inside, under = made.inside[:shadows], made.confidences[:shadows]
    for kind, name in enumerate(KINDS):
        own = made.kinds == kind
        if not own.any():
            continue
        truth = made.inside[shadows:, own]
        attacked = made.confidences[shadows:, own]
        tried = {
            "movement" if kind == GRADIENT else "loss": attacked,
            "lira": np.stack([attacks.online(one, under[:, own], inside[:, own]) for one in attacked]),
            "lira offline": np.stack([attacks.offline(one, under[:, own], ~inside[:, own]) for one in attacked]),
        }
        for attack, scores in tried.items():
            yield Found(name, attack, scores[truth], scores[~truth])


def _result(found: Found, delta: float, confidence: float, *, coins: bool) -> Attacked:
    rates = attacks.rates(found.inside, found.outside, attacks.FEW, 1 - CONFIDENCE)
    return Attacked(
        records=found.records,
        attack=found.attack,
        members=len(found.inside),
        non_members=len(found.outside),
        auc=attacks.auc(found.inside, found.outside),
        alarms=rates.alarms,
        tpr=rates.tpr,
        tpr_lower=rates.tpr_lower,
        fpr_upper=rates.fpr_upper,
        epsilon_if_independent=attacks.implied_epsilon(found.inside, found.outside, delta, confidence),
        epsilon_one_run=bounds.one_run(found.inside, found.outside, delta, confidence) if coins else None,
    )


def _record(
    settings: Settings, found: list[Found], attacked: int, shadows: int, begun: float, before: float | None = None
) -> MembershipRecord:
    confidence = 1 - (1 - CONFIDENCE) / len(found)  # all together at 95 %
    results = [_result(one, settings.privacy.delta, confidence, coins=before is None) for one in found]
    return MembershipRecord(
        version=__version__,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        strategy=settings.strategy,
        trust=settings.trust,
        epsilon=settings.privacy.epsilon,
        delta=settings.privacy.delta,
        own_run=before is not None,
        attacked_runs=attacked,
        shadow_runs=shadows,
        auc_before=before,
        attacks=results,
        seconds=round(time.monotonic() - begun, 1),
    )
