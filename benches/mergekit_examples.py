"""Runs configs in the shape of mergekit's published examples on small checkpoints, and loads and runs the results.

By hand, with any Python that has torch and transformers; where mergekit is installed too, its result is compared:

    cargo build --release
    python3 benches/mergekit_examples.py target/release/mats-stream

The four examples: a slerp whose `t` runs over the layers, otherwise for attention than for MLPs; TIES with gradients of
density and weight and a filter; a weighted mean; and 24 layers of one model below the last 20 of another. Models are Llamas
of 40 layers (the examples' 13B models have as many) with hidden size 16, named by paths like the hub's.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

LAYERS = 40

EXAMPLES = {
    "gradient-slerp": """\
slices:
  - sources:
      - {model: lab/first, layer_range: [0, 40]}
      - {model: lab/second, layer_range: [0, 40]}
merge_method: slerp
base_model: lab/first
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - {value: 0.5} # everything else
dtype: float16
""",
    "ties": """\
models:
  - model: lab/first
    parameters:
      density: [1, 0.7, 0.1] # from the first layer to the last
      weight: 1.0
  - model: lab/second
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: lab/third
    parameters:
      density: 0.33
      weight:
        - {filter: mlp, value: 0.5}
        - {value: 0}
merge_method: ties
base_model: lab/base
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
    "linear": """\
models:
  - {model: lab/first, parameters: {weight: 1.0}}
  - {model: lab/second, parameters: {weight: 0.3}}
  - {model: lab/third, parameters: {weight: 0.5}}
merge_method: linear
dtype: float16
""",
    "layer-stack": """\
slices:
  - sources: [{model: lab/first, layer_range: [0, 24]}]
  - sources: [{model: lab/second, layer_range: [20, 40]}]
merge_method: passthrough
dtype: float16
""",
}


def write_models(directory):
    """A base and three models of it, half a percent away."""
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.float16)
    model.save_pretrained(directory / "lab/base")
    origin = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ["first", "second", "third"]:
        with torch.no_grad():
            for key, value in model.state_dict().items():
                value.copy_(origin[key] + 0.005 * torch.randn(value.shape).to(torch.float16))
        model.save_pretrained(directory / "lab" / name)


def generate(directory):
    """Greedily, sixteen tokens; every logit must be finite."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = torch.tensor([[1, 17, 42, 5]])
    with torch.no_grad():
        logits = model(prompt).logits
        text = model.generate(prompt, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    if not torch.isfinite(logits).all():
        sys.exit(f"{directory}: logits that are not finite")
    return model, text[0, 4:].tolist()


def mergekit_result(config, out):
    """The same config through mergekit, or `None` where it is not installed."""
    try:
        import yaml
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions
    except ImportError:
        return None
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, device="cpu", quiet=True)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(config)), str(out), options)
    return transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary", type=Path)
    binary = parser.parse_args().binary.resolve()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        write_models(work)
        os.chdir(work)
        for name, config in EXAMPLES.items():
            Path(f"{name}.yml").write_text(config)
            subprocess.run([binary, "merge", f"{name}.yml", "--out", name, "--progress", "none"], check=True)
            model, tokens = generate(name)
            line = f"{name}: {model.config.num_hidden_layers} layers, generates {tokens}"
            theirs = mergekit_result(config, f"{name}-mergekit")
            if theirs is not None:
                ours = model.state_dict()
                assert ours.keys() == theirs.keys(), "the same tensors"
                far = max((ours[key] - theirs[key]).abs().max().item() for key in ours)
                line += f"; furthest from mergekit's: {far:.1e}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
