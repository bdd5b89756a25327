"""A model over batches: one step, seen by the collecting sites, and the first looks at it.

The first looks tell which modules are called, in what order, which share their input, and how each input is split by
examples. What becomes of the sums is [`collector`]'s.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from . import kinds as K
from . import memory
from .accumulate import Accumulator
from .attention import disable_fast_paths
from .discover import Found
from .errors import CollectError
from .layouts import Look, is_split, split_of
from .likelihood import Likelihood, Sampler
from .progress import Progress
from .sites import AffineSite, AllSeen, Forms, ProductSite, Recorder, Site, Target, vector_accumulators
from .tokens import TokenMasks, TokenRule, is_encoder_decoder

Batches = Union[Iterable[Any], Callable[[], Iterable[Any]]]

# Examples of the first batch that tell which modules are called, and how their inputs are split.
LOOKED_AT = 3


@dataclass
class Options:
    """Everything that decides values, so that an interrupted run can tell whether it may go on."""

    kinds: Tuple[str, ...]
    tokens: Union[str, TokenRule]
    fisher: str
    likelihood: str
    weighting: str
    seed: int
    dtype: str
    forms: Forms
    examples: Optional[int]


def _unsplit(looks: Sequence[Look], examples: int) -> str:
    return f"its input [{', '.join(map(str, looks[0].shape))}] is not split by the batch's {examples} examples"


class SingleSite(Site):
    """Parameters that only a batch of one example tells about; their gradients come from the collector."""

    def __init__(self, recorder: Recorder, target: Target) -> None:
        super().__init__(recorder, target.name, "tokens")
        self.target, self.parameter = target, target.parameter
        self.targets = [target]

    def attach(self) -> List[Callable[[], None]]:
        return []

    def accumulators(self, forms: Forms) -> Dict[str, Accumulator]:
        return vector_accumulators(self.target, forms)

    def add(self, gradient: Optional[Tensor]) -> None:
        rows = torch.zeros(1, self.parameter.numel()) if gradient is None else gradient.detach().reshape(1, -1)
        self._add_vectors(self.target, rows)


def batch_size(batch: Any) -> int:
    """Examples of a batch: the first dimension of its first tensor."""
    values: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else (
        batch if isinstance(batch, (tuple, list)) else [batch])
    for value in values:
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    raise CollectError(f"batches: found no tensor in a batch of type {type(batch).__name__}")


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping) or hasattr(batch, "items"):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(value, change) for value in batch)
    return batch


def _digest(batch: Any, ids: Sequence[int]) -> str:
    """A hash of a batch."""
    digest = hashlib.sha256(repr(list(ids)).encode())

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(repr((value.dtype, tuple(value.shape))).encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        elif hasattr(value, "items"):
            for key, part in value.items():
                digest.update(repr(key).encode())
                add(part)
        elif isinstance(value, (tuple, list)):
            for part in value:
                add(part)
        elif value is None or isinstance(value, (str, int, float, bool)):
            digest.update(repr(value).encode())

    add(batch)
    return digest.hexdigest()[:16]


def _slice(batch: Any, size: int, part: slice) -> Any:
    return map_tensors(batch, lambda x: x[part] if x.dim() > 0 and x.shape[0] == size else x)


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, no weight with a gradient, no cache, no fused layers; afterwards as it was."""
    training = [(module, module.training) for module in model.modules()]
    needs = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    all_configs: Dict[int, Any] = {id(c): c for c in (getattr(m, "config", None) for m in model.modules())}
    configs = [c for c in all_configs.values() if getattr(c, "use_cache", None) is True]
    undo: List[Callable[[], None]] = []
    try:
        model.eval()
        for parameter, _ in needs:
            parameter.requires_grad_(False)
        for config in configs:
            config.use_cache = False
        undo = disable_fast_paths(model)
        yield
    finally:
        for restore in undo:
            restore()
        for config in configs:
            config.use_cache = True
        for parameter, before in needs:
            parameter.requires_grad_(before)
        for module, mode in training:
            module.training = mode


@dataclass
class Step:
    """One batch, ready."""

    batch: Any
    examples: int
    ids: List[int] = field(default_factory=list)
    digest: str = ""


class Collector:
    """State of one call of [`collect`]."""

    def __init__(self, model: nn.Module, batches: Batches, likelihood: Likelihood, options: Options,
                 progress: Progress) -> None:
        self.model, self.batches, self.likelihood, self.options = model, batches, likelihood, options
        self.progress = progress
        self.recorder = Recorder()
        self.encoder_decoder = is_encoder_decoder(model)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.first: Optional[Any] = None
        self.rest: Optional[Iterator[Any]] = None
        self.one_shot = False
        # Of the first pass: each batch's digest, and how often it called each site where it was run to its end.
        self.digests: List[str] = []
        self.calls: List[Optional[Counter[Site]]] = []
        self.sharers: List[ProductSite] = []
        self.padded: Dict[str, bool] = {}
        # Of the batch that is looked at: each example's log-likelihood, and among how many examples.
        self.looked: Dict[int, Tuple[float, int]] = {}
        # Whether any log-likelihood was not 0; whether anything is a mean over more than nothing, and what is not.
        self.informed = False
        self.counted = False
        self.empty: List[str] = []

    # --- batches -----------------------------------------------------------------------------------------------------

    def _iterate(self) -> Iterator[Any]:
        source = self.batches() if callable(self.batches) else self.batches
        return iter(source)

    def peek(self) -> None:
        """Takes the first batch; one that is from an iterator is given out again."""
        iterator = self._iterate()
        self.one_shot = iterator is self.batches
        for self.first in iterator:
            if batch_size(self.first_inputs()):
                break
        else:
            raise CollectError("batches: there are none" if self.first is None else "batches: they have no examples")
        if self.one_shot:
            self.rest = iterator

    def first_inputs(self) -> Any:
        """The first batch without its `example_ids`."""
        if not hasattr(self.first, "items"):
            return self.first
        return {key: value for key, value in self.first.items() if key != "example_ids"}  # type: ignore[union-attr]

    def _prepare(self, raw: Any, next_id: int, room: Optional[int]) -> Step:
        batch = raw
        ids: Optional[List[int]] = None
        if hasattr(batch, "items") and "example_ids" in batch:
            batch = dict(batch.items())
            ids = [int(i) for i in batch.pop("example_ids")]
        size = batch_size(dict(batch.items()) if hasattr(batch, "items") else batch)
        if ids is not None and len(ids) != size:
            raise CollectError(f"batches: {len(ids)} example_ids in a batch of {size} examples")
        if room is not None and size > room:
            batch = _slice(batch, size, slice(0, room))
            ids = None if ids is None else ids[:room]
            size = room
        ids = ids if ids is not None else list(range(next_id, next_id + size))
        digest = _digest(batch, ids)
        return Step(map_tensors(batch, lambda x: x.to(self.device)), size, ids, digest)

    def steps(self) -> Iterator[Step]:
        """The batches of one pass, the same in each."""
        at = 0
        for at, step in enumerate(self._steps(), 1):
            if at > len(self.digests):
                self.digests.append(step.digest)
                self.calls.append(None)
            elif self.digests[at - 1] != step.digest:
                raise CollectError(f"batches: batch {at} is not the one that it was in an earlier pass; give the same batches, in "
                                   "one order, whenever they are asked for")
            yield step
        if at < len(self.digests):
            raise CollectError(f"batches: {len(self.digests)} in an earlier pass and {at} in this one; give the same each time")

    def stream_digest(self) -> str:
        """Stands for all batches of a pass."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    def _steps(self) -> Iterator[Step]:
        if self.one_shot:
            if self.rest is None:
                raise CollectError("batches: an iterator can be read once, and several passes are needed; "
                                   "give a list or a function that returns an iterator")
            rest, self.rest = self.rest, None
            source: Iterator[Any] = _chain(self.first, rest)
        else:
            source = self._iterate()
        done = 0
        for raw in source:
            room = None if self.options.examples is None else self.options.examples - done
            if room is not None and room <= 0:
                return
            step = self._prepare(raw, done, room)
            if step.examples:
                yield step
            done += step.examples

    def step_count(self) -> Optional[int]:
        try:
            return len(self.batches)  # type: ignore[arg-type]
        except TypeError:
            return None

    # --- one step ----------------------------------------------------------------------------------------------------

    def _sampler(self, step: Step, masks: TokenMasks) -> Optional[Sampler]:
        if self.options.fisher != "true":
            return None
        return Sampler(self.options.seed, step.ids, self.recorder.paused, masks.relabel)

    def _masks(self, step: Step) -> TokenMasks:
        return TokenMasks(step.batch, step.examples, self.options.tokens, self.encoder_decoder,
                          self.options.weighting == "example")

    def run_step(self, step: Step, sites: Sequence[Site], gradient: bool, at: Optional[int] = None) -> None:
        """One batch, the `at`-th, through the model, seen by the collecting sites."""
        recorder = self.recorder
        self._decide_late(step, sites)
        self._start(step)
        recorder.remaining = None
        # How often a batch calls a module only a whole run of that batch tells: the first pass makes one.
        calls = None if at is None else self.calls[at]
        if not gradient and calls is not None:
            recorder.remaining = sum(calls[site] for site in sites)
            if recorder.remaining == 0:
                return
        likelihoods: Optional[Tensor] = None
        try:
            likelihoods = self._forward(step, gradient)
        except AllSeen:
            pass
        if likelihoods is not None:
            self._check(likelihoods, step)
            self.informed = self.informed or bool((likelihoods.detach() != 0).any())
            if at is not None:
                self.calls[at] = Counter({site: len(inputs) for site, inputs in recorder.inputs.items()})
            for sharer in self.sharers:
                assert sharer.shares is not None
                if len(recorder.inputs.get(sharer, ())) != len(recorder.inputs.get(sharer.shares, ())):
                    sharer.other_input()
            if gradient and likelihoods.requires_grad:
                try:
                    likelihoods.sum().backward()
                except RuntimeError as error:
                    if "checkpoint" not in f"{type(error).__name__} {error}".lower():
                        raise
                    # What is computed again in the backward pass is not seen, and so is not what was computed first.
                    raise CollectError("the model recomputes its activations; turn gradient checkpointing off "
                                       "(model.gradient_checkpointing_disable())") from error
            del likelihoods
        for site in sites:
            site.finish_step()

    def _start(self, step: Step) -> None:
        recorder = self.recorder
        recorder.masks, recorder.examples = self._masks(step), step.examples
        recorder.inputs.clear()
        recorder.lengths.clear()

        def lengths(x: Tensor) -> Tensor:
            if x.dim() > 1 and x.shape[0] == step.examples:
                recorder.lengths.update(x.shape[1:])
            return x

        map_tensors(step.batch, lengths)

    def _forward(self, step: Step, gradient: bool) -> Tensor:
        recorder = self.recorder
        assert recorder.masks is not None
        recorder.active = True
        try:
            with torch.set_grad_enabled(gradient):
                return self.likelihood(self.model, step.batch, self._sampler(step, recorder.masks))
        finally:
            recorder.active = False

    def _check(self, likelihoods: Tensor, step: Step) -> None:
        if not isinstance(likelihoods, Tensor) or likelihoods.shape != (step.examples,):
            got = list(likelihoods.shape) if isinstance(likelihoods, Tensor) else type(likelihoods).__name__
            raise CollectError(f"loss: expected one log-likelihood for each of {step.examples} examples, got {got}")
        finite = torch.isfinite(likelihoods.detach())
        if not bool(finite.all()):
            at = int((~finite).nonzero()[0])
            raise CollectError(f"loss: example {step.ids[at]} has log-likelihood {float(likelihoods[at])}")

    def run_singles(self, step: Step, sites: Sequence[SingleSite]) -> None:
        """Gradients of one example after the other, for parameters that have no batched form."""
        parameters = [site.parameter for site in sites]
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            for i in range(step.examples):
                one = Step(_slice(step.batch, step.examples, slice(i, i + 1)), 1, [step.ids[i]])
                with torch.enable_grad():
                    likelihood = self.likelihood(self.model, one.batch, self._sampler(one, self._masks(one)))
                self._check(likelihood, one)
                gradients = torch.autograd.grad(likelihood.sum(), parameters, allow_unused=True)
                for site, gradient in zip(sites, gradients):
                    site.add(gradient)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)

    # --- the first step ----------------------------------------------------------------------------------------------

    def _part(self, step: Step, examples: int) -> Step:
        """The first `examples` of a batch."""
        if examples == step.examples:
            return step
        return Step(_slice(step.batch, step.examples, slice(0, examples)), examples, step.ids[:examples])

    def _look(self, step: Step) -> Dict[Site, List[Look]]:
        """The calls that a batch makes."""
        recorder = self.recorder
        self._start(step)
        recorder.seen = {}
        try:
            # Gradients on, as in a pass: a module that runs without them shows here.
            likelihoods = self._forward(step, True).detach()
            self._check(likelihoods, step)
            self._unmixed(likelihoods, step)
            return recorder.seen
        finally:
            recorder.seen = None

    def _unmixed(self, likelihoods: Tensor, step: Step) -> None:
        """An example's likelihood must be its own: the looks have the same examples beside different others."""
        exact = likelihoods.dtype == torch.float64 or all(
            p.dtype in (torch.float32, torch.float64) for p in self.model.parameters() if p.is_floating_point())
        # Far above what other kernels for other shapes make of rounding, on any device.
        relative, absolute = (5e-2, 1e-2) if exact else (2e-1, 1e-1)
        for i, now in enumerate(likelihoods.double().tolist()):
            before, among = self.looked.setdefault(i, (now, step.examples))
            if among != step.examples and abs(now - before) > relative * max(abs(before), abs(now)) + absolute:
                raise CollectError(
                    f"loss: example {step.ids[i]} has log-likelihood {before:.6g} in a batch of {among} and {now:.6g} in one of "
                    f"{step.examples}: the model mixes the examples of a batch, or draws numbers; give batches of one example"
                )

    def _decide(self, step: Step, seen: Dict[Site, List[Look]], sites: Sequence[Site]) -> None:
        """Tells how the inputs of `sites`, as `seen` with a batch, are split by examples: from fewer examples of it."""
        m = step.examples
        if m == 1:
            return
        looks = [(m, seen), *((k, self._look(self._part(step, k))) for k in sorted({m - 1, 1}, reverse=True))]
        for site in sites:
            site.split = split_of([(k, look.get(site, [])) for k, look in looks])
            site.lengths = {call.shape[0] // m for call in seen[site]}
            site.same_rows = len({tuple(call.shape for call in look.get(site, [])) for _, look in looks}) == 1
            site.decided = True

    def _decide_late(self, step: Step, sites: Sequence[Site]) -> None:
        """Where all batches before had one example: any split is that of one."""
        late = [site for site in sites if not site.decided]
        if step.examples == 1 or not late:
            return
        self.looked.clear()
        seen = self._look(step)
        late = [site for site in late if site in seen]
        self._decide(step, seen, late)
        for site in late:
            if site.split is None and site.same_rows:
                raise CollectError(f"module `{site.name}`: {_unsplit(seen[site], step.examples)}; exclude it, or give batches of "
                                   "one example")

    def probe(self, found: Found, share: bool, single_examples: bool) -> List[Site]:
        """Runs batches until all sites are called, the first as a rule: sites in order of their first call, those with one
        input shared, and left out what is not split by examples and cannot do without."""
        looks: Dict[Site, List[Look]] = {}

        def look(step: Step, whole: Optional[Step] = None) -> None:
            self.looked.clear()
            seen = self._look(step)
            for site in seen:
                looks.setdefault(site, seen[site])
            new = [site for site in seen if not site.decided]
            self._decide(step, seen, new)
            if whole is not None and whole.examples > step.examples:
                # Of few examples an expert may have been given all, or those of the first one alone.
                more = self._look(whole)
                for site in new:
                    shapes = [call.shape for call in more.get(site, [])]
                    lengths = site.lengths | self.recorder.lengths
                    site.same_rows = site.same_rows and shapes == [call.shape for call in seen[site]]
                    if len(shapes) != len(seen[site]) or not all(
                            is_split(shape, whole.examples, site.split, lengths) for shape in shapes):
                        site.split = None
            for site in new:
                self._leave_out(site, seen[site], step, found, single_examples)

        # A few examples tell as much as all of the batch.
        step = self._prepare(self.first, 0, self.options.examples)
        look(self._part(step, min(step.examples, LOOKED_AT)), step)
        if len(looks) < len(found.sites) and step.examples > LOOKED_AT:
            look(step)
        if len(looks) < len(found.sites) and not self.one_shot:
            # Experts and branches: the plan must know of whatever any batch calls.
            missing = [site.name for site in found.sites if site not in looks]
            self.progress.say("not called in the first batch, so that all are looked through (exclude them to save that): "
                              f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}")
            for at, step in enumerate(self._steps()):
                if at > 0:
                    look(step)
                if len(looks) == len(found.sites):
                    break
        if isinstance(self.batches, (list, tuple)) and not all(site.decided for site in looks):
            several = next((step for step in self._steps() if step.examples > 1), None)
            if several is not None:
                look(self._part(several, min(several.examples, LOOKED_AT)))
        for site in found.sites:
            if isinstance(site, AffineSite) and site.unfit is not None:
                found.single.extend(site.vectors.values())
                looks.pop(site, None)
            elif site not in looks or site.odd_call:
                site.absent = site not in looks
                looks.pop(site, None)
                why = "is called with something else than one tensor" if site.odd_call else "is not called"
                for target in site.targets:
                    found.left_out[target.name] = f"module `{site.name}` {why}"
        called = [site for site in looks if site.targets]
        if share:
            owners: Dict[Any, ProductSite] = {}
            for site in called:
                if not isinstance(site, ProductSite) or site.weight is None or not site.input_kinds():
                    continue
                same = (site.layout_key(), site.stream, site.split, tuple(site.input_kinds()),
                        site.layout.in_features, tuple(call.tensor for call in looks[site]))
                owner = owners.setdefault(same, site)
                if owner is not site:
                    site.shares = owner
                    self.sharers.append(site)
        return called

    def _padded(self, stream: str) -> bool:
        """Whether a batch has positions of the stream that do not count, as far as can be known."""
        if not isinstance(self.batches, (list, tuple)):
            return True
        if stream not in self.padded:
            masks = (self._masks(step).masks[stream] for step in self._steps())
            self.padded[stream] = any(mask is not None and not bool(mask.all()) for mask in masks)
        return self.padded[stream]

    def _leave_out(self, site: Site, looks: Sequence[Look], step: Step, found: Found, single_examples: bool) -> None:
        """Takes off a site's targets what cannot be had of it, and says so."""
        def leave(kinds: Iterable[str], why: str, single: bool = False) -> None:
            for target in site.targets:
                dropped = target.kinds & set(kinds)
                if not dropped:
                    continue
                if found.named and not (single and single_examples):
                    raise CollectError(f"module `{site.name}`: {why}; exclude it")
                target.kinds -= dropped
                if single and single_examples:
                    found.single.append(replace(target, kinds=dropped))
                else:
                    found.left_out[target.name if not target.kinds else f"{target.name}/{min(dropped)}"] = why
            site.keep_targets()

        if not any(look.gradient for look in looks):
            leave((*K.OUTPUT_KINDS, *K.FISHER_KINDS),
                  "runs with gradients off (torch.no_grad, or reentrant checkpointing, which is to be turned off)")
        token_kinds = (*K.INPUT_KINDS, *K.OUTPUT_KINDS)
        masks = self._masks(step)
        if site.decided and site.split is None:
            why = f"{_unsplit(looks, step.examples)}; batches of one example would do"
            leave(K.FISHER_KINDS, why, single=True)
            # Rows that are the same for any number of examples are of none of them; of others each is of one, but which
            # of them are padding is not known.
            if site.same_rows or masks.by_example or masks.mask(site.name, site.stream)[1] is not None:
                leave(token_kinds, why)
        if masks.rule is None and isinstance(site, ProductSite):
            try:
                for look in looks:
                    masks.counted(look.lead, site.name, site.stream, site.split, strict=self._padded(site.stream))
            except CollectError as error:
                leave(token_kinds, str(error).split(": ", 1)[1].split(";")[0])

    def activations(self, sites: Sequence[Site], gradient: bool) -> int:
        """Bytes at the peak of a step that keeps everything a pass might, but no sums."""
        recorder = self.recorder
        step = self._prepare(self.first, 0, self.options.examples)
        memory.give_back()
        memory.reset_peak()
        recorder.dry = True
        for site in sites:
            site.collecting = True
        try:
            self.run_step(step, sites, gradient)
        finally:
            recorder.dry = False
            for site in sites:
                site.collecting = False
        return memory.peak() or 0


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
