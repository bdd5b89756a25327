"""Times plan and merge of checkpoints of very many small tensors: seconds must grow with their number, and no faster.

    cargo build --release
    python3 benches/many_tensors.py DIRECTORY [--counts 11250,22500,45000,90000] [--method linear]

Makes, for each number of tensors, a base and two models of 16 x 16 bf16 tensors in DIRECTORY (removed afterwards), with a
Llama mixture of experts' names, and runs `mats-stream plan` and `mats-stream merge` on them, warm. Python's standard library
is enough. Absolute times are those of the machine; the last column is what to read.
"""

import argparse
import json
import random
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIDE = 16
EXPERTS = 128


def names(count):
    layer = 0
    while True:
        for expert in range(EXPERTS):
            for projection in ("down_proj", "gate_proj", "up_proj"):
                if count == 0:
                    return
                count -= 1
                yield f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
        layer += 1


def write(path, count, seed):
    """A safetensors file by hand: eight bytes of length, a JSON header, the data."""
    size = 2 * SIDE * SIDE
    header = {
        name: {"dtype": "BF16", "shape": [SIDE, SIDE], "data_offsets": [k * size, (k + 1) * size]}
        for k, name in enumerate(names(count))
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # Normal numbers of either sign: the exponent's upper bits are those of small weights.
    values = random.Random(seed)
    block = b"".join(struct.pack("<H", 0x3C00 | values.getrandbits(9) | values.getrandbits(1) << 15) for _ in range(1 << 16))
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    with open(path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        left = count * size
        while left > 0:
            file.write(block[:left])
            left -= len(block)


def seconds(command):
    started = time.monotonic()
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stderr}")
    return time.monotonic() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--counts", default="11250,22500,45000,90000")
    parser.add_argument("--method", default="linear", choices=["linear", "task_arithmetic", "ties"])
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/mats-stream")
    arguments = parser.parse_args()
    parameters = {"linear": "weight: 1", "task_arithmetic": "weight: 0.5", "ties": "weight: 0.5, density: 0.5"}
    print(f"{'tensors':>8}{'plan':>10}{'merge':>10}{'us a tensor':>14}")
    for count in map(int, arguments.counts.split(",")):
        directory = arguments.directory.resolve() / f"many-{count}"
        shutil.rmtree(directory, ignore_errors=True)
        try:
            for seed, name in enumerate(["base", "a", "b"]):
                write(directory / name, count, seed)
            config = directory / "merge.yml"
            base = "" if arguments.method == "linear" else f"base_model: {directory}/base\n"
            config.write_text(
                f"merge_method: {arguments.method}\n{base}models:\n"
                f"  - model: {directory}/a\n  - model: {directory}/b\n"
                f"parameters: {{ {parameters[arguments.method]} }}\n"
            )
            plans, merges = [], []
            for _ in range(arguments.rounds):
                plans.append(seconds([arguments.binary, "plan", config]))
                merge = [arguments.binary, "merge", config, "--out", directory / "out", "--progress", "none"]
                merges.append(seconds(merge))
                shutil.rmtree(directory / "out")
            plan, merge = min(plans), min(merges)
            print(f"{count:>8}{plan:>8.2f} s{merge:>8.2f} s{merge / count * 1e6:>14.1f}", flush=True)
        finally:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
