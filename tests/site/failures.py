"""Failures of a site, and the logs that hear of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Context

from lalora_flwr.privacy.mechanism import PrivateSum
from lalora_flwr.settings import Settings
from lalora_flwr.training.learner import Learner, LearnerCache
from tests.conftest import MODELS

MakeContext = Callable[[Settings], Context]


MakeReal = Callable[..., Context]


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


SECRET = "patient 17 has blood group AB"


FIXED = "failure: the site's own log says why"


class Heard(logging.Handler):
    """Everything that a logger says, as text."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += logging.Formatter().format(record) + "\n"


class FailsAt:
    """Makes the sums of a round's steps, of which one fails; the first when it is made, as the optimizer would."""

    def __init__(self, step: int) -> None:
        self._step, self._made = step, 0

    def __call__(self, *arguments: Any) -> PrivateSum:
        self._made += 1
        if self._step == 0:
            raise RuntimeError(SECRET)
        return Failing(*arguments) if self._made == self._step else PrivateSum(*arguments)


class Untouchable(LearnerCache):
    """Of a site that must not need its model."""

    def __init__(self) -> None:
        super().__init__(MODELS)

    def learner(self, *_: Any) -> Learner:
        pytest.fail("the model was made")


class Failing(PrivateSum):
    def release(self, *_: Any) -> dict[str, torch.Tensor]:
        raise RuntimeError(SECRET)
