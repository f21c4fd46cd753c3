"""Flower's entry point on a site."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from lalora_flwr.site.app import make_client_app

if TYPE_CHECKING:
    from lalora_flwr.site.host import Host


@cache
def host() -> Host:
    """Of a process that Flower made: a worker of its simulation runtime, or a real site's."""
    from lalora_flwr.site.host import Host, in_ray_worker  # torch and the rest, only when there is work

    return Host(simulated=in_ray_worker())


app = make_client_app(host)
