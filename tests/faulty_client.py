"""ClientApps that a Ray worker can import by name: one that fails, and one that notes what its process loads."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sklearn.datasets
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from lalora_flwr import adapted
from lalora_flwr.client_app import answer
from lalora_flwr.client_app import app as real

SECRET = "patient 17 has blood group AB"
NOTES = "LALORA_TEST_NOTES"  # environment variable: the folder for the notes

loads: Counter[str] = Counter()

app = ClientApp()
spying = ClientApp()


@app.train()
def fail(message: Message, context: Context) -> Message:
    def explode(content: RecordDict, context: Context) -> RecordDict:
        raise RuntimeError(SECRET)

    return answer(explode, message, context)


@spying.train()
def note(message: Message, context: Context) -> Message:
    reply = real(message, context)
    seen = {"pid": os.getpid(), "loads": dict(loads), "threads": torch.get_num_threads()}
    name = f"{message.content['config']['server-round']}-{context.node_config['partition-id']}.json"
    (Path(os.environ[NOTES]) / name).write_text(json.dumps(seen))
    return reply


@app.query("identity")
@spying.query("identity")
def identity(message: Message, context: Context) -> Message:
    return real(message, context)


def counted(name: str, load: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        loads[name] += 1
        return load(*arguments)

    return call


if NOTES in os.environ:
    adapted.load_base_model = counted("model", adapted.load_base_model)
    sklearn.datasets.load_digits = counted("data", sklearn.datasets.load_digits)
