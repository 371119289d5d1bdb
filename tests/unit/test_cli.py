"""The command line: real runs on the demo model, and one sentence with exit code 2 for every mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import modes_fx
from modes_fx import demo
from modes_fx.cli import main
from modes_fx.demo.samples import draw_sample
from modes_fx.errors import ModesError
from modes_fx.profile import Profile


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


@pytest.mark.parametrize("command", ["demo", "calibrate", "search", "explain", "evaluate", "export", "show"])
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


def test_search_within_a_budget_and_a_floor(capsys, calibrated, tmp_path):
    found, frontier = tmp_path / "found.json", tmp_path / "frontier.json"
    given = ("--target-kl", 0.01, "--target-skip-vision", 0.4, "--task-floor", 0.5, "--frontier", frontier)
    samples = ("--samples", 13, "--grid", 4, "--exponent", 0, "--resume", tmp_path / "r.json")
    code, _, err = run(capsys, "search", calibrated, *given, *samples, "--out", found)
    assert code == 0, err
    profile = Profile.load(found)
    assert profile.kl <= 0.01 and profile.measured_skip_vision >= 0.4 and profile.measured_skip > 0.3
    assert json.loads(frontier.read_text())


def test_explain_names_every_layer(capsys, calibrated):
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
        (["search", "/nowhere/p.json"], "The target asks for nothing; give a skip rate, a KL budget or"),
        (["calibrate", "/nowhere", "--out", "p.json"], "/nowhere is not a model folder"),
        (["calibrate", "demo", "--out", "p.json", "--variant", "x"], "Invalid value for '--variant'"),
        (["calibrate", "demo", "--out", "p.json", "--data", "/nowhere/b.jsonl"], "No such file"),
        (
            ["calibrate", "demo", "--out", "p.json", "--data", "/nowhere"],
            "/nowhere: there is no such data set",
        ),
        (["calibrate", "demo", "--out", "p.json", "--dtype", "int8"], "Invalid value for '--dtype'"),
        (["export", "demo", "p.json", "--out", "x"], "Missing option '--target'"),
        (["export", "demo", "p.json", "--target", "nope", "--out", "x"], "target must be one of aoti, onnx"),
        (["export", "demo", "/nowhere", "--target", "aoti", "--out", "x"], "No such file or directory"),
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


# A model and its processor from a folder, samples from a file.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model and processor as `save_pretrained` writes them, and four questions with pictures."""
    from PIL import Image

    path = tmp_path_factory.mktemp("saved")
    model, processor = demo.load()
    model.save_pretrained(path)
    processor.save_pretrained(path)
    lines = []
    for index, task in enumerate(demo.TASKS[:4]):
        sample = draw_sample("calibration", task, 0)
        Image.fromarray(sample.picture).save(path / f"{index}.png")
        asked = {"question": sample.question, "answer": sample.answer, "task": task}
        lines.append(json.dumps({**asked, "image": f"{index}.png"}))
    (path / "questions.jsonl").write_text("\n".join(lines))
    return path


def test_a_model_folder_and_a_file_give_what_the_demo_gives(capsys, folder, tmp_path):
    out = tmp_path / "p.json"
    given = ("--data", folder / "questions.jsonl", "--task-column", "task")
    code, _, err = run(capsys, "calibrate", folder, *given, "--batch-size", 4, "--out", out)
    assert code == 0, err
    model, processor = demo.load()
    batches = demo.batches("calibration", 4)
    profile = Profile.load(out)
    assert profile == modes_fx.calibrate(model, batches, processor=processor, progress=False)
    code, _, err = run(
        capsys, "search", out, "--model", folder, *given, "--batch-size", 2, "--target-skip", 0.5, "--grid", 4
    )
    assert code == 0, err
    assert Profile.load(out).measured_skip == pytest.approx(0.5, abs=0.01)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A model without experts, and a tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    path = tmp_path_factory.mktemp("dense")
    sizes: Any = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=256, num_key_value_heads=1, **sizes)).save_pretrained(path)
    demo.load()[1].tokenizer.save_pretrained(path)
    return path


def test_what_cannot_be_calibrated_is_one_sentence(capsys, folder, dense, tmp_path):
    out = ("--out", tmp_path / "p.json")
    data = ("--data", folder / "questions.jsonl")
    assert "A model of your own needs --data" in refused(capsys, "calibrate", folder, *out)
    said = refused(capsys, "calibrate", folder, *data, "--answer-column", "gold", *out)
    assert "There is no column gold; there are question, answer, task, image." in said
    said = refused(capsys, "calibrate", folder, *data, "--template", "enable_thinking", *out)
    assert "--template takes NAME=VALUE, got 'enable_thinking'" in said
    assert "is a tokenizer and takes no pictures" in refused(capsys, "calibrate", dense, *data, *out)
    plain = (*data, "--text-only", *out)
    assert "has no MoE block" in refused(capsys, "calibrate", dense, *plain)
    (dense / "chat_template.jinja").rename(dense / "aside")
    assert "has no chat template" in refused(capsys, "calibrate", dense, *plain)
    (dense / "aside").rename(dense / "chat_template.jinja")
    (dense / "config.json").write_text("{")
    assert "cannot be loaded: " in refused(capsys, "calibrate", dense, *plain)
    assert not (tmp_path / "p.json").exists()


def test_of_several_processes_one_writes_and_speaks(folder, tmp_path):
    """Started by torchrun; that the shares add up to the same profile is the calibration's own test."""
    out = tmp_path / "p.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = ["--data", folder / "questions.jsonl", "--samples", 2, "--batch-size", 1, "--out", out]
    command = [*launch, "-m", "modes_fx", "calibrate", folder, *given]
    ran = subprocess.run([str(part) for part in command], text=True, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("Wrote ") == 1
    assert Profile.load(out).num_samples == 2


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A model of text alone, with one layer of experts, and its profile."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from modes_fx.testing import tiny_profile

    path = tmp_path_factory.mktemp("experts")
    sizes: Any = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts: Any = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=256, num_key_value_heads=1, **sizes, **experts))
    model.save_pretrained(path)
    demo.load()[1].tokenizer.save_pretrained(path)
    tiny_profile(model).save(path / "p.json")
    return path


def test_export_of_a_model_folder(capsys, experts, folder, tmp_path):
    pytest.importorskip("onnxscript")
    out = tmp_path / "served"
    data = ("--data", folder / "questions.jsonl", "--text-only")
    given = (experts, experts / "p.json", "--target", "onnx", "--out", out, *data)
    said = refused(capsys, "export", *given, "--option", "sparse=yes")
    assert "--option takes NAME=VALUE with a value in JSON, got 'sparse=yes'" in said
    code, printed, err = run(capsys, "export", *given, "--max-tokens", 64)
    assert code == 0, err
    assert f"Wrote {out}" in printed and "64 tokens of a prefill" in printed and "decode.onnx" in printed
    program = modes_fx.load(out)
    assert program.manifest.tokens.max == 64 and not program.manifest.pictures
    assert program.generate(max_new_tokens=2, input_ids=torch.tensor([[9, 10, 11]])).shape == (1, 2)
    (tmp_path / "mine").write_text("")
    given = (experts, experts / "p.json", "--target", "onnx", "--out", tmp_path / "mine", *data)
    assert "is no export of modes_fx" in refused(capsys, "export", *given)
