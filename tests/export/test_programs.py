"""The traced programs of another kind of model: pictures without a grid, sliding windows."""

import pytest
import torch

from modes_fx.aot.manifest import Range
from modes_fx.aot.programs import Sizes, trace
from modes_fx.errors import ExportError
from modes_fx.exported import rewrite
from modes_fx.skipping import simulate
from modes_fx.testing import FAMILIES, tiny_profile

SIZES = Sizes(Range(1, 8), Range(1, 64), Range(1, 64))


@torch.no_grad()
def test_a_prefill_and_a_step():
    """The last token by the decode program, after a prefill of the others."""
    family = FAMILIES["internvl+gpt_oss"]
    model, inputs = family.build(), family.inputs("picture")
    profile = tiny_profile(model)
    with simulate(model, profile) as counts:
        want = model(**inputs).logits
    assert counts.skip() > 0
    traced = trace(model, [inputs], SIZES)
    (picture,) = traced.pictures
    assert picture.grid is None
    features = picture.traced.program.module()(inputs["pixel_values"])
    prefill, decode = (rewrite(each.program, profile).module() for each in (traced.prefill, traced.decode))
    ids = inputs["input_ids"]
    mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1])[None]
    logits, *cache = prefill(ids[:, :-1], mask[:, :-1], positions[:, :-1], *features)
    torch.testing.assert_close(logits, want[:, :-1], atol=1e-4, rtol=0)
    logits, *cache = decode(ids[:, -1:], mask, positions[:, -1:], *cache)
    torch.testing.assert_close(logits, want[:, -1:], atol=1e-4, rtol=0)
    assert len(cache) == 2 * model.config.get_text_config().num_hidden_layers


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("qwen3_5_moe", "LinearAttentionLayer"),
        ("granitemoehybrid", "LinearAttentionLayer"),
        ("deepseek_v32", "DynamicIndexedLayer"),
    ],
)
def test_a_cache_of_more_than_keys_and_values(name, layer):
    family = FAMILIES[name]
    with pytest.raises(ExportError, match=rf"cache holds .*{layer}.* keys and values alone can be exported"):
        trace(family.build(), [family.inputs("text")], SIZES)


def test_inputs_that_show_nothing():
    model = FAMILIES["mixtral"].build()
    with pytest.raises(ExportError, match="must hold input_ids"):
        trace(model, [{}], SIZES)
    with pytest.raises(ExportError, match="one batch at least"):
        trace(model, [], SIZES)
    with pytest.raises(
        ExportError, match=r"inputs have tokens 70, outside of dynamic\['tokens'\] = \(1, 64\)"
    ):
        trace(model, [{"input_ids": torch.full((1, 70), 9)}], SIZES)
