"""Orders of a server, consistent in themselves whatever they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict
from torch import Tensor

from lalora_flwr.adapter.slots import digest
from lalora_flwr.ground.errors import LaloraError
from lalora_flwr.methods.method import method_of
from lalora_flwr.settings import Settings, settings_from
from lalora_flwr.settings.stages import stage_of
from lalora_flwr.training.learner import Learner
from lalora_flwr.wire.orders import ARRAYS, CONFIG, TrainOrder
from lalora_flwr.wire.tensors import to_arrays
from tests.attacks.attacker import RUN
from tests.sites import SERVER, stamp


def settings_or_none(run: Mapping[str, Any]) -> Settings | None:
    """The run's settings as the server of this version reads them; None if it would refuse them itself."""
    try:
        return settings_from(run)
    except LaloraError:
        return None


def learner_or_none(settings: Settings) -> Learner | None:
    """The server's own model; None if this version refuses it, as then the site must."""
    try:
        return SERVER.learner(settings, "cpu")
    except LaloraError:
        return None


def order(
    run: Mapping[str, Any],
    model: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda state: state,
    *,
    sent: Callable[[str], bool] | None = None,
    **fields: Any,
) -> Message:
    """A server's order, consistent in itself whatever it says.

    Args:
        run: the run-config; one that no settings can be made of gets the order of `RUN`.
        model: the folder of the base model, which the server holds too.
        change: makes the adapter that the site is to start from of the initial one.
        sent: which tensors travel; none: those that the run's method sends, and the others are as the site draws them.
        fields: fields of the order that say something else.
    """
    family = str(run.get("model.name", "hf/")).partition("/")[0]
    honest = {**RUN, "model.name": f"hf/{model}"}
    settings = settings_or_none({**run, "model.name": f"{family}/{model}"}) or settings_from(honest)
    settings = stage_of(settings, int(fields.get("server_round", 1)))
    learner = learner_or_none(settings) or learner_or_none(settings := settings_from(honest))
    state, stays = change(dict(learner.initial)) if learner else {}, frozenset[str]()
    if learner:
        stays = method_of(settings).travel.kept(learner.adapter.layout)
    if sent is None and learner:
        method = method_of(settings)
        travels = method.travel.down(method.at_rest(learner.adapter.layout))
        state = {name: tensor if name in travels else learner.initial[name] for name, tensor in state.items()}
        sent = travels.__contains__
    values: dict[str, Any] = {
        "server_round": 1,
        "adapter_digest": digest({name: tensor for name, tensor in state.items() if name not in stays}),
        "model_digest": learner.base.provenance.digest if learner else "",
        **fields,
    }
    stamp()
    content = RecordDict(
        {ARRAYS: to_arrays({n: t for n, t in state.items() if sent and sent(n)}), CONFIG: TrainOrder(**values).to_record()}
    )
    return Message(content, dst_node_id=7, message_type="train")
