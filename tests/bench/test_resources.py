"""The rules of occupancy, and that spills and tensor cores are seen in machine code."""

import json
import os
import subprocess
import sys

import pytest
from resources import CALLS, report, table_row

from modes_fx.testing.compile_only import compile_only, meta_call, occupancy


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "columns", "blocks", "bound"),
    [
        # From NVIDIA's occupancy calculator.
        (90, 4, 32, 0, 0, 16, "registers"),
        (90, 4, 255, 0, 0, 2, "registers"),
        (80, 8, 128, 0, 0, 2, "registers"),
        (80, 4, 168, 0, 0, 3, "registers"),
        (80, 4, 64, 48 * 1024, 0, 3, "shared memory"),
        (90, 4, 64, 73728, 0, 3, "shared memory"),
        (80, 4, 64, 164 * 1024, 0, 0, "shared memory"),
        (90, 1, 16, 0, 0, 32, "blocks"),
        (90, 16, 16, 0, 0, 4, "warps"),
        (100, 4, 64, 1024, 256, 2, "tensor memory"),
    ],
)
def test_blocks_per_multiprocessor(arch, warps, registers, shared, columns, blocks, bound):
    got, limit = occupancy(arch, warps, registers, shared, columns)
    assert got == blocks
    # Two limits may be equal, and then either is right.
    if (arch, warps, registers) not in [(90, 4, 32), (90, 16, 16)]:
        assert limit == bound


KERNEL = """
import json, torch, triton
import triton.language as tl
from modes_fx.testing.compile_only import compile_only

@triton.jit
def product(a, b, out, N: tl.constexpr, MUL: tl.constexpr):
    n = tl.arange(0, N)
    at = n[:, None] * N + n[None, :]
    x, y = tl.load(a + at), tl.load(b + at)
    # All of x is needed for each of its sums, so that no register is free before the end.
    tl.store(out + at, tl.dot(x, y, out_dtype=tl.float32) if MUL else x / tl.sum(x) + y)

meta = [torch.empty(64, 64, dtype=torch.float16, device="meta") for _ in range(3)]
rows = []
for arch in (80, 90, 100):
    with compile_only(arch) as kernels:
        for multiply, limit in ((True, None), (False, None), (False, 24), (True, None)):
            product[(1,)](*meta, N=64, MUL=multiply, num_warps=4, maxnreg=limit)
    rows += [[k.target, sorted(k.tensor_cores), k.spills, k.stack, k.registers, k.blocks] for k in kernels]
print(json.dumps(rows))
"""


def test_spills_and_tensor_cores_are_seen(tmp_path):
    script = tmp_path / "compile_a_product.py"
    script.write_text(KERNEL)
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    child = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    rows = json.loads(child.stdout)
    for arch, opcode in ((80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")):
        product, other, starved, again = [row for row in rows if row[0].rstrip("a") == f"sm_{arch}"]
        assert product[1] == [opcode]
        assert other[1] == []
        assert product[2:4] == other[2:4] == [0, 0]
        assert starved[2] > 0 and starved[3] > 0
        assert starved[4] <= 24
        assert product == again
        assert product[5] > 0


def test_compiling_where_triton_interprets_is_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=0"), compile_only(90):
        pass


@pytest.mark.parametrize("name", CALLS)
def test_every_call_compiled_is_valid(name):
    meta_call(CALLS[name], 4).check()


def test_a_spill_stands_in_the_table():
    kernel = {
        "arch": 90,
        "name": "k",
        "used_by": {"model": [1, 4]},
        "constants": {"BLOCK_W": 16, "H": 7},
        "num_warps": 4,
        "num_stages": 3,
        "registers": 255,
        "stack": 8,
        "spills": 2,
        "shared": 0,
        "tensor_cores": {"HMMA": 2},
        "blocks": 2,
        "warps": 8,
        "bound": "registers",
    }
    cells = table_row(kernel)
    assert cells[1:3] == ["model (1, 4)", "BLOCK_W 16"]
    assert "8 bytes" in cells and "2 HMMA" in cells
    assert "## sm_90" in report([kernel])
