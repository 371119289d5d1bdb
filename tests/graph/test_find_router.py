"""find_router: what is known of the routing weights, read off the graph, for each kind of router."""

import pytest
import torch
from torch import nn

from modes_fx.passes.find_blocks import find_blocks
from modes_fx.passes.find_router import Router
from modes_fx.testing.small_block import trace_block


@pytest.fixture
def router(small):
    def found(**traits):
        (block,) = find_blocks(small(**traits).traced.graph)
        return block.router

    return found


PLAIN = {
    "score": "softmax",
    "softmax_after": False,
    "choice_bias": False,
    "in_groups": False,
    "renormalised": False,
    "factor": 1.0,
    "is_sorted": True,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "traits, expected",
    [
        ({"renormalise": None}, {}),
        ({"renormalise": "plain"}, {"renormalised": True}),
        ({"renormalise": "eps"}, {"renormalised": True}),
        ({"renormalise": "clamp"}, {"renormalised": True}),
        ({"score": "chosen", "renormalise": None}, {"softmax_after": True}),
        ({"score": "sigmoid", "renormalise": None}, {"score": "sigmoid"}),
        ({"score": "sigmoid"}, {"score": "sigmoid", "renormalised": True}),
        ({"choice_bias": True}, {"choice_bias": True, "renormalised": True, "is_sorted": False}),
        ({"groups": 4}, {"in_groups": True, "renormalised": True, "is_sorted": False}),
        ({"factor": 2.5}, {"renormalised": True, "factor": 2.5}),
        ({"factor": 2.5, "renormalise": None}, {"factor": 2.5}),
        ({"factor": 0.5, "score": "chosen", "renormalise": None}, {"softmax_after": True, "factor": 0.5}),
        ({"per_expert_scale": True}, {"renormalised": True, "factor": None}),
        ({"is_sorted": False}, {"renormalised": True, "is_sorted": False}),
        (
            {"score": "sigmoid", "choice_bias": True, "groups": 2, "renormalise": "eps", "factor": 2.5},
            {
                "score": "sigmoid",
                "choice_bias": True,
                "in_groups": True,
                "renormalised": True,
                "factor": 2.5,
                "is_sorted": False,
            },
        ),
    ],
    ids=str,
)
def test_reads_each_kind_of_router(router, traits, expected, dtype):
    got = router(dtype=dtype, **traits)
    assert {name: getattr(got, name) for name in PLAIN} == {**PLAIN, **expected}


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_the_implementation_of_the_experts_does_not_matter(router, implementation):
    assert router(implementation=implementation).renormalised


def test_the_coarsest_dtype_on_the_way_sets_the_rounding(router):
    assert router(dtype=torch.float32).eps == torch.finfo(torch.float32).eps
    assert router(dtype=torch.bfloat16).eps == torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    "traits, mass, largest",
    [
        ({"renormalise": None}, 1.0, 1.0),
        ({"score": "chosen", "renormalise": None}, 1.0, 1.0),
        ({"score": "sigmoid", "renormalise": None}, None, 1.0),
        ({"score": "sigmoid"}, 1.0, 1.0),
        ({"factor": 2.5}, 2.5, 2.5),
        ({"per_expert_scale": True}, None, None),
    ],
    ids=str,
)
def test_bounds_are_those_of_the_formula_and_no_less(router, traits, mass, largest):
    got = router(**traits)
    for bound, exact in ((got.mass, mass), (got.largest, largest)):
        assert bound is None if exact is None else exact <= bound <= exact * 1.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "chosen"])
@pytest.mark.parametrize("renormalise", [None, "plain", "eps"])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 30.0])
def test_no_weights_exceed_the_bounds(small, score, renormalise, spread, dtype):
    one = small(score=score, renormalise=renormalise, dtype=dtype, num_experts=12, top_k=12)
    (block,) = find_blocks(one.traced.graph)
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) * spread
    weights, _ = one.block.route(x.to(dtype))
    weights = weights.double()
    assert weights.max() <= block.router.largest
    if block.router.mass is not None:
        assert weights.sum(-1).max() <= block.router.mass * (1 + 12 * torch.finfo(dtype).eps)
    if block.router.is_sorted:
        assert (weights.diff(dim=-1) <= 0).all()
        if block.router.mass is not None:
            ranks = torch.arange(1, 13)
            assert (weights * ranks <= block.router.mass).all()


def test_a_factor_before_the_division_cancels(small):
    (block,) = find_blocks(_routed(small, lambda w: _share(w * 3.0)))
    assert (block.router.renormalised, block.router.factor) == (True, 1.0)


def test_factors_after_the_division_multiply(small):
    (block,) = find_blocks(_routed(small, lambda w: _share(w) * 3.0 / 2))
    assert block.router.renormalised
    assert block.router.factor == pytest.approx(1.5)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w / w.amax(-1, keepdim=True),
        lambda w: w / (w.sum(-1, keepdim=True) - 0.5),
        lambda w: w / w.sum(0, keepdim=True),
        lambda w: w / w.sum(-1, keepdim=True).clamp(max=0.1),
        lambda w: w / w[:, :2].sum(-1, keepdim=True),
        lambda w: w.exp(),
        lambda w: w + 1,
        lambda w: w.sqrt(),
        lambda w: w * w.sum(-1, keepdim=True),
    ],
    ids=[
        "largest",
        "less",
        "over tokens",
        "capped sum",
        "sum of some",
        "exp",
        "plus",
        "root",
        "times the sum",
    ],
)
def test_other_weights_are_bounded_by_nothing(small, change):
    (block,) = find_blocks(_routed(small, change))
    assert block.router.weight is not None
    assert (block.router.mass, block.router.renormalised) == (None, False)


def test_weights_over_the_tokens_are_no_softmax_over_experts(small):
    (block,) = find_blocks(_routed(small, lambda w: w, scores=lambda logits: logits.softmax(0)))
    assert block.router.mass is None


def test_the_smallest_first_is_not_sorted(small):
    def choose(scores):
        return scores.topk(3, dim=-1, largest=False)

    (block,) = find_blocks(_routed(small, lambda w: w, choose=choose))
    assert not block.router.is_sorted


def test_scores_of_another_choice_are_not_sorted(small):
    def choose(scores):
        experts = (scores * torch.arange(8)).topk(3, dim=-1).indices
        return scores.gather(1, experts), experts

    (block,) = find_blocks(_routed(small, lambda w: w, choose=choose))
    assert block.router.score == "softmax"
    assert not block.router.is_sorted


def test_says_what_it_is_for_people_to_read():
    router = Router(None, "sigmoid", choice_bias=True, in_groups=True, renormalised=True, factor=2.5)
    assert str(router) == "sigmoid router, choice bias, groups, renormalised, x 2.5"
    assert str(Router(None)) == "other router"
    assert (
        str(Router(None, "softmax", softmax_after=True, factor=None))
        == "softmax router, over the chosen, scaled"
    )


def _share(weights):
    return weights / weights.sum(-1, keepdim=True)


def _routed(
    small, change, scores=lambda logits: logits.softmax(-1), choose=lambda scores: scores.topk(3, dim=-1)
):
    """The graph of a block whose weights are changed before the experts."""

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = small().block

        def forward(self, x):
            weights, experts = choose(scores(x @ self.block.router.t()))
            return self.block.run_experts(x, experts, change(weights))

    gm, _ = trace_block(Routed(), torch.randn(9, 16))
    return gm.graph
