"""Thresholds to try, and the skip rate that each pair of them would give if routing stayed as it is.

One unskipped pass records every score; how many lie below a threshold is then known for any threshold, and so
is the skip rate over the whole grid. Skipping changes later routing, so this is a prediction.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from modes_fx.measure import WeightRecorder
from modes_fx.modality import TEXT, VISION
from modes_fx.skipping import DECODE, PREFILL, Counts

Spacing = Literal["rank", "exp", "linear"]
# The ranges that the paper's code spaces its grid over, text and vision, and the steepness of its map.
_PAPER_RANGES = (0.71, 0.6)
_PAPER_STEEPNESS = 10.0


def threshold_at_rank(scores: Tensor, rank: int) -> float:
    """The threshold below which about `rank` of the scores lie.

    Between two neighbouring scores where they differ; among equal scores, which stand or fall together, at
    the nearer end of the run.

    Args:
        scores: Ascending, `[pairs]` float32, >= 0.
        rank: Pairs to drop; <= 0 gives 0.0 (none), >= len(scores) gives inf (all).
    """
    count = len(scores)
    if rank <= 0 or count == 0:
        return 0.0
    if rank < count:
        value = scores[rank]
        first = int(torch.searchsorted(scores, value))
        last = int(torch.searchsorted(scores, value, right=True))
        rank = first if rank - first <= last - rank else last
    if rank <= 0:
        return 0.0
    if rank >= count:
        return math.inf
    below, above = scores[rank - 1], scores[rank]
    middle = (below + above) / 2
    return float(middle if middle > below else above)


def paper_thresholds(modality: int, count: int, spacing: Spacing) -> list[float]:
    """The thresholds of the paper's code: `count` equal steps x from 0 to 0.71 (text) or 0.6 (vision), mapped
    by 2 / (1 + exp(-10 (x - 1))), or as they are (`linear`)."""
    steps = torch.linspace(0, _PAPER_RANGES[modality], count, dtype=torch.float64)
    if spacing == "exp":
        steps = 2 / (1 + torch.exp(-_PAPER_STEEPNESS * (steps - 1)))
    return [float(step) for step in steps]


class Scores:
    """The recorded scores of one search, and what they predict.

    Args:
        recorder: Of an unskipped pass.
        alphas: (alpha_text, alpha_vision) of each block.
        counts: All pairs of that pass; `phases`: those of the prefill and of the decode.
    """

    def __init__(
        self,
        recorder: WeightRecorder,
        alphas: Sequence[tuple[float, float]],
        counts: Counts,
        phases: tuple[Counts, Counts],
    ) -> None:
        self._recorder, self._alphas = recorder, list(zip(*alphas, strict=True))
        self._pairs = {None: counts.pairs, PREFILL: phases[PREFILL].pairs, DECODE: phases[DECODE].pairs}
        self.num_pairs = int(counts.pairs.sum())
        self._sorted: dict[int | None, list[Tensor]] = {}
        self.of = self._of_phase(None)

    def _of_phase(self, phase: int | None) -> list[Tensor]:
        """Scores of text and of vision, ascending; sorted when first asked for, as they are many."""
        if phase not in self._sorted:
            both = [self._recorder.scores(kind, self._alphas[kind], phase) for kind in (TEXT, VISION)]
            self._sorted[phase] = both
        return self._sorted[phase]

    def _part(self, rate: str) -> tuple[Tensor, Tensor, int]:
        """The scores of text and of vision that a rate is about, and the pairs that it is a share of."""
        if rate in ("skip_text", "skip_vision"):
            kind = TEXT if rate == "skip_text" else VISION
            scores = [self.of[kind] if kind == each else torch.empty(0) for each in (TEXT, VISION)]
            return scores[TEXT], scores[VISION], int(self._pairs[None][:, kind].sum())
        phase = {"skip": None, "skip_prefill": PREFILL, "skip_decode": DECODE}[rate]
        text, vision = self._of_phase(phase)
        return text, vision, int(self._pairs[phase].sum())

    def threshold(self, modality: int, rank: int) -> float:
        return threshold_at_rank(self.of[modality], rank)

    def grid(self, modality: int, count: int, spacing: Spacing) -> Tensor:
        """The distinct thresholds of a grid of `count` per modality, ascending, `[<= count]` float64.

        `rank` spaces them evenly over the recorded scores, from dropping none to dropping all.
        """
        scores = self.of[modality]
        if spacing == "rank":
            ranks = [round(step / max(1, count - 1) * len(scores)) for step in range(count)]
            taus = [threshold_at_rank(scores, rank) for rank in ranks]
        else:
            taus = paper_thresholds(modality, count, spacing)
        return torch.tensor(sorted(set(taus)), dtype=torch.float64)

    def dropped(self, modality: int, taus: Tensor) -> Tensor:
        """Scores of the modality below each threshold, int64."""
        return _below(self.of[modality], taus)

    def share(self, modality: int, taus: Tensor) -> Tensor:
        """`dropped` as a share of the modality's pairs, float64: where on the grid a threshold lies."""
        return self.dropped(modality, taus).double() / max(1, len(self.of[modality]))

    def predict(self, rate: str, text: Tensor, vision: Tensor) -> Tensor:
        """The skip rate named `rate` (see `RATES`) at the thresholds, if routing stays; shapes broadcast."""
        text_scores, vision_scores, pairs = self._part(rate)
        return (_below(text_scores, text) + _below(vision_scores, vision)).double() / max(1, pairs)

    def highest(self, rate: str) -> float:
        """The skip rate when every pair of a text or vision token goes: exact, nothing skips more."""
        text, vision, pairs = self._part(rate)
        return (len(text) + len(vision)) / max(1, pairs)


def _below(scores: Tensor, taus: Tensor) -> Tensor:
    # In float32, as the rule compares.
    return torch.searchsorted(scores, taus.to(torch.float32).contiguous())
