"""Runs `mats-stream merge` on a method's configs and says what came out.

Called by run.py. What a merge gave (digest, iterations, time, memory) is kept under a hash of the binary, the config and
every input file, so that the same merge is not made twice; its weights are kept for as long as the run may need them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import yaml

from fetch import sha256
from methods import Inputs, Method, Run

REPORT = "merge_report.json"


class MergeFailed(Exception):
    """What `mats-stream` printed."""


@dataclass
class Merged:
    """One merged model: a setting of a method."""

    setting: str
    digest: str
    directory: str
    seconds: float
    peak_rss_bytes: int
    iterations: float  # of the last round, mean over the parameters that were solved by iterating; else 0
    stop_reasons: dict[str, int] = field(default_factory=dict)
    config: str = ""

    @property
    def path(self) -> Path:
        """Where its weights are."""
        return Path(self.directory)

    def there(self) -> bool:
        """Whether the weights are still there."""
        return (self.path / "model.safetensors").exists()


@functools.lru_cache(maxsize=None)
def _digest(path: Path) -> str:
    return sha256(path)


def _inputs(config: dict[str, Any]) -> list[str]:
    files = [Path(config["base_model"]) / "model.safetensors"] if "base_model" in config else []
    for entry in config["models"]:
        model, _, adapter = entry["model"].partition("+")
        files += [Path(model) / "model.safetensors", *map(Path, entry.get("statistics", []))]
        if adapter:
            files.append(Path(adapter) / "adapter_model.safetensors")
    return [_digest(path) for path in files]


def _setting(run: Run, name: str) -> str:
    return ", ".join(part for part in (run.label, name.replace(",", ", ")) if part)


def _describe(directory: Path, setting: str) -> Merged:
    report = json.loads((directory / REPORT).read_text())
    solved = [p for p in report["parameters"].values() if p.get("iterations")]
    reasons: dict[str, int] = {}
    for parameter in report["parameters"].values():
        if "stop_reason" in parameter:
            reasons[parameter["stop_reason"]] = reasons.get(parameter["stop_reason"], 0) + 1
    iterations = sum(p["iterations"] for p in solved) / len(solved) if solved else 0.0
    return Merged(setting, sha256(directory / "model.safetensors"), str(directory), report["wall_seconds"],
                  report["peak_rss_bytes"], iterations, reasons, (directory / "merge_config.yml").read_text())


class Merger:
    """Merges the models of one seed."""

    def __init__(self, binary: Path, inputs: Inputs, cache: Path, threads: int) -> None:
        self.binary, self.inputs, self.threads = binary, inputs, threads
        self.records = cache / "merges"
        self.work = cache / "merged"
        self.records.mkdir(exist_ok=True)
        self.work.mkdir(exist_ok=True)
        self.version = _digest(binary)
        self.made: list[Path] = []

    def run(self, method: Method, run: Run, *, alone: Optional[dict[str, float]] = None) -> list[Merged]:
        """Every setting of a run; `alone`: only that one of the sweep, as a config of its own, to time it.

        Raises [`MergeFailed`] with the binary's own words.
        """
        config = self.inputs.config(method, run)
        if alone is not None:
            config.pop("sweep", None)
            for dotted, value in alone.items():
                place, name = dotted.split(".")
                config[place] = {**config.get(place, {}), name: value}
        # The bytes are the same for any number of threads; only a timed merge depends on it.
        timed = None if alone is None else self.threads
        text = json.dumps([self.version, timed, config, _inputs(config)], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        record, directory = self.records / f"{key}.json", self.work / key
        if record.exists():
            return [Merged(**entry) for entry in json.loads(record.read_text())]
        self._merge(config, key, directory)
        if (directory / REPORT).exists():
            found = [_describe(directory, _setting(run, ""))]
        else:
            names = json.loads((directory / "sweep.json").read_text())["runs"]
            found = [_describe(directory / entry["directory"], _setting(run, entry["name"])) for entry in names]
        partial = record.with_suffix(f".{os.getpid()}.part")
        partial.write_text(json.dumps([asdict(merged) for merged in found], indent=1) + "\n")
        partial.rename(record)
        return found

    def values(self, method: Method, run: Run, number: int) -> dict[str, float]:
        """What a sweep's setting stands for, by dotted key; the last key varies fastest."""
        values: dict[str, float] = {}
        for key, choices in reversed((run.sweep or {}).items()):
            number, at = divmod(number, len(choices))
            values[key] = choices[at]
        return values

    def with_weights(self, method: Method, run: Run) -> list[Merged]:
        """As `run`, and the weights of all settings are there: merged again where they were cleaned away."""
        found = self.run(method, run)
        if all(merged.there() for merged in found):
            return found
        config = self.inputs.config(method, run)
        directory = Path(found[0].directory)
        root = directory.parent if "sweep" in config else directory
        self._merge(config, root.name, root)
        for merged in found:
            again = sha256(merged.path / "model.safetensors")
            if again != merged.digest:
                raise MergeFailed(f"{method.name}, {merged.setting}: the same merge gave other bytes")
        return found

    def _merge(self, config: dict[str, Any], key: str, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        self.made.append(directory)
        path = self.work / f"{key}.yml"
        # Through JSON, so that what two rounds share is written twice and not as a YAML alias.
        path.write_text(yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False))
        command = [str(self.binary), "merge", str(path), "--out", str(directory), "--threads", str(self.threads),
                   "--progress", "none"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise MergeFailed(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr.strip()}")

    def clean(self) -> None:
        """Removes the weights that this process merged; the records stay, and what another process works on, too."""
        for directory in self.made:
            shutil.rmtree(directory, ignore_errors=True)
            directory.with_name(directory.name + ".yml").unlink(missing_ok=True)


def log(text: str) -> None:
    """A line of progress."""
    print(f"quality: {text}", file=sys.stderr, flush=True)
