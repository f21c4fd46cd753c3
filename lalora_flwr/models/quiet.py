"""Libraries that talk while they load a model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No advice and no progress bars of transformers; the bars of downloads from the hub stay."""
    warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning)  # PEFT asks by the old name
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)  # its advice on missing heads is what fresh_head means
    hook = transformers_logging.set_tqdm_hook(_no_bar)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(hook)
        transformers_logging.set_verbosity(before)


def _no_bar(_: Callable[..., object], args: tuple[object, ...], options: dict[str, object]) -> object:
    return transformers_logging.EmptyTqdm(*args, **options)  # type: ignore[no-untyped-call]
