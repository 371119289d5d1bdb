"""Run again only what a dropped block can change.

A layer's input does not depend on later layers. The original pass over a batch is therefore remembered: what
each decoder layer gave, and inside each layer what came before its experts and the experts themselves. A pass
that drops a block then runs the model's own code, its loop over the layers included, but

    the layers before the block         give what the layer just before it gave,
    attention and the like in its layer give what they gave,
    its experts                         give what they gave, zero in the rows of dropped tokens,
    the layers after it                 run.

The hidden states are the same to the bit, and so are the logits. That holds where a layer talks to later ones
through its output alone; `check` finds out whether it does.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from modes_fx.blocks import Block
from modes_fx.skipping import Rule, Tokens

log = logging.getLogger(__name__)
_Forward = Callable[..., Any]

# What is remembered of one batch stays on its device, up to this much. Beyond it a layer is run once more
# for each block, and only what the next block needs is held.
PREFIX_MEMORY_BYTES = 4 << 30


@dataclass(frozen=True)
class _Place:
    """Where a block is.

    Attributes:
        layer: Its layer's number.
        beside: Modules of that layer beside the block's experts that cost something.
    """

    layer: int
    beside: tuple[nn.Module, ...]


class DroppedRows:
    """A rule that notes which rows of one block lose all their pairs, for `Prefix.before`."""

    def __init__(self, rule: Rule, block: int) -> None:
        self._rule, self._block = rule, block
        self.rows: Tensor | None = None

    def __call__(self, block: int, weights: Tensor, tokens: Tokens) -> Tensor:
        dropped = self._rule(block, weights, tokens)
        if block == self._block:
            self.rows = dropped.all(-1)
        return dropped


class Prefix:
    """What the original pass over one batch gave, layer by layer.

    Blocks are to be dropped in layer order: what lies before a block is forgotten when the next one comes.

    Args:
        model: The eager model.
        blocks: `find_blocks(model)`.
    Attributes:
        layers: The decoder layers; none where the blocks are not in one list of them.
        reason: Why nothing can be reused, "" where it can; then `recording` and `before` do nothing.
        checked: Whether `check` has run, or need not.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self.reason = ""
        self.checked = False
        self._blocks = blocks
        self.layers: list[nn.Module] = []
        self._places: list[_Place] = []
        self._find(model)
        self._outputs: dict[int, Any] = {}  # by layer
        self._inside: dict[nn.Module, tuple[int, Any]] = {}  # (layer, output)
        # By block: what its layer had run, of what costs something, when its experts began.
        self._before: dict[int, list[nn.Module]] = {}

    def _find(self, model: nn.Module) -> None:
        names = {module: name for name, module in model.named_modules()}
        lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
        for block in self._blocks:
            parts = names[block.experts].split(".")
            paths = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
            outer = next((path for path in paths if path in lists), None)
            layers = list(lists[outer]) if outer is not None else []
            if not layers or (self.layers and layers != self.layers):
                self.reason = "its blocks are not in one list of layers"
                return
            self.layers = layers
            assert outer is not None
            number = int(parts[len(outer.split("."))])
            inside = [path for path in paths if path.startswith(f"{outer}.{number}")]
            chain = [model.get_submodule(path) for path in inside]
            beside = [
                child
                for module in chain[:-1]
                for child in module.children()
                if child not in chain and block.router not in set(child.modules()) and _costs(child)
            ]
            self._places.append(_Place(number, tuple(beside)))

    def give_up(self, reason: str) -> None:
        """Reuse nothing from now on."""
        self.reason = reason
        self.checked = True
        self.forget()
        log.warning("Nothing of a pass can be reused, and each block takes a whole one: %s.", reason)

    def forget(self) -> None:
        """Before another batch."""
        self._outputs.clear()
        self._inside.clear()
        self._before.clear()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The original pass: inside, a call of the model is remembered."""
        if self.reason:
            yield
            return
        self.forget()
        order: list[int] = []
        calls: Counter[nn.Module] = Counter()

        def record_layer(number: int) -> _Forward:
            forward = self._record_output(number)

            def run(*args: Any, **kwargs: Any) -> Any:
                order.append(number)
                return forward(*args, **kwargs)

            return run

        def record_module(module: nn.Module, layer: int) -> _Forward:
            forward = self._record_inside(module, layer)

            def run(*args: Any, **kwargs: Any) -> Any:
                calls[module] += 1
                return forward(*args, **kwargs)

            return run

        def record_experts(index: int, place: _Place) -> _Forward:
            forward = record_module(self._blocks[index].experts, place.layer)

            def run(*args: Any, **kwargs: Any) -> Any:
                self._before[index] = [module for module in place.beside if calls[module]]
                return forward(*args, **kwargs)

            return run

        forwards = {layer: record_layer(number) for number, layer in enumerate(self.layers)}
        for place in self._places:
            forwards |= {module: record_module(module, place.layer) for module in place.beside}
        for index, place in enumerate(self._places):
            forwards[self._blocks[index].experts] = record_experts(index, place)
        with replaced_forwards(forwards):
            yield
        if order != list(range(len(self.layers))):
            self.give_up("its layers are not run once each, in order")
        # One output cannot stand for two calls.
        for module in [module for module in self._inside if calls[module] != 1]:
            del self._inside[module]
        for index, modules in self._before.items():
            self._before[index] = [module for module in modules if calls[module] == 1]

    @contextmanager
    def before(self, index: int, rule: DroppedRows) -> Iterator[None]:
        """A pass that drops block `index`: inside, a call of the model starts at that block's experts.

        Args:
            rule: What the pass drops; it has to be asked while the model runs.
        """
        if self.reason:
            yield
            return
        layer = self._places[index].layer
        known = max((number for number in self._outputs if number < layer), default=-1)
        self._outputs = {n: output for n, output in self._outputs.items() if n >= known}
        self._inside = {m: entry for m, entry in self._inside.items() if entry[0] >= layer}
        forwards = {self.layers[n]: _replay(self._outputs[known]) for n in range(known + 1)}
        if known < layer - 1:
            # Nothing is dropped before the block, so this is the original pass again.
            forwards[self.layers[layer - 1]] = self._record_output(layer - 1, needed=True)
        for module in self._before.get(index, ()):
            if module in self._inside:
                forwards[module] = _replay(self._inside[module][1])
            else:
                forwards[module] = self._record_inside(module, layer)
        block = self._blocks[index]
        if block.experts in self._inside and block.dispatch == "slots":
            forwards[block.experts] = _replay_experts(block.experts, self._inside[block.experts][1], rule)
        with replaced_forwards(forwards):
            yield

    def check(self, run: Callable[[], Tensor], run_dropped: Callable[[], Tensor]) -> None:
        """Find out, after the first batch was recorded, whether reuse changes a bit; `give_up` if it does.

        Each layer is run alone, on what the one before it gave, while all others give what they gave: its
        output is another one if it needs anything else that an earlier layer leaves behind. Then the last
        block is dropped both ways. That takes two whole passes in all.

        Args:
            run: Calls the model with nothing dropped.
            run_dropped: Drops the last block within `before`, and gives the logits.
        """
        self.checked = True
        for number in range(1, len(self.layers)):
            if self.reason or number - 1 not in self._outputs or number not in self._outputs:
                break
            self._check_layer(run, number)
        if self.reason:
            return
        kept = (dict(self._outputs), dict(self._inside))
        try:
            reused = run_dropped()
        except Exception as error:  # a model may fail in any way where it misses what a layer leaves behind
            self.give_up(f"a pass that starts in the middle fails ({error})")
            return
        self.reason = "being checked"
        whole = run_dropped()
        self.reason, (self._outputs, self._inside) = "", kept
        if not torch.equal(reused, whole):
            self.give_up("a pass that starts in the middle gives other logits")

    def _check_layer(self, run: Callable[[], Tensor], number: int) -> None:
        earlier, own = self._outputs[number - 1], self._outputs[number]
        forwards = {
            layer: _replay(earlier if n < number else own)
            for n, layer in enumerate(self.layers)
            if n != number
        }
        forward = self.layers[number].forward
        same = False

        def compare(*args: Any, **kwargs: Any) -> Any:
            nonlocal same
            output = forward(*args, **kwargs)
            ours, theirs = _tensors(output), _tensors(own)
            same = len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
            return output

        forwards[self.layers[number]] = compare
        try:
            with replaced_forwards(forwards):
                run()
        except Exception as error:  # see `check`
            self.give_up(f"layer {number} fails without what earlier layers leave behind ({error})")
            return
        if not same:
            self.give_up(f"layer {number} gives something else without what earlier layers leave behind")

    def _record_output(self, number: int, *, needed: bool = False) -> _Forward:
        forward = self.layers[number].forward

        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if needed or self._fits(output):
                self._outputs[number] = _copy(output)
            return output

        return run

    def _record_inside(self, module: nn.Module, layer: int) -> _Forward:
        forward = module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if self._fits(output):
                self._inside[module] = (layer, _copy(output))
            return output

        return run

    def _fits(self, output: Any) -> bool:
        held = [*self._outputs.values(), *(entry for _, entry in self._inside.values()), output]
        return sum(tensor.nbytes for tensor in _tensors(held)) <= PREFIX_MEMORY_BYTES


def _costs(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix, as a norm does not."""
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _replay(output: Any) -> _Forward:
    # A copy, for the model may write into what it gets.
    return lambda *args, **kwargs: _copy(output)


def _replay_experts(experts: nn.Module, output: Any, rule: DroppedRows) -> _Forward:
    forward = experts.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        rows = rule.rows
        if not isinstance(output, Tensor) or rows is None or output.shape[:-1].numel() != len(rows):
            return forward(*args, **kwargs)
        return output.masked_fill(rows.to(output.device).view(*output.shape[:-1], 1), 0)

    return run


def _copy(value: Any) -> Any:
    """A copy of every tensor in a module's output; what else there is stays the object it is."""
    return tree_map_only(Tensor, Tensor.clone, value)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, _Forward]) -> Iterator[None]:
    """Replace `forward` of modules, around which their hooks still run; put back what was there."""
    own = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, before in own.items():
            if before is not None:
                module.forward = before
            elif "forward" in module.__dict__:
                del module.forward
