"""Sites: places in a model where statistics of parameters are seen, one or more modules each.

A site is told of each call of its modules (`observe`), gets the gradient at that call's output, and adds to the
accumulators of the parameters that it stands for. It never runs the model and never decides what is collected when:
that is [`collector`].
"""

from __future__ import annotations

import itertools
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn

from . import kinds as K
from .accumulate import Accumulator, Gram, Mean, Sketch, Squares
from .errors import CollectError
from .layouts import FIRST, SECOND, ConvolutionLayout, Layout, Look, is_split, marks_of, per_example, started
from .tokens import TokenMasks


class AllSeen(Exception):
    """Ends a forward pass after the last module that is of interest; never leaves the collector."""


@dataclass
class Forms:
    """How statistics are stored."""

    packed: bool = True
    rank: Optional[int] = None


@dataclass
class Recorder:
    """What sites share during one step."""

    masks: Optional[TokenMasks] = None
    examples: int = 0
    active: bool = False
    dry: bool = False
    # Calls to come before the forward pass may end, where no gradient is needed.
    remaining: Optional[int] = None
    # In the first step: the calls of each site, in the order of their first ones.
    seen: Optional[Dict["Site", List[Look]]] = None
    largest_input: int = 0
    # Whether any gradient was not 0.
    moved: bool = False
    _alive: Dict[int, Tuple[Any, int]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    # Of this step: inputs of each site, and numbers of rows that an example is known to have.
    inputs: Dict["Site", List[Any]] = field(default_factory=dict)
    lengths: Set[int] = field(default_factory=set)

    def note(self, site: "Site", x: Tensor, lead: Tuple[int, ...]) -> None:
        """Notes a call in the first step. Tensors are told apart without being kept."""
        assert self.seen is not None
        self.largest_input = max(self.largest_input, x.numel() * 4)
        alive = self._alive.get(id(x))
        if alive is None or alive[0]() is not x:
            alive = (weakref.ref(x), next(self._numbers))
            self._alive[id(x)] = alive
        # Only rows that shapes do not tell the order of.
        folded = x.dim() >= 2 and x.shape[0] != self.examples and x.numel() > 0
        exact = x.dtype in (torch.float32, torch.float64) or not x.is_floating_point()
        self.seen.setdefault(site, []).append(
            Look((alive[1], x._version), tuple(x.shape), lead, marks_of(x) if folded else None, 1e-3 if exact else 5e-2,
                 torch.is_grad_enabled()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        active, self.active = self.active, False
        try:
            yield
        finally:
            self.active = active


@dataclass(eq=False)
class Target:
    """A parameter and the kinds that are collected of it."""

    name: str
    shape: Tuple[int, ...]
    kinds: Set[str]
    parameter: nn.Parameter


@dataclass
class Call:
    """One call of a site's module whose gradient is awaited."""

    x: Optional[Tensor]
    version: int
    lead: Tuple[int, ...]
    first: int
    gradient: Optional[Tensor] = None
    seen: bool = False


class Site:
    """Base of all sites. `name` is the module's, for messages and progress."""

    def __init__(self, recorder: Recorder, name: str, stream: str) -> None:
        self.recorder, self.name, self.stream = recorder, name, stream
        # How its input is split by examples, and into how many rows; told by the first batch that has several.
        self.split: Optional[str] = None
        self.lengths: Set[int] = set()
        self.decided = False
        # Its input has the same shape for any number of examples.
        self.same_rows = False
        # Not called in the first step, so that nothing is known of it.
        self.absent = False
        self.odd_call = False
        self.targets: List[Target] = []
        self.sums: Dict[str, Accumulator] = {}
        self.counts: Dict[str, float] = {}
        self.collecting = False
        self.calls: List[Call] = []
        self.pending = 0

    def attach(self) -> List[Callable[[], None]]:
        """Installs hooks; returns what removes them."""
        raise NotImplementedError

    def layout_key(self) -> Any:
        """Sites with equal keys and equal inputs have equal input statistics."""
        return self.name

    def accumulators(self, forms: Forms) -> Dict[str, Accumulator]:
        """Keys in the file, with an empty sum each."""
        raise NotImplementedError

    def keep_targets(self) -> None:
        """Forgets targets that have no kinds any more."""
        self.targets = [target for target in self.targets if target.kinds]

    def needs_gradient(self) -> bool:
        return any(kind not in K.INPUT_KINDS for target in self.targets for kind in target.kinds)

    def begin(self, forms: Forms) -> None:
        """Starts collecting in this pass."""
        self.sums = self.accumulators(forms)
        self.counts = {key: 0.0 for key in self.sums}
        self.collecting = True

    def end(self) -> None:
        self.sums, self.counts, self.collecting = {}, {}, False

    def _called(self, x: Tensor, lead: Tuple[int, ...]) -> bool:
        """Notes a call; whether it is collected."""
        recorder = self.recorder
        if recorder.seen is not None:
            recorder.note(self, x, lead)
            return False
        if self.absent:
            raise CollectError(
                f"module `{self.name}` is not called in the batches looked at first, and is called later; exclude it, or "
                "give the batches as a list or a function, all of which are looked at"
            )
        recorder.inputs.setdefault(self, []).append(weakref.ref(x))
        if self.split in (FIRST, SECOND) and x.dim() >= 3:
            recorder.lengths.add(x.shape[1 if self.split == FIRST else 0])
        return self.collecting

    def _noted(self) -> None:
        """After what a call's input is needed for: the end of a forward pass may be here."""
        recorder = self.recorder
        if recorder.remaining is not None:
            recorder.remaining -= 1
            if recorder.remaining == 0:
                raise AllSeen

    def _await(self, y: Tensor, call: Call) -> Tensor:
        """Registers `call` for the gradient at `y`; returns what the model goes on with."""
        if not torch.is_grad_enabled() or not y.is_floating_point():
            call.seen = True
            self.calls.append(call)
            return y
        y = started(y)
        self.calls.append(call)
        self.pending += 1

        def arrived(gradient: Tensor) -> None:
            # Under retained graphs a hook could fire twice; the collector never retains one.
            call.gradient, call.seen = gradient.detach(), True
            self.recorder.moved = self.recorder.moved or bool(gradient.any())
            self.pending -= 1
            if self.pending == 0:
                self.finish_step()

        y.register_hook(arrived)
        return y

    def finish_step(self) -> None:
        """Adds what this step's calls amount to. Called when all gradients are there, or the step is over."""
        calls, self.calls, self.pending = self.calls, [], 0
        if not calls or self.recorder.dry:
            return
        for call in calls:
            if call.x is not None and call.x._version != call.version:
                raise CollectError(f"module `{self.name}`: the model changes its input in place after the call; exclude it")
        with torch.no_grad():
            self.add_gradients(calls)

    def add_gradients(self, calls: Sequence[Call]) -> None:
        raise NotImplementedError

    def by_example(self, x: Tensor) -> Tensor:
        """`[B, T, n]` or an error."""
        examples = self.recorder.examples
        if not is_split(x.shape, examples, self.split, self.lengths | self.recorder.lengths):
            raise CollectError(
                f"module `{self.name}`: {list(x.shape)} is not split by the batch's {examples} examples, so "
                "their gradients cannot be told apart; exclude it, or give batches of one example"
            )
        return per_example(x, examples, self.split)

    def _add_vectors(self, target: Target, rows: Tensor) -> None:
        """Gradients of a vector parameter, one row `[d]` an example."""
        for kind in target.kinds & set(K.FISHER_KINDS):
            key = f"{target.name}/{kind}"
            if key in self.sums:
                self.sums[key].add(rows)


def _after_call(module: nn.Module, seen: Callable[[Tuple[Any, ...], Dict[str, Any], Any], Any]) -> Callable[[], None]:
    """Has `seen(args, kwargs, output)` called after the module's forward; returns what removes it."""
    try:
        return module.register_forward_hook(lambda _m, args, kwargs, y: seen(args, kwargs, y), with_kwargs=True).remove
    except TypeError:  # torch 1.13 shows no keywords
        return module.register_forward_hook(lambda _m, args, y: seen(args, {}, y)).remove


def _input_of(args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Optional[Tensor]:
    """The first argument, or the one tensor that is given by keyword."""
    if args:
        return args[0] if isinstance(args[0], Tensor) else None
    tensors = [value for value in kwargs.values() if isinstance(value, Tensor)]
    return tensors[0] if len(tensors) == 1 else None


def vector_accumulators(target: Target, forms: Forms) -> Dict[str, Accumulator]:
    """Sums of a vector parameter's Fisher."""
    made: Dict[str, Accumulator] = {}
    if K.FISHER_DIAGONAL in target.kinds:
        made[f"{target.name}/{K.FISHER_DIAGONAL}"] = Squares(target.shape)
    if K.FISHER_BLOCK in target.kinds:
        elements = 1
        for dim in target.shape:
            elements *= dim
        made[f"{target.name}/{K.FISHER_BLOCK}"] = Gram(elements, forms.packed)
    return made


class ProductSite(Site):
    """Weights that multiply rows: linear layers, Conv1D, convolutions, packed projections; and their biases.

    Tied weights are one site with several modules: each call adds rows, and gradients of one example are summed over
    all calls before they are squared.
    """

    def __init__(self, recorder: Recorder, name: str, stream: str, layout: Layout, weight: Optional[Target],
                 bias: Optional[Target]) -> None:
        super().__init__(recorder, name, stream)
        self.layout, self.weight, self.bias = layout, weight, bias
        self.modules: List[nn.Module] = []
        self.targets = [target for target in (weight, bias) if target is not None]
        # Where another site has the same input: that site. Its sums stand for this one's.
        self.shares: Optional[ProductSite] = None

    def attach(self) -> List[Callable[[], None]]:
        def seen(args: Tuple[Any, ...], kwargs: Dict[str, Any], output: Any) -> Any:
            if not self.recorder.active:
                return None
            x = _input_of(args, kwargs)
            # Some makes of linear layers return more than their product.
            several = type(output) is tuple and len(output) > 0
            y = output[0] if several else output
            if x is None or not isinstance(y, Tensor):
                self.odd_call = True
                if self.collecting:
                    raise CollectError(f"module `{self.name}` is called with something else than one tensor; exclude it")
                return None
            y = self.observe(x, y)
            return (y, *output[1:]) if several else y

        return [_after_call(module, seen) for module in self.modules]

    def keep_targets(self) -> None:
        super().keep_targets()
        self.weight = self.weight if self.weight in self.targets else None
        self.bias = self.bias if self.bias in self.targets else None

    # In the file, the statistic of a weight's rows is `output_*` and that of its columns `input_*`, for a weight
    # [out, in]. A weight stored [in, out] has inputs as rows: there the names stand for the same sides of what is stored.
    def stored(self, kind: str) -> str:
        if self.layout.transposed:
            return {
                K.INPUT_GRAM: K.OUTPUT_GRAM,
                K.OUTPUT_GRAM: K.INPUT_GRAM,
                K.INPUT_FACTOR: K.OUTPUT_FACTOR,
                K.OUTPUT_FACTOR: K.INPUT_FACTOR,
            }.get(kind, kind)
        return kind

    def key(self, kind: str) -> str:
        assert self.weight is not None
        return f"{self.weight.name}/{self.stored(kind)}"

    def layout_key(self) -> Any:
        layout = self.layout
        if isinstance(layout, ConvolutionLayout):
            module = layout.module
            return ("conv", module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode)
        return ("product", layout.transposed)

    def input_kinds(self) -> List[str]:
        return [] if self.weight is None else [kind for kind in K.INPUT_KINDS if kind in self.weight.kinds]

    def aliases(self) -> Dict[str, str]:
        """Keys that another site's sums stand for."""
        if self.shares is None:
            return {}
        return {self.key(kind): self.shares.key(kind) for kind in self.input_kinds()}

    def accumulators(self, forms: Forms) -> Dict[str, Accumulator]:
        made: Dict[str, Accumulator] = {}
        if self.weight is not None:
            for kind in K.KINDS:
                if kind not in self.weight.kinds or (kind in K.INPUT_KINDS and self.shares is not None):
                    continue
                n = self.layout.in_features if kind in K.INPUT_KINDS else self.layout.out_features
                if kind in (K.INPUT_GRAM, K.OUTPUT_GRAM):
                    made[self.key(kind)] = Gram(n, forms.packed)
                elif kind in (K.INPUT_FACTOR, K.OUTPUT_FACTOR):
                    if forms.rank is None:
                        raise CollectError(f"kinds: `{kind}` needs a rank")
                    made[self.key(kind)] = Sketch(n, forms.rank)
                elif kind == K.INPUT_MEAN:
                    made[self.key(kind)] = Mean(n)
                elif kind == K.FISHER_DIAGONAL:
                    made[self.key(kind)] = Squares(self.weight.shape)
        if self.bias is not None:
            made.update(vector_accumulators(self.bias, forms))
        return made

    def observe(self, x: Tensor, y: Tensor, first: int = 0) -> Tensor:
        """One call: rows of `x` times the weight's output rows from `first` on are `y`."""
        recorder = self.recorder
        lead = tuple(self.layout.output(y.detach()).shape[:-1])
        collected = self._called(x, lead)
        if recorder.seen is None:
            self._same_input(x)
        if not collected:
            return y
        assert recorder.masks is not None
        kinds = [] if self.shares is not None or recorder.dry else self.input_kinds()
        if kinds:
            with torch.no_grad():
                whole = self.layout.input(x.detach())
                rows, count = recorder.masks.rows(whole, self.name, self.stream, self.split)
                for kind in kinds:
                    key = self.key(kind)
                    if kind == K.INPUT_MEAN and recorder.masks.by_example:
                        self.sums[key].add(recorder.masks.rows(whole, self.name, self.stream, self.split, root=False)[0])
                    else:
                        self.sums[key].add(rows)
                    self.counts[key] += count
        if self.needs_gradient():
            # The weight's own Fisher needs the input again.
            keep = self.weight is not None and K.FISHER_DIAGONAL in self.weight.kinds
            y = self._await(y, Call(x.detach() if keep else None, x._version, lead, first))
        self._noted()
        return y

    def _same_input(self, x: Tensor) -> None:
        """What shares sums must share its input in every batch, not only in the first."""
        if self.shares is not None:
            theirs = self.recorder.inputs.get(self.shares, [])
            at = len(self.recorder.inputs[self]) - 1
            if at >= len(theirs) or theirs[at]() is not x:
                self.other_input()

    def other_input(self) -> None:
        assert self.shares is not None
        raise CollectError(
            f"module `{self.name}` had the input of `{self.shares.name}` in the first batch and has another one now; "
            "collect with share_inputs=False (--no-share)"
        )

    def add_gradients(self, calls: Sequence[Call]) -> None:
        masks = self.recorder.masks
        assert masks is not None
        out = self.layout.out_features
        gradients: List[Optional[Tensor]] = []
        for call in calls:
            g = None if call.gradient is None else self.layout.output(call.gradient)
            if g is not None and g.shape[-1] != out:
                # A part of a packed projection: the other rows of the weight have no gradient from this call.
                whole = g.new_zeros(*g.shape[:-1], out)
                whole[..., call.first : call.first + g.shape[-1]] = g
                g = whole
            gradients.append(g)
            for kind in K.OUTPUT_KINDS:
                if self.weight is None or kind not in self.weight.kinds:
                    continue
                key = self.key(kind)
                if g is None:  # it does not reach the loss: zeros, that count
                    empty = torch.zeros(1).expand(*call.lead, 1)
                    self.counts[key] += masks.rows(empty, self.name, self.stream, self.split)[1]
                else:
                    rows, count = masks.rows(g, self.name, self.stream, self.split)
                    self.sums[key].add(rows)
                    self.counts[key] += count
        reached = []
        if self._per_example():
            reached = [(call, self.by_example(g)) for call, g in zip(calls, gradients) if g is not None]
        if self.weight is not None and K.FISHER_DIAGONAL in self.weight.kinds:
            key = f"{self.weight.name}/{K.FISHER_DIAGONAL}"
            if reached:
                x = torch.cat([self.by_example(self.layout.input(call.x)) for call, _ in reached if call.x is not None], 1)
                g = torch.cat([gradient for _, gradient in reached], 1)
                self._add_squares(self.sums[key], x, g)
        if self.bias is not None:
            rows = sum((g.sum(1) for _, g in reached), torch.zeros(self.recorder.examples, out))
            self._add_vectors(self.bias, rows)

    def _per_example(self) -> bool:
        return any(kind in target.kinds for target in self.targets for kind in K.FISHER_KINDS)

    def _add_squares(self, sums: Accumulator, x: Tensor, g: Tensor) -> None:
        assert isinstance(sums, Squares) and self.weight is not None
        groups = self.layout.groups
        if groups == 1:
            if self.layout.transposed:
                sums.add_products(x, g)
            else:
                sums.add_products(g, x)
            return
        total = sums.sum(g).view(groups, self.layout.out_features // groups, self.layout.in_features)
        x = x.reshape(*x.shape[:2], groups, -1)
        g = g.reshape(*g.shape[:2], groups, -1)
        for one_x, one_g in zip(x, g):
            total += torch.einsum("tgo,tgi->goi", one_g.to(total.dtype), one_x.to(total.dtype)).square_()


class AffineSite(Site):
    """Modules that are affine in vectors of their own, elementwise: `y = f(0) + w ∘ J(x)`.

    Norms of every make, scales, biases. J is found by calling the module's own forward with w = 1 and w = 0, so no
    formula of a norm is assumed; that it is affine and elementwise is checked in the first step with random w.
    """

    # f32 rounding of y and of the difference, generously.
    TOLERANCE = 1e-4

    def __init__(self, recorder: Recorder, name: str, stream: str, module: nn.Module, vectors: Dict[str, Target]) -> None:
        super().__init__(recorder, name, stream)
        self.module, self.vectors = module, vectors
        self.targets = list(vectors.values())
        self.axes: Dict[str, int] = {}
        self.unfit: Optional[str] = None

    def attach(self) -> List[Callable[[], None]]:
        def seen(args: Tuple[Any, ...], kwargs: Dict[str, Any], output: Any) -> Any:
            if not self.recorder.active:
                return None
            # Of flags the first step checks that they change nothing.
            given = [*args, *(value for value in kwargs.values() if isinstance(value, Tensor))]
            if len(given) != 1 or not isinstance(given[0], Tensor) or not isinstance(output, Tensor):
                # Its output depends on more than what it would be called with again, such as a gate.
                if self.collecting:
                    raise CollectError(f"module `{self.name}` took one tensor in the first batch and takes more now; exclude it")
                self.unfit = "it does not take and return one tensor"
                return None
            return self.observe(given[0], output)

        return [_after_call(self.module, seen)]

    def accumulators(self, forms: Forms) -> Dict[str, Accumulator]:
        made: Dict[str, Accumulator] = {}
        for target in self.targets:
            made.update(vector_accumulators(target, forms))
        return made

    def keep_targets(self) -> None:
        super().keep_targets()
        self.vectors = {key: target for key, target in self.vectors.items() if target in self.targets}

    def observe(self, x: Tensor, y: Tensor) -> Tensor:
        if self.recorder.seen is not None:
            self._check(x, y)
        if not self._called(x, tuple(x.shape[:-1])):
            return y
        y = self._await(y, Call(x.detach(), x._version, tuple(y.shape), 0))
        self._noted()
        return y

    def _with(self, attribute: str, value: Tensor, x: Tensor) -> Tensor:
        parameter = self.module._parameters[attribute]
        assert parameter is not None
        with torch.no_grad(), self.recorder.paused():
            self.module._parameters[attribute] = value.to(parameter).reshape(parameter.shape)  # type: ignore[assignment]
            try:
                return self.module(x)
            finally:
                self.module._parameters[attribute] = parameter

    def _call(self, x: Tensor) -> Tensor:
        with torch.no_grad(), self.recorder.paused():
            return self.module(x)

    def _close(self, a: Tensor, b: Tensor, size_of: Tensor) -> bool:
        size = float(size_of.abs().max()) + 1e-30 if size_of.numel() else 1.0
        return a.numel() == 0 or float((a - b).abs().max()) <= self.TOLERANCE * size

    def _slope(self, attribute: str, x: Tensor) -> Tuple[Tensor, Tensor]:
        """(f(0), J) `[like y]`."""
        parameter = self.module._parameters[attribute]
        assert parameter is not None
        zero = self._with(attribute, torch.zeros_like(parameter), x)
        return zero, self._with(attribute, torch.ones_like(parameter), x) - zero

    def _check(self, x: Tensor, y: Tensor) -> None:
        x, y = x.detach(), y.detach()
        try:
            again = self._call(x)
        except Exception as error:  # of the module's own: torch 1.13 hides that it needs keywords
            self.unfit = f"it cannot be called with its input alone ({type(error).__name__})"
            return
        # What it gave out in the model is what is differentiated: keywords or a state may take part in it.
        if again.shape != y.shape or not self._close(again, y, y):
            self.unfit = "its output is not that of its input alone"
            return
        for attribute, target in self.vectors.items():
            d = 1
            for dim in target.shape:
                d *= dim
            candidates = [axis for axis in (y.dim() - 1, 1) if 0 < axis < y.dim() and y.shape[axis] == d]
            zero, slope = self._slope(attribute, x)
            generator = torch.Generator().manual_seed(d)
            probe = torch.rand(d, generator=generator) + 0.5
            found = self._with(attribute, probe, x)
            for axis in candidates:
                shape = [1] * y.dim()
                shape[axis] = d
                expected = zero + slope * probe.to(slope).reshape(shape)
                if self._close(found, expected, found):
                    self.axes[attribute] = axis
                    break
            else:
                self.unfit = f"its output is not affine in `{attribute}`, element by element"
                return

    def add_gradients(self, calls: Sequence[Call]) -> None:
        for attribute, target in self.vectors.items():
            rows: Optional[Tensor] = None
            for call in calls:
                if call.gradient is None or call.x is None:
                    continue
                product = call.gradient * self._slope(attribute, call.x)[1]
                axis = self.axes[attribute]
                if axis != product.dim() - 1:
                    product = product.movedim(axis, -1)
                part = self.by_example(product).sum(1)
                rows = part if rows is None else rows + part
            if rows is None:
                rows = torch.zeros(self.recorder.examples, target.shape[-1])
            self._add_vectors(target, rows)


class EmbeddingSite(Site):
    """A table of rows by index. Only the squares of its gradient, and only where asked for."""

    def __init__(self, recorder: Recorder, name: str, stream: str, module: nn.Embedding, target: Target) -> None:
        super().__init__(recorder, name, stream)
        self.module, self.target = module, target
        self.targets = [target]

    def attach(self) -> List[Callable[[], None]]:
        def seen(args: Tuple[Any, ...], kwargs: Dict[str, Any], output: Any) -> Any:
            ids = _input_of(args, kwargs)
            return self.observe(ids, output) if self.recorder.active and ids is not None else None

        return [_after_call(self.module, seen)]

    def accumulators(self, forms: Forms) -> Dict[str, Accumulator]:
        return {f"{self.target.name}/{K.FISHER_DIAGONAL}": Squares(self.target.shape)}

    def observe(self, ids: Tensor, y: Tensor) -> Tensor:
        if not self._called(ids[..., None], tuple(ids.shape)):
            return y
        y = self._await(y, Call(ids, ids._version, tuple(y.shape[:-1]), 0))
        self._noted()
        return y

    def add_gradients(self, calls: Sequence[Call]) -> None:
        key = f"{self.target.name}/{K.FISHER_DIAGONAL}"
        sums = self.sums[key]
        assert isinstance(sums, Squares)
        parts = [(call.x, self.by_example(call.gradient)) for call in calls
                 if call.gradient is not None and call.x is not None]
        if not parts:
            return
        ids = torch.cat([self.by_example(x[..., None])[..., 0] for x, _ in parts], 1)
        gradients = torch.cat([g for _, g in parts], 1)
        total = sums.sum(gradients)
        for one, g in zip(ids, gradients):
            rows, place = one.unique(return_inverse=True)
            sum_of_row = torch.zeros(len(rows), g.shape[-1], dtype=total.dtype, device=g.device)
            sum_of_row.index_add_(0, place, g.to(total.dtype))
            padding = self.module.padding_idx
            if padding is not None:
                sum_of_row[rows == padding] = 0  # torch gives that row no gradient
            total.index_add_(0, rows, sum_of_row.square_())


class ScaleSite(Site):
    """(IA)³ of PEFT: a vector that scales a layer's output, or (feed-forward) its input."""

    def __init__(self, recorder: Recorder, name: str, stream: str, outer: nn.Module, inner: nn.Module, on_input: bool,
                 target: Target) -> None:
        super().__init__(recorder, name, stream)
        self.outer, self.inner, self.on_input, self.target = outer, inner, on_input, target
        self.targets = [target]
        self._x: Optional[Tensor] = None

    def attach(self) -> List[Callable[[], None]]:
        def outer_before(_module: nn.Module, args: Tuple[Any, ...]) -> None:
            if self.recorder.active and args:
                self._x = args[0]

        def inner_before(_module: nn.Module, args: Tuple[Any, ...]) -> Any:
            if self.recorder.active and self._x is not None:
                return (self.observe(self._x, args[0]), *args[1:])
            return None

        def inner_after(_module: nn.Module, _args: Tuple[Any, ...], output: Tensor) -> None:
            if self.recorder.active:
                self._x = output

        def outer_after(_module: nn.Module, _args: Tuple[Any, ...], output: Tensor) -> Any:
            return self.observe(self._x, output) if self.recorder.active and self._x is not None else None

        if self.on_input:
            handles = [self.outer.register_forward_pre_hook(outer_before), self.inner.register_forward_pre_hook(inner_before)]
        else:
            handles = [self.inner.register_forward_hook(inner_after), self.outer.register_forward_hook(outer_after)]
        return [handle.remove for handle in handles]

    def accumulators(self, forms: Forms) -> Dict[str, Accumulator]:
        return vector_accumulators(self.target, forms)

    def observe(self, unscaled: Tensor, scaled: Tensor) -> Tensor:
        self._x = None
        if not self._called(unscaled, tuple(unscaled.shape[:-1])):
            return scaled
        scaled = self._await(scaled, Call(unscaled.detach(), unscaled._version, tuple(scaled.shape), 0))
        self._noted()
        return scaled

    def add_gradients(self, calls: Sequence[Call]) -> None:
        rows = torch.zeros(self.recorder.examples, max(self.target.shape))
        for call in calls:
            if call.gradient is not None and call.x is not None:
                rows = rows.to(call.gradient) + self.by_example(call.gradient * call.x).sum(1)
        self._add_vectors(self.target, rows)

