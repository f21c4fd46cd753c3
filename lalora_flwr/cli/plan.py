"""``lalora plan``: what a run will cost, before any data is touched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lalora_flwr.cli.early import check_machine, check_places, without_hub
from lalora_flwr.cli.options import ConfigFile, Override, resolve
from lalora_flwr.cli.plan_cost import ENGINES, HERE, check_options, cost_of, cost_rows, memory_advice, room_on
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.extras import missing, need
from lalora_flwr.ground.figures import MODULE, readable
from lalora_flwr.ground.files import expanded
from lalora_flwr.ground.waiting import Waiting
from lalora_flwr.settings import Settings

if TYPE_CHECKING:
    from lalora_flwr.data.holdings import Holdings
    from lalora_flwr.server.plan import Plan
    from lalora_flwr.server.traffic import Traffic

ROWS = 10  # rounds shown at most


CLASSES = 12  # columns shown at most in the table of sites


def plan(
    override: Override = None,
    config: ConfigFile = None,
    data: Annotated[bool, typer.Option("--data", help="Read and split the data, and show who holds what.")] = False,
    plot: Annotated[Path | None, typer.Option(help="With --data: the picture; default partition.png in output-dir.")] = None,
    cost: Annotated[bool, typer.Option("--cost", help="Predict seconds of a round and memory; takes seconds itself.")] = False,
    engine: Annotated[str, typer.Option(help="With --cost: ray, inline, or sites (real ones, side by side).")] = ENGINES[0],
    hardware: Annotated[str, typer.Option(help="With --cost: this-machine, or from data sheets h100, a100, l4.")] = HERE,
    tokens: Annotated[int, typer.Option(help="With --cost: tokens of a usual text; 0: data.max-tokens.")] = 0,
) -> None:
    """Show noise, steps, predicted ε, parameters and bytes of a run, and what it takes; refuse impossible settings."""
    settings = resolve(config, override, lambda asked: check_places(asked, data=data or _reads_data(asked)))
    if plot and not data:
        raise ConfigError("--plot: draws who holds what; add --data")
    if plot:
        need(MODULE, "--plot")
    if cost:
        check_options(engine, hardware, tokens, settings.data.max_tokens)
    elif (engine, hardware, tokens) != (ENGINES[0], HERE, 0):
        raise ConfigError("--engine, --hardware, --tokens: say what --cost predicts; add it")
    without_hub(settings, weights=False)
    console = Console()
    with Waiting(console, "libraries"):  # torch and friends, only once the settings hold
        from lalora_flwr.server.advice import advice
        from lalora_flwr.server.plan import make_plan
    with Waiting(console, "noise, model and bytes"):
        made = make_plan(settings)
    found = None
    if cost:
        with Waiting(console, "seconds and memory"):
            found = cost_of(settings, engine, hardware, tokens, made.records)
    taken = cost_rows(settings, found, engine, max(kind.down + max(kind.up) for kind in made.traffic)) if found else ()
    print_plan(settings, made, console, taken)
    smallest = _show_holdings(settings, plot or expanded(settings.output_dir) / "partition.png", console) if data else None
    needs = memory_advice(found, room_on(hardware)) if found else ""
    print_advice([*_not_here(settings), *advice(settings, made, smallest), needs], console)


def _reads_data(settings: Settings) -> bool:
    """Whether the settings leave out what a plan has to know of the records."""
    data = settings.data
    nameless = settings.task == "language" or data.problem_type == "regression"
    return not data.records or not (nameless or data.labels or data.num_classes)


def _not_here(settings: Settings) -> Iterator[str]:
    """What this machine has not; a plan may be for others."""
    try:
        check_machine(settings)
    except ConfigError as fault:
        yield str(fault)


def _show_holdings(settings: Settings, plot: Path, console: Console) -> int:
    """Who holds what, as a table and a picture. Returns the records of the smallest site."""
    from lalora_flwr.data.holdings import class_members, holdings, unreadable_images

    with Waiting(console, "data"):
        held, members, broken = holdings(settings), class_members(settings), unreadable_images(settings)
    console.print(_table_of(settings, held))
    without = missing(MODULE, "plots")
    if not without:
        _draw_holdings(settings, held, plot)
    if members:
        said = ", ".join(f"{name} {count}" for name, count in members.items())
        console.print(f"records of each class: {said}", soft_wrap=True, highlight=False, markup=False)
    if not without:
        console.print(f"who holds what: {plot}", soft_wrap=True, highlight=False)
    shown = [f"data: {line}" for line in broken[:ROWS]]
    print_advice([without, *shown, *([f"data: {len(broken)} images cannot be read"] if len(broken) > ROWS else [])], console)
    return min(held.records())


def _draw_holdings(settings: Settings, held: Holdings, plot: Path) -> None:
    from lalora_flwr.data.holdings import holdings_figure

    split = settings.data.partition + (f" (β = {settings.data.beta:g})" if settings.data.partition == "dirichlet" else "")
    figure = holdings_figure(held, f"{settings.data.name}, {split}, seed {settings.seed}")
    try:
        plot.parent.mkdir(parents=True, exist_ok=True)
        readable(figure)
        figure.savefig(plot, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: an ending that is no picture's
        raise ConfigError(f"--plot {plot}: {error}") from None


def print_advice(lines: Iterable[str], console: Console) -> None:
    """Warnings, each one line of its own; empty ones are none."""
    for line in filter(None, lines):
        console.print(f"warning: {line}", soft_wrap=True, markup=False, highlight=False, style="yellow")


def _table_of(settings: Settings, held: Holdings) -> Table:
    """One row a site: records, its own q and σ, and the records of each class, or of how many classes it has some."""
    from lalora_flwr.privacy.noise import mechanism_for

    single = 1 < len(held.labels) <= CLASSES
    several = ["classes", "largest class"] if len(held.labels) > CLASSES else []
    table = Table("site", "records", "q", "σ", *map(escape, held.labels if single else several), box=None, header_style="bold")
    for site, (row, records) in enumerate(zip(held.counts, held.records(), strict=True)):
        mechanism = mechanism_for(settings, records)
        cells = [str(count) for count in row] if single else []
        if several:
            cells = [f"{sum(count > 0 for count in row)} of {len(row)}", f"{max(row) / records:.0%}"]
        table.add_row(str(site), str(records), f"{mechanism.sample_rate:.4g}", f"{mechanism.noise_multiplier:.3f}", *cells)
    return table


def print_plan(settings: Settings, plan: Plan, console: Console, more: Iterable[tuple[str, str]] = ()) -> None:
    """The plan as two small tables; ``more``: rows of the first."""
    facts = Table(box=None, show_header=False)
    for name, value in [*_facts(settings, plan), *more]:
        facts.add_row(name, value)
    console.print(facts)
    if not settings.private:
        return
    if plan.sharing:
        curve = plan.collusion(settings)
        shown = sorted({*range(min(len(curve), ROWS)), len(curve) - 1})
        table = Table("other sites that side with the server", "ε", box=None, header_style="bold")
        for colluders in shown:
            table.add_row(str(colluders) + (" (all)" if colluders == len(curve) - 1 else ""), f"{curve[colluders]:.3f}")
        console.print(table)
    rounds = settings.rounds_per_site + min(1, plan.ridge_steps)
    shown = sorted({max(1, math.ceil(rounds * i / ROWS)) for i in range(1, ROWS + 1)})
    table = Table("rounds a site served", "predicted ε", box=None, header_style="bold")
    for served in shown:
        table.add_row(str(served), f"{plan.epsilon_after(served, settings):.3f}")
    console.print(table)


def _rounds(settings: Settings) -> str:
    return f"a ridge head, then {settings.num_rounds - 1} rounds" if settings.ridge_first else f"{settings.num_rounds} rounds"


def _head(plan: Plan) -> str:
    return "none" if not plan.head else plan.head + (" (new)" if plan.new_head else "")


def _bytes(settings: Settings, traffic: tuple[Traffic, ...]) -> Iterator[tuple[str, str]]:
    """A row for each kind of sites, one for all where they are alike."""
    if len({(kind.down, kind.up) for kind in traffic}) == 1:
        yield "bytes a round", f"{_moved(traffic[0])}, a site"
        return
    for name, kind in zip(("bytes a round", *[""] * ROWS), traffic[:ROWS], strict=False):
        told = f"of profile {kind.profile}" if kind.profile else "without a profile"
        yield name, f"{_moved(kind)}, a site {told} ({kind.sites} of {settings.num_supernodes})"
    if more := traffic[ROWS:]:
        yield "", f"at most {max(k.down for k in more):,} down and {max(max(k.up) for k in more):,} up, sites of other profiles"


def _moved(kind: Traffic) -> str:
    return f"{kind.down:,} down and {' or '.join(f'{up:,}' for up in dict.fromkeys(kind.up))} up"


def _facts(settings: Settings, plan: Plan) -> list[tuple[str, str]]:
    mechanism, privacy, train = plan.mechanism, settings.privacy, settings.train
    soft = ", to which AUTO-S scales every gradient" if privacy.clipping == "auto-s" else ""
    facts = [
        ("method", f"{settings.strategy}: schedule {plan.schedule}, filter {plan.filter}, head {_head(plan)}"),
        ("model", f"{settings.model.name}: {plan.trainable:,} trainable and {plan.frozen:,} frozen parameters"),
        ("sites", f"{settings.num_supernodes}, {plan.records} records each in an equal split"),
        ("steps", f"{_rounds(settings)} x {train.local_steps} local steps; at most {plan.steps} a site"),
        ("sample rate q", f"{mechanism.sample_rate:.4g} (expected batch {mechanism.expected_batch:.4g})"),
        ("learning rate", f"{plan.rate:.4g}" + ("" if train.lr else ", by rule from the noise")),
        *_bytes(settings, plan.traffic),
    ]
    if not settings.private:
        return [*facts, ("privacy", "NON-PRIVATE (privacy.epsilon = inf): no clip, no noise, no guarantee")]
    facts += [
        ("noise multiplier σ", f"{mechanism.noise_multiplier:.4f} on a clip norm C = {privacy.clip_norm:g}{soft}"),
        (
            "privacy",
            f"ε ≤ {privacy.epsilon:g} at δ = {privacy.delta:g}, one record of a site, add/remove, {privacy.accountant.upper()}",
        ),
    ]
    if plan.ridge_steps:
        share = settings.privacy.ridge_share
        of_head = f"σ = {plan.head_noise:.4f}, all records once: ε ≤ {share * privacy.epsilon:g} of the above alone"
        facts.append(("ridge head", of_head + (" and for one repeat" if plan.ridge_steps > 1 else "")))
    if plan.sharing:
        repeats = settings.rounds_per_site - settings.num_rounds + settings.ridge_first
        own = f"each of {plan.sharing} sites adds {plan.share:.4f} C, and the server sees their sum only"
        facts += [
            ("shared noise", f"{own}; ε holds if at most {plan.colluders} of them side with the server"),
            ("repeats", f"{repeats} rounds may be asked for again when a site drops out; privacy.max-rounds sets more"),
        ]
    if settings.data.partition == "dirichlet":
        facts.append(("note", "Dirichlet sites differ in size: each calibrates its own q and σ to the same ε"))
    return facts
