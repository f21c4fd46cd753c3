"""Whether all variants do the same work: with the same records, batches and noise, two rounds leave the same adapter.

A variant that calls `LocalTraining` has the job's own sites, batches and noise, and is held to the bare loop's adapter with them.
One that draws for itself gets a job in which nothing is left to draw: every site in each round, every record in each step, no
noise.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.child import Failed, measured
from benchmarks.job import Job, State, settings_of
from lalora_flwr.training.learner import ModelStore

TOLERANCE = 2e-5  # of the largest change of the adapter: float32 sums in another order, over 20 steps
DRAWN = ("bare, spread", "pfl", "fluke", "blazefl")  # take the job's own sites, batches and noise
ALL_SITES = ("nvflare",)  # picks its sites by itself
OPACUS = ("opacus", "textbook", "textbook, model kept")
OURS = ("inline", "one by one", "ray")  # without noise they do not clip either

Run = Callable[[str, str, Mapping[str, str], str], object]  # variant, job, pythons, file


def checked(job: Job, variants: Sequence[str], pythons: Mapping[str, str], run: Run = measured) -> Iterator[tuple[str, float]]:
    """Each variant with its largest difference from the bare loop, in units of the largest change of the adapter.

    Args:
        job: of which model, strategy, steps and batch count.
        variants: some of those of `benchmarks.child`.
        pythons: of peers with an environment of their own.
        run: runs a variant and leaves its adapter in a file, as `measured` does.

    Raises:
        Failed: a variant ended early, or trains other tensors.
    """
    small = dataclasses.replace(job, sites=20, cohort=10, rounds=2)
    everything = dataclasses.replace(small, sites=10, full=True, noise=0.0)
    groups = {
        DRAWN: small,
        ALL_SITES: dataclasses.replace(small, sites=10),
        OPACUS: dataclasses.replace(everything, strategy="dp-lora"),
        OURS: dataclasses.replace(everything, clip=math.inf),
    }
    with tempfile.TemporaryDirectory() as folder:
        start = ModelStore().learner(settings_of(small, folder)).initial
        for names, of_group in groups.items():
            here = [name for name in variants if name in names]
            if not here:
                continue
            floor = _left(run, "bare", of_group, {}, folder)
            moved = max(float((floor[name] - start[name]).abs().max()) for name in floor)
            for variant in here:
                found = _left(run, variant, of_group, pythons, folder)
                if found.keys() != floor.keys():
                    raise Failed(f"{variant}: trains other tensors than the bare loop")
                yield variant, max(float((found[name] - floor[name]).abs().max()) for name in floor) / moved


def _left(run: Run, variant: str, job: Job, pythons: Mapping[str, str], folder: str) -> State:
    path = Path(folder) / "state.safetensors"
    path.unlink(missing_ok=True)
    run(variant, job.text(), pythons, str(path))
    return dict(load_file(path))
