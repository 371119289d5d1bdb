"""Benchmarks: tasks of lmms-eval and lm-eval on the demo model, against answers known another way."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from modes_fx import demo
from modes_fx.cli import main
from modes_fx.demo.samples import draw_sample
from modes_fx.errors import ModesError
from modes_fx.evaluation import evaluate
from modes_fx.measure import Meter
from modes_fx.skipping import block_alphas, thresholds
from modes_fx.testing.profiles import tiny_profile

needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed; see README"
)
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="pip install lm-eval accelerate"
)
NUM_QUESTIONS = 13

PICTURE_TASK = """
task: demo_suite
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.json}}
test_split: test
output_type: generate_until
doc_to_visual: !function demo_pictures.pictures
doc_to_text: !function demo_pictures.question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 10, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: [{version: 0.0}]
"""
PICTURE_FUNCTIONS = """
from PIL import Image

def pictures(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""
TEXT_TASK = """
task: demo_text
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/text.json}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 0.0}
"""
CHOICES = ["dog", "cat", "blue", "3"]
NOUNS = ("dog", "car", "rose", "whale", "pizza")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of tasks for each harness."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("lmms", "lm"):
        (folder / name).mkdir()
    pictures, text = folder / "lmms", folder / "lm"
    lines = []
    for index in range(NUM_QUESTIONS):
        sample = draw_sample("test", demo.TASKS[index], 0)
        path = pictures / f"{index}.png"
        Image.fromarray(sample.picture).save(path)
        lines.append(json.dumps({"image": str(path), "question": sample.question, "answer": sample.answer}))
    (pictures / "questions.json").write_text("\n".join(lines))
    (pictures / "demo_pictures.py").write_text(PICTURE_FUNCTIONS)
    (pictures / "demo_suite.yaml").write_text(PICTURE_TASK.replace("FOLDER", str(pictures)))
    asked = [{"prompt": prompt(noun), "choices": CHOICES, "label": i % 4} for i, noun in enumerate(NOUNS)]
    (text / "text.json").write_text("\n".join(map(json.dumps, asked)))
    (text / "demo_text.yaml").write_text(TEXT_TASK.replace("FOLDER", str(text)))
    return folder


def prompt(noun: str) -> str:
    return f"<|im_start|> user how many {noun} <|im_end|> <|im_start|> assistant"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def a_profile(model: Any) -> Any:
    return tiny_profile(model, tau_text=0.08, tau_vision=0.1)


@needs_lmms_eval
@pytest.mark.parametrize("batch_size", [1, 5])
def test_lmms_eval_finds_right_what_teacher_forcing_finds_right(tasks, batch_size):
    model, processor = demo.load()
    profile = a_profile(model)
    meter = Meter(
        model, demo.batches("test", NUM_QUESTIONS), profile.visual_token_ids, profile.special_token_ids
    )
    rule = thresholds(block_alphas(profile, meter.blocks), profile.tau_text, profile.tau_vision)
    wanted = [meter.unskipped, meter.measure(rule)]
    assert wanted[0].right != wanted[1].right and wanted[1].skip_vision > 0.3
    given: Any = {"batch_size": batch_size, "include_path": tasks / "lmms"}
    for chosen, measured in zip((None, profile), wanted, strict=True):
        found = evaluate(model, processor, ["demo_suite"], profile=chosen, **given)
        assert found.samples == {"demo_suite": NUM_QUESTIONS}
        right = found.scores["demo_suite"]["exact_match,none"] * NUM_QUESTIONS
        assert right == pytest.approx(sum(measured.right))
    # The prompts' own pairs, and those of the tokens generated after them.
    assert found.skip["vision"] == pytest.approx(measured.skip_vision)
    assert 0 < found.skip["text"] < 1


@needs_lmms_eval
def test_lmms_eval_knows_the_model_by_its_entry_point():
    from lmms_eval.models import get_model

    from modes_fx.evaluation.lmms_model import SkippingModel

    assert get_model("modes_fx") is SkippingModel


@needs_lmms_eval
def test_options_of_tasks_become_options_of_generate():
    from modes_fx.evaluation.lmms_model import cut, generation_options

    assert generation_options({"temperature": 0, "top_p": 1.0, "num_beams": 1, "max_new_tokens": 16}) == {
        "max_new_tokens": 16,
        "do_sample": False,
        "num_beams": 1,
    }
    sampled = generation_options({"temperature": 0.5, "top_p": 0.9})
    assert sampled["do_sample"] and sampled["temperature"] == 0.5 and sampled["top_p"] == 0.9
    assert (
        cut(" a dog\n\nQ: more", ["\n\n", ""]) == "a dog" and cut("a. b", ".") == "a" and cut("a", ()) == "a"
    )


@needs_lm_eval
def test_lm_eval_chooses_what_is_likeliest(tasks):
    model, processor = demo.load()
    right = 0
    for index, noun in enumerate(NOUNS):
        inputs = processor.tokenizer(prompt(noun), return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        right += int(logits[processor.tokenizer.convert_tokens_to_ids(CHOICES)].argmax()) == index % 4
    given = {"harness": "lm-eval", "include_path": tasks / "lm"}
    found = evaluate(model, processor, ["demo_text"], **given)
    assert found.harness.startswith("lm-eval ") and found.skip == {}
    assert found.scores["demo_text"]["acc,none"] == pytest.approx(right / len(NOUNS))
    skipping = evaluate(model, processor, ["demo_text"], profile=a_profile(model), **given)
    assert skipping.skip["vision"] == 0 and 0 < skipping.skip["text"] < 1


@needs_lm_eval
def test_the_command_prints_and_writes_the_scores(capsys, tasks, tmp_path):
    profile = tmp_path / "p.json"
    a_profile(demo.load()[0]).save(profile)
    given = ["--tasks", "demo_text", "--harness", "lm-eval", "--include-path", tasks / "lm", "--limit", 2]
    with pytest.raises(SystemExit) as exit_info:
        main(
            [
                str(each)
                for each in ("evaluate", "demo", "--profile", profile, *given, "--out", tmp_path / "s.json")
            ]
        )
    assert not exit_info.value.code
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["samples"] == {"demo_text": 2}
    printed = capsys.readouterr().out
    assert f"{written['scores']['demo_text']['acc,none']:.4f}" in printed
    assert f"measured skip rate: text {100 * written['skip']['text']:.1f} %" in printed


@needs_lm_eval
def test_unknown_tasks_and_folders_are_refused_before_anything_runs(tasks):
    given: Any = {"harness": "lm-eval"}
    with pytest.raises(ModesError, match=r"lm-eval has no task nope; it knows \d+"):
        evaluate(None, None, ["nope"], **given)
    with pytest.raises(ModesError, match="none was named"):
        evaluate(None, None, [], **given)
    with pytest.raises(ModesError, match="/nowhere is no folder of task files"):
        evaluate(None, None, ["demo_text"], include_path="/nowhere", **given)


@pytest.mark.parametrize(("harness", "package"), [("lmms-eval", "lmms_eval"), ("lm-eval", "lm_eval")])
def test_a_missing_harness_is_named(monkeypatch, harness, package):
    for name in (package, f"{package}.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModesError, match=f"{harness} cannot be imported .*: pip install {harness}"):
        evaluate(None, None, ["gqa"], harness=harness)


def test_another_harness_is_refused():
    with pytest.raises(ModesError, match="harness must be lmms-eval or lm-eval, got 'x'"):
        evaluate(None, None, ["gqa"], harness="x")  # type: ignore[arg-type]
