"""The server of any method, as a Flower strategy: asks, reads, merges."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from lalora_flwr.adapter.slots import Layout
from lalora_flwr.ground.errors import BUDGET, RunFailed
from lalora_flwr.methods.averages import RunningAverage
from lalora_flwr.methods.merges import Memory, Merged, Now, bounded
from lalora_flwr.methods.method import method_of
from lalora_flwr.methods.transport import Packed
from lalora_flwr.methods.updates import Update, Updates, together
from lalora_flwr.server.counts import SiteCounts
from lalora_flwr.server.exchange import Conversation, RoundReport, content_of, evaluation
from lalora_flwr.server.roster import Roster
from lalora_flwr.server.stopping import check_merged, stop_on_dead_worker, stop_on_failures
from lalora_flwr.settings import Settings
from lalora_flwr.wire.orders import ARRAYS, EvaluateOrder
from lalora_flwr.wire.public import Public
from lalora_flwr.wire.replies import read_counters, read_memory, read_site_metrics
from lalora_flwr.wire.tensors import BadReply, num_bytes, to_arrays, to_tensors

log = logging.getLogger("lalora_flwr.server")
AVERAGE, MERGE, SITE = "average", "merge", "site"  # what names of further tensors in a checkpoint begin with


class FederatedStrategy(Strategy):
    """Flower strategy that runs any `Method`; the arrays of Flower's loop are the whole adapter."""

    def __init__(
        self,
        settings: Settings,
        layout: Layout,
        on_round: Callable[[RoundReport], None],
        model_digest: str = "",
        before_asking: Callable[[dict[str, dict[str, int]]], None] = lambda asked: None,
        roster: Roster | None = None,
    ) -> None:
        """
        Args:
            settings: the run's.
            layout: the slots of the adapter.
            on_round: gets each round's report before the server evaluates.
            model_digest: of the model that sites must hold.
            before_asking: gets how often each real site was asked, this time included, before it is asked.
            roster: of the run's sites; default: of virtual ones. Real sites' noise is drawn anew when a round is repeated.
        """
        self._settings, self._layout, self._on_round = settings, layout, on_round
        self._model_digest, self._before_asking = model_digest, before_asking
        self._method = method_of(settings)
        self.roster = roster if roster is not None else Roster(settings, real=False)
        self.counts = SiteCounts(settings, self.roster.real)
        self.done = 0  # rounds of the attempts that this one resumes; Flower counts its own from 1
        self._asked: list[int] = []  # node ids of the round
        self._arrays = ArrayRecord()
        self._report = RoundReport(0)
        self._round: Conversation | None = None
        self._directive: Public = self._method.merge.start(layout)
        self._memory = Memory()  # of the merge
        self._average = RunningAverage(settings.num_rounds) if self._method.average else None
        self._site_memory: dict[int, ArrayRecord] = {}  # of virtual sites' filters

    def state(self) -> dict[str, Any]:
        """What `restore` needs besides `tensors`, as plain JSON. Draws follow from the round, so there is no random state."""
        merge = {"directive": dict(self._directive), "memory": dict(self._memory.notes)}
        weight = self._average.state()[0] if self._average else 0.0
        return {"left": sorted(self.roster.left), "counts": self.counts.state(), "merge": merge, "average": weight}

    def tensors(self) -> dict[str, Tensor]:
        """What merges, the average and virtual sites' filters remember."""
        sums = self._average.state()[1] if self._average else {}
        kept = {f"{AVERAGE}/{name}": torch.from_numpy(value) for name, value in sums.items()}
        kept |= {f"{MERGE}/{name}": torch.from_numpy(np.array(value)) for name, value in self._memory.tensors.items()}
        for site, record in self._site_memory.items():
            kept |= {f"{SITE}/{site}/{name}": value for name, value in to_tensors(record).items()}
        return kept

    def restore(
        self,
        server_round: int,
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        asked: Mapping[str, Mapping[str, int]],
    ) -> None:
        """Go on after a round as if this strategy had run it.

        Args:
            server_round: the last finished round.
            state: of `state`; empty if there was no checkpoint.
            tensors: of `tensors`.
            asked: how often each real site was asked, as ``before_asking`` got it last. A round that was asked and never
                finished counts: what the sites sent is released. Virtual sites repeat it bit by bit.
        """
        self.done = server_round
        self.roster.left = set(state.get("left", ()))
        self.counts.restore(state.get("counts", {}), asked)
        if merge := state.get("merge"):
            own = {name.partition("/")[2]: value.numpy() for name, value in tensors.items() if name.startswith(f"{MERGE}/")}
            self._directive, self._memory = merge["directive"], Memory(merge["memory"], own)
        if self._average and state:
            of_average = {name: value for name, value in tensors.items() if name.startswith(f"{AVERAGE}/")}
            sums = {name.partition("/")[2]: value.numpy() for name, value in of_average.items()}
            self._average.restore(state.get("average", 0.0), sums)
        by_site: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"{SITE}/"):
                _, site, own_name = name.split("/", 2)
                by_site.setdefault(int(site), {})[own_name] = value
        self._site_memory = {site: to_arrays(values) for site, values in by_site.items()}

    def summary(self) -> None:
        log.info("%s: schedule %s, filter %s", self._settings.strategy, self._method.schedule.text, self._method.filter.name)

    @property
    def _carries_memory(self) -> bool:
        """Whether the server keeps what filters remember: for virtual sites, which forget everything between rounds."""
        return self._method.filter.remembers and not self.roster.real

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """One message per drawn site. A list, since Flower's deployment grid reads it twice."""
        server_round += self.done
        if self.roster.begun:
            self.roster.greet_late(grid)
        else:
            self.roster.start_from(grid)
        self.counts.real = self.roster.real
        self._arrays, self._report = arrays, RoundReport(server_round)
        self._asked = self.roster.draw(server_round, grid, {site: count.rounds for site, count in self.counts.sites.items()})
        sites = [self.roster.site(node) for node in self._asked]
        self._round = Conversation(
            self._method,
            self._settings,
            self._layout,
            server_round,
            to_tensors(arrays),
            self._directive,
            self._method.transport.words(server_round, sites),
            self._model_digest,
        )
        messages = []
        for node, site in zip(self._asked, sites, strict=True):
            memory = self._site_memory.get(site, ArrayRecord()) if self._carries_memory else None
            message, size = self._round.order(node, self.roster.profile(node), self.counts.steps_of(site), memory)
            self._report.bytes_down += size
            messages.append(message)
        for site in sites:
            self.counts.of(site).rounds += 1
        self._say_who_is_asked()
        return messages

    def _say_who_is_asked(self) -> None:
        if self.counts.real:
            self._before_asking(self.counts.asked())

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """Merge the good replies in order of site.

        Raises:
            RunFailed: if no site served the round, more failed than ``max-failures``, or the merge made no adapter.
        """
        report = self._report
        missing = {self.roster.site(node) for node in self._asked}
        good: dict[int, Packed] = {}
        nodes: dict[int, int] = {}
        for reply in sorted(replies, key=lambda message: self.roster.site(message.metadata.src_node_id)):
            node = reply.metadata.src_node_id
            site = self.roster.site(node)
            missing.discard(site)
            if (packed := self._read(reply, site, report)) is not None:
                good[site], nodes[site] = packed, node
        report.failed.update(dict.fromkeys(sorted(missing), "no reply"))
        self.roster.left |= report.left
        if not self.counts.real:  # there is no worker in a real federation, whatever a site says
            stop_on_dead_worker(report)
        stop_on_failures(report, len(self._asked), self._settings)
        merged = self._merge(report.server_round, good, nodes)
        check_merged(report.server_round, self._method.merge.name, self._layout, merged)
        changed = to_arrays({name: torch.from_numpy(np.asarray(value)) for name, value in merged.tensors.items()})
        self._arrays = ArrayRecord({**self._arrays, **changed})
        self._memory, self._directive = merged.memory, merged.directive
        if self._average:
            if merged.rewritten:
                self._average.forget()
            self._average.add({name: array.numpy() for name, array in self._arrays.items()})
        self._on_round(report)
        return self._arrays, MetricRecord({"sites": len(report.served), "failures": len(report.failed)})

    def _read(self, reply: Message, site: int, report: RoundReport) -> Packed | None:
        """What a site sent, if it can be merged; the report says what became of it."""
        assert self._round is not None
        try:
            content = content_of(reply)
        except BadReply as error:
            if str(error).startswith(BUDGET):
                report.left.add(site)
                log.info("round %d: site %d leaves the run (%s)", report.server_round, site, error)
            else:
                report.failed[site] = str(error)
            return None
        report.bytes_up += sum(num_bytes(arrays) for name, arrays in content.array_records.items() if name == ARRAYS)
        self.counts.of(site).heard = True  # a reply that is rejected was released all the same
        try:
            self.counts.check(site, read_counters(content))
            profile = self.roster.profile(reply.metadata.src_node_id)
            packed = self._round.read(content, profile, memory=self._carries_memory)
        except BadReply as problem:
            report.failed[site] = f"reply rejected: {problem}"
            return None
        if self._carries_memory:
            self._site_memory[site] = read_memory(content)
        report.served.append(site)
        return packed

    def _merge(self, server_round: int, replies: Mapping[int, Packed], nodes: Mapping[int, int]) -> Merged:
        """The updates combined, each within the bound if the run sets one.

        Raises:
            RunFailed: the merge needs more of them, or they make no sum.
        """
        merge, settings = self._method.merge, self._settings.merge
        if len(replies) < (needed := merge.least_updates(settings)):
            raise RunFailed(
                f"round {server_round}: {len(replies)} good replies, but merge.name = {merge.name!r} needs {needed}; "
                "let more sites take part, or choose another merge"
            )
        assert self._round is not None
        try:
            updates = self._method.transport.unpack(replies, self._round.exchange)
        except BadReply as problem:
            raise RunFailed(f"round {server_round}: {problem}") from None
        if settings.max_update_norm:
            updates = self._bounded(server_round, updates, nodes)
        current = {name: array.numpy() for name, array in self._arrays.items()}
        return merge(current, updates, self._memory, Now(server_round, self._layout, settings, self._round.directive))

    def _bounded(self, server_round: int, updates: Updates, nodes: Mapping[int, int]) -> Updates:
        assert self._round is not None
        largest = self._settings.merge.max_update_norm
        kept, norms = [], []
        for update in updates.each:
            sent = self._round.sent(self.roster.profile(nodes[update.site]))
            tensors, norm = bounded(update.tensors, sent, largest)
            kept.append(Update(update.site, tensors))
            norms.append(norm)
        long = sum(norm > largest for norm in norms)
        log.info("round %d: %d of %d updates scaled down, the longest from %.4g", server_round, long, len(norms), max(norms))
        return together(kept)

    def averaged(self) -> dict[str, Tensor]:
        """The average of the released adapters; empty if the run takes none, or before its first round."""
        return {name: torch.from_numpy(value) for name, value in self._average.value().items()} if self._average else {}

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """None, unless the run wants the sites' own accuracies: exact in a simulation, with noise from real sites."""
        server_round += self.done
        if not self._settings.evaluate_sites or not self._settings.evaluates_after(server_round):
            return []
        order = EvaluateOrder(server_round, self._model_digest)
        adapter = self.averaged() or to_tensors(arrays)  # the one that the server evaluates and the run saves
        messages = []
        for node in self._asked:
            message, size = evaluation(self._method, self._layout, adapter, order, node, self.roster.profile(node))
            self._report.bytes_down += size
            messages.append(message)
        for node in self._asked:
            self.counts.of(self.roster.site(node)).evaluations += 1
        self._say_who_is_asked()
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Keep the accuracies; a site that does not answer loses nothing but its place in the mean."""
        for reply in sorted(replies, key=lambda message: self.roster.site(message.metadata.src_node_id)):
            site = self.roster.site(reply.metadata.src_node_id)
            try:
                metrics = read_site_metrics(content_of(reply))
                self.counts.check_evaluation(site, metrics)
                self._report.evaluated[site] = metrics.accuracy
            except BadReply as problem:
                log.warning("round %d: site %d did not evaluate (%s)", server_round, site, problem)
