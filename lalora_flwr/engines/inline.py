"""All sites in this process, some of them in shared passes: for debugging, tests and fast sweeps. No Ray, no SuperLink."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Message, MessageType
from flwr.clientapp import ClientApp

from lalora_flwr.engines.together import Order, SitesTogether, shared_passes
from lalora_flwr.engines.virtual_grid import VirtualGrid
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
from lalora_flwr.site.app import SiteApp, make_client_app
from lalora_flwr.site.host import Host
from lalora_flwr.training.learner import LearnerCache, ModelStore


class InlineGrid(VirtualGrid):
    """Flower's `Grid` over a ClientApp that is called directly."""

    def __init__(
        self, app: ClientApp, num_supernodes: int, run_config: dict[str, Value], together: SitesTogether | None = None
    ) -> None:
        """``together``: serves orders to train in place of ``app``, several at once."""
        super().__init__(num_supernodes, run_config)
        self._app, self._together = app, together

    def serve(self, orders: Sequence[Order], timeout: float | None) -> list[Message]:
        if self._together and orders[0][0].metadata.message_type == MessageType.TRAIN:
            return self._together(orders, self._app)
        return [self._app(message, context) for message, context in orders]


def simulated_app(models: ModelStore) -> SiteApp:
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
    served = app or simulated_app(models)
    together = None if app else shared_passes(served)
    grid = InlineGrid(served, settings.num_supernodes, dict(flatten(settings)), together)
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
