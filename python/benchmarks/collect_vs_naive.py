"""The collector against a loop over single examples with hooks: time, and the largest difference of the numbers.

    python benchmarks/collect_vs_naive.py [MODEL] [--examples N] [--kinds LIST]

The loop is the recipe of the MaTS scripts: one example, forward and full backward hooks on every linear layer, gradients
of all weights. MODEL is a directory of an encoder with a classification head (a fresh head is fine: both sides use it);
without one a random BERT of MiniLM-L6's shape is made. Lengths are those of short texts, 8 to 48 tokens. Both sides run
in this process with the same threads; the times are of this machine, the ratio is what is meant.
"""

import argparse
import time

import torch
from torch import nn
from torch.nn import functional as F

from mats_stream import collect
from mats_stream.data import Example, into_batches


def model_of(path, classes):
    import transformers

    torch.manual_seed(0)
    if path is not None:
        return transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=classes)
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        num_labels=classes))


def naive(model, examples, kinds):
    """{key: full tensor}, one example at a time."""
    model.eval()
    for p in model.parameters():
        p.requires_grad_(True)
    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    seen, handles, sums, rows = {}, [], {}, {}
    for module in names:
        handles.append(module.register_forward_hook(lambda m, args, _out: seen.__setitem__((m, "input"), args[0])))
        handles.append(module.register_full_backward_hook(lambda m, _in, out: seen.__setitem__((m, "output"), out[0])))
    for example in examples:
        ids = torch.tensor([example.input_ids])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        model.zero_grad()
        (-F.cross_entropy(logits, torch.tensor([example.labels]))).backward()
        for (module, side), x in seen.items():
            kind = f"{side}_gram"
            if kind not in kinds:
                continue
            x = x.detach().reshape(-1, x.shape[-1])
            key = f"{names[module]}.weight/{kind}"
            sums[key] = sums[key] + x.t() @ x if key in sums else x.t() @ x
            rows[key] = rows.get(key, 0) + len(x)
        if "fisher_diagonal" in kinds:
            for name, p in model.named_parameters():
                key = f"{name}/fisher_diagonal"
                sums[key] = sums[key] + p.grad**2 if key in sums else p.grad**2
                rows[key] = rows.get(key, 0) + 1
    for handle in handles:
        handle.remove()
    return {key: total / rows[key] for key, total in sums.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--kinds", default="input_gram,output_gram")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu-time", action="store_true", help="of the process, where others use the machine too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    kinds = args.kinds.split(",")
    classes = 20
    model = model_of(args.model, classes)
    generator = torch.Generator().manual_seed(0)
    examples = []
    for i in range(args.examples):
        length = int(torch.randint(8, 49, (1,), generator=generator))
        ids = torch.randint(1000, 30000, (length,), generator=generator).tolist()
        examples.append(Example(i, ids, int(torch.randint(0, classes, (1,), generator=generator))))
    batches = into_batches(examples, args.batch_tokens, 0)
    times = {"loop": [], "collect": []}
    for _ in range(args.repeats):
        start = clock()
        expected = naive(model, examples, kinds)
        times["loop"].append(clock() - start)
        start = clock()
        statistics = collect(model, batches, "classification", kinds=kinds)
        times["collect"].append(clock() - start)
    worst = {}
    for key in statistics:
        name, kind = key.rsplit("/", 1)
        got = statistics[key] if kind == "fisher_diagonal" else statistics.dense(name, kind)
        # Biases of keys have no gradient in exact arithmetic: against the kind's largest value they are zero.
        size = max(float(expected[key].abs().max()), 1e-12)
        error = float((got - expected[key]).abs().max()) / size
        if error > worst.get(kind, (0.0, ""))[0]:
            worst[kind] = (error, key)
    loop, ours = min(times["loop"]), min(times["collect"])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.examples} examples, {args.kinds}")
    print(f"loop at batch size 1   {loop:8.2f} s   {args.examples / loop:8.1f} examples/s")
    print(f"collect                {ours:8.2f} s   {args.examples / ours:8.1f} examples/s   {loop / ours:.1f} times as fast")
    for kind, (error, key) in worst.items():
        print(f"largest difference, {kind}: {error:.1e} of the statistic's largest value ({key})")


if __name__ == "__main__":
    main()
