"""Base models of transformers: sequence classifiers and causal language models."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalora_flwr.data.inputs import Inputs
from lalora_flwr.data.records import RecordSet
from lalora_flwr.data.texts import IGNORED, TextRecords
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import PUBLIC, replace_file
from lalora_flwr.models.base import CHECK_RECORDS, BaseModel
from lalora_flwr.models.made_up import made_up_tokens, short_lengths, telling_lengths
from lalora_flwr.tasks.single_label import SingleLabel

if TYPE_CHECKING:
    from transformers import BatchEncoding, PretrainedConfig, PreTrainedTokenizerBase

    from lalora_flwr.data.cleaning import Rows

LONGEST_TOKEN = 256  # characters of a token, on the average of a text: what lies beyond max_tokens times as many cannot matter


def embedding_rows(module: nn.Module) -> int:
    """For how many tokens a text model has embeddings."""
    return int(module.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


@dataclass(frozen=True)
class TextModel(BaseModel):
    """What the text models have in common.

    Attributes:
        tokenizer: the model's own; None if it only sees made-up tokens, and then no text can be encoded.
        max_tokens: the most tokens of a text; a longer one is cut.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    max_tokens: int = 128

    @property
    def config(self) -> PretrainedConfig:
        """The network's configuration."""
        return cast("PretrainedConfig", self.module.config)

    @property
    def words(self) -> PreTrainedTokenizerBase:
        """The tokenizer of a model that was loaded with its weights."""
        assert self.tokenizer is not None
        return self.tokenizer

    @property
    def padding(self) -> int:
        """The id that fills up shorter texts: the one that the network takes for padding."""
        return int(self.config.pad_token_id or 0)

    @property
    def vocabulary(self) -> int:
        return embedding_rows(self.module)

    @property
    def segments(self) -> int:
        count = int(getattr(self.config, "type_vocab_size", 0) or 0)
        return count if count > 1 else 0

    def logits(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Logits, float32 or better: (n, num_classes), or (n, tokens, vocabulary) of a language model."""
        assert isinstance(inputs, dict)
        logits: Tensor = model(**inputs).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def save_config(self, folder: Path) -> None:
        """The network's configuration, which holds the names of the classes."""
        config = copy.deepcopy(self.config)
        if self.problem != SingleLabel() or config.problem_type:  # the published model's may be another
            config.problem_type = cast("Any", self.problem.transformers_name)
        if self.labels:
            config.id2label, config.label2id = dict(enumerate(self.labels)), {name: i for i, name in enumerate(self.labels)}
        replace_file(folder / "config.json", config.to_json_string(use_diff=True), mode=PUBLIC)

    def checkpoint_activations(self) -> None:
        """As for images; the non-reentrant kind, since the engine asks for gradients of chosen tensors.

        Raises:
            ConfigError: if the model has no such mode (ALBERT).
        """
        encoder = getattr(self.module, "encoder", self.module)  # ours around an encoder, or transformers' own
        target = self.module if hasattr(self.module, "gradient_checkpointing_enable") else encoder
        if not target.supports_gradient_checkpointing:
            raise ConfigError(f"train.gradient-checkpointing = true: {self.name} cannot recompute its activations")
        target.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]

    def check_batches(self, generator: torch.Generator) -> Iterator[tuple[Inputs, Tensor]]:
        """Many short texts, then a few of lengths that matter, up to the longest that training can meet."""
        yield self._made_up(short_lengths(CHECK_RECORDS, self.max_tokens), generator)
        yield self._made_up(telling_lengths(self.config, self.max_tokens), generator)

    def single(self, inputs: Inputs, labels: Tensor, j: int) -> tuple[Inputs, Tensor]:
        """Text j by itself, without padding."""
        assert isinstance(inputs, dict)
        length = int(inputs["attention_mask"][j].sum())
        alone = {name: value[j : j + 1, :length] for name, value in inputs.items()}
        return alone, self._single_label(labels[j : j + 1], length)

    def _single_label(self, label: Tensor, length: int) -> Tensor:
        """The label of one text, which may have been padded with it."""
        return label

    def tokens(self, inputs: Inputs) -> int:
        assert isinstance(inputs, dict)
        return inputs["input_ids"].shape[1]

    def filled_up(self, inputs: Inputs, labels: Tensor, tokens: int) -> tuple[Inputs, Tensor]:
        assert isinstance(inputs, dict)
        more = (0, tokens - self.tokens(inputs))
        padding = {"input_ids": self.padding}
        filled: Inputs = {name: F.pad(value, more, value=padding.get(name, 0)) for name, value in inputs.items()}
        return filled, self._filled_up_labels(labels, more)

    def _filled_up_labels(self, labels: Tensor, more: tuple[int, int]) -> Tensor:
        """Labels of texts that get so many tokens more."""
        return labels

    def _lengths(self, n: int) -> list[int]:
        tokens = self.input_shape[0]
        return [tokens - j % max(1, tokens // 4) for j in range(n)]

    def _made_up(self, lengths: Sequence[int], generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        raise NotImplementedError

    def _texts(self, rows: Rows, column: str, *, end: bool = False) -> list[str]:
        """A column's texts, as much of each (of its end) as can matter: a tokenizer takes all of it before it cuts."""
        texts = ["" if value is None else str(value) for value in rows.table[column]]  # a column of answers may hold numbers
        most = self.max_tokens * LONGEST_TOKEN
        return [text[-most:] if end else text[:most] for text in texts]

    def padded(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts without labels as inputs of the model, cut to ``max_tokens`` and padded to the longest."""
        encoded = self._tokens(lambda words: words(list(texts), truncation=True, max_length=self.max_tokens))
        tokens = [torch.tensor(ids[: self.max_tokens] or [self.padding], dtype=torch.long) for ids in encoded["input_ids"]]
        records = TextRecords(tokens, torch.zeros(len(tokens), dtype=torch.long), self.padding)
        return records.batch(torch.arange(len(tokens)))[0]

    def _tokens(self, tokenize: Callable[[PreTrainedTokenizerBase], BatchEncoding]) -> BatchEncoding:
        """What the tokenizer makes of texts.

        Raises:
            RuntimeError: if it panics: what its Rust code raises then is no Exception, and would end the process.
        """
        try:
            return tokenize(self.words)
        except (Exception, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as panic:
            raise RuntimeError(f"the tokenizer panicked: {type(panic).__name__}") from None


@dataclass(frozen=True)
class SequenceClassifier(TextModel):
    """Inputs are ``input_ids``, ``attention_mask`` and for pairs ``token_type_ids``, (n, tokens); labels are the problem's."""

    def encode(self, rows: Rows) -> RecordSet:
        """Texts, or pairs of texts, as the model's tokens, cut to ``max_tokens``.

        Guarantee: no record has more tokens than that, whatever the tokenizer does: one that adds more special tokens than
        there is room for does not cut at all.
        """
        columns = rows.columns
        pair = self._texts(rows, columns.text_pair) if columns.text_pair else None
        if not len(rows):
            return TextRecords([], rows.labels, 0)
        texts = self._texts(rows, columns.text)
        encoded = self._tokens(lambda words: words(texts, pair, truncation=True, max_length=self.max_tokens))
        types = encoded.get("token_type_ids") if pair and self.segments else None
        return TextRecords(
            [torch.tensor(ids[: self.max_tokens], dtype=torch.long) for ids in encoded["input_ids"]],
            rows.labels,
            self.padding,
            None if types is None else [torch.tensor(t[: self.max_tokens], dtype=torch.long) for t in types],
        )

    def synthetic_batch(self, n: int, generator: torch.Generator) -> tuple[Inputs, Tensor]:
        """Random tokens, each sequence padded at its end by another length."""
        return self._made_up(self._lengths(n), generator)

    def _made_up(self, lengths: Sequence[int], generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        tokens = made_up_tokens(lengths, self.config, generator)
        return tokens, self.problem.made_up(len(lengths), self.num_classes)


@dataclass(frozen=True)
class CausalLanguageModel(TextModel):
    """Inputs as above; labels (n, tokens) hold the next token's id at its own place, or `IGNORED`.

    Attributes:
        answer: regular expression whose first group is the answer in a response; empty: none is graded.
    """

    answer: str = ""

    def encode(self, rows: Rows) -> RecordSet:
        """Prompt, response and end as one sequence; only the response bears loss.

        A prompt too long for ``max_tokens`` loses its start, a response too long its end.
        """
        columns, end = rows.columns, self.words.eos_token_id
        prompts = self._texts(rows, columns.text, end=True)
        if columns.text_pair:
            prompts = [
                f"{p}\n{q}" if q else p for p, q in zip(prompts, self._texts(rows, columns.text_pair, end=True), strict=True)
            ]
        responses = self._texts(rows, columns.response)
        tokens, labels = [], []
        for prompt, response in zip(prompts, responses, strict=True):
            said = [*self._ids(response, special=False), end][: self.max_tokens - 1]
            asked = self._ids(prompt + "\n")[-(self.max_tokens - len(said)) :]
            tokens.append(torch.tensor([*asked, *said]))
            labels.append(torch.tensor([IGNORED] * len(asked) + said))
        return TextRecords(tokens, labels, self.padding, references=responses)

    def _ids(self, text: str, *, special: bool = True) -> list[int]:
        """A text as tokens, with or without the tokenizer's own at its ends."""
        ids: list[int] = self._tokens(lambda words: words(text, add_special_tokens=special))["input_ids"]
        return ids

    def losses(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> Tensor:
        """Mean cross-entropy of each example over its labelled tokens, shape (n,): one example is one record."""
        logits, targets = self.logits(model, inputs)[:, :-1], labels[:, 1:]  # (n, tokens - 1, vocabulary), (n, tokens - 1)
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
        counted = targets != IGNORED
        return losses.sum(1) / counted.sum(1).clamp(min=1)

    def generate(self, model: nn.Module, prompt: Tensor, most: int) -> str:
        """The model's response, token by token the likeliest, to one prompt of shape (tokens,): at most ``most`` tokens."""
        room = int(getattr(self.config, "max_position_embeddings", len(prompt) + most)) - len(prompt)
        made = model.generate(  # type: ignore[operator]
            input_ids=prompt.unsqueeze(0),
            attention_mask=torch.ones_like(prompt).unsqueeze(0),
            max_new_tokens=min(most, room),
            do_sample=False,
            eos_token_id=self.words.eos_token_id,  # the end that responses are trained with
            pad_token_id=self.padding,
        )
        return str(self.words.decode(made[0, len(prompt) :], skip_special_tokens=True))

    def answer_in(self, text: str) -> str | None:
        """The answer in a response, stripped; None if there is none."""
        found = re.search(self.answer, text)
        return None if found is None or found.group(1) is None else found.group(1).strip()

    def _single_label(self, label: Tensor, length: int) -> Tensor:
        return label[:, :length]

    def _filled_up_labels(self, labels: Tensor, more: tuple[int, int]) -> Tensor:
        return F.pad(labels, more, value=IGNORED)

    def synthetic_batch(self, n: int, generator: torch.Generator) -> tuple[Inputs, Tensor]:
        """Random tokens; the first half of each sequence is a prompt without loss."""
        return self._made_up(self._lengths(n), generator)

    def _made_up(self, lengths: Sequence[int], generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        inputs = made_up_tokens(lengths, self.config, generator)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
        for j, length in enumerate(lengths):
            labels[j, : length // 2] = IGNORED
        return inputs, labels
