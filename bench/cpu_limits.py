"""What limits the CPU kernel: reading its weights alone, its arithmetic alone, and both together.

    OMP_NUM_THREADS=1 python bench/cpu_limits.py

Each expert has about as many tokens as at 88 % skip. "reading" is a pure read of the weights from memory;
"arithmetic" is the kernel with one row in place of all, which stays in the nearest cache; "together" is the
kernel with weights from memory. Were the two to overlap in full, "together" would be the larger of them.
"""

import argparse
import functools

import torch
from interleave import Run, interleave, ratios, spread
from memory import Regions

from modes_fx.kernels.masked_moe import masked_moe

EXPERTS = {512: 96, 1024: 24}  # enough that no cache holds a good part of them
WIDTHS = ((512, 192), (1024, 768))
ROWS = (1, 8, 31)  # tokens of an expert, on average: in decode, and at 88 % of 1024 and 4096 tokens

KEEP_ALL = {"alpha_text": 1.0, "alpha_vision": 1.0, "tau_text": 0.0, "tau_vision": 0.0}


def measure(dtype: torch.dtype, hidden: int, inner: int, rows: int) -> list[str]:
    """One line of the table: milliseconds of each, and the time together over the larger and over the sum."""
    experts = EXPERTS[hidden]
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(experts, 2 * inner, hidden, generator=generator).to(dtype)
    down = torch.randn(experts, hidden, inner, generator=generator).to(dtype)
    tokens = rows * experts
    ids = torch.randint(experts, (tokens, 1), generator=generator)
    ids = torch.arange(experts)[:, None] if rows == 1 else ids
    scores = torch.ones(tokens, 1)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    regions = Regions([gate_up, down])

    def run(gate_up: torch.Tensor, down: torch.Tensor, _sample: int) -> None:
        masked_moe(x, scores, scores, ids, None, gate_up, down, None, None, **KEEP_ALL)

    one_row = gate_up[:1, :1].expand_as(gate_up), down[:1, :1].expand_as(down)
    runs = {
        "reading": Run(lambda sample: regions.read(), lambda sample: regions.evict()),
        "arithmetic": Run(functools.partial(run, *one_row)),
        "together": Run(functools.partial(run, gate_up, down), lambda sample: regions.evict()),
    }
    interleave(runs, budget_s=0, least=1, most=1)
    spent = interleave(runs, budget_s=2, least=5)
    larger = [max(pair) for pair in zip(spent["reading"], spent["arithmetic"], strict=True)]
    both = [sum(pair) for pair in zip(spent["reading"], spent["arithmetic"], strict=True)]
    cells = [f"{spread(spent[name])[1]:.2f}" for name in runs]
    return cells + [f"{ratios(spent['together'], each)[1]:.2f}" for each in (larger, both)]


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    columns = ("reading, ms", "arithmetic", "together", "over the larger", "over the sum")
    print("| dtype, hidden, inner, tokens of an expert | " + " | ".join(columns) + " |")
    print("|---" * 6 + "|")
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            for hidden, inner in WIDTHS:
                for rows in ROWS:
                    cells = [
                        f"{str(dtype)[6:]}, {hidden}, {inner}, {rows}",
                        *measure(dtype, hidden, inner, rows),
                    ]
                    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
