"""A calibration that is killed without warning, again and again, gives the bytes of an undisturbed one."""

import json
import os
import subprocess
import sys

import pytest

# Forked from one process that has imported everything; a child is killed at a random one of the calls and
# returns of its Python code, so also between any two steps of writing its file.
SCRIPT = """
import json, os, pathlib, random, signal, sys

import torch

torch.set_num_threads(1)

from modes_fx import calibrate
from modes_fx.calibration import state
from modes_fx.testing import SPECIAL, tiny_inputs, tiny_qwen3_vl_moe

state.SAVE_SECONDS = 0.0
folder = pathlib.Path(sys.argv[1])
model = tiny_qwen3_vl_moe(num_layers=2)
batches = []
for seed in (0, 1):
    inputs = tiny_inputs(seed=seed)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    batches.append({**inputs, "labels": labels})


def run(resume, out, alive_for=None):
    events = 0

    def count(frame, event, argument):
        nonlocal events
        events += 1
        if events == alive_for:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    profile = calibrate(model, batches, special_token_ids=SPECIAL, progress=False, resume=resume)
    sys.setprofile(None)
    profile.save(out)
    return events


def forked(*args):
    child = os.fork()
    if child == 0:
        run(*args)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


total = run(folder / "whole.resume", folder / "whole.json")
whole = (folder / "whole.json").read_bytes()
random.seed(0)
kills, equal, stages, chain = 0, [], set(), 0
while kills < 24 or len(equal) < 2:
    resume, out = folder / f"{chain}.resume", folder / f"{chain}.json"
    code = forked(resume, out, random.randrange(1, 2 * total // 3))
    assert code in (0, -signal.SIGKILL), code
    if code == 0:
        equal.append(out.read_bytes() == whole)
        chain += 1
        continue
    kills += 1
    if resume.exists():
        state = json.loads(resume.read_text())
        partial = sum(kl is not None for row in state["partial"] or [] for kl in row)
        stages.add((len(state["batches"]), partial))
assert forked(resume, out) == 0
equal.append(out.read_bytes() == whole)
print(json.dumps({"kills": kills, "equal": equal, "stages": sorted(stages)}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_calibration_killed_at_random_points_gives_the_same_bytes(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] >= 24
    assert len(found["equal"]) >= 3 and all(found["equal"])
    # It was killed with nothing done, within a batch and between batches.
    assert any(partial for _, partial in found["stages"])
    assert {batches for batches, _ in found["stages"]} >= {0, 1}
    # What was being written when it was killed is no file that anything reads.
    assert all(path.name.endswith(".partial") for path in tmp_path.iterdir() if path.name.startswith("."))
