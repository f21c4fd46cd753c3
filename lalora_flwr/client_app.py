"""Flower's entry point on a site."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING

from flwr.app import Context, RecordDict

from lalora_flwr.site.app import make_client_app, speak

if TYPE_CHECKING:
    from lalora_flwr.site.host import Host
    from lalora_flwr.site.resident.words import Told


@cache
def host() -> Host:
    """Of a process that Flower made: a worker of its simulation runtime, or a real site's."""
    from lalora_flwr.site.host import Host, in_ray_worker  # torch and the rest, only when there is work

    return Host(simulated=in_ray_worker())


def resident(kind: str, content: RecordDict, context: Context) -> Told | None:
    """What a real site's resident trainer says to a message; None if this process has to serve it. It needs no torch."""
    from lalora_flwr.site.resident.hand_over import resident_of_this_process, serves_one_message

    if not serves_one_message(sys.argv):
        return None
    speak()
    return resident_of_this_process()(kind, content, context)


app = make_client_app(host, resident)
