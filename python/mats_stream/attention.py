"""`nn.MultiheadAttention` computed from parts, so that its packed projection and `out_proj` can be seen.

torch multiplies by `in_proj_weight` and `out_proj.weight` inside one function, where no hook reaches. While statistics
are collected the module's forward is this one; results agree with torch's to rounding.
"""

from __future__ import annotations

import math
from typing import Any, Callable, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Called with (which projection, its input, its output, first output row in the packed weight): the output to go on with.
Observe = Callable[[str, Tensor, Tensor, int], Tensor]


def _as_bias(mask: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
    if mask is None or mask.dtype.is_floating_point:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask != 0, float("-inf"))


def _projections(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor,
                 observe: Observe) -> List[Tensor]:
    """q, k and v `[B, T, E]`, each projection done and observed once for each distinct input."""
    e = module.embed_dim
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        out = []
        for i, (name, x) in enumerate(zip("qkv", (query, key, value))):
            y = F.linear(x, weights[i], biases[i])
            out.append(observe(f"{name}_proj_weight", x, y, i * e))
        return out
    # Runs of equal inputs are one product: all three in self-attention, k and v in cross-attention.
    inputs = [query, key, value]
    out = []
    start = 0
    while start < 3:
        stop = start + 1
        while stop < 3 and inputs[stop] is inputs[start]:
            stop += 1
        rows = slice(start * e, stop * e)
        bias = None if module.in_proj_bias is None else module.in_proj_bias[rows]
        y = F.linear(inputs[start], module.in_proj_weight[rows], bias)
        y = observe("in_proj_weight", inputs[start], y, start * e)
        out.extend(y.split(e, -1))
        start = stop
    return out


def forward_from_parts(module: nn.MultiheadAttention, observe: Observe, query: Tensor, key: Tensor, value: Tensor,
                       key_padding_mask: Optional[Tensor] = None, need_weights: bool = True,
                       attn_mask: Optional[Tensor] = None, average_attn_weights: bool = True,
                       is_causal: bool = False, **_more: Any) -> Tuple[Tensor, Optional[Tensor]]:
    """As `nn.MultiheadAttention.forward` in evaluation mode."""
    batched = query.dim() == 3
    same_kv, same_qk = key is value, query is key
    if not batched:
        query, key, value = query[None], key[None], value[None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    elif not module.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    # Views of one tensor are one input.
    key = query if same_qk else key
    value = key if same_kv else value
    q, k, v = _projections(module, query, key, value, observe)
    batch, targets = q.shape[:2]
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, module.bias_k.expand(batch, 1, -1)], 1)
        v = torch.cat([v, module.bias_v.expand(batch, 1, -1)], 1)
    if module.add_zero_attn:
        k = torch.cat([k, k.new_zeros(batch, 1, k.shape[2])], 1)
        v = torch.cat([v, v.new_zeros(batch, 1, v.shape[2])], 1)
    heads, width = module.num_heads, module.head_dim
    q, k, v = (x.reshape(batch, -1, heads, width).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(width)
    extra = k.shape[2] - key.shape[1]
    attn_bias, padding = _as_bias(attn_mask, scores.dtype), _as_bias(key_padding_mask, scores.dtype)
    if attn_bias is None and is_causal:
        attn_bias = _as_bias(torch.ones(targets, key.shape[1], dtype=torch.bool, device=q.device).triu(1), scores.dtype)
    if attn_bias is not None:
        attn_bias = F.pad(attn_bias, (0, extra))
        scores = scores + (attn_bias.view(batch, heads, *attn_bias.shape[-2:]) if attn_bias.dim() == 3 else attn_bias)
    if padding is not None:
        scores = scores + F.pad(padding, (0, extra))[:, None, None, :]
    weights = scores.softmax(-1)
    mixed = (weights @ v).transpose(1, 2).reshape(batch, targets, module.embed_dim)
    y = observe("out_proj.weight", mixed, F.linear(mixed, module.out_proj.weight, module.out_proj.bias), 0)
    if not batched:
        y = y[0]
    elif not module.batch_first:
        y = y.transpose(0, 1)
    if not need_weights:
        return y, None
    shown = weights.mean(1) if average_attn_weights else weights
    return y, shown if batched else shown[0]


def use_parts(module: nn.MultiheadAttention, observe: Observe) -> Callable[[], None]:
    """Replaces the module's forward; returns what puts it back."""

    def forward(*args: Any, **kwargs: Any) -> Tuple[Tensor, Optional[Tensor]]:
        return forward_from_parts(module, observe, *args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]

    def restore() -> None:
        del module.forward

    return restore


def disable_fast_paths(model: nn.Module) -> List[Callable[[], None]]:
    """Transformer layers of torch skip their modules in evaluation mode; this makes them use them."""
    undo: List[Callable[[], None]] = []

    def put(module: nn.Module, attribute: str, value: Any) -> None:
        before = getattr(module, attribute)
        setattr(module, attribute, value)
        undo.append(lambda: setattr(module, attribute, before))

    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            put(module, "activation_relu_or_gelu", 0)
        if isinstance(module, nn.TransformerEncoder):
            for attribute in ("enable_nested_tensor", "use_nested_tensor"):
                if hasattr(module, attribute):
                    put(module, attribute, False)
        # In-place activations would change what a layer before them gave out.
        if getattr(module, "inplace", None) is True:
            put(module, "inplace", False)
    return undo
