"""What a site makes of a run's settings: what its owner pins comes from the node-config."""

from __future__ import annotations

import dataclasses

from lalora_flwr.data.named import named_data_set
from lalora_flwr.data.pins import check_pins, pinned
from lalora_flwr.ground.errors import SiteRefusal
from lalora_flwr.ledger.caps import DEMONSTRATION, Caps
from lalora_flwr.settings import Settings
from lalora_flwr.site.records import NodeConfig


def with_own_model(settings: Settings, node_config: NodeConfig) -> Settings:
    """The run's settings, with what the site's node-config says of its own machine: ``model-path``."""
    family = settings.model.name.partition("/")[0]
    if (path := str(node_config.get("model-path", ""))) and family != "embedded":  # which comes with the package
        own = dataclasses.replace(settings.model, name=f"{family}/{path}", revision="")  # the run's would choose the files
        return dataclasses.replace(settings, model=own)
    return settings


def own_settings(caps: Caps, settings: Settings, node_config: NodeConfig, *, simulated: bool) -> Settings:
    """The run's settings as a site with caps takes them: what the records are comes from its node-config.

    A virtual site has no files of its own: it keeps the run's data set. A real site without any serves its share of the
    embedded digits, which are public, and nothing else that a run could name.

    Raises:
        SiteRefusal: the run takes the records for something else, or the site has none for it.
    """
    check_pins(caps, settings)
    if caps.data_path:
        if named_data_set(settings.data.name) is not None:
            raise SiteRefusal("data: the run is about a data set with a name; the site has records of its own")
        return pinned(caps, settings)
    if not simulated and (settings.data.name != "digits" or not set(DEMONSTRATION) <= set(node_config)):
        raise SiteRefusal("data: the site's node-config names no data-path")
    return settings
