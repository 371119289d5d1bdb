"""A rewritten torch.export program gives the logits of the eager model with dropped pairs at weight zero."""

import pytest
import torch

import modes_fx
from modes_fx import rewrite
from modes_fx.kernels.masked_moe import masked_moe
from modes_fx.testing import FAMILIES, tiny_profile

ATOL = 1e-4
CASES = [
    ("internvl+qwen3_moe", "picture"),
    ("internvl+gpt_oss", "picture"),
    ("aria", "picture"),
    ("kimi_k25+deepseek_v3", "text"),
    ("qwen3_vl_moe", "text"),
    ("mixtral", "text"),
]


def export(model, inputs, *, strict=False, dynamic_shapes=None):
    with torch.no_grad():
        model(**inputs)  # transformers sets hooks up in the first call, which strict export cannot trace
        return torch.export.export(
            model, (), {**inputs, "use_cache": False}, strict=strict, dynamic_shapes=dynamic_shapes
        )


def num_rewritten(program):
    return len(program.graph.find_nodes(op="call_function", target=masked_moe))


def operator_namespaces(program):
    targets = [node.target for node in program.graph.nodes]
    return {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}


@pytest.mark.parametrize(
    ("name", "kind", "strict"),
    [*((*case, False) for case in CASES), *((*case, True) for case in CASES[:1] + CASES[-1:])],
)
@torch.no_grad()
def test_a_whole_model(name, kind, strict, oracle):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs(kind)
    profile = tiny_profile(model)
    truth = oracle(model, profile)
    with truth():
        want = model(**inputs).logits
    program = rewrite(export(model, inputs, strict=strict), profile)
    assert num_rewritten(program) == len(profile.layers)
    # The products that the op replaces are gone, and with them the operators of transformers.
    assert operator_namespaces(program) == {"aten", "modes_fx"}
    got = program.module()(**inputs, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)
    assert truth.skip > 0
    assert not torch.allclose(want, model(**inputs).logits, atol=ATOL)


@pytest.mark.parametrize("name", ["internvl+qwen3_moe", "qwen3_vl_moe"])
@torch.no_grad()
def test_a_decoder_reads_the_modality_off_its_embedded_tokens(name, oracle, tmp_path):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs("text")
    profile = tiny_profile(model)
    with oracle(model, profile)():
        want = model(**inputs).logits
    rows = model.get_input_embeddings()(inputs["input_ids"])
    program = rewrite(export(model.get_decoder(), {"inputs_embeds": rows}), profile)
    torch.export.save(program, tmp_path / "decoder.pt2")
    loaded = torch.export.load(tmp_path / "decoder.pt2")
    hidden = loaded.module()(inputs_embeds=rows, use_cache=False).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), want, atol=ATOL, rtol=0)


@torch.no_grad()
def test_other_numbers_of_tokens_than_at_export(oracle):
    family = FAMILIES["mixtral"]
    model, inputs = family.build(), family.inputs("text")
    profile = tiny_profile(model)
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {name: {1: length} for name in inputs} | {"use_cache": None}
    program = rewrite(export(model, inputs, dynamic_shapes=shapes), profile)
    for tokens in (3, 17, 40):
        ids = torch.randint(
            8, profile.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(tokens)
        )
        longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with oracle(model, profile)():
            want = model(**longer).logits
        got = program.module()(**longer, use_cache=False).logits
        torch.testing.assert_close(got, want, atol=ATOL, rtol=0)


@torch.no_grad()
def test_an_exported_module_can_be_compiled_too(oracle):
    family = FAMILIES["internvl+qwen3_moe"]
    model, inputs = family.build(), family.inputs("picture")
    profile = tiny_profile(model)
    with oracle(model, profile)():
        want = model(**inputs).logits
    backend = modes_fx.backend(profile, lowering="eager")
    compiled = torch.compile(export(model, inputs).module(), backend=backend)
    got = compiled(**inputs, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)
    assert backend.run.executed == [1] * len(profile.layers)


@torch.no_grad()
def test_refuses_the_profile_of_another_model():
    family = FAMILIES["mixtral"]
    profile = tiny_profile(family.build(seed=1))
    program = export(family.build(), family.inputs("text"))
    with pytest.raises(modes_fx.ProfileError, match="made for another model"):
        rewrite(program, profile)


@torch.no_grad()
def test_the_program_itself_stays_as_it_was():
    family = FAMILIES["mixtral"]
    model = family.build()
    program = export(model, family.inputs("text"))
    before = str(program.graph)
    rewrite(program, tiny_profile(model))
    assert str(program.graph) == before
