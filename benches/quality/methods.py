"""The rows of the table: which configs each stands for, and which of their settings validation chooses among.

Called by run.py. A method is one or more merge configs, each with a `sweep` where its grid can come from one read of the
models; every merged model of a method is a setting of it. All merging is done by `mats-stream`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

from collect_statistics import Statistics, statistics_file

Config = dict[str, Any]
ITERATIONS = [10, 30, 60, 100]
DATA_FREE_ITERATIONS = [3, 10, 30, 100]
DATA_FREE_RIDGES = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
DENSITIES = [0.05, 0.1, 0.2]  # of the weights that TIES and PCB keep; their papers: 0.2
WUDI: Config = {"merge_method": "wudi"}  # its own ridge: 0.3
ISO_RIDGE: Config = {"merge_method": "iso_ridge"}  # where `mats` starts


@dataclass(frozen=True)
class Run:
    """One config of a method; the models are filled in by [`Inputs`]."""

    config: Config
    sweep: Optional[dict[str, list[float]]] = None
    label: str = ""  # of what the sweep does not vary
    normalised: bool = False  # each model's statistics by their trace


@dataclass(frozen=True)
class Method:
    """A row. `statistics` names the files that its models get: none, `grams`, `fisher`."""

    name: str
    runs: tuple[Run, ...]
    statistics: tuple[str, ...] = ()
    note: str = ""
    axis: str = ""  # `iterations` or `ridge`: drawn in a plot
    default: bool = False  # untouched: nothing but `merge_method`


@dataclass(frozen=True)
class Inputs:
    """The models of one seed."""

    base: Path
    models: Mapping[str, Path]

    def config(self, method: Method, run: Run) -> Config:
        """The complete config of a run."""
        models = []
        for name, path in self.models.items():
            adapter = path / "adapter"
            entry: Config = {"model": f"{self.base}+{adapter}" if adapter.exists() else str(path)}
            files = [str(statistics_file(path, kind)) for kind in method.statistics]
            if files:
                entry["statistics"] = files
            if run.normalised:
                entry["parameters"] = {"weight": self.trace_weights(name)}
            models.append(entry)
        config = {"base_model": str(self.base), "models": models, **run.config}
        if method.name == "average":
            del config["base_model"]
        if run.sweep:
            config["sweep"] = run.sweep
        return config

    def trace_weights(self, model: str) -> list[Config]:
        """Weights that give every model's Gᵢ ⊗ Aᵢ of a parameter the trace that they have on average."""
        traces = {name: kfac_traces(path) for name, path in self.models.items()}
        weights = []
        for parameter, own in traces[model].items():
            mean = sum(t[parameter] for t in traces.values()) / len(traces)
            weights.append({"filter": parameter, "value": mean / own})
        return [*weights, {"value": 1.0}]


_TRACES: dict[Path, dict[str, float]] = {}


def kfac_traces(model: Path) -> dict[str, float]:
    """tr(A)·tr(G) of every parameter that has both."""
    if model not in _TRACES:
        statistics = Statistics.load(statistics_file(model, "grams"))
        parameters = sorted({key.rsplit("/", 1)[0] for key in statistics if key.endswith("/output_gram")})
        _TRACES[model] = {
            p: float(statistics.dense(p, "input_gram").double().trace() * statistics.dense(p, "output_gram").double().trace())
            for p in parameters
        }
    return _TRACES[model]


def task_arithmetic() -> Method:
    """Chosen first: others start from it."""
    return Method("task arithmetic", (
        Run({"merge_method": "task_arithmetic"}, {"parameters.weight": [0.2, 0.3, 0.4, 0.5, 0.6, 0.8]}),))


def _kfac(solver: Config, initial: Any, sweep: Optional[dict[str, list[float]]], label: str = "",
          normalised: bool = False) -> Run:
    config: Config = {"merge_method": "mats", "subspace": "kfac", "initial": initial, "solver": solver}
    return Run(config, sweep, label, normalised)


def methods(ta_weight: float, tuning: str) -> Sequence[Method]:
    """All other rows, with the weight that validation chose for task arithmetic."""
    knots = Method("KnOTS", (Run({"merge_method": "knots"}, {"parameters.lambda": [1.0, 1.5, 2.0, 3.0]}),))
    ta: Config = {"merge_method": "task_arithmetic", "parameters": {"weight": ta_weight}}
    iterations: dict[str, list[float]] = {"solver.max_iterations": list(ITERATIONS)}
    cg, pcg = {"method": "cg"}, {"method": "pcg"}
    grams = ("grams",)
    return [
        Method("average", (Run({"merge_method": "linear"}),)),
        Method("TIES", tuple(
            Run({"merge_method": "ties", "parameters": {"weight": 1.0, "density": density, "scope": "model"}},
                {"parameters.lambda": [0.5, 1.0, 1.5, 2.0]}, f"density={density}") for density in DENSITIES),
               note="densities over the whole model"),
        Method("PCB", tuple(
            Run({"merge_method": "pcb", "parameters": {"density": density, "scope": "model"}},
                {"parameters.weight": [0.4, 0.7, 1.0, 1.4]}, f"density={density}") for density in DENSITIES),
               note="densities over the whole model"),
        Method("Iso-C", (Run({"merge_method": "iso_c"}, {"parameters.lambda": [1.0, 1.5, 2.0, 2.5, 3.0]}),)),
        Method("iso_ridge", (Run({"merge_method": "iso_ridge"}, {"parameters.lambda": [0.7, 0.85, 1.0, 1.2, 1.5]}),)),
        Method("TSV-M", (Run({"merge_method": "tsv_m"}, {"parameters.lambda": [0.8, 1.0, 1.2, 1.5, 2.0]}),)),
        *([knots] if tuning == "lora" else []),
        Method("Fisher", (Run({"merge_method": "fisher"}),), ("fisher",)),
        Method("RegMean", (Run({"merge_method": "regmean"}, {"parameters.off_diagonal": [0.5, 0.8, 0.9, 1.0]}),), grams),
        Method("MaTS gram, cg from task arithmetic", (
            Run({"merge_method": "mats", "subspace": "gram", "initial": ta, "solver": cg}, iterations),), grams,
               "the paper's recipe", "iterations"),
        Method("MaTS kfac, cg from average", (_kfac(cg, "average", iterations),), grams, axis="iterations"),
        Method("MaTS kfac, cg from task arithmetic", (_kfac(cg, ta, iterations),), grams, "the paper's recipe", "iterations"),
        Method("MaTS two rounds: task arithmetic, gram, kfac", (
            _kfac(cg, {"merge_method": "mats", "subspace": "gram", "initial": ta, "solver": {**cg, "max_iterations": 30}},
                  {"solver.max_iterations": [10, 30, 100]}),), grams, "cg, 30 steps of gram", "iterations"),
        Method("kfac, ridge, from average", (_kfac(pcg, "average", {"solver.ridge": [1e-3, 1e-2, 1e-1]}),), grams, axis="ridge"),
        Method("kfac, ridge, from task arithmetic", (_kfac(pcg, ta, {"solver.ridge": [1e-3, 1e-2, 1e-1]}),), grams, axis="ridge"),
        Method("wudi, cg", (Run({"merge_method": "wudi", "solver": {"method": "cg", "ridge": 0.0}},
                                {"solver.max_iterations": list(DATA_FREE_ITERATIONS)}),), axis="iterations"),
        Method("actmat, cg", (Run({"merge_method": "actmat", "solver": {"method": "cg", "ridge": 0.0}},
                                  {"solver.max_iterations": list(DATA_FREE_ITERATIONS)}),), axis="iterations"),
        Method("wudi, ridge", (Run(WUDI, {"solver.ridge": DATA_FREE_RIDGES}),), axis="ridge"),
        Method("actmat, ridge", (Run({"merge_method": "actmat"}, {"solver.ridge": DATA_FREE_RIDGES}),), axis="ridge"),
        Method("gram, ridge, from iso_ridge", (
            Run({"merge_method": "mats", "subspace": "gram", "initial": ISO_RIDGE, "solver": {"method": "direct"}},
                {"solver.ridge": [0.03, 0.3, 3.0]}),), grams, axis="ridge"),
        Method("kfac, ridge, from wudi", (_kfac(pcg, WUDI, {"solver.ridge": [0.1, 0.3, 1.0, 3.0]}),), grams, axis="ridge"),
        Method("kfac, ridge, from iso_ridge", (_kfac(pcg, ISO_RIDGE, {"solver.ridge": [0.01, 0.03, 0.1, 0.3, 1.0]}),),
               grams, axis="ridge"),
        Method("kfac by trace, ridge, from iso_ridge", (
            _kfac(pcg, ISO_RIDGE, {"solver.ridge": [0.03, 0.1, 0.3]}, normalised=True),), grams,
               "each model's factors scaled to the mean trace", "ridge"),
        Method("kfac, ridge, from Iso-C 1.5", (
            _kfac(pcg, {"merge_method": "iso_c", "parameters": {"lambda": 1.5}}, {"solver.ridge": [0.03, 0.1, 0.3]}),), grams,
               axis="ridge"),
        Method("kfac, ridge, from TSV-M", (_kfac(pcg, {"merge_method": "tsv_m"}, {"solver.ridge": [0.03, 0.1, 0.3]}),), grams,
               axis="ridge"),
        Method("default, no statistics", (Run({"merge_method": "mats"}),), default=True),
        Method("default, Grams", (Run({"merge_method": "mats"}),), grams, default=True),
        Method("default, Grams and Fisher", (Run({"merge_method": "mats"}),), ("grams", "fisher"), default=True),
    ]
