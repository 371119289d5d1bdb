"""Find the MoE blocks of an eager transformers model by what they are, not by their class names.

transformers' `use_experts_implementation` decorates every experts class (integrations/moe.py) and leaves its
marks on the instances; such a module is called as `experts(hidden [T, H], top_k_index [T, K], top_k_weights
[T, K])`. The router is the sibling that holds one matrix `[num_experts, H]`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

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
        router_weight: `[num_experts, H]`.
        num_experts: Routed experts of the block.
        top_k: Routed experts per token.
    """

    name: str
    experts: nn.Module
    router_weight: Tensor
    num_experts: int
    top_k: int


def unwrap(model: nn.Module) -> nn.Module:
    """The eager model inside `torch.compile(model)`; any other model as it is."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def find_blocks(model: nn.Module) -> list[Block]:
    """The MoE blocks of `model`, in layer order.

    Raises:
        ModesError: There is none, or one whose router or top-k cannot be told.
    """
    model = unwrap(model)
    modules = dict(model.named_modules())
    blocks = [_block(modules, name) for name, module in modules.items() if is_experts(module)]
    if not blocks:
        raise ModesError(
            f"{type(model).__name__} has no MoE block whose experts transformers can dispatch "
            "(use_experts_implementation); pass the eager transformers model of a mixture-of-experts family."
        )
    return blocks


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is an experts module that transformers' decorator has marked."""
    return all(hasattr(module, mark) for mark in _MARKS) and hasattr(type(module).forward, "__wrapped__")


def _block(modules: dict[str, nn.Module], experts_name: str) -> Block:
    experts = modules[experts_name]
    num_experts = int(experts.num_experts)  # type: ignore[arg-type]
    widths = {size for p in experts.parameters(recurse=False) if p.ndim == 3 for size in p.shape[1:]}
    parent = experts_name.rpartition(".")[0]
    # A few families keep the router one level up, beside the block and not in it.
    for holder in (parent, parent.rpartition(".")[0]):
        for owner, weight in _matrices(modules[holder], experts):
            if weight.shape[0] == num_experts and weight.shape[1] in widths:
                top_k = _top_k(owner, modules[holder], experts)
                return Block(parent, experts, weight, num_experts, top_k)
    raise ModesError(
        f"{experts_name} runs {num_experts} experts, but no module beside it holds a router weight of shape "
        f"[{num_experts}, H]; this family is not supported yet."
    )


def _matrices(holder: nn.Module, experts: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """(owner, matrix) beside `experts`: of `holder` itself, then of children with one matrix, then the rest.

    A router has one matrix; a shared expert has several, one of which may happen to have num_experts rows.
    """
    for parameter in holder.parameters(recurse=False):
        if parameter.ndim == 2:
            yield holder, parameter
    children = [child for child in holder.children() if child is not experts]
    matrices = [(child, [p for p in child.parameters() if p.ndim == 2]) for child in children]
    for child, found in sorted(matrices, key=lambda entry: len(entry[1])):
        for parameter in found:
            yield child, parameter


def _top_k(owner: nn.Module, holder: nn.Module, experts: nn.Module) -> int:
    for place in (owner, holder, experts, getattr(experts, "config", None)):
        for key in _TOP_K:
            value = getattr(place, key, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    raise ModesError(
        f"Cannot tell how many experts each token of {type(holder).__name__} chooses; "
        f"none of {', '.join(_TOP_K)} is set on its router or configuration."
    )
