"""One whole run on the server: rounds, evaluation on public records, and what is written down."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.supercore.run import RunNotRunningException

from lalora_flwr.adapter.earlier import load_earlier
from lalora_flwr.data.data_set import data_set
from lalora_flwr.ground.errors import LaloraError, NoSiteLeft, RunFailed, WorkerDied
from lalora_flwr.ground.processors import check_threads, processors
from lalora_flwr.methods.method import method_of
from lalora_flwr.server.adapters import save_adapters
from lalora_flwr.server.asking import patience
from lalora_flwr.server.best import Best
from lalora_flwr.server.certificate import certificate
from lalora_flwr.server.ending import STOPPED, last_word
from lalora_flwr.server.exchange import RoundReport
from lalora_flwr.server.folder import WORKER_DIED, Checkpoint, RunFolder
from lalora_flwr.server.following import Followers
from lalora_flwr.server.metrics import OnRound, Quality, RoundMetrics, headline
from lalora_flwr.server.personal import personal_quality
from lalora_flwr.server.place import named
from lalora_flwr.server.plots import score_figure
from lalora_flwr.server.resuming import check_same_run, choices
from lalora_flwr.server.ridge_stage import RidgeStage
from lalora_flwr.server.roster import Roster
from lalora_flwr.server.strategy import FederatedStrategy
from lalora_flwr.server.summing_up import peak_memory_mb, summary_of
from lalora_flwr.server.tested import check_measurable, tested
from lalora_flwr.server.trackers.tracker import Tracker
from lalora_flwr.server.tracking import trackers_of
from lalora_flwr.server.watched import WatchedGrid, watched
from lalora_flwr.settings import Settings
from lalora_flwr.training.evaluate import evaluate
from lalora_flwr.training.learner import Learner, ModelStore
from lalora_flwr.wire.tensors import to_arrays, to_tensors


def run_federation(
    settings: Settings,
    grid: Grid,
    on_round: OnRound | None = None,
    at_exit: Callable[[Callable[[], None]], None] = lambda handler: None,
    models: ModelStore | None = None,
    records: Sequence[int] = (),
    trackers: Mapping[str, Tracker] | None = None,
) -> Path:
    """Run all rounds, or with ``resume`` those after the last checkpoint, and write the run folder.

    Args:
        settings: the run.
        grid: reaches the sites.
        on_round: gets each line of metrics as it is written.
        at_exit: takes a function that the process calls when it is told to end; the run's folder then says so.
        models: where the frozen model comes from; default: a store of its own.
        records: of each virtual site; none: as the run's data are split.
        trackers: who follows the run, by name; default: those that its settings name.

    Returns:
        The run folder.

    Raises:
        ConfigError: before anything is written.
        RunFailed: if the run stopped; the folder then says why in ``failure.json``.
    """
    settings = named(settings)
    trackers = trackers_of(settings) if trackers is None else trackers
    grid = watched(grid)
    real = isinstance(grid, WatchedGrid)
    if not real and not os.environ.get("RAY_ADDRESS"):  # virtual sites compute here, unless Ray joins a cluster
        check_threads(settings.train.num_threads)
    torch.set_num_threads(min(settings.train.num_threads, processors()))  # the same arithmetic in every engine
    models = models or ModelStore()
    learner = models.learner(settings)
    if not settings.resume:
        load_earlier(learner.adapter, learner.base, settings.lora)  # refused before there is a folder
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder(settings))
        stack.enter_context(last_word(folder, at_exit))
        followers = stack.enter_context(Followers(settings, folder.path, trackers, on_round))
        try:
            run_id = str(grid.run.run_id) if real else ""
            run = _Run(settings, learner, folder, followers, Roster(settings, real=real, records=records), models, run_id)
            start = run.restore() if settings.resume else run.start()
            run.finish(ended_early=run.serve(grid, start))
        except RunNotRunningException:
            folder.fail(STOPPED)
            raise RunFailed(STOPPED) from None
        except LaloraError as error:
            folder.fail(str(error), WORKER_DIED if isinstance(error, WorkerDied) else "")
            raise
        except Exception as error:
            folder.fail(f"unexpected {type(error).__name__}: {error}")
            raise
        return folder.path


class _Run:
    """The server's bookkeeping over the rounds."""

    def __init__(
        self,
        settings: Settings,
        learner: Learner,
        folder: RunFolder,
        followers: Followers,
        roster: Roster,
        models: ModelStore,
        run_id: str,
    ) -> None:
        self._run_ids = [run_id] if run_id else []  # of Flower: a resumed run has had others
        self._settings, self._learner, self._folder, self._models = settings, learner, folder, models
        self._test = data_set(settings).public(learner.base.encode)
        self._followers = followers
        self._metrics: list[RoundMetrics] = []
        self._frozen: Quality = {}
        self._best, self._started_from = Best(folder.path / "checkpoint"), ""
        self._last: Quality = {}  # of the last round's own adapter, if the run's is an average
        self._report = RoundReport(0)
        self._begun = self._round_begun = time.monotonic()
        self._seconds_before = 0.0
        digest = learner.base.provenance.digest
        method_of(settings).check_moves(learner.adapter.layout, settings)
        self.strategy = FederatedStrategy(settings, learner.adapter.layout, self._keep, digest, folder.save_asked, roster)
        self._roster = roster

    def _keep(self, report: RoundReport) -> None:
        self._report = report

    def serve(self, grid: Grid, start: dict[str, torch.Tensor]) -> str:
        """All rounds that are left. Returns why a resumed run lacks the last of them: lost rounds were served too."""
        if self._settings.ridge_first and not self.strategy.done:
            start = self._ridge_head(grid, start)
        rounds = self._settings.num_rounds - self.strategy.done
        try:
            self.strategy.start(
                grid, to_arrays(start), num_rounds=rounds, timeout=patience(self._settings), evaluate_fn=self.after_round
            )
        except NoSiteLeft as reason:
            if not (self._settings.resume and self._metrics):
                raise
            return str(reason)
        return ""

    def start(self) -> dict[str, torch.Tensor]:
        """The first adapter."""
        self._learner.adapter.load(self._learner.initial)
        self._started_from = load_earlier(self._learner.adapter, self._learner.base, self._settings.lora)
        return self._learner.adapter.prepared(self._learner.base, self._test)

    def restore(self) -> dict[str, torch.Tensor]:
        """Go on after the last checkpoint, if there is one; the adapter to go on with."""
        checkpoint, asked = self._folder.load_checkpoint(), self._folder.load_asked()
        if checkpoint is None:
            self._folder.go_on_after(0)
            self.strategy.restore(0, {}, {}, asked)
            return self.start()
        check_same_run(checkpoint, self._settings, self._learner.adapter.layout)
        state = checkpoint.state
        self._metrics = self._folder.metrics_of(state)
        self._frozen, self._last = state.get("frozen", {}), state.get("last", {})  # a checkpoint of an older version has none
        self._best.restore(state.get("best", {}))
        self._started_from = state.get("started_from", "")
        self._seconds_before = state["seconds"]
        self._run_ids = [*state.get("run_ids", ()), *self._run_ids]
        self._followers.resumed(self._metrics)
        self.strategy.restore(checkpoint.server_round, state["strategy"], checkpoint.tensors, asked)
        return checkpoint.adapter

    def _seconds(self) -> float:
        """Of this attempt and of those it resumed, each up to its last checkpoint."""
        return round(self._seconds_before + time.monotonic() - self._begun, 3)

    def _checkpoint(self, server_round: int, adapter: dict[str, torch.Tensor]) -> Checkpoint:
        state = {
            "metrics_size": self._folder.metrics_size,
            "choices": choices(self._settings),
            "frozen": self._frozen,
            "last": self._last,
            "best": self._best.state(),
            "started_from": self._started_from,
            "seconds": self._seconds(),
            "run_ids": self._run_ids,
            "strategy": self.strategy.state(),
        }
        return Checkpoint(server_round, adapter, state, self.strategy.tensors())

    def after_round(self, round_of_attempt: int, arrays: ArrayRecord) -> MetricRecord:
        """Evaluate, write the checkpoint and the round's line. Round 0 is the frozen model."""
        server_round = self.strategy.done + round_of_attempt
        state = to_tensors(arrays)
        self._learner.adapter.load(state)
        if server_round and not round_of_attempt:  # resumed: evaluated before
            self._round_begun = time.monotonic()
            return MetricRecord()
        due = self._settings.evaluates_after(server_round)
        average = self.strategy.averaged()
        if average and server_round == self._settings.num_rounds:
            self._last = evaluate(self._learner, self._test)
        if average:
            self._learner.adapter.load(average)
        quality: Quality = evaluate(self._learner, self._test) if due else {headline(self._frozen): None, "loss": None}
        if server_round == 0:
            self._frozen = quality
            check_measurable(quality)
        else:
            self._best.look(server_round, quality, average or state)
            self._add(quality, state)
        self._round_begun = time.monotonic()
        return MetricRecord({name: value for name, value in quality.items() if value is not None})

    def _add(self, quality: Quality, state: dict[str, torch.Tensor]) -> None:
        """A finished round: its line, and the checkpoint that goes on from ``state``."""
        counts, report = self.strategy.counts, self._report
        line = RoundMetrics(
            round=report.server_round,
            quality={**quality, **report.on_sites()},
            epsilon=counts.epsilon(),
            sites=len(report.served),
            failures=len(report.failed),
            failed_sites={str(site): reason for site, reason in report.failed.items()},
            left_sites=sorted(str(site) for site in report.left),
            seconds=round(time.monotonic() - self._round_begun, 3),
            bytes_up=report.bytes_up,
            bytes_down=report.bytes_down,
            private=self._settings.private,
            seeded=not counts.real,
            epsilon_alone=counts.epsilon_alone(),
            repeats=report.repeats if method_of(self._settings).transport.hides_updates else None,
            peak_memory_mb=peak_memory_mb(),
            **dataclasses.asdict(report.signals),
        )
        self._metrics.append(line)
        self._folder.add_metrics(line)
        self._folder.save_checkpoint(self._checkpoint(line.round, state))
        self._best.tidy()
        self._followers.round(line, report.served)

    def _ridge_head(self, grid: Grid, start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Serve the first round, which releases a ridge head; what the other rounds start from."""
        stage = RidgeStage(self._settings, self._models, self._test)
        stage.check(self._learner.adapter)
        strategy = FederatedStrategy(
            stage.settings,
            stage.layout,
            self._keep,
            self._learner.base.provenance.digest,
            lambda _: self._folder.save_asked(self.strategy.counts.asked()),
            self._roster,
            self.strategy.counts.before,
        )

        def after(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            if not server_round:  # sums of zero; the frozen model is that of the other rounds
                return MetricRecord()
            quality = stage.quality(to_tensors(arrays))
            start.update(stage.start(self._learner.adapter))
            self.strategy.done = 1
            self._add(quality, start)
            self._round_begun = time.monotonic()
            return MetricRecord()

        self.after_round(0, to_arrays(start))
        strategy.start(grid, to_arrays(stage.prepared()), num_rounds=1, timeout=patience(self._settings), evaluate_fn=after)
        return start

    def finish(self, ended_early: str = "") -> None:
        """Adapter, plot, and last the summary."""
        settings, counts, frozen = self._settings, self.strategy.counts, self._frozen
        self._folder.save_plot(headline(frozen), lambda: score_figure(settings, frozen, self._metrics, seeded=not counts.real))
        summary = summary_of(
            settings,
            self._learner.base,
            counts,
            quality=self._metrics[-1].quality,
            frozen=frozen,
            last=self._last,
            best=self._best,
            personal=personal_quality(self._learner, self._test, self.strategy.memories),
            started_from=self._started_from,
            rounds=self._metrics,
            seconds=self._seconds(),
            ended_early=ended_early,
            tested=tested(self._test, data_set(settings).public_left_out()),
        )
        save_adapters(self._folder, settings, self._learner, summary, self._best, self.strategy.averaged())
        self._folder.finish(summary, certificate(settings, counts, summary, self._run_ids))
        self._followers.finish(summary)
