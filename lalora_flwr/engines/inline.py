"""All sites in this process, some of them in shared passes: for debugging, tests and fast sweeps. No Ray, no SuperLink."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context, Message, MessageType, Metadata, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from lalora_flwr.engines.together import SitesTogether
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import expanded
from lalora_flwr.ground.logs import JsonLines, wants_json
from lalora_flwr.privacy.accounting import CALIBRATIONS
from lalora_flwr.privacy.kept import cache_folder
from lalora_flwr.server.folder import LOG
from lalora_flwr.server.metrics import OnRound
from lalora_flwr.server.place import named
from lalora_flwr.server.run import run_federation
from lalora_flwr.server.trackers.tracker import Tracker
from lalora_flwr.settings import Settings, Value, flatten
from lalora_flwr.site.app import make_client_app
from lalora_flwr.site.host import Host
from lalora_flwr.training.learner import LearnerCache, ModelStore
from lalora_flwr.wire.profile import Words
from lalora_flwr.wire.replies import IDENTITY_QUERY

FIRST_NODE = 100  # node ids are not partition ids, as in a real federation


class InlineGrid(Grid):
    """Flower's `Grid` over a ClientApp that is called directly.

    Each site keeps its own context, as in Flower, from its first order on: one that has none costs nothing.
    """

    def __init__(
        self, app: ClientApp, num_supernodes: int, run_config: dict[str, Value], together: SitesTogether | None = None
    ) -> None:
        """``together``: serves orders to train in place of ``app``, several at once."""
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # what messages are stamped with
        self._app, self._together = app, together
        self._numbers = itertools.count(1)
        self._replies: dict[str, Message] = {}
        self._nodes, self._run_config = range(FIRST_NODE, FIRST_NODE + num_supernodes), run_config
        self._contexts: dict[int, Context] = {}

    def set_run(self, run: Run) -> None:
        pass

    @property
    def run(self) -> Run:
        raise NotImplementedError("the inline engine has no SuperLink and so no Flower run")

    def create_message(self, *_: object, **__: object) -> Message:
        raise NotImplementedError("Flower's old way to make a message; this package builds `Message` itself")

    def get_node_ids(self) -> list[int]:
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        named = {f"message-{next(self._numbers)}": message for message in messages}
        for name, message in named.items():
            message.metadata.__dict__["_message_id"] = name  # Flower's grids do the same
        orders = [(message, self._context(message.metadata)) for message in named.values()]
        if self._together and orders and orders[0][0].metadata.message_type == MessageType.TRAIN:
            replies = self._together(orders, self._app)
        else:
            replies = [self._app(message, context) for message, context in orders]
        self._replies |= zip(named, replies, strict=True)
        return list(named)

    def _context(self, of: Metadata) -> Context:
        if of.dst_node_id in self._contexts:
            return self._contexts[of.dst_node_id]
        site = self._nodes.index(of.dst_node_id)
        made = Context(
            run_id=1,
            node_id=of.dst_node_id,
            node_config={"partition-id": site, "num-partitions": len(self._nodes)},
            state=RecordDict(),
            run_config=dict(self._run_config),
        )
        if of.message_type != IDENTITY_QUERY:  # which leaves no state
            self._contexts[of.dst_node_id] = made
        return made

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))


def simulated_app(models: ModelStore) -> ClientApp:
    """The ClientApp of virtual sites in this process, which share one frozen model with whoever holds the store."""
    host = Host(simulated=True, learners=LearnerCache(models))
    return make_client_app(lambda: host)


def run_inline(
    settings: Settings,
    on_round: OnRound | None = None,
    app: ClientApp | None = None,
    models: ModelStore | None = None,
    trackers: Mapping[str, Tracker] | None = None,
) -> Path:
    """Run a whole federation in this process and return its run folder.

    Args:
        settings: the run.
        on_round: gets each line of metrics.
        app: of the sites; default: `simulated_app`.
        models: where the frozen model comes from; default: a store of its own.
        trackers: who follows the run, by name; default: those that its settings name.

    Raises:
        ConfigError, RunFailed: as `run_federation`.
    """
    settings, models = named(settings), models or ModelStore()
    CALIBRATIONS.open(cache_folder())
    alone = app or any(told.batch or told.precision for told in map(Words.of, settings.profiles.split(";")))
    together = None if alone else SitesTogether(models)
    grid = InlineGrid(app or simulated_app(models), settings.num_supernodes, dict(flatten(settings)), together)
    with logs_in(expanded(settings.output_dir).absolute() / settings.run_name / LOG):
        return run_federation(settings, grid, on_round, models=models, trackers=trackers)


class _OnceThere(logging.FileHandler):
    """Keeps what is said until the file's folder is there: data are read, and rows left out, before a run has one."""

    _early: tuple[logging.LogRecord, ...] = ()

    def emit(self, record: logging.LogRecord) -> None:
        self._early += (record,)
        if Path(self.baseFilename).parent.is_dir():
            early, self._early = self._early, ()
            for one in early:
                super().emit(one)


def _formatter() -> logging.Formatter:
    try:
        return JsonLines() if wants_json() else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    except ValueError as wrong:
        raise ConfigError(str(wrong)) from None


@contextmanager
def logs_in(path: Path) -> Iterator[None]:
    """Flower's, the server's and the sites' logs go to a file, made with the first line after the run folder is there.

    Of the sites' own logs only warnings: training losses are raw and stay out of the run folder, as they do under Ray.
    """
    handler = _OnceThere(path, delay=True, encoding="utf-8")
    handler.setFormatter(_formatter())
    loggers = [logging.getLogger(name) for name in ("flwr", "lalora_flwr")]
    sites = logging.getLogger("lalora_flwr.site")
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in (*loggers, sites)]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    sites.setLevel(logging.WARNING)
    try:
        yield
    finally:
        handler.close()
        for logger, handlers, propagate, level in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
