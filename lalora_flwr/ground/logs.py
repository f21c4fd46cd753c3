"""Logs as JSON on request: with ``LALORA_LOG=json`` each record is one line with one object, in UTC.

This file imports nothing of the package: a site's helper process runs it by its path (`lalora_flwr.engines.clientapp`).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime

VARIABLE, JSON = "LALORA_LOG", "json"
OWN = ("flwr", "lalora_flwr")  # loggers that have handlers of their own


class JsonLines(logging.Formatter):
    """``time``, ``level``, ``logger``, ``message``, and ``exception`` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(line)


class _Others(logging.Filter):
    """Records of other libraries only."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name.partition(".")[0] not in OWN


def wants_json(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the process's logs are to be JSON.

    Raises:
        ValueError: the variable says something else; the text is one line for whoever set it.
    """
    asked = environment.get(VARIABLE, "")
    if asked not in ("", JSON):
        raise ValueError(f"{VARIABLE} = {asked!r}: must be {JSON}, or not set")
    return asked == JSON


def json_logs(environment: Mapping[str, str] = os.environ, root: logging.Logger | None = None) -> None:
    """If the environment asks for it, let Flower's console handler write JSON, and what other libraries log or warn of, too.

    Flower's own handler makes its text itself, whatever formatter it is given, and so is replaced by one with the same stream and
    level. A second call changes nothing.

    Args:
        environment: of the process.
        root: default: the root of all loggers.

    Raises:
        ValueError: as `wants_json`.
    """
    if not wants_json(environment):
        return
    root = root or logging.getLogger()
    handlers = logging.getLogger(OWN[0]).handlers
    for place, handler in enumerate(handlers):
        if type(handler).__name__ == "ConsoleHandler" and isinstance(handler, logging.StreamHandler):
            handlers[place] = _written(logging.StreamHandler(handler.stream), handler.level)
    if not any(type(handler.formatter).__name__ == JsonLines.__name__ for handler in root.handlers):
        others = _written(logging.StreamHandler(), logging.WARNING)
        others.addFilter(_Others())
        root.addHandler(others)
        logging.captureWarnings(True)


def _written(handler: logging.Handler, level: int) -> logging.Handler:
    handler.setFormatter(JsonLines())
    handler.setLevel(level)
    return handler
