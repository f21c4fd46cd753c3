"""Evaluation on the sites: right when allowed, refused otherwise, and never silent about what it gives away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from safetensors.torch import load_file

from lalora_flwr import site, site_evaluation
from lalora_flwr.adapted import adapted_model
from lalora_flwr.config import Settings
from lalora_flwr.data.data_set import data_set
from lalora_flwr.data.partition import site_rows
from lalora_flwr.errors import SiteRefusal
from lalora_flwr.federation import SITE_ACCURACY_LEAK
from lalora_flwr.lora.adapter import load_adapter_state
from lalora_flwr.messages import ARRAYS, CONFIG, SITE_METRICS, BadReply, SiteMetrics, read_site_metrics, to_arrays
from tests.conftest import AppCall, Finished, Spy, run_spied, small, strict_json

MakeContext = Callable[[Settings], Context]


def naive_site_accuracies(run: Finished) -> list[float]:
    """Each site's share of its records that the final model gets right, one record at a time."""
    adapted = adapted_model(run.settings)
    load_adapter_state(adapted.model, load_file(run.path / "checkpoint" / "adapter.safetensors"))
    adapted.model.eval()
    data, found = data_set(run.settings), []
    for rows in site_rows(data.classes(), run.settings.data, run.settings.seed, run.settings.num_supernodes):
        images, labels = data.private(rows, adapted.base.encode).batch(torch.arange(len(rows)))
        with torch.no_grad():
            guesses = [int(adapted.base.logits(adapted.model, image[None]).argmax()) for image in images]
        found.append(sum(g == int(y) for g, y in zip(guesses, labels, strict=True)) / len(rows))
    return found


@pytest.mark.parametrize("strategy", ["la-lora", "ffa-lora"])
def test_the_mean_over_sites_is_in_the_metrics_and_called_a_leak(strategy: str, finished: Callable[..., Finished]) -> None:
    run = finished(strategy=strategy, evaluate_sites=True)
    accuracies = naive_site_accuracies(run)
    assert run.metrics[-1]["site_accuracy"] == pytest.approx(sum(accuracies) / len(accuracies), abs=1e-9)
    assert run.summary["site_accuracy"] == run.metrics[-1]["site_accuracy"]
    assert run.summary["leaks"] == SITE_ACCURACY_LEAK


def test_it_is_off_by_default_and_then_no_site_is_asked(finished: Callable[..., Finished]) -> None:
    run = finished()
    assert {order.metadata.message_type for order, _ in run.spy.exchange} == {"query.identity", "train"}
    assert "leaks" not in run.summary and not any("site_accuracy" in line for line in run.metrics)


def test_training_is_the_same_with_and_without(finished: Callable[..., Finished]) -> None:
    assert run_bytes(finished()) == run_bytes(finished(evaluate_sites=True))


def run_bytes(run: Finished) -> bytes:
    return (run.path / "adapter" / "adapter_model.safetensors").read_bytes()


def test_rounds_that_are_not_evaluated_ask_no_site(finished: Callable[..., Finished]) -> None:
    run = finished(evaluate_sites=True, num_rounds=3, evaluate_every=2)
    assert ["site_accuracy" in line for line in run.metrics] == [False, True, True]


def test_a_site_that_does_not_answer_is_left_out_and_no_failure(tmp_path: Path) -> None:
    def behaviour(message: Message, context: Context, app: AppCall) -> Message:
        if message.metadata.message_type == "evaluate" and context.node_config["partition-id"] == 1:
            return Message(RecordDict({SITE_METRICS: MetricRecord({"accuracy": float("nan"), "loss": 0.0})}), reply_to=message)
        return app(message, context)

    settings = small(tmp_path, evaluate_sites=True, num_rounds=1)
    spy = Spy(behaviour)
    line = strict_json((run_spied(settings, spy) / "metrics.jsonl").read_text())
    replies = [reply for order, reply in spy.exchange if order.metadata.message_type == "evaluate"]
    others = [float(reply.content[SITE_METRICS]["accuracy"]) for i, reply in enumerate(replies) if i != 1]  # type: ignore[arg-type, call-overload, index]
    assert line["failures"] == 0 and line["site_accuracy"] == pytest.approx(sum(others) / 2)


def ask(settings: Settings, digest: str | None = None) -> RecordDict:
    adapted = adapted_model(settings)
    config = ConfigRecord({"server-round": 1, "model-digest": digest or adapted.base.provenance.digest})
    return RecordDict({ARRAYS: to_arrays(adapted.initial), CONFIG: config})


@pytest.mark.parametrize("said", [None, "false", "no", ""])
def test_a_real_site_refuses_before_it_reads_a_record(
    said: str | None, tmp_path: Path, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small(tmp_path, evaluate_sites=True)
    made = context(settings)
    made.node_config.update({} if said is None else {"allow-evaluation": said})
    monkeypatch.setattr(site, "load_records", lambda *_: pytest.fail("records were read"))
    with pytest.raises(SiteRefusal, match="allow-evaluation"):
        site_evaluation.evaluate_on_site(ask(settings), made)


def test_a_run_that_does_not_say_so_gets_nothing_from_a_willing_site(tmp_path: Path, context: MakeContext) -> None:
    settings = small(tmp_path)
    made = context(settings)
    made.node_config["allow-evaluation"] = "true"
    with pytest.raises(SiteRefusal):
        site_evaluation.evaluate_on_site(ask(settings), made)
    allowed = small(tmp_path, evaluate_sites=True)
    made = context(allowed)
    made.node_config["allow-evaluation"] = "true"
    assert set(site_evaluation.evaluate_on_site(ask(allowed), made)) == {SITE_METRICS}


def test_another_base_model_is_refused(tmp_path: Path, context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "_inline_simulation", True)
    settings = small(tmp_path, evaluate_sites=True)
    with pytest.raises(SiteRefusal, match="base model differs"):
        site_evaluation.evaluate_on_site(ask(settings, "0" * 64), context(settings))


def metrics_of(**values: Any) -> RecordDict:
    return RecordDict({SITE_METRICS: MetricRecord({name.replace("_", "-"): value for name, value in values.items()})})


@pytest.mark.parametrize(
    "values",
    [
        {"loss": 1.0},
        {"accuracy": 1.0, "loss": float("inf")},
        {"accuracy": 1.0, "loss": 1.0, "records": 3},
        {"accuracy": 1.0, "loss": 1.0, "noise_multiplier": 1.0},
        {"accuracy": 1.01},
        {"accuracy": -0.01},
        {"accuracy": float("nan")},
        {"accuracy": [0.5]},
        {"accuracy": 0.5, "noise_multiplier": 0.0},
        {"accuracy": 0.5, "noise_multiplier": -1.0},
        {"accuracy": 0.5, "noise_multiplier": float("inf")},
    ],
    ids=str,
)
def test_other_metrics_are_rejected(values: dict[str, Any]) -> None:
    with pytest.raises(BadReply):
        read_site_metrics(metrics_of(**values))


def test_an_accuracy_comes_with_its_noise_or_is_exact() -> None:
    assert read_site_metrics(metrics_of(accuracy=0.5, loss=1.0)) == SiteMetrics(0.5)
    assert read_site_metrics(metrics_of(accuracy=1.0)) == SiteMetrics(1.0)
    assert read_site_metrics(metrics_of(accuracy=0.0, noise_multiplier=8.0)) == SiteMetrics(0.0, 8.0)
    with pytest.raises(BadReply):
        read_site_metrics(RecordDict({**metrics_of(accuracy=0.5), "more": MetricRecord({"a": 1})}))


def test_evaluated_rounds() -> None:
    settings = replace(small(Path("x")), num_rounds=5, evaluate_every=2)
    assert [settings.evaluates_after(r) for r in range(6)] == [True, False, True, False, True, True]
