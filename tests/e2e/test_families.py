"""The coverage matrix: each cell rewrites all layers and equals the oracle, or is declined with its reason.

The named families go through the ways that are quick and through one of the others in turn, the first of them
through all; the other families, as far as their MoE blocks are code of their own, go through one.
`bench/coverage.py` goes through all cells of the table.
"""

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import modes_fx
from modes_fx.testing import FAMILIES, tiny_profile
from modes_fx.testing.ways import NAMED, SAME_BLOCK, WAYS, cover

ATOL = 1e-4
# Diffusion Gemma's decoder sees tokens that are not the call's: below.
OTHERS = [name for name in FAMILIES if name not in (*NAMED, *SAME_BLOCK, "diffusion_gemma")]

QUICK = ("decoder", "torch.export", "attach")
SLOW = [way for way in WAYS if way not in QUICK]
CELLS = [
    (name, way)
    for number, name in enumerate(NAMED)
    for way in WAYS
    if number == 0 or way in QUICK or SLOW.index(way) == number % len(SLOW)
]

# What the error or the warning says.
DECLINED: dict[tuple[str, str], str] = {
    # Its text and vision experts see a part of the tokens each, in graphs that do not show which.
    **{("ernie4_5_vl_moe", way): "needs modes_fx.attach(model, profile)" for way in WAYS},
    ("ernie4_5_vl_moe", "attach"): "",
    ("ernie4_5_vl_moe", "decoder, fullgraph"): "torch cannot trace the model: Data-dependent branching",
    ("ernie4_5_vl_moe", "torch.export"): "torch cannot trace the model: Could not guard on data-dependent",
    ("muse_spark", "decoder"): "the output of each expert goes to",  # a norm
    ("step3p7", "decoder"): "its experts are not in a form that is known",  # a loop in Python
    # Its experts are no ExpertsInterface's, and the compiled ways do not need them to be.
    ("llama4", "attach"): "transformers does not run it through its ExpertsInterface",
}


def check(name, way, cell, atol=ATOL):
    reason = DECLINED.get((name, way))
    if reason:
        assert reason in cell.reason
        return
    assert cell.reason == ""
    assert cell.error <= atol
    assert cell.skip > 0.1


@pytest.fixture
def half(thresholds_at):
    """Thresholds that drop about half of the pairs of a call."""
    return lambda model, profile, inputs: thresholds_at(model, profile, inputs, 0.5)


def entered(oracle):
    return lambda model, profile: oracle(model, profile)()


@pytest.mark.parametrize(("name", "way"), CELLS)
def test_every_way_to_compile(name, way, oracle, half):
    # Both implementations of the experts come up, in half of the cells each.
    experts = ("grouped_mm", "batched_mm")[(NAMED.index(name) + list(WAYS).index(way)) % 2]
    check(name, way, cover(FAMILIES[name], WAYS[way], entered(oracle), half, experts=experts))


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_family(name, oracle, half):
    experts = ("grouped_mm", "batched_mm")[OTHERS.index(name) % 2]
    family = FAMILIES[name]
    # Tracing is what takes time, and once is enough.
    kinds = ["picture" if "picture" in family.kinds else "text"]
    cell = cover(family, WAYS["decoder"], entered(oracle), half, experts=experts, kinds=kinds)
    check(name, "decoder", cell)


@torch.no_grad()
def test_a_graph_with_the_tokens_of_two_sequences_is_declined():
    # A picture of the prompt must not be taken for the canvas, nor the other way round.
    family = FAMILIES["diffusion_gemma"]
    model = family.build()
    compiled = torch.compile(model, backend=modes_fx.backend(tiny_profile(model), lowering="eager"))
    with pytest.raises(BackendCompilerFailed, match="looks up the ids of two sequences"):
        compiled(**family.inputs("text"))


# Llama 4 chooses one expert of eight: a rounding in one layer may turn the choice of the next.
@pytest.mark.parametrize("name", [name for name in NAMED if name not in ("ernie4_5_vl_moe", "llama4")])
def test_in_bfloat16(name, oracle, half):
    way, bfloat16 = WAYS["decoder"], {"dtype": torch.bfloat16, "may_turn": 1, "kinds": ["picture"]}
    cell = cover(FAMILIES[name], way, entered(oracle), half, **bfloat16)
    # Logits are about 2, whose last bit in bfloat16 is 2^-6; experts and models round at other places.
    check(name, "decoder", cell, atol=5e-2)
