"""``lalora run``: a whole federation on this machine."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lalora_flwr.api import run_in
from lalora_flwr.cli.early import check_early, without_hub
from lalora_flwr.cli.options import ConfigFile, Override, resolve
from lalora_flwr.engines.ray_process import RayProcess
from lalora_flwr.ground.errors import ConfigError, Interrupted
from lalora_flwr.ground.extras import missing, need
from lalora_flwr.ground.figures import MODULE
from lalora_flwr.ground.files import expanded
from lalora_flwr.ground.waiting import Waiting
from lalora_flwr.server.metrics import CONFIG, HEADLINE_OF, HEADLINES, SUMMARY, RoundMetrics, Summary
from lalora_flwr.server.tracking import dropped
from lalora_flwr.settings import Settings, read_toml, settings_from


class Engine(StrEnum):
    """Where the virtual sites run."""

    ray = "ray"
    inline = "inline"


class Progress:
    """One line a round on the console, with the time that is left."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self._settings, self._console = settings, console
        self._first: float | None = None  # when the first round ended: start-up must not count into the time left
        self._waiting = Waiting(console, "starting", settings.num_rounds)

    def __enter__(self) -> Progress:
        self._waiting.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.__exit__()

    def header(self) -> None:
        metric = HEADLINES[HEADLINE_OF[self._settings.data.problem_type]]
        alone = f"  {'ε if alone':>10}" if self._settings.shares_noise else ""
        names = f"{'round':>9}  {metric:>8}  {'loss':>7}  {'ε spent':>12}{alone}  {'sites':>5}  {'seconds':>7}  {'left':>6}"
        self._console.print(names)

    def __call__(self, line: RoundMetrics) -> None:
        now, done, total = time.monotonic(), line.round, self._settings.num_rounds
        self._first = self._first or now
        left = f"{(now - self._first) / (done - 1) * (total - done):.0f}s" if done > 1 else ""
        due = self._settings.evaluates_after(done)
        epsilon = f"{line.epsilon:.3f}" if line.private else "non-private"
        score, loss = (_figure(value) if due else "" for value in (line.score, line.quality.get("loss")))
        alone = "" if line.epsilon_alone is None else f"  {line.epsilon_alone:>10.3f}"
        self._console.print(
            f"{done:>5}/{total:<3}  {score:>8}  {loss:>7}  {epsilon:>12}{alone}  {line.sites:>5}  {line.seconds:>7.1f}  {left:>6}"
        )
        if line.repeats:
            self._console.print(f"           its sum was spoilt and asked for again: {line.repeats}")
        self._waiting.now(f"round {done + 1} of {total}" if done < total else "writing the adapter", done)
        for site, reason in line.failed_sites.items():
            self._console.print(f"           site {site} failed: {reason}")
        for site in line.left_sites:
            self._console.print(f"           site {site} leaves the run: its budget is spent")


def run(
    override: Override = None,
    config: ConfigFile = None,
    engine: Annotated[Engine, typer.Option(help="Ray-backed virtual sites, or all in this process.")] = Engine.ray,
    num_actors: Annotated[int, typer.Option(min=0, help="Ray workers at most; 0: as many as the CPUs carry.")] = 0,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Run folder to go on with after its last checkpoint.")
    ] = None,
    start_from: Annotated[
        Path | None, typer.Option("--from", metavar="ADAPTER", help="Folder of an earlier adapter, or of its run, to start from.")
    ] = None,
) -> None:
    """Run a federation; results go to a new folder under output-dir. Exits non-zero unless the summary was written."""
    if start_from:
        override = [*(override or []), f"lora.start-from={json.dumps(str(expanded(start_from).absolute()))}"]
    console = Console(highlight=False)
    with ExitStack() as stack:
        ready: list[RayProcess] = []

        def early(settings: Settings) -> None:
            check_early(settings)
            if engine is Engine.ray:
                need("ray", "--engine ray", "--engine inline")
            if without_hub(settings):
                console.print("the hub cannot be reached; what is not in its cache cannot be loaded", markup=False)
            if engine is Engine.ray:  # as early as that: it gets ready while this process imports, plans and prints
                ready.append(stack.enter_context(RayProcess(settings, num_actors)))

        settings = resumed(resume, config, override, early) if resume else resolve(config, override, early)
        folder = _planned_and_run(settings, engine, num_actors, ready[0] if ready else None, console)
    report(folder, console)


def _planned_and_run(settings: Settings, engine: Engine, num_actors: int, ready: RayProcess | None, console: Console) -> Path:
    """Print the plan, run it, and say each round; the run's folder."""
    with Waiting(console, "libraries"):  # torch and friends, only once the settings hold
        from lalora_flwr.cli.plan import print_advice, print_plan
        from lalora_flwr.server.advice import advice
        from lalora_flwr.server.place import named
        from lalora_flwr.server.plan import make_plan

    settings = named(settings)
    with Waiting(console, "noise, model and bytes"):
        made = make_plan(settings)
    print_plan(settings, made, console)
    with Waiting(console, "data"):
        smallest = smallest_site(settings)
    print_advice([*advice(settings, made, smallest), missing(MODULE, "plots")], console)
    try:
        with Progress(settings, console) as progress:
            progress.header()
            return run_in(settings, engine.value, progress, num_actors, ready)
    except KeyboardInterrupt:
        again = f"lalora run --resume {shlex.quote(str(expanded(settings.output_dir) / settings.run_name))}"
        raise Interrupted(f"interrupted; {again} goes on after the last finished round") from None


def resumed(
    run: Path, config: Path | None, override: list[str] | None, early: Callable[[Settings], None] = check_early
) -> Settings:
    """The settings of a run that stopped.

    Raises:
        ConfigError: if there is none, it is finished, or other settings are given too.
    """
    if config or override:
        raise ConfigError("--resume: a run goes on with its own settings; leave out --config, --from and -c")
    if not (run / CONFIG).is_file():
        raise ConfigError(f"--resume {run}: no run folder; it must hold {CONFIG}")
    place = {"output-dir": str(run.absolute().parent), "run-name": run.absolute().name}
    return settings_from({**read_toml(run / CONFIG), **place, "resume": True}, early)


def smallest_site(settings: Settings) -> int:
    """Records of the smallest site. Splits the data once, so that an impossible split is one line here and not a failure on
    every virtual site.

    Raises:
        ConfigError: if the virtual sites cannot share the data as asked.
    """
    from lalora_flwr.data.data_set import data_set
    from lalora_flwr.data.partition import site_rows

    data = data_set(settings)
    return min(map(len, site_rows(data.classes(), settings.data, settings.seed, settings.num_supernodes, data.owners())))


def report(folder: Path, console: Console) -> None:
    """The result in three lines."""
    summary = Summary.from_json(json.loads((folder / SUMMARY).read_text()))
    name = HEADLINES[summary.metric]
    before = "adapter it started from" if summary.started_from else "frozen model"
    over = "one site held all records" if summary.centralised else "largest over sites"
    guarantee = (
        f"ε = {summary.epsilon:.3f} at δ = {summary.delta:g} ({over}"
        + (", seeded: describes the mechanism, not this run's secrecy)" if summary.seeded else ")")
        if summary.private
        else "NON-PRIVATE"
    )
    console.print(f"{name} {_figure(summary.frozen_score)} ({before}) -> {_figure(summary.score)}; {guarantee}")
    if summary.best_round:
        console.print(f"round {summary.best_round} was better on these records, {_figure(summary.best_score)}: kept as best/")
    if summary.personal:
        console.print(f"{name} of the sites' own models {_figure(summary.personal.get(summary.metric))}: {summary.personal_is}")
    if summary.started_from:
        console.print("ε leaves out what the earlier adapter cost; sites that trained both have spent both")
    if summary.test_left_out:
        reasons = ", ".join(f"{count}: {reason}" for reason, count in summary.test_left_out.items())
        console.print(
            f"evaluated on {summary.test_records} test records; left out {reasons}", soft_wrap=True, markup=False, style="yellow"
        )
    if summary.epsilon_alone is not None:
        console.print(
            f"noise shared by secure sums: this ε holds if at most {summary.colluders} of the other sites side with the server; "
            f"if all of them do, ε = {summary.epsilon_alone:.3f}"
        )
    of_sites = summary.quality.get("site_accuracy")
    if of_sites is not None:
        covered = "exact, on private records; ε does NOT cover it" if summary.leaks else "noised, which the ε above covers"
        console.print(f"sites' own accuracy {_figure(of_sites)}: {covered}")
    for tracker, reason in dropped(folder).items():
        console.print(f"the run went on without its tracker {tracker}: {reason}", soft_wrap=True, markup=False, style="yellow")
    console.print(f"results in {folder}", soft_wrap=True, markup=False)


def _figure(figure: float | None) -> str:
    return "none" if figure is None else f"{figure:.3f}"
