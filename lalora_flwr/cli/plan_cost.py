"""``lalora plan --cost``: what a run will take, as lines of its table."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings import Settings

if TYPE_CHECKING:
    from lalora_flwr.cost.estimate import Estimate

ENGINES, HERE = ("ray", "inline", "sites"), "this-machine"
MBIT = 100.0  # a second, of a real site's line
SPANS = ((1e-3, 1e-6, "µs"), (1.0, 1e-3, "ms"), (120.0, 1.0, "s"), (7200.0, 60.0, "min"), (2e5, 3600.0, "h"))
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def check_options(engine: str, hardware: str, tokens: int, most: int) -> None:
    """Refuse what no estimate can be made for. ``most``: the tokens of the longest text.

    Raises:
        ConfigError: naming the option.
    """
    from lalora_flwr.cost.prices import prices_of

    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine}: must be one of {', '.join(ENGINES)}")
    if tokens < 0:
        raise ConfigError(f"--tokens {tokens}: must be the tokens of a usual text, or 0 for data.max-tokens")
    if tokens > most:
        raise ConfigError(f"--tokens {tokens}: texts are cut to data.max-tokens = {most}; name at most these")
    prices_of(hardware)


def cost_of(settings: Settings, engine: str, hardware: str, tokens: int, records: int) -> Estimate:
    """The estimate for this machine or for known hardware, where a site has so many records."""
    import torch

    from lalora_flwr.cost.estimate import Estimator
    from lalora_flwr.cost.prices import Here, prices_of

    train = replace(settings.train, batch_size=min(settings.train.batch_size, records))  # a batch cannot be more than all
    settings = replace(settings, train=train)
    prices, clock = prices_of(hardware), time.perf_counter
    threads = torch.get_num_threads()
    if settings.train.num_threads == 1:
        clock = time.thread_time  # what else this machine does at the moment is no part of the cost
    if isinstance(prices, Here):
        prices.clock = clock
    torch.set_num_threads(settings.train.num_threads)
    try:
        workers = max(1, (os.cpu_count() or 1) // settings.train.num_threads) if engine == "ray" else 1
        return Estimator(prices, clock).estimate(settings, engine, workers, tokens)
    finally:
        torch.set_num_threads(threads)


def cost_rows(settings: Settings, cost: Estimate, engine: str, up_and_down: int) -> Iterator[tuple[str, str]]:
    """Rows of the plan's table.

    Args:
        settings: of the run.
        cost: its estimate.
        engine: of the estimate.
        up_and_down: bytes of a site's round.
    """
    steps = settings.train.local_steps
    of_texts = f", texts of {cost.tokens} tokens" if cost.tokens else ""
    where = {"ray": "Ray", "inline": "the inline engine", "sites": "real sites"}[engine]
    line = up_and_down * 8 / (MBIT * 1e6) if engine == "sites" else 0.0
    a_round = cost.round_seconds + line
    whole = span(settings.num_rounds * a_round)
    on = f"{cost.on}, {where}{of_texts}"
    yield "time", f"{span(a_round)} a round, {whole} for {settings.num_rounds}, without start and evaluations ({on})"
    step = f"{span(cost.pass_seconds)} in the model, {span(cost.release_seconds)} for clip, noise and the rest"
    rest = f"{span(cost.message_seconds)} a message, {span(cost.server_seconds)} a round at the server"
    over = f", {span(line)} on a line of {MBIT:g} Mbit/s" if line else ""
    yield "", f"a step of a site: {step}; {steps} a round; {rest}{over}"
    yield "memory", f"{size(cost.worker_bytes)} for each process that trains, without its records"


def memory_advice(cost: Estimate, room: float) -> str:
    """A warning where a step needs more memory than there is; ``room`` in bytes, 0 if unknown."""
    if not room or cost.worker_bytes <= room:
        return ""
    return (
        f"a process that trains needs {size(cost.worker_bytes)}, and there are {size(room)}: lower train.max-physical-batch, set "
        "train.gradient-checkpointing = true or model.dtype = 'bfloat16' or 'nf4'"
    )


def room_on(hardware: str) -> float:
    """Bytes of the hardware's memory, or of this machine's."""
    from lalora_flwr.cost.prices import KNOWN

    if hardware in KNOWN:
        return KNOWN[hardware].memory
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else 0.0


def span(seconds: float) -> str:
    """A time as people say it, of two or three digits."""
    for limit, unit, name in SPANS:
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.3g} days"


def size(count: float) -> str:
    """Bytes as people say them."""
    for unit, name in UNITS:
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} bytes"
