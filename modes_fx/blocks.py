"""Find the MoE blocks of an eager transformers model by what they are, not by their class names.

An experts module holds its experts' weights stacked, in two or more parameters `[num_experts, ., .]`; beside
it is a router, which holds a matrix with a row for each expert. Most experts are called as
`experts(hidden [T, H], top_k_index [T, K], top_k_weights [T, K])`; transformers' `use_experts_implementation`
decorates those (integrations/moe.py) and leaves its marks on the instances.
"""

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from modes_fx.errors import ModesError

_MARKS = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")
_TOP_K = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class Block:
    """One MoE block.

    Attributes:
        name: Module path of the block, the parent of its experts.
        experts: The module that runs the routed experts.
        router: The module that holds the router weight.
        router_weight: `[num_experts, H]`; with more rows where a router also scores what is no routed expert.
        num_experts: Routed experts of the block.
        top_k: Routed experts per token.
        dispatch: How the experts are called. "slots": with top-k indices and weights, `[T, K]` each. "dense":
            with every token once for each expert, `[num_experts * T, H]`, expert by expert, already
            multiplied by the scores `[T, num_experts]` that the router returns first, zero where an expert
            was not chosen.
    """

    name: str
    experts: nn.Module
    router: nn.Module
    router_weight: Tensor
    num_experts: int
    top_k: int
    dispatch: Literal["slots", "dense"] = "slots"


def unwrap(model: nn.Module) -> nn.Module:
    """The eager model inside `torch.compile(model)`; any other model as it is."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def embedding_shape(model: nn.Module) -> tuple[int, int]:
    """(vocabulary, hidden size) of the token embedding."""
    vocab_size, hidden_size = model.get_input_embeddings().weight.shape  # type: ignore[operator]
    return vocab_size, hidden_size


def find_blocks(model: nn.Module) -> list[Block]:
    """The MoE blocks of `model` that see its tokens, in layer order; those of a vision tower see patches.

    Raises:
        ModesError: There is none, or one whose router or top-k cannot be told.
    """
    model = unwrap(model)
    modules = dict(model.named_modules())
    towers = _towers(model)
    found = (
        _block(modules, name, module)
        for name, module in modules.items()
        if module not in towers and _num_experts(module)
    )
    blocks = [block for block in found if block is not None]
    if not blocks:
        raise ModesError(
            f"{type(model).__name__} has no MoE block with stacked expert weights and a router beside them; "
            "pass the eager transformers model of a mixture-of-experts family."
        )
    return blocks


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is an experts module that transformers' decorator has marked."""
    return all(hasattr(module, mark) for mark in _MARKS) and hasattr(type(module).forward, "__wrapped__")


def _towers(model: nn.Module) -> set[nn.Module]:
    """All modules of the encoders of pictures and sound, which embed no tokens."""
    find = getattr(model, "get_encoder", None)
    towers = [find(modality) for modality in ("image", "audio")] if find is not None else []
    inside = [set(tower.modules()) for tower in towers if isinstance(tower, nn.Module)]
    embedding = model.get_input_embeddings() if inside else None  # type: ignore[operator]
    return set().union(*(modules for modules in inside if embedding not in modules))


def _num_experts(module: nn.Module) -> int:
    """Routed experts that `module` runs; 0 if it is no experts module."""
    if is_experts(module):
        return int(module.num_experts)  # type: ignore[arg-type]
    sizes = [p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3]
    return sizes[0] if len(sizes) > 1 and len(set(sizes)) == 1 else 0


def _block(modules: dict[str, nn.Module], name: str, experts: nn.Module) -> Block | None:
    """The block of an experts module; None for a look-alike, which is not decorated and has no router."""
    num_experts = _num_experts(experts)
    parent = name.rpartition(".")[0]
    # A few families keep the router one level up, beside the block and not in it.
    for holder in (parent, parent.rpartition(".")[0]):
        for router, weight in _router_weights(modules[holder], experts, num_experts):
            top_k = _top_k(router, modules[holder], experts)
            weight = _with_values(router, weight)
            return Block(parent, experts, router, weight, num_experts, top_k, _dispatch(experts))
    if not is_experts(experts):
        return None
    raise ModesError(
        f"{name} runs {num_experts} experts, but no module beside it holds a router weight of shape "
        f"[{num_experts}, H]; this family is not supported yet."
    )


def _with_values(router: nn.Module, weight: Tensor) -> Tensor:
    """The router's weight, brought from where accelerate has put it, or from the processes that share it."""
    if hasattr(weight, "full_tensor"):
        return weight.full_tensor()  # type: ignore[no-any-return]
    for module in router.modules() if weight.is_meta else ():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter is weight and hasattr(module, "_hf_hook"):
                utils = importlib.import_module("accelerate.utils")
                with utils.align_module_device(module):
                    return getattr(module, name).detach().clone()
    return weight


def _router_weights(
    holder: nn.Module, experts: nn.Module, num_experts: int
) -> Iterator[tuple[nn.Module, Tensor]]:
    """(module, matrix) beside `experts` that may be its router's, the likeliest first.

    A router has one matrix or few; a shared expert and an attention have several, one of which may happen to
    have num_experts rows. Some routers score more than the routed experts: shared experts, or none at all.
    """
    children = [child for child in holder.children() if experts not in set(child.modules())]
    matrices = [[(child, p) for p in child.parameters() if p.ndim == 2] for child in children]
    candidates = [(holder, p) for p in holder.parameters(recurse=False) if p.ndim == 2]
    candidates += [entry for found in sorted(matrices, key=len) for entry in found]
    yield from (entry for entry in candidates if len(entry[1]) == num_experts)
    if is_experts(experts) and experts in set(holder.children()):
        yield from (entry for entry in candidates if num_experts < len(entry[1]) < 2 * num_experts)


def _dispatch(experts: nn.Module) -> Literal["slots", "dense"]:
    return "dense" if len(inspect.signature(experts.forward).parameters) == 1 else "slots"


def _top_k(router: nn.Module, holder: nn.Module, experts: nn.Module) -> int:
    for place in (router, holder, experts, getattr(experts, "config", None)):
        for key in _TOP_K:
            value = getattr(place, key, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    raise ModesError(
        f"Cannot tell how many experts each token of {type(holder).__name__} chooses; "
        f"none of {', '.join(_TOP_K)} is set on its router or configuration."
    )
