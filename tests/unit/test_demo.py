"""The demo model and its suite: offline, honest splits, answers that need the picture, routers in use."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch

from modes_fx import demo
from modes_fx.demo.pictures import DIGIT_RANGES, EASY_RANGES, SPLIT_SEEDS, digits_of, pack
from modes_fx.demo.questions import ASK
from modes_fx.demo.samples import draw_sample
from modes_fx.demo.scenes import draw_scene, render
from modes_fx.demo.words import COUNTABLE, PICTURES, vocabulary

INPUTS = {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
IMAGE_ID, END_ID = 5, 2


@pytest.fixture(scope="module")
def loaded():
    return demo.load()


@pytest.fixture(scope="module")
def metrics():
    return json.loads((demo.ASSETS / "metrics.json").read_text())


# What is in the folder


def test_assets_are_small_and_licensed():
    sizes = {path.name: path.stat().st_size for path in demo.ASSETS.iterdir()}
    assert sizes["model.safetensors"] <= 8e6
    assert sum(sizes.values()) <= 15e6
    notice = (demo.ASSETS / "NOTICE.md").read_text()
    for words in ("Apache-2.0", "Twemoji", "CC-BY 4.0", "MNIST", "CC BY-SA 3.0", "easy-VQA", "MIT License"):
        assert words in notice


def test_pack_holds_every_picture():
    whole = pack()
    assert whole.drawings.shape == (2, len(PICTURES), 48, 48, 4)
    assert (whole.drawings[..., 3].reshape(2, len(PICTURES), -1).max(-1) > 200).all()  # none is blank
    assert len(whole.digits) == len(whole.digit_labels) == 10_000
    assert whole.easy_images.shape == (5000, 64, 64, 3)


def test_import_is_light():
    """Nothing heavy before the first call: a command line that only prints help stays fast."""
    code = (
        "import sys, modes_fx; before = set(sys.modules)\n"
        "import modes_fx.demo; new = set(sys.modules) - before\n"
        "assert not new & {'torch', 'transformers'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recorded_figures(metrics):
    assert set(metrics["accuracy"]) == set(metrics["grey_accuracy"]) == {*demo.TASKS, "mean"}
    assert metrics["samples_per_task"] >= 100
    assert metrics["accuracy"]["mean"] >= 0.85
    assert metrics["grey_accuracy"]["mean"] <= 0.25


# Splits


def test_splits_share_no_digit_and_no_easy_picture():
    for ranges in (DIGIT_RANGES, EASY_RANGES):
        assert set(ranges) == set(SPLIT_SEEDS)
        for one, other in combinations(ranges.values(), 2):
            assert one[1] <= other[0] or other[1] <= one[0]
    assert len(set(SPLIT_SEEDS.values())) == len(SPLIT_SEEDS)
    for split, (first, last) in DIGIT_RANGES.items():
        shown = np.concatenate([digits_of(split, value) for value in range(10)])
        assert first <= shown.min() and shown.max() < last
        assert len(shown) == last - first


@pytest.mark.parametrize("task", demo.TASKS)
def test_samples_differ_between_splits_and_repeat_within(task):
    pictures = {split: draw_sample(split, task, 7).picture.tobytes() for split in SPLIT_SEEDS}
    assert len(set(pictures.values())) == len(pictures)
    assert draw_sample("test", task, 7).picture.tobytes() == pictures["test"]
    assert draw_sample("test", task, 8).picture.tobytes() != pictures["test"]


@pytest.mark.parametrize("call", [lambda: demo.batches("tset", 13), lambda: demo.question("dev", 0)])
def test_unknown_split_names_the_choices(call):
    with pytest.raises(ValueError, match="train, calibration, validation, test"):
        call()


# Scenes and questions


def test_answers_follow_from_the_board():
    """Each answer recomputed here from the cells, by other code than the suite's."""
    checked = 0
    for index in range(300):
        rng = np.random.default_rng([9, index])
        scene = draw_scene("train", rng)
        assert 4 <= len(scene.filled) <= 7
        words = [thing.word if thing else "nothing" for thing in scene.cells]
        digits = [int(thing.attribute) for thing in scene.cells if thing and thing.kind == "digit"]
        for task in ("count", "exist", "sum", "spatial"):
            if (pair := ASK[task](scene, rng)) is None:
                continue
            question, answer = pair
            noun = question.split()[-1]
            if task == "count":
                assert noun in COUNTABLE and answer == str(words.count(noun))
            elif task == "exist":
                assert answer == ("yes" if noun in words else "no")
            elif task == "sum":
                assert len(digits) == 2 and answer.replace(" ", "") == str(sum(digits))
            else:
                step = {"left": -1, "right": 1, "above": -3, "below": 3}[question.split()[2]]
                assert answer == words[words.index(noun) + step]
            checked += 1
    assert checked > 600


def test_every_word_is_in_the_vocabulary(loaded):
    _, processor = loaded
    words = vocabulary((*pack().questions, *pack().answers))
    assert len(processor.tokenizer) == 8 + len(words)
    for task in demo.TASKS:
        for index in range(20):
            sample = draw_sample("train", task, index)
            ids = processor.tokenizer(f"{sample.question} {sample.answer}").input_ids
            assert processor.tokenizer.unk_token_id not in ids
            assert len(ids) == len(sample.question.split()) + len(sample.answer.split())


def test_render_is_a_picture():
    rng = np.random.default_rng(0)
    picture = render(draw_scene("train", rng), rng)
    assert picture.shape == (96, 96, 3) and picture.dtype == np.uint8
    assert picture.std() > 20


# Batches


def test_batch_contents():
    suite = demo.batches("calibration", 26, batch_size=8)
    assert sum(len(batch["task"]) for batch in suite) == 26
    assert sorted(task for batch in suite for task in batch["task"]) == sorted(demo.TASKS * 2)
    assert len({batch["input_ids"].shape[1] for batch in suite}) == 1
    for batch in suite:
        rows = len(batch["task"])
        assert set(batch) == INPUTS | {"labels", "task"} and set(batch.inputs) == INPUTS
        assert rows == len(batch.prompts) == len(batch.answers) == len(batch["input_ids"]) <= 8
        assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
        assert len(batch["pixel_values"]) == int(batch["image_grid_thw"].prod(-1).sum())
        assert len(batch["image_grid_thw"].unique(dim=0)) == 1  # one picture size
        image = batch["input_ids"] == IMAGE_ID
        assert torch.equal(image, batch["mm_token_type_ids"] == 1)
        assert int(image.sum()) * 4 == len(batch["pixel_values"])


def test_labels_are_the_answer_and_its_end(loaded):
    _, processor = loaded
    for batch in demo.batches("test", 26):
        for row, answer in enumerate(batch.answers):
            labels, ids = batch["labels"][row], batch["input_ids"][row]
            told = labels != -100
            assert torch.equal(labels[told], ids[told])
            assert processor.decode(labels[told]) == f"{answer} <|im_end|>"
            last = int(batch["attention_mask"][row].sum()) - 1
            assert ids[last] == END_ID and labels[last] == END_ID and bool((ids[last + 1 :] == 0).all())


def test_batches_are_deterministic():
    first, again = (demo.batches("test", 13, batch_size=5) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert one["task"] == other["task"]
        assert all(torch.equal(one[name], other[name]) for name in INPUTS | {"labels"})
    assert demo.batches("test", 13, seed=1)[0].prompts != demo.batches("test", 13)[0].prompts


def test_grey_changes_pixels_only():
    plain, grey = (demo.batches("test", 13, grey=flag)[0] for flag in (False, True))
    assert float(grey["pixel_values"].std()) < 1e-6
    assert all(torch.equal(plain[name], grey[name]) for name in INPUTS - {"pixel_values"})
    assert torch.equal(plain["labels"], grey["labels"])


# The model


def test_model_is_the_unedited_class(loaded):
    from transformers import Qwen3VLMoeForConditionalGeneration

    model, processor = loaded
    assert type(model) is Qwen3VLMoeForConditionalGeneration and not model.training
    assert model.config._experts_implementation == "grouped_mm"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    text = model.config.text_config
    assert (text.num_hidden_layers, text.num_experts, text.num_experts_per_tok) == (6, 32, 8)
    specials = [model.config.image_token_id, model.config.video_token_id]
    specials += [model.config.vision_start_token_id, model.config.vision_end_token_id]
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    assert processor.tokenizer.convert_tokens_to_ids(names) == specials
    assert set(specials) <= set(processor.tokenizer.all_special_ids)
    assert model.generation_config.eos_token_id == END_ID


def test_accuracy_needs_the_picture(loaded):
    model, _ = loaded
    right = demo.accuracy(model, demo.batches("test", 130, batch_size=26))
    blind = demo.accuracy(model, demo.batches("test", 130, batch_size=26, grey=True))
    assert list(right) == [*demo.TASKS, "mean"]
    assert right["mean"] >= 0.80
    assert blind["mean"] <= 0.30


def test_generate_agrees_with_teacher_forcing(loaded):
    model, processor = loaded
    for index in range(26):
        inputs, answer = demo.question("test", index)
        output = model.generate(**inputs, max_new_tokens=10)[0, inputs["input_ids"].shape[1] :]
        said = processor.decode(output)
        verdict = _teacher_forced(model, inputs, answer, processor)
        assert (said == f"{answer} <|im_end|>") == verdict, demo.TASKS[index % 13]


@torch.no_grad()
def _teacher_forced(model, inputs, answer, processor) -> bool:
    told = processor.tokenizer(f"{answer} <|im_end|>", return_tensors="pt").input_ids
    length = told.shape[1]
    ids = torch.cat([inputs["input_ids"], told], dim=1)
    types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, length))
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
    return bool((model(**whole).logits[0, -length - 1 : -1].argmax(-1) == told[0]).all())


def test_text_only_question(loaded):
    model, _ = loaded
    inputs, answer = demo.question("test", 0, picture=False)
    assert set(inputs) >= {"input_ids", "attention_mask"} and "pixel_values" not in inputs
    assert IMAGE_ID not in inputs["input_ids"]
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    assert answer in {thing.word for thing in PICTURES} | {"nothing", "digit"}


def test_chat_template_is_the_training_prompt(loaded):
    _, processor = loaded
    inputs, _ = demo.question("test", 0)
    sample = draw_sample("test", demo.TASKS[0], 0)
    content = [{"type": "image", "image": sample.picture}, {"type": "text", "text": sample.question}]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert torch.equal(chat["input_ids"], inputs["input_ids"])
    assert torch.equal(chat["pixel_values"], inputs["pixel_values"])


def test_routers_are_not_collapsed(loaded):
    """No expert takes more than five times its even share of a layer, and few are idle."""
    model, _ = loaded
    chosen: list[list[torch.Tensor]] = [[] for _ in range(6)]
    layers = model.model.language_model.layers
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, __, out, to=to: to.append(out[2]))
        for layer, to in zip(layers, chosen, strict=True)
    ]
    batch = demo.batches("test", 39, batch_size=39)[0]
    with torch.no_grad():
        model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    real = batch["attention_mask"].flatten().bool()
    for (index,) in chosen:
        share = torch.bincount(index[real].flatten(), minlength=32) / (8 * real.sum())
        assert float(share.max()) <= 5 / 32
        assert int((share < 0.05 / 32).sum()) <= 3


def test_routing_weights_are_rather_flat(metrics):
    """What makes skipping a trade-off: slot 1 does not carry nearly everything."""
    for weights in metrics["mean_routing_weights"]:
        assert abs(sum(weights) - 1) < 0.01
        assert weights[0] <= 0.40 and weights[-1] >= 0.03
