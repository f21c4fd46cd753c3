"""A simulation's cost: CPU-seconds and seconds of a round, start, and memory of all processes, ours and peers'.

    python -m benchmarks.simulation                      100 sites, 10 a round, K = 1 and 10, b = 4, 10 and 40; without peers
    python -m benchmarks.simulation --sites 10 1000 --steps 1 --batch 10 --variants bare inline textbook
    python -m benchmarks.simulation --model minilm --batch 4 10 --strategy la-lora
    python -m benchmarks.simulation --peer pfl=/tmp/peers/pfl/bin/python --peer fluke=/tmp/peers/fluke/bin/python
    python -m benchmarks.simulation --check              whether all of them do the same work, instead of measuring

One federated job (`benchmarks.job`): made-up records, LoRA of rank 4, per-record clip and noise, mean. Each row is a process of
its own, run in turns ``--repeats`` times; the fastest counts.

    bare         a loop by hand: this package's gradients, clip and noise in float32, mean; no messages, ledger or files
    bare, spread  the same in a process for each processor, which slow each other: what Ray can be held to
    inline       ``lalora run --engine inline``: sites share passes where that pays
    one by one   the same, each site's passes alone
    ray          ``lalora run``: Flower's simulation, one worker a processor
    opacus       a loop by hand with Opacus: hooks and DPOptimizer
    textbook     Flower's simulation with a NumPyClient and Opacus' PrivacyEngine, as Flower's examples have it
    textbook, model kept     the same, but a worker keeps its model, and only LoRA's factors travel
    pfl, fluke, blazefl, nvflare     the framework holds the sites, moves the model and averages; its local training calls the
                 bare loop's step. Their own privacy is another: pfl's is a user's, fluke's DPFedAVG wraps Opacus

Peers need an environment each, outside of this repository. Three share this environment's packages by a .pth file; BlazeFL wants
Python 3.12 (version 3: 3.14), and so all packages anew:

    python -m venv /tmp/peers/pfl                                                  likewise fluke, nvflare
    python -c "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])" > \\
        /tmp/peers/pfl/lib/python3.11/site-packages/base.pth
    /tmp/peers/pfl/bin/pip install --no-deps pfl prv-accountant
    /tmp/peers/fluke/bin/pip install --no-deps fluke-fl diskcache cerberus hydra-core omegaconf antlr4-python3-runtime==4.9.3 \\
        torchmetrics lightning-utilities seaborn
    /tmp/peers/nvflare/bin/pip install --no-deps nvflare Flask Flask-JWT-Extended Flask-SQLAlchemy gunicorn pyhocon docker msgpack
    python3.12 -m venv /tmp/peers/blazefl && /tmp/peers/blazefl/bin/pip install . blazefl==2.0.3

A round's numbers are the lower quartile of the later half of the rounds (under Ray their mean), without the last, in which ours
evaluates; ``start`` is wall time from the process's start to the end of the first round; ``memory`` is the largest sum over the
process and all below it (PSS), seen once a second.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from importlib.metadata import version
from pathlib import Path

from benchmarks.child import PEERS, SPREAD, VARIANTS, Failed, measured
from benchmarks.clocks import Numbers
from benchmarks.job import MODELS, STRATEGIES, Job, save_minilm
from benchmarks.machine import processor
from benchmarks.same_work import TOLERANCE, checked

OPACUS_WANTS = "dp-lora"  # hooks do not survive factors that alternate
ROUNDS = {"vit": {1: 60, 10: 12}, "minilm": {1: 10, 10: 5}}
HEADS = ("sites", "a round", "K", "b", "", "CPU-s a round", "of bare", "s a round", "start (s)", "memory (MB)")


def rounds_of(variant: str, model: str, steps: int) -> int:
    """More with several workers, whose clocks are coarse and whose rounds Ray shows with a delay."""
    usual = ROUNDS[model].get(steps, max(4, 60 // steps))
    return usual * 3 if variant in SPREAD else usual


def row(job: Job, variant: str, found: Numbers, floor: float) -> str:
    cpu, rest = found["cpu"], f"{found['wall']:.3f} | {found['start']:.1f} | {found['memory']:.0f}"
    return f"| {job.sites} | {job.cohort} | {job.steps} | {job.batch} | {variant} | {cpu:.3f} | {cpu / floor:.2f} | {rest} |"


def measure(asked: argparse.Namespace, job: Job, pythons: dict[str, str]) -> None:
    """The rows of a job."""
    best: dict[str, Numbers] = {}
    out: set[str] = set()
    for _ in range(asked.repeats):
        for variant in asked.variants:
            if variant in out:
                continue
            here = Job(**{**job.__dict__, "rounds": rounds_of(variant, job.model, job.steps)})
            try:
                found = measured(variant, here.text(), pythons)
            except Failed as failed:
                print(f"<!-- {failed} -->", flush=True)
                out.add(variant)
                continue
            kept = best.setdefault(variant, found)
            best[variant] = {name: min(kept[name], found[name]) for name in found}
    floor = best.get("bare", {}).get("cpu", math.nan)
    for variant, found in best.items():
        print(row(job, variant, found, floor), flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[100])
    parser.add_argument("--cohort", type=int, default=10)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 10, 40])
    parser.add_argument("--model", choices=MODELS, default="vit")
    parser.add_argument("--strategy", choices=STRATEGIES, default="dp-lora", help="la-lora leaves out the rows with Opacus")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=f"NAME of {', '.join(PEERS)}")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    if min(asked.sites) < asked.cohort:
        parser.error(f"--cohort {asked.cohort}: must be at most the fewest sites, {min(asked.sites)}")
    for peer in asked.peer:
        name, _, python = peer.partition("=")
        if name not in PEERS or not Path(python).is_file():
            parser.error(f"--peer {peer}: must be NAME=PYTHON with a NAME of {', '.join(PEERS)} and the path of its Python")
    return asked


def main() -> None:
    asked = parsed()
    pythons = dict(peer.split("=", 1) for peer in asked.peer)
    missing = [name for name in asked.variants if name in PEERS and name not in pythons]
    asked.variants = [name for name in asked.variants if name not in missing]
    if asked.strategy != OPACUS_WANTS:
        asked.variants = [name for name in asked.variants if "opacus" not in name and "textbook" not in name]
    with tempfile.TemporaryDirectory() as folder:
        if asked.model == "minilm":
            save_minilm(Path(folder))
        jobs = [
            Job(sites, asked.cohort, steps, batch, 2, model=asked.model, strategy=asked.strategy, folder=folder)
            for sites in asked.sites
            for steps in asked.steps
            for batch in asked.batch
        ]
        libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "flwr", "opacus"))
        print(f"{processor()}, {libraries}, one thread a process; {asked.model}, {asked.strategy}")
        for name in missing:
            print(f"left out: {name}; --peer {name}=PYTHON names the Python of an environment with it (see --help)")
        if asked.check:
            check(jobs[-1], asked.variants, pythons)
            return
        print(f"\n| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|", flush=True)
        for job in jobs:
            measure(asked, job, pythons)


def check(job: Job, variants: list[str], pythons: dict[str, str]) -> None:
    """One line for each variant; ends with exit code 1 if one did other work, or none."""
    worst = 0.0
    try:
        for variant, difference in checked(job, variants, pythons):
            print(f"{variant:<22} {difference:.1e} of the largest change, two rounds, {job.steps} steps", flush=True)
            worst = max(worst, difference)
    except Failed as failed:
        raise SystemExit(str(failed)) from None
    if not worst <= TOLERANCE:
        raise SystemExit(f"not the same work: more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
