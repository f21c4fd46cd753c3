"""What a run will cost, before any data is touched."""

from __future__ import annotations

from dataclasses import dataclass

from peft import get_peft_model_state_dict

from lalora_flwr.adapter.lora import attach_adapter, select
from lalora_flwr.data.data_set import facts, private_records
from lalora_flwr.data.partition import equal_share
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.methods import METHODS
from lalora_flwr.methods.schedules import BOTH, parse_schedule
from lalora_flwr.models import load_base_model
from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.mechanism import Mechanism
from lalora_flwr.server.strategy import resolved_choices
from lalora_flwr.settings import Settings
from lalora_flwr.site.round import mechanism_for
from lalora_flwr.wire.messages import ARRAY_HEADER


@dataclass(frozen=True)
class Plan:
    """The costs of a run; all of them follow from the settings and the data set's public size.

    Attributes:
        schedule, filter: the resolved choices of the method.
        records: records of the smallest site in an equal split, the site that needs the most noise.
        mechanism: that site's public constants.
        steps: the most noisy steps a site may take in the run.
        trainable, frozen: numbers of parameters.
        bytes_down, bytes_up: bytes to and from one site in round 1 and in round 2 (methods that alternate by round differ).
    """

    schedule: str
    filter: str
    records: int
    mechanism: Mechanism
    steps: int
    trainable: int
    frozen: int
    bytes_down: int
    bytes_up: tuple[int, int]

    def epsilon_after(self, rounds: int, settings: Settings) -> float:
        """Predicted ε of a site that served so many rounds."""
        steps = min(rounds * settings.train.local_steps, self.steps)
        segment = (self.mechanism.noise_multiplier, self.mechanism.sample_rate, steps)
        return epsilon_spent([segment], settings.privacy.delta, settings.privacy.accountant)


def make_plan(settings: Settings) -> Plan:
    """Check that the run is possible, and price it.

    Builds the model's architecture without its weights, and reads the data only for what the settings do not declare
    (``data.labels``, ``data.records``).

    Raises:
        ConfigError: if a setting is impossible.
    """
    sites = settings.num_supernodes
    records = equal_share(private_records(settings), sites, sites - 1)
    base = load_base_model(settings.model, facts(settings), settings.data.max_tokens, weights=False)
    model = attach_adapter(base, settings.lora, seed=0)
    PerSampleGradients(model)  # refuses layers without a per-sample rule
    adapter = get_peft_model_state_dict(model, save_embedding_layers=False)
    schedule_text, filter_name = resolved_choices(settings)
    schedule = parse_schedule(schedule_text)
    partly = METHODS[settings.strategy].share == "trained"

    def travelling(factors: frozenset[str]) -> int:
        return sum(4 * adapter[name].numel() + ARRAY_HEADER for name in select(adapter, factors))

    def up(server_round: int) -> int:
        return travelling(schedule.trained_in(server_round, settings.train.local_steps) if partly else BOTH)

    trainable = sum(adapter[name].numel() for name in select(adapter, schedule.ever_trained))
    total = sum(p.numel() for p in model.parameters())
    return Plan(
        schedule=schedule_text,
        filter=filter_name,
        records=records,
        mechanism=mechanism_for(settings, records),
        steps=settings.steps_per_site,
        trainable=trainable,
        frozen=total - trainable,
        bytes_down=travelling(schedule.ever_trained if partly else BOTH),
        bytes_up=(up(1), up(2)),
    )
