"""Target `aoti`: what its folder holds, and for whom; that it answers rightly is in test_targets.py."""

import json

import pytest

import modes_fx
from modes_fx.aot.manifest import NAME
from modes_fx.errors import ExportError


@pytest.fixture(scope="module")
def folder(exported):
    return exported("aoti")


def test_weights_lie_once_beside_the_code(folder, model):
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    weights = sum(p.nbytes for p in model.parameters())
    # Not counted among the parameters: tables of positions, and what a picture's size fixes.
    assert weights < sizes.pop("weights.safetensors") < 1.2 * weights
    assert all(size < weights for size in sizes.values()), sizes


def test_another_processor_is_refused(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    data = json.loads((tmp_path / NAME).read_text())
    data["requires"]["machine"] = "vax"
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).write_text(json.dumps(data))
    with pytest.raises(ExportError, match=r"compiled for machine vax.*export it on a machine like this one"):
        modes_fx.load(tmp_path)
