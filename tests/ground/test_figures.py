"""Texts of figures: every letter is drawn, or named by its number; nothing is drawn as an empty box, and nothing warns."""

from __future__ import annotations

import warnings

from matplotlib.figure import Figure

from lalora_flwr.ground.figures import readable, rendered


def drawn(words: str) -> Figure:
    figure = Figure(figsize=(4, 3))
    figure.subplots().set_title(words)
    return figure


def title(figure: Figure) -> str:
    return figure.axes[0].get_title()


def test_a_letter_that_no_font_has_is_shown_by_its_number() -> None:
    figure = drawn("class \U000f1234, ε ≤ 1, R²")  # of the private use area, which no font fills
    readable(figure)
    assert title(figure) == "class \\uf1234, ε ≤ 1, R²"


def test_letters_that_fonts_have_stay() -> None:
    for words in ("plain", "Größe, ε, Ελλάδα, Киев", "two\nlines é"):
        figure = drawn(words)
        readable(figure)
        assert title(figure) == words


def test_no_class_name_makes_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rendered(drawn("肺炎 폐렴 ปอดบวม"))[".png"].startswith(b"\x89PNG")
