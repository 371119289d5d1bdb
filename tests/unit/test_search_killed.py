"""A search that is killed without warning, again and again, gives the bytes of an undisturbed one."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from modes_fx.calibration.calibrate import calibrate
from modes_fx.errors import SearchError
from modes_fx.profile import Profile
from modes_fx.testing import SPECIAL, tiny_inputs, tiny_qwen3_vl_moe
from modes_fx.threshold_search import journal
from modes_fx.threshold_search.search import ThresholdSearch, search

# Forked from one process that has imported everything; a child is killed at a random one of the calls and
# returns of its Python code, so also between any two steps of writing its file.
SCRIPT = """
import json, os, pathlib, random, signal, sys

import torch

torch.set_num_threads(1)

from modes_fx import calibrate, search
from modes_fx.threshold_search import journal
from modes_fx.testing import SPECIAL, tiny_inputs, tiny_qwen3_vl_moe

journal.SAVE_SECONDS = 0.0
folder = pathlib.Path(sys.argv[1])
model = tiny_qwen3_vl_moe(num_layers=1)
batches = []
for seed in (0, 1):
    inputs = tiny_inputs(text=15, seed=seed)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    batches.append({**inputs, "labels": labels})
calibrated = calibrate(model, batches, special_token_ids=SPECIAL, progress=False)


def run(resume, out, alive_for=None):
    events = 0

    def count(frame, event, argument):
        nonlocal events
        events += 1
        if events == alive_for:
            os.kill(os.getpid(), signal.SIGKILL)

    options = {"target_skip": 0.5, "grid": 12, "exponents": [1.0, 0.5], "progress": False, "resume": resume}
    sys.setprofile(count)
    profile = search(model, batches, calibrated, save_frontier=out.with_suffix(".points"), **options)
    sys.setprofile(None)
    profile.save(out)
    return events


def forked(*args):
    child = os.fork()
    if child == 0:
        run(*args)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def written(out):
    return out.read_bytes(), out.with_suffix(".points").read_bytes()


total = run(folder / "whole.resume", folder / "whole.json")
random.seed(0)
kills, equal, stages, chain = 0, [], [], 0
while kills < 24 or len(equal) < 2:
    resume, out = folder / f"{chain}.resume", folder / f"{chain}.json"
    code = forked(resume, out, random.randrange(1, total // 2))
    assert code in (0, -signal.SIGKILL), code
    if code == 0:
        equal.append(written(out) == written(folder / "whole.json"))
        chain += 1
        continue
    kills += 1
    if resume.exists():
        state = json.loads(resume.read_text())
        stages.append((len(state["points"]), state["under_way"] is not None))
assert forked(resume, out) == 0
equal.append(written(out) == written(folder / "whole.json"))
print(json.dumps({"kills": kills, "equal": equal, "stages": stages}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_search_killed_at_random_points_gives_the_same_bytes(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] >= 24
    assert len(found["equal"]) >= 3 and all(found["equal"])
    # It was killed before any point, between points and within a pass.
    assert len({points for points, _ in found["stages"]}) >= 3
    assert any(under_way for _, under_way in found["stages"])
    # What was being written when it was killed is no file that anything reads.
    assert all(path.name.endswith(".partial") for path in tmp_path.iterdir() if path.name.startswith("."))


def labelled(seed: int) -> dict[str, Any]:
    inputs = tiny_inputs(text=15, seed=seed)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return {**inputs, "labels": labels}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_qwen3_vl_moe(num_layers=1)


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Any]]:
    return [labelled(0), labelled(1)]


@pytest.fixture(scope="module")
def calibrated(model, batches) -> Profile:
    return calibrate(model, batches, special_token_ids=SPECIAL, progress=False)


def passes(model: Any, search_once: Any) -> int:
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    handle = model.register_forward_pre_hook(counted)
    search_once()
    handle.remove()
    return count


def test_what_is_in_the_file_is_not_measured_again(model, batches, calibrated, tmp_path):
    def once() -> None:
        search(
            *(model, batches, calibrated),
            target_skip=0.5,
            exponents=[1.0],
            resume=tmp_path / "r.json",
            progress=False,
        )

    assert passes(model, once) > 3 * len(batches)
    # The unskipped pass alone: its answers are what others are compared with, and are not in the file.
    assert passes(model, once) == len(batches)


def test_a_pass_is_kept_after_a_while_and_goes_on(model, batches, calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SAVE_SECONDS", 0.0)
    path = tmp_path / "r.json"
    whole = ThresholdSearch(model, batches, calibrated).measure(0.2, 0.2)
    killed = ThresholdSearch(model, batches, calibrated, resume=path)
    answers = 0

    def interrupted(*args: Any) -> torch.Tensor:
        nonlocal answers
        answers += 1
        if answers == 2:
            raise KeyboardInterrupt
        return original(*args)

    from modes_fx import measure

    original = measure.answer_logits
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(measure, "answer_logits", interrupted)
        killed.measure(0.2, 0.2)
    resumed = ThresholdSearch(model, batches, calibrated, resume=path)
    point: list[Any] = []
    assert passes(model, lambda: point.append(resumed.measure(0.2, 0.2))) == 1
    assert point == [whole]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": "modes_fx.search"}', '{"format": "modes_fx.profile"}']
)
def test_a_file_of_something_else_is_refused_before_the_model_runs(
    model, batches, calibrated, tmp_path, text
):
    path = tmp_path / "r.json"
    path.write_text(text)

    def once() -> None:
        with pytest.raises(SearchError, match=r"r\.json is not a file that search\(resume=\.\.\.\) wrote"):
            search(model, batches, calibrated, target_skip=0.5, resume=path, progress=False)

    assert passes(model, once) == 0
    assert path.read_text() == text


def test_a_file_of_another_search_is_refused(model, batches, calibrated, tmp_path):
    path = tmp_path / "r.json"
    ThresholdSearch(model, batches, calibrated, resume=path).measure(0.1, 0.1)
    with pytest.raises(SearchError, match="belongs to another search: the profile differs"):
        ThresholdSearch(model, batches, calibrated.tempered(0.5), resume=path)
    with pytest.raises(SearchError, match="belongs to another search: the batches differ"):
        ThresholdSearch(model, batches[:1], calibrated, resume=path)
    changed = tiny_qwen3_vl_moe(num_layers=1)
    with torch.no_grad():
        changed.lm_head.weight.mul_(2)
    with pytest.raises(SearchError, match="belongs to another search: the model differs"):
        ThresholdSearch(changed, batches, calibrated, resume=path)


def test_a_path_that_cannot_be_written_is_an_error_before_the_model_runs(
    model, batches, calibrated, tmp_path
):
    def once() -> None:
        with pytest.raises(OSError):
            ThresholdSearch(model, batches, calibrated, resume=tmp_path / "none" / "r.json")

    assert passes(model, once) == 0
