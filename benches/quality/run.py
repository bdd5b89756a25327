"""The proof, in one command: fetch, train what is not cached, merge by all methods, evaluate, write RESULTS.md.

    cargo build --release
    python benches/quality/run.py CACHE

CACHE is a directory of yours (3 GB); nothing is written elsewhere but RESULTS.md and the plots beside this file. Every
hyperparameter is chosen on the validation splits, all seeds together; test splits are read for what was chosen.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Sequence

HERE = Path(__file__).resolve().parent
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402  after the environment is set

from collect_statistics import collect_statistics  # noqa: E402
from evaluate import SPLITS, Evaluator, Outcome  # noqa: E402
from fetch import SOURCES, FetchError, fetch  # noqa: E402
from finetune import RECIPES, cache_key, finetune  # noqa: E402
from merging import Merged, MergeFailed, Merger, log  # noqa: E402
from methods import Inputs, Method, methods, task_arithmetic  # noqa: E402
from model import Pretrained  # noqa: E402
from report import write  # noqa: E402
from scores import normalised, stack  # noqa: E402
from tasks import Task, load_tasks  # noqa: E402


@dataclass
class Setting:
    """One merged model of a method, at every seed."""

    name: str
    merged: list[Merged] = field(default_factory=list)
    validation: list[Outcome] = field(default_factory=list)
    test: list[Outcome] = field(default_factory=list)


@dataclass
class Row:
    """A method with its settings, and the one that validation chose."""

    method: Method
    settings: list[Setting]
    chosen: int = 0
    alone: Merged | None = None


@dataclass
class Reference:
    """Rows that nothing merged: the individual models, the pretrained one."""

    name: str
    validation: list[Outcome]
    test: list[Outcome]


@dataclass
class Seed:
    """What belongs to one seed."""

    number: int
    models: dict[str, Path]
    inputs: Inputs
    merger: Merger
    evaluator: Evaluator


def prepare(cache: Path, seeds: Sequence[int], tasks: Sequence[Task], pretrained: Pretrained,
            arguments: argparse.Namespace) -> list[Seed]:
    """Trains and collects what the cache lacks and the methods need."""
    statistics = any(method.statistics for method in wanted_methods(0.0, arguments))
    recipe = RECIPES[arguments.tuning]
    base = cache / "models" / "base"
    if not (base / "config.json").exists():
        pretrained.save_base(base)
    prepared = []
    for number in seeds:
        models = {}
        for task in tasks:
            key = cache_key(task, number, SOURCES["minilm"].sha256, recipe)
            path = cache / "models" / f"{task.name}-{number}-{key}"
            if not path.exists():
                finetune(pretrained, task, number, path, recipe)
            if statistics:
                collect_statistics(pretrained, task, path)
            models[task.name] = path
        inputs = Inputs(base, models)
        prepared.append(Seed(number, models, inputs, Merger(arguments.binary, inputs, cache, arguments.threads),
                             Evaluator(pretrained, tasks, models, cache)))
    return prepared


def wanted_methods(weight: float, arguments: argparse.Namespace) -> list[Method]:
    """Those that `--methods` lets through."""
    return [method for method in methods(weight, arguments.tuning) if re.search(arguments.methods, method.name)]


def validate(method: Method, seeds: Sequence[Seed]) -> Row:
    """Merges all settings of a method and evaluates them on validation."""
    settings: list[Setting] = []
    for seed in seeds:
        at = 0
        for run in method.runs:
            for merged in seed.merger.run(method, run):
                if at == len(settings):
                    settings.append(Setting(merged.setting))
                if not seed.evaluator.known(merged.digest, "validation"):
                    seed.merger.with_weights(method, run)
                settings[at].merged.append(merged)
                settings[at].validation.append(seed.evaluator.run(merged.path, merged.digest, "validation"))
                at += 1
        log(f"seed {seed.number}: {method.name}: {at} merged and validated")
    return Row(method, settings)


def choose(row: Row, individual: Reference) -> None:
    """The setting with the best mean normalised accuracy on validation."""
    own = stack([outcome.correct for outcome in individual.validation])
    scores = [normalised(stack([o.correct for o in setting.validation]), own) for setting in row.settings]
    row.chosen = max(range(len(scores)), key=lambda k: scores[k])


def test(row: Row, seeds: Sequence[Seed]) -> None:
    """Evaluates the chosen setting on the test splits."""
    setting = row.settings[row.chosen]
    for seed, merged in zip(seeds, setting.merged):
        if not seed.evaluator.known(merged.digest, "test") and not merged.there():
            for run in row.method.runs:
                if any(m.digest == merged.digest for m in seed.merger.run(row.method, run)):
                    seed.merger.with_weights(row.method, run)
        setting.test.append(seed.evaluator.run(merged.path, merged.digest, "test"))


def time_alone(row: Row, seed: Seed) -> None:
    """Merges the chosen setting without a sweep: its own time and memory, and the same bytes as in the sweep."""
    wanted, at = row.settings[row.chosen].merged[0], 0
    for run in row.method.runs:
        found = seed.merger.run(row.method, run)
        if at <= row.chosen < at + len(found):
            values = seed.merger.values(row.method, run, row.chosen - at)
            row.alone = seed.merger.run(row.method, run, alone=values)[0]
            if row.alone.digest != wanted.digest:
                raise MergeFailed(f"{row.method.name}, {wanted.setting}: another model in a sweep than alone")
        at += len(found)


def references(seeds: Sequence[Seed], splits: Sequence[str]) -> list[Reference]:
    """The individual models on their own tasks, and the pretrained encoder under every head."""
    def own(seed: Seed, split: str) -> Outcome:
        outcome = Outcome({}, {})
        for name, path in seed.models.items():
            one = seed.evaluator.run(path, None, split, only=name)
            outcome.correct.update(one.correct)
            outcome.nll.update(one.nll)
        return outcome

    def pretrained(seed: Seed, split: str) -> Outcome:
        return seed.evaluator.run(seed.inputs.base, None, split)

    found = []
    for name, run in (("individual", own), ("pretrained", pretrained)):
        outcomes = {split: [run(seed, split) for seed in seeds] for split in splits}
        found.append(Reference(name, outcomes["validation"], outcomes.get("test", [])))
    return found


def arguments_of(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path, help="a directory of yours for downloads, models, statistics and evaluations")
    parser.add_argument("--seeds", default="0,1,2", help="of the fine-tuning runs (default: 0,1,2)")
    parser.add_argument("--binary", type=Path, default=HERE.parents[1] / "target" / "release" / "mats-stream")
    parser.add_argument("--threads", type=int, default=0, help="of merging, training and evaluating (default: all)")
    parser.add_argument("--tuning", choices=sorted(RECIPES), default="full", help="how the models are fine-tuned")
    parser.add_argument("--methods", default="", help="only rows whose name matches this pattern")
    parser.add_argument("--start-weight", type=float,
                        help="of task arithmetic where it is a start (default: chosen on the first seed)")
    parser.add_argument("--alone", action="store_true", help="merge each chosen row once more by itself, to time it")
    parser.add_argument("--validate-only", action="store_true", help="fill the cache; no test split, no RESULTS.md")
    parser.add_argument("--out", type=Path, default=HERE, help="where RESULTS.md and the plots go (default: here)")
    return parser.parse_args(argv)


def main() -> None:
    """See the module."""
    arguments = arguments_of()
    if not arguments.binary.exists():
        sys.exit(f"run.py: {arguments.binary} is not there; cargo build --release, or give --binary")
    cache: Path = arguments.cache.resolve()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        paths = fetch(cache)
        tasks = load_tasks(cache)
        pretrained = Pretrained.read(paths["minilm"])
        numbers = [int(n) for n in arguments.seeds.split(",")]
        seeds = prepare(cache, numbers, tasks, pretrained, arguments)
        individual, pretrained_row = references(seeds, SPLITS[:1] if arguments.validate_only else SPLITS)
        arithmetic = validate(task_arithmetic(), seeds)
        weight = arguments.start_weight
        if weight is None:
            first = Row(arithmetic.method, [Setting(s.name, s.merged[:1], s.validation[:1]) for s in arithmetic.settings])
            choose(first, Reference("", individual.validation[:1], []))
            weight = float(first.settings[first.chosen].name.split("=")[1])
        log(f"task arithmetic as a start: weight {weight}")
        rows = [arithmetic, *(validate(method, seeds) for method in wanted_methods(weight, arguments))]
        if arguments.validate_only:
            return
        for row in rows:
            choose(row, individual)
            test(row, seeds)
            log(f"{row.method.name}: {row.settings[row.chosen].name or 'as it is'}")
            if arguments.alone:
                time_alone(row, seeds[0])
        write(arguments.out, RECIPES[arguments.tuning], tasks, numbers, [individual, pretrained_row], rows, weight)
        for seed in seeds:
            seed.merger.clean()
    except (FetchError, MergeFailed) as error:
        sys.exit(f"run.py: {error}")


if __name__ == "__main__":
    main()
