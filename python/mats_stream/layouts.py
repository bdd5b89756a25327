"""How the input and output of one kind of module become rows: `[B, T, in]` and `[B, T, out]`.

A *layout* is the only thing that knows a module's class. What is stored is the weight as it lies in the checkpoint:
`transposed` says that its rows are inputs (GPT-2's Conv1D), `groups` that it is not one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Container, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layout:
    """A matrix product over the last dimension."""

    transposed = False
    groups = 1

    def __init__(self, in_features: int, out_features: int) -> None:
        self.in_features, self.out_features = in_features, out_features

    def input(self, x: Tensor) -> Tensor:
        return x

    def output(self, y: Tensor) -> Tensor:
        return y


class TransposedLayout(Layout):
    """Weights stored `[in, out]`."""

    transposed = True


class ConvolutionLayout(Layout):
    """A convolution as a product with patches: rows are output positions, columns channel × kernel."""

    def __init__(self, module: nn.Module) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        super().__init__(weight[0].numel(), weight.shape[0])
        self.groups = int(module.groups)  # type: ignore[arg-type]
        self.module = module

    def input(self, x: Tensor) -> Tensor:
        """`[B, C, *space]` → `[B, positions, C·kernel]`; of groups `[B, positions, groups·(C/groups)·kernel]`."""
        module: Any = self.module
        dims = len(module.kernel_size)
        if x.dim() == dims + 1:
            x = x[None]
        pad = list(module._reversed_padding_repeated_twice)
        if any(pad):
            mode = str(module.padding_mode)
            x = F.pad(x, pad, mode="constant" if mode == "zeros" else mode)
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
        if dims == 1:
            x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
        if dims <= 2:
            # Columns come out as channel × kernel, which is the order of the weight.
            return F.unfold(x, kernel, dilation, 0, stride).transpose(1, 2)
        for axis in range(dims):
            x = x.unfold(2 + axis, kernel[axis], stride[axis])
        x = x.movedim(1, 1 + dims)  # [B, *positions, C, *kernel]
        return x.reshape(x.shape[0], -1, self.in_features * self.groups)

    def output(self, y: Tensor) -> Tensor:
        """`[B, out, *space]` → `[B, positions, out]`."""
        if y.dim() == len(self.module.kernel_size) + 1:  # type: ignore[arg-type]
            y = y[None]
        return y.reshape(y.shape[0], y.shape[1], -1).transpose(1, 2)


def layout_of(module: nn.Module) -> Optional[Layout]:
    """The layout of a module with one weight matrix; `None` if it is not known to be one."""
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    if isinstance(module, nn.Linear) and weight.dim() == 2:
        return Layout(weight.shape[1], weight.shape[0])
    # transformers' class; recognised by what it is, so that transformers need not be there.
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight.dim() == 2:
        return TransposedLayout(weight.shape[0], weight.shape[1])
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if isinstance(module, nn.Conv3d) and any(step != 1 for step in module.dilation):
            return None
        return ConvolutionLayout(module)
    return None


# Where the examples of a batch are in what a module sees: `[B, ...]`, `[T, B, ...]`, equal parts of the first dimension
# one after the other (`[B·T, n]`, `[B·windows, ...]`), or rows of all in turn (`[T·B, n]`).
FIRST, SECOND, BLOCKS, STRIDED = "first", "second", "blocks", "strided"


@dataclass
class Look:
    """One call as the first step saw it: which tensor in which version, its shape, and one number for each of its rows."""

    tensor: Tuple[int, int]
    shape: Tuple[int, ...]
    lead: Tuple[int, ...]
    marks: Optional[Tensor]
    tolerance: float
    gradient: bool


def marks_of(x: Tensor) -> Tensor:
    """A number for each row of `[..., n]`, by which rows are known again: all of the input would be too much to keep."""
    direction = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(0)).to(x.device)
    return (x.detach().reshape(-1, x.shape[-1]).float() @ direction).cpu()


def _split_of_call(many: Look, few: Look, m: int, k: int) -> Optional[str]:
    if len(many.shape) != len(few.shape):
        return None
    other = [axis for axis, (a, b) in enumerate(zip(many.shape, few.shape)) if a != b]
    if len(other) != 1 or other[0] > 1 or many.shape[other[0]] * k != few.shape[other[0]] * m:
        return None
    axis, dims = other[0], len(many.shape)
    if axis == 1:
        return SECOND if dims >= 3 and many.shape[1] == m else None
    if many.shape[0] == m:
        return FIRST
    if many.marks is None or few.marks is None:
        return None

    # The shape fits either order of rows; what the rows hold tells.
    def same(rows: Tensor) -> bool:
        assert few.marks is not None
        size = float(few.marks.abs().max()) if few.marks.numel() else 0.0
        return bool(((rows.reshape(-1) - few.marks).abs() <= many.tolerance * size).all())

    blocks = same(many.marks.reshape(m, -1)[:k])
    strided = dims == 2 and same(many.marks.reshape(-1, m)[:, :k])
    if blocks == strided:
        return None
    return BLOCKS if blocks else STRIDED


def split_of(looks: Sequence[Tuple[int, Sequence[Look]]]) -> Optional[str]:
    """How a module's input is split by examples, from the calls with m examples of a batch and with fewer of the same.

    The axis that grows with their number is theirs. `None`: nothing fits, or it is not the same for all calls.
    """
    found: Set[Optional[str]] = set()
    for (m, many), (k, few) in zip(looks, looks[1:]):
        if len(many) != len(few):
            return None
        found.update(_split_of_call(a, b, m, k) for a, b in zip(many, few))
    if found == {FIRST, BLOCKS}:
        return BLOCKS
    return found.pop() if len(found) == 1 else None


def is_split(shape: Sequence[int], examples: int, split: Optional[str], lengths: Container[int]) -> bool:
    """Whether a tensor `[..., n]` can be split so. Rows that only happen to be a multiple of the examples (as those that
    are routed to an expert) are not: of `[B·T, n]`, T is one of the `lengths` that are known."""
    if examples == 1 or split == FIRST:
        return examples == 1 or shape[0] == examples
    if split == SECOND:
        return len(shape) >= 3 and shape[1] == examples
    return split is not None and shape[0] % examples == 0 and (len(shape) > 2 or shape[0] // examples in lengths)


def per_example(x: Tensor, examples: int, split: Optional[str]) -> Tensor:
    """Rows by example, `[..., n]` → `[B, T, n]`, of what [`is_split`]."""
    if examples > 1 and split == SECOND:
        x = x.transpose(0, 1)
    elif examples > 1 and split == STRIDED:
        x = x.reshape(-1, examples, x.shape[-1]).transpose(0, 1)
    return x.reshape(examples, -1, x.shape[-1])


class Start(torch.autograd.Function):
    """The identity on a copy, from which on gradients are kept though no weight needs one."""

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def, override]
        return None, None


def started(x: Tensor) -> Tensor:
    """`x`, with gradients."""
    if x.requires_grad or not torch.is_grad_enabled():
        return x
    return Start.apply(x, torch.empty(0, requires_grad=True))
