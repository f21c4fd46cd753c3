"""Flower's own parsers of its commands' arguments: a flag that Flower drops ends the test."""

from __future__ import annotations

from typing import Any

from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink

from lalora_flwr.engines.supernode import parse_arguments

SITE_START = ["lalora", "site", "start", "--"]  # in place of flower-supernode, whose arguments follow


def superlink_flags(arguments: list[str]) -> Any:
    """What Flower makes of the arguments of ``flower-superlink``."""
    return _parse_args_run_superlink().parse_args(arguments)


def supernode_flags(words: list[str]) -> Any:
    """The same, of a site's whole command."""
    assert words[:4] == SITE_START
    return parse_arguments(words[4:])
