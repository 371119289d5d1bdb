"""`modes_fx.backend(profile)`: a torch.compile backend that skips experts.

capture (Dynamo) -> functional aten (AOTAutograd) -> passes -> Inductor's decompositions -> Inductor

Graphs without experts and without token ids go straight to Inductor. A graph with experts is rewritten for
the layers that its router weights belong to, and guarded on those very weights, since Dynamo would otherwise
run one graph for several layers, with the first one's constants.

`torch.compile(model, backend="modes_fx", options={"profile": PATH})` comes in by `compile_by_name`.
"""

import logging
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils.weak import WeakIdKeyDictionary

from modes_fx.embeddings import EmbeddingTable, find_embedding
from modes_fx.errors import ProfileError, RewriteError
from modes_fx.lowering import Compiled, compile_graph
from modes_fx.passes import PIPELINE, run_passes
from modes_fx.passes.unit import (
    FROM_ARGUMENTS,
    FROM_EMBEDDINGS,
    FROM_OTHER_GRAPH,
    NOT_IN_PROFILE,
    UNKNOWN,
    Fingerprints,
    Unit,
    is_token_embedding,
)
from modes_fx.profile import Profile
from modes_fx.runtime import RewrittenGraph, Run
from modes_fx.skipping import Counts
from modes_fx.thresholds import PairCounter, Thresholds

log = logging.getLogger(__name__)

Lowering = Literal["inductor", "eager"]

# Compiled whole, a model still runs one frame per layer once Dynamo has broken it, and each layer is compiled
# for prefill, for another length, and for decode; torch's limit of 8 then runs the rest eagerly, without a
# word.
_COMPILES_PER_LAYER = 16


def backend(
    profile: Profile | str | os.PathLike[str],
    *,
    strict: bool = True,
    lowering: Lowering = "inductor",
    disable: Collection[str] = (),
    adjustable: bool | tuple[float, float] = False,
    counting: bool = False,
) -> "Backend":
    """A backend for `torch.compile(model, backend=...)` that skips the experts that the profile drops.

    For `generate()` compile in place, `model.compile(backend=...)`: the object that `torch.compile(model)`
    returns hands `generate` to the original, uncompiled model. The model runs for inference; no gradients are
    computed.

    Args:
        profile: A `Profile`, or the path of one.
        strict: Raise `RewriteError` when a layer of the profile cannot be rewritten, or was not run
            rewritten; False warns instead and leaves that layer as it was.
        lowering: "inductor", or "eager" to run the rewritten graphs as they are (quick to compile, for
            debugging).
        disable: Names of passes to leave out, see `modes_fx.passes.PIPELINE`.
        adjustable: Let `.thresholds.set(...)` move the thresholds while the model runs, without a recompile.
            Factors `(low, high)` on those of the profile bound them, and let the passes leave out slots that
            `low` never keeps.
        counting: Count pairs and dropped pairs, see `.counts()`.
    Returns:
        The backend; `.graphs` reports what was found in each compiled graph, see `modes_fx.explain`.
    Raises:
        ProfileError: The profile cannot be read or is not valid.
        ValueError: An unknown lowering or pass name, or factors that the profile's thresholds do not bear.
    """
    return Backend(
        profile,
        strict=strict,
        lowering=lowering,
        disable=disable,
        adjustable=adjustable,
        counting=counting,
    )


class Backend:
    """What `backend` returns. One instance serves one model; its state is per thread, see `runtime.Run`."""

    def __init__(
        self,
        profile: Profile | str | os.PathLike[str],
        *,
        strict: bool = True,
        lowering: Lowering = "inductor",
        disable: Collection[str] = (),
        adjustable: bool | tuple[float, float] = False,
        counting: bool = False,
    ) -> None:
        if not isinstance(profile, Profile):
            profile = Profile.load(profile)
        if lowering not in ("inductor", "eager"):
            raise ValueError(f'lowering must be "inductor" or "eager", got {lowering!r}.')
        names = [each.__name__ for each in PIPELINE]
        if unknown := sorted(set(disable) - set(names)):
            raise ValueError(f"No pass is named {', '.join(unknown)}; the passes are {', '.join(names)}.")
        self.profile = profile
        self.strict = strict
        self.lowering = lowering
        self.disable = tuple(disable)
        self.thresholds = Thresholds(profile, adjustable) if adjustable else None
        self.counting = counting
        self._counter = PairCounter(len(profile.layers))
        self.graphs: list[Unit] = []
        self.compile_ids: list[str] = []
        self._digest = profile.digest()
        self.fingerprints = Fingerprints()
        self.run = Run(profile, strict, self.fingerprints)
        self._tables: weakref.WeakKeyDictionary[nn.Module, EmbeddingTable] = weakref.WeakKeyDictionary()
        raise_recompile_limit(len(profile.layers))

    def counts(self) -> Counts:
        """Pairs and dropped pairs of each layer so far, with `counting`, by modality. Padding is among the
        special tokens, "other", whose pairs are never dropped."""
        return self._counter.read()

    @property
    def __name__(self) -> str:
        return "modes_fx"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Backend":
        # transformers copies a CompileConfig with all that is in it; the copy has to be the same backend.
        return self

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile one of Dynamo's graphs; `mode` and `options` are torch.compile's, for Inductor."""
        patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **(options or {})}
        with torch._inductor.config.patch(patches), torch.no_grad():
            return self._compile(gm, example_inputs)

    def _compile(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        # Dynamo's settings belong to a thread, and this one may not be the one that made the backend.
        raise_recompile_limit(len(self.profile.layers))
        inputs = list(example_inputs)
        compile_id = _compile_id()
        self.compile_ids.append(compile_id)
        unit = Unit(
            self.profile,
            inputs,
            thresholds=self.thresholds,
            counting=self.counting,
            compile_id=compile_id,
            fingerprint=self.fingerprints,
        )
        has_tokens = _looks_up_tokens(gm, unit)
        if not unit.routers and not has_tokens and not _has_experts(gm):
            return compile_graph(gm, inputs, self.lowering)
        table = None if has_tokens else self._table()
        if self.run.modality_is_known([layer.name for layer in unit.routers.values()]):
            unit.modality_elsewhere = FROM_OTHER_GRAPH
        elif self.run.read_arguments(table) is not None:
            unit.modality_elsewhere = FROM_ARGUMENTS
        elif table is not None and table.read_first(inputs) is not None:
            unit.modality_elsewhere = FROM_EMBEDDINGS

        def rewrite(aten_gm: GraphModule) -> Callable[[Compiled], Compiled]:
            run_passes(aten_gm, unit, PIPELINE, self.disable)
            self._check(unit)
            return lambda compiled: RewrittenGraph(compiled, unit, self.run, table, self._counter)

        _guard_on(gm, unit.routers)
        if unit.routers:
            _bake_floats(gm, inputs)
        compiled = compile_graph(gm, inputs, self.lowering, rewrite, self._digest)
        unit.close()
        self.graphs.append(unit)
        return compiled

    def _table(self) -> EmbeddingTable | None:
        """Of the token embedding of the model that is being compiled."""
        embedding = find_embedding(self.profile)
        if embedding is None:
            return None
        return self._tables.setdefault(embedding, EmbeddingTable(embedding, self.profile))

    def _check(self, unit: Unit) -> None:
        """Every router of the profile in this graph has its block rewritten, and no block is left alone."""
        if "skip_experts" in self.disable:
            return
        done = unit.layers()
        for block in unit.blocks:
            if block.rewritten:
                continue
            name = block.layer or "a block"
            if block.reason == NOT_IN_PROFILE:
                raise ProfileError(
                    "The profile was made for another model: a block of this one has a router that is "
                    f"not among the profile's {len(self.profile.layers)}. Calibrate this model, or pass the "
                    "profile made for it."
                )
            self._complain(f"{name} was not rewritten: {block.reason}.")
        lost = [layer.name for layer in unit.routers.values() if layer.name not in done]
        if lost and not any(block.layer in lost for block in unit.blocks):
            self._complain(
                f"{lost[0]} was not rewritten: its router is in this graph, its experts are not in a form "
                'that is known. Call model.set_experts_implementation("grouped_mm") before compiling, where '
                "the family has it."
            )
        if unit.modality_source == UNKNOWN and unit.layers():
            log.warning("The modality of %s cannot be told in this graph.", ", ".join(unit.layers()))

    def _complain(self, message: str) -> None:
        if self.strict:
            raise RewriteError(message + " Pass strict=False to run it unskipped.")
        warnings.warn(message + " It runs unskipped.", stacklevel=2)


# The backend of each torch.compile call that named it, and one for each set of options.
_by_call: WeakIdKeyDictionary = WeakIdKeyDictionary()
_by_options: weakref.WeakValueDictionary[tuple[Any, ...], Backend] = weakref.WeakValueDictionary()
_OWN_OPTIONS = ("strict", "lowering", "disable", "adjustable", "counting")


def compile_by_name(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """What `torch.compile(model, backend="modes_fx", options=...)` calls for each graph.

    The profile is read once for each `torch.compile` call. Calls with equal profiles and options share a
    backend, for a model may be compiled layer by layer, in as many calls.

    Args:
        mode: Inductor's. torch.compile takes a mode or options, not both, so it may also be an option.
        options: `profile`, a `Profile` or the path of one; those of `backend`; the rest is Inductor's.
    Raises:
        ProfileError: No profile, or one that cannot be read.
    """
    options = dict(options or {})
    mode = options.pop("mode", mode)
    profile = options.pop("profile", None)
    own = {name: options.pop(name) for name in _OWN_OPTIONS if name in options}
    # torch's record of the torch.compile call; it calls this function for every graph, with equal arguments.
    call = sys._getframe(1).f_locals.get("self")
    known = isinstance(call, torch._TorchCompileWrapper)
    found: Backend | None = _by_call.get(call) if known else None
    if found is None:
        if profile is None:
            raise ProfileError(
                'backend="modes_fx" needs a profile: torch.compile(model, backend="modes_fx", '
                'options={"profile": PATH}).'
            )
        made = Backend(profile, **own)
        bounds = made.thresholds and made.thresholds.bounds
        options_key = (made._digest, made.strict, made.lowering, made.disable, bounds, made.counting)
        found = _by_options.setdefault(options_key, made)
        if known:
            _by_call[call] = found
    return found(gm, example_inputs, mode=mode, options=options)


def raise_recompile_limit(num_layers: int) -> None:
    """Let Dynamo compile each layer's frame often enough: raise `torch._dynamo.config.recompile_limit`."""
    config = torch._dynamo.config
    needed = _COMPILES_PER_LAYER * num_layers
    config.recompile_limit = max(config.recompile_limit, needed)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * needed)


def _compile_id() -> str:
    current = torch._guards.CompileContext.current_compile_id()
    return "" if current is None else str(current)


def _has_experts(gm: GraphModule) -> bool:
    return any("grouped_mm" in str(node.target) for node in gm.graph.nodes if node.op == "call_function")


def _looks_up_tokens(gm: GraphModule, unit: Unit) -> bool:
    """Whether this graph embeds token ids. The shape alone says little: an output head has the same."""
    placeholders = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    return any(
        is_token_embedding(unit.profile, unit.inputs[placeholders[source]])
        for node in gm.graph.find_nodes(op="call_function", target=torch.nn.functional.embedding)
        for source in node.all_input_nodes
        if source in placeholders
    )


def _guard_on(gm: GraphModule, indices: Iterable[int]) -> None:
    """Make Dynamo run this graph for these very parameters only; another layer gets a graph of its own."""
    from torch._dynamo.guards import GuardBuilder, install_guard

    placeholders: list[Node] = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for index in indices:
        grapharg = placeholders[index].meta.get("grapharg")
        if grapharg is not None:
            install_guard(grapharg.source.make_guard(GuardBuilder.ID_MATCH))


def _bake_floats(gm: GraphModule, inputs: Sequence[Any]) -> None:
    """Turn floats that Dynamo has made inputs, with `dynamic=True`, back into constants, and guard on them.

    They are the modules' own numbers, such as the limit of a clamp; a formula of the gate needs their values.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard

    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        grapharg = node.meta.get("grapharg")
        items = [user for user in node.users if user.op == "call_method" and user.target == "item"]
        # NumPy's numbers are passed as tensors too; a float is one that the graph asks back.
        if (
            grapharg is None
            or not grapharg.pass_arg_as_tensor
            or value.dim()
            or len(items) != len(node.users)
        ):
            continue
        install_guard(grapharg.source.make_guard(GuardBuilder.EQUALS_MATCH))
        for item in items:
            for reader in list(item.users):
                reader.replace_input_with(item, value.item())
            gm.graph.erase_node(item)
    gm.recompile()
