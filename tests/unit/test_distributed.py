"""Several processes share a calibration: who measures what, and one profile at the end."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from modes_fx.calibration.distributed import World
from modes_fx.profile import Profile


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_batches", [1, 2, 3, 4, 7])
def test_every_block_of_every_batch_is_measured_once(size, num_batches):
    blocks = 6
    every = [World(rank, size).shares(num_batches, blocks) for rank in range(size)]
    measured = Counter((share.batch, block) for shares in every for share in shares for block in share.blocks)
    assert measured == dict.fromkeys(((b, i) for b in range(num_batches) for i in range(blocks)), 1)
    counted = Counter(share.batch for shares in every for share in shares if share.counts)
    assert counted == dict.fromkeys(range(num_batches), 1)
    for shares in every:
        assert [share.batch for share in shares] == sorted(share.batch for share in shares)
        assert all(list(share.blocks) == sorted(share.blocks) for share in shares)
    # Nobody has more than one batch's blocks more than another.
    loads = [sum(len(share.blocks) for share in shares) for shares in every]
    assert max(loads) - min(loads) <= blocks


def test_more_processes_than_batches_and_blocks_leave_some_without_work():
    shares = [World(rank, 8).shares(1, 3) for rank in range(8)]
    assert [len(share) for share in shares] == [1, 1, 1, 0, 0, 0, 0, 0]


def test_a_process_alone_gathers_its_own():
    values = torch.tensor([1.5, 2.5])
    assert World().gather(values).tolist() == [[1.5, 2.5]]
    assert World().file("a/b.json") == "a/b.json"


# One process imports everything and forks the processes of each group; what goes wrong is one line in a file.
SCRIPT = """
import json, os, pathlib, socket, sys

import torch

torch.set_num_threads(1)
import torch.distributed as dist

from modes_fx import calibrate
from modes_fx.errors import ModesError
from modes_fx.testing import SPECIAL, tiny_inputs, tiny_qwen3_vl_moe

model = tiny_qwen3_vl_moe(num_layers=3)


def batch(seed):
    inputs = tiny_inputs(seed=seed, batch=1 + seed % 2)
    labels = inputs["input_ids"].clone()
    labels[:, :-2 - seed % 2] = -100
    return {**inputs, "labels": labels}


class Failing(list):
    times = 0

    def __iter__(self):
        Failing.times += 1
        if Failing.times == 2:
            raise ModesError("the disk is gone")
        return super().__iter__()


def work(rank, folder, wanted):
    batches = [batch(seed) for seed in range(wanted["batches"])]
    if wanted.get("failing") == rank:
        batches = Failing(batches)
    if wanted.get("differing") == rank:
        batches.reverse()
    if wanted.get("joined"):
        dist.init_process_group("gloo")
    given = {"method": wanted.get("method", "exact")}
    if wanted.get("resume"):
        given["resume"] = folder / "resume.json"
    try:
        profile = calibrate(model, batches, special_token_ids=SPECIAL, progress=False, **given)
        profile.save(folder / f"{rank}.json")
    except ModesError as error:
        (folder / f"{rank}.error").write_text(str(error))
    assert dist.is_initialized() == bool(wanted.get("joined"))


for name, size, wanted in json.loads(sys.argv[1]):
    folder = pathlib.Path(sys.argv[2]) / name
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            group = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": size, "RANK": rank}
            os.environ.update({key: str(value) for key, value in group.items()})
            try:
                work(rank, folder, wanted)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert all([os.waitpid(child, 0)[1] == 0 for child in children]), name
"""

GROUPS: list[tuple[str, int, dict[str, Any]]] = [
    ("alone 3", 1, {"batches": 3}),
    ("alone 1", 1, {"batches": 1}),
    ("alone estimated", 1, {"batches": 3, "method": "taylor"}),
    ("two 3", 2, {"batches": 3, "joined": True}),
    ("two 1", 2, {"batches": 1}),
    ("two estimated", 2, {"batches": 3, "method": "taylor"}),
    ("file", 2, {"batches": 3, "resume": True}),
    ("failing", 2, {"batches": 2, "failing": 1}),
    ("differing", 2, {"batches": 2, "differing": 1}),
]


@pytest.fixture(scope="module")
def groups(tmp_path_factory) -> Path:
    """A folder for each of the groups, with what its processes left."""
    if not hasattr(os, "fork"):
        pytest.skip("forks")
    folder = tmp_path_factory.mktemp("groups")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(GROUPS), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("name", "like"),
    [("two 3", "alone 3"), ("two 1", "alone 1"), ("two estimated", "alone estimated"), ("file", "alone 3")],
)
def test_two_processes_give_the_profile_of_one(groups, name, like):
    profiles = [(groups / name / f"{rank}.json").read_bytes() for rank in range(2)]
    assert profiles[0] == profiles[1]
    found, expected = Profile.load(groups / name / "0.json"), Profile.load(groups / like / "0.json")
    assert found.num_samples == expected.num_samples > 0
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        for key in ("alpha_text", "alpha_vision", "weight_scale"):
            assert getattr(ours, key) == pytest.approx(getattr(theirs, key), abs=1e-6)


def test_each_process_keeps_its_part_in_a_file_of_its_own(groups):
    files = sorted((groups / "file").glob("resume*"))
    assert [file.name for file in files] == ["resume.json.0-of-2", "resume.json.1-of-2"]
    states = [json.loads(file.read_text()) for file in files]
    # The first of three batches, the second, and the blocks of the third in two parts.
    assert [len(state["batches"]) for state in states] == [2, 2]
    assert states[0]["batches"][1] == states[1]["batches"][1]
    # Batches of one, two and one rows.
    assert [state["num_samples"] for state in states] == [2, 2]


def test_where_one_process_fails_all_say_so(groups):
    assert (groups / "failing" / "1.error").read_text() == "the disk is gone"
    said = (groups / "failing" / "0.error").read_text()
    assert said == "Process 1 of 2 failed; its own message says why."


def test_processes_with_other_batches_are_refused(groups):
    for rank in range(2):
        said = (groups / "differing" / f"{rank}.error").read_text()
        assert "The 2 processes differ in model or batches; give all of them the same" in said
