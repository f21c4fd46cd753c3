"""The model card of a run's adapter: Hugging Face's front matter, what it is, what ε means, how it is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from lalora_flwr.adapter.form import Adapter
from lalora_flwr.adapter.slots import LORA_A
from lalora_flwr.methods.method import method_of
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.four_bits import packing
from lalora_flwr.models.published import CAUSAL_LM
from lalora_flwr.server.metrics import HEADLINES, Summary
from lalora_flwr.settings import Settings
from lalora_flwr.tasks.multi_label import MultiLabel
from lalora_flwr.tasks.regression import Regression

MEAN = """`model` gives the vectors of a text's tokens. The head takes their mean:

```python
from pathlib import Path
from safetensors.torch import load_file
head = load_file(Path(adapter) / "head.safetensors")

def logits(**tokens):  # as the base model's tokenizer gives them, with return_tensors="pt"
    mask = tokens["attention_mask"].unsqueeze(-1)
    mean = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
    return mean @ head["weight"].T + head["bias"]
```"""


def model_card(summary: Summary, settings: Settings, base: BaseModel, adapter: Adapter, *, best: bool = False) -> str:
    """``README.md`` of an adapter's folder; ``best``: of the round that did best and not of the last."""
    parts = [
        _front(summary, settings, base, adapter),
        f"# {settings.run_name}",
        _method(summary, settings, adapter),
        _privacy(summary),
    ]
    parts += _classes(base.labels)
    if isinstance(base.problem, Regression):
        unit = f"{base.problem.middle:.12g} + {base.problem.half:.12g} * output"
        parts += ["## Numbers", f"The model has one output. In the unit of the records it says `{unit}`."]
    if isinstance(base.problem, MultiLabel):
        parts += ["A record may have several: each has an output of its own, and is there where that is above 0."]
    parts.append(_results(summary, settings, best))
    lines = loading(base) if adapter.in_peft else adapter.loading()
    if lines and base.published.loading:
        parts += ["## Loading", "```python\n" + "\n".join(lines) + "\n```"]
        parts += [MEAN] if base.published.inside else []
    return "\n\n".join(parts) + "\n"


def loading(base: BaseModel) -> list[str]:
    """Lines of Python that make ``model``, the run's own, from the adapter's folder and the published base model."""
    cast, packed = "float()", packing(base)
    if next(base.module.parameters()).dtype == torch.bfloat16:
        cast = (
            "bfloat16()" if base.published.task_type == CAUSAL_LM else "bfloat16().float()"
        )  # a classifier's head is kept in float32
    load = f"model = PeftModel.from_pretrained(base.{cast}, adapter).eval()"
    return ["from peft import PeftModel", 'adapter = "."  # this folder', *base.published.loading, *packed, load]


def _front(summary: Summary, settings: Settings, base: BaseModel, adapter: Adapter) -> str:
    public = base.published
    task = "text-classification" if public.task_type else "image-classification"
    lines = {
        "library_name": "peft" if adapter.in_peft else "",
        "base_model": "" if Path(public.name).is_absolute() else public.name,  # others have no such folder
        "license": public.license,
        "pipeline_tag": "text-generation" if public.task_type == CAUSAL_LM else task,
        "tags": f"[{method_of(settings).form}, federated-learning, differential-privacy, lalora-flwr]",
        "metrics": f"[{', '.join(summary.quality)}]",
    }
    return "\n".join(["---", *(f"{key}: {value}" for key, value in lines.items() if value), "---"])


def _method(summary: Summary, settings: Settings, adapter: Adapter) -> str:
    train, lora = settings.train, settings.lora
    sites = "on one site that held all records," if summary.centralised else f"across {settings.num_supernodes} sites"
    rounds = _count(summary.rounds, "round")
    rank = f", rank {lora.rank}" if LORA_A in adapter.layout.parts else ""
    steps = f"{_count(train.local_steps, 'local step')} with an expected batch of {train.batch_size}{rank}"
    if settings.ridge_first:
        rounds = f"one round that released a ridge head from all records, then {_count(summary.rounds - 1, 'round')}"
    return (
        f"An adapter of `{summary.model}`, trained {sites} with the method `{summary.strategy}` on `{summary.data}`: "
        f"{rounds} of {steps}, seed {summary.seed}.{_kept(settings, adapter)}"
    )


def _kept(settings: Settings, adapter: Adapter) -> str:
    """What the folder lacks, where slots stayed at the sites."""
    parts = sorted({adapter.layout[name].part for name in method_of(settings).travel.kept(adapter.layout)})
    if not parts:
        return ""
    stayed = " and ".join(f"`{part}`" for part in parts)
    return (
        f" Each site kept {stayed} of its own, which are not in this folder: here they are as they were before training, so that "
        "this is what the sites share, and no site's model."
    )


def sections(summary: Summary, settings: Settings, *, best: bool = False) -> list[str]:
    """Those of the card that follow from the summary and the settings alone: ε, classes and figures."""
    return [_privacy(summary), *_classes(summary.labels), _results(summary, settings, best)]


def _classes(labels: Sequence[str]) -> list[str]:
    return ["\n\n".join(["## Classes", _table((str(number), name) for number, name in enumerate(labels))])] if labels else []


def _results(summary: Summary, settings: Settings, best: bool) -> str:
    before = f"{HEADLINES[summary.metric]} of the {settings.before_training}"
    figures = {before: summary.frozen_score, **(summary.best if best else summary.quality)}
    figures.pop("site_accuracy", None)  # on private records
    shown = ((name, "none" if value is None else f"{value:.4f}") for name, value in figures.items())
    chosen = f"after round {summary.best_round}, chosen as the best on the same records, so a little too good:"
    return "\n\n".join(["## Results", f"On public records, {chosen if best else 'after the last round:'}", _table(shown)])


def _privacy(summary: Summary) -> str:
    return f"## Privacy\n\n{_epsilon(summary)}"


def _epsilon(summary: Summary) -> str:
    if not summary.private:
        leaks = f" Published besides: {summary.leaks}." if summary.leaks else ""
        return "None: the run had ε = inf, so there was no clip and no noise." + leaks
    parts = [
        f"(ε, δ) = ({summary.epsilon:.4g}, {summary.delta:g}) for one record added to or removed from any site, against the "
        "server, the other sites and whoever has this adapter. Each local step clipped every record's gradient to the norm "
        f"{summary.clip_norm:g} and added Gaussian noise; ε is composed over all steps by the accountant `{summary.accountant}`"
        f"{_head(summary)}.",
        *_shared(summary),
        "It covers this run alone: other runs on the same records add to it.",
    ]
    if summary.seeded:
        parts.append("The run was seeded, so ε describes the mechanism and not the secrecy of this very run.")
    parts += [f"Not covered: {text}." for text in (summary.leaks, summary.earlier) if text]
    return " ".join(parts)


def _head(summary: Summary) -> str:
    if summary.head_noise_multiplier is None:
        return ""
    sigmas = f"{summary.head_noise_multiplier:.4g}, in place of {summary.noise_multiplier:.4g}"
    return f", the ridge head's release among them, whose noise multiplier is {sigmas}"


def _shared(summary: Summary) -> list[str]:
    if summary.epsilon_alone is None:
        return []
    return [
        "The sites shared one noise by secure sums, of which the server saw nothing but the sums: this ε holds if at most "
        f"{_count(summary.colluders or 0, 'other site')} told the server all they know and added no noise; if all others did, "
        f"ε = {summary.epsilon_alone:.4g}."
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = ((name, " ".join(text.split()).replace("|", "\\|")) for name, text in rows)
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in cells)])
