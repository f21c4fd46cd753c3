"""The run's model on a site, and the adapter it starts a round from."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from lalora_flwr.adapter.slots import Layout, Mask, Slot, corner, digest
from lalora_flwr.ground.errors import SiteRefusal
from lalora_flwr.ground.files import expanded
from lalora_flwr.settings import Settings
from lalora_flwr.site.host import Host
from lalora_flwr.site.records import NodeConfig
from lalora_flwr.training.learner import Learner
from lalora_flwr.wire.orders import ARRAYS
from lalora_flwr.wire.tensors import to_tensors

log = logging.getLogger("lalora_flwr.site")
MODEL_DIFFERS = (
    "model: the site's base model differs from the server's or cannot be used; take the same files and package versions"
)

NO_FOLDER = "no folder with a config.json"


def is_model_folder(path: str) -> bool:
    """Whether ``model-path`` can be a model: anything else would be taken for the name of one, and fetched from the hub."""
    return (expanded(path) / "config.json").is_file()


def own_model(host: Host, settings: Settings, node_config: NodeConfig, model_digest: str, *, quiet: bool) -> Learner:
    """The run's model on this site.

    Args:
        host: of the site.
        settings: the run's, as the site takes them.
        node_config: the site's.
        model_digest: of the server's model.
        quiet: whatever is wrong has the same fixed reason. Without ``model-path`` the run names the place of the model, and
            different reasons would say which files there are on the site's machine.

    Raises:
        SiteRefusal: it is not the server's, or cannot be used.
        ConfigError: it cannot be used, unless ``quiet``.
    """
    path = str(node_config.get("model-path", ""))
    if path and not is_model_folder(path):
        log.error("node-config: model-path = %r: %s", path, NO_FOLDER)
        raise SiteRefusal(MODEL_DIFFERS)
    try:
        learner = host.learners.learner(settings, str(node_config.get("device", "")))
    except Exception:
        if not quiet:
            raise
        log.exception("the site cannot use the run's model")
        raise SiteRefusal(MODEL_DIFFERS) from None
    if learner.base.provenance.digest != model_digest:
        raise SiteRefusal(MODEL_DIFFERS)
    return learner


def tensors_of(content: RecordDict) -> dict[str, Tensor]:
    """The tensors of an order.

    Raises:
        SiteRefusal: it has none, or they cannot be read.
    """
    arrays = content.get(ARRAYS)
    if not isinstance(arrays, ArrayRecord):
        raise SiteRefusal("order: it holds no tensors")
    try:
        return to_tensors(arrays)
    except Exception:  # whatever numpy and torch make of bytes that are no arrays
        raise SiteRefusal("order: its tensors cannot be read") from None


def start_from(
    learner: Learner, held: Layout, received: Mapping[str, Tensor], wanted: Mask, own: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Load the adapter that the server sent; what did not travel is the site's own, or as the seed draws it.

    No honest server sends values that are not finite: they would buy noise alone with the site's budget, and a form that
    solves for what it loads, as a ridge head's, would fail on them.

    Args:
        learner: of the site.
        held: the slots as the site holds them.
        received: the tensors of the order.
        wanted: the slots that travel to the site.
        own: slots that stay at the site, as they were after its last round; none: they are as the seed draws them.

    Returns:
        What was loaded.

    Raises:
        SiteRefusal: the tensors are not those of the method, not of the shapes that the site holds, or not finite float32.
    """
    if set(received) != wanted or any(not _fits(received[name], held[name]) for name in wanted):
        raise SiteRefusal("adapter: the tensors sent are not those that the run's method sends")
    if received and not torch.isfinite(torch.cat([value.flatten() for value in received.values()])).all():
        raise SiteRefusal("adapter: the tensors sent hold values that are not finite")
    there = {**received, **(own or {})}
    start = {name: there[name] if name in there else corner(learner.initial[name], held[name]) for name in held}
    learner.adapter.load(start)
    return start


def _fits(tensor: Tensor, slot: Slot) -> bool:
    return tensor.shape == slot.shape and tensor.dtype == torch.float32


def check_start(learner: Learner, adapter_digest: str, kept: Mask = frozenset()) -> None:
    """Compare the loaded adapter with the server's, which does not know the slots that are ``kept`` at the site.

    Raises:
        SiteRefusal: it differs.
    """
    if digest({name: value for name, value in learner.adapter.parameters.items() if name not in kept}) != adapter_digest:
        raise SiteRefusal("adapter: the site's start differs from the server's; use the same package versions")
