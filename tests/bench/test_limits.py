"""Data sheets, the model of time, and the table of times."""

from dataclasses import replace

import pytest
from counting import Launch
from layers import LAYERS, Case, Needed
from limits import A100, A100_PCIE, B200, H100, H200, Timing, find_gpu, timing_table
from roofline import ASSUMED, launch_parts, modelled
from work import Counts

CASE = Case(LAYERS[0], 16, 0.0)
SKIPPED = CASE._replace(skip=0.5)
NEEDED = Needed(pairs=10, experts=4, flops=10**9, bytes=3350 * 10**6)


@pytest.mark.parametrize(
    ("name", "memory", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", 85e9, H100),
        ("NVIDIA H100 PCIe", 85e9, None),
        ("NVIDIA H100 NVL", 99e9, None),
        ("NVIDIA H200", 150e9, H200),
        ("NVIDIA B200", 190e9, B200),
        ("NVIDIA A100-SXM4-80GB", 85e9, A100),
        ("NVIDIA A100-SXM4-40GB", 42e9, None),
        ("NVIDIA A100-PCIE-40GB", 42e9, A100_PCIE),
        ("NVIDIA A100 80GB PCIe", 85e9, None),
        ("NVIDIA GeForce RTX 4090", 24e9, None),
    ],
)
def test_a_gpu_is_known_by_its_name(name, memory, gpu):
    assert find_gpu(name, int(memory)) is gpu


def test_the_limit_is_the_slower_of_products_and_bytes():
    assert H100.limit_us(NEEDED) == pytest.approx(1000)
    assert H100.limit_us(replace(NEEDED, flops=989 * 10**12)) == pytest.approx(1e6)


def launch(**counts):
    made = Launch("kernel", programs=1000, working=1000)
    for name, count in counts.items():
        if isinstance(count, int):
            setattr(made, name, count)
        else:
            getattr(made, name).update(count)
    return made


def test_a_launch_takes_as_long_as_what_takes_longest():
    once = launch(flops=10**9, loaded={"w": 10**9}, distinct_loaded={"w": 10**9})
    parts = launch_parts(once, H100)
    assert parts["DRAM"] == pytest.approx(1e6 * 1e9 / (3.35e12 * ASSUMED.dram))
    assert parts["L2"] == pytest.approx(1e6 * 1e9 / H100.l2)
    assert parts["tensor cores"] == pytest.approx(1e6 * 1e9 / (989e12 * ASSUMED.products))
    t = modelled(Counts(CASE, NEEDED, [once, once]), H100)
    assert t.us == pytest.approx(2 * (ASSUMED.launch_us + parts["DRAM"]))
    assert (t.bound, t.launches) == ("DRAM", 2)


def test_few_programs_reach_neither_bandwidth_nor_peak():
    full = launch_parts(launch(flops=10**9, distinct_loaded={"w": 10**9}), H100)
    few = launch_parts(launch(working=2, flops=10**9, distinct_loaded={"w": 10**9}), H100)
    assert few["tensor cores"] == pytest.approx(full["tensor cores"] * 132 / 2)
    assert few["DRAM"] == pytest.approx(1e6 * 1e9 / (2 * ASSUMED.stream))


def test_an_empty_launch_takes_the_time_of_a_launch():
    t = modelled(Counts(CASE, NEEDED, [Launch("kernel", programs=3)]), H100)
    assert t.us == ASSUMED.launch_us
    assert t.bound == "launches"


def test_gains_are_over_no_skipping():
    timings = [
        Timing(CASE, NEEDED, 2000.0, 2, spread=(1990.0, 2020.5), others={"grouped_mm": 4000.0}),
        Timing(SKIPPED, replace(NEEDED, bytes=NEEDED.bytes // 2), 1250.0, 2, bound="DRAM"),
    ]
    lines = timing_table(timings, H100, "us").splitlines()
    assert lines[0] == f"### {LAYERS[0].model}"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    first, second = (dict(zip(cells[0], row, strict=True)) for row in cells[2:4])
    assert first["us"] == "2000.0 (1990.0 - 2020.5)"
    assert (first["limit us"], first["of limit"]) == ("1000.0", "50 %")
    assert (first["grouped_mm"], second["grouped_mm"]) == ("4000.0", "-")
    assert (second["gain"], second["gain of limit"], second["bound by"]) == ("1.60", "2.00", "DRAM")


def test_a_gpu_without_a_data_sheet_has_no_limits():
    table = timing_table([Timing(SKIPPED, NEEDED, 10.0, 2)], None, "us")
    assert "limit" not in table and "bound" not in table
    # Nothing to compare with was timed.
    assert "| 16 | 50 % | 10 | 4 | 10.0 | - | 2 |" in table
