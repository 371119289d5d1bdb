"""What the vision tower gave for each batch, remembered, as skipping cannot change it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from modes_fx.blocks import is_experts

# Vision towers are run once per batch and remembered up to this much; beyond it they are run again.
ENCODER_MEMORY_BYTES = 4 << 30


class EncoderMemory:
    """Remembers what the vision tower gave for each batch: it lies before every expert, so skipping cannot
    change it, and it costs more than a small decoder. Without a tower, or past the limit, does nothing."""

    def __init__(self, model: nn.Module, limit_bytes: int = ENCODER_MEMORY_BYTES) -> None:
        find = getattr(model, "get_encoder", None)
        tower = find("image") if find is not None else model
        alone = tower is not model and not any(is_experts(module) for module in tower.modules())
        self._tower = tower if alone else None
        self._outputs: dict[tuple[int, int], Any] = {}
        self._left_bytes = limit_bytes

    def forget(self) -> None:
        self._outputs.clear()

    @contextmanager
    def for_batch(self, index: int) -> Iterator[None]:
        """Inside, the tower's calls are answered from memory where batch `index` has made them before."""
        tower = self._tower
        if tower is None:
            yield
            return
        forward, own = tower.forward, tower.__dict__.get("forward")
        calls = 0

        def remembered(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            key = (index, calls)
            calls += 1
            if key not in self._outputs:
                output = forward(*args, **kwargs)
                size = _num_bytes(output)
                if size > self._left_bytes:
                    return output
                self._left_bytes -= size
                self._outputs[key] = output
            # Models write into the container they get (not into its tensors), so each call gets its own.
            output = self._outputs[key]
            return type(output)(**output) if isinstance(output, dict) else output

        tower.forward = remembered
        try:
            yield
        finally:
            if own is None:
                del tower.forward
            else:
                tower.forward = own


def _num_bytes(output: Any) -> int:
    if isinstance(output, Tensor):
        return output.nbytes
    if isinstance(output, Mapping):
        output = list(output.values())
    return sum(map(_num_bytes, output)) if isinstance(output, list | tuple) else 0
