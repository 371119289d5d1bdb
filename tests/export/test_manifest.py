"""A folder that is not whole, or not ours, is refused with a sentence that says what to do."""

import json

import pytest

from modes_fx.aot.manifest import NAME, Manifest, Program, Range
from modes_fx.errors import ExportError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prefill.bin").write_bytes(b"first")
    (tmp_path / "decode.bin").write_bytes(b"second")
    Manifest(
        target="aoti",
        model="Tiny",
        dtype="float32",
        profile={"digest": "0"},
        versions={},
        requires={},
        batch=Range(1, 4),
        tokens=Range(1, 8),
        cache=Range(1, 8),
        programs={name: Program(f"{name}.bin", ("x",), ("y",)) for name in ("prefill", "decode")},
    ).write(tmp_path)
    return tmp_path


def edit(folder, change):
    data = json.loads((folder / NAME).read_text())
    change(data)
    (folder / NAME).write_text(json.dumps(data))


def test_reads_what_was_written(folder):
    manifest = Manifest.read(folder)
    assert manifest.programs["decode"] == Program("decode.bin", ("x",), ("y",))
    assert set(manifest.files) == {"prefill.bin", "decode.bin"}
    assert manifest.write(folder) == manifest


def test_no_manifest(tmp_path):
    with pytest.raises(ExportError, match=r"holds no manifest.json.*export again"):
        Manifest.read(tmp_path)
    with pytest.raises(ExportError, match="holds no manifest"):
        Manifest.read(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", '{"format": "modes_fx.exp', "\x00\xff"])
def test_a_damaged_manifest(folder, text):
    (folder / NAME).write_text(text, encoding="latin-1")
    with pytest.raises(ExportError, match=r"damaged.*export again"):
        Manifest.read(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "another"}'])
def test_a_foreign_manifest(folder, text):
    (folder / NAME).write_text(text)
    with pytest.raises(ExportError, match="not a manifest of modes_fx"):
        Manifest.read(folder)


def test_another_version(folder):
    edit(folder, lambda data: data.update(version=99))
    with pytest.raises(ExportError, match="version 99"):
        Manifest.read(folder)


def test_a_missing_file(folder):
    (folder / "decode.bin").unlink()
    with pytest.raises(ExportError, match=r"decode.bin is missing"):
        Manifest.read(folder)


@pytest.mark.parametrize("content", [b"changed", b"secone", b""])
def test_an_edited_file(folder, content):
    (folder / "decode.bin").write_bytes(content)
    with pytest.raises(ExportError, match=r"decode.bin is not the file that was exported"):
        Manifest.read(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["files"].pop("decode.bin"),
        lambda data: data["files"].update({"../decode.bin": data["files"]["decode.bin"]}),
        lambda data: data.pop("programs"),
        lambda data: data.update(batch=3),
        lambda data: data.update(files=[]),
    ],
)
def test_an_edited_manifest(folder, change):
    edit(folder, change)
    with pytest.raises(ExportError, match="edited or damaged"):
        Manifest.read(folder)


def test_a_size_outside_of_a_range():
    with pytest.raises(ValueError, match=r"tokens is 9.*1 to 8.*dynamic=\{'tokens': \(1, 9\)\}"):
        Range(1, 8).check("tokens", 9)
