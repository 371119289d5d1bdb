"""`modes_fx.rewrite`: the passes on a `torch.export` program, with the same constants baked in."""

import os
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node

from modes_fx.embeddings import EmbeddingTable
from modes_fx.errors import ProfileError, RewriteError
from modes_fx.passes import PIPELINE, run_passes
from modes_fx.passes.provide_modality import MODALITY, TABLE_KEYS, TABLE_MODALITY
from modes_fx.passes.unit import NOT_IN_PROFILE, Unit, is_token_embedding
from modes_fx.profile import Profile

aten = torch.ops.aten


def rewrite(
    program: ExportedProgram,
    profile: Profile | str | os.PathLike[str],
    *,
    strict: bool = True,
    disable: Collection[str] = (),
) -> ExportedProgram:
    """Make an exported model skip the experts that the profile drops.

    The program stays as it is; the result takes and returns the same. Its graph calls
    `torch.ops.modes_fx.masked_moe`, so that a process which loads it has to import `modes_fx` first.

    Args:
        program: From `torch.export.export(model, …)`, strict or not, with `input_ids` or `inputs_embeds`
            among its inputs: the modality of the tokens is read off either.
        profile: A `Profile`, or the path of one.
        strict: Raise when a layer of the profile cannot be rewritten; False warns, and leaves it as it was.
        disable: Names of passes to leave out, see `modes_fx.passes.PIPELINE`.
    Raises:
        ProfileError: The profile cannot be read, or was made for another model.
        RewriteError: A layer was not rewritten, or the modality cannot be known, with `strict`.
    """
    if not isinstance(profile, Profile):
        profile = Profile.load(profile)
    # Functional aten, which is what the passes match.
    program = program.run_decompositions({})
    gm = program.graph_module
    # Checks of dtypes that tracing itself has written; they would keep alive what the passes replace.
    for node in gm.graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        gm.graph.erase_node(node)
    unit = Unit(profile, _real_inputs(program))
    table = _embedding_table(program, profile)
    if table is not None:
        unit.embeds = _embedded_tokens(program, profile)
    before = len(gm.graph.find_nodes(op="placeholder"))
    run_passes(gm, unit, PIPELINE, disable)
    _check(unit, strict)
    if unit.gives_modality:
        output = next(iter(gm.graph.find_nodes(op="output")))
        output.args = (output.args[0][:-1],)
    _bake(program, gm, gm.graph.find_nodes(op="placeholder")[before:], table)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    # Traces again: plain functions that the passes have put into the graph become operators.
    return program.run_decompositions({})


def _real_inputs(program: ExportedProgram) -> list[Any]:
    """The tensor behind each placeholder; None behind what the caller passes."""
    held = {**program.state_dict, **program.constants}
    return [
        None if spec.target is None else held.get(spec.target) for spec in program.graph_signature.input_specs
    ]


def _embedding_table(program: ExportedProgram, profile: Profile) -> EmbeddingTable | None:
    weights = [w for w in program.state_dict.values() if is_token_embedding(profile, w)]
    return EmbeddingTable(weights[0], profile) if weights else None


def _embedded_tokens(program: ExportedProgram, profile: Profile) -> int | None:
    """Index of the only input of shape `[B, S, H]`, floating point: embedded tokens. None without one."""
    placeholders = program.graph.find_nodes(op="placeholder")
    found = []
    for index, (node, spec) in enumerate(zip(placeholders, program.graph_signature.input_specs, strict=True)):
        value = node.meta.get("val")
        if spec.kind != InputKind.USER_INPUT or not isinstance(value, torch.Tensor):
            continue
        if value.is_floating_point() and value.dim() == 3 and value.shape[-1] == profile.hidden_size:
            found.append(index)
    return found[0] if len(found) == 1 else None


def _check(unit: Unit, strict: bool) -> None:
    if any(block.reason == NOT_IN_PROFILE for block in unit.blocks):
        raise ProfileError(
            "The profile was made for another model: a block of the exported one has a router that is not in "
            "it. Calibrate this model, or pass the profile made for it."
        )
    problems = [f"{b.layer or 'a block'}: {b.reason}" for b in unit.blocks if not b.rewritten]
    missing = {layer.name for layer in unit.profile.layers} - {block.layer for block in unit.blocks}
    problems += [f"{name}: its experts are not in the exported graph" for name in sorted(missing)]
    if MODALITY in unit.extra_inputs:
        problems.append(
            "the modality of the tokens cannot be known: export the model with input_ids or inputs_embeds"
        )
    if problems and (strict or MODALITY in unit.extra_inputs):
        raise RewriteError("Not rewritten: " + "; ".join(problems) + ".")
    for problem in problems:
        warnings.warn(f"{problem}. It runs unskipped.", stacklevel=3)


def _bake(program: ExportedProgram, gm: GraphModule, added: list[Node], table: EmbeddingTable | None) -> None:
    """Turn the inputs that the passes added into constants of the program."""
    if not added:
        return
    assert table is not None
    values = {TABLE_KEYS: table.keys(), TABLE_MODALITY: table.modality()}
    specs = program.graph_signature.input_specs
    first = next(i for i, spec in enumerate(specs) if spec.kind == InputKind.USER_INPUT)
    user = gm.graph.find_nodes(op="placeholder")[first]
    for offset, node in enumerate(added):
        name = f"modes_fx_{node.name}"
        program.constants[name] = values[node.name]
        user.prepend(node)
        specs.insert(first + offset, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), name))
