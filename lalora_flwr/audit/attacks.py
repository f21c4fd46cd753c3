"""Membership inference as statistics: scores of those inside and outside come in, what they give away comes out.

The attacks are Yeom's (arXiv 1709.01604), a threshold on the loss, and LiRA (arXiv 2112.03570): a record's confidence under the
attacked model against Gaussians of its own confidence under shadow models, some of which were trained with it. With fewer than 64
shadow models that paper takes one variance for all records, and so does this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from lalora_flwr.audit.bounds import Scores

Coins = NDArray[np.bool_]
FEW = 0.001  # the share of false positives at which true ones are counted
SHARES = (0.0, 0.01, 0.1)  # of false positives, at which ε is looked for


def online(attacked: Scores, shadows: Scores, inside: Coins) -> Scores:
    """LiRA's likelihood ratio of each record, (n,): how much more its confidence looks like that of shadow runs with it.

    Args:
        attacked: confidences under the attacked model, (n,).
        shadows: under each shadow model, (runs, n).
        inside: whether the record was in the shadow run, (runs, n).
    """
    scores = np.zeros_like(attacked)
    for sign, among in ((1, inside), (-1, ~inside)):
        mean, deviation = _gaussians(shadows, among)
        scores += sign * (-0.5 * ((attacked - mean) / deviation) ** 2 - math.log(deviation))
    return scores


def offline(attacked: Scores, shadows: Scores, outside: Coins) -> Scores:
    """LiRA without shadow runs with the record, (n,): deviations by which its confidence is above those of runs without it.

    Args:
        attacked, shadows: as `online` has them.
        outside: the shadow runs that count for each record, none of which had it, (runs, n).
    """
    mean, deviation = _gaussians(shadows, outside)
    found: Scores = (attacked - mean) / deviation
    return found


def _gaussians(shadows: Scores, among: Coins) -> tuple[Scores, float]:
    """Each record's mean over some of the runs, and the deviation from it over all records.

    A record that was in none of them has the mean of all.
    """
    counts = among.sum(0)
    total = max(1, int(counts.sum()))
    overall = float(shadows[among].mean()) if counts.any() else 0.0
    means = np.where(counts > 0, np.where(among, shadows, 0.0).sum(0) / np.maximum(counts, 1), overall)
    squares = float((np.where(among, shadows - means, 0.0) ** 2).sum())
    degrees = max(1, total - int((counts > 0).sum()))  # each mean took one
    return means, max(math.sqrt(squares / degrees), 1e-9)


def auc(inside: Scores, outside: Scores) -> float:
    """How often a random member scores above a random non-member; half for a tie."""
    from sklearn.metrics import roc_auc_score

    truth = np.concatenate([np.ones(len(inside)), np.zeros(len(outside))])
    return float(roc_auc_score(truth, np.concatenate([inside, outside])))


@dataclass(frozen=True)
class Rates:
    """True positives at a threshold that a few non-members exceed, with limits by Clopper and Pearson.

    Attributes:
        alarms: non-members above the threshold.
        tpr: share of the members above it.
        tpr_lower: of all members there could be, at least this share.
        fpr_upper: of all non-members there could be, at most this share.
    """

    alarms: int
    tpr: float
    tpr_lower: float
    fpr_upper: float


def rates(inside: Scores, outside: Scores, share: float, alpha: float) -> Rates:
    """The rates at the highest score of non-members that at most ``share`` of them exceed.

    The threshold is an order statistic of the non-members, and the limit of the false positives holds for it all the same: it is
    the quantile of a beta distribution that such a statistic has.

    Args:
        inside, outside: scores of members and non-members, each independent of the others.
        share: of the non-members.
        alpha: each limit fails as often.
    """
    alarms = math.floor(share * len(outside) + 1e-9)
    cut = np.sort(outside)[len(outside) - 1 - alarms]
    hits = int((inside > cut).sum())
    lower = float(beta.ppf(alpha, hits, len(inside) - hits + 1)) if hits else 0.0
    upper = float(beta.ppf(1 - alpha, alarms + 1, len(outside) - alarms)) if alarms < len(outside) else 1.0
    return Rates(alarms, hits / len(inside), lower, upper)


def implied_epsilon(inside: Scores, outside: Scores, delta: float, confidence: float = 0.95) -> float:
    """A lower limit of ε at δ, if the records are independent of each other and members differ from non-members in that alone.

    Under (ε, δ) true positives are at most e^ε times the false ones and δ more (arXiv 2101.04535). Thresholds are looked at that
    `SHARES` of the non-members exceed, and of the members fall short of; all limits hold together at the ``confidence``.
    """
    alpha = (1 - confidence) / (4 * len(SHARES))
    found = 0.0
    for one, other in ((inside, outside), (-outside, -inside)):
        for share in SHARES:
            at = rates(one, other, share, alpha)
            if at.tpr_lower > delta:
                found = max(found, math.log((at.tpr_lower - delta) / at.fpr_upper))
    return found
