"""ε of the sites of a run, computed anew only for those whose counts may have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


@dataclass
class Spent:
    """ε of each site, and ε if all others side with the server.

    Attributes:
        news: sites that were touched since the stage of the run after this one looked.
    """

    news: set[int] = field(default_factory=set)
    _touched: set[int] = field(default_factory=set)
    _by_site: dict[int, tuple[float, float]] = field(default_factory=dict)

    def touch(self, sites: Iterable[int]) -> None:
        """What these sites spent may be another than it was."""
        self._touched.update(sites)
        self.news.update(sites)

    def largest(self, compute: Callable[[int], tuple[float, float]], before: Spent | None) -> tuple[float, float]:
        """The largest of either over the sites; 0 if there are none.

        Args:
            compute: both of a site.
            before: of the stage before, whose steps count too.
        """
        touched, self._touched = self._touched | (before.news if before else set()), set()
        if before:
            before.news = set()
        self._by_site.update((site, compute(site)) for site in touched)
        return tuple(max((both[which] for both in self._by_site.values()), default=0.0) for which in (0, 1))  # type: ignore[return-value]
