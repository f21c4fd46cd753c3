"""The Markdown report, from results made by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from lalora_flwr.compare.budget import privacy
from lalora_flwr.compare.table import Spread, Tuning, leader, markdown
from tests.compare.made import failed, result

TUNING = Tuning({"train.lr": (0.1, 0.3, 1.0)})


def rows(text: str, start: str) -> list[list[str]]:
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(start))
    table = []
    for line in lines[at:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return [table[0], *table[2:]]


def test_cells_are_mean_and_sample_standard_deviation_by_method_and_epsilon() -> None:
    accuracies = {("la-lora", 1.0): [0.70, 0.80], ("la-lora", math.inf): [0.9, 0.9], ("dp-lora", 1.0): [0.60, 0.64]}
    results = [
        result(a, strategy=m, privacy__epsilon=e, seed=seed)
        for (m, e), list_ in accuracies.items()
        for seed, a in enumerate(list_)
    ]
    text = markdown(results)
    assert rows(text, "| method |") == [
        ["method", "ε = 1", "non-private (ε = inf)"],
        ["la-lora", "**75.0 ± 7.1**", "90.0 ± 0.0"],
        ["dp-lora", "62.0 ± 2.8", "—"],
    ]
    assert "Runs with ε = inf are non-private" in text and "ε describes the mechanism" in text
    assert "The frozen model alone: 20.0." in text
    assert "Equal budget: same ε in a column and δ = 0.0001; same 4 rounds, 10 local steps" in text
    assert "learning rate 0.3; 2 seeds (0, 1)" in text
    assert "NOT an equal" not in text and "Tuning" not in text


def test_one_run_has_no_deviation_and_no_lead() -> None:
    text = markdown([result(0.9), result(0.1, strategy="dp-lora")])
    assert rows(text, "| method |")[1:] == [["la-lora", "90.0"], ["dp-lora", "10.0"]]
    assert "No method is bold" in text


def test_a_lead_within_the_combined_standard_error_is_not_bold() -> None:
    a, b = Spread.of([0.80, 0.84]), Spread.of([0.78, 0.82])  # errors 0.02 each: 0.028 together
    assert a.error == pytest.approx(0.02)
    assert leader({"a": a, "b": b}) is None
    assert leader({"a": a, "b": Spread.of([0.77, 0.81])}) == "a"  # a lead of 0.03
    assert leader({"a": Spread.of([0.77, 0.81]), "b": a, "c": None}) == "b"
    assert leader({"a": a}) is None and leader({}) is None
    assert leader({"a": Spread.of([0.9]), "b": b}) is None  # one run has no error to compare with


def test_tuned_values_edges_and_the_grid_are_shown() -> None:
    tuned = {0.1: 0.6, 0.3: 0.7, 1.0: 0.8}
    results = [result(a, True, ("tuning",), train__lr=lr, seed=100) for lr, a in tuned.items()]
    results += [result(0.75, True, ("final",), train__lr=1.0, seed=seed) for seed in (0, 1)]
    text = markdown(results, dataclasses.replace(TUNING, only_tuning={"data.test": "file:dev.tsv"}))
    assert rows(text, "| method | ε = 3")[1] == ["la-lora", "75.0 ± 0.0 (lr 1*)"]
    assert "`*` The chosen value is the first or the last of its grid" in text
    assert rows(text, "| method | ε |") == [
        ["method", "ε", "lr 0.1", "lr 0.3", "lr 1"],
        ["la-lora", "3", "60.0", "70.0", "80.0 ←"],
    ]
    assert "learning rate tuned for each method and ε on the same grid [0.1, 0.3, 1]" in text
    assert "tuned on 1 seed (100) with data.test = file:dev.tsv" in text and "optimistic" not in text
    assert "their ε comes on top" in text
    assert "optimistic" in markdown(results, TUNING)  # without another test set


def test_a_winner_inside_the_grid_has_no_star_and_a_failed_value_is_named() -> None:
    results = [
        result(a, True, ("tuning", "final") if lr == 0.3 else ("tuning",), train__lr=lr) for lr, a in {0.1: 0.6, 0.3: 0.7}.items()
    ]
    results.append(dataclasses.replace(failed(train__lr=1.0), stages=("tuning",), tuned=(("train.lr", 1.0),)))
    text = markdown(results, TUNING)
    assert rows(text, "| method | ε = 3")[1] == ["la-lora", "70.0 (lr 0.3)"]
    assert rows(text, "| method | ε |")[1] == ["la-lora", "3", "60.0", "70.0 ←", "failed"]
    assert "`*`" not in text and "counts as worst" in text


def test_a_failed_final_run_is_counted_and_never_averaged() -> None:
    text = markdown([result(0.8, stages=("final",)), failed(seed=1), failed(strategy="dp-lora")])
    assert rows(text, "| method |")[1:] == [["la-lora", "80.0, 1 of 2 runs"], ["dp-lora", "none"]]
    assert "2 of 3 runs have no result and are left out: diverged." in text


@pytest.mark.parametrize(
    ("key", "values", "shown"),
    [
        ("num_rounds", (2, 3), "num-rounds (2, 3)"),
        ("train__local_steps", (1, 2), "train.local-steps (1, 2)"),
        ("train__batch_size", (10, 20), "train.batch-size (10, 20)"),
        ("num_supernodes", (2, 3), "num-supernodes (2, 3)"),
        ("fraction_train", (0.5, 1.0), "fraction-train (0.5, 1)"),
        ("privacy__delta", (1e-5, 1e-4), "privacy.delta (1e-05, 0.0001)"),
        ("data__beta", (0.1, 1.0), "data.beta (0.1, 1)"),
    ],
)
def test_another_budget_is_called_so(key: str, values: tuple[float, float], shown: str) -> None:
    text = markdown([result(0.5, **{key: values[0]}), result(0.6, strategy="dp-lora", **{key: values[1]})])
    assert f"**NOT an equal-budget comparison**: {shown} differs." in text and "Equal budget" not in text


def test_keys_that_are_no_budget_do_not_spoil_it() -> None:
    text = markdown([result(0.5), result(0.6, strategy="dp-lora", lora__rank=8, train__lr=1.0, train__num_threads=2)])
    assert "Equal budget" in text and "train.lr differs (0.3, 1)" in text
    assert rows(text, "| method |")[1:] == [["la-lora", "50.0 (lr 0.3)"], ["dp-lora", "60.0 (lr 1)"]]


def test_another_base_model_is_said() -> None:
    text = markdown([result(0.5), result(0.6, model__name="timm/vit_tiny_patch16_224")])
    assert "The runs differ in the base model: model.name (embedded/vit-digits, timm/vit_tiny_patch16_224)." in text


def test_runs_without_privacy_promise_nothing() -> None:
    text = markdown([result(0.5, privacy__epsilon=math.inf)])
    assert "Privacy:" not in text and "seeded" not in text and "non-private" in text


def test_no_method_leads_across_metrics() -> None:
    results = [result(0.9, strategy="la-lora", seed=s) for s in (0, 1)]
    other = [result(0.5, strategy="dp-lora", seed=s) for s in (0, 1)]
    assert "**" in markdown([*results, *other])
    others = [dataclasses.replace(r, summary=dataclasses.replace(r.summary, quality={"auroc": 0.5})) for r in other]  # type: ignore[type-var]
    text = markdown([*results, *others])
    assert "**" not in text and "No method is bold, because the runs are measured by different metrics." in text
    assert "accuracy or AUROC of the last round" in text


def test_shared_noise_is_said_with_its_worst_case() -> None:
    one = result(0.8)
    assert one.summary and not any("secure-sum" in line for line in privacy([one], False))
    shared = dataclasses.replace(
        one, summary=dataclasses.replace(one.summary, trust="secure-sum", colluders=2, epsilon_alone=9.314)
    )
    said = " ".join(privacy([one, shared], False))
    assert "ε then holds if at most 2 of the other sites side with the server, and is up to 9.31 if all of them do." in said
