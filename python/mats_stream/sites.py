"""Sites: places in a model where statistics of parameters are seen, one or more modules each.

A site is told of each call of its modules (`observe`), gets the gradient at that call's output, and adds to the
accumulators of the parameters that it stands for. It never runs the model and never decides what is collected when:
that is [`collector`].
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn

from . import kinds as K
from .accumulate import Accumulator, Gram, Mean, Sketch, Squares
from .errors import CollectError
from .layouts import ConvolutionLayout, Layout, layout_of, per_example, started
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
    # In the first step: which sites are called, with which tensor, in which version of it.
    seen: Optional[List[Tuple["Site", int, int]]] = None
    largest_input: int = 0
    _alive: Dict[int, Tuple[Any, int]] = field(default_factory=dict)
    inputs: Dict["Site", List[Any]] = field(default_factory=dict)

    def note(self, site: "Site", x: Tensor) -> None:
        """Notes a call in the first step. Tensors are told apart without being kept."""
        assert self.seen is not None
        site.calls_a_step += 1
        self.largest_input = max(self.largest_input, x.numel() * 4)
        alive = self._alive.get(id(x))
        if alive is None or alive[0]() is not x:
            alive = (weakref.ref(x), len(self.seen))
            self._alive[id(x)] = alive
        self.seen.append((site, alive[1], x._version))

    @contextmanager
    def paused(self) -> Iterator[None]:
        active, self.active = self.active, False
        try:
            yield
        finally:
            self.active = active


@dataclass
class Target:
    """A parameter and the kinds that are collected of it."""

    name: str
    shape: Tuple[int, ...]
    kinds: Set[str]


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

    def __init__(self, recorder: Recorder, name: str, stream: str, batch_dim: int) -> None:
        self.recorder, self.name, self.stream, self.batch_dim = recorder, name, stream, batch_dim
        self.targets: List[Target] = []
        self.sums: Dict[str, Accumulator] = {}
        self.counts: Dict[str, float] = {}
        self.collecting = False
        self.calls: List[Call] = []
        self.pending = 0
        self.calls_a_step = 0

    def attach(self) -> List[Callable[[], None]]:
        """Installs hooks; returns what removes them."""
        raise NotImplementedError

    def layout_key(self) -> Any:
        """Sites with equal keys and equal inputs have equal input statistics."""
        return self.name

    def accumulators(self, forms: Forms) -> Dict[str, Accumulator]:
        """Keys in the file, with an empty sum each."""
        raise NotImplementedError

    def needs_gradient(self) -> bool:
        return any(kind not in K.INPUT_KINDS for target in self.targets for kind in target.kinds)

    def begin(self, forms: Forms) -> None:
        """Starts collecting in this pass."""
        self.sums = self.accumulators(forms)
        self.counts = {key: 0.0 for key in self.sums}
        self.collecting = True

    def end(self) -> None:
        self.sums, self.counts, self.collecting = {}, {}, False

    def _noted(self, x: Tensor) -> None:
        """After what a call's input is needed for: the end of a forward pass may be here."""
        recorder = self.recorder
        if recorder.remaining is not None and self.collecting:
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

    def split(self, x: Tensor) -> Tensor:
        """`[B, T, n]` or an error."""
        found = per_example(x, self.recorder.examples, self.batch_dim)
        if found is None:
            raise CollectError(
                f"module `{self.name}`: {list(x.shape)} is not split by the batch's {self.recorder.examples} examples, so "
                "their gradients cannot be told apart; exclude it, or give batches of one example"
            )
        return found

    def _add_vectors(self, target: Target, rows: Tensor) -> None:
        """Gradients of a vector parameter, one row `[d]` an example."""
        for kind in target.kinds & set(K.FISHER_KINDS):
            key = f"{target.name}/{kind}"
            if key in self.sums:
                self.sums[key].add(rows)
                self.counts[key] += rows.shape[0]


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

    def __init__(self, recorder: Recorder, name: str, stream: str, batch_dim: int, layout: Layout,
                 weight: Optional[Target], bias: Optional[Target]) -> None:
        super().__init__(recorder, name, stream, batch_dim)
        self.layout, self.weight, self.bias = layout, weight, bias
        self.modules: List[nn.Module] = []
        self.targets = [target for target in (weight, bias) if target is not None]
        # Where another site has the same input: that site. Its sums stand for this one's.
        self.shares: Optional[ProductSite] = None

    def attach(self) -> List[Callable[[], None]]:
        def hook(_module: nn.Module, args: Tuple[Any, ...], output: Any) -> Any:
            if self.recorder.active and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                return self.observe(args[0], output)
            return None

        return [module.register_forward_hook(hook).remove for module in self.modules]

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
        if recorder.seen is not None:
            recorder.note(self, x)
        if not self.collecting:
            return y
        self._same_input(x)
        assert recorder.masks is not None
        kinds = [] if self.shares is not None or recorder.dry else self.input_kinds()
        if kinds:
            with torch.no_grad():
                rows, count = recorder.masks.rows(self.layout.input(x.detach()), self.name, self.stream, self.batch_dim)
                for kind in kinds:
                    key = self.key(kind)
                    self.sums[key].add(rows)
                    self.counts[key] += count
        if self.needs_gradient():
            # The weight's own Fisher needs the input again.
            keep = self.weight is not None and K.FISHER_DIAGONAL in self.weight.kinds
            lead = tuple(self.layout.output(y.detach()).shape[:-1])
            y = self._await(y, Call(x.detach() if keep else None, x._version, lead, first))
        self._noted(x)
        return y

    def _same_input(self, x: Tensor) -> None:
        """What shares sums must share its input in every batch, not only in the first."""
        inputs = self.recorder.inputs
        mine = inputs.setdefault(self, [])
        mine.append(weakref.ref(x))
        if self.shares is not None and self.shares.collecting:
            theirs = inputs.get(self.shares, [])
            if len(mine) > len(theirs) or theirs[len(mine) - 1]() is not x:
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
                    self.counts[key] += masks.rows(empty, self.name, self.stream, self.batch_dim)[1]
                else:
                    rows, count = masks.rows(g, self.name, self.stream, self.batch_dim)
                    self.sums[key].add(rows)
                    self.counts[key] += count
        reached = [(call, self.split(g)) for call, g in zip(calls, gradients) if g is not None] if self._per_example() else []
        if self.weight is not None and K.FISHER_DIAGONAL in self.weight.kinds:
            key = f"{self.weight.name}/{K.FISHER_DIAGONAL}"
            self.counts[key] += self.recorder.examples
            if reached:
                x = torch.cat([self.split(self.layout.input(call.x)) for call, _ in reached if call.x is not None], 1)
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

    def __init__(self, recorder: Recorder, name: str, stream: str, batch_dim: int, module: nn.Module,
                 vectors: Dict[str, Target]) -> None:
        super().__init__(recorder, name, stream, batch_dim)
        self.module, self.vectors = module, vectors
        self.targets = list(vectors.values())
        self.axes: Dict[str, int] = {}
        self.unfit: Optional[str] = None

    def attach(self) -> List[Callable[[], None]]:
        def hook(_module: nn.Module, args: Tuple[Any, ...], output: Any) -> Any:
            if not self.recorder.active:
                return None
            if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
                self.unfit = "it does not take and return one tensor"
                return None
            return self.observe(args[0], output)

        return [self.module.register_forward_hook(hook).remove]

    def accumulators(self, forms: Forms) -> Dict[str, Accumulator]:
        made: Dict[str, Accumulator] = {}
        for target in self.targets:
            made.update(vector_accumulators(target, forms))
        return made

    def observe(self, x: Tensor, y: Tensor) -> Tensor:
        recorder = self.recorder
        if recorder.seen is not None:
            recorder.note(self, x)
            self._check(x, y)
        if not self.collecting:
            return y
        y = self._await(y, Call(x.detach(), x._version, tuple(y.shape), 0))
        self._noted(x)
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

    def _slope(self, attribute: str, x: Tensor) -> Tuple[Tensor, Tensor]:
        """(f(0), J) `[like y]`."""
        parameter = self.module._parameters[attribute]
        assert parameter is not None
        zero = self._with(attribute, torch.zeros_like(parameter), x)
        return zero, self._with(attribute, torch.ones_like(parameter), x) - zero

    def _check(self, x: Tensor, y: Tensor) -> None:
        x = x.detach()
        for attribute, target in self.vectors.items():
            d = 1
            for dim in target.shape:
                d *= dim
            candidates = [axis for axis in (y.dim() - 1, 1) if 0 < axis < y.dim() and y.shape[axis] == d]
            zero, slope = self._slope(attribute, x)
            generator = torch.Generator().manual_seed(d)
            probe = torch.rand(d, generator=generator) + 0.5
            found = self._with(attribute, probe, x)
            size = float(found.abs().max()) + 1e-30 if found.numel() else 1.0
            for axis in candidates:
                shape = [1] * y.dim()
                shape[axis] = d
                expected = zero + slope * probe.to(slope).reshape(shape)
                if float((found - expected).abs().max()) <= self.TOLERANCE * size:
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
                part = self.split(product).sum(1)
                rows = part if rows is None else rows + part
            if rows is None:
                rows = torch.zeros(self.recorder.examples, target.shape[-1])
            self._add_vectors(target, rows)


class EmbeddingSite(Site):
    """A table of rows by index. Only the squares of its gradient, and only where asked for."""

    def __init__(self, recorder: Recorder, name: str, stream: str, batch_dim: int, module: nn.Embedding,
                 target: Target) -> None:
        super().__init__(recorder, name, stream, batch_dim)
        self.module, self.target = module, target
        self.targets = [target]

    def attach(self) -> List[Callable[[], None]]:
        def hook(_module: nn.Module, args: Tuple[Any, ...], output: Any) -> Any:
            return self.observe(args[0], output) if self.recorder.active and args else None

        return [self.module.register_forward_hook(hook).remove]

    def accumulators(self, forms: Forms) -> Dict[str, Accumulator]:
        return {f"{self.target.name}/{K.FISHER_DIAGONAL}": Squares(self.target.shape)}

    def observe(self, ids: Tensor, y: Tensor) -> Tensor:
        recorder = self.recorder
        if recorder.seen is not None:
            recorder.note(self, ids)
        if not self.collecting:
            return y
        y = self._await(y, Call(ids, ids._version, tuple(y.shape[:-1]), 0))
        self._noted(ids)
        return y

    def add_gradients(self, calls: Sequence[Call]) -> None:
        key = f"{self.target.name}/{K.FISHER_DIAGONAL}"
        self.counts[key] += self.recorder.examples
        sums = self.sums[key]
        assert isinstance(sums, Squares)
        parts = [(call.x, self.split(call.gradient)) for call in calls if call.gradient is not None and call.x is not None]
        if not parts:
            return
        ids = torch.cat([self.split(x[..., None])[..., 0] for x, _ in parts], 1)
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

    def __init__(self, recorder: Recorder, name: str, stream: str, batch_dim: int, outer: nn.Module, inner: nn.Module,
                 on_input: bool, target: Target) -> None:
        super().__init__(recorder, name, stream, batch_dim)
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
        recorder = self.recorder
        self._x = None
        if recorder.seen is not None:
            recorder.note(self, unscaled)
        if not self.collecting:
            return scaled
        scaled = self._await(scaled, Call(unscaled.detach(), unscaled._version, tuple(scaled.shape), 0))
        self._noted(unscaled)
        return scaled

    def add_gradients(self, calls: Sequence[Call]) -> None:
        rows = torch.zeros(self.recorder.examples, max(self.target.shape))
        for call in calls:
            if call.gradient is not None and call.x is not None:
                rows = rows.to(call.gradient) + self.split(call.gradient * call.x).sum(1)
        self._add_vectors(self.target, rows)


__all__ = [
    "AffineSite", "AllSeen", "Call", "EmbeddingSite", "Forms", "ProductSite", "Recorder", "ScaleSite", "Site", "Target",
    "layout_of",
]
