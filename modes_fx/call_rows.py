"""Which tokens of a call the rows of an experts module's input are.

Nearly every experts module is given all tokens of a call, in order. Some blocks split them: in ERNIE-4.5-VL,
text and vision tokens go to experts of their own. What such a module is given are exact copies of rows of the
input of a module around it, and there every token of the call still has its row; so the bits tell the token.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.kernels.rows_modality import row_keys


class Enclosing:
    """Inputs of the modules that are running around an experts module.

    Holds one tensor for each depth of nesting, whatever the number of layers.
    """

    def __init__(self) -> None:
        self._inputs: list[tuple[str, Tensor]] = []

    def enter(self, name: str, rows: Tensor) -> None:
        """The module `name` is called with `rows`, `[..., H]`, or with their keys, int64."""
        # What does not enclose it has returned.
        around = [(outer, rows) for outer, rows in self._inputs if is_inside(name, outer)]
        self._inputs = [*around, (name, rows)]

    def keys(self, name: str, num_tokens: int, width: int) -> Tensor | None:
        """Keys of the rows, `[num_tokens]`, that the nearest module around `name` with a row of `width` for
        each token was given; None where there is no such module."""
        for outer, rows in reversed(self._inputs):
            if is_inside(name, outer):
                if not rows.is_floating_point():
                    if rows.numel() == num_tokens:
                        return rows
                elif rows.shape[-1] == width and rows.numel() == num_tokens * width:
                    return row_keys(rows).reshape(-1)
        return None


def is_inside(name: str, outer: str) -> bool:
    """Whether the module `name` lies inside the module `outer`."""
    return name.startswith(f"{outer}.")


def enclosing_modules(model: nn.Module, experts: Iterable[str]) -> dict[str, nn.Module]:
    """The modules around each experts module, up to the layer that it is part of, by name.

    A layer is what a list of modules holds; outside of it, no module is given the experts' input.
    """
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name in experts:
        outer = name.rpartition(".")[0]
        while outer and not isinstance(modules[outer], nn.ModuleList | nn.ModuleDict | nn.Sequential):
            found[outer] = modules[outer]
            outer = outer.rpartition(".")[0]
    return found


def find_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | str | None:
    """Where a module's floating input `[..., H]` is among its arguments: the first one."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
            return place
    return None


def argument(place: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The argument at `place`, a position or a keyword."""
    return args[place] if isinstance(place, int) else kwargs[place]


def with_argument(
    place: int | str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with another one at `place`, as a forward pre-hook returns them."""
    if isinstance(place, int):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: value}


def values_of_rows(values: Tensor, keys: Tensor, rows: Tensor, ambiguous: int) -> Tensor | None:
    """The value of the token that each row is a copy of.

    Args:
        values: One for each token of the call, `[T]`, integer or bool.
        keys: Keys of the tokens' rows, `[T]`, int64.
        rows: Copies of some of these rows, `[N, H]`.
        ambiguous: For a row that several tokens share whose values differ.
    Returns:
        `[N]`, the dtype of `values`; None where a row is no token's.
    """
    distinct, group = torch.unique(keys, return_inverse=True)
    wanted = row_keys(rows)
    position = torch.searchsorted(distinct, wanted).clamp(max=len(distinct) - 1)
    if not torch.equal(distinct[position], wanted):
        return None
    wide = values.long()
    low, high = (
        torch.zeros_like(distinct).scatter_reduce(0, group, wide, reduce, include_self=False)
        for reduce in ("amin", "amax")
    )
    return torch.where(low == high, low, ambiguous)[position].to(values.dtype)
