"""Inductor's cache: what was compiled with one profile, or with other passes, is never run with another."""

import os
import subprocess
import sys

import pytest
import torch

import modes_fx
from modes_fx.lowering import cache_key, source_digest
from modes_fx.testing import tiny_inputs, tiny_profile, tiny_qwen3_vl_moe

TAG = "the tag of the user"

SCRIPT = """
import dataclasses, sys
import torch
from torch._dynamo.utils import counters
import modes_fx
from modes_fx.testing import tiny_inputs, tiny_profile, tiny_qwen3_vl_moe

model = tiny_qwen3_vl_moe(num_layers=1)
for num_samples in map(int, sys.argv[1:]):
    # The number of samples changes no constant in the graph, only the profile.
    profile = dataclasses.replace(tiny_profile(model), num_samples=num_samples)
    torch._dynamo.reset()
    counters.clear()
    # One block: the fewest kernels for Inductor to compile.
    model.get_decoder().layers[0].mlp.compile(backend=modes_fx.backend(profile))
    with torch.no_grad():
        model(**tiny_inputs(grid=None), use_cache=False)
    print(*(counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss")))
"""


def test_the_profile_is_part_of_the_key_and_the_users_tag_stays():
    with torch.compiler.config.patch(cache_key_tag=TAG):
        with cache_key("abc"):
            inside = torch.compiler.config.cache_key_tag
        assert torch.compiler.config.cache_key_tag == TAG
    assert inside == f"{TAG} modes_fx passes {source_digest()} profile abc"
    assert torch.compiler.config.cache_key_tag == ""


def test_the_sources_are_those_of_passes_and_kernels(tmp_path, monkeypatch):
    for folder in ("passes", "kernels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "passes" / "skip_experts.py").write_text("1")

    def digest():
        source_digest.cache_clear()
        return source_digest()

    real = digest()
    monkeypatch.setattr("modes_fx.lowering.__file__", str(tmp_path / "lowering.py"))
    seen = [real, digest()]
    (tmp_path / "passes" / "skip_experts.py").write_text("2")
    seen.append(digest())
    (tmp_path / "kernels" / "masked_moe.py").write_text("2")
    seen.append(digest())
    (tmp_path / "kernels" / "masked_moe.py").rename(tmp_path / "kernels" / "other.py")
    seen.append(digest())
    (tmp_path / "lowering.py").write_text("")
    assert digest() == seen[-1]
    assert len(set(seen)) == len(seen)
    monkeypatch.undo()
    assert digest() == real


def test_a_profile_is_digested_once(monkeypatch):
    model = tiny_qwen3_vl_moe(num_layers=2)
    calls = []
    digest = modes_fx.Profile.digest
    monkeypatch.setattr(modes_fx.Profile, "digest", lambda self: calls.append(self) or digest(self))
    backend = modes_fx.backend(tiny_profile(model), lowering="eager")
    for layer in model.get_decoder().layers:
        layer.compile(backend=backend)
    with torch.no_grad():
        model.get_decoder()(input_ids=tiny_inputs()["input_ids"])
    assert len(backend.graphs) == 2 and len(calls) == 1
    torch._dynamo.reset()


@pytest.fixture
def compile_in_a_new_process(tmp_path):
    def run(*num_samples):
        """Hits and misses of the cache, one line a profile."""
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *map(str, num_samples)],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "MODES_FX_NATIVE": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()

    return run


def test_a_new_process_finds_what_was_compiled_with_the_same_profile_and_nothing_else(
    compile_in_a_new_process,
):
    assert compile_in_a_new_process(1) == ["0 1"]
    assert compile_in_a_new_process(2, 1) == ["0 1", "1 0"]
