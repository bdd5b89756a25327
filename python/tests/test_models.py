"""Families of transformers against brute force: fused and packed weights, Conv1D, heads, vision, adapters."""

import pytest
import torch
from oracle import brute_force, class_likelihood, close, compare, examples_of, lm_likelihood
from tiny import (
    bart,
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

from mats_stream import collect

ALL = ["input_gram", "output_gram", "fisher_diagonal", "fisher_block"]
# Models of transformers compute some parts in f32 whatever their dtype (norms, rotary tables).
F32 = 1e-4


def test_llama():
    model, batches = llama(), lm_batches()
    statistics = collect(model, batches, "causal-lm", kinds=ALL)
    assert compare(statistics, model, batches, lm_likelihood, F32) > 14 * 3
    assert "lm_head.weight/input_gram" in statistics and "lm_head.weight/output_gram" not in statistics
    assert "model.layers.0.self_attn.k_proj.weight/input_gram" in statistics.aliases
    assert "model.norm.weight/fisher_block" in statistics


def test_tied_head_is_an_embedding():
    statistics = collect(llama(tie_word_embeddings=True), lm_batches(), "causal-lm", kinds=ALL)
    assert not any("lm_head" in key or "embed" in key for key in statistics)
    assert "model.embed_tokens.weight" in statistics.notes


def test_bert():
    model, batches = bert(), class_batches()
    statistics = collect(model, batches, "classification", kinds=ALL)
    # Tokens differ: the pooler sees one row an example, which brute force does as well.
    assert compare(statistics, model, batches, class_likelihood, F32) > 50


def test_gpt2_is_stored_transposed():
    """Conv1D keeps [in, out]: the sides of what is stored are swapped, and the file says so."""
    model, batches = gpt2(), lm_batches()
    statistics = collect(model, batches, "causal-lm", kinds=ALL)
    inputs, outputs = {}, {}
    name = "transformer.h.0.attn.c_attn"
    module = dict(model.named_modules())[name]

    def hook(_module, args, output):
        inputs.setdefault(name, []).append(args[0].detach().reshape(-1, 12))
        output.register_hook(lambda g: outputs.setdefault(name, []).append(g.reshape(-1, 36)))

    handle = module.register_forward_hook(hook)
    diagonals, blocks, _, _ = brute_force(model, list(examples_of(batches)), lm_likelihood)
    handle.remove()
    x, g = torch.cat(inputs[name]), torch.cat(outputs[name])
    close(statistics.dense(f"{name}.weight", "output_gram"), x.t() @ x / len(x), F32, "rows of the stored weight")
    close(statistics.dense(f"{name}.weight", "input_gram"), g.t() @ g / len(g), F32, "columns of the stored weight")
    assert statistics.metadata[f"layout:{name}.weight"] == "in,out"
    for key in statistics:
        parameter, kind = key.rsplit("/", 1)
        if kind == "fisher_diagonal":
            close(statistics[key], diagonals[parameter], F32, key)
        elif kind == "fisher_block":
            close(statistics.dense(parameter, kind), blocks[parameter], F32, key)


def test_bart_tokens():
    model, batches = bart(), seq2seq_batches()
    statistics = collect(model, batches, "seq2seq", kinds=ALL)
    examples = list(examples_of(batches))

    def likelihood(m, example):
        # Without the mask of the batch there is nothing padded, and the labels' own shift.
        logits = m(input_ids=example["input_ids"], labels=example["labels"]).logits
        return -torch.nn.functional.cross_entropy(logits[0], example["labels"][0])

    diagonals, _, grams, _ = brute_force(model, examples, likelihood)
    for part in ("encoder.layers.0.self_attn.q_proj", "decoder.layers.0.encoder_attn.k_proj",
                 "decoder.layers.0.encoder_attn.q_proj", "decoder.layers.0.fc1"):
        name = f"model.{part}.weight"
        close(statistics.dense(name, "input_gram"), grams[name, "input"], F32, name)
        close(statistics.dense(name, "output_gram"), grams[name, "output"], F32, name)
        close(statistics[f"{name}/fisher_diagonal"], diagonals[name], F32, name)


def test_clip_vision_tower():
    model, batches = clip_vision(), image_batches()
    statistics = collect(model, batches, image_log_likelihood, kinds=ALL)
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in statistics) else ""
    # Convolutions and the projection beside the layers.
    assert statistics[f"{prefix}embeddings.patch_embedding.weight/input_gram"].shape == (192 * 193 // 2,)
    assert "visual_projection.weight/output_gram" in statistics
    examples = [{key: value[i : i + 1] for key, value in batch.items()} for batch in batches for i in range(len(batch["labels"]))]
    diagonals, blocks, grams, _ = brute_force(model, examples, lambda m, e: image_log_likelihood(m, e).sum())
    for key in statistics:
        name, kind = key.rsplit("/", 1)
        if kind == "fisher_diagonal":
            close(statistics[key], diagonals[name], F32, key)
        elif kind == "fisher_block":
            close(statistics.dense(name, kind), blocks[name], F32, key)
        elif (name, "input") in grams:
            close(statistics.dense(name, kind), grams[name, kind.split("_")[0]], F32, key)
    # The class vector is added to the output of a module, so it has a batched form.
    assert f"{prefix}embeddings.class_embedding/fisher_block" in statistics


def adapters(kind, model):
    peft = pytest.importorskip("peft")
    if kind == "lora":
        config = peft.LoraConfig(r=2, target_modules=["q", "wi_0"], init_lora_weights=False)
    else:
        config = peft.IA3Config(target_modules=["k", "v", "wi_1", "wo"], feedforward_modules=["wo"],
                                init_ia3_weights=False)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "ia3_" in name:
                p.add_(1.0 + 0.1 * torch.randn_like(p))
    return wrapped.eval()


def seq2seq_likelihood(model, example):
    logits = model(**example).logits
    return -torch.nn.functional.cross_entropy(logits[0], example["labels"][0])


def test_ia3_vectors():
    torch.manual_seed(0)
    model, batches = adapters("ia3", t5()), seq2seq_batches()
    statistics = collect(model, batches, "seq2seq", kinds=["fisher_block", "fisher_diagonal"], adapters="own")
    # k and v of three attentions a layer pair, wi_1 and wo of each feed-forward.
    assert len(statistics) == 2 * (2 * (2 + 2) + 2 * (4 + 2))
    diagonals, blocks, _, _ = brute_force(model, list(examples_of(batches)), seq2seq_likelihood)
    for key in statistics:
        name, kind = key.rsplit("/", 1)
        assert name.endswith("ia3_l") and name.startswith("base_model.model."), name
        if kind == "fisher_block":
            close(statistics.dense(name, kind), blocks[f"{name}.default"], F32, key)
        else:
            close(statistics[key], diagonals[f"{name}.default"], F32, key)


def test_lora_as_the_merged_weight_and_as_itself():
    torch.manual_seed(0)
    model, batches = adapters("lora", t5()), seq2seq_batches()
    own = collect(model, batches, "seq2seq", kinds=["fisher_diagonal", "input_gram"], adapters="own")
    diagonals, _, _, _ = brute_force(model, list(examples_of(batches)), seq2seq_likelihood)
    names = {key.rsplit("/", 1)[0] for key in own}
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in names) and len(names) == 2 * (6 + 4)
    for name in names:
        close(own[f"{name}/fisher_diagonal"], diagonals[name.replace(".weight", ".default.weight")], F32, name)
    # Where the adapter is merged into its weight, the layer's statistics are the same.
    host = collect(model, batches, "seq2seq", kinds=["fisher_diagonal", "input_gram", "output_gram"])
    assert not any("lora" in key for key in host)
    merged = model.merge_and_unload()
    expected = collect(merged, batches, "seq2seq", kinds=["fisher_diagonal", "input_gram", "output_gram"])
    assert set(host) == set(expected)
    for key in expected:
        close(host[key], expected[key], F32, key)
