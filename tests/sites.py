"""Sites of both kinds in the test's process, with whatever a test hands to their host."""

from __future__ import annotations

from typing import Any

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from lalora_flwr.adapter.slots import digest
from lalora_flwr.settings import Settings
from lalora_flwr.site.app import make_client_app
from lalora_flwr.site.host import Host
from lalora_flwr.training.learner import Learner, LearnerCache
from lalora_flwr.wire.orders import ARRAYS, CONFIG, TrainOrder
from lalora_flwr.wire.tensors import to_arrays
from tests.conftest import MODELS

LEARNERS = LearnerCache(MODELS)  # of the sites
SERVER = LearnerCache(MODELS)


def host(*, simulated: bool, **handed: Any) -> Host:
    return Host(simulated=simulated, **{"learners": LEARNERS, **handed})


def real_app(**handed: Any) -> ClientApp:
    """The ClientApp of a real site."""
    made = host(simulated=False, **handed)
    return make_client_app(lambda: made)


def virtual_app(**handed: Any) -> ClientApp:
    """The ClientApp of virtual sites."""
    made = host(simulated=True, **handed)
    return make_client_app(lambda: made)


REAL, VIRTUAL = real_app(), virtual_app()


def servers_learner(settings: Settings) -> Learner:
    """The server's own model; nobody may train it."""
    return SERVER.learner(settings)


def stamp() -> None:
    """Flower stamps messages with what its processes know of themselves."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def train_order(settings: Settings, server_round: int = 1, **changed: Any) -> Message:
    """The server's order for a round that starts from the initial adapter."""
    stamp()
    learner = servers_learner(settings)
    fields = {"adapter_digest": digest(learner.initial), "model_digest": learner.base.provenance.digest, **changed}
    content = RecordDict({ARRAYS: to_arrays(learner.initial), CONFIG: TrainOrder(server_round, **fields).to_record()})
    return Message(content, dst_node_id=7, message_type="train")
