"""The first round of a run that starts with a ridge head: another method, on the same frozen model."""

from __future__ import annotations

from torch import Tensor

from lalora_flwr.adapter.form import Adapter
from lalora_flwr.adapter.ridge import RidgeAdapter
from lalora_flwr.adapter.slots import Layout
from lalora_flwr.data.records import RecordSet
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.server.metrics import Quality
from lalora_flwr.settings import Settings
from lalora_flwr.settings.stages import ridge_stage
from lalora_flwr.training.evaluate import evaluate
from lalora_flwr.training.learner import ModelStore


class RidgeStage:
    """The model of the first round, and how its head becomes that of the others.

    Guarantee: post-processing of the released sums; of the public records no label is looked at.

    Attributes:
        settings: the stage's.
    """

    def __init__(self, settings: Settings, models: ModelStore, public: RecordSet) -> None:
        """
        Args:
            settings: the run's.
            models: where its frozen model comes from.
            public: the server's records.
        """
        self.settings, self._public = ridge_stage(settings), public
        self._learner = models.learner(self.settings)
        adapter = self._learner.adapter
        assert isinstance(adapter, RidgeAdapter)
        self._adapter = adapter

    @property
    def layout(self) -> Layout:
        return self._adapter.layout

    def check(self, adapter: Adapter) -> None:
        """Refuse an adapter that has no place for the head, before any site is asked.

        Raises:
            ConfigError: it does not train the layer that the ridge head stands for.
        """
        if missing := sorted(set(self._adapter.as_linear()) - set(adapter.of_base)):
            raise ConfigError(f"lora.head = 'ridge': the strategy trains no {missing[0]}; choose lora.head = 'trained', or auto")

    def prepared(self) -> dict[str, Tensor]:
        """What the stage starts from."""
        return self._adapter.prepared(self._learner.base, self._public)

    def quality(self, state: dict[str, Tensor]) -> Quality:
        """Of the model with the stage's tensors, which stay in it; with sums of zero of the frozen model."""
        self._adapter.load(state)
        return evaluate(self._learner, self._public)

    def start(self, adapter: Adapter) -> dict[str, Tensor]:
        """The head that is loaded, as slots of the other rounds' adapter."""
        head = self._adapter.as_start(self._learner.base, self._public)
        return {adapter.of_base[name]: value for name, value in head.items()}
