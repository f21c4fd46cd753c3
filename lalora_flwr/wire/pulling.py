"""How soon Flower looks again for a part of a message that is announced and not there yet.

Flower announces a message before its parts are uploaded, and who pulls too early waits one second, then two, then four: in a
round of small adapters that is most of the time. This file needs nothing of the package, so that a process can run it which
must not import the package (`lalora_flwr.engines.clientapp`).
"""

FIRST = 0.05  # seconds; each further look waits twice as long, up to Flower's own longest
WAIT = "initial_backoff"


def pull_soon() -> None:
    """Make Flower's first look again in this process come soon. A Flower without this setting is left as it is."""
    try:
        from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, pull_objects
    except ImportError:
        return
    for function in (pull_objects, pull_and_inflate_object_from_tree):
        if WAIT in (defaults := function.__kwdefaults__ or {}):
            defaults[WAIT] = FIRST
