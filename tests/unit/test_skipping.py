"""Simulated skipping: which tokens experts see, where they see part of them, and what is refused."""

import dataclasses

import pytest
import torch
from torch import nn

from modes_fx.blocks import find_blocks
from modes_fx.calibration.calibrate import calibrate
from modes_fx.call_rows import Enclosing, enclosing_modules, values_of_rows
from modes_fx.errors import ModesError
from modes_fx.kernels.masked_moe import keep_mask
from modes_fx.kernels.rows_modality import row_keys
from modes_fx.modality import OTHER, TEXT, VISION, token_modality
from modes_fx.skipping import Tokens, block_alphas, keep_all, simulate, skip, thresholds
from modes_fx.testing import FAMILIES, SPECIAL, tiny_inputs, tiny_profile, tiny_qwen3_vl_moe


@pytest.fixture(scope="module")
def ernie():
    return FAMILIES["ernie4_5_vl_moe"].build()


def test_rows_that_experts_share_out_are_told_by_their_bits(ernie):
    inputs = FAMILIES["ernie4_5_vl_moe"].inputs("batch")
    profile = tiny_profile(ernie)
    ids = (profile.visual_token_ids, profile.special_token_ids)
    with torch.no_grad(), skip(ernie, find_blocks(ernie), keep_all, *ids) as counts:
        ernie(**inputs)
    real = inputs["attention_mask"].bool()
    kinds = token_modality(inputs["input_ids"], *ids)[real]
    wanted = torch.tensor([3 * int((kinds == kind).sum()) for kind in (TEXT, VISION, OTHER)])
    # The vision experts of a layer come after its text experts; together they see every token once.
    text, vision = counts.pairs[0::2], counts.pairs[1::2]
    assert torch.equal(text + vision, wanted.expand_as(text))
    assert (text[:, VISION] == 0).all() and (vision[:, TEXT] == 0).all()


def test_a_model_that_shares_out_its_tokens_is_calibrated(ernie):
    inputs = FAMILIES["ernie4_5_vl_moe"].inputs("picture")
    labels = torch.where(torch.arange(inputs["input_ids"].shape[1]) > 12, inputs["input_ids"], -100)
    profile = calibrate(ernie, [{**inputs, "labels": labels}], special_token_ids=SPECIAL, progress=False)
    alphas = [(layer.alpha_text > 0, layer.alpha_vision > 0) for layer in profile.layers]
    # No vision token of the last layer reaches an answer.
    assert alphas == [(True, False), (False, True), (True, False), (False, False)]


def test_dense_experts_drop_by_the_scores_of_their_router():
    family = FAMILIES["llama4"]
    model = family.build()
    inputs = family.inputs("picture")
    profile = tiny_profile(model, tau_text=0.2, tau_vision=0.2)
    blocks = find_blocks(model)
    assert {block.dispatch for block in blocks} == {"dense"}
    seen = []
    handle = blocks[0].router.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.no_grad():
        plain = model(**inputs).logits
        handle.remove()
        with simulate(model, profile) as counts:
            # After the hook that drops.
            handle = blocks[0].router.register_forward_hook(lambda *call: seen.append(call[2][0]))
            skipped = model(**inputs).logits
            handle.remove()
    layer = profile.layers[0]
    kinds = token_modality(inputs["input_ids"], profile.visual_token_ids, profile.special_token_ids)
    keep = keep_mask(seen[0], kinds.flatten(), layer.weight_alpha_text, layer.weight_alpha_vision, 0.2, 0.2)
    assert torch.equal(seen[1], seen[0] * keep)
    assert 0 < counts.skip() < 1
    assert int(counts.dropped[0].sum()) == int(((seen[0] != 0) & ~keep).sum())
    assert not torch.allclose(skipped, plain, atol=1e-3)


def test_the_rule_is_the_one_of_the_op_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(4000, 4, generator=generator)
    modality = torch.randint(0, 3, (4000,), generator=generator).to(torch.uint8)
    model = tiny_qwen3_vl_moe(num_layers=1)
    layer = dataclasses.replace(tiny_profile(model).layers[0], alpha_text=0.7, weight_scale=2.446)
    profile = dataclasses.replace(tiny_profile(model), layers=(layer,))
    alphas = block_alphas(profile, find_blocks(model))
    # On a score itself, where the last bit decides.
    tau = float(weights[0, 0] * layer.weight_alpha_text)
    dropped = thresholds(alphas, tau, tau)(0, weights, Tokens(modality, modality >= 0))
    keep = keep_mask(weights, modality, layer.weight_alpha_text, layer.weight_alpha_vision, tau, tau)
    assert torch.equal(dropped, ~keep)
    assert 0 < int(dropped.sum()) < dropped.numel()


def test_routing_to_another_number_of_experts_is_refused():
    model = tiny_qwen3_vl_moe(num_layers=1)
    blocks = [dataclasses.replace(block, top_k=3) for block in find_blocks(model)]
    message = "route every token to 3 experts and routes them to 4"
    with pytest.raises(ModesError, match=message), skip(model, blocks, keep_all, (), ()):
        model(**tiny_inputs(grid=None))


def test_rows_from_nowhere_are_refused(ernie):
    layer = ernie.get_decoder().layers[1]

    def change(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return args[0] + 1, *args[1:]

    handle = layer.mlp.text_moe.register_forward_pre_hook(change)
    inputs = FAMILIES["ernie4_5_vl_moe"].inputs("picture")
    try:
        message = r"text_moe\.experts is given 10 rows in a call of 16 tokens"
        with pytest.raises(ModesError, match=message), simulate(ernie, tiny_profile(ernie)):
            ernie(**inputs)
    finally:
        handle.remove()


def test_equal_rows_of_different_modality_are_nobodys():
    source = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [5.0, 6.0], [5.0, 6.0]])
    modality = torch.tensor([TEXT, VISION, VISION, VISION, VISION], dtype=torch.uint8)
    rows = torch.tensor([[5.0, 6.0], [1.0, 2.0], [3.0, 4.0]])
    found = values_of_rows(modality, row_keys(source), rows, ambiguous=OTHER)
    assert found is not None and found.dtype == torch.uint8
    assert found.tolist() == [VISION, OTHER, VISION]
    assert values_of_rows(modality, row_keys(source), rows[:0], ambiguous=OTHER).tolist() == []
    assert values_of_rows(modality, row_keys(source), rows + 1, ambiguous=OTHER) is None


def test_only_modules_that_are_running_enclose():
    rows = torch.randn(2, 3, 4)
    enclosing = Enclosing()
    enclosing.enter("layers.0.mlp", rows)
    assert torch.equal(enclosing.keys("layers.0.mlp.text.experts", 6, 4), row_keys(rows).flatten())
    enclosing.enter("layers.0.mlp.text", rows.flatten())
    assert torch.equal(enclosing.keys("layers.0.mlp.text.experts", 6, 4), row_keys(rows).flatten())
    assert enclosing.keys("layers.0.mlp.text.experts", 5, 4) is None
    assert enclosing.keys("layers.0.mlp.text.experts", 12, 2) is None
    enclosing.enter("layers.1", rows)
    assert enclosing.keys("layers.0.mlp.text.experts", 6, 4) is None
    assert enclosing.keys("layers.10.mlp.experts", 6, 4) is None


def test_modules_up_to_the_layer_enclose(ernie):
    names = enclosing_modules(ernie, ["model.language_model.layers.1.mlp.text_moe.experts"])
    layer = "model.language_model.layers.1"
    assert set(names) == {layer, f"{layer}.mlp", f"{layer}.mlp.text_moe"}
