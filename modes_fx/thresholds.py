"""Thresholds that a running model reads, and the count of the pairs that it drops.

`modes_fx.backend(profile, adjustable=True, counting=True)` and `attach` make one of each; `Controller` reads
the count and moves the thresholds.
"""

import math
import threading
from typing import Any

import torch
from torch import Tensor

from modes_fx.profile import Profile
from modes_fx.skipping import Counts


class Thresholds:
    """tau_text and tau_vision as tensors, one on each device. They are written in place, so that a compiled
    graph, or one captured by CUDA, reads the new values at its next run and is never compiled again.

    Attributes:
        profile: Whose thresholds they are at first.
        bounds: Least and greatest tau of text and of vision. Passes may leave out what no tau within them
            needs.
    """

    def __init__(self, profile: Profile, adjustable: bool | tuple[float, float] = True) -> None:
        """
        Args:
            adjustable: True, or the least and the greatest factor on the profile's thresholds.
        Raises:
            ValueError: Factors that do not hold 1, or of a threshold below zero.
        """
        self.profile = profile
        taus = (profile.tau_text, profile.tau_vision)
        self.bounds = ((-math.inf, math.inf), (-math.inf, math.inf))
        if not isinstance(adjustable, bool):
            low, high = adjustable
            if not (0 < low <= 1 <= high < math.inf and min(taus) >= 0):
                raise ValueError(
                    "adjustable must be True, or factors (low, high) with 0 < low <= 1 <= high on thresholds "
                    f"of zero or more, got {adjustable} on {taus}."
                )
            # Zero and infinity are their own multiples, and stay.
            text, vision = ((low * tau, high * tau) for tau in taus)
            self.bounds = (text, vision)
        self._values = taus
        self._tensors: dict[torch.device, Tensor] = {}
        self._lock = threading.Lock()

    @property
    def text(self) -> float:
        return self._values[0]

    @property
    def vision(self) -> float:
        return self._values[1]

    def set(self, *, text: float | None = None, vision: float | None = None) -> None:
        """Change thresholds, for all calls from now on and all threads; a call that is running may see the
        old one in its first layers and the new one in its last.

        Raises:
            ValueError: NaN, or out of `bounds`; nothing is changed.
        """
        given = (self.text if text is None else float(text), self.vision if vision is None else float(vision))
        for name, tau, (low, high) in zip(("text", "vision"), given, self.bounds, strict=True):
            # A NaN is within no bounds.
            if not low <= tau <= high:
                raise ValueError(f"The threshold of {name} must be from {low:g} to {high:g}, got {tau}.")
        with self._lock, torch.no_grad():
            self._values = given
            for tensor in self._tensors.values():
                tensor.copy_(torch.tensor(given))

    def on(self, device: torch.device) -> Tensor:
        """tau of text and of vision, `[2]`, float32: the same tensor at each call."""
        found = self._tensors.get(device)
        if found is None:
            with self._lock, torch.inference_mode(False):
                found = self._tensors.setdefault(
                    device, torch.tensor(self._values, dtype=torch.float32, device=device)
                )
        return found


class PairCounter:
    """Counts pairs and dropped pairs of a model's layers, on the devices where they run; adding never waits.

    Threads add to tensors of their own. Counts only ever grow, so that who wants those of a while takes the
    difference of two readings.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self._tensors: dict[Any, Tensor] = {}
        self._lock = threading.Lock()

    def add(self, layers: Tensor, counts: Tensor) -> None:
        """Add `counts`, `[n, 2, 3]` as of `count_pairs`, to the layers of these numbers, `[n]`."""
        self.tensor((threading.get_ident(), counts.device), counts.device).index_add_(0, layers, counts)

    def tensor(self, key: Any, device: torch.device) -> Tensor:
        """What `key` adds to, `[layers, 2, 3]`, int64."""
        found = self._tensors.get(key)
        if found is None:
            with self._lock, torch.inference_mode(False):
                zero = torch.zeros(self.num_layers, 2, 3, dtype=torch.int64, device=device)
                found = self._tensors.setdefault(key, zero)
        return found

    def read(self) -> Counts:
        """All counts so far, on the CPU; on a GPU this waits for what has been launched."""
        with self._lock:
            tensors = list(self._tensors.values())
        total = sum((each.cpu() for each in tensors), torch.zeros(self.num_layers, 2, 3, dtype=torch.int64))
        return Counts(total[:, 0], total[:, 1])
