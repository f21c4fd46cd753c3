"""The comparison as Markdown: what makes it fair, the scores, and how the tuned values were chosen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lalora_flwr.compare import budget
from lalora_flwr.compare.cells import Labels, Tuned, tuned_label
from lalora_flwr.compare.grid import LR, label_of
from lalora_flwr.compare.results import Result, by_epsilon, by_method, metric_name
from lalora_flwr.compare.tuning import WORST, Choice, choose
from lalora_flwr.ground.words import epsilon_label
from lalora_flwr.settings import Value


@dataclass(frozen=True)
class Tuning:
    """What was tuned: the values of each key, and the keys that hold only while tuning."""

    axes: Mapping[str, tuple[Value, ...]]
    only_tuning: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """Scores of one table cell over the seeds; ``std`` is the sample standard deviation (nan for one run)."""

    mean: float
    std: float
    count: int

    @staticmethod
    def of(scores: Sequence[float]) -> Spread:
        std = statistics.stdev(scores) if len(scores) > 1 else math.nan
        return Spread(statistics.fmean(scores), std, len(scores))

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.std / math.sqrt(self.count)

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f}" + ("" if math.isnan(self.std) else f" ± {100 * self.std:.1f}")


def spread(results: Sequence[Result]) -> Spread | None:
    """Over the runs that have a score; None if there is none."""
    found = [result.score for result in results if result.score is not None]
    return Spread.of(found) if found else None


def leader(spreads: Mapping[str, Spread | None]) -> str | None:
    """The best method if its lead over the next exceeds their combined standard error, else None."""
    ranked = sorted(((s, name) for name, s in spreads.items() if s), key=lambda pair: -pair[0].mean)
    if len(ranked) < 2:
        return None
    (best, name), (second, _) = ranked[:2]
    return name if best.mean - second.mean > math.hypot(best.error, second.error) else None  # nan compares as False


def choices_of(results: Sequence[Result], axes: Mapping[str, tuple[Value, ...]]) -> dict[Labels, Choice]:
    """Each combination's choice; where final runs exist, what they used is the winner."""
    scores: dict[Labels, dict[Tuned, list[float | None]]] = {}
    for result in results:
        if result.is_tuning:
            scores.setdefault(result.labels, {}).setdefault(result.tuned, []).append(result.score)
    return {labels: choose(by_value, axes) for labels, by_value in scores.items()}


def markdown(results: Sequence[Result], tuning: Tuning | None = None) -> str:
    """The whole report.

    Args:
        results: all runs, failed ones too.
        tuning: what was tuned; None if nothing was.
    """
    final = [result for result in results if result.is_final]
    choices = choices_of(results, tuning.axes) if tuning else {}
    parts = ["# Comparison"]
    if final:
        parts += [*budget.rule(final, tuning_text(results, tuning) if tuning else None), *_scores(final, choices)]
    else:
        parts.append("No tuned value has a finished run for every seed, so there is nothing to compare.")
    if frozen := _frozen(final):
        parts.append(frozen)
    if failed := [result for result in final if result.failure]:
        reasons = "; ".join(dict.fromkeys(" ".join(result.failure.split()) for result in failed))
        parts.append(f"{len(failed)} of {len(final)} runs have no result and are left out: {reasons}.")
    parts += budget.privacy(final, tuned=bool(tuning))
    if tuning:
        parts += ["## Tuning", *_tuning_table(results, choices)]
    return "\n\n".join(parts) + "\n"


def tuning_text(results: Sequence[Result], tuning: Tuning) -> str:
    """How the tuned keys were chosen, as part of the equal-budget sentence."""
    runs = [result for result in results if result.is_tuning]
    names = {"train.lr": "learning rate"}
    keys = " and ".join(
        f"{names.get(key, key)} tuned for each method and ε on the same grid [{', '.join(map(label_of, values))}]"
        for key, values in tuning.axes.items()
    )
    seeds = sorted({int(result.values["seed"]) for result in runs})
    on = f"; tuned on {_count(len(seeds), 'seed')} ({', '.join(map(str, seeds))})"
    if tuning.only_tuning:
        on += " with " + ", ".join(f"{key} = {label_of(value)}" for key, value in tuning.only_tuning.items())
    if not any(key.startswith("data.test") for key in tuning.only_tuning):
        on += f", by the {metric_name(runs)} on the same test records that the table reports"
        on += ", which makes the best a little optimistic"
    return keys + on


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _scores(final: Sequence[Result], choices: Mapping[Labels, Choice]) -> list[str]:
    """The table and its footnotes."""
    columns = by_epsilon(final)
    rows = list(dict.fromkeys(result.method for result in final))
    cells = {
        (name, epsilon): [result for result in runs if result.method == name]
        for epsilon, runs in columns.items()
        for name in rows
    }
    one_metric = len({result.summary.metric for result in final if result.summary}) == 1
    leaders = {eps: leader({name: spread(cells[name, eps]) for name in rows}) if one_metric else None for eps in columns}
    show_lr = len({result.lr for result in final}) > 1 and not any(axis == LR for r in final for axis, _ in r.labels)
    lines = [_line("method", *(epsilon_label(epsilon, said=True) for epsilon in columns)), _line(*["---"] * (len(columns) + 1))]
    edge = False
    for name in rows:
        texts = []
        for epsilon in columns:
            runs = cells[name, epsilon]
            choice = choices.get(runs[0].labels) if runs else None
            edge |= bool(choice and choice.edge)
            texts.append(_cell(runs, choice, show_lr, bold=leaders[epsilon] == name))
        lines.append(_line(name, *texts))
    notes = [f"{_capital(metric_name(final))} of the last round in percent, mean ± sample standard deviation over the seeds."]
    if not one_metric:
        notes.append("No method is bold, because the runs are measured by different metrics.")
    elif len(rows) > 1:
        notes.append(_bold_note(any(leaders.values())))
    if edge:
        notes.append("`*` The chosen value is the first or the last of its grid: a better one may lie beyond.")
    return ["\n".join(lines), "\n".join(notes)]


def _bold_note(any_bold: bool) -> str:
    rule = "leads the next method of its column by more than the combined standard error of the two"
    return f"Bold: {rule}." if any_bold else f"No method is bold, because none {rule}."


def _cell(runs: Sequence[Result], choice: Choice | None, show_lr: bool, bold: bool) -> str:
    found = spread(runs)
    if found is None:
        return "none" if runs else "—"
    text = f"**{found}**" if bold else str(found)
    if runs[0].tuned:
        text += f" ({tuned_label(runs[0].tuned)}{'*' if choice and choice.edge else ''})"
    elif show_lr:
        text += f" (lr {', '.join(label_of(lr) for lr in sorted({run.lr for run in runs}))})"
    return text + (f", {found.count} of {len(runs)} runs" if found.count < len(runs) else "")


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _frozen(final: Sequence[Result]) -> str:
    found = {round(100 * value, 1) for result in final if (value := result.frozen_score) is not None}
    if not found:
        return ""
    low, high = min(found), max(found)
    return f"The frozen model alone: {low:.1f}." if low == high else f"The frozen models alone: {low:.1f} to {high:.1f}."


def _tuning_table(results: Sequence[Result], choices: Mapping[Labels, Choice]) -> list[str]:
    """Mean score of the tuning runs by value; the chosen one is marked."""
    values = list(dict.fromkeys(tuned for choice in choices.values() for tuned in choice.means))
    sample = {result.labels: result for result in results}
    lines = [_line("method", "ε", *(tuned_label(value) for value in values)), _line(*["---"] * (len(values) + 2))]
    for name, runs in by_method(sample[labels] for labels in choices):
        for result in sorted(runs, key=lambda r: r.epsilon):
            choice = choices[result.labels]
            texts = [_mean(choice.means.get(value), value == choice.winner) for value in values]
            lines.append(_line(name, label_of(result.epsilon), *texts))
    note = f"Mean {metric_name(results)} of the tuning runs in percent; `←` marks the chosen value (of equal ones the smaller)."
    if any(mean == WORST for choice in choices.values() for mean in choice.means.values()):
        note += " failed: a run at this value failed or diverged, which counts as worst."
    return ["\n".join(lines), note]


def _mean(mean: float | None, chosen: bool) -> str:
    if mean is None:
        return "—"
    return "failed" if mean == WORST else f"{100 * mean:.1f}" + (" ←" if chosen else "")
