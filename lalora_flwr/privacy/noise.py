"""How much noise a site's steps carry: it follows from the settings and the site's number of records, which is public."""

from __future__ import annotations

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.privacy.accounting import noise_multiplier_for
from lalora_flwr.privacy.events import SampledGaussian, Target
from lalora_flwr.privacy.mechanism import Mechanism
from lalora_flwr.settings import Settings
from lalora_flwr.settings.stages import ridge_stage

AUTO_S = 0.01  # γ of arXiv 2206.07136
LORA_A = "lora_A"  # what is clipped apart


def sample_rate_for(settings: Settings, records: int) -> float:
    """q, each record's probability of joining a step."""
    return min(1.0, settings.train.batch_size / records)


def target_of(settings: Settings) -> Target:
    """What a run's noise is calibrated for."""
    privacy, before = settings.privacy, (head_event(settings),) if settings.ridge_first else ()
    return Target(privacy.epsilon, privacy.delta, settings.steps_per_site, privacy.accountant, before)


def head_event(settings: Settings) -> SampledGaussian:
    """The steps that release a run's ridge head: all of a site's records take part in each."""
    try:
        sigma = noise_for(target_of(ridge_stage(settings)), 1.0)
    except ConfigError:
        raise ConfigError(
            f"privacy.ridge-share = {settings.privacy.ridge_share:g}: no noise level found for a ridge head of this share of "
            f"privacy.epsilon = {settings.privacy.epsilon:g}; choose a larger share"
        ) from None
    return SampledGaussian(sigma, 1.0, settings.ridge_rounds)


def noise_for(target: Target, sample_rate: float) -> float:
    """σ that the target asks for at q.

    Raises:
        ConfigError: if no noise level reaches its ε.
    """
    return noise_multiplier_for(target.epsilon, target.delta, sample_rate, target.alike, target.accountant, target.before)


def mechanism_for(settings: Settings, records: int) -> Mechanism:
    """The constants of a site's steps.

    Guarantee: σ is calibrated for the most steps the site may take in the run, without amplification by the drawing of
    sites: the server sees who takes part.
    """
    sample_rate = sample_rate_for(settings, records)
    sigma = noise_for(target_of(settings), sample_rate)
    stability = AUTO_S if settings.privacy.clipping == "auto-s" else 0.0
    apart = LORA_A if settings.privacy.clipping == "apart" else ""
    return Mechanism(sigma, settings.privacy.clip_norm, sample_rate, sample_rate * records, stability, apart)
