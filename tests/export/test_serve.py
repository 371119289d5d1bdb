"""The serving example makes the inputs that the demo's own processor makes, without transformers."""

import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from modes_fx import demo
from modes_fx.demo.samples import draw_sample

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from export_serve import encode


@pytest.mark.parametrize("index", [0, 12])  # a scene, and a smaller picture
def test_inputs_are_those_of_the_processor(index):
    want, _ = demo.question("test", index)
    sample = draw_sample("test", demo.TASKS[index], 0)
    tokenizer = Tokenizer.from_file(str(demo.ASSETS / "tokenizer.json"))
    got = encode(tokenizer, sample.picture, sample.question)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], atol=0, rtol=0)
