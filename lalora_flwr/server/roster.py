"""Who takes part: sites are greeted, known by their number, drawn for rounds, and leave."""

from __future__ import annotations

import heapq
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol, runtime_checkable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from lalora_flwr.data.holdings import holdings
from lalora_flwr.ground.errors import ConfigError, RunFailed, SiteSilent
from lalora_flwr.ground.seeds import derive_seed
from lalora_flwr.methods.method import method_of
from lalora_flwr.server.exchange import content_of
from lalora_flwr.settings import Settings
from lalora_flwr.wire.profile import Profile
from lalora_flwr.wire.replies import IDENTITY_QUERY, read_identity
from lalora_flwr.wire.tensors import BadReply

log = logging.getLogger("lalora_flwr.server")
IDENTITY_TRIES = 3  # times a site is asked for its number before the run gives up
MOST_GREETED = 32  # virtual sites; more are known by their order
PATIENCE = 10.0  # seconds before the sites that are there are asked how many there will be


class Node(Protocol):
    """A node as Flower describes it."""

    node_id: int
    registered_at: str


@runtime_checkable
class Dated(Protocol):
    """A grid that says when each node was registered, as that of Flower's simulation."""

    def get_nodes(self) -> Iterable[Node]: ...


class Roster:
    """The sites of a run. Flower's node ids are random in each run; a virtual site's own number is not."""

    def __init__(
        self,
        settings: Settings,
        *,
        real: bool,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        records: Sequence[int] = (),
    ) -> None:
        """
        Args:
            settings: the run's.
            real: whether the grid reaches real sites, whatever they say.
            patience: seconds before the sites that are there are greeted while others are waited for.
            clock, sleep: seconds that go by, and waiting for them.
            records: of each virtual site; none: as the run's data are split.
        """
        self._settings, self._real_grid = settings, real
        self._patience, self._clock, self._sleep = patience, clock, sleep
        self._profiles: dict[int, Profile] = {}  # by node id
        self.real = real  # whether any site is a real one
        self.left: set[int] = set()  # sites that have no budget left
        self._records = list(records)  # of each virtual site, at the latest when they are needed

    @property
    def begun(self) -> bool:
        """Whether any site is known."""
        return bool(self._profiles)

    def site(self, node: int) -> int:
        """The number of a node's site."""
        return self._profiles[node].site

    def profile(self, node: int) -> Profile:
        return self._profiles[node]

    def start_from(self, grid: Grid) -> None:
        """Wait for the run's sites and learn their numbers, by which everything is sorted.

        A site that cannot answer, such as one that died when it was asked, is waited for and asked again.

        Raises:
            RunFailed: if the federation can never hold the number of sites the run wants, or a site does not answer.
        """
        for left in reversed(range(IDENTITY_TRIES)):
            nodes = self._wait_for_sites(grid)
            try:
                if not self._number_virtual(grid, nodes):
                    self._identify(grid, nodes)
                break
            except SiteSilent as problem:
                if not left:
                    raise
                log.warning("%s; asking again", problem)

    def _wait_for_sites(self, grid: Grid) -> list[int]:
        want, begun, said = self._settings.num_supernodes, self._clock(), 0.0
        asked: set[int] = set()  # once each while waiting, however long that takes
        while len(nodes := sorted(grid.get_node_ids())) < want:
            waited = self._clock() - begun
            if (new := sorted(set(nodes) - asked)) and waited > self._patience:
                asked.update(new)
                with suppress(SiteSilent):
                    self._identify(grid, new)
            if waited - said > 10:
                said = waited
                log.info("waiting for sites: %d of %d are connected", len(nodes), want)
            self._sleep(0.2)
        return nodes

    def greet_late(self, grid: Grid) -> None:
        """Let sites in that connected after the start; one that cannot answer is only logged."""
        if unknown := sorted(set(grid.get_node_ids()) - set(self._profiles)):
            try:
                self._identify(grid, unknown)
            except RunFailed as problem:
                log.warning("a site that came late is left out: %s", problem)

    def _number_virtual(self, grid: Grid, nodes: list[int]) -> bool:
        """Know many virtual sites by the order in which Flower made them, which it keeps; whether that could be done.

        Flower's simulation looks at all undelivered messages for each site, so that greeting n of them takes n² looks: at 1,000
        sites a minute. Three are greeted; if the order holds for them it is that of the others too.

        Raises:
            RunFailed, SiteSilent: as `_identify`.
        """
        if self._real_grid or len(nodes) <= MOST_GREETED or not isinstance(grid, Dated):
            return False
        dates = {node.node_id: node.registered_at for node in grid.get_nodes()}
        if set(nodes) != set(dates) or len(set(dates.values())) < len(dates):
            return False
        ordered = sorted(nodes, key=dates.__getitem__)
        sample = {number: ordered[number] for number in (0, len(ordered) // 2, len(ordered) - 1)}
        self._identify(grid, sorted(sample.values()))
        if any(self.site(node) != number for number, node in sample.items()):
            self._profiles.clear()
            return False
        for number, node in enumerate(ordered):
            self._profiles[node] = self._checked(Profile(number, self._settings.words_of(number), *self._virtual(number)))
        return True

    def _checked(self, profile: Profile) -> Profile:
        """
        Raises:
            ConfigError: the method has no use for a site of this profile.
        """
        method_of(self._settings).travel.check(profile)
        return profile

    def _identify(self, grid: Grid, nodes: list[int]) -> None:
        unknown = [node for node in nodes if node not in self._profiles]
        ask = [Message(RecordDict(), dst_node_id=node, message_type=IDENTITY_QUERY) for node in unknown]
        problem = "no reply in time"
        for reply in grid.send_and_receive(ask, timeout=300):
            node = reply.metadata.src_node_id
            try:
                told = read_identity(content_of(reply))
            except BadReply as bad:
                problem = str(bad)
                continue
            number, sites = (-1, -1) if self._real_grid else (told.site, told.sites)  # a real site is its node, whatever it says
            if sites not in (-1, self._settings.num_supernodes):
                raise RunFailed(
                    f"num-supernodes = {self._settings.num_supernodes}, but the simulation has {sites} sites: pass "
                    f"--federation-config 'num-supernodes={self._settings.num_supernodes}' to flwr run, or use lalora run"
                )
            real = Profile(node, told.words, told.name, told.records)
            profile = real if number < 0 else Profile(number, self._settings.words_of(number), *self._virtual(number))
            try:
                self._profiles[node] = self._checked(profile)
            except ConfigError as bad:
                problem = str(bad)
                continue
            self.real |= number < 0
        if missing := [node for node in unknown if node not in self._profiles]:
            raise SiteSilent(f"{len(missing)} of {len(nodes)} sites did not answer the greeting: {problem}")

    def _virtual(self, site: int) -> tuple[str, int]:
        """A virtual site's name and records, for a secure sum."""
        if not self._settings.shares_noise:
            return "", 0
        self._records = self._records or holdings(self._settings).records()
        return str(site), self._records[site]

    def draw(self, server_round: int, grid: Grid, asked: Mapping[int, int], settings: Settings) -> list[int]:
        """Node ids for a round: those asked least so far first, ties by the run's seed; sorted by site.

        A site is never asked for more rounds than its noise is calibrated for. Who takes part is no secret and earns no
        amplification, so drawing the least asked first costs nothing.

        Args:
            server_round: from 1.
            grid: reaches the sites.
            asked: for how many rounds each site was asked before.
            settings: of the stage of the run that the round belongs to.
        """
        present = [node for node in grid.get_node_ids() if node in self._profiles and self.site(node) not in self.left]
        able = [node for node in present if asked.get(self.site(node), 0) < settings.rounds_per_site]
        if served := sorted(self.site(node) for node in set(present) - set(able)):
            log.info("round %d: asked for all their rounds before: sites %s", server_round, ", ".join(map(str, served)))
        order = random.Random(derive_seed(settings.seed, "participation", server_round))
        ties = {site: order.random() for site in sorted(profile.site for profile in self._profiles.values())}
        first = heapq.nsmallest(
            settings.sites_per_round, able, key=lambda node: (asked.get(self.site(node), 0), ties[self.site(node)])
        )
        return sorted(first, key=self.site)
