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
from torch import Tensor

from lalora_flwr.data.data_set import data_set
from lalora_flwr.data.partition import site_rows
from lalora_flwr.data.records import Records, no_records
from lalora_flwr.ground.errors import SiteRefusal
from lalora_flwr.ledger.caps import Caps
from lalora_flwr.ledger.entries import Reserve
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.randomness import SystemRandom
from lalora_flwr.server.summing_up import SITE_ACCURACY_LEAK
from lalora_flwr.settings import Settings
from lalora_flwr.site import evaluation as site_evaluation
from lalora_flwr.wire.orders import ARRAYS, CONFIG
from lalora_flwr.wire.replies import SITE_METRICS, SiteMetrics, read_site_metrics
from lalora_flwr.wire.tensors import BadReply, to_arrays
from tests.conftest import AppCall, Finished, Spy, run_spied, small, strict_json
from tests.ledger.site_ledgers import owned
from tests.reference import Nobody
from tests.sites import host, servers_learner

MakeContext = Callable[[Settings], Context]
REAL = host(simulated=False)
CLOSED = host(simulated=False, records=lambda *_: pytest.fail("records were read"))


def naive_site_accuracies(run: Finished) -> list[float]:
    """Each site's share of its records that the final model gets right, one record at a time."""
    learner = servers_learner(run.settings)
    learner.adapter.load(load_file(run.path / "checkpoint" / "adapter.safetensors"))
    learner.adapter.model.eval()
    data, found = data_set(run.settings), []
    for rows in site_rows(data.classes(), run.settings.data, run.settings.seed, run.settings.num_supernodes):
        images, labels = data.private(rows, learner.base.encode).batch(torch.arange(len(rows)))
        with torch.no_grad():
            guesses = [int(learner.base.logits(learner.adapter.model, image[None]).argmax()) for image in images]
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
    learner = servers_learner(settings)
    config = ConfigRecord({"server-round": 1, "model-digest": digest or learner.base.provenance.digest, "own": ""})
    return RecordDict({ARRAYS: to_arrays(learner.initial), CONFIG: config})


@pytest.mark.parametrize("said", [None, "false", "no", "", False])
def test_a_real_site_refuses_before_it_reads_a_record(said: str | bool | None, tmp_path: Path, context: MakeContext) -> None:
    settings = small(tmp_path, evaluate_sites=True)
    made = owned(context(settings), tmp_path, **({} if said is None else {"allow-evaluation": said}))
    with pytest.raises(SiteRefusal, match="allow-evaluation"):
        site_evaluation.evaluate_on_site(CLOSED, ask(settings), made)


def willing(context: Context, folder: Path, **changed: Any) -> Context:
    return owned(context, folder, **{"allow-evaluation": "true", "evaluation-noise": 20.0, **changed})


def test_a_run_that_does_not_say_so_gets_nothing_from_a_willing_site(tmp_path: Path, context: MakeContext) -> None:
    settings = small(tmp_path)
    made = willing(context(settings), tmp_path)
    with pytest.raises(SiteRefusal):
        site_evaluation.evaluate_on_site(REAL, ask(settings), made)
    assert reserved(made) == []


def reserved(context: Context) -> list[Reserve]:
    entries = LedgerFile(str(context.node_config["ledger-path"])).read().entries
    return [entry for entry in entries if isinstance(entry, Reserve)]


def test_a_real_site_tells_a_noisy_share_and_counts_it(tmp_path: Path, context: MakeContext) -> None:
    settings = small(tmp_path, evaluate_sites=True)
    told = []
    for _ in range(5):
        made = willing(context(settings), tmp_path)
        reply = site_evaluation.evaluate_on_site(REAL, ask(settings), made)
        assert set(reply) == {SITE_METRICS} and set(reply[SITE_METRICS]) == {"accuracy", "noise-multiplier"}
        assert read_site_metrics(reply).noise_multiplier == 20.0
        told.append(read_site_metrics(reply).accuracy)
    # The same model on the same records: the operating system drew the noise, equal five times once in 10^8
    assert len(set(told)) > 1
    assert all(0 <= accuracy <= 1 and abs(accuracy * 300 - round(accuracy * 300)) < 1e-9 for accuracy in told)
    entries = reserved(made)
    assert [(e.sigma, e.q, e.steps, e.clip_norm, e.schedule) for e in entries] == [(20.0, 1.0, 1, 1.0, "evaluate")] * 5
    assert entries[-1].epsilon == pytest.approx(epsilon_spent([(20.0, 1.0, 5)], 1e-3), abs=0.011)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"max-epsilon": 3.9}, "cap: the run's privacy.epsilon is above"),
        ({"alpha-range": "0.1,1"}, "cap: the run's lora.alpha is outside"),
        ({"max-epsilon": 4.0, "evaluation-noise": 0.1}, "budget: "),
        ({"labels": "1,0"}, "data: the run's data.labels"),
        ({"evaluation-noise": 0}, "node-config: evaluation-noise must be"),
    ],
    ids=str,
)
def test_evaluation_keeps_to_the_caps_before_a_record_is_read(
    changed: dict[str, Any], reason: str, tmp_path: Path, context: MakeContext
) -> None:
    settings = small(tmp_path, evaluate_sites=True)
    made = willing(context(settings), tmp_path, **changed)
    with pytest.raises(SiteRefusal, match=f"^{reason}"):
        site_evaluation.evaluate_on_site(CLOSED, ask(settings), made)
    assert reserved(made) == []


def test_it_counts_as_a_query(tmp_path: Path, context: MakeContext) -> None:
    settings = small(tmp_path, evaluate_sites=True)
    made = willing(context(settings), tmp_path, **{"max-queries-per-day": 1})
    site_evaluation.evaluate_on_site(REAL, ask(settings), made)
    with pytest.raises(SiteRefusal, match="max-queries-per-day"):
        site_evaluation.evaluate_on_site(REAL, ask(settings), made)


def test_the_noise_has_the_owners_size_and_is_whole(tmp_path: Path) -> None:
    caps = Caps("l", 3.0, 1e-4, 1000, "image", ("a",), evaluation_noise=15.0)
    counts = [site_evaluation.noisy_accuracy(500, caps, SystemRandom()) * 1000 for _ in range(4000)]
    assert all(abs(count - round(count)) < 1e-9 for count in counts)
    mean = sum(counts) / len(counts)
    assert mean == pytest.approx(500, abs=5 * 15 / 4000**0.5)
    assert (sum((c - mean) ** 2 for c in counts) / len(counts)) ** 0.5 == pytest.approx(15, rel=0.06)  # 5 standard errors
    assert {site_evaluation.noisy_accuracy(count, caps, Nobody()) for count in (-500, 1500)} == {0.0, 1.0}


def test_right_answers_are_those_of_each_record_alone_and_a_failing_one_is_wrong(tmp_path: Path) -> None:
    learner = servers_learner(small(tmp_path))
    data = data_set(small(tmp_path))
    records = data.private(range(40), learner.base.encode)
    images, labels = records.batch(torch.arange(40))
    with torch.no_grad():
        alone = [
            int(learner.base.logits(learner.adapter.model.eval(), image[None]).argmax()) == int(y)
            for image, y in zip(images, labels, strict=True)
        ]
    assert site_evaluation.right_answers(learner, records) == sum(alone)

    class Failing(Records):
        def batch(self, indices: Tensor) -> tuple[Any, Tensor]:
            if (indices == alone.index(True)).any():
                raise RuntimeError("spoilt")
            return super().batch(indices)

    assert site_evaluation.right_answers(learner, Failing(images, labels)) == sum(alone) - 1
    assert site_evaluation.right_answers(learner, no_records()) == 0


def test_a_site_without_records_tells_noise(tmp_path: Path, context: MakeContext) -> None:
    settings = small(tmp_path, evaluate_sites=True)
    empty = host(simulated=False, records=lambda *_: no_records())
    made = willing(context(settings), tmp_path)
    assert 0 <= read_site_metrics(site_evaluation.evaluate_on_site(empty, ask(settings), made)).accuracy < 0.5
    assert len(reserved(made)) == 1


def test_another_base_model_is_refused(tmp_path: Path, context: MakeContext) -> None:
    settings = small(tmp_path, evaluate_sites=True)
    with pytest.raises(SiteRefusal, match="base model differs"):
        site_evaluation.evaluate_on_site(host(simulated=True), ask(settings, "0" * 64), context(settings))


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
