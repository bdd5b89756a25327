"""Which examples an encoder gets right, with each task's own head.

Called by run.py for merged checkpoints. The answer is kept under the sha256 of the merged weights: the same bytes are
not run twice, whatever config made them, and another byte is another model.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import BertModel

from fetch import sha256
from model import Batch, Pretrained, encode, load_merged, pooled, sorted_batches
from tasks import Task

BATCH = 64
SPLITS = ("validation", "test")


@dataclass
class Outcome:
    """Of one encoder on one split: per task, whether each example was right `[N]` and the NLL of its label `[N]`."""

    correct: dict[str, np.ndarray]
    nll: dict[str, np.ndarray]

    def accuracy(self, task: str) -> float:
        """Share of right answers."""
        return float(self.correct[task].mean())


class Evaluator:
    """The tasks' batches, made once, and the heads of one seed's models."""

    def __init__(self, pretrained: Pretrained, tasks: Sequence[Task], heads: dict[str, Path], cache: Path) -> None:
        self.tasks = list(tasks)
        self.encoder: BertModel = pretrained.encoder().eval()
        self.pretrained = pretrained
        self.heads = {name: load_file(str(path / "head" / "head.safetensors")) for name, path in heads.items()}
        self.batches: dict[tuple[str, str], list[Batch]] = {}
        for task in self.tasks:
            for split in SPLITS:
                texts, labels = zip(*getattr(task, split))
                ids = encode(pretrained.tokenizer, texts, task.max_tokens)
                self.batches[task.name, split] = list(sorted_batches(ids, labels, BATCH))
        self.directory = cache / "evaluations"
        self.directory.mkdir(exist_ok=True)
        # Heads and data decide a result too; the models' directories carry the hash of both.
        self.context = "-".join(sorted(path.name.rsplit("-", 1)[1] for path in heads.values()))

    def _store(self, digest: str, task: str, split: str) -> Path:
        key = hashlib.sha256(f"{digest} {self.context} {task} {split}".encode()).hexdigest()[:24]
        return self.directory / f"{key}.npz"

    def known(self, digest: str, split: str) -> bool:
        """Whether a merged model with these bytes was evaluated on all tasks."""
        return all(self._store(digest, task.name, split).exists() for task in self.tasks)

    def run(self, checkpoint: Path, digest: Optional[str], split: str, only: Optional[str] = None) -> Outcome:
        """Evaluates `checkpoint/model.safetensors`, whose sha256 is `digest`, on every task (or `only` one), from the
        cache where it can; then the weights need not be there any more."""
        digest = digest or sha256(checkpoint / "model.safetensors")
        outcome = Outcome({}, {})
        loaded = False
        for task in self.tasks:
            if only is not None and task.name != only:
                continue
            store = self._store(digest, task.name, split)
            if not store.exists():
                if not loaded:
                    load_merged(self.encoder, checkpoint)
                    loaded = True
                self._evaluate(task, split, store)
            with np.load(store) as saved:
                outcome.correct[task.name], outcome.nll[task.name] = saved["correct"], saved["nll"]
        return outcome

    @torch.no_grad()
    def _evaluate(self, task: Task, split: str, store: Path) -> None:
        head = self.heads[task.name]
        count = len(getattr(task, split))
        correct, nll = np.zeros(count, dtype=bool), np.zeros(count, dtype=np.float32)
        for batch in self.batches[task.name, split]:
            logits = torch.nn.functional.linear(pooled(self.encoder, batch.ids, batch.mask), head["weight"], head["bias"])
            index = batch.index.numpy()
            correct[index] = (logits.argmax(-1) == batch.labels).numpy()
            known = batch.labels.clamp_min(0)
            loss = torch.nn.functional.cross_entropy(logits, known, reduction="none")
            nll[index] = torch.where(batch.labels >= 0, loss, torch.tensor(float("nan"))).numpy()
        partial = store.with_suffix(f".{os.getpid()}.part.npz")
        np.savez(partial, correct=correct, nll=nll)
        partial.rename(store)
