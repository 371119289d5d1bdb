"""Skip experts in an uncompiled model: `modes_fx.attach(model, profile)`.

transformers runs the experts of every family that it decorates through one table of implementations
(`ExpertsInterface`). `attach` adds one, "modes_fx", that calls `modes_fx::masked_moe`, and points the model's
experts modules at it. What the passes match in a compiled graph is matched here in each module's own stock
implementation, traced alone, and proved in the same way.
"""

import copy
import functools
import itertools
import os
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from modes_fx import call_modality as calls
from modes_fx.backend import raise_recompile_limit
from modes_fx.blocks import Block, find_blocks, is_experts, unwrap
from modes_fx.call_rows import argument, enclosing_modules, find_rows, is_inside, with_argument
from modes_fx.decisions import count_pairs, decide
from modes_fx.embeddings import EmbeddingTable
from modes_fx.errors import ModesError, RewriteError
from modes_fx.kernels.masked_moe import keep_mask, masked_moe
from modes_fx.passes.find_blocks import Declined
from modes_fx.passes.find_blocks import find_blocks as find_experts
from modes_fx.passes.prove import prove
from modes_fx.passes.skip_experts import build, constants_of
from modes_fx.passes.unit import Unit, is_token_embedding
from modes_fx.profile import Layer, Profile, fingerprint
from modes_fx.skipping import Counts
from modes_fx.thresholds import Thresholds

IMPLEMENTATION = "modes_fx"
# Where an experts module keeps its constants; no tensor, so that no state dict holds it.
_CONSTANTS = "_modes_fx"
# Enough tokens for a trace whose sizes do not coincide with one another.
_TRACED_TOKENS = 19
_numbers = itertools.count()


class _Skipping(NamedTuple):
    """What one experts module passes to the op.

    Numbers are kept as text: floats that Dynamo finds on a module become inputs of the graph as soon as two
    modules share a frame, and the op takes literals.
    """

    model: int
    name: str
    layer: str
    constants: tuple[str, str, str, str]
    parameters: tuple[str | None, str | None, str | None, str | None]
    activation: str
    interleaved: bool
    is_transposed: bool
    weights_on_input: bool
    alphas: tuple[str, str]
    thresholds: Tensor | None
    counts: Tensor | None


def attach(
    model: nn.Module,
    profile: Profile | str | os.PathLike[str],
    *,
    strict: bool = True,
    adjustable: bool | tuple[float, float] = False,
    counting: bool = False,
) -> "Attached":
    """Make a model skip the experts that the profile drops, compiled or not.

    Call the module that was attached, with `input_ids`; a call whose tokens are of unknown modality skips
    nothing, and a warning says so once. The model can be compiled afterwards with any backend, and exported.
    Its configuration, weights and classes are left alone. It runs for inference; no gradients are computed.

    Args:
        model: A transformers model whose experts run through `ExpertsInterface`; a compiled one is unwrapped.
        profile: A `Profile`, or the path of one.
        strict: Raise `RewriteError` for experts that cannot be replaced; False warns and leaves them as they
            are.
        adjustable, counting: As of `modes_fx.backend`. Counts of calls that run at the same time in several
            threads may lose some.
    Returns:
        What undoes it: `.detach()`, or the end of a `with` block.
    Raises:
        ProfileError: The profile cannot be read, or was made for another model.
        RewriteError: See `strict`.
        ModesError: No MoE block, or the model is attached already.
    """
    return Attached(model, profile, strict=strict, adjustable=adjustable, counting=counting)


class Attached:
    """What `attach` returns.

    Attributes:
        layers: Names of the profile's layers that skip, in layer order.
        declined: Why others do not, by module name.
        thresholds: What moves them, with `adjustable`, or None.
        counting: Whether `counts()` counts.
    """

    def __init__(
        self,
        model: nn.Module,
        profile: Profile | str | os.PathLike[str],
        *,
        strict: bool = True,
        adjustable: bool | tuple[float, float] = False,
        counting: bool = False,
    ) -> None:
        if not isinstance(profile, Profile):
            profile = Profile.load(profile)
        model = unwrap(model)
        profile.check_model(model)
        self.model = model
        self.profile = profile
        self.layers: tuple[str, ...] = ()
        self.declined: dict[str, str] = {}
        self.thresholds = Thresholds(profile, adjustable) if adjustable else None
        self.counting = counting
        self._counts: dict[str, list[Tensor]] = {}
        self._number = next(_numbers)
        self._undo: list[Callable[[], Any]] = []
        names = {module: name for name, module in model.named_modules()}
        decoder = _embeds_tokens(model, names)
        found: dict[nn.Module, _Skipping] = {}
        for block in find_blocks(model):
            name = names[block.experts]
            if hasattr(block.experts, _CONSTANTS):
                raise ModesError(f"{name} is attached already; call detach() of what attach returned first.")
            try:
                if not name.startswith(decoder):
                    raise _Refused("it may be given other tokens than those of the call")
                found[block.experts] = self._match(block, name)
            except _Refused as reason:
                self._decline(name, str(reason), strict)
        self.layers = tuple(skipping.layer for skipping in found.values())
        _register()
        raise_recompile_limit(len(found))
        self._switch(found)
        self._watch([skipping.name for skipping in found.values()])

    def counts(self) -> Counts:
        """As of `Backend.counts`, of all the profile's layers."""
        total = Counts.zero(len(self.profile.layers))
        for index, layer in enumerate(self.profile.layers):
            for each in self._counts.get(layer.name, ()):
                total.pairs[index] += each[0].cpu()
                total.dropped[index] += each[1].cpu()
        return total

    def detach(self) -> None:
        """Leave the model as it was before; a second time does nothing."""
        while self._undo:
            self._undo.pop()()
        calls.forget(self._number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _decline(self, name: str, reason: str, strict: bool) -> None:
        message = f"{name} cannot skip: {reason}."
        if strict:
            raise RewriteError(f"{message} Pass strict=False to leave it as it is.")
        warnings.warn(f"{message} It runs as it is.", stacklevel=4)
        self.declined[name] = reason

    def _match(self, block: Block, name: str) -> _Skipping:
        layer = self.profile.layer_for(fingerprint(block.router_weight))
        assert layer is not None
        if block.dispatch != "slots" or not is_experts(block.experts):
            raise _Refused("transformers does not run it through its ExpertsInterface")
        if (layer.num_experts, layer.top_k) != (block.num_experts, block.top_k):
            raise _Refused(
                f"the profile has {layer.num_experts} experts, top {layer.top_k}, "
                f"the model {block.num_experts}, top {block.top_k}"
            )
        arguments, parameters = _rewritten(block, layer, self.profile, self.thresholds)
        device = next(block.experts.parameters()).device
        counts = torch.zeros(2, 3, dtype=torch.int64, device=device) if self.counting else None
        if counts is not None:
            self._counts.setdefault(layer.name, []).append(counts)
        return _Skipping(
            model=self._number,
            name=name,
            layer=layer.name,
            constants=tuple(repr(arguments[key]) for key in _FLOATS),  # type: ignore[arg-type]
            parameters=parameters,
            alphas=(repr(layer.weight_alpha_text), repr(layer.weight_alpha_vision)),
            thresholds=None if self.thresholds is None else self.thresholds.on(device),
            counts=counts,
            **{key: arguments[key] for key in _TRAITS},
        )

    def _switch(self, found: dict[nn.Module, _Skipping]) -> None:
        """Point the experts at the implementation: with a configuration of their own, since models can share
        one, and a model that is not attached must not notice."""
        copies: dict[int, Any] = {}
        for experts, skipping in found.items():
            config: Any = experts.config
            if id(config) not in copies:
                copies[id(config)] = copy.copy(config)
                # As a dict, which leaves sub-configurations alone: the copy shares them.
                copies[id(config)]._experts_implementation = {"": IMPLEMENTATION}
            setattr(experts, _CONSTANTS, skipping)
            experts.config = copies[id(config)]
            self._undo.append(functools.partial(_restore, experts, config))

    def _watch(self, experts: list[str]) -> None:
        """Note each call's modality, and the inputs of modules around experts that may see part of it."""
        model, number = self.model, self._number
        table = None
        weight = getattr(_embedding(model), "weight", None)
        if isinstance(weight, Tensor) and is_token_embedding(self.profile, weight):
            table = calls.tables[number] = EmbeddingTable(weight, self.profile)
        begin = _begin_hook(self.profile, number, table)
        handles = [
            model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True),
            model.register_forward_hook(_end_hook(number), always_call=True),
        ]
        for name, module in enclosing_modules(model, experts).items():
            splits = sum(is_inside(each, name) for each in experts) > 1
            hook = _enter_hook(number, name, splits)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        self._undo += [handle.remove for handle in handles]


def _embeds_tokens(model: nn.Module, names: dict[nn.Module, str]) -> str:
    """Prefix of the names of the modules that are given the call's tokens: those beside the embedding."""
    embedding = _embedding(model)
    holder = "" if embedding is None else names[embedding].rpartition(".")[0]
    return f"{holder}." if holder else ""


def _embedding(model: nn.Module) -> nn.Module | None:
    """The module that embeds token ids; None where the model has none of its own."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        return None if find is None else find()
    except NotImplementedError:
        return None


class _Refused(Exception):
    """Experts that cannot be replaced; the message says why."""


def _restore(experts: nn.Module, config: Any) -> None:
    delattr(experts, _CONSTANTS)
    experts.config = config


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ExpertsInterface.register(IMPLEMENTATION, _experts_forward)


def _experts_forward(experts: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The implementation, `[T, H]`, `[T, K]`, `[T, K]` -> `[T, H]`."""
    skipping: _Skipping = getattr(experts, _CONSTANTS)
    alpha_text, alpha_vision, tau_text, tau_vision = skipping.constants
    gate_up, down, gate_up_bias, down_bias = skipping.parameters
    weight: Tensor = getattr(experts, gate_up)  # type: ignore[arg-type]
    modality = calls.call_modality(hidden, skipping.model, skipping.name)
    scores, op_modality = weights, modality
    if skipping.thresholds is not None:
        # The constants are those for decisions then, `DECIDED`.
        scores = decide(weights, modality, skipping.thresholds, *map(float, skipping.alphas))
        op_modality = None
    if skipping.counts is not None:
        rule = map(float, skipping.constants)
        keep = keep_mask(scores, op_modality, *rule)
        skipping.counts.add_(count_pairs([keep], modality, [keep.shape[1]])[0])
    out: Tensor = masked_moe(
        hidden.to(weight.dtype),
        scores,
        weights,
        index,
        op_modality,
        weight,
        getattr(experts, down),  # type: ignore[arg-type]
        None if gate_up_bias is None else getattr(experts, gate_up_bias),
        None if down_bias is None else getattr(experts, down_bias),
        alpha_text=float(alpha_text),
        alpha_vision=float(alpha_vision),
        tau_text=float(tau_text),
        tau_vision=float(tau_vision),
        activation=skipping.activation,
        interleaved=skipping.interleaved,
        is_transposed=skipping.is_transposed,
        weights_on_input=skipping.weights_on_input,
        layer=skipping.layer,
    )
    return out.to(hidden.dtype)


_FLOATS = ("alpha_text", "alpha_vision", "tau_text", "tau_vision")
_TRAITS = ("activation", "interleaved", "is_transposed", "weights_on_input")
_PARAMETERS = (5, 6, 7, 8)  # of the op: gate_up, down and their biases


class _Stock(nn.Module):
    """One experts module in transformers' own implementation, for tracing."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(
        self, hidden: Tensor, index: Tensor, weights: Tensor, modality: Tensor, thresholds: Tensor
    ) -> Tensor:
        from transformers.integrations.moe import grouped_mm_experts_forward

        return grouped_mm_experts_forward(self.experts, hidden, index, weights)


def _rewritten(
    block: Block, layer: Layer, profile: Profile, thresholds: Thresholds | None
) -> tuple[dict[str, Any], tuple[str | None, str | None, str | None, str | None]]:
    """What the passes make of a block's experts: the constants of the op, and the names of its parameters."""
    gm, names = _trace(block)
    found = find_experts(gm.graph)
    if len(found) != 1:
        raise _Refused(f"experts of a known form were found {len(found)} times in it")
    experts = found[0]
    if isinstance(experts, Declined):
        raise _Refused(experts.reason)
    placeholders = {node.name: node for node in gm.graph.nodes if node.op == "placeholder"}
    given = (experts.hidden, experts.experts, experts.weights)
    if given != tuple(placeholders[name] for name in ("hidden", "index", "weights")):
        raise _Refused("its experts do not see its own inputs")
    if unknown := [node.name for node in experts.parameters() if node.name not in names]:
        raise _Refused(f"{unknown[0]} is no parameter of it")
    modality = placeholders["modality"]
    real = {node: block.experts.get_parameter(names[node.name]) for node in experts.parameters()}
    read = None if thresholds is None else placeholders["thresholds"]
    unit = Unit(profile, [], modality=modality, thresholds=thresholds, thresholds_input=read)
    node = build(gm, experts, layer, unit)
    proof = prove(experts, node, modality, real, constants_of(unit, layer), read)
    if not proof.holds:
        raise _Refused(f"the op differs from it: {proof}")
    op = next(n for n in gm.graph.nodes if n.target is masked_moe)
    parameters = tuple(None if op.args[i] is None else names[op.args[i].name] for i in _PARAMETERS)
    return dict(op.kwargs), parameters  # type: ignore[return-value]


def _trace(block: Block) -> tuple[GraphModule, dict[str, str]]:
    """The functional aten graph of an experts module, and which placeholder is which of its parameters."""
    experts = block.experts
    weights = [p for p in experts.parameters(recurse=False) if p.ndim == 3]
    # Which of them takes the experts' input is not known yet; the other one's width does not fit.
    widths = dict.fromkeys(p.shape[1 if experts.is_transposed else 2] for p in weights)
    error: Exception | None = None
    for width in widths:
        hidden = torch.zeros(_TRACED_TOKENS, width, dtype=weights[0].dtype, device=weights[0].device)
        index = hidden.new_zeros(_TRACED_TOKENS, block.top_k, dtype=torch.int64)
        modality = hidden.new_zeros(_TRACED_TOKENS, dtype=torch.uint8)
        thresholds = hidden.new_zeros(2, dtype=torch.float32)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                # torch's own, about a class that it copies.
                warnings.simplefilter("ignore", FutureWarning)
                inputs = (hidden, index, index.to(hidden.dtype), modality, thresholds)
                program = torch.export.export(_Stock(experts), inputs, strict=False).run_decompositions({})
        except Exception as failed:
            error = error or failed
            continue
        names = program.graph_signature.inputs_to_parameters
        return program.graph_module, {node: name.removeprefix("experts.") for node, name in names.items()}
    raise _Refused(f"transformers' grouped_mm cannot run it ({type(error).__name__}: {error})") from error


def _begin_hook(profile: Profile, number: int, table: EmbeddingTable | None) -> Callable[..., Any]:
    ids = (list(profile.visual_token_ids), list(profile.special_token_ids))

    def hook(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = _tokens_place(args, kwargs)
        if not torch.compiler.is_compiling():
            tokens = None if place is None else argument(place, args, kwargs)
            calls.begin(tokens, number, *ids, table)
        elif place is not None:
            tokens = argument(place, args, kwargs)
            noted = calls.begin_call(tokens, number, *ids)
            return with_argument(place, noted, args, kwargs)
        return None

    return hook


def _end_hook(number: int) -> Callable[..., None]:
    def hook(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # A compiled call's end is not seen; `call_modality` knows.
        if not torch.compiler.is_compiling():
            calls.end(number)

    return hook


def _enter_hook(number: int, name: str, splits: bool) -> Callable[..., Any]:
    """Args:
    splits: The module holds several experts modules, so that each may see part of the tokens. Others are
        watched in eager code, where it costs nothing.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        compiling = torch.compiler.is_compiling()
        place = find_rows(args, kwargs) if splits or not compiling else None
        if place is None:
            return None
        rows = argument(place, args, kwargs)
        if compiling:
            return with_argument(place, calls.enter_module(rows, number, name), args, kwargs)
        calls.enter(name, rows, number)
        return None

    return hook


def _tokens_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Where a call's token ids are, or else its embedded tokens; every model takes the ids first."""
    if args and isinstance(args[0], Tensor):
        return 0
    for key in ("input_ids", "inputs_embeds"):
        if isinstance(kwargs.get(key), Tensor):
            return key
    return None
