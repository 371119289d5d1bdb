"""What happens around a rewritten graph at run time: who gives it the modality, and whether every layer ran.

Graphs are pure; this module holds the only state, one set per backend and thread.
"""

import threading
import warnings
import weakref
from collections.abc import Collection
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.calls import is_marked, mark, running_modules
from modes_fx.embeddings import EmbeddingTable
from modes_fx.errors import RewriteError
from modes_fx.lowering import Compiled
from modes_fx.modality import OTHER, VISION, token_modality
from modes_fx.passes.provide_modality import MODALITY
from modes_fx.passes.unit import Fingerprints, Unit, may_be_router
from modes_fx.profile import Profile
from modes_fx.thresholds import PairCounter


class Run(threading.local):
    """State of the call that is running in this thread.

    The modality that one graph gives is good for the rest of its own call alone, which is the innermost
    running call of a module that holds all layers of the profile (`modes_fx.calls`). Should such a module run
    its layers twice, on tokens that nobody has seen the second time, it is not good for that either: each
    layer may take it once.
    """

    def __init__(self, profile: Profile, strict: bool, fingerprints: Fingerprints | None = None) -> None:
        self.profile = profile
        self.order = {layer.name: index for index, layer in enumerate(profile.layers)}
        self.names = [layer.name for layer in profile.layers]
        self.strict = strict
        self.fingerprints = fingerprints or Fingerprints()
        self.modality: Tensor | None = None
        self.call: object = None
        self.taken: set[int] = set()
        self.ran_since = True
        self.last = -1
        self.short_passes = 0
        self.warned: set[str] = set()
        self.executed = [0] * len(self.names)
        self._whole: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    def modality_is_known(self, layers: Collection[str] = ()) -> bool:
        """A graph of this call has given a modality, and none of these layers has taken it yet."""
        left = len(self.taken) < len(self.names) and not self.taken & {self.order[name] for name in layers}
        return self.modality is not None and left and is_marked(self._key, self.call)

    def give(self, modality: Tensor) -> None:
        """A graph has seen the tokens of this call.

        Raises:
            RewriteError: No layer at all ran in the two calls before, with `strict`.
        """
        # Not told by `taken`: a layer whose pairs all stay needs no modality.
        ignored = not self.ran_since
        self.short_passes = self.short_passes + 1 if ignored else self.short_passes
        if ignored and self.short_passes > 1:
            self._complain(range(len(self.names)))
        self.modality, self.call, self.taken, self.ran_since = None, None, set(), False
        frame = self._running_call()
        if frame is not None:
            self.modality, self.call = modality, object()
            mark(frame, self._key, self.call)

    def take(self, layers: list[int], num_tokens: int) -> Tensor | None:
        """The modality of this call, `[T]`, uint8, or None where it is not known."""
        modality = self.modality
        if (
            modality is None
            or modality.numel() != num_tokens
            or self.taken & set(layers)
            or not is_marked(self._key, self.call)
        ):
            self.modality = None
            return None
        self.taken |= set(layers)
        return modality

    def read_arguments(self, table: EmbeddingTable | None, num_tokens: int | None = None) -> Tensor | None:
        """The modality of this call, `[T]`, uint8, from what its modules were called with, or None.

        So it is known to layers that are compiled alone: whoever embeds the tokens runs eagerly then.

        Args:
            table: Reads embedded tokens; None not to read them.
            num_tokens: How many there must be; None for any number.
        """
        read: Tensor | None = None
        for frame, module in running_modules():
            if not self._is_whole(module):
                continue
            args, kwargs = frame.f_locals.get("args", ()), frame.f_locals.get("kwargs", {})
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
                told = token_modality(ids, self.profile.visual_token_ids, self.profile.special_token_ids)
                told = told.reshape(-1)
                if num_tokens in (None, told.numel()) and (read is None or _agree(read, told)):
                    return told
                return read
            rows = [
                value for value in (*args, *kwargs.values()) if table is not None and table.may_hold(value)
            ]
            if table is not None and rows and read is None:
                read = table.read_first(rows, num_tokens)
                if read is None:
                    # Ids further out may not be those of these rows.
                    return None
        return read

    @property
    def _key(self) -> str:
        return f"__modes_fx_{id(self):x}"

    def _running_call(self) -> FrameType | None:
        """The frame of the innermost running call of a module that holds all layers of the profile."""
        for frame, module in running_modules():
            if self._is_whole(module):
                return frame
        return None

    def _is_whole(self, module: nn.Module) -> bool:
        """Whether `module` holds all layers of the profile."""
        if module not in self._whole:
            routers = (p for p in module.parameters() if may_be_router(self.profile, p) and not p.is_meta)
            wanted = {layer.fingerprint for layer in self.profile.layers}
            self._whole[module] = wanted <= {self.fingerprints(router) for router in routers}
        return self._whole[module]

    def ran(self, layers: list[int]) -> None:
        """These layers ran rewritten. Layers run in order, so a gap means that some ran outside.

        Raises:
            RewriteError: A layer in between did not run rewritten, with `strict`.
        """
        self.ran_since |= bool(layers)
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
            "look at TORCH_LOGS=graph_breaks,recompiles, or compile model.get_decoder() alone. A model that "
            "sends each token to one of several sets of experts needs modes_fx.attach(model, profile)."
        )
        self.last, self.short_passes = -1, 0
        if self.strict:
            raise RewriteError(message)
        self._warn_once("layers", message)

    def warn_unknown(self) -> None:
        """Say once that this call skips nothing."""
        self._warn_once(
            "modality",
            "The modality of the tokens is unknown, so nothing is skipped: no compiled graph of this call "
            "saw input_ids or exact rows of the token embedding. Compile what embeds the tokens too, call it "
            "with input_ids, and call the layers through the model: model.compile(backend=...).",
        )

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self.warned:
            self.warned.add(about)
            warnings.warn(message, stacklevel=3)


class RewrittenGraph:
    """A compiled graph, fed with the inputs that the passes added, rid of the outputs that they added."""

    # Takes its arguments as one list, so that the compiled graph may free them early.
    _boxed_call = True

    def __init__(
        self,
        compiled: Compiled,
        unit: Unit,
        run: Run,
        table: EmbeddingTable | None = None,
        counter: PairCounter | None = None,
    ) -> None:
        self.compiled = compiled
        self.run = run
        self.table = table
        self.extra_inputs = tuple(unit.extra_inputs)
        self.thresholds = unit.thresholds
        # Where it reads thresholds.
        read = unit.thresholds_input
        self.device = torch.device("cpu") if read is None else read.meta["val"].device
        self.gives_modality = unit.gives_modality
        self.counter = counter if unit.gives_counts else None
        self.counted: Tensor | None = None
        self.layers = [run.order[name] for name in unit.layers()]
        self.num_tokens = _TokenCount(unit)

    def __call__(self, args: list[Any]) -> Any:
        for name in self.extra_inputs:
            args.append(self._modality(args) if name == MODALITY else self._thresholds())
        outputs = self.compiled(args)
        if self.counter is not None:
            *outputs, counts = outputs
            self._count(self.counter, counts)
        if self.gives_modality:
            *outputs, modality = outputs
            self.run.give(modality)
            self.run.taken |= set(self.layers)
        self.run.ran(self.layers)
        return outputs

    def _thresholds(self) -> Tensor:
        assert self.thresholds is not None
        return self.thresholds.on(self.device)

    def _count(self, counter: PairCounter, counts: Tensor) -> None:
        if self.counted is None:
            with torch.inference_mode(False):
                self.counted = torch.tensor(self.layers, device=counts.device)
        counter.add(self.counted, counts)

    def _modality(self, args: list[Any]) -> Tensor:
        num_tokens, device = self.num_tokens(args), self.num_tokens.device
        modality = self.run.take(self.layers, num_tokens)
        if modality is None:
            modality = self.run.read_arguments(self.table, num_tokens)
            if modality is None and self.table is not None:
                modality = self.table.read_first(args, num_tokens)
            if modality is not None:
                self.run.give(modality)
                self.run.taken |= set(self.layers)
        if modality is None:
            self.run.warn_unknown()
            return torch.full((num_tokens,), OTHER, dtype=torch.uint8, device=device)
        return modality.to(device)


def _agree(read: Tensor, told: Tensor) -> bool:
    """Whether rows and ids may be of the same tokens: they differ only where a row is no token's."""
    return read.shape == told.shape and bool(((read == VISION) | (read == told.to(read.device))).all())


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
