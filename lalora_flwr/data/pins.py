"""What a site's records are is its owner's word: a run may only agree with it."""

from __future__ import annotations

from dataclasses import replace

from lalora_flwr.data.class_names import known_labels
from lalora_flwr.ground.errors import SiteRefusal
from lalora_flwr.ground.lists import ends_of, joined
from lalora_flwr.ledger.caps import Caps
from lalora_flwr.settings import DataSettings, Settings


def check_pins(caps: Caps, settings: Settings) -> None:
    """Refuse a run that takes the site's records for something else. Looks at the run's settings only.

    Guarantee: whether a run is refused here follows from its settings and the node-config, never from a record. A run that is
    not refused has the owner's task, kind of labels, and classes in the owner's order, so it cannot choose which records count.

    Raises:
        SiteRefusal: with a fixed reason that holds none of the site's names.
    """
    if settings.task != caps.task:
        raise SiteRefusal("data: the run's task is not the one that the site's node-config names")
    if settings.data.problem_type != caps.problem_type or _ends(settings.data.label_range) != _ends(caps.label_range):
        raise SiteRefusal("data: the run's data.problem-type or data.label-range is not what the site's node-config says")
    if caps.has_classes and known_labels(settings.data) != caps.labels:
        raise SiteRefusal("data: the run's data.labels are not the classes that the site's node-config names, in its order")
    if settings.data.max_tokens > caps.max_tokens:
        raise SiteRefusal("data: the run's data.max-tokens are above the site's max-tokens")


def pinned(caps: Caps, settings: Settings) -> Settings:
    """The settings with everything that says what the records are from the owner; of the run's only ``data.max-tokens`` is left.

    Guarantee: the run's data set, test records, split, columns and answers decide nothing, and nothing in the result names a
    file: ``data_set`` of it refuses to read.
    """
    own = DataSettings(
        name="sites",
        split=caps.split,
        image=caps.image_column,
        text=caps.text_column,
        text_pair=caps.text_pair_column,
        label=caps.label_column,
        response=caps.response_column,
        problem_type=caps.problem_type,
        label_range=caps.label_range,
        labels=joined(caps.labels),
        max_tokens=settings.data.max_tokens,
    )
    return replace(settings, data=own)


def _ends(label_range: str) -> tuple[float, float] | None:
    return ends_of(label_range) if label_range else None
