"""How much of what sites released is noise, as far as the server can tell from public constants."""

from __future__ import annotations

import math

from lalora_flwr.adapter.slots import Layout
from lalora_flwr.methods.method import Method, unknown_noise
from lalora_flwr.settings import Settings
from lalora_flwr.training.rate import rate_for
from lalora_flwr.wire.public import Public


def noise_by_slot(
    settings: Settings, method: Method, layout: Layout, server_round: int, directive: Public, noise: float, sites: int
) -> dict[str, float] | None:
    """Standard deviation of the noise on an entry of the mean of a round's updates, for each slot that trained.

    Of gradients it is that of the mean gradient, ν. An update of k steps along gradients at the rate η has η ν √k, each step
    being noised anew; where the sites' rates follow from their own noise, all are taken for the one in the middle, as in
    `SiteCounts.noise_of_mean`.

    Guarantee: of public constants and of what sites say of their noise; nothing here is a site's tensor.

    Args:
        settings, method, layout: of the run.
        server_round, directive: of the round.
        noise: ν of the sites that served.
        sites: how many they are.

    Returns:
        None if an update is more than a sum of gradients (`unknown_noise`), or was scaled to a bound, or sites may differ in
        what they train.
    """
    steps = settings.train.local_steps
    if (
        settings.merge.max_update_norm
        or method.travel.takes_profiles
        or (not method.server_steps and unknown_noise(method, settings))
    ):
        return None
    masks = method.schedule.masks(layout, server_round, steps, directive)
    times = {name: sum(name in masks[step % len(masks)] for step in range(steps)) for name in layout}
    if method.server_steps:
        return {name: noise for name, trained in times.items() if trained}
    rate = rate_for(settings, method, layout, noise * math.sqrt(sites / settings.sites_per_round))
    return {name: rate * noise * math.sqrt(trained) for name, trained in times.items() if trained}
