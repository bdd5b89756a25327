"""How a run goes: passes, memory, files, resuming, the true Fisher, sketches, dtypes, bad input."""

import json

import numpy as np
import pytest
import torch
from oracle import Classifier, close, text_batches
from torch import nn

from mats_stream import CollectError, Sampler, Statistics, collect, log_likelihood
from mats_stream.memory import parse_size

ALL = ["input_gram", "output_gram", "input_mean", "fisher_diagonal", "fisher_block"]


def classifier(seed=0, **more):
    torch.manual_seed(seed)
    return Classifier(**more)


def same(a, b):
    assert set(a) == set(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("per_pass", [1, 2, 100])
def test_passes_do_not_change_a_bit(per_pass):
    model, batches = classifier(), text_batches([4, 1, 3])
    whole = collect(model, batches, "classification", kinds=ALL)
    parts = collect(model, batches, "classification", kinds=ALL, modules_per_pass=per_pass)
    same(whole, parts)
    assert whole.metadata == parts.metadata


def test_forward_passes_end_early():
    """Passes over inputs alone stop at their last module and need no gradient."""
    model, batches = classifier(), text_batches([4])
    calls = []
    handle = model.head.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    collect(model, batches, "classification", kinds=["input_gram"], modules_per_pass=1)
    handle.remove()
    # Four looks at the first batch; the first pass, which is run to its end; the pass of the head. The hook of this test
    # was there first.
    assert calls == [True] * 4 + [False] * 2


def test_iterators_are_read_once():
    model, batches = classifier(), text_batches([4, 2])
    same(collect(model, iter(batches), "classification", kinds=ALL), collect(model, batches, "classification", kinds=ALL))
    same(collect(model, lambda: iter(batches), "classification", kinds=ALL, modules_per_pass=1),
         collect(model, batches, "classification", kinds=ALL))
    with pytest.raises(CollectError, match="read once"):
        collect(model, iter(batches), "classification", kinds=ALL, modules_per_pass=1)
    with pytest.raises(CollectError, match="there are none"):
        collect(model, [], "classification")


def test_examples_cut_a_batch():
    model, batches = classifier(), text_batches([4, 4])
    cut = collect(model, batches, "classification", kinds=ALL, examples=6)
    short = [batches[0], {key: value[:2] for key, value in batches[1].items()}]
    same(cut, collect(model, short, "classification", kinds=ALL))
    assert cut.metadata["examples"] == "6"


def test_true_fisher_is_seeded_and_does_not_depend_on_batches():
    model = classifier().double()
    batches = text_batches([6])
    whole = collect(model, batches, "classification", kinds=ALL, fisher="true", seed=7, dtype="float64")
    singles = [{**{key: value[i : i + 1] for key, value in batches[0].items()}, "example_ids": [i]} for i in (3, 1, 0, 5, 4, 2)]
    shuffled = collect(model, singles, "classification", kinds=ALL, fisher="true", seed=7, dtype="float64")
    for key in whole:
        close(shuffled[key], whole[key], 1e-10, key)
    assert whole.metadata["fisher"] == "true" and whole.metadata["seed"] == "7"
    other = collect(model, batches, "classification", kinds=ALL, fisher="true", seed=8, dtype="float64")
    assert not torch.equal(other["head.bias/fisher_block"], whole["head.bias/fisher_block"])
    same(whole, collect(model, batches, "classification", kinds=ALL, fisher="true", seed=7, dtype="float64"))


def test_true_fisher_is_the_expected_one():
    """Over many draws the block of the last bias is the mean of diag(p) - p pᵀ."""
    model, batches = classifier(classes=3).double(), text_batches([40], classes=3)
    total, draws = 0.0, 40
    for seed in range(draws):
        total = total + collect(model, batches, "classification", kinds="fisher_block", modules="head.bias", fisher="true",
                                seed=seed, dtype="float64").dense("head.bias", "fisher_block") / draws
    p = model(batches[0]["input_ids"], batches[0]["attention_mask"]).softmax(-1).detach()
    expected = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    # Entries are means of 40 · 40 draws of values within ±1: six standard errors.
    assert float((total - expected).abs().max()) < 6 / np.sqrt(40 * draws)


def test_a_loss_of_ones_own():
    model, batches = classifier(), text_batches([4])

    def loss(model, batch):
        return log_likelihood(model(batch["input_ids"], batch["attention_mask"]), batch["labels"], "mean")

    same(collect(model, batches, loss, kinds=ALL), collect(model, batches, "classification", kinds=ALL))
    with pytest.raises(CollectError, match="sampler"):
        collect(model, batches, loss, kinds=ALL, fisher="true")
    with pytest.raises(CollectError, match="one log-likelihood for each of"):
        collect(model, batches, lambda model, batch: loss(model, batch).sum(), kinds=ALL)

    def sampled(model, batch, sampler: Sampler):
        logits = model(batch["input_ids"], batch["attention_mask"])
        labels = batch["labels"] if sampler is None else sampler.labels(logits, batch["labels"])
        return log_likelihood(logits, labels, "mean")

    same(collect(model, batches, sampled, kinds=ALL, fisher="true"),
         collect(model, batches, "classification", kinds=ALL, fisher="true"))


def test_file_and_memory_are_the_same(tmp_path):
    model, batches = classifier(), text_batches([4, 3])
    held = collect(model, batches, "classification", kinds=ALL, metadata={"model": "m", "data": "d"})
    written = collect(model, batches, "classification", kinds=ALL, metadata={"model": "m", "data": "d"},
                      out=tmp_path / "a.safetensors")
    same(held, written)
    assert held.metadata == written.metadata == Statistics.load(tmp_path / "a.safetensors").metadata
    held.save(tmp_path / "b.safetensors")
    same(held, Statistics.load(tmp_path / "b.safetensors"))
    with pytest.raises(CollectError, match="already there"):
        held.save(tmp_path / "b.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


class Stop(Exception):
    pass


def test_resume(tmp_path):
    model, batches = classifier(), text_batches([4, 3])
    path = tmp_path / "s.safetensors"
    reads = []

    def interrupted():
        reads.append(None)
        if len(reads) == 4:  # the first batch is taken once to look at; then the third pass
            raise Stop
        return iter(batches)

    options = dict(kinds=ALL, modules_per_pass=1, out=path)
    with pytest.raises(Stop):
        collect(model, interrupted, "classification", **options)
    assert not path.exists()
    with pytest.raises(CollectError, match="resume"):
        collect(model, batches, "classification", **options)
    with pytest.raises(CollectError, match="another run"):
        collect(model, batches, "classification", **{**options, "seed": 1}, resume=True)
    journal = (tmp_path / ".s.safetensors.journal").read_text()
    assert len(journal.splitlines()) == 3 and json.loads(journal.splitlines()[1])["keys"]
    (tmp_path / ".s.safetensors.journal").write_text(journal + '{"keys": ["cut of')  # a torn last line
    reads.clear()

    def counted():
        reads.append(None)
        return iter(batches)

    resumed = collect(model, counted, "classification", **options, resume=True)
    whole = collect(model, batches, "classification", kinds=ALL)
    same(resumed, whole)
    assert resumed.metadata == whole.metadata
    sites = 6  # embedding apart: norm, up, gate, scale, head; gate has sums of its own
    assert len(reads) < 1 + sites
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.safetensors"]


def test_memory_bound_splits_passes():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(700, 700), nn.Tanh()) for _ in range(6)], nn.Linear(700, 3))
    batches = [{"input": torch.randn(8, 700), "labels": torch.randint(0, 3, (8,))}]
    options = dict(kinds=["input_gram", "output_gram"])
    whole = collect(model, batches, "classification", **options)
    from mats_stream import memory

    held = memory.held()
    if held is None:
        pytest.skip("memory is measured on Linux only")
    passes = []

    class Counting:
        def __iter__(self):
            passes.append(None)
            return iter(batches)

    # One layer's two Grams are 3.9 MB, all are 25 MB; 16 MiB are kept back.
    parts = collect(model, Counting(), "classification", **options, max_memory=memory.held() + (26 << 20))
    same(parts, whole)
    assert len(passes) > 2
    with pytest.raises(CollectError, match="max_memory"):
        collect(model, batches, "classification", **options, max_memory="1MiB")


@pytest.mark.parametrize("dtype, unit", [("bfloat16", 2.0**-8), ("float16", 2.0**-11), ("float32", 2.0**-24)])
def test_dtypes_round_once(dtype, unit, tmp_path):
    model, batches = classifier(), text_batches([4])
    exact = collect(model, batches, "classification", kinds=["input_gram"], dtype="float64")
    rounded = collect(model, batches, "classification", kinds=["input_gram"], dtype=dtype, out=tmp_path / "s.safetensors")
    for key in exact:
        assert rounded[key].dtype == getattr(torch, dtype)
        error = (rounded[key].double() - exact[key]).abs()
        # Half a unit of the value, or of the smallest normal number of F16.
        assert bool((error <= unit * exact[key].abs() + 2.0**-24 * (dtype == "float16")).all()), key


def test_full_and_packed():
    model, batches = classifier(), text_batches([4, 2])
    packed = collect(model, batches, "classification", kinds=["input_gram", "fisher_block"])
    full = collect(model, batches, "classification", kinds=["input_gram", "fisher_block"], packed=False)
    for key in full:
        name, kind = key.rsplit("/", 1)
        assert full[key].dim() == 2 and packed[key].dim() == 1
        assert torch.equal(full[key], full[key].t()) and torch.equal(full[key], packed.dense(name, kind))


@pytest.mark.parametrize("rank", [1, 3, 8, 40])
def test_sketch_is_within_its_bound(rank):
    """0 ≼ Gram - FᵀF ≼ ε, with the ε that the file states, and ε ≤ trace / rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 4)).double()
    scale = torch.logspace(0, -3, 20, dtype=torch.float64)
    batches = [{"input": torch.randn(50, 20, dtype=torch.float64) * scale, "labels": torch.randint(0, 4, (50,))}
               for _ in range(4)]
    grams = collect(model, batches, "classification", kinds=["input_gram", "output_gram"], dtype="float64")
    factors = collect(model, batches, "classification", kinds=["input_factor", "output_factor"], rank=rank,
                      dtype="float64")
    for key in factors:
        name, kind = key.rsplit("/", 1)
        gram = grams.dense(name, kind.replace("factor", "gram"))
        assert factors[key].shape == (min(rank, len(gram)), len(gram))
        bound = float(factors.metadata[f"error:{key}"])
        eigenvalues = torch.linalg.eigvalsh(gram - factors.dense(name, kind))
        rounding = 1e-12 * float(gram.trace())
        assert float(eigenvalues[0]) >= -rounding, key
        assert float(eigenvalues[-1]) <= bound * (1 + 1e-5) + rounding, key
        assert bound <= float(gram.trace()) / min(rank, len(gram)) * (1 + 1e-5), key
        if rank >= len(gram):
            assert bound <= rounding


def test_bad_input_is_named():
    model, batches = classifier(), text_batches([4])

    def refused(match, **options):
        with pytest.raises(CollectError, match=match):
            collect(model, batches, **{"loss": "classification", **options})

    refused("unknown kind `gram`", kinds="gram")
    refused("same matrix", kinds=["input_gram", "input_factor"], rank=3)
    refused("need a `rank`", kinds=["input_factor"])
    refused("unknown task", loss="regression")
    refused("fisher: unknown", fisher="exact")
    refused("dtype: unknown", dtype="int8")
    refused("no regular expression", modules="(")
    refused("rank: expected a positive", kinds=["input_factor"], rank=0)
    refused("resume: needs `out`", resume=True)
    with pytest.raises(CollectError, match="does not fit the token mask"):
        collect(model, batches, "classification", tokens=lambda _name, batch: batch["attention_mask"][:, :-1])
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    refused("example 0 has log-likelihood nan")


def test_sizes():
    assert parse_size("8GiB") == 8 << 30 and parse_size("5GB") == 5 * 10**9 and parse_size("1048576") == 1 << 20
    for bad in ("0", "-1", "many", "8GB8", ""):
        with pytest.raises(CollectError):
            parse_size(bad)
