"""Which plots are drawn, and that they show the numbers."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lalora_flwr.compare.figures import NAMES, figures
from lalora_flwr.compare.results import Result
from lalora_flwr.ground.figures import rendered
from tests.compare.made import BEST_LR, ROUNDS, failed, result

METHODS = ("la-lora", "ffa-lora")


def drawn(results: list[Result]) -> dict[str, Any]:
    made = dict(figures(results))
    for figure in made.values():
        figure.savefig(io.BytesIO(), format="png", dpi=30)
    return made


def line(axes: Any, label: str) -> Any:
    return next(found for found in axes.get_lines() if found.get_label() == label)


def test_one_epsilon_and_one_learning_rate_leave_two_plots() -> None:
    made = drawn([result(strategy=m, seed=s) for m in METHODS for s in (0, 1)])
    assert list(made) == ["accuracy-by-round", "accuracy-by-bytes"]
    assert [len(figure.axes) for figure in made.values()] == [1, 1]


def test_rounds_without_an_evaluation_are_skipped_and_bytes_add_up() -> None:
    results = [result(seed=s) for s in (0, 1)]
    made = drawn(results)
    by_round = line(made["accuracy-by-round"].axes[0], "la-lora")
    assert list(by_round.get_xdata()) == [1, 3, 4]  # round 2 was not evaluated
    assert by_round.get_ydata()[-1] == pytest.approx(50 * (results[0].score + results[1].score))  # type: ignore[operator]
    assert list(line(made["accuracy-by-bytes"].axes[0], "la-lora").get_xdata()) == [0.002, 0.006, 0.008]
    assert list(line(made["accuracy-by-round"].axes[0], "frozen model").get_ydata()) == [20, 20]


def test_epsilons_are_panels_and_without_privacy_the_last_place() -> None:
    made = drawn([result(strategy=m, privacy__epsilon=e, seed=s) for e in (math.inf, 1.0, 8.0) for m in METHODS for s in (0, 1)])
    assert [axes.get_title() for axes in made["accuracy-by-round"].axes] == ["ε = 1", "ε = 8", "non-private (ε = inf)"]
    (axes,) = made["accuracy-by-epsilon"].axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "8", "none"]


def test_a_method_has_one_colour_in_all_plots() -> None:
    both, one = ("tuning", "final"), ("tuning",)
    results = [
        result(strategy=m, privacy__epsilon=e, train__lr=lr, tuned=True, stages=both if lr == BEST_LR[m] else one)
        for m in METHODS
        for e in (1.0, 3.0)
        for lr in (0.1, 0.3, 1.0)
    ]
    made = drawn(results)
    assert list(made) == ["accuracy-by-round", "accuracy-by-epsilon", "accuracy-by-bytes", "accuracy-by-learning-rate"]
    for method in METHODS:
        colours = {
            line(made[n].axes[0], method).get_color()
            for n in ("accuracy-by-round", "accuracy-by-bytes", "accuracy-by-learning-rate")
        }
        assert len(colours) == 1
    assert (
        line(made["accuracy-by-round"].axes[0], "la-lora").get_color()
        != line(made["accuracy-by-round"].axes[0], "ffa-lora").get_color()
    )
    tried = made["accuracy-by-learning-rate"].axes[0]
    assert tried.get_xscale() == "log" and list(line(tried, "ffa-lora").get_xdata()) == [0.1, 0.3, 1.0]
    rings = {
        float(found.get_xdata()[0])
        for found in tried.get_lines()
        if found.get_markerfacecolor() == "none" and len(found.get_xdata())
    }
    assert rings == {0.3, 1.0}
    rounds = line(made["accuracy-by-round"].axes[0], "ffa-lora").get_ydata()[-1]
    assert rounds == pytest.approx(100 * max(r.score for r in results if r.epsilon == 1.0 and r.values["strategy"] == "ffa-lora"))  # type: ignore[type-var, arg-type]


def test_compared_learning_rates_are_a_plot_too() -> None:
    results = [result(train__lr=lr) for lr in (0.1, 0.3)]
    assert "accuracy-by-learning-rate" in drawn(results)


def test_a_rate_by_rule_has_no_place_among_rates() -> None:
    assert "accuracy-by-learning-rate" not in drawn([result(train__lr=lr) for lr in (0.0, 0.3)])
    tried = drawn([result(train__lr=lr) for lr in (0.0, 0.1, 0.3)])["accuracy-by-learning-rate"].axes[0]
    assert {float(x) for found in tried.get_lines() for x in found.get_xdata()} == {0.1, 0.3}


def with_metric(metric: str, score: float, **changed: Any) -> Any:
    made = result(**changed)
    assert made.summary
    quality = {metric: score, "loss": 1.0}
    summary = dataclasses.replace(made.summary, quality=quality, frozen={metric: -9.0, "loss": 2.0})
    lines = tuple(
        dataclasses.replace(line, quality=quality if line.score is not None else {metric: None}) for line in made.metrics
    )
    return dataclasses.replace(made, summary=summary, metrics=lines)


def test_a_picture_is_named_by_its_metric_and_shows_no_more_than_can_be_read() -> None:
    made = drawn([with_metric("r2", score, seed=seed) for seed, score in enumerate((0.3, -7.0))])
    assert list(made) == ["r2-by-round", "r2-by-bytes"] and set(made) <= set(NAMES)
    (axes,) = made["r2-by-round"].axes
    assert axes.get_ylabel() == "test R² (%)" and axes.get_ylim()[0] == -100
    assert "below -100 not shown" in [text.get_text() for text in axes.texts]
    mixed = drawn([with_metric("r2", 0.3), with_metric("auroc", 0.8, seed=1)])
    assert list(mixed) == ["score-by-round", "score-by-bytes"]


def test_failed_runs_are_left_out_and_nothing_else_draws_nothing() -> None:
    assert drawn([failed(), failed(seed=1)]) == {}
    made = drawn([result(), failed(seed=1)])
    assert len(line(made["accuracy-by-round"].axes[0], "la-lora").get_xdata()) == ROUNDS - 1


def pixels(figure: Any) -> tuple[float, float]:
    """Width and height of the smallest panel as drawn at 100 dots per inch."""
    figure.savefig(io.BytesIO(), format="png", dpi=100)
    sizes = [axes.get_position().size * figure.get_size_inches() * 100 for axes in figure.axes]
    return min(size[0] for size in sizes), min(size[1] for size in sizes)


@pytest.mark.parametrize("count", [1, 4, 18])
def test_a_legend_of_many_or_long_names_leaves_the_panels_their_size(count: int) -> None:
    results = []
    for i in range(count):
        made = result(strategy="la-lora", lora__rank=i + 1)
        long = ("model.name", f"timm/swin_tiny_patch4_window7_224 of the folder number {i}")
        results.append(dataclasses.replace(made, labels=(("strategy", "la-lora"), long, ("privacy.epsilon", "3"))))
    for figure in drawn(results).values():
        width, height = pixels(figure)
        assert width > 400 and height > 220
        legend = figure.legends[0].get_window_extent(FigureCanvasAgg(figure).get_renderer())
        assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1 and legend.y1 <= figure.bbox.y1


@pytest.mark.parametrize(("seeds", "said"), [((0, 1, 2), "± one standard deviation over 3 seeds"), ((0,), "one seed")])
def test_every_figure_says_what_its_spread_is(seeds: tuple[int, ...], said: str) -> None:
    results = [
        result(strategy=m, privacy__epsilon=e, train__lr=lr, seed=s)
        for m in METHODS
        for e in (1.0, 3.0)
        for lr in (0.1, 0.3)
        for s in seeds
    ]
    made = drawn(results)
    assert len(made) == 4
    for name, figure in made.items():
        assert any(said in text.get_text() for text in figure.texts), name
        assert name == "accuracy-by-epsilon" or all(axes.collections for axes in figure.axes), name  # bands


def test_the_same_figure_gives_the_same_files() -> None:
    one, two = ([rendered(figure) for figure in drawn([result(seed=s) for s in (0, 1)]).values()] for _ in range(2))
    assert one == two and set(one[0]) == {".png", ".svg", ".pdf"}
    assert one[0][".pdf"].startswith(b"%PDF") and b"<svg" in one[0][".svg"]
