"""`sum_i <W - W_i, G_i (W - W_i) A_i>` of merged checkpoints, in float64 numpy, one parameter at a time.

    objective.py --models M... --statistics S... --checkpoints C...

Prints one line of JSON: for the plain average and for each checkpoint the sum over all parameters that have both Grams of
all models, each divided by the average's, so that a layer with large gradients does not drown the others; `average` is
therefore the number of parameters.
"""

import argparse
import json

import numpy as np
from safetensors import safe_open

from common import checkpoint_files, dense


class Checkpoint:
    """Tensors by name, read when asked for."""

    def __init__(self, path):
        self.files = {}
        for file in checkpoint_files(path):
            opened = safe_open(file, "pt")
            self.files.update(dict.fromkeys(opened.keys(), opened))

    def __getitem__(self, name):
        return self.files[name].get_tensor(name).double().numpy()


class Statistics:
    """Grams by key, read when asked for; aliases followed."""

    def __init__(self, path):
        self.opened = safe_open(path, "pt")
        self.keys = set(self.opened.keys())
        metadata = self.opened.metadata() or {}
        self.aliases = {k.removeprefix("alias:"): v for k, v in metadata.items() if k.startswith("alias:")}

    def __contains__(self, key):
        return self.aliases.get(key, key) in self.keys

    def __getitem__(self, key):
        return dense(self.opened.get_tensor(self.aliases.get(key, key)).double()).numpy()


def objective(weight, weights, inputs, outputs):
    total = 0.0
    for other, a, g in zip(weights, inputs, outputs):
        difference = weight - other
        total += float(np.vdot(difference, g @ difference @ a))
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--statistics", nargs="+", required=True)
    parser.add_argument("--parameters", type=int, default=0, help="only about so many, evenly spread; 0 for all")
    parser.add_argument("--checkpoints", nargs="+", required=True)
    arguments = parser.parse_args()

    models = [Checkpoint(path) for path in arguments.models]
    statistics = [Statistics(path) for path in arguments.statistics]
    merged = [Checkpoint(path) for path in arguments.checkpoints]
    names = [
        name for name in models[0].files
        if all(f"{name}/{kind}_gram" in model for model in statistics for kind in ("input", "output"))
    ]
    if arguments.parameters:
        names = names[::max(1, len(names) // arguments.parameters)]
    totals = np.zeros(len(merged))
    worst = np.zeros(len(merged))
    for name in names:
        weights = [model[name] for model in models]
        inputs = [model[f"{name}/input_gram"] for model in statistics]
        outputs = [model[f"{name}/output_gram"] for model in statistics]
        average = objective(np.mean(weights, axis=0), weights, inputs, outputs)
        relative = np.array([objective(c[name], weights, inputs, outputs) / average for c in merged])
        totals += relative
        worst = np.maximum(worst, relative)
    print(json.dumps({
        "parameters": len(names),
        "average": float(len(names)),
        "checkpoints": [
            {"path": path, "objective": float(total), "worst": float(most)}
            for path, total, most in zip(arguments.checkpoints, totals, worst)
        ],
    }))


if __name__ == "__main__":
    main()
