"""The coverage matrix: every family, every way to compile, against the simulated skipping of the eager model.

    python bench/coverage.py                           # the named families in every way, the others in one
    python bench/coverage.py --families llama4 --ways attach

Prints a Markdown table; `--record` writes it and the cells to bench/results/coverage.{md,json}.
"""

import argparse
import gc
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from modes_fx.modality import TEXT, VISION
from modes_fx.progress import progress_bar
from modes_fx.skipping import Counts, Tokens, block_alphas, keep_all, simulate, skip
from modes_fx.testing import FAMILIES
from modes_fx.testing.ways import NAMED, WAYS, Cell, cover

RESULTS = Path(__file__).parent / "results"
ATOL = 1e-4


def half(model: Any, profile: Any, inputs: Any) -> Any:
    """Thresholds that drop about half of the text pairs and of the vision pairs of one call."""
    from modes_fx.blocks import find_blocks

    blocks = find_blocks(model)
    alphas = block_alphas(profile, blocks)
    seen: dict[int, list[torch.Tensor]] = {TEXT: [], VISION: []}

    def note(block: int, weights: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        for kind, scores in seen.items():
            scores.append(alphas[block][kind] * weights[tokens.modality == kind].flatten())
        return keep_all(block, weights, tokens)

    with skip(model, blocks, note, profile.visual_token_ids, profile.special_token_ids):
        model(**inputs, use_cache=False)
    scores = {kind: torch.cat(found) for kind, found in seen.items()}
    tau = {kind: float(found.median()) * (1 + 1e-6) if len(found) else 0.0 for kind, found in scores.items()}
    return profile.with_thresholds(tau_text=tau[TEXT], tau_vision=tau[VISION])


def oracle(model: Any, profile: Any) -> AbstractContextManager[Counts]:
    return simulate(model, profile)


def text_of(cell: Cell) -> str:
    if cell.reason:
        return "declined"
    return f"{cell.layers} of {cell.layers}" if cell.error <= ATOL else f"**differs {cell.error:.0e}**"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    cells: dict[str, dict[str, Cell]] = {}
    with progress_bar("coverage", None, enabled=True) as bar:
        for name in arguments.families:
            for way in arguments.ways:
                if name not in NAMED and way != "decoder":
                    continue
                torch._dynamo.reset()
                gc.collect()
                experts = ("grouped_mm", "batched_mm")[len(cells) % 2]
                bar.note(f"{name}, {way}")
                cells.setdefault(name, {})[way] = cover(
                    FAMILIES[name], WAYS[way], oracle, half, experts=experts
                )
                bar.step()
    lines = ["| family | " + " | ".join(arguments.ways) + " |", "|---" * (len(arguments.ways) + 1) + "|"]
    for name, row in cells.items():
        texts = [text_of(row[way]) if way in row else "" for way in arguments.ways]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    flat = [(name, way, cell) for name, row in cells.items() for way, cell in row.items()]
    reasons = [f"- {name}, {way}: {cell.reason}" for name, way, cell in flat if cell.reason]
    text = "\n".join([*lines, "", *reasons]) + "\n"
    print(text)
    if arguments.record:
        (RESULTS / "coverage.md").write_text(text)
        plain = {name: {way: vars(cell) for way, cell in row.items()} for name, row in cells.items()}
        (RESULTS / "coverage.json").write_text(json.dumps(plain, indent=1) + "\n")


if __name__ == "__main__":
    main()
