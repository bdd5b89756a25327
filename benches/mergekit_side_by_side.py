"""Times mergekit 0.1.5 and mats-stream on the same models and configs, one after the other, in one run.

    python3 -m venv mergekit-venv && mergekit-venv/bin/pip install mergekit==0.1.5
    cargo build --release
    mergekit-venv/bin/python benches/mergekit_side_by_side.py DIRECTORY [--gib 1] [--threads 2] [--methods ties,slerp] [--rounds 3]

Makes a base and two models in a Llama's shapes, bf16, of about `--gib` GiB each, in DIRECTORY (kept, and used again by the
next run), reads all of them once so that the page cache is warm, then merges with each tool in turn, `--rounds` times.
Printed are the medians of the wall seconds, their ratio, and the most anonymous memory that each process held. Ratios of one
run are what counts.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
HIDDEN, INNER, VOCABULARY, HEADS, KEY_HEADS = 2048, 5632, 32000, 32, 4

PARAMETERS = {"weight": 0.5, "density": 0.5}
CONFIGS = {
    "linear": {"models": ["a", "b", "base"], "parameters": {"weight": 1.0}},
    "task_arithmetic": {"base_model": "base", "models": ["a", "b"], "parameters": {"weight": 0.5}},
    "slerp": {"base_model": "base", "models": ["base", "a"], "parameters": {"t": 0.4}},
    "ties": {"base_model": "base", "models": ["a", "b"], "parameters": PARAMETERS},
    "dare_ties": {"base_model": "base", "models": ["a", "b"], "parameters": PARAMETERS},
    "della": {"base_model": "base", "models": ["a", "b"], "parameters": PARAMETERS},
    "breadcrumbs": {"base_model": "base", "models": ["a", "b"], "parameters": PARAMETERS},
    "sce": {"base_model": "base", "models": ["a", "b"], "parameters": {"select_topk": 0.5}},
    "model_stock": {"base_model": "base", "models": ["a", "b"]},
    "karcher": {"models": ["a", "b"]},
}


def shapes(layers):
    keys = HIDDEN * KEY_HEADS // HEADS
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (HIDDEN,)
        yield prefix + "mlp.down_proj.weight", (HIDDEN, INNER)
        yield prefix + "mlp.gate_proj.weight", (INNER, HIDDEN)
        yield prefix + "mlp.up_proj.weight", (INNER, HIDDEN)
        yield prefix + "post_attention_layernorm.weight", (HIDDEN,)
        yield prefix + "self_attn.k_proj.weight", (keys, HIDDEN)
        yield prefix + "self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield prefix + "self_attn.q_proj.weight", (HIDDEN, HIDDEN)
        yield prefix + "self_attn.v_proj.weight", (keys, HIDDEN)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def layers_for(gib):
    def size(layers):
        return 2 * sum(torch.Size(shape).numel() for _, shape in shapes(layers))

    layers = 1
    while size(layers) < gib * 2**30:
        layers += 1
    return layers


def make(directory, gib):
    layers = layers_for(gib)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    for seed, name in enumerate(["base", "a", "b"]):
        out = directory / name
        if (out / "config.json").exists():
            continue
        out.mkdir(parents=True, exist_ok=True)
        base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
        tensors = {}
        for key, shape in shapes(layers):
            values = torch.randn(shape, generator=base) * 0.02
            if name != "base":
                values += torch.randn(shape, generator=own) * 0.002
            tensors[key] = values.to(torch.bfloat16)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        (out / "config.json").write_text(json.dumps(config))
    return sum(f.stat().st_size for f in (directory / "a").iterdir())


def anonymous_bytes(pid):
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def timed(command, environment):
    """Wall seconds and the most anonymous memory seen, sampled every 10 ms."""
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    most = 0
    while process.poll() is None:
        most = max(most, anonymous_bytes(process.pid))
        time.sleep(0.01)
    seconds = time.monotonic() - started
    if process.returncode != 0:
        sys.exit(f"{command[0]} failed:\n{process.stderr.read()[-2000:]}")
    return seconds, most


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gib", type=float, default=1.0, help="size of each model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-memory", default="256MiB")
    parser.add_argument("--rounds", type=int, default=1, help="of both tools, in turn")
    parser.add_argument("--methods", default="linear,task_arithmetic,slerp,ties,dare_ties")
    arguments = parser.parse_args()
    directory = arguments.directory.resolve()
    size = make(directory, arguments.gib)
    for name in ["base", "a", "b"]:
        subprocess.run(["cat", directory / name / "model.safetensors"], stdout=subprocess.DEVNULL, check=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "MKL_NUM_THREADS": str(arguments.threads)}
    mergekit = [Path(sys.executable).parent / "mergekit-yaml"]
    mats = [ROOT / "target/release/mats-stream"]
    print(f"3 models of {size / 2**30:.2f} GiB, {arguments.threads} threads, --max-memory {arguments.max_memory}")
    print(f"{'method':<16}{'mergekit':>10}{'':>10}{'mats-stream':>12}{'':>10}{'ratio':>8}")
    for method in arguments.methods.split(","):
        config = dict(CONFIGS[method])
        config["models"] = [{"model": str(directory / name)} for name in config["models"]]
        if "base_model" in config:
            config["base_model"] = str(directory / config["base_model"])
        path = directory / f"{method}.yml"
        path.write_text(yaml.safe_dump({"merge_method": method, **config}, sort_keys=False))
        results = {"mergekit": [], "mats-stream": []}
        for tool in [*results] * arguments.rounds:
            out = directory / "out"
            shutil.rmtree(out, ignore_errors=True)
            if tool == "mergekit":
                command = [*mergekit, path, out, "--no-copy-tokenizer", "--quiet"]
            else:
                limits = ["--threads", str(arguments.threads), "--max-memory", arguments.max_memory]
                command = [*mats, "merge", path, "--out", out, "--progress", "none", *limits]
            os.sync()  # what the other left to be written is not this one's time
            results[tool].append(timed([str(c) for c in command], environment))
            shutil.rmtree(out, ignore_errors=True)
        (theirs, held), (ours, own) = (
            (statistics.median(seconds for seconds, _ in runs), max(most for _, most in runs)) for runs in results.values()
        )
        print(
            f"{method:<16}{theirs:>8.2f} s{held / 2**20:>6.0f} MiB{ours:>10.2f} s{own / 2**20:>6.0f} MiB{theirs / ours:>7.1f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
