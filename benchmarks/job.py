"""One federated job that every engine runs: made-up records, sites, batches and noise, all by fixed seeds.

A site's batches and noise follow from the round and the site alone, so that they are the same in whatever order, process or
framework it trains.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lalora_flwr.data.inputs import rows
from lalora_flwr.data.records import Records
from lalora_flwr.gradients.products import KERNELS
from lalora_flwr.methods.smoothing import smoothed
from lalora_flwr.settings import Settings, settings_from
from lalora_flwr.training.learner import Learner, ModelStore

CLIP, RATE, RANK, ALPHA = 2.0, 0.1, 4, 8.0
TOKENS, VOCABULARY = 32, 2000
JOB = "LALORA_BENCHMARK_JOB"  # in the environment of workers that another process starts
MINILM: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_labels": 2,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
MODELS = ("vit", "minilm")
STRATEGIES = ("dp-lora", "la-lora")
Mark = Callable[[], None]  # called at the end of each round
State = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """What is run.

    Attributes:
        sites, cohort: how many there are, and how many train in a round.
        steps, batch: K local steps of ``batch`` records expected.
        rounds: of the whole run.
        model: ``vit``, which ships with the package, or ``minilm``, of MiniLM's shape with random weights.
        strategy: ``dp-lora``, both factors at every step, or ``la-lora``, one at a time with its filter.
        noise: σ; noise on a step's sum has the standard deviation 2σ.
        clip: C; inf: neither clip nor, in this package's own runs, noise.
        full: each step takes all records of a site, which leaves a sampler nothing to draw.
        folder: where `save_minilm` wrote the model.
        rank: of LoRA.
    """

    sites: int
    cohort: int
    steps: int
    batch: int
    rounds: int
    model: str = "vit"
    strategy: str = "dp-lora"
    noise: float = 1.0
    clip: float = CLIP
    full: bool = False
    folder: str = ""
    rank: int = RANK

    @property
    def own(self) -> int:
        """Records of a site."""
        return self.batch if self.full else self.batch + 2

    def site_records(self, site: int) -> Tensor:
        """Indices of a site's records, (own,)."""
        return torch.arange(site * self.own, (site + 1) * self.own)

    def text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def of(text: str) -> Job:
        return Job(**json.loads(text))


def made_up(job: Job, seed: int = 0) -> Records:
    """The records of all sites, one site after the other."""
    generator, count = torch.Generator().manual_seed(seed), job.sites * job.own
    if job.model == "vit":
        return Records(torch.rand(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator))
    tokens = torch.randint(5, VOCABULARY, (count, TOKENS), generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return Records(inputs, torch.randint(2, (count,), generator=generator))


def settings_of(job: Job, folder: str) -> Settings:
    """The job as a run of this package, without evaluation; results go under ``folder``."""
    values: dict[str, Any] = {
        "strategy": job.strategy,
        "num-supernodes": job.sites,
        "fraction-train": job.cohort / job.sites,
        "num-rounds": job.rounds,
        "evaluate-every": 100_000,
        "lora.rank": job.rank,
        "lora.alpha": ALPHA,
        "train.local-steps": job.steps,
        "train.batch-size": job.batch,
        "train.lr": RATE,
        "privacy.clip-norm": CLIP,
        "privacy.epsilon": 3.0 if math.isfinite(job.clip) else math.inf,
        "output-dir": folder,
        "run-name": "run",
    }
    if job.model == "minilm":
        values |= {
            "model.name": f"hf/{job.folder}/minilm",
            "data.name": f"file:{job.folder}/texts",
            "data.max-tokens": TOKENS,
            "data.labels": "0,1",
            "lora.head": "frozen",
        }
    return settings_from(values)


def save_minilm(folder: Path) -> None:
    """A BERT of MiniLM's shape with random weights, its tokenizer, and a few texts that say what the classes are."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(VOCABULARY - 5)))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "minilm")
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**MINILM)).save_pretrained(folder / "minilm")
    (folder / "texts").mkdir()
    for split in ("train", "test"):
        lines = "".join(f"w{i} w{i + 1},{i % 2}\n" for i in range(40))
        (folder / "texts" / f"{split}.csv").write_text(f"text,label\n{lines}")


def cohort_of(job: Job, server_round: int) -> list[int]:
    """The sites of a round; rounds count from 0."""
    if job.cohort == job.sites:
        return list(range(job.sites))
    return torch.randperm(job.sites, generator=torch.Generator().manual_seed(server_round))[: job.cohort].tolist()


def mean(ends: list[State]) -> State:
    return {name: torch.stack([end[name] for end in ends]).mean(0) for name in ends[0]}


class LocalTraining:
    """A site's K steps, in place: this package's gradients, clip and noise in float32, and no more. Peers call the same."""

    def __init__(self, job: Job) -> None:
        self.job, self.data = job, made_up(job)
        self.learner: Learner = ModelStore().learner(settings_of(job, "unused"))
        self.adapter = self.learner.adapter
        self._masks = [self.adapter.trainable]
        if job.strategy == "la-lora":
            self._masks = [self.adapter.layout.of("lora_B"), self.adapter.layout.of("lora_A")]

    def train(self, server_round: int, site: int) -> None:
        """Move the adapter by the steps that a site takes in a round."""
        job, generator = self.job, torch.Generator().manual_seed(server_round * 1_000_003 + site)
        for step in range(job.steps):
            active = self.adapter.activate(self._masks[step % len(self._masks)])
            drawn = torch.rand(job.own, generator=generator) < job.batch / job.own
            chosen = site * job.own + torch.nonzero(drawn).flatten()
            released = self._clipped_and_noised(chosen, active, generator)
            with torch.no_grad():
                for name, parameter in active.items():
                    parameter.sub_(RATE / job.batch * self._filtered(name, released[name]))

    def _filtered(self, name: str, released: Tensor) -> Tensor:
        if self.job.strategy != "la-lora":
            return released
        return smoothed(released, self.adapter.layout[name].feature_axis or 0, 5)

    def _clipped_and_noised(self, chosen: Tensor, active: dict[str, Any], generator: torch.Generator) -> State:
        std = self.job.noise * CLIP
        if not len(chosen):
            return {name: std * torch.randn(p.shape, generator=generator) for name, p in active.items()}
        with KERNELS.left_to_pytorch():  # as in any loop by hand
            gradients, _ = self.learner.gradients(rows(self.data.inputs, chosen), self.data.labels[chosen])
        norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
        factors = (self.job.clip / norms).clamp(max=1.0)
        sums = {name: torch.tensordot(factors, g, 1) for name, g in gradients.items()}
        return {name: value + std * torch.randn(value.shape, generator=generator) for name, value in sums.items()}
