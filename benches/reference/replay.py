"""Merges models as the paper's research code does: torch for the products, scipy for conjugate gradients.

    replay.py --models M... --statistics S... --iterations 100 --threads 2 --out merged.safetensors

Written anew from the description of the algorithm (arXiv 2312.04339, sections 4 and 5.2), so that it can be timed beside
`mats-stream merge` on the same inputs:

- every checkpoint and every statistic is loaded whole, in float32, Grams as dense matrices, and held until the end;
- each parameter with both Grams is solved by `scipy.sparse.linalg.cg` on the flattened weight, transposed to
  `[in, out]` as there: no preconditioner, no ridge, relative tolerance 1e-5, started at the plain average;
- a matvec goes from scipy's array to a torch tensor and back;
- everything else is the plain average.

Where the original does more than that, this does not, which favours it: Grams are not copied for an off-diagonal scaling
of one (`--scaled-copy` does), and Linears with one input share its Gram. Prints one line of JSON.
"""

import argparse
import json
import resource
import time

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.sparse.linalg import LinearOperator, cg

from common import checkpoint_files, dense


def load_checkpoint(path):
    tensors = {}
    for file in checkpoint_files(path):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                tensor = opened.get_tensor(name)
                tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors


def load_grams(path):
    """Dense float32 Grams by key; aliases are the same tensors under other keys."""
    grams = {}
    with safe_open(path, "pt") as opened:
        for key in opened.keys():
            if key.endswith(("/input_gram", "/output_gram")):
                grams[key] = dense(opened.get_tensor(key).float())
        for key, target in (opened.metadata() or {}).items():
            if key.startswith("alias:") and target in grams:
                grams[key.removeprefix("alias:")] = grams[target]
    return grams


def solve(inputs, outputs, weights, iterations):
    """`sum A X G = sum A W G` for `X [in, out]`, from the average."""
    shape = weights[0].shape
    rhs = torch.zeros(shape)
    for a, g, w in zip(inputs, outputs, weights):
        rhs += a @ w @ g
    start = torch.stack(weights).mean(0)

    def matvec(vector):
        x = torch.from_numpy(vector.astype(np.float32, copy=False)).reshape(shape)
        y = torch.zeros(shape)
        for a, g in zip(inputs, outputs):
            y += (a @ x) @ g
        return y.reshape(-1).numpy()

    taken = 0

    def count(_):
        nonlocal taken
        taken += 1

    size = rhs.numel()
    operator = LinearOperator((size, size), matvec=matvec, dtype=np.float32)
    x, _ = cg(operator, rhs.reshape(-1).numpy(), x0=start.reshape(-1).numpy(), maxiter=iterations, callback=count)
    return torch.from_numpy(x.astype(np.float32)).reshape(shape), taken


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--statistics", nargs="+", required=True)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--scaled-copy", action="store_true", help="hold a second copy of every Gram, as the original")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    started = time.perf_counter()
    models = [load_checkpoint(path) for path in arguments.models]
    grams = [load_grams(path) for path in arguments.statistics]
    if arguments.scaled_copy:
        originals, grams = grams, [{key: 1.0 * gram for key, gram in model.items()} for model in grams]
    loaded = time.perf_counter()

    merged, steps = {}, []
    for name, first in models[0].items():
        keys = (f"{name}/input_gram", f"{name}/output_gram")
        if all(key in model for model in grams for key in keys):
            weights = [model[name].T.contiguous() for model in models]
            sides = [[model[key] for model in grams] for key in keys]
            x, taken = solve(*sides, weights, arguments.iterations)
            merged[name] = x.T.contiguous()
            steps.append(taken)
        elif first.is_floating_point():
            merged[name] = torch.stack([model[name] for model in models]).mean(0)
        else:
            merged[name] = first
    solved = time.perf_counter()
    save_file(merged, arguments.out, metadata={"format": "pt"})
    saved = time.perf_counter()
    print(json.dumps({
        "load_seconds": loaded - started,
        "solve_seconds": solved - loaded,
        "save_seconds": saved - solved,
        "seconds": saved - started,
        "parameters": len(steps),
        "iterations": sum(steps),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
    }))


if __name__ == "__main__":
    main()
