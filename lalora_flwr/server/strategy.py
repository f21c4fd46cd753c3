"""The server of any method, as a Flower strategy: asks, reads, merges."""

from __future__ import annotations

import dataclasses
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
from lalora_flwr.ground.errors import RunFailed
from lalora_flwr.methods.averages import RunningAverage
from lalora_flwr.methods.merges import Memory, Merged, Now, bounded, length_of
from lalora_flwr.methods.method import method_of
from lalora_flwr.methods.updates import Update, Updates, together
from lalora_flwr.server.asking import Asking
from lalora_flwr.server.counts import SiteCounts
from lalora_flwr.server.exchange import RoundReport, content_of, evaluation
from lalora_flwr.server.released import noise_by_slot
from lalora_flwr.server.roster import Roster
from lalora_flwr.server.round_signals import Signals
from lalora_flwr.server.signals import Round, signals_of
from lalora_flwr.server.site_count import Asked
from lalora_flwr.server.stepping import ServerStep
from lalora_flwr.server.stopping import check_merged, check_size, far_longer, too_large
from lalora_flwr.settings import Settings
from lalora_flwr.wire.npy import values_of
from lalora_flwr.wire.orders import EvaluateOrder
from lalora_flwr.wire.public import Public
from lalora_flwr.wire.replies import read_site_metrics
from lalora_flwr.wire.tensors import LARGEST, BadReply, to_arrays, to_tensors

log = logging.getLogger("lalora_flwr.server")
AVERAGE, MERGE, SITE, STEP = "average", "merge", "site", "step"  # what names of further tensors in a checkpoint begin with


class FederatedStrategy(Strategy):
    """Flower strategy that runs any `Method`; the arrays of Flower's loop are the whole adapter."""

    def __init__(
        self,
        settings: Settings,
        layout: Layout,
        on_round: Callable[[RoundReport], None],
        model_digest: str = "",
        before_asking: Callable[[Asked], None] = lambda asked: None,
        roster: Roster | None = None,
        counts: SiteCounts | None = None,
    ) -> None:
        """
        Args:
            settings: the run's.
            layout: the slots of the adapter.
            on_round: gets each round's report before the server evaluates.
            model_digest: of the model that sites must hold.
            before_asking: gets how often each real site was asked, this time included, before it is asked.
            roster: of the run's sites; default: of virtual ones. Real sites' noise is drawn anew when a round is repeated.
            counts: what the sites are asked for is counted here; default: counts of its own.
        """
        self._settings, self._layout, self._on_round = settings, layout, on_round
        self._model_digest = model_digest
        self._method = method_of(settings)
        self.roster = roster if roster is not None else Roster(settings, real=False)
        self.counts = counts if counts is not None else SiteCounts.of_run(settings, real=self.roster.real)
        self.done = 0  # rounds of the attempts that this one resumes; Flower counts its own from 1
        self._arrays = ArrayRecord()
        self._asking = Asking(settings, layout, self._method, model_digest, self.roster, self.counts, before_asking)
        self._directive: Public = self._method.merge.start(layout)
        self._memory = Memory()  # of the merge
        self._average = RunningAverage(settings.num_rounds) if self._method.average else None
        self._step = ServerStep(settings, layout, self._method) if self._method.server_steps else None

    def state(self) -> dict[str, Any]:
        """What `restore` needs besides `tensors`, as plain JSON. Draws follow from the round, so there is no random state."""
        merge = {"directive": dict(self._directive), "memory": dict(self._memory.notes)}
        weight = self._average.state()[0] if self._average else 0.0
        merged = {str(site): digest for site, digest in self._asking.merged.items()}
        more = {"merged": merged} if merged else {}
        return {"left": sorted(self.roster.left), "counts": self.counts.state(), "merge": merge, "average": weight, **more}

    def tensors(self) -> dict[str, Tensor]:
        """What merges, the average, the server's step and virtual sites' filters remember."""
        sums = self._average.state()[1] if self._average else {}
        kept = {f"{AVERAGE}/{name}": torch.from_numpy(value) for name, value in sums.items()}
        kept |= {f"{MERGE}/{name}": torch.from_numpy(np.array(value)) for name, value in self._memory.tensors.items()}
        if self._step:
            kept |= {f"{STEP}/{name}": value for name, value in self._step.tensors().items()}
        for site, record in self._asking.memory.items():
            kept |= {f"{SITE}/{site}/{name}": value for name, value in to_tensors(record).items()}
        return kept

    def restore(
        self,
        server_round: int,
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        asked: Mapping[str, Mapping[str, Any]],
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
        self._asking.merged = {int(site): digest for site, digest in state.get("merged", {}).items()}
        if merge := state.get("merge"):
            own = {name.partition("/")[2]: value.numpy() for name, value in tensors.items() if name.startswith(f"{MERGE}/")}
            self._directive, self._memory = merge["directive"], Memory(merge["memory"], own)
        if self._average and state:
            of_average = {name: value for name, value in tensors.items() if name.startswith(f"{AVERAGE}/")}
            sums = {name.partition("/")[2]: value.numpy() for name, value in of_average.items()}
            self._average.restore(state.get("average", 0.0), sums)
        if self._step:
            prefix = f"{STEP}/"
            self._step.restore({n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)})
        by_site: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"{SITE}/"):
                _, site, own_name = name.split("/", 2)
                by_site.setdefault(int(site), {})[own_name] = value
        self._asking.memory = {site: to_arrays(values) for site, values in by_site.items()}

    def summary(self) -> None:
        log.info("%s: schedule %s, filter %s", self._settings.strategy, self._method.schedule.text, self._method.filter.name)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """One message per drawn site."""
        self._arrays = arrays
        return self._asking.begin(server_round + self.done, grid, arrays, self._directive)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """Merge the good replies in order of site.

        Raises:
            RunFailed: as `Asking.heard`; or the merge made no adapter.
        """
        updates, nodes = self._asking.heard(replies)
        report = self._asking.report
        noise = self._method.transport.noise(self._asking.conversation.exchange) or self.counts.noise_of_mean(nodes)
        merged = self._merge(report.server_round, updates, nodes, noise)
        check_merged(report.server_round, self._method.merge.name, self._layout, merged)
        while too_large(merged) and (site := self._far_longer(updates, nodes)) is not None:
            updates = together([update for update in updates.each if update.site != site])
            nodes = {own: node for own, node in nodes.items() if own != site}
            merged = self._merge(report.server_round, updates, nodes, noise)
        check_size(report.server_round, self._method.merge.name, merged)
        report.signals = self._signals(report.server_round, updates, noise)
        changed = to_arrays({name: torch.from_numpy(np.asarray(value)) for name, value in merged.tensors.items()})
        self._arrays = ArrayRecord({**self._arrays, **changed})
        self._memory, self._directive = merged.memory, merged.directive
        if self._average:
            if merged.rewritten:
                self._average.forget()
            self._average.add({name: values_of(array) for name, array in self._arrays.items()})
        self._on_round(report)
        return self._arrays, MetricRecord({"sites": len(report.served), "failures": len(report.failed)})

    def _far_longer(self, updates: Updates, nodes: Mapping[int, int]) -> int | None:
        """The site, now left out of the round, whose update is so long that with it a merge of products made too large values.

        Where what clip, noise and rate allow is known (`lalora_flwr.server.longest`), none gets here.
        """
        lengths = {}
        for update in updates.known or ():
            sent = self._asking.conversation.sent(self.roster.profile(nodes[update.site]))
            lengths[update.site] = length_of({name: value - sent[name] for name, value in update.tensors.items()})
        if (site := far_longer(lengths)) is not None:
            reason = f"its update is {lengths[site]:.4g} long, with which {self._method.merge.name!r} makes too large values"
            self._asking.leave_out(site, reason)
        return site

    def _signals(self, server_round: int, updates: Updates, noise: float) -> Signals:
        """Of the updates as they came; a stage that releases a ridge head has none, since its sums are no steps."""
        if self._method.full_batch:
            return Signals()
        start = {name: values_of(array) for name, array in self._arrays.items()}
        directive = self._asking.conversation.directive
        alike = all(self.counts.of(self.roster.site(node)).takes_all for node in self._asking.nodes)
        now = Round(self._settings, self._method, self._layout, server_round, directive, noise, updates.count, alike)
        return signals_of(now, start, updates)

    def _merge(self, server_round: int, updates: Updates, nodes: Mapping[int, int], noise: float) -> Merged:
        """The updates combined, each within the bound if the run sets one, and the server's step along them if it takes one."""
        settings, conversation = self._settings, self._asking.conversation
        if settings.merge.max_update_norm:
            updates = self._bounded(server_round, updates, nodes)
        current = {name: values_of(array) for name, array in self._arrays.items()}
        now = Now(
            server_round,
            self._layout,
            settings.merge,
            conversation.directive,
            rounds=settings.num_rounds,
            seed=settings.seed,
            gradients=self._step is not None,
            noise=noise_by_slot(settings, self._method, self._layout, server_round, conversation.directive, noise, len(nodes)),
        )
        merged = self._method.merge(current, updates, self._memory, now)
        if self._step is None:
            return merged
        check_merged(server_round, self._method.merge.name, self._layout, merged)
        stepped = self._step(server_round, current, merged.tensors, noise)
        if not all((np.abs(value) <= LARGEST).all() for value in stepped.values()):  # NaN is not <= either
            raise RunFailed(f"round {server_round}: the adapter holds values above {LARGEST:g}; choose a smaller train.lr")
        return dataclasses.replace(merged, tensors=stepped)

    def _bounded(self, server_round: int, updates: Updates, nodes: Mapping[int, int]) -> Updates:
        largest = self._settings.merge.max_update_norm
        kept, norms = [], []
        for update in updates.each:
            sent = self._asking.conversation.sent(self.roster.profile(nodes[update.site]))
            tensors, norm = bounded(update.tensors, sent, largest)
            kept.append(Update(update.site, tensors))
            norms.append(norm)
        long = sum(norm > largest for norm in norms)
        log.info("round %d: %d of %d updates scaled down, the longest from %.4g", server_round, long, len(norms), max(norms))
        return together(kept)

    @property
    def memories(self) -> Mapping[int, ArrayRecord]:
        """What virtual sites keep from round to round, by number."""
        return self._asking.memory

    def averaged(self) -> dict[str, Tensor]:
        """The average of the released adapters; empty if the run takes none, or before its first round."""
        return {name: torch.from_numpy(value) for name, value in self._average.value().items()} if self._average else {}

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """None, unless the run wants the sites' own accuracies: exact in a simulation, with noise from real sites."""
        server_round += self.done
        if not self._settings.evaluate_sites or not self._settings.evaluates_after(server_round):
            return []
        adapter = self.averaged() or to_tensors(arrays)  # the one that the server evaluates and the run saves
        messages = []
        for node in self._asking.nodes:
            profile, asking = self.roster.profile(node), self._asking
            order = EvaluateOrder(server_round, self._model_digest, asking.merged.get(profile.site, ""))
            memory = asking.memory_of(profile.site) if self._method.travel.keeps else None
            message, size = evaluation(self._method, self._layout, adapter, order, node, profile, memory)
            self._asking.report.bytes_down += size
            messages.append(message)
        for node in self._asking.nodes:
            self.counts.of(self.roster.site(node)).evaluations += 1
        self._asking.say_who_is_asked()
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Keep the accuracies; a site that does not answer loses nothing but its place in the mean."""
        for reply in sorted(replies, key=lambda message: self.roster.site(message.metadata.src_node_id)):
            site = self.roster.site(reply.metadata.src_node_id)
            try:
                metrics = read_site_metrics(content_of(reply))
                self.counts.check_evaluation(site, metrics)
                self._asking.report.evaluated[site] = metrics.accuracy
            except BadReply as problem:
                log.warning("round %d: site %d did not evaluate (%s)", server_round, site, problem)
