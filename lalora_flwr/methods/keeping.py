"""What a method whose travel leaves slots at the sites cannot be combined with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lalora_flwr.adapter.slots import HEAD, Layout
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.schedules import MOST_LOOKED_AT

if TYPE_CHECKING:
    from lalora_flwr.methods.method import Method
    from lalora_flwr.settings import Settings


def check_keeps(method: Method, settings: Settings) -> None:
    """Refuse settings that need at the server what stays at the sites, before a model is loaded.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    keeps, parts, name = method.travel.keeps, method.form_of.parts, method.merge.name
    if not keeps:
        return
    stays = " and ".join(sorted(keeps - {HEAD}))
    if wanted := sorted(method.merge.needs_parts & keeps):
        raise ConfigError(f"merge.name = {name!r}: combines {wanted[0]}, which stays at the sites; take mean")
    if method.average:
        raise ConfigError(f"merge.average = 'ema': {stays} stays at the sites, so there is no adapter to average; take last")
    if settings.ridge_first and HEAD in keeps:
        raise ConfigError("lora.head = 'ridge': the sites' own heads would take the place of the one released; take another")
    if settings.lora.start_from:
        raise ConfigError(f"lora.start-from = {settings.lora.start_from!r}: {stays} of the sites would not start from it")
    if parts and not parts & keeps:
        raise ConfigError(f"lora.form = {method.form!r}: trains no {stays} that could stay at the sites; take lora")


def check_shares(method: Method, layout: Layout, settings: Settings) -> None:
    """Refuse a run in which nothing stays at the sites, or a round of which nothing leaves them.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    if not method.travel.keeps:
        return
    kept, steps = method.travel.kept(layout), settings.train.local_steps
    if not kept & layout.trainable:
        raise ConfigError(f"lora.form = {method.form!r}: trains nothing of what is to stay at the sites; take lora")
    for server_round in range(1, min(settings.num_rounds, MOST_LOOKED_AT) + 1):
        if not method.schedule.trained_in(layout, server_round, steps, method.merge.start(layout)) - kept:
            raise ConfigError(
                f"lora.schedule = {method.schedule.text!r}: round {server_round} trains nothing that leaves the sites; take both"
            )
