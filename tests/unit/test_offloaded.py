"""Models that accelerate spreads over devices and disk are calibrated where they are, to the same bits."""

from pathlib import Path
from typing import Any

import pytest

from modes_fx.calibrate import calibrate
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
