"""Finds the sites of a model: which parameters have statistics, where they are seen, what they are called.

Names are those of the checkpoint. Of a PEFT model they are the base model's (`adapters="host"`: statistics of the
weight with its adapter, as `base+adapter` is merged) or the adapter file's (`adapters="own"`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple, Union

from torch import nn

from . import kinds as K
from .errors import CollectError
from .layouts import Layout, layout_of
from .sites import AffineSite, EmbeddingSite, ProductSite, Recorder, ScaleSite, Site, Target
from .tokens import is_encoder_decoder, stream_of

# What is collected of: patterns searched in parameter names, or a function of the name.
Selection = Union[None, str, Sequence[str], Callable[[str], bool]]

_MATRIX_KINDS = {K.INPUT_GRAM, K.INPUT_FACTOR, K.INPUT_MEAN, K.OUTPUT_GRAM, K.OUTPUT_FACTOR, K.FISHER_DIAGONAL}


@dataclass
class Found:
    """All sites of a model, and why other parameters have none."""

    sites: List[Site] = field(default_factory=list)
    left_out: Dict[str, str] = field(default_factory=dict)
    # Parameters without a batched form.
    single: List[Target] = field(default_factory=list)
    # Whether the user named what is wanted: then what cannot be had is an error, no note.
    named: bool = False
    # Modules whose forward is replaced: module, its name, what observes each projection.
    attention: List[Tuple[nn.MultiheadAttention, Dict[str, List[ProductSite]]]] = field(default_factory=list)


def selector(selection: Selection, default: bool) -> Callable[[str], bool]:
    if selection is None:
        return lambda _name: default
    if callable(selection):
        return selection
    patterns = [selection] if isinstance(selection, str) else list(selection)
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise CollectError(f"modules: `{error.pattern!r}` is no regular expression: {error}") from error
    return lambda name: any(pattern.search(name) for pattern in compiled)


class Names:
    """From module and parameter names of the model in memory to those of the file."""

    def __init__(self, model: nn.Module, adapters: str) -> None:
        if adapters not in ("host", "own"):
            raise CollectError(f"adapters: unknown `{adapters}` (expected host or own)")
        self.peft = hasattr(model, "peft_config") and any(
            name.startswith("base_model.model.") for name, _ in model.named_modules())
        self.own = self.peft and adapters == "own"
        self.adapter = "default"
        if self.peft:
            active = getattr(model, "active_adapter", "default")
            active = active() if callable(active) else active
            self.adapter = active[0] if isinstance(active, (list, tuple)) else str(active)

    def file_name(self, name: str) -> str:
        if not self.peft:
            return name
        parts = name.split(".")
        is_adapter = any(part.startswith(("lora_", "ia3_")) for part in parts)
        if "modules_to_save" in parts:
            at = parts.index("modules_to_save")
            parts = parts[:at] + parts[at + 2 :]
        elif is_adapter and self.adapter in parts:
            parts.remove(self.adapter)
        parts = [part for part in parts if part != "base_layer"]
        name = ".".join(parts)
        if not (self.own or is_adapter) and name.startswith("base_model.model."):
            name = name[len("base_model.model.") :]
        return name


def _output_heads(model: nn.Module) -> Set[int]:
    heads = {id(module) for name, module in model.named_modules() if name.split(".")[-1] == "lm_head"}
    get = getattr(model, "get_output_embeddings", None)
    if callable(get):
        try:
            head = get()
        except (NotImplementedError, AttributeError, TypeError):
            head = None
        if isinstance(head, nn.Module):
            heads.add(id(head))
    return heads


class Discovery:
    """One walk over a model. `embeddings`: tables of rows too; `max_side`: larger matrices are left out."""

    def __init__(self, model: nn.Module, recorder: Recorder, kinds: Sequence[str], modules: Selection,
                 exclude: Selection, adapters: str, embeddings: bool, max_side: int) -> None:
        self.model, self.recorder, self.kinds = model, recorder, set(kinds)
        self.include, self.exclude = selector(modules, True), selector(exclude, False)
        self.embeddings, self.max_side = embeddings, max_side
        self.names = Names(model, adapters)
        self.encoder_decoder = is_encoder_decoder(model)
        self.heads = _output_heads(model)
        self.found = Found(named=modules is not None)
        # Of a tied parameter the first name counts, as in the checkpoint.
        self.first_name = {id(p): name for name, p in model.named_parameters()}
        self.users: Dict[int, List[str]] = {}
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.users.setdefault(id(parameter), []).append(name)
        self.tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        self.site_of: Dict[int, ProductSite] = {}
        self.taken: Set[int] = set()

    def run(self) -> Found:
        for name, module in self.model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                self._attention(name, module)
        inner = {id(a.out_proj) for a, _ in self.found.attention}
        if self.names.peft:
            for name, module in self.model.named_modules():
                self._peft_layer(name, module)
        for name, module in self.model.named_modules():
            if id(module) in inner or isinstance(module, nn.MultiheadAttention):
                continue
            if isinstance(module, nn.Embedding):
                self._embedding(name, module)
            elif layout_of(module) is not None:
                self._product(name, module)
            else:
                self._vectors(name, module)
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in self.taken:
                self._single(name, parameter)
        return self.found

    # --- what is wanted of a parameter -------------------------------------------------------------------------------

    def _wanted(self, name: str, parameter: nn.Parameter, allowed: Set[str]) -> Optional[Target]:
        """The parameter as a target with those kinds of `allowed` that are asked for; `None` if there are none."""
        self.taken.add(id(parameter))
        file_name = self.names.file_name(name)
        kinds = self.kinds & allowed
        if not parameter.is_floating_point():
            self.found.left_out[file_name] = f"is stored as {parameter.dtype}"
            return None
        if not kinds or not self.include(file_name) or self.exclude(file_name):
            return None
        parts = name.split(".")
        if self.names.own and not ("modules_to_save" in parts or any(p.startswith(("lora_", "ia3_")) for p in parts)):
            return None
        if "original_module" in parts or (self.names.peft and not self.names.own
                                          and any(p.startswith("lora_") for p in parts)):
            return None
        return Target(file_name, tuple(parameter.shape), kinds, parameter)

    def _vector_kinds(self, parameter: nn.Parameter) -> Set[str]:
        if max(parameter.shape, default=1) != parameter.numel():
            return {K.FISHER_DIAGONAL}
        return {K.FISHER_DIAGONAL} | ({K.FISHER_BLOCK} if parameter.numel() <= self.max_side else set())

    def _at(self, name: str) -> Tuple[Recorder, str, str]:
        module_name = self.names.file_name(name)
        return self.recorder, module_name, stream_of(module_name, self.encoder_decoder)

    def _limit_sides(self, target: Target, layout: Layout, head: bool) -> None:
        """Leaves out Grams nobody could use: of the vocabulary, and of what is beyond `max_side`."""
        for kinds, side in ((K.INPUT_KINDS, layout.in_features), (K.OUTPUT_KINDS, layout.out_features)):
            dropped = target.kinds & (set(kinds) - {K.INPUT_MEAN})
            if kinds is K.OUTPUT_KINDS and head and dropped:
                target.kinds -= dropped
                self.found.left_out[f"{target.name}/{min(dropped)}"] = "an output head: its Gram would be vocabulary²"
            elif side > self.max_side and dropped:
                target.kinds -= dropped
                self.found.left_out[f"{target.name}/{min(dropped)}"] = f"a side of {side} is above max_side {self.max_side}"
        if layout.groups > 1 and target.kinds - {K.FISHER_DIAGONAL}:
            target.kinds &= {K.FISHER_DIAGONAL}
            self.found.left_out[f"{target.name}/Grams"] = "a grouped convolution is no single matrix product"

    # --- kinds of sites ----------------------------------------------------------------------------------------------

    def _product(self, name: str, module: nn.Module) -> None:
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        layout = layout_of(module)
        assert weight is not None and layout is not None
        tied = len(self.users[id(weight)]) > 1
        if tied and bias is not None:
            # Not every module of a tied weight has the same bias.
            self._bias(name, module, layout, bias)
            bias = None
        if id(weight) in self.site_of:
            self.site_of[id(weight)].modules.append(module)
            return
        weight_name = self.first_name[id(weight)]
        if id(weight) in self.taken and id(weight) not in self.tables:
            return
        if id(weight) in self.tables:
            self.taken.add(id(weight))
            file_name = self.names.file_name(weight_name)
            if self.include(file_name) and not self.exclude(file_name) and not self.embeddings:
                self.found.left_out[file_name] = "an embedding (the head is tied to it)"
            target = None
        else:
            target = self._wanted(weight_name, weight, set(_MATRIX_KINDS))
        if target is not None:
            self._limit_sides(target, layout, id(module) in self.heads)
            if not target.kinds:
                target = None
        bias_target = None
        if bias is not None and len(self.users[id(bias)]) > 1:
            self._bias(name, module, layout, bias)
        elif bias is not None:
            bias_target = self._wanted(self.first_name[id(bias)], bias, self._vector_kinds(bias))
        if target is None and bias_target is None:
            return
        site = ProductSite(*self._at(name), layout, target, bias_target)
        site.modules = [module]
        self.site_of[id(weight)] = site
        self.found.sites.append(site)

    def _bias(self, name: str, module: nn.Module, layout: Layout, bias: nn.Parameter) -> None:
        """The bias alone, as a site of its own."""
        if id(bias) in self.site_of:
            self.site_of[id(bias)].modules.append(module)
            return
        target = self._wanted(self.first_name[id(bias)], bias, self._vector_kinds(bias))
        if target is not None:
            site = ProductSite(*self._at(name), layout, None, target)
            site.modules = [module]
            self.site_of[id(bias)] = site
            self.found.sites.append(site)

    def _attention(self, name: str, module: nn.MultiheadAttention) -> None:
        observers: Dict[str, List[ProductSite]] = {}
        prefix = f"{name}." if name else ""
        e = module.embed_dim

        def add(projection: str, weight: Optional[nn.Parameter], bias: Optional[nn.Parameter], rows: int, columns: int,
                see: Sequence[str]) -> None:
            targets: List[Optional[Target]] = []
            for attribute, parameter, allowed in (("weight", weight, set(_MATRIX_KINDS)),
                                                  ("bias", bias, None)):
                if parameter is None or id(parameter) in self.taken:
                    targets.append(None)
                    continue
                allowed = self._vector_kinds(parameter) if allowed is None else allowed
                targets.append(self._wanted(self.first_name[id(parameter)], parameter, allowed))
            layout = Layout(columns, rows)
            if targets[0] is not None:
                self._limit_sides(targets[0], layout, False)
                targets[0] = targets[0] if targets[0].kinds else None
            if targets[0] is None and targets[1] is None:
                return
            recorder, _, stream = self._at(name)
            site = ProductSite(recorder, prefix + projection, stream, layout, targets[0], targets[1])
            self.found.sites.append(site)
            for projection_seen in see:
                observers.setdefault(projection_seen, []).append(site)

        if module.in_proj_weight is not None:
            add("in_proj", module.in_proj_weight, module.in_proj_bias, 3 * e, e, ["in_proj_weight"])
        else:
            for part, columns in (("q", e), ("k", module.kdim), ("v", module.vdim)):
                weight = getattr(module, f"{part}_proj_weight")
                add(f"{part}_proj", weight, None, e, columns, [f"{part}_proj_weight"])
            add("in_proj", None, module.in_proj_bias, 3 * e, e, ["q_proj_weight", "k_proj_weight", "v_proj_weight"])
        out: Any = module.out_proj
        add("out_proj", out.weight, out.bias, e, e, ["out_proj.weight"])
        self.found.attention.append((module, observers))

    def _peft_layer(self, name: str, module: nn.Module) -> None:
        """A layer of PEFT around a base layer: its vectors, and the base weight as the layer as a whole shows it."""
        base = getattr(module, "base_layer", None)
        if not isinstance(base, nn.Module) or base is module:
            return
        scales = getattr(module, "ia3_l", None)
        if scales is not None and self.names.adapter in scales:
            vector = scales[self.names.adapter]
            target = self._wanted(f"{name}.ia3_l.{self.names.adapter}", vector, self._vector_kinds(vector))
            if target is not None:
                on_input = bool(getattr(module, "is_feedforward", False))
                self.found.sites.append(ScaleSite(*self._at(name), module, base, on_input, target))
        layout = layout_of(base)
        weight = base._parameters.get("weight")
        if self.names.own or layout is None or weight is None or id(weight) in self.taken:
            return
        target = self._wanted(self.first_name[id(weight)], weight, set(_MATRIX_KINDS))
        if target is not None:
            self._limit_sides(target, layout, False)
            target = target if target.kinds else None
        bias = base._parameters.get("bias")
        bias_target = None
        if bias is not None and id(bias) not in self.taken:
            bias_target = self._wanted(self.first_name[id(bias)], bias, self._vector_kinds(bias))
        if target is not None or bias_target is not None:
            site = ProductSite(*self._at(name), layout, target, bias_target)
            site.modules = [module]
            self.found.sites.append(site)

    def _embedding(self, name: str, module: nn.Embedding) -> None:
        weight = module._parameters["weight"]
        if weight is None or id(weight) in self.taken:
            return
        target = self._wanted(self.first_name[id(weight)], weight, {K.FISHER_DIAGONAL})
        if not self.embeddings:
            if self.include(self.names.file_name(self.first_name[id(weight)])):
                self.found.left_out.setdefault(self.names.file_name(self.first_name[id(weight)]), "an embedding")
            return
        if target is None:
            return
        if len(self.users[id(weight)]) > 1:
            self.found.single.append(target)
            return
        self.found.sites.append(EmbeddingSite(*self._at(name), module, target))

    def _vectors(self, name: str, module: nn.Module) -> None:
        own = {key: p for key, p in module._parameters.items() if p is not None}
        if not own or isinstance(module, (nn.ParameterList, nn.ParameterDict)):
            return
        if any(max(p.shape, default=1) != p.numel() or len(self.users[id(p)]) > 1 for p in own.values()):
            return  # left to `_single`
        vectors = {}
        for key, parameter in own.items():
            target = self._wanted(self.first_name[id(parameter)], parameter, self._vector_kinds(parameter))
            if target is not None:
                vectors[key] = target
        if vectors:
            self.found.sites.append(AffineSite(*self._at(name), module, vectors))

    def _single(self, name: str, parameter: nn.Parameter) -> None:
        target = self._wanted(name, parameter, self._vector_kinds(parameter))
        if target is not None:
            self.found.single.append(target)
