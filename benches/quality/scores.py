"""Normalised accuracies of merged models, and how sure they are: a paired bootstrap over test examples and seeds.

Called by run.py and report.py. Knows nothing of models or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Sequence

import numpy as np

RESAMPLES = 4000
BOOTSTRAP_SEED = 7

# correct[task] is [seeds, examples]: the same examples, in the same order, for every row and seed.
Correct = Mapping[str, np.ndarray]


def normalised(correct: Correct, individual: Correct) -> float:
    """Mean over seeds and tasks of accuracy / accuracy of the task's own model."""
    ratios = [correct[task].mean(1) / individual[task].mean(1) for task in individual]
    return float(np.mean(ratios))


@dataclass
class Interval:
    """A mean with its 95 % percentile interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def signed(self) -> str:
        """As a difference, in points."""
        return f"{100 * self.mean:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


class Bootstrap:
    """The same resamples for all rows, so that their differences are paired.

    One resample draws the examples of each task, once for all seeds and rows, and the seeds. The individual models'
    accuracy, by which the others are divided, is taken on the same draw.
    """

    def __init__(self, individual: Correct) -> None:
        rng = np.random.default_rng(BOOTSTRAP_SEED)
        seeds = next(iter(individual.values())).shape[0]
        self.draws = {task: rng.multinomial(c.shape[1], np.full(c.shape[1], 1 / c.shape[1]), RESAMPLES) / c.shape[1]
                      for task, c in individual.items()}
        self.seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
        self.individual = individual
        self.own = {task: self.draws[task] @ c.T for task, c in individual.items()}

    def samples(self, correct: Correct) -> np.ndarray:
        """Mean normalised accuracy of each resample, `[RESAMPLES]`."""
        ratios = [self.draws[task] @ correct[task].T / self.own[task] for task in self.individual]
        return (np.mean(ratios, axis=0) * self.seeds).sum(1)

    def interval(self, correct: Correct) -> Interval:
        """Of the mean normalised accuracy."""
        low, high = np.percentile(self.samples(correct), [2.5, 97.5])
        return Interval(normalised(correct, self.individual), float(low), float(high))

    def difference(self, correct: Correct, other: Correct) -> Interval:
        """Of the difference of two rows."""
        low, high = np.percentile(self.samples(correct) - self.samples(other), [2.5, 97.5])
        return Interval(normalised(correct, self.individual) - normalised(other, self.individual), float(low), float(high))


def stack(outcomes: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Per task `[seeds, examples]` from one mapping a seed."""
    return {task: np.stack([outcome[task] for outcome in outcomes]) for task in outcomes[0]}
