"""A SuperNode that looks for messages soon after its last one.

Flower's own sleeps for three seconds whenever no message is there, which is a good part of a round of one local step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lalora_flwr.ground.pauses import pause

Calls = tuple[Any, ...]  # a SuperNode's own address, and the functions by which it calls the SuperLink
Connect = Callable[..., AbstractContextManager[Calls]]
RECEIVE = 1  # place in the tuple of functions by which a SuperNode calls the SuperLink
LONGEST = 3600.0  # seconds until Flower's loop, which does nothing else, gets its "none" and sleeps


def eager(connect: Connect, clock: Callable[[], float] = time.monotonic, wait: Callable[[float], None] = time.sleep) -> Connect:
    """Flower's connection to the SuperLink, whose ``receive`` waits for a message in place of the loop around it.

    Guarantee: it calls what Flower's loop calls, as often as it waits, and passes on what that returns or raises. A connection
    of another form than that of Flower 1.41 is left as it is.

    Args:
        connect: Flower's.
        clock, wait: seconds that go by, and waiting for them.
    """

    @contextmanager
    def connected(*args: object, **kwargs: object) -> Iterator[Calls]:
        with connect(*args, **kwargs) as functions:
            if getattr(functions[RECEIVE], "__name__", "") != "receive":
                yield functions
                return

            def receive() -> Any:
                begun = clock()
                while (found := functions[RECEIVE]()) is None and (waited := clock() - begun) < LONGEST:
                    wait(pause(waited))
                return found

            yield (*functions[:RECEIVE], receive, *functions[RECEIVE + 1 :])

    return connected
