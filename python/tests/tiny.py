"""Tiny random models of transformers, one a family, and batches for them."""

import pytest
import torch

transformers = pytest.importorskip("transformers")


def randomised(model, seed=0):
    """Every parameter off its initial value, so that norms and biases matter; without dropout, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model.eval()


def t5(seed=0, **more):
    torch.manual_seed(seed)
    config = dict(vocab_size=40, d_model=12, d_kv=5, d_ff=14, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=1,
                  decoder_start_token_id=0, tie_word_embeddings=False, feed_forward_proj="gated-gelu")
    config.update(more)
    return randomised(transformers.T5ForConditionalGeneration(transformers.T5Config(**config)), seed)


def llama(seed=0, **more):
    torch.manual_seed(seed)
    config = dict(vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, attention_bias=True)
    config.update(more)
    return randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)), seed)


def gpt2(seed=0):
    torch.manual_seed(seed)
    return randomised(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=40, n_positions=32, n_embd=12, n_layer=2, n_head=2)), seed)


def bert(seed=0):
    torch.manual_seed(seed)
    return randomised(transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=40, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=32, num_labels=3)), seed)


def bart(seed=0):
    torch.manual_seed(seed)
    return randomised(transformers.BartForConditionalGeneration(transformers.BartConfig(
        vocab_size=40, d_model=12, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=14, max_position_embeddings=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)), seed)


def clip_vision(seed=0):
    torch.manual_seed(seed)
    return randomised(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
        hidden_size=12, intermediate_size=20, projection_dim=10, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8)), seed)


def _ids(size, length, generator):
    lengths = torch.randint(2, length + 1, (size,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    return torch.randint(3, 40, (size, length), generator=generator) * mask, mask


def lm_batches(sizes=(4, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        ids, mask = _ids(size, 7, generator)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def seq2seq_batches(sizes=(4, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        ids, mask = _ids(size, 7, generator)
        labels, label_mask = _ids(size, 4, generator)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(label_mask == 0, -100)})
    return batches


def class_batches(sizes=(4, 3), seed=0):
    batches = lm_batches(sizes, seed)
    for i, batch in enumerate(batches):
        batch["labels"] = torch.randint(0, 3, (len(batch["input_ids"]),), generator=torch.Generator().manual_seed(i))
    return batches


def image_batches(sizes=(4, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(size, 3, 16, 16, generator=generator),
             "labels": torch.randint(0, 10, (size,), generator=generator)} for size in sizes]


def image_log_likelihood(model, batch, sampler=None):
    """Of the label's class vector: the projected image features are logits."""
    from mats_stream import log_likelihood

    logits = model(pixel_values=batch["pixel_values"]).image_embeds
    labels = batch["labels"] if sampler is None else sampler.labels(logits, batch["labels"])
    return log_likelihood(logits, labels, "mean")
