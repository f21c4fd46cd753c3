"""What a site says of itself when it is greeted: which one it is, and what its owner tells of its strength."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of a site in the owners' rosters
NAMES = "of at most 64 letters, digits, dots, dashes and underscores, the first a letter or a digit"
PRECISIONS = ("float32", "bfloat16", "nf4")
_NUMBER = re.compile(r"(rank|layers|steps|batch)=([1-9][0-9]{0,5})", re.ASCII)
_PRECISION = re.compile(r"(precision)=([a-z0-9]+)", re.ASCII)
_OWN = ("batch", "precision")  # of the site's machine alone: they change what it sends by rounding, and in four bits by theirs


@dataclass(frozen=True)
class Words:
    """What the words of a profile say; None: no bound, or as the run says.

    Attributes:
        rank: components of each LoRA pair that the site holds.
        layers: how many layers it trains, counted from the last.
        steps: the most local steps that it takes in a round.
        batch: the most records that go through its model together.
        precision: of its frozen weights.
        unknown: the words that are none of these, or say one of them in a way that cannot be.
    """

    rank: int | None = None
    layers: int | None = None
    steps: int | None = None
    batch: int | None = None
    precision: str | None = None
    unknown: tuple[str, ...] = ()

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(text: str) -> Words:
        numbers: dict[str, int] = {}
        precision: str | None = None
        unknown: list[str] = []
        for word in text.split():
            number, other = _NUMBER.fullmatch(word), _PRECISION.fullmatch(word)
            if number and number[1] not in numbers:
                numbers[number[1]] = int(number[2])
            elif other and other[2] in PRECISIONS and precision is None:
                precision = other[2]
            else:
                unknown.append(word)
        return Words(**numbers, precision=precision, unknown=tuple(unknown))

    @property
    def parts(self) -> bool:
        """Whether they say something that a method has to know of."""
        return any(value is not None for value in (self.rank, self.layers, self.steps))

    @property
    def wrong(self) -> bool:
        """Whether they say something of the site's machine in a way that cannot be."""
        return any(word.partition("=")[0] in _OWN for word in self.unknown)


@dataclass(frozen=True)
class Profile:
    """Public facts of one site, the same for the server and the site.

    Attributes:
        site: a virtual site's number; a real site's node id.
        words: what the owner tells every server: the node-config key ``profile``, free text such as ``rank=2``.
        name: in the owners' rosters, of a site that can take part in a secure sum; empty elsewhere.
        records: that a site with a name declares, or a virtual one holds; 0 if nobody asked.
    """

    site: int
    words: str = ""
    name: str = ""
    records: int = 0

    @property
    def told(self) -> Words:
        """What its words say."""
        return Words.of(self.words)


WHOLE = Profile(0)  # of a site that says nothing of itself
