"""The serving example: a picture and a question in, the eager model's answer out, without transformers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from modes_fx import demo
from modes_fx.demo.samples import draw_sample

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

from export_serve import MAX_NEW_TOKENS, encode  # noqa: E402

WITHOUT_TRANSFORMERS = """
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def sample():
    return draw_sample("test", demo.TASKS[0], 0)


@pytest.fixture
def tokenizer():
    return Tokenizer.from_file(str(demo.ASSETS / "tokenizer.json"))


@pytest.fixture
def picture(sample, tmp_path):
    Image.fromarray(sample.picture).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


@pytest.mark.parametrize("index", [0, 12])  # a scene, and a smaller picture
def test_inputs_are_those_of_the_processor(index, tokenizer):
    want, _ = demo.question("test", index)
    sample = draw_sample("test", demo.TASKS[index], 0)
    got = encode(tokenizer, sample.picture, sample.question)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], atol=0, rtol=0)


@pytest.mark.parametrize("target", ["onnx", "aoti"])
def test_answers_as_the_eager_model_does(target, exported, sample, picture, tokenizer, oracle):
    inputs, _ = demo.question("test", 0)
    tokens = oracle("generate", **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    answer = tokens[0, inputs["input_ids"].shape[1] :].tolist()
    ends = [i for i, token in enumerate(answer) if token == 2]  # <|im_end|>
    want = tokenizer.decode(answer[: min(ends, default=len(answer))])
    command = [sys.executable, "-c", WITHOUT_TRANSFORMERS, BENCH / "export_serve.py", exported(target)]
    done = subprocess.run(
        [*map(str, command), str(picture), sample.question], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert want and done.stdout == want + "\n"
