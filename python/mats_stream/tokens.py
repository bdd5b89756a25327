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
from .layouts import FIRST, SECOND, STRIDED

IGNORED = -100  # label of a position that is no target

# Given a module's name and the batch: a bool mask [B, T] of tokens that count, or None where all do.
TokenRule = Callable[[str, Any], Optional[Tensor]]

_VISION = re.compile(r"(^|\.)(vision_model|vision_tower|visual|visual_projection|image_encoder)(\.|$)")
# The outermost of the two says where a module is: a decoder may be a BERT, which has an `encoder` of its own.
_SIDE = re.compile(r"(^|\.)(encoder|decoder)(\.|$)")
# Keys and values of cross-attention are computed from the encoder's tokens (T5, BART, BERT, GPT-2 and ProphetNet names),
# by whatever is inside such a projection too (LoRA); and so is what fits the encoder's width to the decoder's.
_CROSS_KEY_VALUE = re.compile(
    r"(^|\.)(EncDecAttention|encoder_attn|crossattention|cross_attention|cross_attn)\.(.*\.)?"
    r"(k|v|k_proj|v_proj|key|value|key_proj|value_proj|c_attn)(\.|$)|(^|\.)enc_to_dec_proj(\.|$)"
)


def stream_of(name: str, encoder_decoder: bool) -> str:
    """The stream whose tokens the module `name` consumes."""
    if _VISION.search(name):
        return "vision"
    if not encoder_decoder:
        return "tokens"
    side = _SIDE.search(name)
    if (side is not None and side.group(2) == "encoder") or _CROSS_KEY_VALUE.search(name):
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


def _shown(lead: Tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, lead))}, …]"


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
        self._index: Dict[Any, Tuple[Optional[Tensor], Optional[Tensor], float]] = {}
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

    def rows(self, x: Tensor, name: str, stream: str, split: Optional[str], root: bool = True) -> Tuple[Tensor, float]:
        """The rows `[R, n]` of `x` `[..., n]` that count, scaled by (the `root` of) their weights, and their number.

        Weighted by example, rows of one example weigh one together, and the number is that of examples. The root is for
        sums of products of two rows; sums of rows take the weight itself.
        """
        flat = x.reshape(-1, x.shape[-1])
        index, weight, count = self.counted(tuple(x.shape[:-1]), name, stream, split)
        if index is not None:
            flat = flat.index_select(0, index.to(flat.device))
        if weight is not None:
            flat = flat * (weight.sqrt() if root else weight).to(device=flat.device, dtype=flat.dtype)[:, None]
        return flat, count

    def counted(self, lead: Tuple[int, ...], name: str, stream: str, split: Optional[str],
                strict: bool = False) -> Tuple[Optional[Tensor], Optional[Tensor], float]:
        """(which rows of `[*lead, n]` count, what each weighs, their number); `None`: all, and one.

        `strict`: a mask must say so though all of it counts in this batch.
        """
        key, mask = self.mask(name, stream)
        found = self._index.get((key, lead, split, strict))
        if found is None:
            found = self._index[key, lead, split, strict] = self._resolve(lead, name, mask, split, strict)
        return found

    def _resolve(self, lead: Tuple[int, ...], name: str, mask: Optional[Tensor], split: Optional[str],
                 strict: bool) -> Tuple[Optional[Tensor], Optional[Tensor], float]:
        examples = self.examples
        rows = 1
        for dim in lead:
            rows *= dim
        if mask is not None and rows == examples and rows != mask.numel() and (split == FIRST or examples == 1):
            mask = None  # pooled: one row an example
        if mask is not None and not self._fits(lead, rows, mask, split):
            # Where nothing is padded there is nothing to leave out, whatever rows these are.
            if strict or self.rule is not None or self.by_example or not bool(mask.all()):
                raise CollectError(
                    f"module `{name}`: its input {_shown(lead)} does not fit the token mask {list(mask.shape)}; "
                    "exclude it, or say which tokens count (`tokens`: `all`, or a function)"
                )
            mask = None
        if mask is None:
            if not self.by_example:
                return None, None, float(rows)
            if rows % examples or (split is None and examples > 1):
                raise CollectError(
                    f"module `{name}`: its input {_shown(lead)} is not split by the batch's {examples} examples; "
                    "exclude it, or give batches of one example"
                )
            return None, torch.full((rows,), examples / max(rows, 1), dtype=torch.float64), float(examples)
        repeats = rows // mask.numel()
        turned = examples > 1 and split in (SECOND, STRIDED)
        along = (mask.t() if turned else mask).reshape(-1).repeat_interleave(repeats)
        index = None if bool(along.all()) else along.nonzero().squeeze(1)
        if not self.by_example:
            return index, None, float(rows if index is None else index.numel())
        per_example = mask.reshape(examples, -1).sum(1)
        owner = torch.arange(examples, device=mask.device).repeat_interleave(mask.numel() // examples).reshape(mask.shape)
        owner = (owner.t() if turned else owner).reshape(-1).repeat_interleave(repeats)
        owner = owner if index is None else owner[index]
        return index, 1.0 / (per_example[owner].double() * repeats), float((per_example > 0).sum())

    def _fits(self, lead: Tuple[int, ...], rows: int, mask: Tensor, split: Optional[str]) -> bool:
        """Whether the mask says which rows count: they are its positions, one after the other, or several of each."""
        if mask.numel() == 0 or rows == 0 or rows % mask.numel():
            return False
        batch, length = mask.shape[0], mask.numel() // mask.shape[0]
        if self.examples == 1 and split in (None, FIRST, SECOND):
            return lead == (length,) or lead[:2] in ((1, length), (length, 1)) or (lead[0] == 1 and rows == length)
        if split == FIRST:
            return lead[:2] == (batch, length) or (lead[0] == batch and rows == mask.numel())
        if split == SECOND:
            return lead[:2] == (length, batch)
        # Windows or chunks of an example need not be in its order.
        return split is not None and len(lead) == 1 and rows == mask.numel()
