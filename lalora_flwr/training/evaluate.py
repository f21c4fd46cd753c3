"""How good a model is on records: metrics by task."""

from __future__ import annotations

import warnings

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
        ``accuracy`` and ``loss``; for classification also ``f1`` (of class 1 if there are two classes, else the mean over
        the classes) and ``matthews``. For language modelling ``loss`` is the mean over response tokens, ``accuracy`` the
        share of them predicted right given those before, or with ``data.answer`` the share of exact answers, which is
        then also called ``exact_match``.

    Raises:
        ConfigError: if no image can be read.
    """
    learner.adapter.model.eval()
    with torch.inference_mode():
        if isinstance(learner.base, CausalLanguageModel):
            return _language(learner, learner.base, records, max(1, batch // 4))
        return _classes(learner, records, batch)


def _classes(learner: Learner, records: RecordSet, batch: int) -> dict[str, float]:
    from sklearn.metrics import f1_score, matthews_corrcoef

    device = learner.adapter.device
    loss, truth, guesses = 0.0, [], []
    for part in records.parts(torch.arange(len(records)), batch):
        inputs, labels = records.batch(part)
        if not len(labels):
            continue
        logits, labels = learner.base.logits(learner.adapter.model, to_device(inputs, device)), labels.to(device)
        loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        truth.append(labels.cpu())
        guesses.append(logits.argmax(-1).cpu())
    if not truth:
        raise ConfigError("data.test: none of the records can be read")
    y, guess = torch.cat(truth), torch.cat(guesses)
    average = "binary" if learner.base.num_classes == 2 else "macro"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that all records and guesses are of one class
        f1, matthews = f1_score(y, guess, average=average, zero_division=0), matthews_corrcoef(y, guess)
    return {
        "accuracy": int((guess == y).sum()) / len(y),
        "loss": loss / len(y),
        "f1": float(f1),
        "matthews": float(matthews),
    }


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
