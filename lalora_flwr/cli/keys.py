"""``lalora keys``: the run-config keys."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lalora_flwr.settings import KEYS


def keys() -> None:
    """List every run-config key with its default and meaning."""
    table = Table("key", "default", "meaning", box=None, header_style="bold")
    for key in KEYS.values():
        table.add_row(key.name, repr(key.default), escape(key.doc + (f" ({key.allowed})" if key.allowed else "")))
    Console().print(table)
