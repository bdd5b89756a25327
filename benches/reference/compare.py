"""`mats-stream merge` and the paper's algorithm on the same files, one after the other, and what each took.

    compare.py --fixtures
    compare.py --set DIR                  # as examples/make_synthetic.rs writes it, with --statistics kfac
    compare.py --models M... --statistics S...

Needs torch, scipy and safetensors (`pip install torch scipy safetensors`, the CPU build will do) and a release build of
`mats-stream`. Both start at the plain average, solve what has both Grams, average the rest, write float32 and use the
same number of threads. The objective is computed from the written files by one routine in float64 (`objective.py`). Time
is wall time of the process; that of the replay is also given without what Python takes to start. Memory is the
largest resident set, which for `mats-stream` counts mapped input pages that the system may take back; its anonymous
memory is beside it. `--rounds` takes turns and keeps each one's fastest.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def run(command, environment=None):
    """Wall and processor seconds, largest resident set in bytes, and stdout."""
    with tempfile.TemporaryFile() as out:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"compare: `{' '.join(map(str, command))}` ended with {process.returncode}")
        out.seek(0)
        return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, out.read().decode()


def inputs(arguments):
    if arguments.fixtures:
        root, tasks = ROOT / "fixtures", ("wordnet", "movies", "debian")
        return [root / "models" / t for t in tasks], [root / "statistics" / f"{t}.safetensors" for t in tasks]
    if arguments.set:
        statistics = sorted(arguments.set.glob("statistics-*.safetensors"))
        return [arguments.set / s.stem.replace("statistics", "model") for s in statistics], statistics
    return arguments.models, arguments.statistics


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--fixtures", action="store_true")
    parser.add_argument("--set", type=Path)
    parser.add_argument("--models", nargs="+", type=Path, default=[])
    parser.add_argument("--statistics", nargs="+", type=Path, default=[])
    parser.add_argument("--iterations", type=int, default=100, help="of the replay's conjugate gradients")
    parser.add_argument("--ridge", type=float, default=1e-3, help="of mats-stream's")
    parser.add_argument("--preconditioner", default="kronecker")
    parser.add_argument("--max-memory", default="8GiB")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/mats-stream")
    parser.add_argument("--work", type=Path, help="where a working directory is made and removed again")
    parser.add_argument("--json", type=Path, help="write what was measured")
    arguments = parser.parse_args()
    models, statistics = ([str(Path(p).resolve()) for p in paths] for paths in inputs(arguments))
    if not models or len(models) != len(statistics):
        parser.error("as many statistics as models are needed")

    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        work = Path(work)
        config = [
            "merge_method: mats", "subspace: kfac", "initial: average", "dtype: float32", "unmatched: average",
            f"solver: {{ method: pcg, preconditioner: {arguments.preconditioner}, ridge: {arguments.ridge} }}",
            "models:",
        ]
        for model, file in zip(models, statistics):
            config.append(f"  - {{ model: {json.dumps(model)}, statistics: {json.dumps(file)} }}")
        (work / "merge.yml").write_text("\n".join(config) + "\n")
        given = ["--models", *models, "--statistics", *statistics]
        replay = [
            sys.executable, HERE / "replay.py", *given, "--iterations", str(arguments.iterations),
            "--threads", str(arguments.threads), "--out", work / "replay.safetensors",
        ]
        # Unless told otherwise, what a user's numpy and torch do by themselves.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
        ours = theirs = None
        for turn in range(arguments.rounds):
            out = work / f"merged-{turn}"
            merge = [
                arguments.binary, "merge", work / "merge.yml", "--out", out, "--threads", str(arguments.threads),
                "--max-memory", arguments.max_memory, "--progress", "none",
            ]
            seconds, processor, rss, _ = run(merge)
            report = json.loads((out / "merge_report.json").read_text())
            if ours is None or seconds < ours["seconds"]:
                solved = [p for p in report["parameters"].values() if "iterations" in p]
                ours = {
                    "seconds": seconds, "processor_seconds": processor, "peak_rss_bytes": rss, "out": str(out),
                    "peak_anonymous_bytes": report.get("peak_anonymous_bytes"),
                    "parameters": len(solved), "iterations": sum(p["iterations"] for p in solved),
                    "setup_seconds": sum(p.get("setup", {}).get("seconds", 0.0) for p in solved),
                    "solve_seconds": sum(p.get("solve_seconds", 0.0) for p in solved),
                }
            seconds, processor, rss, text = run(replay, environment)
            if theirs is None or seconds < theirs["wall"]:
                theirs = json.loads(text.splitlines()[-1])
                theirs |= {"wall": seconds, "processor_seconds": processor, "peak_rss_bytes": rss}
        *_, text = run(
            [sys.executable, HERE / "objective.py", *given, "--checkpoints", ours["out"], work / "replay.safetensors"],
            environment,
        )
    objective = json.loads(text)
    (ours["objective"], theirs["objective"]) = (c["objective"] / objective["parameters"] for c in objective["checkpoints"])

    mib = 1 << 20
    print(f"{len(models)} models, {ours['parameters']} parameters solved, {arguments.threads} threads, "
          f"best of {arguments.rounds}; objective relative to the average's, mean over parameters")
    print(f"{'':<14} {'wall s':>9} {'processor s':>12} {'peak rss MiB':>13} {'iterations':>11} {'objective':>11}")
    print(f"{'mats-stream':<14} {ours['seconds']:>9.2f} {ours['processor_seconds']:>12.2f} {ours['peak_rss_bytes'] / mib:>13.0f} "
          f"{ours['iterations'] / max(1, ours['parameters']):>11.1f} {ours['objective']:>11.6f}")
    print(f"{'torch + scipy':<14} {theirs['wall']:>9.2f} {theirs['processor_seconds']:>12.2f} {theirs['peak_rss_bytes'] / mib:>13.0f} "
          f"{theirs['iterations'] / max(1, theirs['parameters']):>11.1f} {theirs['objective']:>11.6f}")
    print(f"replay: load {theirs['load_seconds']:.2f} s, solve {theirs['solve_seconds']:.2f} s, save "
          f"{theirs['save_seconds']:.2f} s, {theirs['seconds']:.2f} s without starting Python")
    anonymous = ours["peak_anonymous_bytes"]
    print(f"mats-stream: set-up {ours['setup_seconds']:.2f} s, iterations {ours['solve_seconds']:.2f} s"
          + (f", anonymous memory {anonymous / mib:.0f} MiB" if anonymous else ""))
    print(f"time, replay / mats-stream: {theirs['wall'] / ours['seconds']:.2f} "
          f"({theirs['seconds'] / ours['seconds']:.2f} without starting Python; "
          f"{theirs['processor_seconds'] / ours['processor_seconds']:.2f} of processor time)")
    print(f"memory, mats-stream / replay: {ours['peak_rss_bytes'] / theirs['peak_rss_bytes']:.3f}"
          + (f" ({anonymous / theirs['peak_rss_bytes']:.3f} anonymous)" if anonymous else ""))
    lower = ours["objective"] <= theirs["objective"]
    print(f"objective: mats-stream's is {'not higher' if lower else 'HIGHER'} "
          f"({ours['objective'] / theirs['objective'] - 1:+.2%})")
    if arguments.json:
        arguments.json.write_text(json.dumps({"mats_stream": ours, "replay": theirs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
