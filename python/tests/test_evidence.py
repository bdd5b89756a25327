"""What the collector finds out of a model before and while it runs: how inputs are split by examples, which modules are
called, and when; and what it says where a statistic cannot be had."""

import pytest
import torch
from oracle import brute_force, class_likelihood, close, compare
from torch import nn
from torch.utils.checkpoint import checkpoint

from mats_stream import CollectError, collect, log_likelihood
from mats_stream.tokens import stream_of

ALL = ["input_gram", "output_gram", "fisher_diagonal", "fisher_block"]
EXACT = 1e-10


def batches_of(sizes, *shape, classes=4, seed=0, lengths=False):
    """Batches of `x`; with `lengths` padded along the first dimension of `shape`, the first example the longest."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        batch = {"x": torch.randn(size, *shape, generator=generator, dtype=torch.float64)}
        if lengths:
            found = torch.randint(1, shape[0] + 1, (size,), generator=generator)
            found[0] = shape[0]
            batch["attention_mask"] = (torch.arange(shape[0])[None] < found[:, None]).long()
        batch["labels"] = torch.randint(0, classes, (size,), generator=generator)
        batches.append(batch)
    return batches


def singles(batches, unpadded=False):
    for batch in batches:
        for i in range(len(batch["x"])):
            one = {key: value[i : i + 1] for key, value in batch.items()}
            if unpadded and "attention_mask" in one:
                length = int(one["attention_mask"].sum())
                one["x"], one["attention_mask"] = one["x"][:, :length], one["attention_mask"][:, :length]
            yield one


def checked(model, batches, kinds=ALL, **options):
    model = model.double()
    statistics = collect(model, batches, "classification", kinds=kinds, dtype="float64", **options)
    compared = compare(statistics, model, batches, class_likelihood, EXACT, examples=list(singles(batches, True)))
    return statistics, compared


class BesideAttention(nn.Module):
    """Torch's attention takes the batch second; its neighbours see it first, second, and mixed into the rows."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(5, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.inside = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.turned = nn.Linear(8, 8)
        self.rows = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x, attention_mask):
        h = torch.tanh(self.before(x)).transpose(0, 1)
        h = h + self.attention(h, h, h, key_padding_mask=attention_mask == 0)[0]
        h = self.norm(torch.tanh(self.inside(h)))
        h = torch.tanh(self.turned(h.reshape(-1, 8))).reshape(h.shape).transpose(0, 1)
        h = torch.tanh(self.rows(h.reshape(-1, 8))).reshape(h.shape)
        mask = attention_mask[..., None].to(h.dtype)
        return self.head((h * mask).sum(1) / mask.sum(1))


@pytest.mark.parametrize("sizes, length", [((3, 2), 4), ((4, 4), 4), ((1, 5), 4), ((1, 1), 4)])
def test_layouts_are_found_for_each_module(sizes, length):
    torch.manual_seed(0)
    _, compared = checked(BesideAttention(), batches_of(sizes, length, 5, lengths=True), exclude="k_proj")
    assert compared == 2 * 7 + 7 + 2 * 7 + 2 * 2  # Grams and Fishers of 7 matrices, two Fishers of biases and norms


def test_batches_of_one_may_come_first_from_a_function():
    torch.manual_seed(0)
    model, batches = BesideAttention().double(), batches_of((1, 5), 4, 5, lengths=True)
    statistics = collect(model, lambda: iter(batches), "classification", kinds=ALL, dtype="float64")
    compare(statistics, model, batches, class_likelihood, EXACT, examples=list(singles(batches, True)))


@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_of_torch(batch_first):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=batch_first)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            a, b = x, x.flip(1)[:, :3]
            if not batch_first:
                a, b = a.transpose(0, 1), b.transpose(0, 1)
            h = self.inner(a, b)
            return self.head((h if batch_first else h.transpose(0, 1))[:, -1])

    torch.manual_seed(0)
    statistics, compared = checked(Whole(), batches_of((3, 4), 4, 8))
    assert "inner.encoder.norm.weight/fisher_diagonal" in statistics and compared > 40 and not statistics.notes


def test_windows_are_equal_parts_of_an_example():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

        def forward(self, x):
            windows = torch.tanh(self.layer(x.reshape(-1, 2, 5)))
            return self.head(windows.reshape(len(x), -1, 6).mean(1))

    assert checked(Windows(), batches_of((3, 4), 4, 5))[1] == 4 + 2 + 4


class Positions(nn.Module):
    """A layer on relative positions, which are no example's."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 5))
        self.positions, self.head = nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(torch.tanh(x + self.positions(self.table).mean(0)))


def test_what_has_no_examples_is_left_out():
    model, batches = Positions().double(), batches_of((3, 2), 5)
    statistics, _ = checked(model, batches)
    assert {key.rsplit("/", 1)[0] for key in statistics} == {"head.weight", "head.bias"}
    assert "not split by the batch's 3 examples" in statistics.notes["positions.weight"]
    with pytest.raises(CollectError, match="`positions`.*not split"):
        collect(model, batches, "classification", kinds=ALL, modules="positions")
    # One example at a time everything can be told apart.
    statistics, _ = checked(model, batches, kinds=["fisher_diagonal"], single_examples=True)
    assert "positions.weight/fisher_diagonal" in statistics
    assert checked(model, list(singles(batches)))[1] == 4 + 2 + 4


class Experts(nn.Module):
    def __init__(self, experts=3):
        super().__init__()
        self.gate = nn.Linear(5, experts)
        self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(experts))
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        flat = x.reshape(-1, 5)
        weights = self.gate(flat).softmax(-1)
        top, out = weights.argmax(-1), torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = (top == i).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, torch.tanh(expert(flat[rows])) * weights[rows, i : i + 1])
        return self.head((flat + out).reshape(x.shape).mean(1))


def test_experts():
    torch.manual_seed(3)
    model, batches = Experts(), batches_of((5, 4, 3), 4, 5)
    statistics, _ = checked(model, batches)
    assert any("experts" in key and "input_gram" in key for key in statistics)
    assert not any("experts" in key and "fisher" in key for key in statistics)
    # All of the first three examples may go to one expert; the whole first batch does not.
    flat = batches_of((9, 7), 1, 5, seed=1)
    flat[0]["x"][1:3] = flat[0]["x"][:1]
    statistics, _ = checked(model, flat)
    assert not any("experts" in key and "fisher" in key for key in statistics)
    one_by_one, _ = checked(model, list(singles(batches)))
    assert sum("experts" in key and "fisher_diagonal" in key for key in one_by_one) == 6


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.branch, self.norm, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 4)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if bool((x[:, 0] > 0).any()):
            h = torch.tanh(self.norm(self.branch(h)))
        return self.head(h)


def branch_batches(signs):
    batches = batches_of((1,) * len(signs), 5)
    for batch, sign in zip(batches, signs):
        batch["x"][:, 0] = sign * batch["x"][:, 0].abs()
    return batches


@pytest.mark.parametrize("signs", [(1, -1, 1, -1, -1), (-1, -1, -1, 1, -1)])
@pytest.mark.parametrize("per_pass", [None, 1])
def test_modules_that_some_batches_do_not_call(signs, per_pass):
    """Fishers are over all examples; what the first batches do not call is found in a later one."""
    torch.manual_seed(0)
    model, batches = Branch(), branch_batches(signs)
    statistics, compared = checked(model, batches, modules_per_pass=per_pass)
    assert compared == 2 * 3 + 3 + 2 * 5 and not statistics.notes
    if signs[0] < 0:
        with pytest.raises(CollectError, match="`branch` is not called in the batches looked at first"):
            collect(model, iter(batches), "classification", kinds=ALL)


def test_modules_that_no_batch_calls():
    statistics, _ = checked(Branch(), branch_batches((-1, -1)))
    assert statistics.notes["branch.weight"] == "module `branch` is not called"


def test_a_pass_ends_when_its_modules_are_done_in_this_batch():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 4)

        def forward(self, x):
            h = torch.tanh(self.layer(x))
            if bool((x[:, 0] > 0).any()):
                h = torch.tanh(self.layer(h))
            return self.head(h)

    assert checked(Again(), branch_batches((-1, 1, -1, 1)), kinds=["input_gram"], modules_per_pass=1)[1] == 2


def test_input_that_is_no_longer_shared():
    class Parting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 4)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            if not bool((x[:, 0] > 0).any()):
                h = h + self.b(x)
            return self.head(h)

    model, batches = Parting().double(), branch_batches((-1, 1))
    with pytest.raises(CollectError, match="share_inputs=False"):
        collect(model, batches, "classification", kinds=["input_gram"])
    checked(model, batches, kinds=["input_gram"], share_inputs=False)


class Gated(nn.Module):
    def __init__(self, keyword):
        super().__init__()
        self.keyword = keyword
        self.layer, self.norm, self.head = nn.Linear(5, 5), GatedNorm(), nn.Linear(5, 4)

    def forward(self, x):
        y = self.layer(input=x)
        return self.head(self.norm(y, gate=x) if self.keyword else self.norm(hidden=y))


class GatedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(5))

    def forward(self, hidden, gate=None):
        hidden = hidden if gate is None else hidden * torch.sigmoid(gate)
        return self.weight * hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.skipif(int(torch.__version__.split(".")[0]) < 2, reason="hooks of torch 1.13 do not see keywords")
def test_inputs_by_keyword():
    torch.manual_seed(0)
    statistics, compared = checked(Gated(False), batches_of((3, 2), 5))
    assert compared == 4 + 2 + 4 + 2 and not statistics.notes
    # A gate is a second input, which the slope of the norm depends on.
    statistics, compared = checked(Gated(True), batches_of((3, 2), 5))
    assert compared == 4 + 2 + 4 and "batched form" in statistics.notes["norm.weight"]
    assert checked(Gated(True), batches_of((3, 2), 5), single_examples=True)[1] == 4 + 2 + 4 + 2


def test_a_layer_that_returns_more():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.head = Pair(5, 5), nn.Linear(5, 4)

        def forward(self, x):
            return self.head(torch.tanh(self.pair(x)[0]))

    assert checked(Net(), batches_of((3, 2), 5))[1] == 4 + 2 + 4


class Recomputed(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.before, self.inside, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x):
        h = torch.tanh(self.before(x))
        if self.how == "checkpoint":
            return self.head(checkpoint(lambda y: torch.tanh(self.inside(y)), h, use_reentrant=True))
        with torch.no_grad():
            h = torch.tanh(self.inside(h))
        return self.head(h)


@pytest.mark.parametrize("how", ["checkpoint", "no_grad"])
@pytest.mark.filterwarnings("ignore")
def test_no_zeros_where_gradients_are_off(how):
    model, batches = Recomputed(how).double(), batches_of((3, 2), 5)
    statistics = collect(model, batches, "classification", kinds=ALL, dtype="float64")
    assert not any(key.startswith("inside") and "input" not in key for key in statistics)
    assert "gradients off" in statistics.notes["inside.weight/fisher_diagonal"]
    assert "inside.weight/input_gram" in statistics and "head.weight/fisher_diagonal" in statistics
    with pytest.raises(CollectError, match="gradients off"):
        collect(model, batches, "classification", kinds=["fisher_diagonal"], modules="inside")


def test_checkpointing_that_hooks_cannot_follow_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.head = nn.Linear(5, 5), nn.Linear(5, 4)

        def forward(self, x):
            return self.head(checkpoint(lambda y: torch.tanh(self.inside(y)), x, use_reentrant=False))

    with pytest.raises(CollectError, match="turn gradient checkpointing off"):
        collect(Net().double(), batches_of((3, 2), 5), "classification", kinds=ALL)


def test_nothing_to_learn_from_is_an_error():
    model, batches = nn.Sequential(nn.Linear(5, 4)).double(), batches_of((3, 2), 5)
    for batch in batches:
        batch["input"] = batch.pop("x")
    ignored = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches]
    with pytest.raises(CollectError, match="labels that are not all ignored"):
        collect(model, ignored, "classification", kinds=ALL)
    with pytest.raises(CollectError, match="have no examples"):
        collect(model, [{key: value[:0] for key, value in batches[0].items()}], "classification")
    with pytest.raises(CollectError, match="none counts in any batch"):
        collect(model, batches, "classification", kinds="input_gram",
                tokens=lambda _name, batch: torch.zeros(len(batch["labels"]), 1))
    empty_first = [{key: value[:0] for key, value in batches[0].items()}, *batches]
    assert collect(model, iter(empty_first), "classification").metadata["examples"] == "5"


def test_gradients_are_had_inside_no_grad():
    model, batches = nn.Sequential(nn.Linear(5, 4)), [{"input": torch.randn(3, 5), "labels": torch.tensor([0, 1, 2])}]
    expected = collect(model, batches, "classification", kinds=ALL)
    with torch.no_grad():
        inside = collect(model, batches, "classification", kinds=ALL)
    assert all(torch.equal(inside[key], expected[key]) for key in expected)
    with torch.inference_mode(), pytest.raises(CollectError, match="inference_mode"):
        collect(model, batches, "classification", kinds=ALL)


def test_mean_weighted_by_example():
    torch.manual_seed(0)
    model, batches = BesideAttention().double(), batches_of((3, 2), 4, 5, lengths=True)
    statistics = collect(model, batches, "classification", kinds=["input_mean", "input_gram"], weighting="example",
                         dtype="float64", modules="before")
    examples = [one["x"][0] for one in singles(batches, True)]
    close(statistics["before.weight/input_mean"], torch.stack([x.mean(0) for x in examples]).mean(0), EXACT, "mean")
    gram = torch.stack([x.t() @ x / len(x) for x in examples]).mean(0)
    close(statistics.dense("before.weight", "input_gram"), gram, EXACT, "Gram")


def test_float16_that_loses_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    batches = [{"input": torch.randn(40, 6), "labels": torch.randint(0, 4, (40,))}]
    kept = collect(model, batches, "classification", kinds="input_gram", dtype="float16")
    assert kept["0.weight/input_gram"].dtype is torch.float16
    # Means over tokens of small gradients: most are below the smallest number of f16.
    with torch.no_grad():
        model[2].weight.mul_(1e-2)
    with pytest.raises(CollectError, match="`0.weight/output_gram`: 5 of the 5 elements of its diagonal.*bfloat16"):
        collect(model, batches, "classification", kinds="output_gram", dtype="float16")
    with pytest.raises(CollectError, match="float16 would lose"):
        collect(model, [{"input": 1e-7 * torch.randn(40, 6), "labels": batches[0]["labels"]}], "classification",
                kinds="input_mean", dtype="float16")
    with pytest.raises(CollectError, match="float16 does not hold"):
        collect(model, [{"input": 1e3 * torch.randn(40, 6), "labels": batches[0]["labels"]}], "classification",
                kinds="input_gram", dtype="float16")


@pytest.mark.parametrize("name, stream", [
    ("encoder.block.0.layer.0.SelfAttention.q", "encoder"),
    ("decoder.block.0.layer.1.EncDecAttention.k", "encoder"),
    ("base_model.model.decoder.block.0.layer.1.EncDecAttention.k.lora_A", "encoder"),
    ("base_model.model.decoder.block.0.layer.1.EncDecAttention.q.lora_A", "decoder"),
    ("decoder.bert.encoder.layer.0.attention.self.key", "decoder"),
    ("decoder.bert.encoder.layer.0.crossattention.self.key", "encoder"),
    ("decoder.bert.encoder.layer.0.crossattention.self.query", "decoder"),
    ("decoder.bert.encoder.layer.0.crossattention.output.dense", "decoder"),
    ("decoder.transformer.h.0.crossattention.c_attn", "encoder"),
    ("decoder.transformer.h.0.crossattention.q_attn", "decoder"),
    ("decoder.transformer.h.0.attn.c_attn", "decoder"),
    ("model.decoder.layers.0.encoder_attn.v_proj", "encoder"),
    ("model.decoder.layers.0.encoder_attn.out_proj", "decoder"),
    ("enc_to_dec_proj", "encoder"),
    ("lm_head", "decoder"),
])
def test_streams(name, stream):
    assert stream_of(name, True) == stream


def test_labels_and_inputs_that_are_not_there():
    model, batch = nn.Linear(5, 4), {"input": torch.randn(3, 5), "labels": torch.tensor([0, 1, 4])}
    with pytest.raises(CollectError, match="4 is no class of 4"):
        collect(model, [batch], "classification")
    for task in ("classification", "seq2seq"):
        with pytest.raises(CollectError, match="no `labels`"):
            collect(model, [{"input": batch["input"]}], task)
    with pytest.raises(CollectError, match="neither `labels` nor `input_ids`"):
        collect(model, [{"input": batch["input"]}], "causal-lm")


class Stop(Exception):
    pass


@pytest.mark.parametrize("change", ["other", "fewer", "order"])
def test_resume_wants_the_same_batches(change, tmp_path):
    torch.manual_seed(0)
    model, reads = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4)), []
    batches = [{"input": torch.randn(n, 5), "labels": torch.randint(0, 4, (n,))} for n in (3, 2, 2)]

    def interrupted():
        reads.append(None)
        if len(reads) == 3:
            raise Stop
        return iter(batches)

    options = dict(kinds=ALL, modules_per_pass=1, out=tmp_path / "s")
    with pytest.raises(Stop):
        collect(model, interrupted, "classification", **options)
    other = [{**batches[2], "input": batches[2]["input"] + 1}]
    changed = {"other": batches[:2] + other, "fewer": batches[:2], "order": [batches[0], batches[2], batches[1]]}[change]
    with pytest.raises(CollectError, match="not those of the interrupted run"):
        collect(model, changed, "classification", **options, resume=True)
    resumed = collect(model, batches, "classification", **options, resume=True)
    whole = collect(model, batches, "classification", kinds=ALL)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole) and resumed.metadata == whole.metadata
    # Again: nothing is left to do, and what a run leaves that is killed at its very end goes.
    (tmp_path / ".s.journal").write_text("left")
    again = collect(model, batches, "classification", **options, resume=True)
    assert set(again) == set(whole) and [path.name for path in tmp_path.iterdir()] == ["s"]
    with pytest.raises(CollectError, match="already there, of another run"):
        collect(model, batches, "classification", **{**options, "seed": 1}, resume=True)


def test_passes_want_the_same_batches():
    model, batches = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 4)), []
    generator = torch.Generator().manual_seed(0)

    def fresh():
        return iter([{"input": torch.randn(2, 5, generator=generator), "labels": torch.tensor([0, 1])} for _ in range(2)])

    batches = list(fresh())
    with pytest.raises(CollectError, match="batch 1 is not the one"):
        collect(model, fresh, "classification", kinds=ALL, modules_per_pass=1)
    sizes = iter([2, 2, 1])
    with pytest.raises(CollectError, match="2 in an earlier pass and 1 in this one"):
        collect(model, lambda: iter(batches[: next(sizes)]), "classification", kinds=ALL, modules_per_pass=1)


def test_a_failed_first_pass_leaves_nothing(tmp_path):
    model = nn.Sequential(nn.Linear(5, 4))
    batches = [{"input": 1e-6 * torch.randn(3, 5), "labels": torch.tensor([0, 1, 2])}]
    with pytest.raises(CollectError, match="bfloat16"):
        collect(model, batches, "classification", kinds="input_gram", dtype="float16", out=tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_two_losses_of_one_value_do_not_look_ignored():
    """A loss may be 0 and have a gradient."""
    model, batches = nn.Linear(5, 4).double(), batches_of((3,), 5)

    def loss(model, batch):
        likelihood = log_likelihood(model(batch["x"]), batch["labels"], "mean")
        return likelihood - likelihood.detach()

    diagonals, _, _, _ = brute_force(model, list(singles(batches)), lambda m, e: loss(m, e).sum())
    statistics = collect(model, batches, loss, kinds=["fisher_diagonal"], dtype="float64")
    close(statistics["weight/fisher_diagonal"], diagonals["weight"], EXACT, "weight")


def test_a_model_that_mixes_examples_is_refused():
    torch.manual_seed(0)
    model, batch = Branch().double(), batches_of((6,), 5)[0]
    batch["x"][:2, 0], batch["x"][2:, 0] = -1.0, 1.0
    with pytest.raises(CollectError, match="example 0 has log-likelihood.*mixes the examples"):
        collect(model, [batch], "classification", kinds=ALL)
    assert checked(model, list(singles([batch])))[1] == 2 * 3 + 3 + 2 * 5
