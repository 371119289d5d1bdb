"""`modes_fx.explain`: the report says what happened to each block, and reads well in a terminal."""

import dataclasses

import pytest
import torch
from rich.console import Console

import modes_fx
from modes_fx.explain import Report, Row
from modes_fx.testing import tiny_inputs, tiny_profile, tiny_qwen3_vl_moe


def row(index, **known):
    known = {
        "rewritten": True,
        "reason": "",
        "theta_text": 0.25,
        "theta_vision": 0.125,
        "modality": "token ids",
        "traits": "grouped_mm; softmax router",
        "specialised": ("top 8 -> 3", "no mask"),
        "runs": 1,
        "max_error": 2e-7,
    } | known
    return Row(f"model.language_model.layers.{index}.mlp", **known)


def refused(index, reason):
    return row(index, rewritten=False, reason=reason, modality="", traits="", specialised=(), max_error=None)


def report(*rows, **known):
    return Report(rows, **({"num_graphs": 3, "num_rewritten_graphs": 2} | known))


def test_what_all_blocks_have_in_common_stands_once_under_the_table():
    text = str(report(row(0), row(1)))
    assert text.count("grouped_mm; softmax router") == text.count("top 8 -> 3, no mask") == 1
    assert "\ntraits: grouped_mm; softmax router" in text and "\nspecialised: top 8 -> 3, no mask\n" in text
    assert report(row(0), row(1)).header()[-1] == "error"


def test_what_differs_has_a_column():
    made = report(row(0, specialised=("deleted",)), row(1), row(2, modality="another graph"))
    assert made.header()[-2:] == ("specialised", "modality from")
    lines = str(made).splitlines()
    assert lines[1].endswith("deleted              token ids") and lines[3].endswith("another graph")
    assert "traits: grouped_mm; softmax router" in lines


def test_a_reason_is_a_note_that_blocks_share():
    made = report(row(0), refused(1, "the proof failed"), refused(2, "no router"), refused(3, "no router"))
    lines = str(made).splitlines()
    assert [line.split("  ")[1] for line in lines[1:5]] == ["yes", "no [1]", "no [2]", "no [2]"]
    assert "[1] the proof failed" in lines and "[2] no router" in lines
    # Blocks that were not rewritten have no modality; that makes no column of it.
    assert "modality from: token ids" in lines
    assert made.num_rewritten == 1


def test_breaks_and_recompiles_are_counted():
    made = report(row(0), graph_breaks={"Data dependent operator": 2, "print": 1}, num_recompiles=4)
    assert "1 of 1 blocks rewritten. 3 graphs, 2 of them changed; 3 graph breaks, 4 recompiles." in str(made)
    assert "graph break, 2 times: Data dependent operator" in str(made)


@pytest.fixture
def long_report():
    return report(
        *(row(i, specialised=(f"top 8 -> {i}", "no mask")) for i in range(3)),
        refused(3, "the rewrite differs from the model: " + "error 0.1, " * 20),
        warnings=("nothing is skipped, " * 12,),
    )


def test_the_text_fits_110_columns(long_report):
    assert max(map(len, str(long_report).splitlines())) <= 110


def test_the_rich_table_has_the_same(long_report):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(long_report.table())
    text = " ".join(console.export_text().split())
    assert "no [1]" in text and "top 8 -> 2, no mask" in text and "[1] the rewrite differs" in text


# On a model.


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def model():
    return tiny_qwen3_vl_moe(num_layers=2)


@pytest.fixture(scope="module")
def profile(model):
    return tiny_profile(model)


IDS = {"input_ids": tiny_inputs()["input_ids"], "use_cache": False}


def test_each_layer_has_a_row(model, profile):
    made = modes_fx.explain(model.get_decoder(), profile, **IDS)
    assert [each.layer for each in made.rows] == [layer.name for layer in profile.layers]
    for each, layer in zip(made.rows, profile.layers, strict=True):
        assert each.rewritten and each.runs == 1 and each.modality == "token ids"
        assert each.theta_text == pytest.approx(profile.tau_text / layer.alpha_text)
        assert "softmax" in each.traits and 0 <= each.max_error < 1e-4
    assert (made.num_graphs, made.num_rewritten_graphs, made.num_recompiles) == (1, 1, 0)
    assert made.graph_breaks == {} and made.passes["skip_experts"] == 2


def test_it_takes_the_path_of_a_profile(model, profile, tmp_path):
    profile.save(tmp_path / "p.json")
    made = modes_fx.explain(model.get_decoder(), tmp_path / "p.json", **IDS)
    assert made.num_rewritten == 2


def test_constants_that_simplify_a_layer_are_told(model, profile):
    layers = (dataclasses.replace(profile.layers[0], alpha_text=0.0, alpha_vision=0.0), profile.layers[1])
    zero = dataclasses.replace(profile, layers=layers, special_token_ids=())
    made = modes_fx.explain(model.get_decoder(), zero, **IDS)
    assert made.rows[0].specialised and made.rows[0].specialised != made.rows[1].specialised


def test_broken_graphs_are_told(model, profile):
    layer = model.get_decoder().layers[1]
    hook = layer.register_forward_pre_hook(torch.compiler.disable(lambda module, args: None))
    made = modes_fx.explain(model.get_decoder(), profile, **IDS)
    hook.remove()
    assert made.num_rewritten == 2 and made.num_graphs > 1
    assert sum(made.graph_breaks.values()) >= 1 and all("\n" not in why for why in made.graph_breaks)


def test_each_block_that_is_left_alone_has_its_reason(profile):
    model = tiny_qwen3_vl_moe(num_layers=2)
    model.get_decoder().layers[1].mlp.experts.act_fn = torch.nn.Softmax(-1)
    first, second = modes_fx.explain(model.get_decoder(), profile, **IDS).rows
    assert first.rewritten and not first.reason
    assert not second.rewritten and second.reason and second.runs == 0


def test_eager_experts_are_told_with_the_cure(profile):
    model = tiny_qwen3_vl_moe(num_layers=2)
    model.set_experts_implementation("eager")
    made = modes_fx.explain(model.get_decoder(), profile, **IDS)
    assert made.num_rewritten == 0
    assert all("set_experts_implementation" in each.reason for each in made.rows)


def test_a_model_of_another_profile_is_an_error(profile):
    other = tiny_qwen3_vl_moe(num_layers=2, seed=1)
    with pytest.raises(modes_fx.ProfileError, match="made for another model"):
        modes_fx.explain(other.get_decoder(), profile, **IDS)


def test_the_model_stays_as_it_was(model, profile):
    decoder = model.get_decoder()
    with torch.no_grad():
        want = decoder(**IDS).last_hidden_state
        modes_fx.explain(decoder, profile.with_thresholds(tau_text=1.0, tau_vision=1.0), **IDS)
        assert torch.equal(decoder(**IDS).last_hidden_state, want)
