"""Sites that fail and lie, and what the tests of whole runs ask of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from torch import Tensor

from lalora_flwr.ground.errors import RunFailed
from tests.conftest import (
    AppCall,
    Spy,
    arrays_of,
    factors_of,
    run_spied,
    strict_json,
)

Behaviour = Callable[[Message, Context, AppCall], Message]


REASON = "failure: the site's own log says why"


def site_of(context: Context) -> int:
    return int(context.node_config["partition-id"])


def failing(*sites: int, rounds: Iterable[int] = (1, 2)) -> Behaviour:
    """Sites that answer training with an error in some rounds."""

    def behave(message: Message, context: Context, app: AppCall) -> Message:
        training = message.metadata.message_type == "train"
        if training and site_of(context) in sites and message.content["config"]["server-round"] in rounds:
            return Message(Error(code=2, reason=REASON), reply_to=message)
        return app(message, context)

    return behave


def lying(number: int, lie: Callable[[RecordDict], None]) -> Behaviour:
    """One site that spoils its otherwise good training replies."""

    def behave(message: Message, context: Context, app: AppCall) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train" and site_of(context) == number:
            lie(reply.content)
        return reply

    return behave


def mean_of(messages: list[tuple[Message, Message]]) -> dict[str, Tensor]:
    """The uniform mean of the tensors in some replies."""
    values = [arrays_of(reply) for _, reply in messages]
    return {name: torch.stack([v[name].double() for v in values]).mean(0).float() for name in values[0]}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-7)


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Factors of which a tensor moved."""
    return factors_of(name for name in after if not torch.equal(before[name], after[name]))


def stopped(settings: Any, spy: Spy) -> str:
    """Why the run stopped, which its folder must say too."""
    with pytest.raises(RunFailed) as caught:
        run_spied(settings, spy)
    folder = Path(settings.output_dir) / settings.run_name
    assert strict_json((folder / "failure.json").read_text()) == {"error": str(caught.value)}
    assert not (folder / "summary.json").exists() and not (folder / "adapter").exists()
    return str(caught.value)


LIES: dict[str, Callable[[RecordDict], None]] = {}


def lie(function: Callable[[RecordDict], None]) -> Callable[[RecordDict], None]:
    LIES[function.__name__] = function
    return function


def first_array(content: RecordDict) -> tuple[ArrayRecord, str]:
    arrays: Any = content["arrays"]
    return arrays, sorted(arrays)[0]


@lie
def a_nan(content: RecordDict) -> None:
    arrays, name = first_array(content)
    values = arrays[name].numpy().copy()
    values[0, 0] = math.nan
    arrays[name] = Array(values)
