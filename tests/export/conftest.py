"""A tiny model with pictures, its profile, and what it answers with the dropped pairs at weight zero."""

import json
import subprocess
import sys

import pytest
import torch

from modes_fx.skipping import simulate
from modes_fx.testing import tiny_profile
from modes_fx.testing.qwen3_vl_moe import tiny_inputs, tiny_qwen3_vl_moe
from modes_fx.testing.tokens import PAD

NEW_TOKENS = 4
WITHOUT_TRANSFORMERS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import json, torch
import modes_fx

program = modes_fx.load(sys.argv[1])
inputs = {name: torch.tensor(value) for name, value in json.load(sys.stdin).items()}
tokens = program.generate(max_new_tokens=4, **inputs)
print(json.dumps([tokens.tolist(), program(**inputs).logits.tolist()]))
"""


@pytest.fixture(scope="session")
def model():
    return tiny_qwen3_vl_moe(num_layers=2)


@pytest.fixture(scope="session")
def profile(model):
    return tiny_profile(model)


@pytest.fixture(scope="session")
def example():
    """What is traced; no test calls a program with these numbers of rows and tokens."""
    return tiny_inputs(text=6, batch=2)


@pytest.fixture(scope="session")
def oracle(model, profile):
    """Calls the eager model with dropped pairs at weight zero."""

    @torch.no_grad()
    def call(method="__call__", **inputs):
        with simulate(model, profile) as counts:
            result = getattr(model, method)(**inputs)
        assert counts.skip() > 0.2
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
        """Logits at numbers of rows, tokens and pictures that were not traced; a single token too."""
        for rows, text in ((1, 1), (1, 9), (3, 40)):
            for grid in ((4, 4), None):
                inputs = tiny_inputs(text=text, grid=grid, batch=rows, seed=text)
                want = self.oracle(**inputs).logits
                torch.testing.assert_close(program(**inputs).logits.float(), want, atol=atol, rtol=0)
        token = torch.tensor([[9]])
        torch.testing.assert_close(
            program(input_ids=token).logits.float(), self.oracle(input_ids=token).logits, atol=atol, rtol=0
        )

    def padded_rows(self, program, atol=1e-4):
        inputs = tiny_inputs(text=9, batch=2)
        inputs["attention_mask"][1, -4:] = 0
        inputs["input_ids"][1, -4:] = PAD
        real = inputs["attention_mask"].bool()
        got, want = program(**inputs).logits.float(), self.oracle(**inputs).logits
        torch.testing.assert_close(got[real], want[real], atol=atol, rtol=0)

    def generation(self, program):
        """The tokens of `generate`, with a picture and without, one row and several."""
        for rows, grid in ((1, (4, 4)), (2, (4, 4)), (1, None)):
            inputs = tiny_inputs(text=5, grid=grid, batch=rows, seed=3)
            want = self.oracle("generate", **inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            got = program.generate(max_new_tokens=NEW_TOKENS, **inputs)
            assert got.tolist() == want[:, inputs["input_ids"].shape[1] :].tolist()

    def without_transformers(self, folder, atol=1e-4):
        """The same in a fresh process, from whose import transformers is blocked."""
        inputs = tiny_inputs(text=7, seed=5)
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_TRANSFORMERS, str(folder)],
            input=json.dumps({name: value.tolist() for name, value in inputs.items()}),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        tokens, logits = json.loads(done.stdout)
        want = self.oracle("generate", **inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert tokens == want[:, inputs["input_ids"].shape[1] :].tolist()
        torch.testing.assert_close(torch.tensor(logits), self.oracle(**inputs).logits, atol=atol, rtol=0)
