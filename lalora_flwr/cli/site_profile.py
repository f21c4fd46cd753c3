"""The line of a site's check about its profile: what every server is told, and what the site makes of it."""

from __future__ import annotations

from lalora_flwr.cli.site import OK, WARNING, Finding
from lalora_flwr.ledger.caps import Caps
from lalora_flwr.methods.parts import WORDS
from lalora_flwr.wire.profile import Words


def profile_line(caps: Caps) -> Finding:
    """A method of another package may have words of its own, so nothing is a fault."""
    told = Words.of(caps.profile)
    if told.wrong:
        return Finding(WARNING, "profile", f"{caps.profile!r}: no run will be served; must be of {WORDS}")
    if told.unknown:
        refused = "for hetlora, flexlora, hlora and flora, which the site will refuse to serve"
        return Finding(WARNING, "profile", f"{caps.profile!r}: must be of {WORDS} {refused}")
    shown = {
        "holding {} components of each layer": told.rank,
        "training the last {} layers": told.layers,
        "at most {} local steps a round": told.steps,
        "at most {} records at once": told.batch,
        "frozen weights in {}": told.precision,
    }
    said = ", ".join(text.format(value) for text, value in shown.items() if value is not None)
    if told.batch and told.batch > caps.records_at_once:
        return Finding(WARNING, "profile", f"batch={told.batch} has no effect above records-at-once = {caps.records_at_once}")
    return Finding(OK, "profile", f"sent to every server: {said}")
