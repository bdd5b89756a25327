"""End to end: collect, merge with the Rust binary, load the merged model in transformers, run it.

The binary is `$MATS_STREAM`, or a build in the repository's `target/`; without one these tests are skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import (
    bert,
    class_batches,
    clip_vision,
    gpt2,
    image_batches,
    image_log_likelihood,
    llama,
    lm_batches,
    seq2seq_batches,
    t5,
)

from mats_stream import Statistics, cli, collect

ROOT = Path(__file__).resolve().parents[2]


def binary():
    for path in (os.environ.get("MATS_STREAM"), ROOT / "target/release/mats-stream", ROOT / "target/debug/mats-stream"):
        if path and Path(path).exists():
            return str(path)
    pytest.skip("no mats-stream binary: build it, or set MATS_STREAM")


def run(*arguments):
    done = subprocess.run([binary(), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def saved(model, path):
    model.save_pretrained(path, safe_serialization=True)
    return path


FAMILIES = {
    "llama": (llama, lm_batches, "causal-lm"),
    "gpt2": (gpt2, lm_batches, "causal-lm"),
    "t5": (t5, seq2seq_batches, "seq2seq"),
    "bert": (bert, class_batches, "classification"),
    "clip": (clip_vision, image_batches, image_log_likelihood),
}


def merged(tmp_path, family, kinds, config, **options):
    """(models, batches, statistics, merged model, report)."""
    make, batches_of, loss = FAMILIES[family]
    models = [make(seed) for seed in (1, 2)]
    batches = [batches_of(seed=seed) for seed in (1, 2)]
    lines = [config, "models:"]
    statistics = []
    for i, (model, data) in enumerate(zip(models, batches)):
        saved(model, tmp_path / f"m{i}")
        statistics.append(collect(model, data, loss, kinds=kinds, out=tmp_path / f"s{i}.safetensors", **options))
        run("inspect", tmp_path / f"s{i}.safetensors", "--stats")
        lines += [f"  - model: m{i}", f"    statistics: s{i}.safetensors"]
    (tmp_path / "merge.yml").write_text("\n".join(lines) + "\n")
    run("merge", tmp_path / "merge.yml", "--out", tmp_path / "out", "--progress", "none")
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    result = type(models[0]).from_pretrained(tmp_path / "out").eval()
    return models, batches, statistics, result, report


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"packed": False}], ids=["f32", "bf16", "full"])
def test_kfac_merge_loads_and_runs(tmp_path, family, options):
    models, batches, statistics, result, report = merged(
        tmp_path, family, ["input_gram", "output_gram", "fisher_block"], "merge_method: mats", **options)
    subspaces = {record.get("subspace") for record in report["parameters"].values()}
    assert {"kfac", "fisher_block"} <= subspaces, subspaces
    solved = [name for name, record in report["parameters"].items() if record.get("subspace") == "kfac"]
    stored = {key.rsplit("/", 1)[0] for key in statistics[0]}
    assert set(solved) <= stored and len(solved) >= 8
    loss = FAMILIES[family][2]
    if not callable(loss):
        from mats_stream.likelihood import resolve

        loss = resolve(loss, "mean")
    for data in batches:
        for batch in data:
            with torch.no_grad():
                assert bool(torch.isfinite(loss(result, batch, None)).all())


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_regmean_is_the_closed_form(tmp_path, family):
    """What the binary solves from the file is W = (Σ WᵢAᵢ)(Σ Aᵢ)⁻¹ with the Grams collected here."""
    # Few tokens leave the Grams singular: compared is the residual of the equation, not W.
    models, _, statistics, result, _ = merged(tmp_path, family, ["input_gram"], "merge_method: regmean")
    checked = 0
    weights = [model.state_dict() for model in models]
    for key in statistics[0]:
        name = key.rsplit("/", 1)[0]
        grams = [s.dense(name, "input_gram").double() for s in statistics]
        target = sum(w[name].double() @ a for w, a in zip(weights, grams))
        got = result.state_dict()[name].double() @ sum(grams)
        error = float((got - target).norm() / target.norm())
        # The result is rounded to f32, the Grams were as well; a ridge of 1e-8 is all that Cholesky may add.
        assert error < 1e-4, (name, error)
        checked += 1
    assert checked > 5


def test_factors_merge(tmp_path):
    _, _, _, _, report = merged(tmp_path, "bert", ["input_factor", "output_factor"], "merge_method: mats", rank=5)
    assert "kfac" in {record.get("subspace") for record in report["parameters"].values()}


def test_fisher_merge(tmp_path):
    models, _, statistics, result, _ = merged(tmp_path, "bert", ["fisher_diagonal"], "merge_method: fisher")
    name = "bert.encoder.layer.0.output.dense.weight"
    f = [s[f"{name}/fisher_diagonal"].double().clamp_min(1e-8) for s in statistics]
    w = [model.state_dict()[name].double() for model in models]
    expected = (f[0] * w[0] + f[1] * w[1]) / (f[0] + f[1])
    assert np.allclose(result.state_dict()[name].double(), expected, rtol=1e-5, atol=1e-7)


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records(batches):
    for batch in batches:
        for i in range(len(batch["input_ids"])):
            length = int(batch["attention_mask"][i].sum())
            record = {"input_ids": batch["input_ids"][i, :length].tolist()}
            if "labels" in batch:
                labels = batch["labels"][i]
                record["labels" if labels.dim() else "label"] = (
                    [label for label in labels.tolist() if label != -100] if labels.dim() else int(labels))
            yield record


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_command(tmp_path, family, capsys):
    make, batches_of, task = FAMILIES[family]
    model, batches = make(), batches_of((4, 3, 2))
    saved(model, tmp_path / "model")
    data = jsonl(tmp_path / "data.jsonl", records(batches))
    arguments = [str(tmp_path / "model"), "--data", str(data), "--task", task, "--progress", "plain",
                 "--kinds", "input_gram,output_gram,fisher_diagonal", "--batch-tokens", "20"]
    assert cli.main([*arguments, "--out", str(tmp_path / "s.safetensors"), "--modules-per-pass", "3"]) == 0
    assert "9 examples" in capsys.readouterr().err
    expected = collect(model, batches, task, kinds=["input_gram", "output_gram", "fisher_diagonal"])
    got = Statistics.load(tmp_path / "s.safetensors")
    assert set(got) == set(expected) and got.metadata["model"] == "model" and got.metadata["data"] == "data.jsonl"
    for key in expected:
        size = float(expected[key].abs().max())
        # Biases of keys have no gradient but rounding.
        assert float((got[key] - expected[key]).abs().max()) <= 1e-4 * size + 1e-12, key
    inspected = json.loads(run("inspect", tmp_path / "s.safetensors", "--json", "--stats"))
    assert inspected["content"] == "statistics" and not inspected["warnings"]
    assert inspected["metadata"]["examples"] == "9"


def test_command_refuses(tmp_path, capsys):
    saved(bert(), tmp_path / "model")
    capsys.readouterr()
    data = jsonl(tmp_path / "data.jsonl", [{"text": "a", "label": 0}])

    def refused(text, *more, model=tmp_path / "model", file=data, task="classification", out=tmp_path / "s.safetensors"):
        assert cli.main([str(model), "--data", str(file), "--task", task, "--out", str(out), *more]) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1, error
        assert not Path(out).exists()

    refused("has no tokenizer")
    refused("cannot be read", file=tmp_path / "none.jsonl")
    refused("does not exist", model=tmp_path / "none")
    refused("unknown kind", "--kinds", "gram")
    refused("expected OURS=THEIRS", "--field", "text")
    refused("has no field `sentence`", "--field", "text=sentence")
    refused("a size such as", "--max-memory", "lots")
    refused("does not exist", out=tmp_path / "nowhere/s.safetensors")
    refused("no JSON", file=_written(tmp_path / "bad.jsonl", "{\n"))
    refused("label `x`", file=jsonl(tmp_path / "label.jsonl", [{"input_ids": [3, 4], "label": "x"}]))
    refused("no list of numbers", file=jsonl(tmp_path / "ids.jsonl", [{"input_ids": "3", "label": 0}]))


def _written(path, text):
    path.write_text(text)
    return path
