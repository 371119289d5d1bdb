"""Target `aoti`: AOTInductor's code gives what the eager model gives, in a process without transformers."""

import json

import pytest

import modes_fx
from modes_fx.aot.manifest import NAME
from modes_fx.errors import ExportError


@pytest.fixture(scope="module")
def folder(model, profile, example, tmp_path_factory):
    path = tmp_path_factory.mktemp("aoti") / "tiny"
    modes_fx.export(
        model, profile, example, path, target="aoti", options={"aot_inductor.compile_wrapper_opt_level": "O0"}
    )
    return path


@pytest.fixture(scope="module")
def program(folder):
    return modes_fx.load(folder)


def test_prefill(program, claims):
    claims.prefill(program)


def test_padded_rows(program, claims):
    claims.padded_rows(program)


def test_generation(program, claims):
    claims.generation(program)


def test_without_transformers(folder, claims):
    claims.without_transformers(folder)


def test_another_processor_is_refused(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = json.loads((tmp_path / NAME).read_text())
    data["requires"]["machine"] = "vax"
    (tmp_path / NAME).write_text(json.dumps(data))
    with pytest.raises(ExportError, match=r"compiled for machine vax.*export it on a machine like this one"):
        modes_fx.load(tmp_path)
