"""Log-likelihoods of examples, and labels sampled from the model for the true Fisher.

A likelihood is called as `likelihood(model, batch, sampler)` and returns `[B]`: one number an example, whose gradient
touches no other example. `sampler` is `None` for the empirical Fisher.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any, Callable, Dict, Optional, Protocol, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import CollectError
from .tokens import IGNORED

REDUCTIONS = ("mean", "sum")


class Sampler:
    """Draws labels from the model's own distribution, the same for an example whatever batch it is in.

    The random numbers of example i are those of a Philox generator with key `seed` and counter i.
    """

    def __init__(self, seed: int, example_ids: Sequence[int], pause: Callable[[], AbstractContextManager[None]],
                 relabel: Callable[[Tensor], None]) -> None:
        self._seed = seed
        self._example_ids = list(example_ids)
        self._pause = pause
        self._relabel = relabel

    def uniform(self, example: int, count: int) -> np.ndarray:
        """`count` numbers in [0, 1) of the batch's `example`-th example."""
        counter = [0, 0, 0, self._example_ids[example]]
        return np.random.Generator(np.random.Philox(key=self._seed, counter=counter)).random(count)

    def labels(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Labels for logits `[B, ..., C]`, drawn wherever `targets` `[B, ...]` has one; elsewhere it stays ignored.

        For sequences each label is drawn given the prefix that the data has.
        """
        drawn = torch.full_like(targets, IGNORED)
        for i in range(targets.shape[0]):
            where = targets[i] != IGNORED
            count = int(where.sum())
            if count == 0:
                continue
            cumulative = logits[i][where].detach().double().reshape(count, -1).softmax(-1).cumsum(-1)
            points = torch.from_numpy(self.uniform(i, count)).to(cumulative)[:, None] * cumulative[:, -1:]
            label = torch.searchsorted(cumulative, points, right=True).squeeze(1)
            drawn[i][where] = label.clamp_(max=logits.shape[-1] - 1).to(drawn.dtype)
        return drawn

    def choice(self, scores: Tensor) -> Tensor:
        """One of the answers of each example, by the softmax of their log-likelihoods `[B, K]`."""
        return self.labels(scores, torch.zeros(scores.shape[0], dtype=torch.long, device=scores.device))

    def paused(self) -> AbstractContextManager[None]:
        """Forward passes in it are not counted."""
        return self._pause()

    def relabel(self, labels: Tensor) -> None:
        """Tells which targets the decoder reads from here on."""
        self._relabel(labels)


class Likelihood(Protocol):
    def __call__(self, model: nn.Module, batch: Any, sampler: Optional[Sampler]) -> Tensor: ...


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: a tensor, `.logits`, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        found = output[0]
    if not isinstance(found, Tensor):
        raise CollectError(f"the model's output {type(output).__name__} has no logits; give a loss function of your own")
    return found


def log_likelihood(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Mean or sum of the targets' log-probabilities of each example: `[B, ..., C]`, `[B, ...]` → `[B]`."""
    examples = targets.shape[0]
    wrong = (targets != IGNORED) & ((targets < 0) | (targets >= logits.shape[-1]))
    if bool(wrong.any()):
        raise CollectError(f"labels: {int(targets[wrong][0])} is no class of {logits.shape[-1]} (0 to {logits.shape[-1] - 1}, or "
                           f"{IGNORED} for none)")
    losses = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float() if logits.dtype not in (torch.float32, torch.float64)
        else logits.reshape(-1, logits.shape[-1]),
        targets.reshape(-1),
        ignore_index=IGNORED,
        reduction="none",
    ).reshape(examples, -1)
    total = -losses.sum(1)
    if reduction == "sum":
        return total
    return total / (targets.reshape(examples, -1) != IGNORED).sum(1).clamp_min(1)


def _inputs(batch: Any, without: Sequence[str]) -> Dict[str, Any]:
    if not hasattr(batch, "items"):
        raise CollectError(f"batches: expected a mapping of the model's arguments, got {type(batch).__name__}")
    return {key: value for key, value in batch.items() if key not in without}


def _labels(batch: Any, task: str) -> Tensor:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise CollectError(f"{task}: a batch has no `labels` (it has {', '.join(map(str, batch.keys()))})")
    return labels


class CausalLM:
    """Decoder-only language models. Without `labels` every attended token after the first is a target."""

    def __init__(self, reduction: str = "mean") -> None:
        self.reduction = reduction

    def __call__(self, model: nn.Module, batch: Any, sampler: Optional[Sampler]) -> Tensor:
        inputs = _inputs(batch, ("labels",))
        labels = batch.get("labels")
        if labels is None:
            if "input_ids" not in inputs:
                raise CollectError("causal-lm: a batch has neither `labels` nor `input_ids` "
                                   f"(it has {', '.join(map(str, inputs))})")
            labels = inputs["input_ids"]
            if "attention_mask" in inputs:
                labels = labels.masked_fill(inputs["attention_mask"] == 0, IGNORED)
        logits = logits_of(model(**inputs))[:, :-1]
        targets = labels[:, 1:]
        if sampler is not None:
            targets = sampler.labels(logits, targets)
        return log_likelihood(logits, targets, self.reduction)


class Seq2Seq:
    """Encoder-decoders. Where the batch has `choices` `[B, K, T]` (labels of K answers, all ignored where there are
    fewer), the true Fisher draws one of them by its likelihood, as MaTS does; else each target token is drawn."""

    def __init__(self, reduction: str = "mean") -> None:
        self.reduction = reduction

    def __call__(self, model: nn.Module, batch: Any, sampler: Optional[Sampler]) -> Tensor:
        labels = _labels(batch, "seq2seq")
        choices = batch.get("choices")
        if sampler is not None and choices is not None:
            with torch.no_grad(), sampler.paused():
                scores = torch.stack([self._scores(model, batch, answer) for answer in choices.unbind(1)], 1)
            scores = scores.masked_fill((choices != IGNORED).sum(-1) == 0, float("-inf"))
            chosen = sampler.choice(scores)
            labels = choices[torch.arange(len(choices), device=choices.device), chosen]
            sampler.relabel(labels)
        logits = self._logits(model, batch, labels)
        if sampler is not None and choices is None:
            labels = sampler.labels(logits, labels)
        return log_likelihood(logits, labels, self.reduction)

    def _scores(self, model: nn.Module, batch: Any, labels: Tensor) -> Tensor:
        return log_likelihood(self._logits(model, batch, labels), labels, "sum")

    def _logits(self, model: nn.Module, batch: Any, labels: Tensor) -> Tensor:
        inputs = _inputs(batch, ("labels", "choices"))
        if "decoder_input_ids" not in inputs or labels is not batch["labels"]:
            inputs.pop("decoder_attention_mask", None)
            inputs["decoder_input_ids"] = shifted_right(model, labels)
        return logits_of(model(**inputs))


def shifted_right(model: nn.Module, labels: Tensor) -> Tensor:
    """A decoder's input for `labels`, as the model makes it itself."""
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if make is not None:
        return make(labels=labels)
    config = getattr(model, "config", None)
    start, pad = getattr(config, "decoder_start_token_id", None), getattr(config, "pad_token_id", None)
    if start is None or pad is None:
        raise CollectError("seq2seq: the model's config has no decoder_start_token_id and pad_token_id; "
                           "give decoder_input_ids in the batch")
    shifted = labels.new_full(labels.shape, pad)
    shifted[:, 1:] = labels[:, :-1]
    shifted[:, 0] = start
    return shifted.masked_fill(shifted == IGNORED, pad)


class Classification:
    """Classifiers of sequences, images or (labels `[B, T]`) tokens."""

    def __init__(self, reduction: str = "mean") -> None:
        self.reduction = reduction

    def __call__(self, model: nn.Module, batch: Any, sampler: Optional[Sampler]) -> Tensor:
        inputs, labels = _inputs(batch, ("labels",)), _labels(batch, "classification")
        logits = logits_of(model(**inputs))
        if labels.dtype.is_floating_point or labels.dim() != logits.dim() - 1:
            raise CollectError(
                f"classification: labels {list(labels.shape)} {labels.dtype} do not fit logits {list(logits.shape)}; "
                "expected one integer for each row of logits"
            )
        if sampler is not None:
            labels = sampler.labels(logits, labels)
        return log_likelihood(logits, labels, self.reduction)


TASKS: Dict[str, Callable[[str], Likelihood]] = {
    "causal-lm": CausalLM,
    "seq2seq": Seq2Seq,
    "classification": Classification,
}


def resolve(loss: Any, reduction: str) -> Likelihood:
    """A task's name, or a function `loss(model, batch)` or `loss(model, batch, sampler)`, as a [`Likelihood`]."""
    if reduction not in REDUCTIONS:
        raise CollectError(f"likelihood: unknown `{reduction}` (expected one of {', '.join(REDUCTIONS)})")
    if isinstance(loss, str):
        if loss not in TASKS:
            raise CollectError(f"loss: unknown task `{loss}` (expected one of {', '.join(TASKS)}, or a function)")
        return TASKS[loss](reduction)
    if not callable(loss):
        raise CollectError(f"loss: expected a task's name or a function, got {type(loss).__name__}")
    try:
        inspect.signature(loss).bind(None, None, None)
    except TypeError:
        def two_arguments(model: nn.Module, batch: Any, sampler: Optional[Sampler]) -> Tensor:
            if sampler is not None:
                raise CollectError("fisher `true`: the loss function must take (model, batch, sampler) and draw its "
                                   "labels by `sampler.labels(logits, targets)`")
            return loss(model, batch)

        return two_arguments
    return loss
