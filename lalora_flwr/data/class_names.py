"""The names of the classes, as far as the settings alone say them."""

from __future__ import annotations

from lalora_flwr.data.named import named_data_set
from lalora_flwr.ground.lists import listed
from lalora_flwr.settings import DataSettings


def declared_labels(settings: DataSettings) -> tuple[str, ...]:
    """The names that ``data.labels`` gives, in order; none if it is empty."""
    return tuple(listed(settings.labels))


def known_labels(settings: DataSettings) -> tuple[str, ...]:
    """The names of a data set with a name, else those of ``data.labels``.

    Raises:
        ConfigError: the package that provides the data set is broken.
    """
    named = named_data_set(settings.name)
    return declared_labels(settings) if named is None else named.labels
