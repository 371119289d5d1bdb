"""What runs on a CPU gives what the eager model gives with the dropped pairs at weight zero."""

import pytest
import torch

import modes_fx


@pytest.fixture(scope="module", params=["onnx", "aoti"])
def folder(request, exported):
    return exported(request.param)


@pytest.fixture(scope="module")
def program(folder):
    return modes_fx.load(folder)


def test_prefill(program, claims):
    claims.prefill(program)


@pytest.mark.parametrize("tokens", [1, 4096])
def test_the_fewest_and_the_most_tokens(tokens, program, claims):
    claims.logits(program, {"input_ids": torch.arange(tokens)[None] % 80 + 8})


def test_padded_rows(program, claims):
    claims.padded_rows(program)


def test_generation(program, claims):
    claims.generation(program)
