"""The server of any method: draws sites, sends the adapter, checks and merges the replies, stops on too many failures."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from lalora_flwr.adapter.lora import digest, select
from lalora_flwr.ground.errors import BUDGET, NoSiteLeft, RunFailed, SiteSilent, WorkerDied
from lalora_flwr.ground.seeds import derive_seed
from lalora_flwr.methods import METHODS
from lalora_flwr.methods.merges import MERGES, Merged, Tensors, bounded, trimmed_mean
from lalora_flwr.methods.method import least_replies
from lalora_flwr.methods.schedules import BOTH, Factors, parse_schedule
from lalora_flwr.server.counts import SiteCounts
from lalora_flwr.settings import Settings
from lalora_flwr.wire.messages import (
    ARRAYS,
    CONFIG,
    IDENTITY_QUERY,
    BadReply,
    TrainOrder,
    num_bytes,
    read_counters,
    read_identity,
    read_reply,
    read_site_metrics,
    to_tensors,
)

log = logging.getLogger("lalora_flwr.server")
RAY_DEATHS = ("ActorDiedError", "ActorUnavailableError", "WorkerCrashedError", "OutOfMemoryError")
IDENTITY_TRIES = 3  # times a site is asked for its number before the run gives up
STARTUP_PATIENCE = 10.0  # seconds before the sites that are there are asked how many there will be
LONGEST_REASON = 300  # letters of a site's reason that the server repeats


@dataclass
class RoundReport:
    """What the server knows of one round's exchange; everything in it is public."""

    server_round: int
    served: list[int] = field(default_factory=list)  # sites whose reply was merged
    failed: dict[int, str] = field(default_factory=dict)  # site -> fixed reason
    left: set[int] = field(default_factory=set)  # sites without budget, that are not asked again
    evaluated: dict[int, float] = field(default_factory=dict)  # site -> accuracy on its records (evaluate-sites)
    bytes_up: int = 0
    bytes_down: int = 0


def resolved_choices(settings: Settings) -> tuple[str, str]:
    """Schedule and filter of the run: the strategy's own unless the settings override them."""
    method = METHODS[settings.strategy]
    schedule = method.schedule if settings.lora.schedule == "auto" else settings.lora.schedule
    filter_name = method.filter if settings.filter.name == "auto" else settings.filter.name
    return schedule, filter_name


def _content(reply: Message) -> RecordDict:
    """What a site sent.

    Raises:
        BadReply: with its reason, in one line of bounded length, if it sent an error.
    """
    if reply.has_error():
        raise BadReply(" ".join(str(reply.error.reason).split())[:LONGEST_REASON] or "no reason given")
    return reply.content


class FederatedLora(Strategy):
    """Flower strategy that runs any `Method`; the arrays of Flower's loop are the whole adapter."""

    def __init__(
        self,
        settings: Settings,
        on_round: Callable[[RoundReport], None],
        model_digest: str = "",
        before_asking: Callable[[dict[str, dict[str, int]]], None] = lambda asked: None,
        real: bool = False,
    ) -> None:
        """
        Args:
            settings: the run's.
            on_round: gets each round's report before the server evaluates.
            model_digest: of the model that sites must hold.
            before_asking: gets how often each real site was asked, this time included, before it is asked.
            real: whether the grid reaches real sites, whatever they say. Their noise is drawn anew when a round is repeated.
        """
        self._before_asking, self._real_grid = before_asking, real
        self._model_digest = model_digest
        self._settings = settings
        self._method = METHODS[settings.strategy]
        self._schedule_text, self._filter = resolved_choices(settings)
        self._schedule = parse_schedule(self._schedule_text)
        self._on_round = on_round
        self._sites: dict[int, int] = {}  # Flower's node id (random in each run) -> the site's own number
        self._asked: list[int] = []  # node ids of the round
        self._arrays = ArrayRecord()
        self._report = RoundReport(0)
        self._left: set[int] = set()  # sites that have no budget left
        self.done = 0  # rounds of the attempts that this one resumes; Flower counts its own from 1
        self.counts = SiteCounts(settings, real)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as plain JSON. Draws and seeds follow from the round, so there is no random state."""
        return {"left": sorted(self._left), "counts": self.counts.state()}

    def restore(self, server_round: int, state: Mapping[str, Any], asked: Mapping[str, Mapping[str, int]]) -> None:
        """Go on after a round as if this strategy had run it.

        Args:
            server_round: the last finished round.
            state: of `state`; empty if there was no checkpoint.
            asked: how often each real site was asked, as ``before_asking`` got it last. A round that was asked and never
                finished counts: what the sites sent is released. Virtual sites repeat it bit by bit.
        """
        self.done = server_round
        self._left = set(state.get("left", ()))
        self.counts.restore(state.get("counts", {}), asked)

    def summary(self) -> None:
        log.info("%s: schedule %s, filter %s", self._settings.strategy, self._schedule_text, self._filter)

    def start_from(self, grid: Grid) -> None:
        """Wait for the run's sites and learn their numbers, by which everything is sorted.

        A site that cannot answer, such as one that died when it was asked, is waited for and asked again.

        Raises:
            RunFailed: if the federation can never hold the number of sites the run wants, or a site does not answer.
        """
        for left in reversed(range(IDENTITY_TRIES)):
            nodes = self._wait_for_sites(grid)
            try:
                self._identify(grid, nodes)
                break
            except SiteSilent as problem:
                if not left:
                    raise
                log.warning("%s; asking again", problem)

    def _wait_for_sites(self, grid: Grid) -> list[int]:
        want, begun, said = self._settings.num_supernodes, time.monotonic(), 0.0
        asked: set[int] = set()  # once each while waiting, however long that takes
        while len(nodes := sorted(grid.get_node_ids())) < want:
            waited = time.monotonic() - begun
            if (new := sorted(set(nodes) - asked)) and waited > STARTUP_PATIENCE:
                asked.update(new)
                with suppress(SiteSilent):
                    self._identify(grid, new)
            if waited - said > 10:
                said = waited
                log.info("waiting for sites: %d of %d are connected", len(nodes), want)
            time.sleep(0.2)
        return nodes

    def _greet_late_sites(self, grid: Grid) -> None:
        """Let sites in that connected after the start; one that cannot answer is only logged."""
        if unknown := sorted(set(grid.get_node_ids()) - set(self._sites)):
            try:
                self._identify(grid, unknown)
            except RunFailed as problem:
                log.warning("a site that came late is left out: %s", problem)

    def _identify(self, grid: Grid, nodes: list[int]) -> None:
        unknown = [node for node in nodes if node not in self._sites]
        ask = [Message(RecordDict(), dst_node_id=node, message_type=IDENTITY_QUERY) for node in unknown]
        problem = "no reply in time"
        for reply in grid.send_and_receive(ask, timeout=300):
            node = reply.metadata.src_node_id
            try:
                number, sites = read_identity(_content(reply))
            except BadReply as bad:
                problem = str(bad)
                continue
            if self._real_grid:  # a real site is its node, whatever it says
                number = sites = -1
            if sites not in (-1, self._settings.num_supernodes):
                raise RunFailed(
                    f"num-supernodes = {self._settings.num_supernodes}, but the simulation has {sites} sites: pass "
                    f"--federation-config 'num-supernodes={self._settings.num_supernodes}' to flwr run, or use lalora run"
                )
            self._sites[node] = node if number < 0 else number
            self.counts.real |= number < 0
        if missing := [node for node in unknown if node not in self._sites]:
            raise SiteSilent(f"{len(missing)} of {len(nodes)} sites did not answer the greeting: {problem}")

    def _draw_sites(self, server_round: int, grid: Grid) -> list[int]:
        """Node ids for the round: those asked least so far first, ties by the run's seed; sorted by site.

        A site is never asked for more rounds than its noise is calibrated for. Who takes part is no secret and earns no
        amplification, so drawing the least asked first costs nothing.
        """
        present = [node for node in grid.get_node_ids() if node in self._sites and self._sites[node] not in self._left]
        asked = {node: self.counts.of(self._sites[node]).rounds for node in present}
        able = [node for node in present if asked[node] < self._settings.rounds_per_site]
        if served := sorted(self._sites[node] for node in set(present) - set(able)):
            log.info("round %d: asked for all their rounds before: sites %s", server_round, ", ".join(map(str, served)))
        order = random.Random(derive_seed(self._settings.seed, "participation", server_round))
        ties = {site: order.random() for site in sorted(self._sites.values())}
        drawn = sorted(able, key=lambda node: (asked[node], ties[self._sites[node]]))[: self._settings.sites_per_round]
        return sorted(drawn, key=self._sites.__getitem__)

    def _down(self) -> Factors:
        """Factors the sites cannot derive: one that never trains is drawn from the seed on every site."""
        return self._schedule.ever_trained if self._method.share == "trained" else BOTH

    def _up(self, server_round: int) -> Factors:
        if self._method.share == "both":
            return BOTH
        return self._schedule.trained_in(server_round, self._settings.train.local_steps)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """One message a drawn site. A list, since Flower's deployment grid reads it twice."""
        server_round += self.done
        if self._sites:
            self._greet_late_sites(grid)
        else:
            self.start_from(grid)
        self._arrays, self._report = arrays, RoundReport(server_round)
        start = digest(to_tensors(arrays), BOTH | {"head"})
        sent = ArrayRecord({name: arrays[name] for name in select(arrays, self._down())})
        self._asked = self._draw_sites(server_round, grid)
        self._report.bytes_down = len(self._asked) * num_bytes(sent)
        messages = []
        for node in self._asked:
            before = self.counts.steps_of(self._sites[node])
            order = TrainOrder(
                server_round, self._schedule_text, self._filter, self._method.share, start, self._model_digest, before
            )
            content = RecordDict({ARRAYS: sent, CONFIG: order.to_record()})
            messages.append(Message(content, dst_node_id=node, message_type=MessageType.TRAIN))
        for node in self._asked:
            self.counts.of(self._sites[node]).rounds += 1
        self._say_who_is_asked()
        return messages

    def _say_who_is_asked(self) -> None:
        if self.counts.real:
            self._before_asking(self.counts.asked())

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """Merge the good replies in order of site.

        Raises:
            RunFailed: if no site served the round, or more failed than ``max-failures``.
        """
        server_round += self.done
        report = self._report
        shapes = {name: tuple(self._arrays[name].shape) for name in select(self._arrays, self._up(server_round))}
        missing = {self._sites[node] for node in self._asked}
        good = []
        for reply in sorted(replies, key=lambda m: self._sites[m.metadata.src_node_id]):
            site = self._sites[reply.metadata.src_node_id]
            missing.discard(site)
            try:
                content = _content(reply)
            except BadReply as error:
                if str(error).startswith(BUDGET):
                    report.left.add(site)
                    log.info("round %d: site %d leaves the run (%s)", server_round, site, error)
                else:
                    report.failed[site] = str(error)
                continue
            report.bytes_up += sum(num_bytes(arrays) for arrays in content.array_records.values())
            self.counts.of(site).heard = True  # a reply that is rejected was released all the same
            try:
                self.counts.check(site, read_counters(content))
                tensors, _ = read_reply(content, shapes)
                self._check_moves(server_round, tensors)
            except BadReply as problem:
                report.failed[site] = f"reply rejected: {problem}"
                continue
            good.append(tensors)
            report.served.append(site)
        report.failed.update(dict.fromkeys(sorted(missing), "no reply"))
        self._left |= report.left
        self._stop_on_dead_worker(report)
        self._stop_on_failures(report)
        merged = self._merge(server_round, good)
        self._arrays = ArrayRecord({**self._arrays, **{name: Array(value) for name, value in merged.items()}})
        self._on_round(report)
        return self._arrays, MetricRecord({"sites": len(report.served), "failures": len(report.failed)})

    def _merge(self, server_round: int, replies: Sequence[Tensors]) -> Merged:
        """The replies, each within the bound on its update if the run sets one, combined.

        Raises:
            RunFailed: if the merge needs more replies.
        """
        merge, name = self._settings.merge, self._method.merge_named(self._settings.merge.name)
        if len(replies) < (needed := least_replies(name, merge.trim)):
            raise RunFailed(
                f"round {server_round}: {len(replies)} good replies, but merge.name = {name!r} needs {needed}; "
                "let more sites take part, or choose another merge"
            )
        if merge.max_update_norm:
            sent = {tensor: self._arrays[tensor].numpy() for tensor in replies[0]}
            replies, norms = zip(*(bounded(reply, sent, merge.max_update_norm) for reply in replies), strict=True)
            long = sum(norm > merge.max_update_norm for norm in norms)
            log.info("round %d: %d of %d updates scaled down, the longest from %.4g", server_round, long, len(norms), max(norms))
        return trimmed_mean(replies, merge.trim) if name == "trimmed-mean" else MERGES[name](replies)

    def _check_moves(self, server_round: int, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        """Did the adapter move, and only where it should have? Losses can fall while saved factors never change.

        Raises:
            BadReply: a factor that was frozen in the round moved, or one that got noise did not.
        """
        trained = set(select(tensors, self._schedule.trained_in(server_round, self._settings.train.local_steps)))
        for name, value in tensors.items():
            moved = not np.array_equal(value, self._arrays[name].numpy())
            if moved and name not in trained:
                raise BadReply(f"{name} moved in a round in which it is frozen")
            if not moved and name in trained and self._settings.private:
                raise BadReply(f"{name} did not move in a round in which it is trained")

    def _stop_on_dead_worker(self, report: RoundReport) -> None:
        """Flower puts a dead Ray actor back into its pool, where it fails message after message.

        Raises:
            WorkerDied: if a reply says that one died.
        """
        if self.counts.real:  # there is no worker, whatever a site says
            return
        for site, reason in report.failed.items():
            if any(error in reason for error in RAY_DEATHS):
                raise WorkerDied(
                    f"round {report.server_round}: the Ray worker that served site {site} died, perhaps for want of memory; "
                    "lalora run --resume goes on after the last finished round, with fewer --num-actors if it recurs"
                )

    def _stop_on_failures(self, report: RoundReport) -> None:
        for site, reason in report.failed.items():
            log.error("round %d: site %d failed (%s)", report.server_round, site, reason)
        allowed, least = self._settings.max_failures, self._settings.min_sites
        if len(report.served) >= least and len(report.failed) <= allowed:
            return
        if not self._asked:
            raise NoSiteLeft(
                f"round {report.server_round}: no site may serve another round; see privacy.max-rounds and the sites' budgets"
            )
        who = "; ".join(f"site {site}: {reason}" for site, reason in report.failed.items())
        limit = f"max-failures = {allowed}" if len(report.failed) > allowed else f"min-sites = {least}"
        if not report.served:
            limit = "no site is left"
        gone = f" and {len(report.left)} left for want of budget" if report.left else ""
        failed = f"{len(report.failed)} of {len(self._asked)} sites failed{gone}"
        raise RunFailed(f"round {report.server_round}: {failed}, {limit}" + (f" ({who})" if who else ""))

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """None, unless the run wants the sites' own accuracies: exact in a simulation, with noise from real sites."""
        server_round += self.done
        if not self._settings.evaluate_sites or not self._settings.evaluates_after(server_round):
            return []
        sent = ArrayRecord({name: arrays[name] for name in select(arrays, self._down())})
        order = ConfigRecord({"server-round": server_round, "model-digest": self._model_digest})
        content = RecordDict({ARRAYS: sent, CONFIG: order})
        self._report.bytes_down += len(self._asked) * num_bytes(sent)
        for node in self._asked:
            self.counts.of(self._sites[node]).evaluations += 1
        self._say_who_is_asked()
        return [Message(content, dst_node_id=node, message_type=MessageType.EVALUATE) for node in self._asked]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Keep the accuracies; a site that does not answer loses nothing but its place in the mean."""
        for reply in sorted(replies, key=lambda m: self._sites[m.metadata.src_node_id]):
            site = self._sites[reply.metadata.src_node_id]
            try:
                metrics = read_site_metrics(_content(reply))
                self.counts.check_evaluation(site, metrics)
                self._report.evaluated[site] = metrics.accuracy
            except BadReply as problem:
                log.warning("round %d: site %d did not evaluate (%s)", server_round, site, problem)
