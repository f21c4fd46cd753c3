"""The server's own count of what each site released; what a site says of itself is checked against it, never copied.

The server knows how many local steps it asked for, how often it asked, and the run's target. Of a site's counters only σ
and q are news: q must be the batch size over a whole number of records, and σ the noise that the run's target asks for at
that q. So a site cannot name an ε: it follows from the rounds it was asked for, at noise that the run prescribes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.events import SampledGaussian
from lalora_flwr.privacy.noise import noise_for, target_of
from lalora_flwr.server.metrics import SiteReport
from lalora_flwr.server.site_count import Asked, SiteCount, asked_of
from lalora_flwr.server.spent import Spent
from lalora_flwr.settings import Settings
from lalora_flwr.settings.stages import EVERY_RECORD, ridge_stage
from lalora_flwr.wire.replies import MOST_RECORDS, Counters, SiteMetrics
from lalora_flwr.wire.tensors import BadReply

SIGMA_RANGE = (0.99, 1.02)  # of the σ that the run prescribes; calibration hits ε to 1 % from below, so σ from above
LEAST_EVALUATION_NOISE = 0.3  # σ below which an accuracy counts as exact

MOST_KNOWN = 100_000  # ε of sites' steps that are kept


@dataclass
class SiteCounts:
    """Counts of all sites of a run, by the site's number.

    Guarantee: `epsilon_of` is an upper bound for every site that keeps to the run's constants: it composes all steps the
    server asked it for, at the noise with which it said to take them. For a site that lies about its noise no number that
    the server could name is a bound; what it says of training moves the run's ε to the target at most, give or take the
    range of σ.
    """

    settings: Settings
    real: bool = False  # whether the sites are real ones, whose noise no seed decides
    exact_accuracy: bool = False  # whether a site sent an accuracy with no noise, or next to none
    sites: dict[int, SiteCount] = field(default_factory=dict)
    before: SiteCounts | None = None  # of the stage of the run before this one
    _known: dict[tuple[SampledGaussian, ...], float] = field(default_factory=dict, repr=False, compare=False)
    _spent_by: Spent = field(default_factory=Spent, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._spent_by.touch(self.sites)

    @staticmethod
    def of_run(settings: Settings, *, real: bool) -> SiteCounts:
        """Of a whole run, with a stage before if it starts with a ridge head."""
        before = SiteCounts(ridge_stage(settings), real) if settings.ridge_first else None
        return SiteCounts(settings, real, before=before)

    def of(self, site: int) -> SiteCount:
        """A site's count, which the caller may change."""
        self._spent_by.touch([site])
        return self._known_of(site)

    def _known_of(self, site: int) -> SiteCount:
        """The same, only to be looked at."""
        return self.sites.get(site) or self.sites.setdefault(site, SiteCount())

    def steps_of(self, site: int) -> int:
        """Steps the site may have taken, in this stage of the run and before."""
        return self.steps_before(site) + self._own_steps(self._known_of(site))

    def _own_steps(self, count: SiteCount) -> int:
        return count.rounds * self.settings.train.local_steps - count.spared

    def _settings_of(self, count: SiteCount) -> Settings:
        """The run's settings with the site's own local steps, for which its noise is calibrated."""
        train = self.settings.train
        if count.local_steps in (0, train.local_steps):
            return self.settings
        return replace(self.settings, train=replace(train, local_steps=count.local_steps))

    def steps_before(self, site: int) -> int:
        """Those of the stage before."""
        return self.before.steps_of(site) if self.before else 0

    def check(self, site: int, claimed: Counters) -> None:
        """Take a site's counters if they can be true; marks it as heard of in any case.

        Raises:
            BadReply: naming the counter that contradicts what the server knows.
        """
        count, privacy = self.of(site), self.settings.privacy
        count.heard = True
        if claimed.seeded == self.real:
            raise BadReply("its noise is seeded" if claimed.seeded else "its noise is not seeded as a simulation's is")
        own = self._settings_of(count)
        if not self.steps_of(site) <= claimed.steps <= own.steps_per_site:
            raise BadReply(
                f"it counts {claimed.steps} steps, not between the {self.steps_of(site)} it was asked for and the "
                f"{own.steps_per_site} its noise is calibrated for"
            )
        self._check_sample_rate(count, claimed.sample_rate)
        self._check_noise(claimed, own)
        if self.settings.private and not claimed.epsilon <= privacy.epsilon * (1 + 1e-9):
            raise BadReply(f"its epsilon is {claimed.epsilon:.4g}, above the run's {privacy.epsilon:g}")
        count.sample_rate = claimed.sample_rate
        count.noise_multiplier = min(claimed.noise_multiplier, count.noise_multiplier or math.inf)
        count.claimed_steps, count.claimed_epsilon = claimed.steps, claimed.epsilon

    def _check_sample_rate(self, count: SiteCount, q: float) -> None:
        batch = self.settings.train.batch_size
        records = round(batch / q) if q > batch / MOST_RECORDS else 0
        if q != 1.0 and (not records or q != min(1.0, batch / records)):  # 1: of a site with no more records than that
            raise BadReply(f"its sample rate {q:.6g} is no batch of {batch} over a number of records")
        if count.sample_rate not in (None, q):
            raise BadReply(f"its sample rate changed from {count.sample_rate:.6g} to {q:.6g}")

    def _check_noise(self, claimed: Counters, own: Settings) -> None:
        try:
            wanted = noise_for(target_of(own), claimed.sample_rate)
        except ConfigError:
            raise BadReply(f"no noise reaches the run's epsilon at its sample rate {claimed.sample_rate:.6g}") from None
        low, high = SIGMA_RANGE
        if not low * wanted <= claimed.noise_multiplier <= high * wanted:
            raise BadReply(f"its noise multiplier is {claimed.noise_multiplier:.6g}, the run's target asks for {wanted:.6g}")

    def check_evaluation(self, site: int, metrics: SiteMetrics) -> None:
        """Take the noise of a site's accuracy into its count.

        Raises:
            BadReply: if its own noise says next to nothing; the accuracy then counts as exact.
        """
        noise, count = metrics.noise_multiplier, self.of(site)
        if noise is None or noise < LEAST_EVALUATION_NOISE:
            self.exact_accuracy = True
            if noise is not None:
                raise BadReply(f"the noise of its accuracy is {noise:.4g}, below {LEAST_EVALUATION_NOISE}")
            return
        count.evaluation_noise = min(noise, count.evaluation_noise or math.inf)

    def epsilon_of(self, site: int) -> float:
        """ε at the run's δ of all that the site may have released in the run; 0 for one that never sent tensors.

        The run's target stands for the training of a site whose counters were never accepted.
        """
        evaluations, training = tuple(self._evaluations(self._known_of(site))), self._training(site)
        if training is None:
            return self.settings.privacy.epsilon + self._spent(evaluations)
        return self._spent((*training, *evaluations)) if training else 0.0

    def _spent(self, steps: tuple[SampledGaussian, ...]) -> float:
        """ε of steps; each round asks for that of all sites heard of, of which it moved few."""
        if steps not in self._known:
            if len(self._known) > MOST_KNOWN:
                self._known.clear()
            self._known[steps] = epsilon_spent(steps, self.settings.privacy.delta, self.settings.privacy.accountant)
        return self._known[steps]

    def _heard(self, site: int) -> bool:
        """Whether it ever sent tensors, in this stage or before."""
        return self._known_of(site).heard or (self.before is not None and self.before._heard(site))

    def _training(self, site: int) -> list[SampledGaussian] | None:
        """The training steps of a site that was heard of, of all stages; None if its noise in one of them is not known."""
        return self._steps(site) if self._heard(site) else []

    def _steps(self, site: int) -> list[SampledGaussian] | None:
        count, steps = self._known_of(site), self.before._steps(site) if self.before else []
        if steps is None or not count.rounds:
            return steps
        taken, sigma, q = self._own_steps(count), count.noise_multiplier, count.sample_rate
        if (sigma is None or q is None) and self.settings.train.batch_size == EVERY_RECORD:  # every honest site has the same
            sigma, q = noise_for(target_of(self.settings), 1.0), 1.0
        if sigma is None or q is None:
            return None
        return [*steps, SampledGaussian(sigma, q, taken)]

    def _evaluations(self, count: SiteCount) -> list[SampledGaussian]:
        return [] if count.evaluation_noise is None else [SampledGaussian(count.evaluation_noise, 1.0, count.evaluations)]

    def steps_as_told(self, site: int) -> list[SampledGaussian] | None:
        """All that `epsilon_of` composes; None if the noise of its training is not known."""
        training = self._training(site)
        return None if training is None else [*training, *self._evaluations(self._known_of(site))] if training else []

    def steps_alone_as_told(self, site: int) -> list[SampledGaussian]:
        """All that `epsilon_alone_of` composes."""
        training = self._training_alone(site)
        return [*training, *self._evaluations(self.of(site))] if training else []

    def epsilon_alone_of(self, site: int) -> float:
        """As `epsilon_of`, if all other sites of the secure sums side with the server: by the site's own share of the noise.

        A site whose counters were never accepted is taken to have no amplification by sampling.
        """
        privacy, training = self.settings.privacy, self._training_alone(site)
        if not training:
            return 0.0
        return epsilon_spent([*training, *self._evaluations(self._known_of(site))], privacy.delta, privacy.accountant)

    def _training_alone(self, site: int) -> list[SampledGaussian]:
        return self._steps_alone(site) if self._heard(site) else []

    def _steps_alone(self, site: int) -> list[SampledGaussian]:
        count, before = self._known_of(site), self.before._steps_alone(site) if self.before else []
        q = count.sample_rate or 1.0
        return [*before, *(SampledGaussian(float(share), q, rounds) for share, rounds in sorted(count.shares.items()))]

    def epsilon_alone(self) -> float | None:
        """The largest `epsilon_alone_of` over the sites; None where each has all of its noise for itself."""
        if not self.settings.shares_noise:
            return None
        return self._largest()[1]

    def _largest(self) -> tuple[float, float]:
        return self._spent_by.largest(self._both, self.before._spent_by if self.before else None)

    def _both(self, site: int) -> tuple[float, float]:
        return self.epsilon_of(site), self.epsilon_alone_of(site) if self.settings.shares_noise else 0.0

    def noise_of_mean(self, sites: Collection[int]) -> float:
        """Standard deviation of the noise on an entry of the mean gradient of sites that each add their own.

        All are taken for the one in the middle, so that no single site decides by what it says of itself, and each for one of a
        whole batch.
        """
        privacy, batch = self.settings.privacy, self.settings.train.batch_size
        middle = statistics.median([self._known_of(site).noise_multiplier or 0.0 for site in sites])
        return middle * privacy.clip_norm / batch / math.sqrt(len(sites))

    def heard(self) -> list[int]:
        """Sites that ever sent tensors, in order of their numbers."""
        own = {site for site, count in self.sites.items() if count.heard}
        return sorted(own | set(self.before.heard() if self.before else ()))

    def most(self) -> int:
        """The site that the run's ε belongs to, of those heard of, of which there must be one."""
        return max(self.heard(), key=lambda site: (self.epsilon_of(site), -site))

    def epsilon(self) -> float:
        """The run's ε: the largest over the sites; 0 before any was heard of."""
        return self._largest()[0]

    def report(self) -> dict[str, SiteReport]:
        """For the summary: the server's count of each site that was heard of, with the site's own beside it."""
        return {str(site): self._report_of(site) for site in self.heard()}

    def _report_of(self, site: int) -> SiteReport:
        count = self._known_of(site)
        return SiteReport(
            steps=self.steps_of(site),
            epsilon=self.epsilon_of(site),
            noise_multiplier=count.noise_multiplier,
            sample_rate=count.sample_rate,
            seeded=not self.real,
            claimed_steps=count.claimed_steps,
            claimed_epsilon=count.claimed_epsilon,
            evaluations=count.evaluations if count.evaluation_noise else None,
            evaluation_noise=count.evaluation_noise,
            epsilon_alone=self.epsilon_alone_of(site) if self.settings.shares_noise else None,
        )

    def asked(self) -> Asked:
        """How often each site was asked, as plain JSON: to be kept before it is asked again."""
        before = self.before.asked() if self.before else {}
        own = {str(site): count for site, count in self.sites.items()}
        return {site: asked_of(own.get(site, SiteCount()), before.get(site)) for site in sorted({*own, *before}, key=int)}

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as plain JSON."""
        sites = {str(site): {**vars(count), "shares": dict(count.shares)} for site, count in self.sites.items()}
        before = {"before": self.before.state()} if self.before else {}
        return {"sites": sites, "exact_accuracy": self.exact_accuracy, **before}

    def restore(self, state: Mapping[str, Any], asked: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from a `state`, and from what `asked` held last: a round that was asked for and lost was served all the same."""
        self.sites = {int(site): SiteCount(**count) for site, count in state.get("sites", {}).items()}
        self.exact_accuracy, self._spent_by = bool(state.get("exact_accuracy", False)), Spent()
        self._spent_by.touch(self.sites)
        if self.before:
            self.before.restore(state.get("before", {}), {site: times.get("before", {}) for site, times in asked.items()})
        for site, times in asked.items():
            count = self.of(int(site))
            if times.get("rounds", 0) > count.rounds:
                count.rounds, count.spared = times["rounds"], times.get("spared", 0)
            count.evaluations = max(count.evaluations, times.get("evaluations", 0))
            for share, rounds in times.get("shares", {}).items():
                count.shares[share] = max(count.shares.get(share, 0), rounds)
