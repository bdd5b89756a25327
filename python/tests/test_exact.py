"""Every statistic against brute force in float64, on models of a few hundred parameters."""

import pytest
import torch
from oracle import Classifier, brute_force, class_likelihood, close, compare, examples_of, text_batches
from torch import nn
from torch.nn import functional as F

from mats_stream import CollectError, collect

ALL = ["input_gram", "output_gram", "fisher_diagonal", "fisher_block"]
# f64 sums in another order, stored in f64.
EXACT = 1e-10


def classifier(seed=0):
    torch.manual_seed(seed)
    return Classifier().double()


def test_padded_batches():
    model, batches = classifier(), text_batches([4, 1, 3])
    statistics = collect(model, batches, "classification", kinds=ALL, dtype="float64")
    # up, gate, head: two Grams each; weights and vectors.
    assert compare(statistics, model, batches, class_likelihood, EXACT) == 6 + (3 + 5) + 5
    assert statistics.metadata["examples"] == "8"
    assert statistics.metadata["tokens"] == str(sum(int(b["attention_mask"].sum()) for b in batches))
    assert statistics.aliases == {"gate.weight/input_gram": "up.weight/input_gram"}
    assert statistics.notes == {"embedding.weight": "an embedding"}


def test_f32_is_close():
    model, batches = classifier().float(), text_batches([4, 1, 3])
    statistics = collect(model, batches, "classification", kinds=ALL)
    # f32 activations of values near one through a few layers.
    compare(statistics, model.double(), batches, class_likelihood, 1e-5)


def test_batches_do_not_matter():
    model = classifier()
    batches = text_batches([8])
    one = collect(model, batches, "classification", kinds=ALL, dtype="float64")
    split = [{key: value[i : i + 1] for key, value in batches[0].items()} for i in range(8)]
    many = collect(model, split, "classification", kinds=ALL, dtype="float64")
    for key in one:
        close(many[key], one[key], EXACT, key)


def test_model_is_left_as_it_was():
    model = classifier().train()
    model.up.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    collect(model, text_batches([3]), "classification", kinds=ALL)
    assert model.training and model.up.training
    for name, p in model.named_parameters():
        assert p.requires_grad == before[name][0] and p.grad is None and torch.equal(p, before[name][1])
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_sum_of_likelihoods_and_example_weights():
    model, batches = classifier(), text_batches([4, 2])
    by_example = collect(model, batches, "classification", kinds=["input_gram"], weighting="example", dtype="float64",
                         modules="up")
    expected = 0.0
    examples = list(examples_of(batches))
    for example in examples:
        _, _, grams, _ = brute_force(model, [example], class_likelihood)
        expected = expected + grams["up.weight", "input"] / len(examples)
    close(by_example.dense("up.weight", "input_gram"), expected, EXACT, "weighted by example")


def test_embeddings_where_asked_for():
    model, batches = classifier(), text_batches([4, 3])
    statistics = collect(model, batches, "classification", kinds="fisher_diagonal", embeddings=True, dtype="float64")
    assert "embedding.weight/fisher_diagonal" in statistics
    compare(statistics, model, batches, class_likelihood, EXACT)


def test_selection():
    model, batches = classifier(), text_batches([4])
    statistics = collect(model, batches, "classification", kinds=ALL, modules=["up", "head"], exclude="bias")
    assert {key.rsplit("/", 1)[0] for key in statistics} == {"up.weight", "head.weight"}
    with pytest.raises(CollectError, match="nothing to collect"):
        collect(model, batches, "classification", modules="nowhere")


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, (3, 2), stride=2, padding=1, dilation=(1, 2))
        self.norm = nn.GroupNorm(2, 4)
        self.batch_norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 2, groups=2, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.line = nn.Conv1d(6, 5, 3, padding="same", padding_mode="circular")
        self.volume = nn.Conv3d(1, 2, (2, 1, 2), padding=(0, 1, 0))
        self.head = nn.Linear(10, 3)
        self.batch_norm.running_mean += torch.randn(4)
        self.batch_norm.running_var += torch.rand(4)

    def forward(self, pixels):
        x = self.act(self.batch_norm(self.norm(self.first(pixels))))
        x = self.line(self.grouped(x).flatten(2))
        x = self.volume(x[:, None, :, :, None].expand(-1, -1, -1, -1, 3)).amax((3, 4))
        return self.head(F.pad(x.flatten(1), (0, 2)))


def image_likelihood(model, example):
    return class_likelihood(model, example)


def test_convolutions():
    torch.manual_seed(1)
    model = Convolutions().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    batches = [{"pixels": torch.randn(n, 3, 9, 8, dtype=torch.float64), "labels": torch.randint(0, 3, (n,))} for n in (3, 2)]
    statistics = collect(model, batches, "classification", kinds=ALL, dtype="float64")
    diagonals, blocks, _, _ = brute_force(model, list(examples_of(batches)), image_likelihood)
    for name, _ in model.named_parameters():
        close(statistics[f"{name}/fisher_diagonal"], diagonals[name], EXACT, name)
        if name in blocks:
            close(statistics.dense(name, "fisher_block"), blocks[name], EXACT, name)
    # Grams: a convolution is the product of its patches, cut out here with loops.
    pixels = torch.cat([batch["pixels"] for batch in batches])
    padded = F.pad(pixels, (1, 1, 1, 1))
    out = model.first(pixels)
    patches = []
    for image in padded:
        for i in range(out.shape[2]):
            for j in range(out.shape[3]):
                patches.append(image[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3 : 2].reshape(-1))
    x = torch.stack(patches)
    close(statistics.dense("first.weight", "input_gram"), (x.t() @ x / len(x)).numpy(), EXACT, "patches")
    product = (x @ model.first.weight.reshape(4, -1).t() + model.first.bias).detach()
    close(product.reshape(5, out.shape[2], out.shape[3], 4).permute(0, 3, 1, 2), out.detach(), EXACT, "patch order")
    assert statistics["volume.weight/input_gram"].shape == (4 * 5 // 2,)
    assert "grouped.weight/input_gram" not in statistics and "grouped.weight/Grams" in statistics.notes


class Attending(nn.Module):
    """Self-attention and cross-attention of torch, packed and with separate projections."""

    def __init__(self, batch_first, kdim=None):
        super().__init__()
        self.batch_first = batch_first
        self.first = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=batch_first)
        self.cross = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, add_bias_kv=kdim is not None,
                                           batch_first=batch_first)
        self.width = 8 if kdim is None else kdim
        self.head = nn.Linear(8, 3)

    def forward(self, x, memory, attention_mask):
        pad = attention_mask == 0
        if not self.batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        h = self.first(x, src_key_padding_mask=pad)
        h, _ = self.cross(h, memory, memory)
        if not self.batch_first:
            h = h.transpose(0, 1)
        mask = attention_mask[..., None].to(h.dtype)
        return self.head((h * mask).sum(1) / mask.sum(1))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kdim", [None, 5])
def test_multihead_attention(batch_first, kdim):
    torch.manual_seed(2)
    model = Attending(batch_first, kdim).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    batches = []
    for size in (3, 2):
        mask = (torch.arange(4)[None] < torch.tensor([[4], [2], [3]])[:size]).long()
        batches.append({"x": torch.randn(size, 4, 8, dtype=torch.float64),
                        "memory": torch.randn(size, 4, model.width, dtype=torch.float64),
                        "attention_mask": mask, "labels": torch.randint(0, 3, (size,))})
    # The memory has no padding: all of its tokens count, and of a packed projection those of both inputs do.
    def tokens(name, batch):
        return None if name.startswith("cross") else batch["attention_mask"]

    statistics = collect(model, batches, "classification", kinds=ALL, dtype="float64", tokens=tokens)
    examples = []
    for batch in batches:
        for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            one = {key: value[i : i + 1] for key, value in batch.items()}
            examples.append(one)
    diagonals, blocks, grams, _ = brute_force(model, examples, class_likelihood)
    assert "first.self_attn.in_proj_weight/input_gram" in statistics
    assert "first.linear1.weight/output_gram" in statistics
    for name, p in model.named_parameters():
        if f"{name}/fisher_diagonal" not in statistics:
            assert name in ("cross.bias_k", "cross.bias_v"), name
            continue
        close(statistics[f"{name}/fisher_diagonal"], diagonals[name], EXACT, name)
        if name in blocks:
            close(statistics.dense(name, "fisher_block"), blocks[name], EXACT, name)
        if name.startswith("cross") and (name, "input") in grams:
            for side in ("input", "output"):
                close(statistics.dense(name, f"{side}_gram"), grams[name, side], EXACT, name)


def test_attention_without_padding_matches_brute_force_grams():
    torch.manual_seed(3)
    model = Attending(False).double()
    batches = [{"x": torch.randn(3, 4, 8, dtype=torch.float64), "memory": torch.randn(3, 4, 8, dtype=torch.float64),
                "attention_mask": torch.ones(3, 4, dtype=torch.long), "labels": torch.tensor([0, 1, 2])}]
    statistics = collect(model, batches, "classification", kinds=ALL, dtype="float64", tokens="all")
    assert compare(statistics, model, batches, class_likelihood, EXACT) > 20


class Recurrent(nn.Module):
    """One layer used three times, and a head tied to another layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layer = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6, bias=True)
        self.tied.weight = self.layer.weight
        self.head = nn.Linear(6, 7)

    def forward(self, input_ids, attention_mask):
        h = self.embedding(input_ids)
        for _ in range(3):
            h = torch.tanh(self.layer(h))
        h = self.tied(h)
        mask = attention_mask[..., None].to(h.dtype)
        return self.head((h * mask).sum(1) / mask.sum(1))


def test_tied_weights_are_one_parameter():
    torch.manual_seed(4)
    model, batches = Recurrent().double(), text_batches([4, 3])
    statistics = collect(model, batches, "classification", kinds=ALL, dtype="float64")
    assert not any(key.startswith("tied.weight") for key in statistics)
    assert compare(statistics, model, batches, class_likelihood, EXACT) == 2 * 2 + 2 + 3 * 2


class WithToken(nn.Module):
    """A learned vector in front of the patches: no batched form."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return torch.tanh(self.layer(x)).sum(1)


def test_parameters_without_a_batched_form():
    torch.manual_seed(5)
    model = WithToken().double()
    batches = [{"x": torch.randn(n, 2, 4, dtype=torch.float64), "labels": torch.randint(0, 3, (n,))} for n in (3, 2)]
    without = collect(model, batches, "classification", kinds=ALL, dtype="float64")
    assert "token/fisher_diagonal" not in without and "batched form" in without.notes["token"]
    statistics = collect(model, batches, "classification", kinds=ALL, dtype="float64", single_examples=True)
    assert "token/fisher_block" in statistics
    compare(statistics, model, batches, class_likelihood, EXACT)


def test_in_place_after_a_layer():
    """The gradient is that of the layer's own output, whatever is done to it in place afterwards."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 5)
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            y = self.layer(x)
            y += 1.0
            y *= 2.0
            return self.head(y)

    torch.manual_seed(6)
    model = InPlace().double()
    batches = [{"x": torch.randn(4, 4, dtype=torch.float64), "labels": torch.randint(0, 3, (4,))}]
    statistics = collect(model, batches, "classification", kinds=ALL, dtype="float64")
    diagonals, _, _, _ = brute_force(model, list(examples_of(batches)), class_likelihood)
    for name, expected in diagonals.items():
        close(statistics[f"{name}/fisher_diagonal"], expected, EXACT, name)
