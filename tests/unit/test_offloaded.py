"""Models that accelerate spreads over devices and disk are calibrated where they are, to the same bits."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modes_fx.calibration.calibrate import calibrate
from modes_fx.profile import Profile
from modes_fx.testing import SPECIAL, tiny_inputs, tiny_qwen3_vl_moe

accelerate = pytest.importorskip("accelerate")

# Its three decoder layers; the rest stays in memory.
PLACES = {
    "in memory, with hooks": ("cpu", "cpu", "cpu"),
    "one layer on a disk": ("cpu", "disk", "cpu"),
    "all layers on a disk": ("disk", "disk", "disk"),
}


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Any]]:
    made = []
    for seed in range(2):
        inputs = tiny_inputs(seed=seed, batch=2)
        labels = inputs["input_ids"].clone()
        labels[:, :-3] = -100
        made.append({**inputs, "labels": labels})
    return made


def run(model: Any, batches: list[Any], **given: Any) -> Profile:
    return calibrate(model, batches, special_token_ids=SPECIAL, progress=False, **given)


@pytest.fixture(scope="module")
def expected(batches) -> Profile:
    return run(tiny_qwen3_vl_moe(), batches)


@pytest.fixture(params=PLACES)
def dispatched(request, tmp_path: Path) -> Any:
    model = tiny_qwen3_vl_moe()
    text = "model.language_model"
    places = dict.fromkeys(
        ("model.visual", f"{text}.embed_tokens", f"{text}.norm", f"{text}.rotary_emb", "lm_head"), "cpu"
    )
    places |= {f"{text}.layers.{i}": place for i, place in enumerate(PLACES[request.param])}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)


def test_a_dispatched_model_gives_the_same_profile(dispatched, batches, expected):
    forwards = {module: vars(module).get("forward") for module in dispatched.modules()}
    assert run(dispatched, batches) == expected
    assert {module: vars(module).get("forward") for module in dispatched.modules()} == forwards


def test_a_dispatched_model_is_estimated_too(dispatched, batches):
    plain = run(tiny_qwen3_vl_moe(), batches, method="taylor")
    for ours, theirs in zip(run(dispatched, batches, method="taylor").layers, plain.layers, strict=True):
        assert ours.alpha_text == pytest.approx(theirs.alpha_text, rel=1e-4)
        assert ours.fingerprint == theirs.fingerprint


def test_a_model_that_is_offloaded_whole_gives_the_same_profile(tmp_path, batches, expected):
    model = accelerate.cpu_offload(tiny_qwen3_vl_moe(), execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    resume = tmp_path / "resume.json"
    assert run(model, batches, resume=resume) == expected
    assert run(model, batches, resume=resume) == expected


# Two processes that hold one model together, forked from one that has imported everything.
SHARED = """
import os, pathlib, socket, sys

import torch

torch.set_num_threads(1)
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from modes_fx import calibrate
from modes_fx.testing import FAMILIES, SPECIAL

folder, family = pathlib.Path(sys.argv[1]), FAMILIES["qwen3_moe"]


def run(model, name):
    batches = []
    for seed in range(2):
        inputs = family.inputs("batch", seed=seed)
        labels = inputs["input_ids"].clone()
        labels[:, :-3] = -100
        batches.append({**inputs, "labels": labels})
    calibrate(model, batches, special_token_ids=SPECIAL, progress=False).save(folder / name)


with socket.socket() as probe:
    probe.bind(("localhost", 0))
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": probe.getsockname()[1], "WORLD_SIZE": 2}
family.build().save_pretrained(folder / "model")
children = []
for rank in range(2):
    child = os.fork()
    if child == 0:
        group |= {"RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({key: str(value) for key, value in group.items()})
        try:
            config = DistributedConfig(tp_plan="auto", tp_size=2)
            model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=config)
            assert model.tp_size == 2 and dist.get_world_size() == 2
            run(model, f"{rank}.json")
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    children.append(child)
run(family.build(), "whole.json")
assert all([os.waitpid(child, 0)[1] == 0 for child in children])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_processes_that_hold_one_model_together_measure_what_one_does(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SHARED, str(tmp_path)], text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    whole, *shared = (Profile.load(tmp_path / name) for name in ("whole.json", "0.json", "1.json"))
    for profile in shared:
        # They take every batch together, and count it once.
        assert profile.num_samples == whole.num_samples == 6
        for ours, theirs in zip(profile.layers, whole.layers, strict=True):
            assert ours.fingerprint == theirs.fingerprint
            assert ours.alpha_text == pytest.approx(theirs.alpha_text, abs=1e-6)
    assert "takes a whole one" not in done.stderr
