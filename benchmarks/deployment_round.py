"""Where the seconds of a round go in a real deployment, with and without the sites' resident trainers.

A SuperLink and SuperNodes with TLS and node authentication on loopback train a tiny text model, so that almost all of the
time is overhead. Two runs, one after the other: in the first every message loads everything anew (`resident-seconds=0`), in the
second trainers keep it. Prints the server's seconds per round and, from inside the sites' processes, what they are spent on:

    python -m benchmarks.deployment_round [--sites 2] [--rounds 4]

All sites share this machine's cores; the CPU seconds do not depend on what else runs on it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

TIMES = "LALORA_BENCHMARK_TIMES"  # environment variable: the folder to which the sites' processes write
STEPS = {  # functions of lalora_flwr.site.round, in the order of a round
    "admitted": "ledger, caps and noise calibration",
    "own_model": "base model, adapter and self-check",
    "counted_records": "records and their fingerprint",
    "train_round": "training (reserve, steps, commit)",
}
START, FIRST, SECOND, REST, HANDED = (
    "interpreter, Flower, app bundle, message",
    "imports of client_app",
    "imports of site (torch, peft, transformers, …)",
    "rest of the handler",
    "handed to the resident trainer, until its answer",
)
MEMORY = "MiB of a trainer"  # among the times: resident memory after the answer

Times = dict[str, tuple[float, float]]  # step -> seconds, and CPU seconds of all the process's threads

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """The real handler, with a clock around its parts."""
    times: Times = {START: (time.time() - psutil.Process().create_time(), time.process_time())}
    begun = _now()
    from lalora_flwr.client_app import resident
    from lalora_flwr.site.app import answer, as_asked

    times[FIRST] = _since(begun)
    begun = _now()
    if told := resident("train", message.content, context):
        times[HANDED] = _since(begun)
        times[MEMORY] = (_trainers_memory(context), 0.0)
        _write(message, times)
        return Message(told.content, reply_to=message)  # type: ignore[arg-type]
    from lalora_flwr.site import round as site
    from lalora_flwr.site.host import Host

    times[SECOND] = _since(begun)
    for function, step in STEPS.items():
        setattr(site, function, _timed(getattr(site, function), times, step))
    begun = _now()
    host = Host(simulated=False)
    reply = answer(lambda content, context: as_asked(site.train, host, content, context), message, context, lambda: 0.0)
    seconds, cpu = _since(begun)
    inside = [times.get(step, (0.0, 0.0)) for step in STEPS.values()]
    times[REST] = (seconds - sum(s for s, _ in inside), cpu - sum(c for _, c in inside))
    _write(message, times)
    return reply


def _write(message: Message, times: Times) -> None:
    server_round = message.content["config"]["server-round"]  # type: ignore[index, call-overload]
    (Path(os.environ[TIMES]) / f"{server_round}-{os.getpid()}.json").write_text(json.dumps(times))


def _trainers_memory(context: Context) -> float:
    """MiB of this site's trainer: the only one with this process's FLWR_HOME."""
    from lalora_flwr.site.resident.hand_over import BOOT

    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(BOOT) in process.cmdline() and process.environ().get("FLWR_HOME") == os.environ["FLWR_HOME"]:
                return float(process.memory_info().rss / 2**20)
    return 0.0


@app.query("identity")
def identity(message: Message, context: Context) -> Message:
    """The real answer."""
    from lalora_flwr.client_app import app as real

    return real(message, context)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(begun: tuple[float, float]) -> tuple[float, float]:
    seconds, cpu = _now()
    return seconds - begun[0], cpu - begun[1]


def _timed(function: Callable[..., Any], times: Times, step: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        begun = _now()
        try:
            return function(*arguments, **options)
        finally:
            times[step] = _since(begun)

    return call


def measure(folder: Path, sites: int, rounds: int, resident_seconds: float) -> tuple[list[float], list[Times]]:
    """Seconds of each round, and the times of each message; without the first round, which unpacks the app."""
    from lalora_flwr.engines.simulation import _write_app
    from lalora_flwr.settings import settings_from
    from tests.deployment.federation import ROOT, Federation
    from tests.deployment.texts import save_texts, text_run

    (folder / "times").mkdir(parents=True)
    os.environ |= {TIMES: str(folder / "times"), "PYTHONPATH": str(ROOT)}
    config = text_run(folder, num_rounds=rounds, num_supernodes=sites, privacy__epsilon=8.0)
    _write_app(folder / "app", settings_from(config), f"{__spec__.name if __spec__ else __name__}:app")
    with Federation(folder) as federation:
        federation.start_superlink()
        data = {f"site-{i}": save_texts(folder / f"site-{i}.csv", 60, seed=i) for i in range(sites)}
        federation.add_sites(data, {"resident-seconds": resident_seconds})
        run = federation.submit(config, folder / "app")
        status = federation.wait(run)
        if status != "finished:completed":
            raise SystemExit(federation.logs(run))
    lines = [json.loads(line) for line in (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    files = [path for path in sorted((folder / "times").iterdir()) if not path.name.startswith("1-")]
    return [line["seconds"] for line in lines[1:]], [json.loads(path.read_text()) for path in files]


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    chosen = parser.parse_args()
    for resident_seconds in (0, 600):
        with tempfile.TemporaryDirectory(prefix="lalora-") as scratch:
            seconds, messages = measure(Path(scratch) / "run", chosen.sites, max(2, chosen.rounds), resident_seconds)
        load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        print(f"\nresident-seconds={resident_seconds}: {chosen.sites} sites, {len(seconds)} rounds after the first, {load}\n")
        _print(seconds, messages)


def _print(seconds: list[float], messages: list[Times]) -> None:
    print("| seconds of a round | passed | on a CPU |\n|---|---|---|")
    spent = 0.0
    for step in (START, FIRST, SECOND, *STEPS.values(), REST, HANDED):
        if not any(step in times for times in messages):
            continue
        passed, cpu = (mean(times.get(step, (0.0, 0.0))[i] for times in messages) for i in (0, 1))
        spent += passed
        print(f"| site: {step} | {passed:.2f} | {cpu:.2f} |")
    print(f"| Flower's polling and transport, the server's merge and evaluation | {mean(seconds) - spent:.2f} | |")
    print(f"| **the round, on the server** | **{mean(seconds):.2f}** ({min(seconds):.2f} to {max(seconds):.2f}) | |")
    if memory := [times[MEMORY][0] for times in messages if MEMORY in times]:
        print(f"\n{MEMORY}: {max(memory):.0f}")


if __name__ == "__main__":
    main()
