"""Tuning, as far as it goes without a GPU: what is tried, and what comes of the times."""

import pytest
import torch
import tune

from modes_fx.kernels import _masked_moe_triton as lowering
from modes_fx.kernels._masked_moe_tiles import TABLE, Tile
from modes_fx.kernels.masked_moe import Call

OWN = TABLE["some", 90]


@pytest.fixture
def few_candidates(monkeypatch):
    tiles = [OWN.gate_up._replace(block_w=32), OWN.gate_up._replace(num_warps=8)]
    monkeypatch.setattr(tune, "candidates", lambda arch, decode: iter(tiles))
    return tiles


@pytest.fixture
def call():
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    routing = meta(100, 2), meta(100, 2), meta(100, 2, dtype=torch.int64), None
    thresholds = dict.fromkeys(("alpha_text", "alpha_vision", "tau_text", "tau_vision"), 0.5)
    return Call(meta(100, 32), *routing, meta(4, 32, 32), meta(4, 32, 16), **thresholds)


def test_tunes_the_second_product_with_the_best_tile_of_the_first(call, few_candidates, monkeypatch):
    used = []
    monkeypatch.setattr(lowering, "_many_tokens", lambda *_: used.append(lowering.choose_tiles()))
    milliseconds = iter([3.0, 2.0, 1.0, 6.0, 4.0, 5.0])

    def timer(run):
        run()
        return next(milliseconds)

    times = tune.tune(call, OWN, 90, timer)
    first, second = few_candidates
    assert times["gate_up"] == {OWN.gate_up: 3.0, first: 2.0, second: 1.0}
    assert [tiles.gate_up for tiles in used] == [OWN.gate_up, first, second, second, second, second]
    assert [tiles.down for tiles in used[3:]] == [OWN.down, first, second]


def test_leaves_out_what_does_not_fit(call, few_candidates, monkeypatch, capsys):
    from triton.runtime.errors import OutOfResources

    monkeypatch.setattr(lowering, "_many_tokens", lambda *_: None)

    def timer(run):
        run()
        if lowering.choose_tiles().gate_up.block_w == 32:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 1.0

    assert list(tune.tune(call, OWN, 90, timer)["gate_up"]) == [OWN.gate_up, few_candidates[1]]
    assert "shared memory" in capsys.readouterr().err


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_tries_what_the_architecture_can_multiply(arch):
    tried = list(tune.candidates(arch, decode=False))
    assert {TABLE[kind, arch].gate_up._replace(per_sm=1) for kind in ("some", "many")} <= set(tried)
    eight_by_128 = [tile for tile in tried if tile.block_w == 128 and 8 in tile.widths]
    assert bool(eight_by_128) == (arch != 100)


def test_reports_the_fastest_and_the_own_tile():
    times = {Tile((), 16, step, 4, 3, 1): float(step) for step in range(1, 13)}
    rows = tune.report(times, Tile((), 16, 12, 4, 3, 1), most=3).splitlines()[2:]
    assert [row.split("|")[2].strip() for row in rows] == ["1000.0", "2000.0", "3000.0", "12000.0"]
    assert "table" in rows[3]
