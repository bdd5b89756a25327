"""Statistics by brute force: one example at a time, unpadded, weights with gradients, float64 sums.

Shares no code with the collector. Inputs and outputs of products are caught by replacing the functions that multiply,
so that packed attention of torch is seen as well.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def examples_of(batches, pad_to_one=True):
    """The batches' examples as batches of one, without padding on the right."""
    for batch in batches:
        size = len(next(iter(batch.values())))
        for i in range(size):
            one = {key: value[i : i + 1] for key, value in batch.items() if key != "example_ids"}
            for mask, keys in (("attention_mask", ("input_ids", "attention_mask")), ("decoder", ("labels",))):
                if mask == "decoder" and (one.get("labels") is None or one["labels"].dim() != 2):
                    continue
                if mask not in one and mask != "decoder":
                    continue
                length = int((one["labels"] != -100).sum()) if mask == "decoder" and "decoder_input_ids" not in one else None
                if mask == "attention_mask":
                    length = int(one[mask].sum())
                if length is None:
                    continue
                for key in keys:
                    if key in one and one[key].dim() == 2:
                        one[key] = one[key][:, :length]
            yield one


def brute_force(model, examples, log_likelihood):
    """(diagonals, blocks, grams, counts): by parameter name; grams by (parameter name, side), and rows by parameter.

    `log_likelihood(model, example)` is a scalar.
    """
    names = {}
    for name, p in model.named_parameters():
        names[p.data_ptr(), tuple(p.shape)] = name
    training = model.training
    model.eval()
    for p in model.parameters():
        p.requires_grad_(True)
    diagonals, blocks, grams, rows = {}, {}, {}, {}
    n = 0
    for example in examples:
        calls = []
        linear = F.linear

        def seen(x, w, b=None):
            y = linear(x, w, b)
            # A part of a packed weight is a view of it: its base is what is named.
            base = w._base if w._base is not None and w._base.dim() == 2 else w
            name = names.get((base.data_ptr(), tuple(base.shape)))
            if name is not None:
                first = (w.data_ptr() - base.data_ptr()) // (w.element_size() * base.shape[1])
                if y.requires_grad:
                    y.retain_grad()
                calls.append((name, x, y, base.shape[0], first))
            return y

        model.zero_grad(set_to_none=True)
        F.linear = torch.nn.functional.linear = seen
        try:
            log_likelihood(model, example).backward()
        finally:
            F.linear = torch.nn.functional.linear = linear
        n += 1
        for name, p in model.named_parameters():
            g = (torch.zeros_like(p) if p.grad is None else p.grad).double().numpy()
            diagonals[name] = diagonals.get(name, 0.0) + g * g
            if max(p.shape, default=1) == p.numel():
                blocks[name] = blocks.get(name, 0.0) + np.outer(g, g)
        for name, x, y, out, first in calls:
            x = x.detach().double().reshape(-1, x.shape[-1]).numpy()
            g = np.zeros((len(x), out))
            if y.grad is not None:
                g[:, first : first + y.shape[-1]] = y.grad.double().reshape(len(x), -1).numpy()
            grams[name, "input"] = grams.get((name, "input"), 0.0) + x.T @ x
            grams[name, "output"] = grams.get((name, "output"), 0.0) + g.T @ g
            rows[name] = rows.get(name, 0) + len(x)
    model.zero_grad(set_to_none=True)
    model.train(training)
    diagonals = {name: total / n for name, total in diagonals.items()}
    blocks = {name: total / n for name, total in blocks.items()}
    grams = {(name, side): total / rows[name] for (name, side), total in grams.items()}
    return diagonals, blocks, grams, rows


def close(got, expected, tolerance, what):
    """|got - expected| ≤ tolerance · the largest |expected|."""
    got = np.asarray(got, dtype=np.float64)
    expected = np.asarray(expected, dtype=np.float64)
    if any(part in what for part in NO_GRADIENT):
        # Softmax does not see what all its scores have in common: these gradients are rounding alone.
        assert np.abs(got).max() < 1e-12 and np.abs(expected).max() < 1e-12, what
        return
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    size = np.abs(expected).max() if expected.size else 0.0
    error = np.abs(got - expected).max() if expected.size else 0.0
    assert error <= tolerance * size + 1e-300, f"{what}: off by {error:.3g} of {size:.3g}"


def compare(statistics, model, batches, log_likelihood, tolerance, examples=None, skip=()):
    """Every key of `statistics` against brute force. Returns the number of keys that were compared."""
    examples = list(examples_of(batches)) if examples is None else examples
    diagonals, blocks, grams, _ = brute_force(model, examples, log_likelihood)
    compared = 0
    for key in statistics:
        name, kind = key.rsplit("/", 1)
        if kind in skip:
            continue
        if kind == "fisher_diagonal":
            expected = diagonals[name]
        elif kind == "fisher_block":
            expected = blocks[name]
        elif kind == "input_gram":
            expected = grams[name, "input"]
        elif kind == "output_gram":
            expected = grams[name, "output"]
        else:
            raise AssertionError(key)
        close(statistics.dense(name, kind).numpy() if kind != "fisher_diagonal" else statistics[key], expected,
              tolerance, key)
        compared += 1
    return compared


# Biases of keys, of attention without rotary positions.
NO_GRADIENT = ("attention.self.key.bias", "encoder.layers.0.self_attn.k_proj.bias", "encoder.layers.1.self_attn.k_proj.bias")


class Classifier(nn.Module):
    """A small text classifier with mean pooling, padding masks, out ≠ in everywhere."""

    def __init__(self, width=6, hidden=5, classes=7, words=11):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.scale = Scale(hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, input_ids, attention_mask):
        h = self.norm(self.embedding(input_ids))
        z = self.scale(torch.tanh(self.up(h)) * self.gate(h))
        mask = attention_mask[..., None].to(z.dtype)
        return self.head((z * mask).sum(1) / mask.sum(1))


class Scale(nn.Module):
    """Elementwise `(1 + w) · x`, as norms of Gemma are."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.3)

    def forward(self, x):
        return (1 + self.weight) * x


def text_batches(sizes, words=11, classes=7, longest=6, seed=0):
    """Padded classification batches of the given sizes."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, shape):
        return torch.randint(low, high, shape, generator=generator)

    batches = []
    for size in sizes:
        lengths = integers(1, longest + 1, (size,))
        mask = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long()
        batches.append({
            "input_ids": integers(1, words, tuple(mask.shape)) * mask,
            "attention_mask": mask,
            "labels": integers(0, classes, (size,)),
        })
    return batches


def class_likelihood(model, example):
    logits = model(**{key: value for key, value in example.items() if key != "labels"})
    logits = getattr(logits, "logits", logits)
    return -F.cross_entropy(logits, example["labels"])


def lm_likelihood(model, example):
    """The mean over the tokens that are predicted."""
    ids = example["input_ids"]
    logits = model(input_ids=ids).logits
    return -F.cross_entropy(logits[0, :-1], ids[0, 1:])
