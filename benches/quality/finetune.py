"""Fine-tunes the six encoder layers on one task, in full or by LoRA adapters; embeddings stay frozen, the head is the
task's own.

Called by run.py for what the cache lacks. One thread and one seed give the same weights on the same torch; what was
trained is kept, so that all methods merge the same models.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from model import MERGED, Pretrained, encode, make_batch, pooled, save_checkpoint
from tasks import Task


@dataclass(frozen=True)
class Recipe:
    """How every model is trained. A change makes new cache entries."""

    epochs: int = 2
    batch: int = 32
    learning_rate: float = 2e-4
    head_learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.1  # of all steps; then down to zero along a line
    clip: float = 1.0
    lora_rank: int = 0  # of an adapter on every linear layer, alone trained beside the head; 0: everything is trained

    def describe(self) -> str:
        """For the results."""
        what = (f"LoRA adapters of rank {self.lora_rank} on every linear layer of the encoder" if self.lora_rank
                else "all six encoder layers")
        return (f"{what}, {self.epochs} epochs of batches of {self.batch}, AdamW, learning rate {self.learning_rate:g} "
                f"(heads {self.head_learning_rate:g}), embeddings frozen")


RECIPES = {"full": Recipe(), "lora": Recipe(learning_rate=2e-3, weight_decay=0.0, lora_rank=16)}


class LoraLinear(nn.Module):
    """A frozen linear layer and a trained product of rank r beside it, scaled by 2 (alpha = 2r)."""

    SCALE = 2.0

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen
        self.down = nn.Parameter(torch.empty(rank, frozen.in_features))
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`W·x + b + 2·B·A·x`."""
        return self.frozen(x) + self.SCALE * nn.functional.linear(nn.functional.linear(x, self.down), self.up)


def add_adapters(encoder: nn.Module, rank: int) -> dict[str, LoraLinear]:
    """Puts an adapter beside every linear layer, by its name in the checkpoint; everything else is frozen."""
    encoder.requires_grad_(False)
    adapters = {}
    for name, module in list(encoder.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith(MERGED):
            parent, _, last = name.rpartition(".")
            adapters[name] = LoraLinear(module, rank)
            setattr(encoder.get_submodule(parent), last, adapters[name])
    return adapters


def save_adapters(adapters: dict[str, LoraLinear], recipe: Recipe, directory: Path) -> None:
    """As PEFT does: what `base+directory` names in a merge config."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, adapter in adapters.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.down.detach()
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapter.up.detach()
    save_file(tensors, str(directory / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": recipe.lora_rank, "lora_alpha": LoraLinear.SCALE * recipe.lora_rank,
              "target_modules": sorted({name.rpartition(".")[2] for name in adapters}), "bias": "none", "use_dora": False,
              "use_rslora": False, "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}}
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def trained_weights(encoder: nn.Module, adapters: dict[str, LoraLinear]) -> dict[str, torch.Tensor]:
    """The encoder layers by their names in the checkpoint, adapters added to their weights."""
    weights = {}
    for name, value in encoder.state_dict().items():
        if name.startswith(MERGED) and not name.endswith((".down", ".up")):
            weights[name.replace(".frozen.", ".")] = value.detach()
    for name, adapter in adapters.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + adapter.SCALE * (adapter.up @ adapter.down).detach()
    return weights


def cache_key(task: Task, seed: int, backbone: str, recipe: Recipe) -> str:
    """Names what a fine-tuned model depends on: data, recipe, seed, the pretrained file."""
    parts = {name: value for name, value in asdict(recipe).items() if name != "lora_rank" or value}
    text = json.dumps([task.digest(), parts, seed, backbone], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _batches(lengths: list[int], rng: random.Random, recipe: Recipe) -> list[list[int]]:
    """Shuffled, then sorted by length within pools of 16 batches, and those batches shuffled again."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    pool = 16 * recipe.batch
    batches = []
    for first in range(0, len(order), pool):
        part = sorted(order[first:first + pool], key=lambda i: lengths[i])
        batches += [part[k:k + recipe.batch] for k in range(0, len(part), recipe.batch)]
    rng.shuffle(batches)
    return batches


def finetune(pretrained: Pretrained, task: Task, seed: int, directory: Path, recipe: Recipe) -> None:
    """Trains and writes `directory/`: the encoder layers as a checkpoint, `head/head.safetensors`, and what was trained of
    them in `adapter/`, if that is adapters."""
    start = time.monotonic()
    torch.manual_seed(seed)
    rng = random.Random(f"{seed} {task.name}")
    encoder = pretrained.encoder()
    encoder.embeddings.requires_grad_(False)
    adapters = add_adapters(encoder, recipe.lora_rank) if recipe.lora_rank else {}
    head = nn.Linear(encoder.config.hidden_size, len(task.classes))
    encoder.train()

    texts, labels = zip(*task.train)
    ids = encode(pretrained.tokenizer, texts, task.max_tokens)
    lengths = [len(row) for row in ids]
    plan = [batch for _ in range(recipe.epochs) for batch in _batches(lengths, rng, recipe)]
    matrices = [p for p in encoder.encoder.parameters() if p.dim() > 1 and p.requires_grad]
    vectors = [p for p in encoder.encoder.parameters() if p.dim() == 1 and p.requires_grad]
    optimizer = torch.optim.AdamW([
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
        {"params": list(head.parameters()), "weight_decay": 0.0, "lr": recipe.head_learning_rate},
    ], lr=recipe.learning_rate)
    warmup = max(1, math.ceil(recipe.warmup * len(plan)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (len(plan) - step) / max(1, len(plan) - warmup)))
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    for step, part in enumerate(plan):
        batch = make_batch([ids[i] for i in part], [labels[i] for i in part], part)
        loss = nn.functional.cross_entropy(head(pooled(encoder, batch.ids, batch.mask)), batch.labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            print(f"finetune: {task.name} seed {seed}: step {step} of {len(plan)}, loss {loss.item():.3f}, "
                  f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    partial = directory.with_name(directory.name + ".part")
    save_checkpoint(trained_weights(encoder, adapters), pretrained.config, partial)
    if adapters:
        save_adapters(adapters, recipe, partial / "adapter")
    (partial / "head").mkdir(exist_ok=True)
    save_file({"weight": head.weight.detach(), "bias": head.bias.detach()}, str(partial / "head" / "head.safetensors"))
    partial.rename(directory)
