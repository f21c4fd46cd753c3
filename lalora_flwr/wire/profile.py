"""What a site says of itself when it is greeted: which one it is, and what its owner tells of its strength."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """Public facts of one site, the same for the server and the site.

    Attributes:
        site: a virtual site's number; a real site's node id.
        words: what the owner tells every server: the node-config key ``profile``, free text such as ``rank=2``.
    """

    site: int
    words: str = ""
