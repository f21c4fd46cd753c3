"""One round's exchange with the sites: who is asked, what they are sent, what came back, and who is asked again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from lalora_flwr.adapter.slots import Layout
from lalora_flwr.ground.errors import BUDGET, RunFailed
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.secure_sum import Attempt
from lalora_flwr.methods.transport import Packed
from lalora_flwr.methods.updates import Updates
from lalora_flwr.server.counts import SiteCounts
from lalora_flwr.server.exchange import Conversation, RoundReport, content_of
from lalora_flwr.server.roster import Roster
from lalora_flwr.server.site_count import Asked
from lalora_flwr.server.stopping import stop_on_dead_worker, stop_on_failures
from lalora_flwr.settings import Settings
from lalora_flwr.site.own_part import digest_of
from lalora_flwr.wire.orders import ARRAYS
from lalora_flwr.wire.public import Public
from lalora_flwr.wire.replies import read_counters, read_memory
from lalora_flwr.wire.tensors import BadReply, num_bytes, to_tensors

log = logging.getLogger("lalora_flwr.server")
DAY = 24 * 3600.0  # seconds; dead sites are noticed long before; see engines/supernode.py
SPOILT = 2  # sums in a row that no honest sites can have, before the run stops


def patience(settings: Settings) -> float:
    """Seconds that a round waits for its sites."""
    return float(settings.round_seconds or DAY)


class Asking:
    """Asks the sites of round after round.

    Attributes:
        nodes: node ids of those that were asked last.
        report: of the round.
        memory: of virtual sites, which forget everything between rounds: their filters', and the slots that stay with them.
        merged: digests of real sites' last replies that were merged, by which they know what stayed with them.
    """

    def __init__(
        self,
        settings: Settings,
        layout: Layout,
        method: Method,
        model_digest: str,
        roster: Roster,
        counts: SiteCounts,
        before_asking: Callable[[Asked], None],
    ) -> None:
        """
        Args:
            settings, layout, method, model_digest: of the run.
            roster, counts: its sites.
            before_asking: gets how often each real site was asked, this time included, before it is asked.
        """
        self._settings, self._layout, self._method, self._model_digest = settings, layout, method, model_digest
        self._roster, self._counts, self._before_asking = roster, counts, before_asking
        self.nodes: list[int] = []
        self.report = RoundReport(0)
        self.memory: dict[int, ArrayRecord] = {}
        self.merged: dict[int, str] = {}
        self._adapter: Mapping[str, Tensor] = {}
        self._directive: Public = {}
        self._grid: Grid | None = None
        self._conversation: Conversation | None = None

    @property
    def _carries_memory(self) -> bool:
        return self._method.sites_remember and not self._roster.real

    @property
    def conversation(self) -> Conversation:
        """What is said in the round; there must be one."""
        assert self._conversation is not None
        return self._conversation

    def begin(self, server_round: int, grid: Grid, arrays: ArrayRecord, directive: Public) -> list[Message]:
        """One message per drawn site. A list, since Flower's deployment grid reads it twice."""
        if self._roster.begun:
            self._roster.greet_late(grid)
        else:
            self._roster.start_from(grid)
        self._counts.real = self._roster.real
        self._grid, self._adapter, self._directive = grid, to_tensors(arrays), directive
        self.report = RoundReport(server_round)
        asked = {site: count.rounds for site, count in self._counts.sites.items()}
        return self._ask(self._roster.draw(server_round, grid, asked, self._settings), attempt=1)

    def _ask(self, nodes: list[int], attempt: int) -> list[Message]:
        profiles = [self._roster.profile(node) for node in nodes]
        words = self._method.transport.words(attempt, profiles, self._settings) if nodes else {}
        self.nodes = nodes
        self._conversation = Conversation(
            self._method,
            self._settings,
            self._layout,
            self.report.server_round,
            self._adapter,
            self._directive,
            words,
            self._model_digest,
        )
        messages = []
        for node, profile in zip(nodes, profiles, strict=True):
            counted = self._counts.steps_of(profile.site), self._counts.steps_before(profile.site)
            site = profile.site
            message, size = self._conversation.order(node, profile, counted, self.memory_of(site), self.merged.get(site, ""))
            self.report.bytes_down += size
            messages.append(message)
        for profile in profiles:
            count, most = self._counts.of(profile.site), self._settings.train.local_steps
            count.add_round(self._method.travel.steps(most, profile), most)
            if self._settings.shares_noise:
                count.add_share(Attempt.of(words).share)
        self.say_who_is_asked()
        return messages

    def memory_of(self, site: int) -> ArrayRecord | None:
        """What goes to a virtual site of its memory; None to a real one, or where there is none."""
        return self.memory.get(site, ArrayRecord()) if self._carries_memory else None

    def say_who_is_asked(self) -> None:
        if self._counts.real:
            self._before_asking(self._counts.asked())

    def heard(self, replies: Iterable[Message]) -> tuple[Updates, dict[int, int]]:
        """The updates of the round, and the node of each site they are from.

        Where the transport shows a sum only and a site is missing, the others are asked again, for new draws, until those that
        were asked have all answered.

        Raises:
            RunFailed: no site served the round, more failed than ``max-failures``, too few are left, or what they sent makes
                no sum.
        """
        good, nodes = self._read_all(replies)
        spoilt = 0
        while True:
            self._check_enough(len(good))
            try:
                return self._method.transport.unpack(good, self.conversation.exchange), nodes
            except BadReply as problem:
                spoilt += len(good) == len(self.nodes)
                if not self._method.transport.hides_updates or spoilt >= SPOILT:
                    raise RunFailed(f"round {self.report.server_round}: {problem}") from None
                log.warning("round %d: %s; the sites that answered are asked again", self.report.server_round, problem)
            good, nodes = self._repeat([nodes[site] for site in sorted(nodes)])

    def _repeat(self, nodes: list[int]) -> tuple[dict[int, Packed], dict[int, int]]:
        report, least = self.report, max(self._method.transport.least_sites(self._settings), self._settings.min_sites)
        able = [n for n in nodes if self._counts.of(self._roster.site(n)).rounds < self._settings.rounds_per_site]
        if len(able) < least:
            raise RunFailed(
                f"round {report.server_round}: the secure sum of the sites is spoilt, and {len(able)} of them may serve another "
                f"attempt, but {least} must; lalora run --resume goes on with a new one, and a larger privacy.max-rounds leaves "
                "room for more"
            )
        report.repeats += 1
        report.served.clear()
        assert self._grid is not None
        return self._read_all(self._grid.send_and_receive(self._ask(able, 1 + report.repeats), timeout=patience(self._settings)))

    def _bear(self, site: int, reason: str) -> None:
        """Let an update that is too long pass where none is to spare, and the merge cannot be moved far by it.

        Raises:
            BadReply: otherwise.
        """
        merge = self._method.merge
        if not (merge.robust and len(self.nodes) <= merge.least_updates(self._settings.merge)):
            raise BadReply(reason)
        log.warning(
            "round %d: site %d stays, as merge.name = %r needs all and bears it (%s)",
            *(self.report.server_round, site, merge.name, reason),
        )

    def leave_out(self, site: int, reason: str) -> None:
        """Take a site that was heard out of the round, as if its reply had been rejected.

        Raises:
            RunFailed: as `heard`, for lack of sites.
        """
        before = frozenset(self.report.failed)
        self.report.served.remove(site)
        self.report.failed[site] = f"reply rejected: {reason}"
        self._check_enough(len(self.report.served), before)

    def _check_enough(self, good: int, said: Collection[int] = ()) -> None:
        """
        Raises:
            RunFailed: as `heard`.
        """
        report, merge = self.report, self._method.merge
        if not self._counts.real:  # there is no worker in a real federation, whatever a site says
            stop_on_dead_worker(report)
        stop_on_failures(report, len(self.nodes), self._settings, said)
        if good < (needed := merge.least_updates(self._settings.merge)):
            raise RunFailed(
                f"round {report.server_round}: {good} good replies, but merge.name = {merge.name!r} needs {needed}; "
                "let more sites take part, or choose another merge"
            )

    def _read_all(self, replies: Iterable[Message]) -> tuple[dict[int, Packed], dict[int, int]]:
        """The good replies in order of site, and their nodes."""
        missing = {self._roster.site(node) for node in self.nodes}
        good: dict[int, Packed] = {}
        nodes: dict[int, int] = {}
        for reply in sorted(replies, key=lambda message: self._roster.site(message.metadata.src_node_id)):
            node = reply.metadata.src_node_id
            site = self._roster.site(node)
            missing.discard(site)
            if (packed := self._read(reply, site)) is not None:
                good[site], nodes[site] = packed, node
        self.report.failed.update(dict.fromkeys(sorted(missing), "no reply"))
        self._roster.left |= self.report.left
        return good, nodes

    def _read(self, reply: Message, site: int) -> Packed | None:
        """What a site sent, if it can be merged; the report says what became of it."""
        report = self.report
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
        self._counts.of(site).heard = True  # a reply that is rejected was released all the same
        try:
            self._counts.check(site, counters := read_counters(content))
            profile = self._roster.profile(reply.metadata.src_node_id)
            packed = self.conversation.read(content, profile, memory=self._carries_memory)
            if long := self.conversation.too_long(packed, profile, counters):
                self._bear(site, long)
        except BadReply as problem:
            report.failed[site] = f"reply rejected: {problem}"
            return None
        if self._carries_memory:
            self.memory[site] = read_memory(content)
        elif self._method.travel.keeps:
            self.merged[site] = digest_of(packed)
        report.served.append(site)
        return packed
