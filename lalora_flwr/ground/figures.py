"""How figures are written: as pixels for a screen, as SVG and PDF for a paper."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
DPI = 150


def as_label(text: str, longest: int = 60) -> str:
    """A name that others chose as a picture shows it: not as a formula, not hidden for how it begins, and not too long."""
    short = text if len(text) <= longest else text[: longest - 1] + "…"
    return (" " if short.startswith("_") else "") + short.replace("$", r"\$")


def rendered(figure: Figure) -> dict[str, bytes]:
    """A figure's files by suffix, without dates: the same figure gives the same bytes."""
    import matplotlib

    found = {}
    with matplotlib.rc_context({"svg.hashsalt": "lalora", "pdf.fonttype": 42}):
        for suffix in SUFFIXES:
            file = io.BytesIO()
            metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix, {})
            figure.savefig(file, format=suffix[1:], dpi=DPI, metadata=metadata)
            found[suffix] = file.getvalue()
            figure.set_layout_engine("none")  # laid out once, for all
    return found
