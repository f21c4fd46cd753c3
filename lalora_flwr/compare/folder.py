"""The folder of a comparison: which one it belongs to, what its runs are for, and what is written at the end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from lalora_flwr.compare.cells import Labels, Plan, Role
from lalora_flwr.compare.grid import RESERVED
from lalora_flwr.compare.results import Result, csv_text, is_finished, read_run
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.extras import missing
from lalora_flwr.ground.figures import MODULE, SUFFIXES, rendered
from lalora_flwr.ground.files import PUBLIC, lock, replace_file
from lalora_flwr.settings import Value, flatten

RECORD, RUNS, LOCK = "comparison.json", "runs", ".lock"


def identity(plan: Plan) -> dict[str, object]:
    """What makes two comparisons the same, as plain JSON: the base, the axes and how they are tuned."""
    grid = plan.grid
    plain: dict[str, object] = json.loads(
        json.dumps(
            {
                "base": {key: repr(value) for key, value in sorted(grid.base.items()) if key not in RESERVED},
                "over": {
                    axis: [[option.label, {key: repr(value) for key, value in option.values.items()}] for option in options]
                    for axis, options in grid.over.items()
                },
                "tune": {key: [repr(value) for value in values] for key, values in grid.tune.items()},
                "tuning": {"seed": list(grid.tuning_seeds), "set": {k: repr(v) for k, v in grid.tuning_set.items()}},
            }
        )
    )
    return plain


def claim(plan: Plan, out: Path) -> None:
    """Make the folder this comparison's, or find that it is.

    Raises:
        ConfigError: if it holds something else, or cannot be made.
    """
    record = out / RECORD
    try:
        if record.exists():
            if json.loads(record.read_text(encoding="utf-8"))["identity"] != identity(plan):
                raise ConfigError(f"--out {out}: holds another comparison; choose another folder")
            return
        if out.exists() and any(path.name != LOCK for path in out.iterdir()):
            raise ConfigError(f"--out {out}: holds something else; choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        replace_file(record, _record(plan, []), mode=PUBLIC)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"--out {out}: {RECORD} is damaged; choose another folder") from None


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder: two commands at work in it would remove each other's unfinished runs.

    Raises:
        ConfigError: if another command holds it, or it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = lock(out / LOCK)
    except BlockingIOError:
        raise ConfigError(f"--out {out}: another lalora compare is at work there") from None
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from None
    with held:
        yield


def save_roles(plan: Plan, out: Path, roles: Sequence[Role]) -> None:
    """What each run is for, so that `lalora report` reads the folder as the comparison it is."""
    replace_file(out / RECORD, _record(plan, roles), mode=PUBLIC)


class _Use(TypedDict):
    """What a run is for: a combination, and the stages that need it there."""

    labels: dict[str, str]
    tuned: dict[str, Value]
    stages: list[str]


def _record(plan: Plan, roles: Sequence[Role]) -> str:
    runs: dict[str, list[_Use]] = {}
    for role in roles:
        new = _Use(labels=dict(role.labels), tuned=dict(role.tuned), stages=[role.stage])
        known = runs.setdefault(role.cell.name, [])
        same = [use for use in known if use["labels"] == new["labels"]]
        for use in same:
            use["stages"] += [stage for stage in new["stages"] if stage not in use["stages"]]
        if not same:
            known.append(new)
    content = {"identity": identity(plan), "tune": _tuning_facts(plan), "runs": runs}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _tuning_facts(plan: Plan) -> dict[str, object]:
    set_ = {key: value if value != float("inf") else "inf" for key, value in plan.grid.tuning_set.items()}
    return {"values": {key: list(values) for key, values in plan.grid.tune.items()}, "set": set_}


def results_of(out: Path, roles: Sequence[Role], failures: Mapping[str, str]) -> list[Result]:
    """A result for each run and combination, in the order of the roles; a run that both stages use appears once."""
    stages: dict[tuple[Labels, str], list[str]] = {}
    first: dict[tuple[Labels, str], Role] = {}
    for role in roles:
        key = role.labels, role.cell.name
        first.setdefault(key, role)
        if role.stage not in stages.setdefault(key, []):
            stages[key].append(role.stage)
    return [_result(out, role, tuple(stages[key]), failures) for key, role in first.items()]


def _result(out: Path, role: Role, stages: tuple[str, ...], failures: Mapping[str, str]) -> Result:
    path = out / RUNS / role.cell.name
    if not is_finished(path):
        reason = failures.get(role.cell.name, "not finished")
        return Result(path, role.labels, flatten(role.cell.settings), role.tuned, stages, failure=reason)
    values, summary, metrics = read_run(path)
    return Result(path, role.labels, values, role.tuned, stages, summary, metrics)


def write_report(out: Path, results: Sequence[Result], markdown: str) -> None:
    """``results.csv``, ``results.md`` and ``plots/*`` (PNG, SVG, PDF), each whole or not at all; plots of an earlier report go.

    Without matplotlib there are no plots.

    Raises:
        ConfigError: if the folder cannot be written.
    """
    from lalora_flwr.compare.figures import figures

    plots = out / "plots"
    try:
        plots.mkdir(parents=True, exist_ok=True)
        replace_file(out / "results.csv", csv_text(results, out), mode=PUBLIC)
        shown = () if missing(MODULE, "plots") else figures(results)
        drawn = {name + suffix: content for name, figure in shown for suffix, content in rendered(figure).items()}
        for name, content in drawn.items():
            replace_file(plots / name, content, mode=PUBLIC)
        for name in _stale(drawn):
            (plots / name).unlink(missing_ok=True)
        replace_file(out / "results.md", markdown, mode=PUBLIC)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from None


def _stale(drawn: Iterable[str]) -> list[str]:
    from lalora_flwr.compare.figures import NAMES

    return [name + suffix for name in NAMES for suffix in SUFFIXES if name + suffix not in drawn]
