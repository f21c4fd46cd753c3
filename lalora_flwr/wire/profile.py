"""What a site says of itself when it is greeted: which one it is, and what its owner tells of its strength."""

from __future__ import annotations

import re
from dataclasses import dataclass

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of a site in the owners' rosters
NAMES = "of at most 64 letters, digits, dots, dashes and underscores, the first a letter or a digit"


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


WHOLE = Profile(0)  # of a site that says nothing of itself
