"""`collect`: runs a model over batches and sums statistics of its parameters, in one pass or several.

By default exactly those of MaTS (arXiv 2312.04339, section 5.2): evaluation mode, uncentred second moments per token
that is no padding, gradients of each example's own mean log-likelihood, Fishers per example. Batches are only a matter
of speed: every sum is over tokens or examples, each example's gradient is its own, and so is its randomness.

Order of events ([`running`] has the steps): sites are found and one step is made to see which of them are called, in what
order, and which share their input; then the sites are cut into passes; each pass runs all batches, writes what it summed
and frees it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from . import kinds as K
from . import memory
from .accumulate import Accumulator
from .attention import use_parts
from .discover import Discovery, Found, Selection
from .errors import CollectError
from .likelihood import resolve
from .progress import Progress
from .running import Batches, Collector, Options, SingleSite, map_tensors, prepared
from .sites import Forms, ProductSite, Recorder, Site
from .statistics import Statistics
from .tokens import TokenRule
from .writer import Entry, FileSink, MemorySink, Sink, leftovers

# Of `max_memory`, kept for what the allocator and the interpreter take besides.
SLACK = 16 << 20
# Relative to a statistic's norm: what float16 may take off it. Rounding alone takes 2^-11 at most.
F16_LOSS = 1e-3


def cut_into_passes(sites: Sequence[Site], forms: Forms, per_pass: Optional[int],
                    room: Optional[int]) -> List[List[Site]]:
    """Consecutive sites, as many a pass as both limits allow. A site's input sums stay where their owner is."""
    passes: List[List[Site]] = []
    held = 0
    for site in sites:
        size = sum(sums.bytes() for sums in site.accumulators(forms).values())
        if room is not None and size > room:
            raise CollectError(
                f"max_memory: module `{site.name}` needs {memory.show_size(size)} for its sums and {memory.show_size(room)} "
                f"are left; give {memory.show_size(size - room)} more, smaller batches, or collect fewer kinds"
            )
        single = isinstance(site, SingleSite)
        full = not passes or (per_pass is not None and len(passes[-1]) >= per_pass)
        if full or (room is not None and held + size > room) or single != isinstance(passes[-1][0], SingleSite):
            passes.append([])
            held = 0
        passes[-1].append(site)
        held += size
    return passes


def _fingerprint(model: nn.Module, first: Any, options: Options, metadata: Mapping[str, str], keys: Sequence[str]) -> str:
    """A hash of what decides the values: options, keys, samples of the weights, the first batch."""
    digest = hashlib.sha256()
    tokens = options.tokens if isinstance(options.tokens, str) else "function"
    digest.update(repr((options.kinds, tokens, options.fisher, options.likelihood, options.weighting, options.seed,
                        options.dtype, options.forms, options.examples, sorted(metadata.items()), list(keys))).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)].double().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())

    def add(x: Tensor) -> Tensor:
        digest.update(x.detach().double().cpu().numpy().tobytes())
        return x

    map_tensors(first, add)
    return digest.hexdigest()


def collect(
    model: nn.Module,
    batches: Batches,
    loss: Union[str, Callable[..., Tensor]] = "causal-lm",
    *,
    kinds: Union[str, Sequence[str]] = (K.INPUT_GRAM, K.OUTPUT_GRAM),
    modules: Selection = None,
    exclude: Selection = None,
    tokens: Union[str, TokenRule] = "attended",
    fisher: str = "empirical",
    likelihood: str = "mean",
    weighting: str = "token",
    seed: int = 0,
    examples: Optional[int] = None,
    dtype: str = "float32",
    packed: bool = True,
    rank: Optional[int] = None,
    adapters: str = "host",
    embeddings: bool = False,
    single_examples: bool = False,
    share_inputs: bool = True,
    max_side: int = 32768,
    modules_per_pass: Optional[int] = None,
    max_memory: Union[None, int, str] = None,
    out: Union[None, str, Path] = None,
    resume: bool = False,
    metadata: Optional[Mapping[str, str]] = None,
    progress: Union[str, Progress] = "none",
) -> Statistics:
    """Statistics of `model` on `batches`.

    - `batches`: mappings of the model's arguments (or what `loss` takes), as a list, a function returning an iterator,
      or, where one pass is enough, an iterator. The same ones each time. `example_ids` in a batch number its examples for
      the true Fisher.
    - `loss`: `causal-lm`, `seq2seq`, `classification`, or a function `(model, batch[, sampler])` that returns the
      log-likelihood of each example, `[B]`.
    - `kinds`: of `input_gram`, `output_gram`, `input_factor`, `output_factor` (sketches of `rank` rows),
      `input_mean`, `fisher_diagonal`, `fisher_block` (of vectors).
    - `modules`, `exclude`: patterns searched in parameter names, or functions of the name. What cannot be had of a
      parameter is left out with a note (`Statistics.notes`); of parameters chosen by `modules` it is an error.
    - `tokens`: which count: `attended`, `target` (positions that predict one), `all`, or a function
      `(module name, batch) -> mask [B, T]`.
    - `fisher`: `empirical`, or `true`: labels drawn from the model with `seed`.
    - `likelihood`: an example's `mean` over its target tokens (the paper's) or their `sum`.
    - `weighting`: Grams per `token` (the paper's), or per `example`: tokens of one example weigh one together.
    - `dtype`, `packed`, `rank`: how it is stored. `float16` is refused where it loses more than rounding: means of
      squared gradients are mostly below what it holds. `max_side`: Grams beyond it are left out.
    - `adapters`: `host`: weights of the base model as their adapters make them; `own`: the adapter's parameters.
      (IA)³ vectors are always collected.
    - `embeddings`: also their `fisher_diagonal`. `single_examples`: also parameters without a batched form, one example
      at a time. `share_inputs`: one Gram for modules that see the same input.
    - `modules_per_pass`, `max_memory` (`8GiB`): cut the modules into passes over the batches, so that the sums fit.
      With `max_memory` the first batch is taken for the largest.
    - `out`: write each statistic there as it is finished; `resume`: go on with an interrupted run of the same model,
      batches and options.

    A few examples of the first batch tell how each module's input is split by examples. If it does not call all
    modules, the others are looked for in all batches, by a forward pass.

    Cost of a pass: a forward pass; with gradients a backward pass without weight gradients, down to the first
    module of the pass; and 2·n² flops a token for a Gram of side n.

    Raises [`CollectError`] for whatever is wrong with the input. The model is left as it was.
    """
    for name, value, allowed in (("fisher", fisher, ("empirical", "true")), ("weighting", weighting, ("token", "example")),
                                 ("dtype", dtype, tuple(K.DTYPES))):
        if value not in allowed:
            raise CollectError(f"{name}: unknown `{value}` (expected one of {', '.join(allowed)})")
    if isinstance(tokens, str) and tokens not in ("attended", "target", "all"):
        raise CollectError(f"tokens: unknown `{tokens}` (expected attended, target, all, or a function)")
    for name, number in (("rank", rank), ("examples", examples), ("modules_per_pass", modules_per_pass),
                         ("max_side", max_side)):
        if number is not None and number < 1:
            raise CollectError(f"{name}: expected a positive number, got {number}")
    if seed < 0:
        raise CollectError(f"seed: expected a number that is not negative, got {seed}")
    checked = K.check_kinds(kinds)
    if rank is None and any(kind in checked for kind in (K.INPUT_FACTOR, K.OUTPUT_FACTOR)):
        raise CollectError("kinds: factors need a `rank`")
    if resume and out is None:
        raise CollectError("resume: needs `out`, where the interrupted run wrote")
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise CollectError("the model or the call is in torch.inference_mode, where nothing has a gradient; leave it "
                           "(torch.no_grad does not matter)")
    options = Options(checked, tokens, fisher, likelihood, weighting, seed, dtype, Forms(packed, rank), examples)
    shown = progress if isinstance(progress, Progress) else Progress(progress)
    collector = Collector(model, batches, resolve(loss, likelihood), options, shown)
    collector.peek()
    with torch.enable_grad(), prepared(model):
        found = Discovery(model, collector.recorder, checked, modules, exclude, adapters, embeddings, max_side).run()
        removers: List[Callable[[], None]] = []
        try:
            for attention, observers in found.attention:
                removers.append(use_parts(attention, _observer(collector.recorder, observers)))
            for site in found.sites:
                removers.extend(site.attach())
            return _run(collector, found, share_inputs, single_examples, modules_per_pass, max_memory,
                        None if out is None else Path(out), resume, dict(metadata or {}))
        finally:
            for remove in removers:
                remove()


def _observer(recorder: Recorder, observers: Mapping[str, Sequence[ProductSite]]) -> Callable[..., Tensor]:
    def observe(projection: str, x: Tensor, y: Tensor, first: int) -> Tensor:
        if recorder.active:
            for site in observers.get(projection, ()):
                # One of separate projections has all rows of its own weight, but a part of the common bias.
                whole = site.layout.out_features == y.shape[-1]
                y = site.observe(x, y, 0 if whole else first)
        return y

    return observe


def _run(collector: Collector, found: Found, share: bool, single_examples: bool, per_pass: Optional[int],
         max_memory: Union[None, int, str], out: Optional[Path], resume: bool, metadata: Dict[str, str]) -> Statistics:
    options, recorder, progress = collector.options, collector.recorder, collector.progress
    sites = collector.probe(found, share, single_examples)
    for target in found.single:
        if single_examples:
            sites.append(SingleSite(recorder, target))
        else:
            found.left_out[target.name] = "has no batched form; single_examples collects it one example at a time"
    if not sites:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(found.left_out.items())[:3])
        raise CollectError(f"modules: nothing to collect ({reasons or 'no parameter has the kinds asked for'})")

    accumulators = {site: site.accumulators(options.forms) for site in sites}
    entries = {key: Entry(key, sums.shape) for sums_of in accumulators.values() for key, sums in sums_of.items()}
    aliases: Dict[str, str] = {}
    for site in sites:
        if isinstance(site, ProductSite):
            aliases.update(site.aliases())
    for name in found.left_out:
        progress.say(f"left out: {name}: {found.left_out[name]}")

    room: Optional[int] = None
    if max_memory is not None:
        gradient = any(site.needs_gradient() for site in sites)
        needed = collector.activations([site for site in sites if not isinstance(site, SingleSite)], gradient)
        limit = memory.parse_size(max_memory)
        room = limit - needed - 2 * recorder.largest_input - SLACK
        if room <= 0:
            raise CollectError(f"max_memory: the model and one batch hold {memory.show_size(needed)} of "
                               f"{memory.show_size(limit)}; give more, or smaller batches")
    passes = cut_into_passes(sites, options.forms, per_pass, room)

    stated = {f"alias:{key}": to for key, to in aliases.items()}
    stated.update(metadata)
    for site in sites:
        if isinstance(site, ProductSite) and site.layout.transposed and site.weight is not None:
            # Such a weight's rows are its inputs: `output_*` is the side of its rows, here its inputs.
            stated[f"layout:{site.weight.name}"] = "in,out"
    mark = stated["run"] = _fingerprint(collector.model, collector.first, options, stated, list(entries))
    sink: Sink = MemorySink()
    if out is not None:
        finished = _finished(out, mark) if resume else None
        if finished is not None:
            progress.say(f"{out}: is finished already")
            finished.notes.update(found.left_out)
            return finished
        # Later come: counts, and one bound for each sketch.
        room_for = len(json.dumps(stated)) + sum(len(key) + 48 for key in entries)
        sink = FileSink(out, list(entries.values()), options.dtype, room_for, mark, resume)
    try:
        notes = _run_passes(collector, passes, entries, sink)
    except BaseException:
        if isinstance(sink, FileSink):
            sink.close()
        raise
    progress.end()
    held = memory.peak()
    if max_memory is not None and held is not None and held > memory.parse_size(max_memory):
        progress.say(f"held {memory.show_size(held)}, more than max_memory: a batch was larger than the first")
    for key in collector.empty:
        found.left_out[key] = "no token of its module counts in any batch: zeros"
        progress.say(f"{key}: {found.left_out[key]}")
    stated.update(notes)
    stated.update({"format": K.FORMAT, "fisher": options.fisher, "seed": str(options.seed),
                   "likelihood": options.likelihood, "weighting": options.weighting})
    sink.finish(stated)
    if isinstance(sink, MemorySink):
        return Statistics(sink.tensors, stated, found.left_out)
    return Statistics({}, stated, found.left_out, path=out)


def _finished(out: Path, mark: str) -> Optional[Statistics]:
    """What the same run has finished before; of a run that was killed right after that a journal is left."""
    if not out.exists():
        return None
    try:
        found = Statistics.load(out)
    except Exception as error:  # safetensors' own errors are no OSErrors
        raise CollectError(f"{out}: is already there and is no statistics file; give another path or remove it") from error
    if found.metadata.get("run") != mark:
        raise CollectError(f"{out}: is already there, of another run (other model, data or options); give another path or "
                           "remove it")
    for left in leftovers(out):
        left.unlink(missing_ok=True)
    return found


def _run_passes(collector: Collector, passes: Sequence[Sequence[Site]], entries: Mapping[str, Entry],
                sink: Sink) -> Dict[str, str]:
    """All passes that are not done; returns what goes into the metadata."""
    options, progress = collector.options, collector.progress
    done = sink.done()
    collector.counted = bool(done)
    batches = sink.notes().get("batches")
    if batches is not None and not collector.one_shot:
        # What was summed before and what is to come must be of the same batches: known before hours are spent.
        for _ in collector.steps():
            pass
        _same_batches(collector, batches)
    # One iterator gives all its batches to one pass.
    todo = [[s for s in sites if not set(s.accumulators(options.forms)) <= done] for sites in passes]
    # A site without sums of its own (all aliased) has nothing to do.
    todo = [[s for s in sites if s.accumulators(options.forms)] for sites in todo]
    todo = [sites for sites in todo if sites]
    progress.begin(len(todo), collector.step_count())
    for at, sites in enumerate(todo):
        for site in sites:
            site.begin(options.forms)
        singles = [site for site in sites if isinstance(site, SingleSite)]
        batched = [site for site in sites if not isinstance(site, SingleSite)]
        gradient = any(site.needs_gradient() for site in batched)
        examples = 0
        streams: Dict[str, float] = {}
        for number, step in enumerate(collector.steps(), 1):
            if batched:
                collector.run_step(step, batched, gradient, number - 1)
                masks = collector.recorder.masks
                assert masks is not None
                for stream, mask in masks.masks.items():
                    if mask is not None:
                        streams[stream] = streams.get(stream, 0.0) + float(mask.sum())
            if singles:
                collector.run_singles(step, singles)
            examples += step.examples
            progress.step(at, number, examples)
        if batches is not None:
            _same_batches(collector, batches)
        if gradient and not collector.informed and not collector.recorder.moved:
            raise CollectError("loss: every example has log-likelihood 0 and no gradient; have they labels that are not all "
                               "ignored (-100)?")
        _finish_pass(collector, sites, entries, sink, examples, streams)
        memory.give_back()
    if not collector.counted:
        raise CollectError("tokens: none counts in any batch; look at attention_mask and labels, or give tokens=`all`")
    return {key: str(value) for key, value in sink.notes().items() if key != "batches"}


def _same_batches(collector: Collector, batches: str) -> None:
    if collector.stream_digest() != batches:
        raise CollectError("resume: the batches are not those of the interrupted run; give the same, or remove what it left "
                           "to start anew")


def _finish_pass(collector: Collector, sites: Sequence[Site], entries: Mapping[str, Entry], sink: Sink, examples: int,
                 streams: Mapping[str, float]) -> None:
    """Writes the sums of a pass, each freed once it is written."""
    options = collector.options
    notes: Dict[str, Any] = {"examples": examples, "batches": collector.stream_digest()}
    counts: Dict[str, Counter[float]] = {}
    finished: List[str] = []
    for site in sites:
        for key in list(site.sums):
            # Fishers are means over all examples, also those that did not call the module.
            fisher = key.rsplit("/", 1)[1] in K.FISHER_KINDS
            sums, count = site.sums.pop(key), float(examples) if fisher else site.counts[key]
            if count:
                collector.counted = True
            else:
                collector.empty.append(key)
            bound = sums.error_bound(count)
            if bound is not None:
                notes[f"error:{key}"] = f"{bound:.6g}"
            sink.write(entries[key], _rounded(key, sums, count, K.DTYPES[options.dtype][1]))
            finished.append(key)
            if isinstance(site, ProductSite) and not fisher:
                counts.setdefault(site.stream, Counter())[count] += 1
        site.end()
    by_stream = {stream: int(count) for stream, count in streams.items()}
    for stream, seen in counts.items():
        by_stream.setdefault(stream, int(seen.most_common(1)[0][0]))
    if by_stream:
        notes["tokens"] = sum(by_stream.values())
    if "encoder" in by_stream or "decoder" in by_stream or len(by_stream) > 1:
        notes.update({f"tokens:{stream}": count for stream, count in by_stream.items()})
    sink.pass_finished(finished, notes)


def _rounded(key: str, sums: Accumulator, count: float, dtype: torch.dtype) -> Iterator[Tensor]:
    """The statistic in the dtype of the file; refused where that is not what was summed, to rounding."""
    narrow = dtype == torch.float16
    if narrow:
        # Below its smallest normal number f16 has fewer digits, and then none.
        diagonal = sums.diagonal(count)
        if diagonal is not None:
            lost = (diagonal != 0) & (diagonal.abs() < torch.finfo(dtype).tiny)
            if bool(lost.any()):
                raise CollectError(f"`{key}`: {int(lost.sum())} of the {diagonal.numel()} elements of its diagonal are below what "
                                   "float16 holds; store bfloat16 or float32 (dtype, --dtype)")
    size = off = 0.0
    for wide in sums.pieces(count):
        piece = wide.to(dtype)
        if not bool(torch.isfinite(piece).all()):
            value = float(wide[~torch.isfinite(piece)][0])
            raise CollectError(f"`{key}` has the value {value:.6g}, which {str(dtype)[6:]} does not hold; look for examples that "
                               "overflow, or store another dtype")
        if narrow:
            size += float(wide.double().square().sum())
            off += float((wide.double() - piece.double()).square().sum())
        yield piece.cpu()
    if off > F16_LOSS**2 * size:
        raise CollectError(f"`{key}`: float16 would lose {(off / size) ** 0.5:.2g} of it, as it is mostly below what float16 "
                           "holds; store bfloat16 or float32 (dtype, --dtype)")
