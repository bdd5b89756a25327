"""Statistics of the fine-tuned models, by the project's own collector (`python/mats_stream`).

Called by run.py for what the cache lacks. Two files a model: the Grams that RegMean and K-FAC need, and the diagonal
Fisher; both on the first `EXAMPLES` training examples, with the collector's defaults, which are the paper's.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from model import Pretrained, encode, load_merged, pooled, sorted_batches
from tasks import Task

__all__ = ["EXAMPLES", "Statistics", "collect_statistics", "statistics_file"]

try:
    from mats_stream import Statistics, collect, log_likelihood
except ImportError:  # not installed: the copy of this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))
    from mats_stream import Statistics, collect, log_likelihood

EXAMPLES = 500
BATCH = 64
KINDS = {"grams": ("input_gram", "output_gram"), "fisher": ("fisher_diagonal",)}


def statistics_file(model: Path, kind: str) -> Path:
    """Where a model's `grams` or `fisher` are; the number of examples is part of the name, so that another is another."""
    return model / f"statistics-{EXAMPLES}" / f"{kind}.safetensors"


def collect_statistics(pretrained: Pretrained, task: Task, model: Path) -> None:
    """Writes the files of [`statistics_file`] that are missing."""
    missing = {kind: kinds for kind, kinds in KINDS.items() if not statistics_file(model, kind).exists()}
    if not missing:
        return
    encoder = pretrained.encoder()
    load_merged(encoder, model)
    head = load_file(str(model / "head" / "head.safetensors"))
    part = task.train[:EXAMPLES]
    texts, labels = zip(*part)
    batches = [
        {"input_ids": b.ids, "attention_mask": b.mask, "labels": b.labels}
        for b in sorted_batches(encode(pretrained.tokenizer, texts, task.max_tokens), labels, BATCH)
    ]

    def likelihood(watched: nn.Module, batch: dict[str, Tensor], _sampler: object = None) -> Tensor:
        features = pooled(watched, batch["input_ids"], batch["attention_mask"])
        logits = nn.functional.linear(features, head["weight"], head["bias"])
        return log_likelihood(logits, batch["labels"], "mean")

    for kind, kinds in missing.items():
        start, path = time.monotonic(), statistics_file(model, kind)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".part")
        statistics = collect(encoder, batches, likelihood, kinds=kinds, modules=r"^encoder\.",
                             metadata={"model": task.name, "data": f"{task.name}, first {EXAMPLES} training examples"})
        partial.unlink(missing_ok=True)
        statistics.save(partial)
        partial.rename(path)
        print(f"statistics: {model.name}, {kind}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
