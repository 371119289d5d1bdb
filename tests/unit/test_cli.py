"""The command line: real runs on the demo model, and one sentence with exit code 2 for every mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import modes_fx
from modes_fx import demo
from modes_fx.cli import main
from modes_fx.errors import ModesError
from modes_fx.profile import Profile
from modes_fx.records import read_batches


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of one command."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(exit_info.value.code or 0), captured.out, captured.err


def refused(capsys: Any, *arguments: object) -> str:
    """The one sentence of a command that fails."""
    code, _, err = run(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("modes-fx: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "demo.modes.json"
    with pytest.raises(SystemExit):
        main(["calibrate", "demo", "--samples", "13", "--out", str(path)])
    return path


@pytest.mark.parametrize("command", ["demo", "calibrate", "search", "explain", "show"])
def test_every_command_has_help_with_an_example(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert re.search(rf"Example:\s+modes-fx {command}", out)


def test_the_module_runs_as_a_program():
    ran = subprocess.run(
        [sys.executable, "-m", "modes_fx.cli", "--help"], check=True, text=True, capture_output=True
    )
    for command in ("demo", "calibrate", "search", "explain", "show"):
        assert command in ran.stdout


def test_calibrate_then_search_then_show(capsys, calibrated, tmp_path):
    assert Profile.load(calibrated).num_samples == 13
    found = tmp_path / "found.json"
    given = ("--target-skip", 0.5, "--samples", 13, "--grid", 4, "--out", found)
    code, out, _ = run(capsys, "search", calibrated, *given)
    assert code == 0 and "measured" in out
    profile = Profile.load(found)
    assert profile.measured_skip == pytest.approx(0.5, abs=0.01)
    assert Profile.load(calibrated).target_skip is None
    code, out, _ = run(capsys, "show", found)
    assert code == 0
    assert f"measured {100 * profile.measured_skip:.1f} %" in out
    assert "layers.0.mlp" in out and f"{profile.layers[0].alpha_text:.4f}" in out


def test_show_says_when_nothing_was_searched(capsys, calibrated):
    assert "skips nothing" in run(capsys, "show", calibrated)[1]


def test_search_of_several_exponents_writes_the_profile_itself(capsys, calibrated, tmp_path):
    path = tmp_path / "p.json"
    path.write_bytes(calibrated.read_bytes())
    given = ("--target-skip", 0.5, "--samples", 13, "--grid", 2, "--exponent", 0.25)
    assert run(capsys, "search", path, *given)[0] == 0
    assert Profile.load(path).method == "modality^0.25"


def test_explain_names_every_layer(capsys, calibrated):
    if not hasattr(modes_fx, "explain"):
        pytest.skip("modes_fx.explain is not there yet")
    code, out, _ = run(capsys, "explain", calibrated)
    assert code == 0
    for i in range(6):
        assert f"layers.{i}.mlp" in out


def test_no_command_prints_the_help_and_fails(capsys):
    code, out, err = run(capsys)
    assert code == 2 and "calibrate" in out + err and "modes-fx: " not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "No such command 'nope'"),
        (["show"], "Missing argument"),
        (["show", "--what"], "No such option: --what"),
        (["show", "/nowhere/p.json"], "/nowhere/p.json: No such file or directory."),
        (["show", "/"], "/: Is a directory."),
        (["search", "/nowhere/p.json", "--target-skip", "0.5"], "No such file or directory"),
        (["search", "/nowhere/p.json", "--target-skip", "1.5"], "Invalid value for '--target-skip'"),
        (["search", "/nowhere/p.json"], "Missing option '--target-skip'"),
        (["calibrate", "/nowhere", "--out", "p.json"], "/nowhere is not a model folder"),
        (["calibrate", "demo", "--out", "p.json", "--variant", "x"], "Invalid value for '--variant'"),
        (["calibrate", "demo", "--out", "p.json", "--batches", "/nowhere/b.jsonl"], "No such file"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_a_broken_profile_is_one_sentence(capsys, tmp_path, calibrated):
    path = tmp_path / "p.json"
    path.write_text(calibrated.read_text()[:200])
    assert "p.json: truncated" in refused(capsys, "show", path)
    path.write_text(calibrated.read_text().replace('"alpha_text"', '"alpha"', 1))
    assert "layers[0].alpha: unknown field" in refused(capsys, "show", path)


def test_a_foreign_profile_and_an_unreachable_target_are_one_sentence(capsys, tmp_path, calibrated):
    data = json.loads(calibrated.read_text())
    data["layers"][0]["fingerprint"] = "0" * 64
    foreign = tmp_path / "p.json"
    foreign.write_text(json.dumps(data))
    given = ("--samples", 13, "--target-skip")
    assert "made for another model" in refused(capsys, "search", foreign, *given, 0.5)
    assert "nearest reachable is 0." in refused(capsys, "search", calibrated, *given, 1.0)


def test_an_output_folder_that_is_a_file_is_one_sentence(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "File exists" in refused(capsys, "demo", "--out", tmp_path / "file")


def test_a_model_folder_that_cannot_be_loaded_is_one_sentence(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    given = ("--out", tmp_path / "p.json", "--batches", tmp_path / "b.jsonl")
    assert "cannot be loaded: " in refused(capsys, "calibrate", tmp_path, *given)


def test_what_dynamo_wraps_is_unwrapped(capsys, monkeypatch):
    class BackendCompilerFailed(Exception):
        inner_exception = ModesError("a layer was not rewritten.")

    def fail(path: object) -> None:
        raise BackendCompilerFailed("backend='modes_fx' raised:")

    monkeypatch.setattr(Profile, "load", fail)
    assert refused(capsys, "show", "p") == "modes-fx: a layer was not rewritten."


def test_a_bug_is_not_hidden(monkeypatch):
    def fail(path: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Profile, "load", fail)
    with pytest.raises(ZeroDivisionError):
        main(["show", "p"])


# Records: batches from a JSON Lines file.


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from PIL import Image

    folder = tmp_path_factory.mktemp("records")
    batch = demo.batches("calibration", 2)[0]
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 255, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    lines = [
        {"question": batch.prompts[0], "answer": batch.answers[0], "image": "0.png"},
        {"text": batch.prompts[1], "answer": batch.answers[1], "image": str(folder / "1.png")},
        {"question": "what is at top left", "answer": "dog"},
    ]
    path = folder / "b.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path, batch


def test_records_become_the_batches_that_the_demo_makes(records):
    path, batch = records
    _, processor = demo.load()
    made = read_batches(path, processor)
    assert len(made) == 3
    for row in range(2):
        real = batch["attention_mask"][row].bool()
        assert made[row]["input_ids"][0].tolist() == batch["input_ids"][row][real].tolist()
        assert made[row]["labels"][0].tolist() == batch["labels"][row][real].tolist()
        assert made[row]["pixel_values"].shape == (144, 384)
    assert "pixel_values" not in made[2]
    assert len(read_batches(path, processor, limit=1)) == 1


def test_calibrate_from_a_model_folder_and_records(capsys, records, tmp_path):
    out = tmp_path / "p.json"
    code, _, err = run(capsys, "calibrate", demo.ASSETS, "--batches", records[0], "--out", out)
    assert code == 0, err
    assert Profile.load(out).num_samples == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no line"),
        ("{", r"line 1 is not JSON"),
        ("3", "line 1 must be an object"),
        ('{"question": "q"}', "line 1 needs a string answer"),
        ('{"question": 3, "answer": "a"}', "line 1 needs a string question"),
    ],
)
def test_records_that_cannot_be_used_are_refused_with_their_line(tmp_path, text, message):
    path = tmp_path / "b.jsonl"
    path.write_text(text)
    with pytest.raises(ModesError, match=message):
        read_batches(path, None)
