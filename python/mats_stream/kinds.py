"""Kinds, dtypes and key syntax of `mats-stream-statistics/1`; every other module takes its names from here."""

from __future__ import annotations

from typing import Dict, Iterable, Tuple

import torch

from .errors import CollectError

FORMAT = "mats-stream-statistics/1"

INPUT_GRAM = "input_gram"
OUTPUT_GRAM = "output_gram"
INPUT_FACTOR = "input_factor"
OUTPUT_FACTOR = "output_factor"
INPUT_MEAN = "input_mean"
FISHER_DIAGONAL = "fisher_diagonal"
FISHER_BLOCK = "fisher_block"

KINDS: Tuple[str, ...] = (
    INPUT_GRAM,
    OUTPUT_GRAM,
    INPUT_FACTOR,
    OUTPUT_FACTOR,
    INPUT_MEAN,
    FISHER_DIAGONAL,
    FISHER_BLOCK,
)
# What needs only the forward pass, per token.
INPUT_KINDS = (INPUT_GRAM, INPUT_FACTOR, INPUT_MEAN)
# What is summed over gradients per token, and over gradients of whole examples.
OUTPUT_KINDS = (OUTPUT_GRAM, OUTPUT_FACTOR)
FISHER_KINDS = (FISHER_DIAGONAL, FISHER_BLOCK)

# Stored dtypes: safetensors' name and torch's.
DTYPES: Dict[str, Tuple[str, torch.dtype]] = {
    "float32": ("F32", torch.float32),
    "float16": ("F16", torch.float16),
    "bfloat16": ("BF16", torch.bfloat16),
    "float64": ("F64", torch.float64),
}


def check_kinds(kinds: Iterable[str]) -> Tuple[str, ...]:
    """`kinds` without repetition, in the order of the format."""
    given = [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in given:
        if kind not in KINDS:
            raise CollectError(f"kinds: unknown kind `{kind}` (expected some of {', '.join(KINDS)})")
    if not given:
        raise CollectError(f"kinds: none given (expected some of {', '.join(KINDS)})")
    for gram, factor in ((INPUT_GRAM, INPUT_FACTOR), (OUTPUT_GRAM, OUTPUT_FACTOR)):
        if gram in given and factor in given:
            raise CollectError(f"kinds: `{gram}` and `{factor}` are the same matrix; collect one of them")
    return tuple(kind for kind in KINDS if kind in given)


def side_of_packed(length: int) -> int:
    """n with n·(n+1)/2 = `length`."""
    n = int((2 * length) ** 0.5)
    for side in (n - 1, n, n + 1):
        if side >= 0 and side * (side + 1) // 2 == length:
            return side
    raise CollectError(f"a packed triangle has n·(n+1)/2 elements, not {length}")
