"""Whether a run can go on from a checkpoint: only as the run that it was, whatever version of this package wrote it."""

from __future__ import annotations

from lalora_flwr.adapter.slots import Layout
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.method import Method, method_of
from lalora_flwr.methods.schedules import schedule_of
from lalora_flwr.server.folder import Checkpoint
from lalora_flwr.settings import Settings, flatten
from lalora_flwr.settings.choices import METHODS

REMEDY = "resume it with the version that began it, or begin it anew under another run-name"


def choices(settings: Settings) -> dict[str, str]:
    """What the keys that say ``auto`` came to, as a checkpoint notes it; versions of this package may differ in it."""
    method = method_of(settings)
    return {
        "lora.schedule": method.schedule.text,
        "filter.name": method.filter.name,
        "merge.name": method.merge.name,
        "merge.average": "ema" if method.average else "last",
        "train.step-at": "server" if method.server_steps else "site",
        "privacy.max-rounds": str(settings.rounds_per_site),
    }


def check_same_run(checkpoint: Checkpoint, settings: Settings, layout: Layout) -> None:
    """Refuse to go on with another method than that of the rounds so far.

    Args:
        checkpoint: of the run.
        settings: as this version takes them.
        layout: of the adapter that they make.

    Raises:
        ConfigError: a key came to something else when the run began, or the adapter had other tensors.
    """
    now, given = choices(settings), flatten(settings)
    before = checkpoint.state.get("choices") or {**now, "lora.schedule": _schedule_of_old(settings)}
    for key, value in now.items():
        if before.get(key, value) != value:
            raise ConfigError(f"{key} = {given[key]!r}: was {before[key]!r} when the run began and is {value!r} now; {REMEDY}")
    shapes = {name: tuple(value.shape) for name, value in checkpoint.adapter.items()}
    if shapes != {name: layout[name].shape for name in layout.names}:
        raise ConfigError(f"strategy = {settings.strategy!r}: the run to resume has an adapter of other tensors; {REMEDY}")


def _schedule_of_old(settings: Settings) -> str:
    """What a schedule came to before checkpoints noted it: one by step never advanced by round."""
    own = METHODS.get(settings.strategy, Method).schedule
    return (own if settings.lora.schedule == "auto" else schedule_of(settings.lora.schedule)).text
