"""RESULTS.md and its plots, from what run.py measured. Computes nothing but means and intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Callable, Sequence, Union

import matplotlib
import numpy as np
from matplotlib import pyplot

from collect_statistics import EXAMPLES
from evaluate import Outcome
from finetune import Recipe
from scores import Bootstrap, Correct, normalised, stack
from tasks import Task

if TYPE_CHECKING:
    from run import Reference, Row, Setting

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "mats-stream"  # the same bytes for the same numbers

MIB = 1 << 20
AnyRow = Union["Reference", "Row"]


def _correct(outcomes: Sequence[Outcome]) -> dict[str, np.ndarray]:
    return stack([outcome.correct for outcome in outcomes])


def _nll(outcomes: Sequence[Outcome]) -> float:
    """Mean over seeds and tasks; examples of classes that training never showed have none."""
    return float(np.mean([np.nanmean(values) for outcome in outcomes for values in outcome.nll.values()]))


def _name(row: "Row") -> str:
    return f"**{row.method.name}**" if row.method.default else row.method.name


def _pick(row: "Row") -> "Setting":
    return row.settings[row.chosen]


class Results:
    """What the sections share."""

    def __init__(self, tasks: Sequence[Task], seeds: Sequence[int], references: Sequence["Reference"],
                 rows: Sequence["Row"], weight: float) -> None:
        self.tasks, self.seeds, self.references, self.rows, self.weight = tasks, seeds, references, list(rows), weight
        self.validation = _correct(references[0].validation)
        self.individual = _correct(references[0].test)
        self.bootstrap = Bootstrap(self.individual)

    def on_validation(self, setting: "Setting") -> float:
        """Mean normalised accuracy."""
        return normalised(_correct(setting.validation), self.validation)

    def line(self, name: str, setting: str, correct: Correct, nll: float, validation: float, cost: str) -> str:
        """One row of the main table."""
        cells = [f"{100 * correct[task.name].mean():.1f}" for task in self.tasks]
        return (f"| {name} | {setting} | {self.bootstrap.interval(correct)} | {100 * validation:.1f} | {nll:.3f} | "
                f"{' | '.join(cells)} | {cost} |")

    def main_table(self) -> list[str]:
        """Sorted by what validation says, best last: the order was not made from test results."""
        names = [task.name for task in self.tasks]
        lines = [
            f"| method | setting | normalised, test [95 %] | validation | NLL | {' | '.join(names)} | steps | s | MiB |",
            "|---|---|---:|---:|---:|" + "---:|" * (len(names) + 3),
        ]
        for reference in self.references:
            validation = normalised(_correct(reference.validation), self.validation)
            lines.append(self.line(reference.name, "", _correct(reference.test), _nll(reference.test), validation, "| |"))
        for row in sorted(self.rows, key=lambda r: self.on_validation(_pick(r))):
            setting, merged = _pick(row), row.alone or _pick(row).merged[0]
            steps = f"{merged.iterations:.1f}" if merged.iterations else ""
            cost = f"{steps} | {merged.seconds:.1f} | {merged.peak_rss_bytes / MIB:.0f}"
            lines.append(self.line(_name(row), setting.name, _correct(setting.test), _nll(setting.test),
                                   self.on_validation(setting), cost))
        return lines

    def differences(self, chosen: "Row", others: Sequence["Row"]) -> list[str]:
        """A row against others, paired."""
        lines = [f"| {chosen.method.name} minus | points of normalised accuracy, test [95 %] |", "|---|---:|"]
        own = _correct(_pick(chosen).test)
        for row in others:
            if row is not chosen:
                difference = self.bootstrap.difference(own, _correct(_pick(row).test))
                lines.append(f"| {row.method.name} | {difference.signed()} |")
        return lines

    def best(self, keep: Callable[["Row"], bool]) -> tuple["Row", "Setting"]:
        """Of all settings of the rows that `keep` lets through, the best on validation."""
        pairs = [(row, setting) for row in self.rows if keep(row) for setting in row.settings]
        return max(pairs, key=lambda pair: self.on_validation(pair[1]))

    def settings_table(self) -> list[str]:
        """Every setting on validation."""
        lines = ["| method | setting | normalised, validation | NLL, validation |", "|---|---|---:|---:|"]
        for row in self.rows:
            for k, setting in enumerate(row.settings):
                mark = " ←" if k == row.chosen and len(row.settings) > 1 else ""
                lines.append(f"| {row.method.name} | {setting.name}{mark} | {100 * self.on_validation(setting):.1f} | "
                             f"{_nll(setting.validation):.3f} |")
        return lines

    def default_reading(self, what: str, default: "Row", keep: Callable[["Row"], bool]) -> list[str]:
        """How far the shipped default is from the best setting on validation."""
        row, setting = self.best(keep)
        own, best = self.on_validation(_pick(default)), self.on_validation(setting)
        text = f"- {what}: the default has {100 * own:.1f} on validation. "
        if row is default or best - own < 5e-5:
            return [text + "No setting of any row has more."]
        return [text + f"The most that any setting has is {100 * best:.1f}: {row.method.name}, "
                f"{setting.name or 'as it is'} ({100 * (best - own):+.1f})."]


def _plots(results: Results, directory: Path) -> list[str]:
    lines = []
    for axis, label in (("iterations", "steps of conjugate gradients"), ("ridge", "ridge, relative to the mean diagonal")):
        rows = [row for row in results.rows if row.method.axis == axis]
        if not rows:
            continue
        figure, axes = pyplot.subplots(figsize=(8, 5))
        for number, row in enumerate(rows):
            x = [float(setting.name.rsplit("=", 1)[1]) for setting in row.settings]
            y = [100 * results.on_validation(setting) for setting in row.settings]
            axes.plot(x, y, marker="osD^v<>p"[number % 8], label=row.method.name)
        for row in results.rows:
            if row.method.name in ("average", "task arithmetic"):
                axes.axhline(100 * results.on_validation(_pick(row)), color="grey", linewidth=0.8,
                             linestyle=":" if row.method.name == "average" else "--", label=row.method.name)
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("mean normalised accuracy on validation, %")
        axes.legend(fontsize=7)
        axes.grid(True, linewidth=0.3)
        figure.tight_layout()
        file = f"{axis}.svg"
        figure.savefig(directory / file, metadata={"Date": None})
        pyplot.close(figure)
        lines += ["", f"![accuracy against {axis}]({file})"]
    return lines


def write(directory: Path, recipe: Recipe, tasks: Sequence[Task], seeds: Sequence[int], references: Sequence["Reference"],
          rows: Sequence["Row"], weight: float) -> None:
    """Writes `RESULTS.md`, `iterations.svg` and `ridge.svg`."""
    directory.mkdir(parents=True, exist_ok=True)
    results = Results(tasks, seeds, references, rows, weight)
    count = {1: "one seed", 2: "two seeds", 3: "three seeds"}.get(len(seeds), f"{len(seeds)} seeds")
    lines = [
        "# What merging keeps: MiniLM-L6, six tasks, " + count,
        "",
        "Written by `python benches/quality/run.py CACHE`; README.md says what it does. Seeds: "
        f"{', '.join(map(str, seeds))}. Fine-tuning: {recipe.describe()}. "
        f"Statistics: the first {EXAMPLES} training examples. Task arithmetic as a start: weight {weight:g}.",
        "",
        "| task | what | classes | largest class, % | train, validation, test |",
        "|---|---|---:|---:|---|",
        *(f"| {t.name} | {t.source} | {len(t.classes)} | {100 * t.majority():.1f} | {len(t.train)}, "
          f"{len(t.validation)}, {len(t.test)} |" for t in tasks),
        "",
        "## Results",
        "",
        "*Normalised*: accuracy divided by that of the task's own model, in %, mean over tasks and seeds; interval: "
        "paired bootstrap over test examples and seeds. *Setting*: chosen on validation. Tasks: accuracy in %. *NLL*: mean, "
        "test. *Steps*: of conjugate gradients, mean over the weights that were solved so, last round. *s*, *MiB*: wall "
        "time and peak resident memory of the merge at the first seed"
        + (", by itself" if any(row.alone for row in rows) else "; of a sweep, what its report counts for the setting")
        + ". Sorted by validation.",
        "",
        *results.main_table(),
    ]
    defaults = [row for row in rows if row.method.default]
    if defaults:
        lines += ["", "## The shipped defaults", ""]
        for row in defaults:
            def keep(other: "Row", own: "Row" = row) -> bool:
                return set(other.method.statistics) <= set(own.method.statistics)

            lines += results.default_reading(row.method.name, row, keep)
        for row in defaults:
            allowed = {*row.method.statistics, "fisher"} if row.method.statistics else set()
            lines += ["", *results.differences(row, [r for r in rows if set(r.method.statistics) <= allowed])]
    lines += ["", "## Against iterations and ridge, on validation", *_plots(results, directory), "",
              "## All settings, on validation", "", *results.settings_table(), ""]
    (directory / "RESULTS.md").write_text("\n".join(lines))
