"""Profile: round trip, refusals, atomic writes, fingerprints."""

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from modes_fx.errors import ProfileError
from modes_fx.profile import Layer, Profile, fingerprint, normalise, write_atomically
from modes_fx.testing import tiny_qwen3_vl_moe


def layer(index: int = 0, **changes: Any) -> Layer:
    given: dict[str, Any] = {
        "name": f"model.layers.{index}.mlp",
        "alpha_text": 0.25 * (index + 1),
        "alpha_vision": 0.1,
        "num_experts": 8,
        "top_k": 4,
        "fingerprint": f"{index:064x}",
        "weight_scale": 1.0,
    }
    return Layer(**{**given, **changes})


def profile(**changes: Any) -> Profile:
    given: dict[str, Any] = {
        "layers": (layer(0), layer(1)),
        "tau_text": 0.0125,
        "tau_vision": math.inf,
        "visual_token_ids": (5, 6),
        "special_token_ids": (0, 1),
        "vocab_size": 96,
        "hidden_size": 32,
        "target_skip": 0.83,
        "measured_skip": 0.834,
        "measured_skip_text": 0.5,
        "measured_skip_vision": 1.0,
        "kl": 0.0228,
        "num_samples": 130,
        "versions": {"torch": "2.13.0"},
    }
    return Profile(**{**given, **changes})


def edited(tmp_path: Path, edit: Any) -> Path:
    """A saved profile whose JSON `edit` has changed."""
    path = tmp_path / "p.json"
    profile().save(path)
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    return path


def test_a_round_trip_gives_an_equal_profile(tmp_path):
    path = tmp_path / "p.json"
    profile().save(path)
    assert Profile.load(path) == profile()
    assert json.loads(path.read_text())["tau_vision"] == "inf"
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_equal_profiles_have_equal_digests_and_others_do_not():
    assert profile().digest() == profile().digest()
    assert profile().digest() != profile(tau_text=0.0126).digest()
    assert profile().digest() != profile(layers=(layer(0), layer(1, alpha_text=0.3))).digest()


def test_with_thresholds_forgets_what_was_measured():
    changed = profile().with_thresholds(tau_text=0.5)
    assert (changed.tau_text, changed.tau_vision) == (0.5, math.inf)
    assert changed.measured_skip is changed.kl is changed.target_skip is None
    assert changed.layers == profile().layers


def test_what_multiplies_a_weight_is_alpha_without_the_folded_factor():
    plain = layer(alpha_text=0.5, alpha_vision=0.25)
    scaled = dataclasses.replace(plain, weight_scale=2.5)
    assert (scaled.weight_alpha_text, scaled.weight_alpha_vision) == (0.2, 0.1)
    assert (plain.weight_alpha_text, plain.weight_alpha_vision) == (0.5, 0.25)
    assert profile(layers=(scaled,)).digest() != profile(layers=(plain,)).digest()
    assert profile(layers=(scaled,)).tempered(0.5).layers[0].weight_scale == 2.5


def test_blocks_of_one_router_weight_must_share_their_constants():
    with pytest.raises(ProfileError, match=r"layers\[1\]\.fingerprint: .* another alpha or weight_scale"):
        profile(layers=(layer(), layer(weight_scale=2.5)))


def test_layer_for_finds_by_fingerprint():
    assert profile().layer_for(f"{1:064x}") == layer(1)
    assert profile().layer_for("f" * 64) is None


def test_tempering_flattens_alpha_and_keeps_its_sum():
    flat = profile().tempered(0)
    assert [entry.alpha_text for entry in flat.layers] == [0.5, 0.5]
    useless = profile(layers=(layer(0), layer(1), layer(2, alpha_vision=0.0))).tempered(0)
    assert [entry.alpha_vision for entry in useless.layers] == [0.5, 0.5, 0.0]
    same = profile().tempered(1)
    assert [entry.alpha_text for entry in same.layers] == pytest.approx([1 / 3, 2 / 3])
    with pytest.raises(ProfileError, match="exponent: needed a finite number >= 0, got -1"):
        profile().tempered(-1)


def test_alphas_that_are_all_zero_become_equal():
    assert normalise([0.0, 0.0]) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("tau_text"), r"p\.json: tau_text: the field is missing"),
        (lambda d: d["layers"][1].pop("top_k"), r"layers\[1\]\.top_k: the field is missing"),
        (lambda d: d.update(extra=1), r"extra: unknown field"),
        (lambda d: d["layers"][0].update(beta=1), r"layers\[0\]\.beta: unknown field"),
        (lambda d: d.update(tau_text="high"), r"tau_text: wrong type, needed a number, got a string"),
        (lambda d: d.update(tau_text=True), r"tau_text: wrong type, needed a number, got a boolean"),
        (lambda d: d.update(tau_text=math.nan), r"tau_text: needed a number, or \"inf\".*, got NaN"),
        (lambda d: d.update(tau_vision=None), r"tau_vision: wrong type, needed a number, got null"),
        (lambda d: d.update(layers={}), r"layers: wrong type, needed a list of objects, got an object"),
        (lambda d: d.update(layers=[]), r"layers: needed at least one MoE block, got none"),
        (lambda d: d["layers"].append(3), r"layers\[2\]: wrong type, needed an object, got a number"),
        (lambda d: d["layers"][1].update(alpha_text=math.nan), r"layers\[1\]\.alpha_text: .* got nan"),
        (lambda d: d["layers"][1].update(alpha_vision=math.inf), r"layers\[1\]\.alpha_vision: .* got inf"),
        (lambda d: d["layers"][1].update(alpha_text=-0.5), r"layers\[1\]\.alpha_text: .* >= 0, got -0\.5"),
        (lambda d: d["layers"][1].pop("weight_scale"), r"layers\[1\]\.weight_scale: the field is missing"),
        (lambda d: d["layers"][1].update(weight_scale=0), r"layers\[1\]\.weight_scale: .* > 0, got 0"),
        (lambda d: d["layers"][1].update(weight_scale=math.inf), r"layers\[1\]\.weight_scale: .* got inf"),
        (lambda d: d["layers"][1].update(weight_scale="1"), r"layers\[1\]\.weight_scale: wrong type"),
        (lambda d: d["layers"][0].update(top_k=9), r"layers\[0\]\.top_k: needed from 1 to num_experts = 8"),
        (lambda d: d["layers"][0].update(top_k=2.0), r"layers\[0\]\.top_k: wrong type, needed an integer"),
        (lambda d: d["layers"][0].update(fingerprint="abc"), r"layers\[0\]\.fingerprint: .*64 hexadecimal"),
        (
            lambda d: d["layers"][1].update(fingerprint=d["layers"][0]["fingerprint"]),
            r"layers\[1\]\.fingerprint: .* same router weight as model\.layers\.0\.mlp but another alpha",
        ),
        (lambda d: d.update(visual_token_ids=[5, "x"]), r"visual_token_ids\[1\]: wrong type"),
        (lambda d: d.update(special_token_ids=[-1]), r"special_token_ids\[0\]: needed a token id >= 0"),
        (lambda d: d.update(measured_skip=1.5), r"measured_skip: needed from 0 to 1"),
        (lambda d: d.update(kl=math.nan), r"kl: needed a finite number"),
        (lambda d: d.update(vocab_size=0), r"vocab_size: needed at least 1, got 0"),
        (lambda d: d.update(version=2), r"version: this modes_fx reads version 1 .* the file has 2"),
        (lambda d: d.pop("version"), r"version: .* the file has None"),
        (lambda d: d.pop("format"), r"valid JSON, but not a modes_fx profile"),
        (lambda d: d.update(versions={"torch": 2}), r"versions\.torch: wrong type, needed a string"),
    ],
)
def test_refuses_a_field_that_is_wrong_and_names_it(tmp_path, edit, message):
    path = edited(tmp_path, edit)
    with pytest.raises(ProfileError, match=message):
        Profile.load(path)


def test_every_truncation_is_called_truncated(tmp_path):
    path = tmp_path / "p.json"
    profile().save(path)
    whole = path.read_text().rstrip()
    for length in range(1, len(whole)):
        path.write_text(whole[:length])
        with pytest.raises(ProfileError, match=r"p\.json: truncated: the JSON ends in the middle"):
            Profile.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"alpha: 3\n", "not JSON"),
        (b'{"format": modes}', "not JSON"),
        (b"[1, 2]", "valid JSON, but not a modes_fx profile"),
        (b"\x80\x04\x95\xff", "not text"),
    ],
)
def test_refuses_a_file_that_is_no_profile(tmp_path, content, message):
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=re.escape(f"{path}: ") + message):
        Profile.load(path)


def test_a_profile_made_in_code_is_checked_too():
    with pytest.raises(ProfileError, match="tau_text"):
        profile(tau_text=math.nan)
    with pytest.raises(ProfileError, match="alpha_vision"):
        layer(alpha_vision=math.nan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        profile().tau_text = 1.0


@pytest.mark.parametrize("crash", ["fsync", "replace"])
def test_a_crash_while_saving_leaves_the_old_profile_and_no_litter(tmp_path, monkeypatch, crash):
    path = tmp_path / "p.json"
    profile().save(path)

    def die(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, crash, die)
    with pytest.raises(OSError, match="disk full"):
        profile(tau_text=0.5).save(path)
    assert Profile.load(path) == profile()
    assert os.listdir(tmp_path) == ["p.json"]


def test_saving_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomically(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"


def test_a_checkpoint_has_one_fingerprint_in_float32_and_in_bfloat16():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    assert fingerprint(weight) == fingerprint(weight.to(torch.bfloat16)) == fingerprint(weight.T.clone().T)
    assert fingerprint(weight) != fingerprint(weight.T)
    assert fingerprint(weight) != fingerprint(weight.reshape(16, 16))
    assert fingerprint(weight) != fingerprint(weight + 1)
    with pytest.raises(ProfileError, match="meta device"):
        fingerprint(weight.to("meta"))


def test_check_model_knows_its_own_model_and_refuses_another():
    model = tiny_qwen3_vl_moe(num_layers=2)
    routers = [block.mlp.gate.weight for block in model.model.language_model.layers]
    own = profile(layers=tuple(layer(i, fingerprint=fingerprint(w)) for i, w in enumerate(routers)))
    own.check_model(model)
    own.check_model(torch.compile(model))
    with pytest.raises(ProfileError, match=r"made for another model: it knows 2 MoE blocks.*0;.*Calibrate"):
        own.check_model(tiny_qwen3_vl_moe(num_layers=2, seed=1))
    with pytest.raises(ProfileError, match=r"it knows 1 MoE blocks, of the model's 2 .* of 1; model\.lang"):
        dataclasses.replace(own, layers=own.layers[:1]).check_model(model)


def test_a_file_from_before_the_interval_of_kl_loads_without_one():
    older = json.loads(json.dumps(profile().to_dict()))
    del older["kl_low"], older["kl_high"]
    assert Profile.from_dict(older) == profile()
