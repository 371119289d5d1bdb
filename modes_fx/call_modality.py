"""The modality of the call that runs in this thread, for experts that are not compiled by `modes_fx.backend`.

    begin_call(tokens)    notes the modality of a call's tokens, from their ids or from embedded rows
    enter_module(rows)    notes the keys of a module's input, for experts that are given part of the tokens
    call_modality(hidden) gives the modality of the rows that an experts module is given

Three opaque ops, so that where the model is compiled nothing is baked into a graph and nothing guarded: the
state is read when the graph runs. The first two hand on a copy of their argument, which puts them in order.
In eager code the same is done by `begin` and `enter`, without a copy.

The modality of a call is good for that call alone. Where the call's end is not seen (a compiled one that
raises), each experts module may ask for as many rows as the call has tokens, and no more.
"""

import threading
import warnings
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from modes_fx.call_rows import Enclosing, values_of_rows
from modes_fx.embeddings import EmbeddingTable
from modes_fx.kernels.rows_modality import row_keys, rows_modality
from modes_fx.modality import OTHER, token_modality

_library = torch.library.Library("modes_fx", "FRAGMENT")
# A CUDA graph would replay the first call's modality.
_TAGS = [torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe]
_library.define(
    "begin_call(Tensor tokens, int model, int[] visual_token_ids, int[] special_token_ids) -> Tensor",
    tags=_TAGS,
)
_library.define("enter_module(Tensor rows, int model, str name) -> Tensor", tags=_TAGS)
_library.define("call_modality(Tensor hidden, int model, str name) -> Tensor", tags=_TAGS)


class _Call:
    """One call of a model.

    Attributes:
        modality: `[T]` uint8, or None where it is not known.
        enclosing: The modules that are running.
        taken: Rows that each experts module has asked for.
    """

    def __init__(self, modality: Tensor | None) -> None:
        self.modality = modality
        self.enclosing = Enclosing()
        self.taken: dict[str, int] = {}


class _Calls(threading.local):
    """The running call of each model, in this thread."""

    def __init__(self) -> None:
        self.of: dict[int, _Call] = {}


_calls = _Calls()
_warned: set[int] = set()
# Where embedded tokens can be read back from; without one, a call with inputs_embeds is of unknown modality.
# A table lives as long as the hook on its model that holds it.
tables: weakref.WeakValueDictionary[int, EmbeddingTable] = weakref.WeakValueDictionary()


def begin(
    tokens: Tensor | None,
    model: int,
    visual_token_ids: Sequence[int],
    special_token_ids: Sequence[int],
    table: EmbeddingTable | None = None,
) -> None:
    """A call of `model` starts in this thread.

    Args:
        tokens: Its token ids `[B, S]`, or embedded tokens `[B, S, H]`, or None where it has neither.
        model: A number for the model.
        visual_token_ids, special_token_ids: See `token_modality`.
        table: What embedded tokens are read back from.
    """
    # First, so that nothing is left of the call before if this raises.
    end(model)
    if tokens is not None:
        _calls.of[model] = _Call(_modality_of(tokens, visual_token_ids, special_token_ids, table))


def _modality_of(
    tokens: Tensor,
    visual_token_ids: Sequence[int],
    special_token_ids: Sequence[int],
    table: EmbeddingTable | None,
) -> Tensor | None:
    if not tokens.is_floating_point():
        return token_modality(tokens, visual_token_ids, special_token_ids).reshape(-1)
    if table is None or not table.holds(tokens):
        return None
    return rows_modality(tokens, table.keys(), table.modality())


def enter(name: str, rows: Tensor, model: int) -> None:
    """The module `name` of `model` is called with `rows`, `[..., H]`, or with their keys."""
    call = _calls.of.get(model)
    if call is not None:
        call.enclosing.enter(name, rows)


def end(model: int) -> None:
    """The call of `model` that runs in this thread has returned or raised."""
    _calls.of.pop(model, None)


def forget(model: int) -> None:
    """`model` is used no more: its number may warn again, should it come back."""
    end(model)
    _warned.discard(model)


def _begin_call(
    tokens: Tensor, model: int, visual_token_ids: Sequence[int], special_token_ids: Sequence[int]
) -> Tensor:
    begin(tokens, model, visual_token_ids, special_token_ids, tables.get(model))
    return tokens.clone()


def _enter_module(rows: Tensor, model: int, name: str) -> Tensor:
    # Keys and not rows, whose memory the compiled graph may use again.
    enter(name, row_keys(rows).reshape(-1), model)
    return rows.clone()


def _call_modality(hidden: Tensor, model: int, name: str) -> Tensor:
    modality = _rows_of_call(hidden, model, name)
    if modality is None:
        _warn_unknown(model, name)
        return torch.full((hidden.shape[0],), OTHER, dtype=torch.uint8, device=hidden.device)
    return modality.to(hidden.device)


def _rows_of_call(hidden: Tensor, model: int, name: str) -> Tensor | None:
    call = _calls.of.get(model)
    if call is None or call.modality is None:
        return None
    modality = call.modality
    num_rows, num_tokens = hidden.shape[0], modality.numel()
    if num_rows > num_tokens:
        return None
    taken = call.taken.get(name, 0) + num_rows
    if taken > num_tokens:
        # A later call, that nobody has seen begin.
        end(model)
        return None
    call.taken[name] = taken
    if num_rows == num_tokens:
        return modality.clone()
    keys = call.enclosing.keys(name, num_tokens, hidden.shape[-1])
    if keys is None:
        return None
    return values_of_rows(modality.to(keys.device), keys, hidden, ambiguous=OTHER)


def _warn_unknown(model: int, name: str) -> None:
    if model not in _warned:
        _warned.add(model)
        warnings.warn(
            f"The modality of the tokens in {name} is unknown, so nothing is skipped: call the module that "
            "modes_fx.attach was given, with input_ids.",
            stacklevel=2,
        )


def _fake_copy(tensor: Tensor, *_constants: object) -> Tensor:
    return torch.empty_like(tensor)


def _fake_modality(hidden: Tensor, model: int, name: str) -> Tensor:
    return hidden.new_empty((hidden.shape[0],), dtype=torch.uint8)


for _name, _run, _fake in (
    ("begin_call", _begin_call, _fake_copy),
    ("enter_module", _enter_module, _fake_copy),
    ("call_modality", _call_modality, _fake_modality),
):
    torch.library.register_fake(f"modes_fx::{_name}", _fake, lib=_library)
    _library.impl(_name, _run, "CompositeExplicitAutograd")

begin_call = torch.ops.modes_fx.begin_call.default
enter_module = torch.ops.modes_fx.enter_module.default
call_modality = torch.ops.modes_fx.call_modality.default
