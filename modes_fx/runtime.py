"""What happens around a rewritten graph at run time: who gives it the modality, and whether every layer ran.

Graphs are pure; this module holds the only state, one set per backend and thread.
"""

import logging
import sys
import threading
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.errors import RewriteError
from modes_fx.kernels.rows_modality import row_keys
from modes_fx.lowering import Compiled
from modes_fx.modality import OTHER, token_modality
from modes_fx.passes.provide_modality import MODALITY, TABLE_KEYS
from modes_fx.passes.unit import UNKNOWN, Unit, is_token_embedding
from modes_fx.profile import Profile

log = logging.getLogger(__name__)


class Run(threading.local):
    """State of the call that is running in this thread.

    The modality that one graph gives is good for the rest of its own call alone. A call ends unseen, so each
    layer may take it once: a layer that comes for it again belongs to a later call, whose token ids nobody
    has seen.
    """

    def __init__(self, profile: Profile, strict: bool) -> None:
        self.order = {layer.name: index for index, layer in enumerate(profile.layers)}
        self.names = [layer.name for layer in profile.layers]
        self.strict = strict
        self.modality: Tensor | None = None
        self.taken: set[int] = set()
        self.last = -1
        self.short_passes = 0
        self.warned: set[str] = set()
        self.executed = [0] * len(self.names)

    def modality_is_known(self, layers: Collection[str] = ()) -> bool:
        """A graph of this call has given a modality, and none of these layers has taken it yet."""
        left = len(self.taken) < len(self.names) and not self.taken & {self.order[name] for name in layers}
        return self.modality is not None and left

    def give(self, modality: Tensor) -> None:
        """A graph has seen the token ids of this call.

        Raises:
            RewriteError: No layer at all took those of the two calls before, with `strict`.
        """
        ignored = self.modality is not None and not self.taken
        self.short_passes = self.short_passes + 1 if ignored else self.short_passes
        if ignored and self.short_passes > 1:
            self._complain(range(len(self.names)))
        self.modality = modality
        self.taken = set()

    def take(self, layers: list[int], num_tokens: int) -> Tensor | None:
        """The modality of this call, `[T]`, uint8, or None where it is not known."""
        modality = self.modality
        if modality is None or modality.numel() != num_tokens or self.taken & set(layers):
            self.modality = None
            return None
        self.taken |= set(layers)
        return modality

    def ran(self, layers: list[int]) -> None:
        """These layers ran rewritten. Layers run in order, so a gap means that some ran outside.

        Raises:
            RewriteError: A layer in between did not run rewritten, with `strict`.
        """
        for layer in layers:
            if layer <= self.last:
                self._finish_pass()
            # Also right after a finished pass: the next one may start with a gap.
            if layer > self.last + 1:
                self._complain(range(self.last + 1, layer))
            self.last = layer
            self.executed[layer] += 1

    def _finish_pass(self) -> None:
        # An exception in the middle of a call looks like a missing tail, once; twice in a row it is one.
        short = self.last < len(self.names) - 1
        self.short_passes = self.short_passes + 1 if short else 0
        last, self.last = self.last, -1
        if self.short_passes > 1:
            self._complain(range(last + 1, len(self.names)))

    def _complain(self, missing: range) -> None:
        names = ", ".join(self.names[index] for index in missing)
        message = (
            f"{names} ran outside the compiled graphs and skipped nothing. Dynamo fell back to eager there: "
            "look at TORCH_LOGS=graph_breaks,recompiles, or compile model.get_decoder() alone."
        )
        self.last, self.short_passes = -1, 0
        if self.strict:
            raise RewriteError(message)
        self._warn_once("layers", message)

    def warn_unknown(self) -> None:
        """Say once that this call skips nothing."""
        self._warn_once(
            "modality",
            "The modality of the tokens is unknown, so nothing is skipped: no graph of this call saw "
            "input_ids or rows of the token embedding. Call the model with input_ids.",
        )

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self.warned:
            self.warned.add(about)
            warnings.warn(message, stacklevel=3)


class RewrittenGraph:
    """A compiled graph, fed with the inputs that the passes added, rid of the outputs that they added."""

    # Takes its arguments as one list, so that the compiled graph may free them early.
    _boxed_call = True

    def __init__(self, compiled: Compiled, unit: Unit, run: Run, table: "EmbeddingTable | None") -> None:
        self.compiled = compiled
        self.run = run
        self.table = table
        self.extra_inputs = tuple(unit.extra_inputs)
        self.gives_modality = unit.gives_modality
        self.layers = [run.order[name] for name in unit.layers()]
        self.known = unit.modality_source != UNKNOWN
        self.num_tokens = _TokenCount(unit)

    def __call__(self, args: list[Any]) -> Any:
        for name in self.extra_inputs:
            if name == MODALITY:
                args.append(self._modality(args))
            else:
                assert self.table is not None
                args.append(self.table.keys() if name == TABLE_KEYS else self.table.modality())
        outputs = self.compiled(args)
        if self.gives_modality:
            *outputs, modality = outputs
            self.run.give(modality)
            self.run.taken |= set(self.layers)
        self.run.ran(self.layers)
        return outputs

    def _modality(self, args: list[Any]) -> Tensor:
        num_tokens, device = self.num_tokens(args), self.num_tokens.device
        modality = self.run.take(self.layers, num_tokens) if self.known else None
        if modality is None:
            self.run.warn_unknown()
            return torch.full((num_tokens,), OTHER, dtype=torch.uint8, device=device)
        return modality.to(device)


class _TokenCount:
    """How many tokens a call of a graph has, from its arguments."""

    def __init__(self, unit: Unit) -> None:
        self.device = torch.device("cpu")
        self.size: Any = 0
        self.symbols: dict[Any, tuple[int, int | None]] = {}
        if MODALITY not in unit.extra_inputs:
            return
        assert unit.modality is not None
        value = unit.modality.meta["val"]
        self.device, self.size = value.device, value.shape[0]
        if isinstance(self.size, int):
            return
        placeholders = [node for node in unit.modality.graph.nodes if node.op == "placeholder"]
        for index, node in enumerate(placeholders[: -len(unit.extra_inputs)]):
            fake = node.meta["val"]
            sizes: list[tuple[int | None, Any]] = [(None, fake)] if isinstance(fake, torch.SymInt) else []
            if isinstance(fake, Tensor):
                sizes = [*enumerate(fake.shape)]
            for dim, size in sizes:
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    self.symbols.setdefault(size.node.expr, (index, dim))
        self.size = self.size.node.expr

    def __call__(self, args: list[Any]) -> int:
        if isinstance(self.size, int):
            return self.size
        values = {
            symbol: args[index] if dim is None else args[index].shape[dim]
            for symbol, (index, dim) in self.symbols.items()
            if symbol in self.size.free_symbols
        }
        return int(self.size.subs(values))


class EmbeddingTable:
    """Keys of a token embedding's rows, to read ids back from embedded tokens; follows the live weight."""

    def __init__(self, weight: Tensor, profile: Profile) -> None:
        self.weight = weight
        self.profile = profile
        self._state: Any = None
        self._keys: Tensor
        self._modality: Tensor

    def keys(self) -> Tensor:
        """Sorted keys, `[V]`, int64."""
        self._refresh()
        return self._keys

    def modality(self) -> Tensor:
        """Modality of the token behind each key, `[V]`, uint8."""
        self._refresh()
        return self._modality

    def holds(self, rows: Tensor) -> bool:
        """Whether `rows` look like embedded tokens: some are rows of the table. Reads values."""
        if rows.dim() < 2 or rows.shape[-1] != self.weight.shape[-1] or rows.dtype != self.weight.dtype:
            return False
        return bool(torch.isin(row_keys(rows), self.keys()).any())

    @torch.no_grad()
    def _refresh(self) -> None:
        # Weights that were made under inference mode have no version to look at.
        version = 0 if self.weight.is_inference() else self.weight._version
        state = (self.weight.data_ptr(), version)
        if state == self._state:
            return
        profile = self.profile
        ids = torch.arange(self.weight.shape[0], device=self.weight.device)
        modality = token_modality(ids, profile.visual_token_ids, profile.special_token_ids)
        keys, order = row_keys(self.weight).sort(stable=True)
        modality = modality[order]
        # Tokens that share one row (untrained ones) cannot be told apart: a special one among them protects
        # all.
        if keys.shape[0] > 1:
            group = torch.cat([keys.new_zeros(1), (keys[1:] != keys[:-1]).cumsum(0)])
            special = torch.zeros_like(keys).index_add_(0, group, (modality == OTHER).long())
            modality = torch.where(special[group] > 0, OTHER, modality).to(torch.uint8)
        self._keys, self._modality, self._state = keys, modality, state


def find_embedding_table(profile: Profile) -> Tensor | None:
    """The token embedding of the model that is being compiled, found among the modules on the stack."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    translator: Any = InstructionTranslator.current_tx()
    scopes = [] if translator is None else [translator.output.local_scope]
    frame = sys._getframe()
    while frame is not None:
        scopes.append(frame.f_locals)
        frame = frame.f_back  # type: ignore[assignment]
    seen: set[int] = set()
    for scope in scopes:
        for value in list(scope.values()):
            if isinstance(value, nn.Module) and id(value) not in seen:
                seen.add(id(value))
                for module in value.modules():
                    if isinstance(module, nn.Embedding) and is_token_embedding(profile, module.weight):
                        return module.weight
    return None
