"""Time other tiles than those of kernels/_masked_moe_tiles.py on this machine's GPU.

    python bench/tune.py --model Qwen3 --tokens 4096 --skip 0.88

Changes one product at a time, gate_up first, and prints the fastest tiles of each, beside the table's own.
Nothing is kept: a tile that wins goes into the table by hand, with the shape and the GPU that it won on, so
that equal calls take equal tiles everywhere. Exit code 2 without a GPU.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from layers import CASES, SKIPS, TOKENS, make_call, markdown

from modes_fx.kernels import _masked_moe_triton as lowering
from modes_fx.kernels._masked_moe_tiles import COARSE, FINE, TABLE, Tile, Tiles, architecture, is_decode
from modes_fx.kernels.masked_moe import Call

Timer = Callable[[Callable[[], object]], float]


def candidates(arch: int, *, decode: bool) -> Iterator[Tile]:
    """Tiles worth a try for products of 16 bits."""
    if decode:
        for rows, step, warps, stages in itertools.product(
            (16, 32, 64), (64, 128, 256, 512), (2, 4, 8), (3, 4, 6, 8, 10)
        ):
            yield Tile((), rows, step, warps, stages, per_sm=1)
        return
    for widths, rows, step, warps, stages in itertools.product(
        (FINE, COARSE, FINE[:-1]), (64, 128), (32, 64, 128), (4, 8), (2, 3, 4, 5)
    ):
        # See the table: sm_100 has no such product, and Triton does not say so.
        if arch != 100 or rows == 64 or all(width % 16 == 0 for width in widths):
            yield Tile(widths, rows, step, warps, stages, per_sm=1)


@contextmanager
def using(tiles: Tiles) -> Iterator[None]:
    """Make the lowering take these tiles."""
    with (
        patch.object(lowering, "choose_tiles", lambda *_: tiles),
        patch.object(lowering, "tiles_for_few_tokens", lambda *_: tiles),
    ):
        yield


def tune(call: Call, tiles: Tiles, arch: int, timer: Timer) -> dict[str, dict[Tile, float]]:
    """Milliseconds of a call by tile, for each product; tiles that do not fit the GPU are left out.

    The second product is tuned with the best tile of the first.
    """
    times: dict[str, dict[Tile, float]] = {}
    for product in ("gate_up", "down"):
        times[product] = {}
        own = getattr(tiles, product)
        for tile in dict.fromkeys((own, *candidates(arch, decode=is_decode(*call.scores.shape)))):
            with using(tiles._replace(**{product: tile})):
                try:
                    times[product][tile] = timer(lambda: lowering.masked_moe_triton(call))
                except _does_not_fit() as error:
                    print(f"{product} {tile}: {error}", file=sys.stderr)
        best = min(times[product], key=times[product].__getitem__)
        tiles = tiles._replace(**{product: best})
    return times


def _does_not_fit() -> tuple[type[Exception], ...]:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return CompilationError, OutOfResources, PTXASError


def report(times: dict[Tile, float], own: Tile, most: int = 10) -> str:
    """The fastest tiles, and the table's own."""
    fastest = sorted(times, key=times.__getitem__)
    shown = fastest[:most] + [own] * (own not in fastest[:most])
    rows = [
        [str(tile._replace(per_sm=own.per_sm)), f"{1000 * times[tile]:.1f}", "table" if tile == own else ""]
        for tile in shown
    ]
    return markdown(["tile", "us", ""], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="Qwen3", help="how the model's name begins")
    parser.add_argument("--tokens", type=int, default=4096, choices=TOKENS)
    parser.add_argument("--skip", type=float, default=0.88, choices=SKIPS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/tune.py times on a GPU, and torch finds none here.", file=sys.stderr)
        sys.exit(2)
    from triton.testing import do_bench_cudagraph

    (case,) = (
        case
        for case in CASES
        if case.layer.model.startswith(options.model) and case[1:] == (options.tokens, options.skip)
    )
    call = make_call(case, "cuda")
    for x in (call.hidden, call.gate_up, call.down):
        x.normal_(std=x.shape[-1] ** -0.5)
    arch = architecture(call.hidden.device)
    own = _tiles_of(call, arch)
    print(
        f"{case.layer.model}, {case.tokens} tokens, {case.skip:.0%} skipped, {torch.cuda.get_device_name()}"
    )
    for product, times in tune(call, own, arch, lambda run: do_bench_cudagraph(run, rep=50)).items():
        print(f"\n{product}\n\n{report(times, getattr(own, product))}")


def _tiles_of(call: Call, arch: int) -> Tiles:
    if is_decode(*call.scores.shape):
        return TABLE["decode", arch]
    sizes = call.hidden.shape[1], call.intermediate_size, call.output_size
    return lowering.choose_tiles(arch, call.hidden.dtype, call.scores.numel(), call.gate_up.shape[0], *sizes)


if __name__ == "__main__":
    main()
