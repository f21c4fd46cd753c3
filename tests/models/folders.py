"""Tiny models with random weights, saved as real folders, and tiny files of records."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers
from PIL import Image
from timm.models import save_for_hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = (
    *("good", "bad", "fine", "poor", "a", "the", "film", "is", "very", "and", "not", "plot", "actor", "long", "short"),
    *("how", "much", "plus", "answer", "####", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
PAD, UNK, CLS, SEP = range(len(SPECIAL))
VOCABULARY = len(SPECIAL) + len(WORDS)

ENCODER = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CONFIGS: dict[str, Any] = {
    "bert": lambda **more: transformers.BertConfig(**{**ENCODER, "max_position_embeddings": 40, "pad_token_id": PAD, **more}),
    "roberta": lambda **more: transformers.RobertaConfig(
        **ENCODER, max_position_embeddings=42, type_vocab_size=1, pad_token_id=PAD, bos_token_id=CLS, eos_token_id=SEP, **more
    ),
    "distilbert": lambda **more: transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=40, **more
    ),
    "gpt2": lambda **more: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=CLS, eos_token_id=SEP, **more
    ),
    "llama": lambda **more: transformers.LlamaConfig(
        **{**ENCODER, "num_key_value_heads": 1, "max_position_embeddings": 128, "bos_token_id": CLS, "eos_token_id": SEP, **more}
    ),
}
KINDS: dict[str, Any] = {
    "base": transformers.AutoModel,
    "classifier": transformers.AutoModelForSequenceClassification,
    "masked": transformers.AutoModelForMaskedLM,
    "causal": transformers.AutoModelForCausalLM,
}


def save_tokenizer(folder: Path, family: str, *, pad: bool = True) -> None:
    """Words to numbers; encoders frame a text with [CLS] and [SEP], decoders begin it with [CLS]."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = family in ("bert", "roberta", "distilbert")
    end = " [SEP]" if encoder else ""
    made.post_processor = processors.TemplateProcessing(
        single=f"[CLS] $A{end}",
        pair=f"[CLS] $A [SEP] $B:1{end and ' [SEP]:1'}",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if family == "bert" else ["input_ids", "attention_mask"]
    special = {"pad_token": "[PAD]"} if pad else {}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_input_names=names,
        **special,
    ).save_pretrained(folder)


def save_hf(folder: Path, family: str, kind: str, *, seed: int = 3, pad: bool = True, **config: Any) -> Any:
    """A folder of a tiny text model; returns the model that was saved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = KINDS[kind].from_config(CONFIGS[family](**config))
    model.save_pretrained(folder)
    save_tokenizer(folder, family, pad=pad)
    return model.eval()


TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2]},
    ),
    "vit": ("vit_tiny_patch16_224", {"img_size": 24, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}),
}


def save_timm(folder: Path, family: str, *, classes: int = 7, seed: int = 3, safe: bool = True, **data: Any) -> torch.nn.Module:
    """A folder of a tiny image model; ``data`` overrides mean, std and the like in its config."""
    name, arguments = TIMM[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, pretrained=False, num_classes=classes, **arguments)
    side = arguments["img_size"]
    about = {"input_size": (3, side, side), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "crop_pct": 1.0, **data}
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=safe, data_config=about)
    return model.eval()


def save_found(folder: Path, count: int, *, side: int = 20) -> str:
    """Pictures with any of three colours in them: a table with a column per colour and one of numbers from 0 to 3."""
    chance = random.Random(1)
    folder.mkdir(parents=True)
    rows = ["image,red,green,blue,colours"]
    for i in range(count):
        own = [chance.random() < 0.5 for _ in range(3)]
        pixels = np.asarray([[230 if there else 30 for there in own]] * (side * side)) + chance.randint(-20, 20)
        Image.fromarray(pixels.reshape(side, side, 3).astype(np.uint8)).save(folder / f"{i}.png")
        rows.append(",".join([f"{i}.png", *(str(int(there)) for there in own), str(sum(own))]))
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return f"file:{folder / 'table.csv'}"


def save_images(folder: Path, classes: Sequence[str], each: int, *, side: int = 20) -> None:
    """An image folder with train and test: one colour per class, and noise."""
    chance = random.Random(0)
    for split, count in (("train", each), ("test", max(2, each // 4))):
        for number, name in enumerate(classes):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                picture = Image.new("RGB", (side, side + 4))
                base = [230 if channel == number % 3 else 30 for channel in range(3)]
                picture.putdata([tuple(b + chance.randint(-25, 25) for b in base) for _ in range(side * (side + 4))])
                picture.save(place / f"{i}.png")
