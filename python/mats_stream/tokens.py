"""Which rows of an activation are tokens that count, and what each of them weighs.

A batch has *streams*: `encoder`, `decoder`, `tokens` of models without an encoder-decoder split, `vision`. A module
consumes one of them; a stream's mask `[B, T]` says which of its positions are no padding, no mask means all are.
"""

from __future__ import annotations

import re
from typing import Any, Callable, Dict, Mapping, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from .errors import CollectError

IGNORED = -100  # label of a position that is no target

# Given a module's name and the batch: a bool mask [B, T] of tokens that count, or None where all do.
TokenRule = Callable[[str, Any], Optional[Tensor]]

_VISION = re.compile(r"(^|\.)(vision_model|vision_tower|visual|visual_projection|image_encoder)(\.|$)")
_ENCODER = re.compile(r"(^|\.)encoder(\.|$)")
# Keys and values of cross-attention are computed from the encoder's tokens (T5, BART and BERT names).
_CROSS_KEY_VALUE = re.compile(
    r"(^|\.)(EncDecAttention|encoder_attn|crossattention|cross_attention|cross_attn)\.(.*\.)?(k|v|k_proj|v_proj|key|value)$"
)


def stream_of(name: str, encoder_decoder: bool) -> str:
    """The stream whose tokens the module `name` consumes."""
    if _VISION.search(name):
        return "vision"
    if not encoder_decoder:
        return "tokens"
    if _ENCODER.search(name) or _CROSS_KEY_VALUE.search(name):
        return "encoder"
    return "decoder"


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _target_mask(batch: Mapping[str, Any]) -> Optional[Tensor]:
    """Positions of a decoder-only model that predict a target: label t + 1 is predicted at t."""
    labels = batch.get("labels")
    if labels is None or labels.dim() != 2:
        return None
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORED
    return mask


class TokenMasks:
    """The masks of one batch. `tokens`: `attended`, `target`, `all`, or a [`TokenRule`]."""

    def __init__(self, batch: Any, examples: int, tokens: Union[str, TokenRule], encoder_decoder: bool,
                 by_example: bool) -> None:
        self.batch = batch
        self.examples = examples
        self.by_example = by_example
        self.rule = tokens if callable(tokens) else None
        self.encoder_decoder = encoder_decoder
        self.masks: Dict[str, Optional[Tensor]] = {"vision": None, "tokens": None, "encoder": None, "decoder": None}
        self._index: Dict[Tuple[str, int, int], Tuple[Optional[Tensor], Optional[Tensor], float]] = {}
        if self.rule is None and tokens != "all" and isinstance(batch, Mapping):
            attention = batch.get("attention_mask")
            attended = attention != 0 if isinstance(attention, Tensor) and attention.dim() >= 2 else None
            if attended is not None and attended.dim() == 2:
                self.masks["encoder" if encoder_decoder else "tokens"] = attended
            if encoder_decoder:
                decoder = batch.get("decoder_attention_mask")
                labels = batch.get("labels")
                if isinstance(decoder, Tensor):
                    self.masks["decoder"] = decoder != 0
                elif isinstance(labels, Tensor) and labels.dim() == 2:
                    self.masks["decoder"] = labels != IGNORED
            elif tokens == "target":
                self.masks["tokens"] = _target_mask(batch)

    def relabel(self, labels: Tensor) -> None:
        """The decoder now reads other targets (sampled answers)."""
        if self.rule is None and self.masks["decoder"] is not None:
            self.masks["decoder"] = labels != IGNORED
            self._index.clear()

    def mask(self, name: str, stream: str) -> Tuple[str, Optional[Tensor]]:
        """(a key that stands for the mask, the mask) of a module."""
        if self.rule is not None:
            mask = self.rule(name, self.batch)
            return f"module {name}", mask if mask is None else mask != 0
        return stream, self.masks[stream]

    def count(self, stream: str, positions: int) -> float:
        """Tokens of a stream, for the file's metadata; `positions` where it has no mask."""
        mask = self.masks[stream]
        return float(positions if mask is None else int(mask.sum()))

    def rows(self, x: Tensor, name: str, stream: str, batch_dim: int) -> Tuple[Tensor, float]:
        """The rows `[R, n]` of `x` `[..., n]` that count, scaled by the root of their weights, and their number.

        Weighted by example, rows of one example weigh one together, and the number is that of examples.
        """
        n = x.shape[-1]
        flat = x.reshape(-1, n)
        key, mask = self.mask(name, stream)
        found = self._index.get((key, flat.shape[0], batch_dim))
        if found is None:
            found = self._resolve(x, flat.shape[0], name, mask, batch_dim)
            self._index[key, flat.shape[0], batch_dim] = found
        index, scale, count = found
        if index is not None:
            flat = flat.index_select(0, index.to(flat.device))
        if scale is not None:
            flat = flat * scale.to(device=flat.device, dtype=flat.dtype)[:, None]
        return flat, count

    def _resolve(self, x: Tensor, rows: int, name: str, mask: Optional[Tensor],
                 batch_dim: int) -> Tuple[Optional[Tensor], Optional[Tensor], float]:
        examples = self.examples
        if mask is not None and rows == examples and rows != mask.numel():
            mask = None  # pooled: one row an example
        if mask is None:
            if rows % examples:
                raise CollectError(
                    f"module `{name}`: its input {list(x.shape)} is not split by the batch's {examples} examples; "
                    "exclude it, or give batches of one example"
                )
            if not self.by_example:
                return None, None, float(rows)
            return None, torch.full((rows,), (examples / rows) ** 0.5), float(examples)
        repeats = rows // mask.numel() if mask.numel() else 0
        lead = list(x.shape[:-1])
        shape = list(mask.shape) if batch_dim == 0 else [mask.shape[1], mask.shape[0]]
        if repeats == 0 or rows != repeats * mask.numel() or (repeats > 1 and lead[:2] != shape):
            raise CollectError(
                f"module `{name}`: its input {list(x.shape)} does not fit the token mask {list(mask.shape)}; "
                "exclude it, or say which tokens count (`tokens`: `all`, or a function)"
            )
        along = (mask if batch_dim == 0 else mask.t()).reshape(-1)
        along = along.repeat_interleave(repeats)
        index = None if bool(along.all()) else along.nonzero().squeeze(1)
        if not self.by_example:
            return index, None, float(rows if index is None else index.numel())
        per_example = mask.reshape(examples, -1).sum(1)
        owner = torch.arange(examples, device=mask.device).repeat_interleave(mask.numel() // examples).reshape(mask.shape)
        owner = (owner if batch_dim == 0 else owner.t()).reshape(-1).repeat_interleave(repeats)
        owner = owner if index is None else owner[index]
        scale = (1.0 / (per_example[owner].double() * repeats)).sqrt()
        return index, scale, float((per_example > 0).sum())
