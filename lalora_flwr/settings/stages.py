"""The stages of a run: with ``lora.head = "ridge"`` the first round is a run of its own, of another method."""

from __future__ import annotations

import dataclasses

from lalora_flwr.settings.schema import FilterSettings, Settings

EVERY_RECORD = 10**9  # as a batch size: each of a site's records joins the step


def stage_of(settings: Settings, server_round: int) -> Settings:
    """What a round of a run is served with; ``server_round`` counts from 1."""
    return ridge_stage(settings) if settings.ridge_first and server_round == 1 else settings


def ridge_stage(settings: Settings) -> Settings:
    """The first round of a run that starts with a ridge head: ``strategy = "ridge-head"``, all sites and all of their records.

    Its ε is ``privacy.ridge-share`` of the run's, and the run's own noise is calibrated for what that leaves.
    """
    share, all_sites = settings.privacy.ridge_share, 1.0
    return dataclasses.replace(
        settings,
        strategy="ridge-head",
        num_rounds=1,
        fraction_train=all_sites,
        evaluate_every=1,
        evaluate_sites=False,
        lora=dataclasses.replace(settings.lora, head="auto", schedule="auto", form="auto", size=0),
        train=dataclasses.replace(
            settings.train,
            local_steps=1,
            batch_size=EVERY_RECORD,
            augmentations=1,
            flips=False,
            optimizer="sgd",
            lr=0.0,
            momentum=0.0,
            weight_decay=0.0,
            step_at="auto",
            decay="none",
        ),
        privacy=dataclasses.replace(
            settings.privacy, epsilon=share * settings.privacy.epsilon, clipping="norm", max_rounds=settings.ridge_rounds
        ),
        filter=FilterSettings(),
        merge=dataclasses.replace(settings.merge, average="last", travel="auto"),
    )
