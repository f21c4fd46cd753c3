"""What a run chooses by name. Each registry holds places, not values: settings are checked before anything heavy is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lalora_flwr.ground.registry import Registry

if TYPE_CHECKING:
    from lalora_flwr.settings.schema import Settings


@runtime_checkable
class ChecksSettings(Protocol):
    """What the settings ask of a method, or of a data set with a name, before a run starts."""

    def check(self, settings: Settings) -> None:
        """Refuse settings that it cannot run with.

        Raises:
            ConfigError: naming the key, the value and what is allowed.
        """


_ADAPTER, _METHODS = "lalora_flwr.adapter", "lalora_flwr.methods"
METHODS = Registry(
    "strategy",
    "lalora.methods",
    {
        "la-lora": f"{_METHODS}.la_lora:METHOD",
        "dp-lora": f"{_METHODS}.dp_lora:METHOD",
        "ffa-lora": f"{_METHODS}.ffa_lora:METHOD",
        "rolora": f"{_METHODS}.rolora:METHOD",
        "ridge-head": f"{_METHODS}.ridge_head:METHOD",
        "steady-lora": f"{_METHODS}.steady_lora:METHOD",
        "fedsvd": f"{_METHODS}.fedsvd:METHOD",
        "fedask": f"{_METHODS}.fedsvd:FEDASK",
        "fedex-lora": f"{_METHODS}.fedex:METHOD",
        "flora": f"{_METHODS}.flora:METHOD",
        "fed-sb": f"{_METHODS}.fed_sb:METHOD",
        "as-lora": f"{_METHODS}.as_lora:METHOD",
        "fedrot-lora": f"{_METHODS}.fedrot:METHOD",
        "central-dp-lora": f"{_METHODS}.central:METHOD",
        "dynamic-rank": f"{_METHODS}.dynamic_rank:METHOD",
    },
)
FORMS = Registry(
    "form",
    "lalora.forms",
    {
        "lora": f"{_ADAPTER}.lora:LORA",
        "lora-residual": f"{_ADAPTER}.lora_residual:LORA_RESIDUAL",
        "lora-sb": f"{_ADAPTER}.lora_sb:LORA_SB",
        "ridge-head": f"{_ADAPTER}.ridge:RIDGE_HEAD",
    },
)
SCHEDULES = Registry(
    "lora.schedule",
    "lalora.schedules",
    {
        "both": f"{_METHODS}.schedules:BOTH",
        "B": f"{_METHODS}.schedules:ONLY_B",
        "A": f"{_METHODS}.schedules:ONLY_A",
        "step": f"{_METHODS}.schedules:BY_STEP",
        "round": f"{_METHODS}.schedules:BY_ROUND",
    },
    arguments="step and round as step:<pattern>",
)
FILTERS = Registry(
    "filter.name",
    "lalora.filters",
    {
        "none": f"{_METHODS}.filters:NONE",
        "gauss5": f"{_METHODS}.smoothing:GAUSS5",
        "gauss5-permuted": f"{_METHODS}.smoothing:GAUSS5_PERMUTED",
        "gauss": f"{_METHODS}.smoothing:GAUSS",
        "gauss-permuted": f"{_METHODS}.smoothing:GAUSS_PERMUTED",
        "gauss-adaptive": f"{_METHODS}.adaptive:ADAPTIVE",
        "wiener": f"{_METHODS}.wiener:WIENER",
        "precondition": f"{_METHODS}.precondition:PRECONDITION",
        "doppler": f"{_METHODS}.over_time:DOPPLER",
        "disk": f"{_METHODS}.over_time:DISK",
    },
    arguments="gauss and gauss-permuted as gauss:<width>",
)
MERGES = Registry(
    "merge.name",
    "lalora.merges",
    {
        "mean": f"{_METHODS}.merges:MEAN",
        "median": f"{_METHODS}.merges:MEDIAN",
        "trimmed-mean": f"{_METHODS}.merges:TRIMMED_MEAN",
    },
)
DATASETS = Registry("data.name", "lalora.datasets", {"digits": "lalora_flwr.data.digits:DIGITS"})
