"""Files and Grams, as both sides of the comparison read them."""

import json
from pathlib import Path

import torch


def checkpoint_files(path):
    """The safetensors files of a checkpoint: a directory in Hugging Face's layout, or one file."""
    path = Path(path)
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text())["weight_map"].values()
        return [path / name for name in sorted(set(names))]
    return [path / "model.safetensors"]


def dense(gram):
    """A full Gram from a packed lower triangle, row by row; a full one as it is."""
    if gram.dim() == 2:
        return gram
    side = int(((8 * gram.numel() + 1) ** 0.5 - 1) / 2)
    full = torch.zeros((side, side), dtype=gram.dtype)
    rows, columns = torch.tril_indices(side, side)
    full[rows, columns] = gram
    full[columns, rows] = gram
    return full
