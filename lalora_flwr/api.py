"""The package from Python: what the ``lalora`` command does, as typed functions. Importing this loads neither torch nor Flower.

    from lalora_flwr.api import compare, plan, run, settings

    wanted = settings(strategy="ffa-lora", num_rounds=5, privacy__epsilon=1.0)
    print(plan(wanted).mechanism.noise_multiplier)
    result = run(wanted)
    print(result.summary.score, result.path / "adapter")

Keys are the run-config's, written with ``_`` for ``-`` and ``__`` for the dot between group and key. A file or
folder is a text or a `Path`. Every function raises
`lalora_flwr.ground.errors.ConfigError` for what a user can mend, and `RunFailed` for a run that stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import expanded
from lalora_flwr.settings import Settings, read_toml, settings_from

if TYPE_CHECKING:
    from lalora_flwr.audit.membership_record import MembershipRecord
    from lalora_flwr.audit.record import AuditRecord
    from lalora_flwr.compare.results import Result as Row
    from lalora_flwr.engines.ray_process import RayProcess
    from lalora_flwr.server.metrics import RoundMetrics, Summary
    from lalora_flwr.server.plan import Plan

Place = str | Path
ENGINES = ("inline", "ray")
OnRound = Callable[["RoundMetrics"], None]


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        path: its folder; ``adapter/`` in it is a PEFT folder where PEFT knows the form.
        settings: as they were resolved.
        summary: ``summary.json``.
        metrics: one record a round.
    """

    path: Path
    settings: Settings
    summary: Summary
    metrics: tuple[RoundMetrics, ...]


def settings(config: Place | None = None, **keys: object) -> Settings:
    """Settings of a run, checked.

    Args:
        config: a TOML file of run-config keys.
        keys: others; they win over the file's.

    Raises:
        ConfigError: for the first thing that cannot be used.
    """
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    return settings_from({**(read_toml(expanded(config)) if config else {}), **named})


def plan(settings: Settings) -> Plan:
    """Noise, steps, parameters and bytes of a run, before any data is touched; as ``lalora plan``."""
    from lalora_flwr.server.plan import make_plan

    return make_plan(settings)


def align(settings: Settings, texts: Place, folder: Place) -> int:
    """Write an adapter for ``lora.start-from`` whose lora_A lie along public texts; as ``lalora align``.

    Args:
        settings: of the run that is to start from it.
        texts: a file with one a line.
        folder: a new one, for the adapter.

    Returns:
        How many texts were read.
    """
    from lalora_flwr.training.align import align as write
    from lalora_flwr.training.align import read_texts

    found = read_texts(expanded(texts))
    write(settings, found, expanded(folder))
    return len(found)


def run(settings: Settings, engine: str = "inline", on_round: OnRound | None = None, num_actors: int = 0) -> Result:
    """Run a federation of virtual sites; as ``lalora run``.

    Args:
        settings: of the run.
        engine: ``inline``, all sites in this process, or ``ray``.
        on_round: gets each round's metrics as they are written.
        num_actors: Ray workers at most; 0: as many as the processors carry.

    Raises:
        ConfigError: before anything is written.
        RunFailed: the run stopped; its folder says why in ``failure.json``.
    """
    return opened(run_in(settings, engine, on_round, num_actors))


def run_in(
    settings: Settings, engine: str, on_round: OnRound | None = None, num_actors: int = 0, ready: RayProcess | None = None
) -> Path:
    """As `run`, but only the folder. ``ready``: the process of the Ray engine, if it was started before."""
    if engine not in ENGINES:
        raise ConfigError(f"engine = {engine!r}: must be one of {', '.join(ENGINES)}")
    _check_count("num_actors", num_actors)
    if engine == "inline":
        from lalora_flwr.engines.inline import run_inline

        return run_inline(settings, on_round)
    from lalora_flwr.engines.simulation import run_simulation

    return run_simulation(settings, on_round, num_actors=num_actors, ready=ready)


def opened(folder: Place) -> Result:
    """A finished run from its folder.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    from lalora_flwr.compare.results import is_finished, read_run

    folder = expanded(folder)
    if not is_finished(folder):
        raise ConfigError(f"{folder}: holds no finished run")
    values, summary, metrics = read_run(folder)
    return Result(folder, settings_from(values), summary, metrics)


def compare(
    over: Mapping[str, Sequence[object]],
    out: Place,
    base: Mapping[str, object] | None = None,
    tune: Mapping[str, Sequence[object]] | None = None,
    workers: int = 0,
) -> list[Row]:
    """Run every combination of the compared keys; as ``lalora compare``. A folder that was stopped goes on.
    Processes are spawned: a script calls this under ``if __name__ == "__main__"``.

    Args:
        over: run-config keys, as the command has them (``"privacy.epsilon"``), and their values.
        out: the folder of the comparison.
        base: keys that all runs have in common.
        tune: keys that are chosen for each combination.
        workers: processes at most; 0: as many as processors or GPUs carry.

    Returns:
        The final runs; a failed one has a reason and no summary.
    """
    from rich.console import Console

    from lalora_flwr.compare.cells import Plan
    from lalora_flwr.compare.collect import collect
    from lalora_flwr.compare.grid import grid_of
    from lalora_flwr.compare.runner import Comparison

    if text := next((key for values in (over, tune or {}) for key, value in values.items() if isinstance(value, str)), ""):
        raise ConfigError(f"{text}: must be a list of values, of which one is enough")
    _check_count("workers", workers)
    out = expanded(out)
    cells = Plan(grid_of(base or {}, over, tune or {}), out / "runs")
    cells.validate()
    Comparison(cells, out, workers, Console(quiet=True)).run()
    return [result for result in collect([out]).results if result.is_final]


def audit(settings: Settings) -> AuditRecord:
    """Attack the run's own code with records made for it; as ``lalora audit``."""
    from lalora_flwr.audit.audit import audit as of

    return of(settings)


def membership(target: Settings | Place, runs: int = 18, workers: int = 0) -> MembershipRecord:
    """Infer membership from the adapter of a finished run's folder, or from those of runs with the settings; as
    ``lalora audit --membership``. Processes are spawned: a script calls this under ``if __name__ == "__main__"``.

    Args:
        target: a run's folder, or settings.
        runs: that are trained.
        workers: processes; 0: as many as the processors carry; 1: this one alone.
    """
    from lalora_flwr.audit.membership import attack_run, attack_settings

    _check_count("workers", workers)
    if isinstance(target, Settings):
        return attack_settings(target, runs, workers)
    return attack_run(expanded(target), runs, workers)


def verify(folder: Place, ledgers: Sequence[Place] = ()) -> list[str]:
    """Recompute every number and digest of a finished run; as ``lalora verify``. A line for each thing that is good.

    Raises:
        ConfigError: there is no certificate, or no such ledger.
        RunFailed: naming the first difference.
    """
    from lalora_flwr.audit.verify import verify as lines

    return list(lines(expanded(folder), [expanded(ledger) for ledger in ledgers]))


def _check_count(name: str, value: int) -> None:
    if value < 0:
        raise ConfigError(f"{name} = {value}: must be 0 or more")
