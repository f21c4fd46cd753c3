"""From a trainer's start to its end."""

from __future__ import annotations

import logging
import os
import sys
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from lalora_flwr.site.resident.surroundings import NodeConfig, Owner, surroundings

if TYPE_CHECKING:
    from lalora_flwr.site.host import Host

log = logging.getLogger("lalora_flwr.site")


def live(folder: str, name: str, node_config: NodeConfig, model: str, owner: list[int | str], bundles: str, idle: float) -> None:
    """Be the trainer of a site.

    Args:
        folder, name: of its `Place`.
        node_config: the site's.
        model: the folder of the base model.
        owner: the fields of the `Owner` with whose end this process ends.
        bundles: where Flower unpacks app bundles.
        idle: seconds without a message after which it ends.
    """
    its = Owner(int(owner[0]), str(owner[1]))
    own = surroundings(node_config, model, its, Path(bundles))  # before an import changes the environment
    from lalora_flwr.ground.owner import end_with
    from lalora_flwr.site.app import speak, told
    from lalora_flwr.site.resident.place import NoPlace, Place
    from lalora_flwr.site.resident.trainer import Trainer

    if Owner.of(its.process) != its:
        return
    end_with(its.process)
    speak()
    try:
        with Place(Path(folder), name) as place, place.listen() as listener:
            log.info("resident trainer: process %d serves this site's messages", os.getpid())
            Trainer(own, node_config, partial(told, host=_host)).serve(place, listener, idle)
    except NoPlace as fault:
        log.error("resident trainer: %s", fault)
        sys.exit(1)


@cache
def _host() -> Host:
    """Of a real site; made when there is work, so that a failing import has the fixed reason."""
    from lalora_flwr.site.host import Host

    return Host(simulated=False)
