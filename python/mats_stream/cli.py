"""`mats-stream-collect MODEL --data FILE --task TASK --kinds … --out FILE`."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from . import kinds as K
from . import memory
from .errors import CollectError

TASKS = ("causal-lm", "seq2seq", "classification")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="mats-stream-collect",
        description="Collects the statistics of one fine-tuned model that mats-stream merges with.",
        epilog="FILE has one JSON object a line: causal-lm text, or prompt and completion; seq2seq input, target and maybe "
               "choices; classification text, maybe text_pair, and label; or input_ids and labels.",
    )
    p.add_argument("model", metavar="MODEL", help="a Hugging Face model directory")
    p.add_argument("--data", required=True, metavar="FILE", help="examples, JSON lines")
    p.add_argument("--task", required=True, choices=TASKS)
    p.add_argument("--out", required=True, metavar="FILE", help="the statistics file to write")
    p.add_argument("--kinds", default="input_gram,output_gram", metavar="LIST",
                   help=f"of {', '.join(K.KINDS)} (default: %(default)s)")
    p.add_argument("--examples", type=int, default=1000, metavar="N", help="the first N of the file (default: %(default)s)")
    p.add_argument("--fisher", choices=("empirical", "true"), default="empirical",
                   help="labels of the data, or drawn from the model")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawn labels")
    p.add_argument("--modules", action="append", metavar="REGEX", help="only parameters whose name has this; may be repeated")
    p.add_argument("--exclude", action="append", metavar="REGEX", help="not those whose name has this; may be repeated")
    p.add_argument("--tokens", choices=("attended", "target", "all"), default="attended", help="which tokens count in Grams")
    p.add_argument("--likelihood", choices=("mean", "sum"), default="mean", help="of an example's target tokens")
    p.add_argument("--weighting", choices=("token", "example"), default="token", help="what weighs one in Grams")
    p.add_argument("--adapter", metavar="DIR", help="a PEFT adapter on MODEL")
    p.add_argument("--adapters", choices=("host", "own"), default="host",
                   help="with --adapter: statistics of the adapted weights, or of the adapter's parameters")
    p.add_argument("--dtype", choices=tuple(K.DTYPES), default="float32",
                   help="of the file; float16 is refused where it would lose more than rounding")
    p.add_argument("--full", action="store_true", help="store whole symmetric matrices, not their lower triangle")
    p.add_argument("--rank", type=int, metavar="R", help="rows of input_factor and output_factor")
    p.add_argument("--max-side", type=int, default=32768, metavar="N", help="leave out larger Grams (default: %(default)s)")
    p.add_argument("--no-share", action="store_true", help="a Gram for each module, even where inputs are one")
    p.add_argument("--embeddings", action="store_true", help="fisher_diagonal of embeddings too")
    p.add_argument("--single-examples", action="store_true",
                   help="parameters without a batched form too, one example at a time: slow")
    p.add_argument("--batch-tokens", type=int, default=4096, metavar="N", help="padded tokens of a batch (default: %(default)s)")
    p.add_argument("--max-length", type=int, default=512, metavar="N", help="longer examples are cut (default: %(default)s)")
    p.add_argument("--max-memory", metavar="SIZE",
                   help="anonymous memory of the process, such as 8GiB: sums are split over passes")
    p.add_argument("--modules-per-pass", type=int, metavar="N", help="no more modules in one pass")
    p.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    p.add_argument("--field", action="append", default=[], metavar="OURS=THEIRS",
                   help="a field's name in FILE, such as text=sentence")
    p.add_argument("--tokenizer", metavar="DIR", help="if not in MODEL")
    p.add_argument("--model-dtype", choices=("float32", "bfloat16", "float16", "auto"), default="float32",
                   help="to run the model in")
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    p.add_argument("--threads", type=int, metavar="N", help="of torch")
    p.add_argument("--progress", choices=("auto", "plain", "none"), default="auto")
    return p


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else f"{text[:300]}…"


def _load(classes: Any, args: argparse.Namespace) -> Any:
    """The model, in the dtype asked for, on its device."""
    import torch
    import transformers

    dtype = "auto" if args.model_dtype == "auto" else getattr(torch, args.model_dtype)
    if hasattr(transformers.utils.logging, "disable_progress_bar"):
        transformers.utils.logging.disable_progress_bar()
    major = int(str(transformers.__version__).split(".")[0])
    try:
        model, info = classes.from_pretrained(args.model, output_loading_info=True,
                                              **{"dtype" if major >= 5 else "torch_dtype": dtype})
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CollectError(f"{args.model}: cannot be loaded: {_one_line(error)}") from error
    missing = sorted(info.get("missing_keys") or ())
    if args.adapter is not None:
        try:
            import peft
        except ImportError as error:
            raise CollectError("--adapter: needs the package peft") from error
        try:
            model = peft.PeftModel.from_pretrained(model, args.adapter)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise CollectError(f"{args.adapter}: cannot be loaded: {_one_line(error)}") from error
        # A head that was trained with the adapter is saved in it.
        saved = {part for config in model.peft_config.values() for part in getattr(config, "modules_to_save", None) or ()}
        missing = [name for name in missing if not saved & set(name.split("."))]
    if missing:
        raise CollectError(f"{args.model}: has no {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}, which "
                           f"{type(model).__name__} needs for --task {args.task}: they would be random; give the task that the "
                           "model was fine-tuned for")
    return model.to(args.device)


def _check_place(place: str, option: str) -> None:
    """Refuses a directory that is not there before the hub is asked for a model of that name."""
    path = Path(place)
    seems_path = place.startswith((".", "/", "~")) or place.count("/") > 1 or ("/" in place and path.parent.is_dir())
    if seems_path and not path.exists():
        raise CollectError(f"{option}{place}: does not exist")


def _check_device(name: str) -> None:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CollectError(f"--device: `{name}` is none (expected cpu, cuda, cuda:1)") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CollectError(f"--device: there is no {name}; torch sees {torch.cuda.device_count()} GPUs")


def _tokenizer(args: argparse.Namespace) -> Any:
    import transformers

    place = Path(args.tokenizer or args.model)
    if place.is_dir() and not any((place / name).exists() for name in
                                  ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model", "vocab.json",
                                   "tokenizer.model")):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(str(place))
    except (OSError, ValueError) as error:
        raise CollectError(f"{place}: its tokenizer cannot be loaded: {_one_line(error)}") from error


def run(args: argparse.Namespace) -> None:
    fields: Dict[str, str] = {}
    for given in args.field:
        ours, equals, theirs = given.partition("=")
        if not equals or not ours or not theirs:
            raise CollectError(f"--field: expected OURS=THEIRS, got `{given}`")
        fields[ours] = theirs
    for name in ("examples", "batch_tokens", "max_length", "threads"):
        number = getattr(args, name)
        if number is not None and number < 1:
            raise CollectError(f"--{name.replace('_', '-')}: expected a positive number, got {number}")
    out = Path(args.out)
    if not out.parent.is_dir():
        raise CollectError(f"{out}: its directory does not exist")
    if out.exists() and not args.resume:
        raise CollectError(f"{out}: is already there; give another path or remove it")
    if args.max_memory is not None:
        memory.parse_size(args.max_memory)
    kinds = K.check_kinds([kind.strip() for kind in args.kinds.split(",") if kind.strip()])
    _check_place(args.model, "")
    for option in ("adapter", "tokenizer"):
        if getattr(args, option) is not None:
            _check_place(getattr(args, option), f"--{option} ")
    _check_device(args.device)

    import torch

    try:
        import transformers
    except ImportError as error:
        raise CollectError("the command needs the package transformers (pip install transformers)") from error

    from .collector import collect
    from .data import Reader, into_batches, read_lines
    from .progress import Progress

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    records = read_lines(Path(args.data), args.examples, fields)
    auto = {"causal-lm": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM",
            "classification": "AutoModelForSequenceClassification"}[args.task]
    model = _load(getattr(transformers, auto), args)
    tokenizer = _tokenizer(args)
    config = model.config
    try:
        words = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        words = None
    reader = Reader(Path(args.data), args.task, tokenizer, args.max_length, getattr(config, "label2id", None) or {},
                    classes=getattr(config, "num_labels", None), words=getattr(words, "num_embeddings", None))
    examples = reader.examples(records)
    pad = next((value for value in (getattr(tokenizer, "pad_token_id", None), getattr(config, "pad_token_id", None))
                if isinstance(value, int)), 0)
    if args.task == "classification" and getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = pad  # decoder classifiers find the last token by it
    metadata = {"model": Path(args.model).resolve().name, "data": Path(args.data).name}
    if args.adapter is not None:
        metadata["adapter"] = Path(args.adapter).resolve().name
    progress = Progress(args.progress)
    statistics = collect(
        model, into_batches(examples, args.batch_tokens, pad), args.task, kinds=kinds, modules=args.modules,
        exclude=args.exclude, tokens=args.tokens, fisher=args.fisher, likelihood=args.likelihood,
        weighting=args.weighting, seed=args.seed, dtype=args.dtype, packed=not args.full, rank=args.rank,
        adapters=args.adapters, embeddings=args.embeddings, single_examples=args.single_examples,
        share_inputs=not args.no_share, max_side=args.max_side, modules_per_pass=args.modules_per_pass,
        max_memory=args.max_memory, out=out, resume=args.resume, metadata=metadata, progress=progress,
    )
    peak = memory.peak()
    held = "" if peak is None else f", peak {memory.show_size(peak)} (files apart)"
    progress.say(f"{out}: {statistics}, {statistics.metadata['examples']} examples, "
                 f"{memory.show_size(out.stat().st_size)}{held}")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs the command; returns its exit code: 0, 2 for bad input, 5 and 6 for a full disk and other I/O errors, 130."""
    args = parser().parse_args(argv)
    try:
        run(args)
    except CollectError as error:
        return _fail(str(error), 2)
    except OSError as error:
        return _fail(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 5 if error.errno == errno.ENOSPC else 6)
    except KeyboardInterrupt:
        return _fail("interrupted; --resume goes on with it", 130)
    return 0


def _fail(text: str, code: int) -> int:
    lines: List[str] = text.splitlines() or ["failed"]
    try:
        print(f"mats-stream-collect: error: {lines[0]}", file=sys.stderr)
    except OSError:
        # stderr is gone; do not let the interpreter try again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return code


if __name__ == "__main__":
    sys.exit(main())
