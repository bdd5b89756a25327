"""The recipe of MaTS (arXiv 2312.04339, section 5.2 and its released scripts), replayed line by line on a tiny T5.

One example at a time, unpadded batches of one; module hooks; masks by the module's name; sums in float32; Grams divided
by the number of encoder or decoder tokens, Fishers by the number of examples.
"""

import re

import torch
from oracle import close, examples_of
from tiny import seq2seq_batches, t5
from torch import nn
from torch.nn import functional as F

from mats_stream import collect

ENCODER = re.compile(r".*encoder.*|.*decoder.*EncDecAttention.(k|v).*")


def replay(model, examples):
    model.eval()
    activations, gradients, handles = {}, {}, []

    def forward_hook(name):
        def hook(_module, inputs, _output):
            activations[name] = inputs[0].float()

        return hook

    def backward_hook(name):
        def hook(_module, _grad_input, grad_output):
            gradients[name] = grad_output[0].float()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(forward_hook(name)))
            if name != "lm_head":
                handles.append(module.register_full_backward_hook(backward_hook(name)))
    grams_in, grams_out, fisher = {}, {}, {}
    tokens = {True: 0, False: 0}
    count = 0
    for p in model.parameters():
        p.requires_grad_(True)
    for example in examples:
        input_mask = torch.ones(example["input_ids"].shape[1])
        target_mask = torch.ones(example["labels"].shape[1])
        logits = model(**example, use_cache=False).logits[0]
        losses = F.cross_entropy(logits, example["labels"][0], reduction="none")
        loss = (losses * target_mask).sum() / target_mask.sum()
        model.zero_grad()
        (-loss).backward()
        for name in activations:
            mask = input_mask if ENCODER.fullmatch(name) else target_mask
            x = activations[name].flatten(0, 1) * mask[:, None]
            grams_in[name] = grams_in.get(name, 0) + x.t() @ x
            if name in gradients:
                g = gradients[name].flatten(0, 1) * mask[:, None]
                grams_out[name] = grams_out.get(name, 0) + g.t() @ g
        for name, p in model.named_parameters():
            fisher[name] = fisher.get(name, 0) + torch.square(p.grad)
        tokens[True] += int(input_mask.sum())
        tokens[False] += int(target_mask.sum())
        count += 1
    for handle in handles:
        handle.remove()

    def divide(grams):
        return {name: (gram / tokens[bool(ENCODER.fullmatch(name))]).detach() for name, gram in grams.items()}

    return divide(grams_in), divide(grams_out), {name: f / count for name, f in fisher.items()}, tokens


def test_replayed_on_t5():
    model, batches = t5(), seq2seq_batches((4, 3, 1))
    statistics = collect(model, batches, "seq2seq", kinds=["input_gram", "output_gram", "fisher_diagonal"])
    grams_in, grams_out, fisher, tokens = replay(model, examples_of(batches))
    assert statistics.metadata["tokens:encoder"] == str(tokens[True])
    assert statistics.metadata["tokens:decoder"] == str(tokens[False])
    assert statistics.metadata["tokens"] == str(sum(tokens.values()))
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 2 * (4 + 3) + 2 * (8 + 3) + 1
    # Both are f32, in other orders of summation; gradients pass through two layers.
    for name in linears:
        if name == "lm_head" and model.lm_head.weight is model.shared.weight:
            continue  # newer transformers tie them always
        close(statistics.dense(f"{name}.weight", "input_gram"), grams_in[name], 1e-5, name)
        if name != "lm_head":
            close(statistics.dense(f"{name}.weight", "output_gram"), grams_out[name], 1e-4, name)
    assert "lm_head.weight/output_gram" not in statistics
    left_out = {"shared.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"}
    for name, expected in fisher.items():
        if name in left_out:
            assert name in statistics.notes
        else:
            close(statistics[f"{name}/fisher_diagonal"], expected, 1e-4, name)


def test_inputs_are_shared_where_they_are_one():
    statistics = collect(t5(), seq2seq_batches(), "seq2seq", kinds="input_gram")
    aliases = statistics.aliases
    prefix = "encoder.block.0.layer.0.SelfAttention"
    assert aliases[f"{prefix}.k.weight/input_gram"] == f"{prefix}.q.weight/input_gram"
    assert aliases[f"{prefix}.v.weight/input_gram"] == f"{prefix}.q.weight/input_gram"
    # The encoder's output goes into every cross-attention of the decoder.
    owner = "decoder.block.0.layer.1.EncDecAttention.k.weight/input_gram"
    assert aliases["decoder.block.1.layer.1.EncDecAttention.v.weight/input_gram"] == owner
    assert "decoder.block.0.layer.1.EncDecAttention.q.weight/input_gram" not in aliases
    alone = collect(t5(), seq2seq_batches(), "seq2seq", kinds="input_gram", share_inputs=False)
    assert not alone.aliases and set(alone) == set(statistics)
    for key in alone:
        assert torch.equal(alone[key], statistics[key]), key
