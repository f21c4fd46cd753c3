"""How good a model is on records: metrics by task."""

from __future__ import annotations

import torch
from torch import Tensor

from lalora_flwr.data.inputs import to_device
from lalora_flwr.data.records import RecordSet
from lalora_flwr.data.texts import IGNORED, TextRecords
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.text import CausalLanguageModel
from lalora_flwr.training.learner import Learner

BATCH = 128  # records at once
ANSWER_TOKENS = 64  # a generated response is cut there


def evaluate(learner: Learner, records: RecordSet, batch: int = BATCH) -> dict[str, float]:
    """Metrics of the model, with the adapter now in it, on records that may be looked at; ``batch`` of them at once.

    Returns:
        ``loss``, and the metrics of the problem: ``accuracy`` and more for one class, ``auroc`` and more for several, ``r2`` and
        more for a number (`lalora_flwr.tasks`). For language modelling ``loss`` is the mean over response tokens, ``accuracy``
        the share of them predicted right given those before, or with ``data.answer`` the share of exact answers, which is
        then also called ``exact_match``.

    Raises:
        ConfigError: if no image can be read.
    """
    learner.adapter.model.eval()
    with torch.inference_mode():
        if isinstance(learner.base, CausalLanguageModel):
            return _language(learner, learner.base, records, max(1, batch // 4))
        return _labelled(learner, records, batch)


def _labelled(learner: Learner, records: RecordSet, batch: int) -> dict[str, float]:
    base, device = learner.base, learner.adapter.device
    loss, truth, answers = 0.0, [], []
    for part in records.parts(torch.arange(len(records)), batch):
        inputs, labels = records.batch(part)
        if not len(labels):
            continue
        logits = base.logits(learner.adapter.model, to_device(inputs, device))
        loss += float(base.problem.losses(logits, labels.to(device)).sum())
        truth.append(labels)
        answers.append(logits.cpu())
    if not truth:
        raise ConfigError("data.test: none of the records can be read")
    targets = torch.cat(truth)
    first, *more = base.problem.metrics(torch.cat(answers), targets).items()
    return dict([first, ("loss", loss / len(targets)), *more])


def _language(learner: Learner, base: CausalLanguageModel, records: RecordSet, batch: int) -> dict[str, float]:
    device = learner.adapter.device
    loss, right, count = 0.0, 0, 0
    for part in records.parts(torch.arange(len(records)), batch):
        inputs, labels = records.batch(part)
        logits = base.logits(learner.adapter.model, to_device(inputs, device))[:, :-1]
        targets = labels[:, 1:].to(device)
        loss += float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="sum"))
        counted = targets != IGNORED
        right += int(((logits.argmax(-1) == targets) & counted).sum())
        count += int(counted.sum())
    metrics = {"accuracy": right / max(1, count), "loss": loss / max(1, count)}
    if base.answer and isinstance(records, TextRecords):
        metrics["accuracy"] = metrics["exact_match"] = _exact(learner, base, records, device)
    return metrics


def _exact(learner: Learner, base: CausalLanguageModel, records: TextRecords, device: torch.device) -> float:
    """Share of the responses with an answer in them whose generated counterpart holds the same answer."""
    graded = hits = 0
    for tokens, labels, reference in zip(records.tokens, records.labels, records.references, strict=True):
        wanted = base.answer_in(reference)
        if wanted is None:
            continue
        prompt: Tensor = tokens[labels == IGNORED]
        graded += 1
        hits += base.answer_in(base.generate(learner.adapter.model, prompt.to(device), ANSWER_TOKENS)) == wanted
    return hits / max(1, graded)
