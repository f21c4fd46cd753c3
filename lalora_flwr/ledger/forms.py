"""What a site lets a run train: the forms of adapters that its owner allows."""

from __future__ import annotations

from lalora_flwr.settings import Settings
from lalora_flwr.settings.choices import form_of, strategys_form


def form_allowed(strategies: tuple[str, ...], forms: tuple[str, ...], settings: Settings) -> bool:
    """Whether the owner's lists allow what a run trains.

    Who allows strategies by name has allowed what these train by themselves, and no other form under their names.

    Args:
        strategies: ``allowed-strategies``; none: all.
        forms: ``allowed-forms``; none: those that the strategies say.
        settings: of the run.
    """
    form = form_of(settings)
    if forms:
        return form in forms
    return not strategies or form == strategys_form(settings)
