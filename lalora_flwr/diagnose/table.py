"""Diagnoses side by side, as a Markdown table with one column each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lalora_flwr.diagnose.diagnosis import Diagnosis
from lalora_flwr.diagnose.noise import SPANS, Amplified
from lalora_flwr.server.metrics import HEADLINES

Value = Callable[[Diagnosis], float | None]
ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """Diagnoses that are shown as one: a run, or those that differ in their seed alone."""

    name: str
    runs: tuple[Diagnosis, ...]

    def values(self, of: Value) -> list[float]:
        """The runs' numbers, as far as there are any."""
        return [value for run in self.runs if (value := of(run)) is not None and math.isfinite(value)]


@dataclass(frozen=True)
class Row:
    """A quantity: its name with its unit, how a run's number is found, and how it is written."""

    name: str
    of: Value
    form: str = ".3g"
    scale: float = 1.0


def _whole(run: Diagnosis, take: Callable[[Amplified], float | None]) -> float | None:
    return take(run.amplification.whole) if run.amplification.whole else None


def share_of_product(run: Diagnosis, span: str) -> float | None:
    """‖N_B N_A‖ over the length of the noise that one factor alone brings in; 0 if no noise is in both."""
    return _whole(run, lambda whole: whole.product[span] / whole.linear[span] if whole.linear[span] else None)


def _product(span: str) -> Value:
    return lambda run: _whole(run, lambda whole: whole.product[span])


def _share(span: str) -> Value:
    return lambda run: share_of_product(run, span)


ROWS = (
    Row("public loss", lambda run: run.loss),
    Row("signal-to-noise of the mean update", lambda run: run.released.snr),
    Row("… of A", lambda run: run.released.snr_A),
    Row("… of B", lambda run: run.released.snr_B),
    Row("cosine of sites' updates of A", lambda run: run.released.cosine_A),
    Row("… without their noise", lambda run: run.released.clean_cosine_A),
    Row("cosine of sites' updates of B", lambda run: run.released.cosine_B),
    Row("… without their noise", lambda run: run.released.clean_cosine_B),
    Row("coupling of the moves of A and B", lambda run: run.released.coupling),
    Row("cross term of a round's moves", lambda run: run.released.cross_term),
    Row("aggregation bias", lambda run: run.released.aggregation_bias),
    *(Row(f"noise ‖N_B N_A‖ after a {span}", _product(span)) for span in SPANS),
    *(Row(f"… over ‖B N_A + N_B A‖, {span}", _share(span)) for span in SPANS),
    Row("largest Hessian eigenvalue, merged weights", lambda run: run.merged.value if run.merged else None),
    Row("… adapter's tensors", lambda run: run.adapter.value),
    Row("seconds a round", lambda run: run.cost.seconds),
    Row("kB up a round, all sites", lambda run: run.cost.bytes_up, ".4g", 1e-3),
    Row("kB down a round, all sites", lambda run: run.cost.bytes_down, ".4g", 1e-3),
    Row("peak memory, MiB", lambda run: run.cost.peak_memory_mb, ".4g"),
)


def cell(values: Sequence[float], row: Row) -> str:
    """Mean ± standard deviation; how many runs there are is the column's to say."""
    if not values:
        return ABSENT
    scaled = [value * row.scale for value in values]
    text = f"{statistics.fmean(scaled):{row.form}}"
    return text if len(scaled) < 2 else f"{text} ± {statistics.stdev(scaled):.2g}"


def markdown(columns: Sequence[Column]) -> str:
    """The table, and below it what is not known of which run and why."""
    metrics = dict.fromkeys(HEADLINES[run.metric] for column in columns for run in column.runs)
    first = Row(f"public {' or '.join(metrics)} (%)", lambda run: run.score, ".1f", 100)
    lines = ["| | " + " | ".join(column.name for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in (first, *ROWS):
        cells = [cell(column.values(row.of), row) for column in columns]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    notes = dict.fromkeys(f"- {column.name}: {note}" for column in columns for run in column.runs for note in run.notes)
    return "\n".join(lines) + "\n" + ("\n" + "\n".join(notes) + "\n" if notes else "")
