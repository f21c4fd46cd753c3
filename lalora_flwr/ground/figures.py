"""How figures look and are written: as pixels for a screen, as SVG and PDF for a paper."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lalora_flwr.ground.extras import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODULE = "matplotlib"  # imported in this file alone, and only to draw
SUFFIXES = (".png", ".svg", ".pdf")
DPI = 150
# Okabe and Ito's palette, told apart by colour-blind readers as well; yellow last, for it is faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
Style = Mapping[str, Any]  # of matplotlib's plots


def styles_of(names: Sequence[str]) -> dict[str, Style]:
    """Colour and marker of each name, the same in all plots; beyond eight the line style changes too."""
    unique = list(dict.fromkeys(names))
    return {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": ("-", "--", ":")[i // len(COLOURS) % 3],
            "markersize": 4.5,
            "linewidth": 1.6,
        }
        for i, name in enumerate(unique)
    }


def blank(width: float, height: float) -> Figure:
    """An empty figure of so many inches, which keeps its parts apart by itself.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    need(MODULE, "plots")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def whole_numbers(axes: Axes) -> None:
    """No tick of the x axis between two whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def colours_of(count: int) -> list[tuple[float, ...]]:
    """So many colours, told apart as well as their number allows."""
    from matplotlib import colormaps

    colours = colormaps["tab20" if count > 10 else "tab10"] if count <= 20 else colormaps["turbo"]
    return [colours(number) if count <= 20 else colours(number / count) for number in range(count)]


def plain(axes: Axes) -> None:
    """A light grid behind, and no frame at the top and on the right."""
    axes.grid(True, linewidth=0.5, alpha=0.4)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def as_label(text: str, longest: int = 60) -> str:
    """A name that others chose as a picture shows it: not as a formula, not hidden for how it begins, and not too long."""
    short = text if len(text) <= longest else text[: longest - 1] + "…"
    return (" " if short.startswith("_") else "") + short.replace("$", r"\$")


# Fonts that matplotlib falls back on, where they are installed, for letters that its own has not
FALLBACK = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "Droid Sans Fallback", "IPAGothic")
OWN = "DejaVu Sans"


@functools.cache
def _fonts() -> tuple[tuple[str, frozenset[int]], ...]:
    """The families to draw with, and the letters of each."""
    from matplotlib import font_manager

    known = {font.name: font.fname for font in font_manager.fontManager.ttflist if font.name in (OWN, *FALLBACK)}
    names = [name for name in (OWN, *FALLBACK) if name in known]
    return tuple((name, frozenset(font_manager.get_font(known[name]).get_charmap())) for name in names)


def readable(figure: Figure) -> None:
    """Draw every text with fonts that have its letters; a letter that none has is shown by its number, ``\\u4e2d``."""
    from matplotlib.text import Text

    fonts = _fonts()
    letters = frozenset[int]().union(*(own for _, own in fonts))
    for text in figure.findobj(Text):
        words = text.get_text() if isinstance(text, Text) else ""
        if not isinstance(text, Text) or words.isascii():
            continue
        if any(ord(letter) not in fonts[0][1] for letter in words):
            text.set_fontfamily([name for name, _ in fonts])
        text.set_text("".join(c if ord(c) in letters or c == "\n" else f"\\u{ord(c):04x}" for c in words))


def rendered(figure: Figure) -> dict[str, bytes]:
    """A figure's files by suffix, without dates: the same figure gives the same bytes."""
    import matplotlib

    readable(figure)
    found = {}
    with matplotlib.rc_context({"svg.hashsalt": "lalora", "pdf.fonttype": 42}):
        for suffix in SUFFIXES:
            file = io.BytesIO()
            metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix, {})
            figure.savefig(file, format=suffix[1:], dpi=DPI, metadata=metadata)
            found[suffix] = file.getvalue()
            figure.set_layout_engine("none")  # laid out once, for all
    return found
