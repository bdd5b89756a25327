"""Fine-tunes the six encoder layers on one task; embeddings stay frozen, the head is the task's own.

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


RECIPE = Recipe()


def cache_key(task: Task, seed: int, backbone: str) -> str:
    """Names what a fine-tuned model depends on: data, recipe, seed, the pretrained file."""
    text = json.dumps([task.digest(), asdict(RECIPE), seed, backbone], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _batches(lengths: list[int], rng: random.Random) -> list[list[int]]:
    """Shuffled, then sorted by length within pools of 16 batches, and those batches shuffled again."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    pool = 16 * RECIPE.batch
    batches = []
    for first in range(0, len(order), pool):
        part = sorted(order[first:first + pool], key=lambda i: lengths[i])
        batches += [part[k:k + RECIPE.batch] for k in range(0, len(part), RECIPE.batch)]
    rng.shuffle(batches)
    return batches


def finetune(pretrained: Pretrained, task: Task, seed: int, directory: Path) -> None:
    """Trains and writes `directory/`: the encoder layers as a checkpoint, and `head/head.safetensors`."""
    start = time.monotonic()
    torch.manual_seed(seed)
    rng = random.Random(f"{seed} {task.name}")
    encoder = pretrained.encoder()
    encoder.embeddings.requires_grad_(False)
    head = nn.Linear(encoder.config.hidden_size, len(task.classes))
    encoder.train()

    texts, labels = zip(*task.train)
    ids = encode(pretrained.tokenizer, texts, task.max_tokens)
    lengths = [len(row) for row in ids]
    plan = [batch for _ in range(RECIPE.epochs) for batch in _batches(lengths, rng)]
    matrices = [p for p in encoder.encoder.parameters() if p.dim() > 1]
    vectors = [p for p in encoder.encoder.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([
        {"params": matrices, "weight_decay": RECIPE.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
        {"params": list(head.parameters()), "weight_decay": 0.0, "lr": RECIPE.head_learning_rate},
    ], lr=RECIPE.learning_rate)
    warmup = max(1, math.ceil(RECIPE.warmup * len(plan)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (len(plan) - step) / max(1, len(plan) - warmup)))
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    for step, part in enumerate(plan):
        batch = make_batch([ids[i] for i in part], [labels[i] for i in part], part)
        loss = nn.functional.cross_entropy(head(pooled(encoder, batch.ids, batch.mask)), batch.labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, RECIPE.clip)
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            print(f"finetune: {task.name} seed {seed}: step {step} of {len(plan)}, loss {loss.item():.3f}, "
                  f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    partial = directory.with_name(directory.name + ".part")
    save_checkpoint({k: v for k, v in encoder.state_dict().items() if k.startswith(MERGED)}, pretrained.config, partial)
    (partial / "head").mkdir(exist_ok=True)
    save_file({"weight": head.weight.detach(), "bias": head.bias.detach()}, str(partial / "head" / "head.safetensors"))
    partial.rename(directory)
