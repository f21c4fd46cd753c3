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


@runtime_checkable
class HasForm(Protocol):
    """A method, as far as the name of its form goes."""

    @property
    def form(self) -> str: ...


@runtime_checkable
class HasAhead(Protocol):
    """A filter, as far as the points at which its gradients are taken go."""

    @property
    def ahead_share(self) -> float: ...


@runtime_checkable
class HasFilter(Protocol):
    """A method, as far as its filter goes."""

    @property
    def filter(self) -> HasAhead: ...


_METHODS, _ADAPTER = "lalora_flwr.methods", "lalora_flwr.adapter"
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
        "fedsa-lora": f"{_METHODS}.fedsa:METHOD",
        "central-dp-lora": f"{_METHODS}.central:METHOD",
        "hetlora": f"{_METHODS}.hetlora:METHOD",
        "flexlora": f"{_METHODS}.flexlora:METHOD",
        "hlora": f"{_METHODS}.flexlora:HLORA",
        "dynamic-rank": f"{_METHODS}.dynamic_rank:METHOD",
        "bitfit": f"{_METHODS}.other_forms:BITFIT",
        "bottleneck": f"{_METHODS}.other_forms:BOTTLENECK",
        "soft-prompt": f"{_METHODS}.other_forms:SOFT_PROMPT",
        "visual-prompt": f"{_METHODS}.other_forms:VISUAL_PROMPT",
        "pixel-prompt": f"{_METHODS}.other_forms:PIXEL_PROMPT",
        "head-only": f"{_METHODS}.other_forms:HEAD_ONLY",
    },
)
FORMS = Registry(
    "lora.form",
    "lalora.forms",
    {
        "lora": f"{_ADAPTER}.lora:LORA",
        "bitfit": f"{_ADAPTER}.bitfit:BITFIT",
        "bottleneck": f"{_ADAPTER}.bottleneck:BOTTLENECK",
        "soft-prompt": f"{_ADAPTER}.soft_prompt:SOFT_PROMPT",
        "visual-prompt": f"{_ADAPTER}.visual_prompt:VISUAL_PROMPT",
        "pixel-prompt": f"{_ADAPTER}.pixel_prompt:PIXEL_PROMPT",
        "head": f"{_ADAPTER}.plain:HEAD_ONLY",
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
        "slow-a": f"{_METHODS}.slower:SLOW_A",
        "doppler": f"{_METHODS}.over_time:DOPPLER",
        "disk": f"{_METHODS}.over_time:DISK",
        "kalman": f"{_METHODS}.kalman:KALMAN",
    },
    arguments="with an argument as gauss:9, gauss-permuted:9, slow-a:0.1, doppler:0.9, disk:0.7, kalman:0.7",
)
MERGES = Registry(
    "merge.name",
    "lalora.merges",
    {
        "mean": f"{_METHODS}.merges:MEAN",
        "median": f"{_METHODS}.merges:MEDIAN",
        "trimmed-mean": f"{_METHODS}.merges:TRIMMED_MEAN",
        "per-entry": f"{_METHODS}.hetlora:PER_ENTRY",
        "zero-padded": f"{_METHODS}.hetlora:ZERO_PADDED",
        "product-svd": f"{_METHODS}.flexlora:PRODUCT_SVD",
        "product-svd-split": f"{_METHODS}.flexlora:PRODUCT_SVD_SPLIT",
    },
)
TRAVELS = Registry(
    "merge.travel",
    "lalora.travels",
    {
        "everything": f"{_METHODS}.travel:EVERYTHING",
        "trained": f"{_METHODS}.travel:TRAINED",
        "everything-down": f"{_METHODS}.travel:EVERYTHING_DOWN",
        "share-a": f"{_METHODS}.travel:SHARE_A",
    },
)
TRACKERS = Registry(
    "track",
    "lalora.trackers",
    {
        "tensorboard": "lalora_flwr.server.trackers.tensorboard:TensorBoard",
        "wandb": "lalora_flwr.server.trackers.wandb:WeightsAndBiases",
        "mlflow": "lalora_flwr.server.trackers.mlflow:Mlflow",
    },
)
DATASETS = Registry("data.name", "lalora.datasets", {"digits": "lalora_flwr.data.digits:DIGITS"})


def form_of(settings: Settings) -> str:
    """The name of a run's form: what ``lora.form`` says, or the strategy's own.

    Raises:
        ConfigError: an unknown strategy.
    """
    return strategys_form(settings) if settings.lora.form == "auto" else settings.lora.form


def strategys_form(settings: Settings) -> str:
    """The name of the form that the run's strategy has by itself.

    Raises:
        ConfigError: an unknown strategy.
    """
    return METHODS.get(settings.strategy, HasForm).form


def passes_of(settings: Settings) -> int:
    """How often a record goes through the model in a step: twice where the filter takes its gradients at two points.

    Raises:
        ConfigError: an unknown strategy or filter.
    """
    name = settings.filter.name.partition(":")[0]
    chosen = METHODS.get(settings.strategy, HasFilter).filter if name == "auto" else FILTERS.get(name, HasAhead)
    return 2 if chosen.ahead_share else 1
