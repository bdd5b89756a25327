"""How the input and output of one kind of module become rows: `[B, T, in]` and `[B, T, out]`.

A *layout* is the only thing that knows a module's class. What is stored is the weight as it lies in the checkpoint:
`transposed` says that its rows are inputs (GPT-2's Conv1D), `groups` that it is not one matrix.
"""

from __future__ import annotations

from typing import Any, Optional

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


def per_example(x: Tensor, examples: int, batch_dim: int) -> Optional[Tensor]:
    """Rows by example, `[..., n]` → `[B, T, n]`; `None` where the batch does not lead its dimensions."""
    if batch_dim == 1 and x.dim() >= 3:
        x = x.transpose(0, 1)
    rows = x.numel() // max(x.shape[-1], 1)
    if x.shape[0] != examples and (x.dim() != 2 or rows % examples):
        return None
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
