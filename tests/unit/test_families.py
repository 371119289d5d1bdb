"""The zoo: every family builds, runs on each kind of input and shows its blocks; what is no block is none."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from modes_fx.blocks import Block, find_blocks
from modes_fx.calibration.weight_scale import weight_scale
from modes_fx.errors import ModesError
from modes_fx.testing import FAMILIES, SPECIAL, VISION_END, VISION_START, Family, set_experts, tiny_profile
from modes_fx.testing.families import UNBUILDABLE, UNSTACKED
from modes_fx.testing.ways import SAME_BLOCK


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def family(name) -> Family:
    return FAMILIES[name]


@pytest.fixture(scope="module")
def model(family) -> Any:
    return family.build()


@pytest.fixture(scope="module")
def inputs(family) -> dict[str, Tensor]:
    """The shortest inputs that every block has tokens of."""
    return family.inputs("picture" if family.expert_types else "text")


@pytest.fixture(scope="module")
def calls(model, inputs) -> dict[str, tuple[Tensor, Tensor]]:
    return routed(model, inputs)


def routed(model: Any, inputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(chosen experts, their weights), `[T, K]` each, of every block by name, in the order of the calls."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(block: Block) -> Any:
        def slots(module: nn.Module, args: Any, kwargs: Any) -> None:
            _, index, weights = tuple(args) + tuple(kwargs.values())
            seen[block.name] = (index, weights)

        def dense(module: nn.Module, args: Any, output: Any) -> None:
            scores, index = output[0].topk(block.top_k)
            assert (output[0] > 0).sum(-1).tolist() == [block.top_k] * len(scores)
            seen[block.name] = (index, scores)

        if block.dispatch == "slots":
            return block.experts.register_forward_pre_hook(slots, with_kwargs=True)
        return block.router.register_forward_hook(dense)

    handles = [watch(block) for block in find_blocks(model)]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_a_family_runs_on_each_kind_of_input(family, model):
    for kind in family.kinds:
        inputs = family.inputs(kind)
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
        if family.canvas:
            assert logits.shape[:2] == (len(inputs["input_ids"]), family.canvas)
        else:
            assert logits.shape[:2] == inputs["input_ids"].shape
            logits = logits[inputs["attention_mask"].bool()]
        assert logits.isfinite().all() and logits.std() > 0.01


def test_a_picture_reaches_the_answer(family, model):
    if family.picture is None:
        assert family.kinds == ("text", "batch")
        return
    inputs = family.inputs("picture")
    other = {**inputs, "pixel_values": inputs["pixel_values"] * 0.5 + 0.25}
    with torch.no_grad():
        first, second = (model(**given, use_cache=False).logits for given in (inputs, other))
    assert not torch.equal(first, second)


def test_find_blocks_gives_the_blocks_that_run_in_their_order(family, model, inputs, calls):
    blocks = find_blocks(model)
    assert len(blocks) >= 2
    assert list(calls) == [block.name for block in blocks]
    assert {block.dispatch for block in blocks} == {"dense" if family.model_type == "llama4" else "slots"}
    for block in blocks:
        index, weights = calls[block.name]
        assert index.shape == weights.shape
        assert index.shape[1] == block.top_k
        assert index.max() < block.num_experts
        assert any(p is block.router_weight for p in block.router.parameters())


def test_the_router_weight_of_a_block_decides_its_routing(model, inputs, calls):
    for block in reversed(find_blocks(model)):
        kept = block.router_weight.detach().clone()
        noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            block.router_weight.copy_(noise)
            after = routed(model, inputs)
            block.router_weight.copy_(kept)
        changed = [
            name
            for name, (index, weights) in calls.items()
            if not (torch.equal(index, after[name][0]) and torch.equal(weights, after[name][1]))
        ]
        # Of this block and, through its output, of later ones; blocks that share weights change together.
        alike = [other.name for other in find_blocks(model) if other.router_weight is block.router_weight]
        assert changed[0] == alike[0]
        assert block.name in changed


def test_the_factor_that_a_family_folds_into_its_weights_is_measured(family, calls):
    for name, (_, weights) in calls.items():
        assert weight_scale(weights) == family.weight_scale, name


def test_a_profile_fits_its_family(family, model):
    profile = tiny_profile(model)
    profile.check_model(model)
    assert set(profile.special_token_ids) == set(SPECIAL) - set(profile.visual_token_ids)
    assert bool(profile.visual_token_ids) == (family.picture is not None)
    if family.picture:
        signs = [set(visual.tokens) for visual in (family.picture, family.video) if visual]
        assert all(sign - {VISION_START, VISION_END} <= set(profile.visual_token_ids) for sign in signs)
    assert (profile.vocab_size, profile.hidden_size) == model.get_input_embeddings().weight.shape


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "internvl+gpt_oss", "inkling2", "gemma4", "llama4"])
def test_bfloat16_keeps_what_the_family_keeps_in_float32(name):
    family = FAMILIES[name]
    model, wide = family.build(dtype=torch.bfloat16), family.build()
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for (key, value), (_, full) in zip(model.state_dict().items(), wide.state_dict().items(), strict=True):
        dtype = torch.float32 if any(f".{part}." in f".{key}." for part in kept) else torch.bfloat16
        assert value.dtype == (dtype if full.is_floating_point() else full.dtype), key
        assert torch.equal(value, full.to(value.dtype))
    inputs = family.inputs("batch", dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    assert logits[inputs["attention_mask"].bool()].isfinite().all()


def test_a_seed_makes_a_model_and_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    first, again, other = (FAMILIES["mixtral"].build(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    routers = [find_blocks(model)[0].router_weight for model in (first, again, other)]
    assert torch.equal(routers[0], routers[1]) and not torch.equal(routers[0], routers[2])


def test_the_implementation_of_decorated_experts_can_be_chosen(family, model, inputs):
    if not family.decorated:
        with pytest.raises(ValueError, match="runs its experts with code of its own"):
            set_experts(model, "grouped_mm")
        return
    logits = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        set_experts(model, implementation)
        with torch.no_grad():
            logits.append(model(**inputs, use_cache=False).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(logits[2], logits[0], atol=1e-3, rtol=1e-3)


def test_changes_reach_the_text_model():
    model = FAMILIES["internvl+mixtral"].build(num_local_experts=4, num_hidden_layers=2)
    assert [block.num_experts for block in find_blocks(model)] == [4, 4]


def test_an_unknown_kind_of_input_is_refused():
    with pytest.raises(ValueError, match="kind must be one of text, batch, got 'picture'"):
        FAMILIES["mixtral"].inputs("picture")


def test_stacked_weights_without_a_router_are_no_block():
    class Lookalike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.ones(4, 2, 3)), nn.Parameter(torch.ones(4, 3, 2))

    with pytest.raises(ModesError, match="Sequential has no MoE block"):
        find_blocks(nn.Sequential(Lookalike(), nn.Linear(3, 5)))


@pytest.mark.parametrize("name", UNSTACKED)
def test_a_family_whose_experts_are_not_stacked_is_refused(name):
    family = UNSTACKED[name]
    model = family.build()
    with torch.no_grad():
        assert model(**family.inputs("text")).logits.isfinite().all()
    with pytest.raises(ModesError, match="has no MoE block with stacked expert weights"):
        find_blocks(model)


def test_decorated_experts_without_a_router_are_refused():
    model = FAMILIES["mixtral"].build()
    block = find_blocks(model)[1]
    delattr(model.get_submodule(block.name), "gate")
    with pytest.raises(
        ModesError, match=r"mlp\.experts runs 8 experts, but no module beside it holds a router"
    ):
        find_blocks(model)


def test_experts_in_a_vision_tower_are_no_blocks():
    model = FAMILIES["dots3_note"].build()
    assert any("vision" in name and name.endswith("mlp.experts") for name, _ in model.named_modules())
    assert all("language_model" in block.name for block in find_blocks(model))


def test_every_family_with_decorated_experts_is_in_the_zoo():
    models = Path(transformers.__file__).parent / "models"
    marked = {
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if "@use_experts_implementation" in path.read_text(encoding="utf-8")
    }
    known = {part for name in FAMILIES for part in name.split("+")}
    assert marked - known == {name for name in UNBUILDABLE if " " not in name} & marked


def block_code(model: nn.Module) -> list[Any]:
    """What the modules of the first MoE block run: byte code, constants and names."""
    root = dict(model.named_modules())[find_blocks(model)[0].name]
    forwards = [
        getattr(type(module).forward, "__wrapped__", type(module).forward).__code__
        for module in root.modules()
        # Activations are data of a configuration.
        if type(module).__module__.startswith("transformers.models")
    ]
    plain = [[each for each in code.co_consts if not hasattr(each, "co_code")] for code in forwards]
    return sorted((c.co_code, str(k), c.co_names) for c, k in zip(forwards, plain, strict=True))


def test_families_whose_block_runs_the_code_of_another(name, model):
    if name in SAME_BLOCK:
        assert block_code(model) == block_code(FAMILIES[SAME_BLOCK[name]].build())
