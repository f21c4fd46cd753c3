"""What a run will cost, before any data is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lalora_flwr.adapter.lora import trains_head
from lalora_flwr.adapter.slots import HEAD
from lalora_flwr.data.data_set import facts, private_records
from lalora_flwr.data.partition import equal_share
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.methods.method import method_of
from lalora_flwr.methods.secure_sum import share_for
from lalora_flwr.models import load_base_model
from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.events import SampledGaussian
from lalora_flwr.privacy.mechanism import Mechanism
from lalora_flwr.privacy.noise import head_event, mechanism_for
from lalora_flwr.server.traffic import Traffic, traffic, traffic_by_profile
from lalora_flwr.settings import Settings
from lalora_flwr.settings.stages import ridge_stage
from lalora_flwr.training.rate import noise_at_all, noise_at_one, rate_for
from lalora_flwr.wire.profile import WHOLE


@dataclass(frozen=True)
class Plan:
    """The costs of a run; all of them follow from the settings and the data set's public size.

    Attributes:
        schedule, filter: the resolved choices of the method.
        records: records of the smallest site in an equal split, the site that needs the most noise.
        mechanism: that site's public constants.
        steps: the most noisy steps a site may take in the run.
        trainable, frozen: numbers of parameters.
        head, new_head: whether the classification head is ``trained`` or ``frozen`` (empty if there is none), and whether the
            published weights lack it, as far as that is known without them.
        sharing, colluders: sites that share one noise in a round, and how many of them may side with the server; 0: none.
        keeps: whether something that trains stays at the sites, with the noise of its site alone.
        rate: the learning rate, as named or by rule.
        head_noise: noise multiplier of the round that releases a ridge head, whose sites are all; 0: there is none.
        ridge_steps: the most that a site may take for it; ``steps`` holds them too.
        bytes_down, bytes_up: bytes to and from one site that holds everything, as in `Traffic`.
        traffic: the same of each kind of virtual sites, by their profiles.
    """

    schedule: str
    filter: str
    records: int
    mechanism: Mechanism
    steps: int
    trainable: int
    frozen: int
    head: str
    new_head: bool
    bytes_down: int
    bytes_up: tuple[int, int]
    traffic: tuple[Traffic, ...]
    sharing: int = 0
    colluders: int = 0
    keeps: bool = False
    rate: float = 0.0
    head_noise: float = 0.0
    ridge_steps: int = 0

    @property
    def share(self) -> float:
        """Noise multiplier of a site's own part of a noise that all sites of a round share."""
        return share_for(self.mechanism.noise_multiplier, self.sharing, self.colluders)

    def collusion(self, settings: Settings) -> list[float]:
        """ε of a site after all its steps, if 0, 1, … all other sites of each sum side with the server and add no noise.

        Fewer colluders leave more noise in the sum, and no more in what stays at the site, on which its later gradients depend.
        """
        return [self._epsilon_against(colluders, settings) for colluders in range(self.sharing)]

    def _epsilon_against(self, colluders: int, settings: Settings) -> float:
        left = self.share * math.sqrt(self.sharing - colluders)
        if self.keeps:
            left = min(left, max(self.mechanism.noise_multiplier, self.share))
        events = [SampledGaussian(left, self.mechanism.sample_rate, self.steps - self.ridge_steps)]
        if self.ridge_steps:
            share = share_for(self.head_noise, settings.num_supernodes, self.colluders)
            left = share * math.sqrt(settings.num_supernodes - colluders)
            events.append(SampledGaussian(left, 1.0, self.ridge_steps))
        return epsilon_spent(events, settings.privacy.delta, settings.privacy.accountant)

    def epsilon_after(self, rounds: int, settings: Settings) -> float:
        """Predicted ε of a site after it has served that many rounds, one of them for the ridge head if there is one."""
        for_head = 1 if self.ridge_steps else 0
        steps = min((rounds - for_head) * settings.train.local_steps, self.steps - self.ridge_steps)
        events = [SampledGaussian(self.mechanism.noise_multiplier, self.mechanism.sample_rate, steps)]
        if for_head:
            events.append(SampledGaussian(self.head_noise, 1.0, for_head))
        return epsilon_spent(events, settings.privacy.delta, settings.privacy.accountant)


def make_plan(settings: Settings) -> Plan:
    """Check that the run is possible, and price it.

    Builds the model's architecture without its weights, and reads the data only for what the settings do not declare
    (``data.labels``, ``data.records``).

    Raises:
        ConfigError: if a setting is impossible.
    """
    sites = settings.num_supernodes
    records = equal_share(private_records(settings), sites, sites - 1)
    if settings.ridge_first:
        head_event(settings)  # refuses a share that no noise reaches, by its name
        make_plan(ridge_stage(settings))  # refuses what the first round cannot be
    base = load_base_model(settings.model, facts(settings), settings.data.max_tokens, weights=False)
    base.module.requires_grad_(False)
    method = method_of(settings)
    adapter = method.form_of.attach(base, settings.lora, seed=0)
    PerSampleGradients(adapter.model, adapter.parameters)  # refuses layers without a per-sample rule
    layout = adapter.layout
    method.check_moves(layout, settings)
    whole = traffic(settings, method, layout, WHOLE)
    trainable = sum(math.prod(slot.shape) for slot in layout.only(method.schedule.ever(layout)).values())
    total = sum(p.numel() for p in adapter.model.parameters())
    mechanism, sharing = mechanism_for(settings, records), settings.sites_per_round if settings.shares_noise else 0
    noise = noise_at_all(mechanism, settings.sites_per_round)
    if sharing:
        noise = noise_at_one(mechanism) * share_for(1.0, sharing, settings.colluders) / math.sqrt(sharing)
    return Plan(
        schedule=method.schedule.text,
        filter=method.filter.name,
        records=records,
        mechanism=mechanism,
        steps=settings.steps_per_site,
        trainable=trainable,
        frozen=total - trainable,
        head="" if not base.head else "trained" if trains_head(base, settings.lora) or layout.of(HEAD) else "frozen",
        new_head=base.fresh_head,
        bytes_down=whole.down,
        bytes_up=whole.up,
        traffic=traffic_by_profile(settings, method, layout),
        sharing=sharing,
        rate=rate_for(settings, method, layout, noise),
        colluders=settings.colluders,
        keeps=bool(method.travel.kept(layout)),
        head_noise=head_event(settings).noise_multiplier if settings.ridge_first else 0.0,
        ridge_steps=settings.ridge_rounds,
    )
