"""Two layers of the shipped model, what they answer with the dropped pairs at weight zero, and their exports.

Layers of the shipped model, and not of a random one, so that the serving example has its words and pictures.
"""

import math
import os

import pytest
import torch
from filelock import FileLock

import modes_fx
from modes_fx import demo
from modes_fx.skipping import simulate
from modes_fx.testing import tiny_profile
from modes_fx.testing.qwen3_vl_moe import tiny_inputs
from modes_fx.testing.tokens import PAD

NEW_TOKENS = 4
GRID = (12, 12)  # patches of a scene
OPTIONS = {"onnx": {}, "aoti": {"aot_inductor.compile_wrapper_opt_level": "O0"}}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "aoti": ()}


def make_inputs(*, text=9, grid=GRID, batch=1, seed=0):
    """`tiny_inputs` with patches as the shipped model takes them."""
    return tiny_inputs(text=text, grid=grid, patch=8, batch=batch, seed=seed)


@pytest.fixture(scope="session", name="make_inputs")
def _make_inputs():
    return make_inputs


@pytest.fixture(scope="session")
def model():
    whole, _ = demo.load()
    whole.model.language_model.layers = whole.model.language_model.layers[:2]
    whole.config.text_config.num_hidden_layers = 2
    return whole


@pytest.fixture(scope="session")
def profile(model):
    """Part of the pairs of text, and all of vision."""
    return tiny_profile(model, tau_text=0.03, tau_vision=math.inf)


@pytest.fixture(scope="session")
def example():
    """What is traced; no test calls a program with these numbers of rows and tokens."""
    return make_inputs(text=6, batch=2)


@pytest.fixture(scope="session")
def exported(model, profile, example, tmp_path_factory):
    """The folder of a target, written by the first of pytest's processes that asks for it."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(target):
        for library in NEEDS[target]:
            pytest.importorskip(library)
        path = root / f"export-{target}"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                modes_fx.export(model, profile, example, path, target=target, options=OPTIONS[target])
        return path

    return folder


@pytest.fixture(scope="session")
def oracle(model, profile):
    """Calls the eager model with dropped pairs at weight zero."""

    @torch.no_grad()
    def call(method="__call__", **inputs):
        with simulate(model, profile) as counts:
            result = getattr(model, method)(**inputs)
        assert counts.skip() > 0.1
        return result

    return call


@pytest.fixture(scope="session")
def claims(oracle):
    return Claims(oracle)


class Claims:
    """What every target that runs here must show; `program` is a loaded folder."""

    def __init__(self, oracle):
        self.oracle = oracle

    def prefill(self, program, atol=1e-4):
        """Logits at numbers of rows, tokens and pictures that were not traced."""
        for rows, text in ((1, 1), (1, 9), (3, 40)):
            for grid in (GRID, None):
                self.logits(program, make_inputs(text=text, grid=grid, batch=rows, seed=text), atol)

    def logits(self, program, inputs, atol=1e-4):
        want = self.oracle(**inputs).logits
        torch.testing.assert_close(program(**inputs).logits.float(), want, atol=atol, rtol=0)

    def padded_rows(self, program, atol=1e-4):
        inputs = make_inputs(text=9, batch=2)
        inputs["attention_mask"][1, -4:] = 0
        inputs["input_ids"][1, -4:] = PAD
        real = inputs["attention_mask"].bool()
        got, want = program(**inputs).logits.float(), self.oracle(**inputs).logits
        torch.testing.assert_close(got[real], want[real], atol=atol, rtol=0)

    def generation(self, program):
        """The tokens of `generate`, with a picture and without, one row and several."""
        for rows, grid in ((1, GRID), (2, GRID), (1, None)):
            inputs = make_inputs(text=5, grid=grid, batch=rows, seed=3)
            want = self.oracle("generate", **inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            got = program.generate(max_new_tokens=NEW_TOKENS, **inputs)
            assert got.tolist() == want[:, inputs["input_ids"].shape[1] :].tolist()
