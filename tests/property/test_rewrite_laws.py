"""The rewritten block equals an oracle, for any router, experts, dtype, thresholds and tokens."""

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from modes_fx.kernels import _masked_moe_native
from modes_fx.kernels.rows_modality import row_keys
from modes_fx.modality import OTHER, TEXT, VISION
from modes_fx.passes import PIPELINE, run_passes
from modes_fx.passes.provide_modality import MODALITY, TABLE_KEYS, TABLE_MODALITY
from modes_fx.passes.unit import BlockReport, Unit
from modes_fx.profile import Profile
from modes_fx.testing.small_block import GATED, UNGATED, SmallBlock, Traits, block_profile, trace_block

EXAMPLES = 500
# With a gate and without, in both dtypes; a native kernel takes seconds to build, and the others are not.
NATIVE = ("silu(gate) * up", "square(relu(x))")


@dataclasses.dataclass(frozen=True)
class Example:
    """One block, the constants of its profile, and how it is called.

    The modality comes from the wrapper, or is read in the graph by the rows of embedded tokens.
    """

    traits: Traits
    constants: dict[str, Any]
    tokens: int
    dynamic: bool
    by_rows: bool
    seed: int


TAUS = st.one_of(
    st.floats(0.01, 1.2), st.sampled_from([0.0, -0.5, math.inf, -math.inf, 0.25, 1 / 3, 0.5, 1.0])
)
ALPHAS = st.one_of(st.floats(0.05, 1.5), st.sampled_from([0.0, 1.0]))


@st.composite
def traits(draw: Any) -> Traits:
    implementation = draw(st.sampled_from(["grouped_mm", "batched_mm", "grouped_mm", "batched_mm", "dense"]))
    # One dense expert is no choice.
    num_experts = draw(st.integers(2 if implementation == "dense" else 1, 12))
    score = draw(st.sampled_from(["softmax", "sigmoid", "chosen"]))
    groups = (
        draw(st.sampled_from([g for g in (1, 1, 1, 2, 3, 4) if num_experts % g == 0]))
        if score != "chosen"
        else 1
    )
    # Half of the groups are left to choose from.
    most = num_experts // groups * math.ceil(groups / 2)
    return Traits(
        num_experts=num_experts,
        top_k=draw(st.integers(1, most)),
        hidden=draw(st.integers(2, 24)),
        intermediate=draw(st.integers(1, 20)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        implementation=implementation,
        score=score,
        choice_bias=score != "chosen" and draw(st.integers(0, 3)) == 3,
        groups=groups,
        renormalise=draw(st.sampled_from([None, "plain", "eps", "clamp"])),
        factor=draw(st.sampled_from([1.0, 1.0, 2.5, 0.5])),
        per_expert_scale=draw(st.integers(0, 5)) == 5,
        is_sorted=draw(st.integers(0, 3)) < 3,
        gate=draw(st.sampled_from([*GATED, *UNGATED])),
        interleaved=draw(st.booleans()),
        transposed=draw(st.booleans()),
        biased=implementation != "dense" and draw(st.booleans()),
        weights_on_input=implementation == "dense" and draw(st.booleans()),
        shared=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


@st.composite
def examples(draw: Any) -> Example:
    constants = {
        "alpha_text": draw(ALPHAS),
        "alpha_vision": draw(ALPHAS),
        "tau_text": draw(TAUS),
        "tau_vision": draw(TAUS),
        "weight_scale": draw(st.sampled_from([1.0, 1.0, 2.5])),
        "visual_token_ids": draw(st.sampled_from([(), (3,)])),
        "special_token_ids": draw(st.sampled_from([(), (), (4,)])),
    }
    tokens = draw(st.integers(0, 40))
    # Symbolic sizes cost the most by far to trace; they stand for two tokens or more.
    dynamic = tokens > 3 and draw(st.integers(0, 7)) == 0
    by_rows = draw(st.booleans())
    return Example(draw(traits()), constants, tokens, dynamic, by_rows, draw(st.integers(0, 2**31)))


def modality_of(example: Example, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Of each token, and as a table of rows; what the profile names no ids for does not come up."""
    kinds = [TEXT]
    kinds += [VISION] * bool(example.constants["visual_token_ids"])
    kinds += [OTHER] * bool(example.constants["special_token_ids"])
    generator = torch.Generator().manual_seed(example.seed)
    # Equal rows are the same token.
    keys, places = row_keys(x).unique(return_inverse=True)
    table = torch.tensor(kinds)[torch.randint(len(kinds), keys.shape, generator=generator)].to(torch.uint8)
    return table[places], {TABLE_KEYS: keys, TABLE_MODALITY: table}


def kept(weights: Tensor, modality: Tensor, profile: Profile) -> Tensor:
    """The rule of the paper, pair by pair, `[T, K]`, bool."""
    layer = profile.layers[0]
    alpha = {TEXT: layer.weight_alpha_text, VISION: layer.weight_alpha_vision}
    tau = {TEXT: profile.tau_text, VISION: profile.tau_vision}
    rows = [
        [kind == OTHER or not (torch.tensor(w) * alpha[kind] < tau[kind]) for w in row]
        for kind, row in zip(modality.tolist(), weights.float().tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.bool).reshape(weights.shape)


def exact_output(block: SmallBlock, x: Tensor, experts: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    """Pair by pair in float64: no sort, no grouping, no op."""
    (up, up_bias), (down, down_bias) = block.first_product(), block.second_product()
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, k in keep.nonzero().tolist():
        e, weight = experts[t, k], weights[t, k].double()
        row = x[t].double() * (weight if block.traits.weights_on_input else 1)
        y = row @ up[e].double() + (0 if up_bias is None else up_bias[e].double())
        z = block.between(y) @ down[e].double() + (0 if down_bias is None else down_bias[e].double())
        out[t] += z if block.traits.weights_on_input else z * weight
    return out


def assert_equals_oracle(
    block: SmallBlock, got: Tensor, x: Tensor, modality: Tensor, profile: Profile
) -> None:
    """At most twice as far from float64 as the eager model with the weights of dropped pairs at zero."""
    weights, experts = block.route(x)
    keep = kept(weights, modality, profile)
    eager = block.finish(x, block.run_experts(x, experts, weights * keep))
    exact = exact_output(block, x, experts, weights, keep)
    if block.shared is not None:
        exact += x.double() @ block.shared.double().t()
    assert (got.shape, got.dtype) == (eager.shape, eager.dtype)
    if len(x):
        # Four roundings, for where the eager model is exact by luck.
        band = 4 * torch.finfo(x.dtype).eps * exact.abs().max()
        assert (got.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max() + band


def rewrite_and_compare(example: Example) -> BlockReport:
    """Trace, rewrite, run, compare; with symbolic sizes also on fewer tokens than were traced."""
    block = SmallBlock(example.traits)
    generator = torch.Generator().manual_seed(example.seed)
    x = torch.randn(example.tokens, example.traits.hidden, generator=generator).to(example.traits.dtype)
    profile, (modality, table) = block_profile(block, **example.constants), modality_of(example, x)
    gm, inputs = trace_block(block, x, example.dynamic)
    *parameters, _ = inputs
    unit = Unit(profile, list(inputs), embeds=len(parameters) if example.by_rows else None)
    run_passes(gm, unit, PIPELINE)
    with torch.no_grad():
        for tokens in {example.tokens, example.tokens // 2} if example.dynamic else {example.tokens}:
            part, kinds = x[:tokens], modality[:tokens]
            given = {MODALITY: kinds, **table}
            got = gm(*parameters, part, *(given[name] for name in unit.extra_inputs))[0]
            assert_equals_oracle(block, got, part, kinds, profile)
    (report,) = unit.blocks
    return report


def test_the_rewritten_block_equals_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[Any] = Counter()
    honest = _masked_moe_native.add_kernel
    monkeypatch.setattr(
        _masked_moe_native,
        "add_kernel",
        lambda activation, dtype: activation in NATIVE and honest(activation, dtype),
    )

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(example=examples())
    def law(example: Example) -> None:
        report = rewrite_and_compare(example)
        # Every combination of traits is known: none is left alone.
        assert report.rewritten, report.reason
        traits = example.traits
        seen.update(["all", traits.dtype, traits.implementation, traits.score, traits.gate])
        seen.update(["by rows" if example.by_rows else "by the wrapper"])
        seen.update([f"tokens {min(example.tokens, 2)}", "dynamic" if example.dynamic else "static"])
        seen.update("narrowed" if "->" in how else how for how in report.specialised)

    law()
    assert seen["all"] >= EXAMPLES
    wanted = [
        torch.float32,
        torch.bfloat16,
        "grouped_mm",
        "batched_mm",
        "dense",
        "softmax",
        "sigmoid",
        "chosen",
    ]
    wanted += [
        *GATED,
        *UNGATED,
        "tokens 0",
        "tokens 1",
        "tokens 2",
        "dynamic",
        "by rows",
        "by the wrapper",
        "no mask",
        "narrowed",
        "deleted",
    ]
    assert [each for each in wanted if seen[each] < 5] == []
