"""ClientApps that a Ray worker can import by name: one fails, one notes what its process loads, one dies."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from lalora_flwr.client_app import app as real
from lalora_flwr.data import digits
from lalora_flwr.site.app import answer
from lalora_flwr.training import learner

SECRET = "patient 17 has blood group AB"
NOTES = "LALORA_TEST_NOTES"  # environment variable: the folder for the notes
LOOKED = "LALORA_TEST_LOOKED"  # environment variable: the file with the last round that the test has looked at
AHEAD = 2  # rounds that sites may be ahead of that

loads: Counter[str] = Counter()

app = ClientApp()
spying = ClientApp()
dying = ClientApp()


@app.train()
def fail(message: Message, context: Context) -> Message:
    def explode(content: RecordDict, context: Context) -> RecordDict:
        raise RuntimeError(SECRET)

    return answer(explode, message, context, lambda: 0.0)


@spying.train()
def note(message: Message, context: Context) -> Message:
    reply = real(message, context)
    node = os.getppid()  # of Ray: the raylet that started this worker
    seen = {"pid": os.getpid(), "node": node, "loads": dict(loads), "threads": torch.get_num_threads()}
    name = f"{message.content['config']['server-round']}-{context.node_config['partition-id']}.json"
    (Path(os.environ[NOTES]) / name).write_text(json.dumps(seen))
    return reply


@dying.train()
def die(message: Message, context: Context) -> Message:
    """As the real one, but in round 2 site 1 takes its process down, as often as the notes allow."""
    deaths = Path(os.environ[NOTES]) / "deaths"
    if message.content["config"]["server-round"] == 2 and context.node_config["partition-id"] == 1:
        left = int(deaths.read_text())
        if left:
            deaths.write_text(str(left - 1))
            os.kill(os.getpid(), signal.SIGKILL)
    return real(message, context)


def fails(server_round: int, site: int) -> bool:
    """One order in twenty, always the same."""
    return random.Random(f"{server_round} {site}").random() < 0.05


def faltering(inner: ClientApp) -> ClientApp:
    """As another one, but one order in twenty fails, and one in twenty takes longer."""
    outer = ClientApp()

    @outer.train()
    def falter(message: Message, context: Context) -> Message:
        of_round, site = int(message.content["config"]["server-round"]), int(context.node_config["partition-id"])
        _wait_for_the_look(of_round - AHEAD)
        if fails(of_round, site):
            return fail(message, context)
        if fails(-of_round, site):
            time.sleep(0.05)
        return inner(message, context)

    @outer.query("identity")
    def identity(message: Message, context: Context) -> Message:
        return inner(message, context)

    return outer


def _wait_for_the_look(at_round: int) -> None:
    """Under Ray the test sees a round's line after the fact; without this it would see few rounds of fast ones."""
    looked, end = Path(os.environ.get(LOOKED, "")), time.monotonic() + 60
    while looked.is_file() and int(looked.read_text()) < at_round and time.monotonic() < end:
        time.sleep(0.01)


flaky = faltering(real)


@app.query("identity")
@spying.query("identity")
@dying.query("identity")
def identity(message: Message, context: Context) -> Message:
    return real(message, context)


def counted(name: str, load: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        loads[name] += 1
        return load(*arguments)

    return call


if NOTES in os.environ:
    learner.load_base_model = counted("model", learner.load_base_model)
    digits.table = counted("data", digits.table)
