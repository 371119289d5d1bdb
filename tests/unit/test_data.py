"""Data sets as batches: what is asked, where the answer lies, and what is refused before any work."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma3Processor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from modes_fx import demo
from modes_fx.data import ChatBatches, Columns, PictureTable, load_rows
from modes_fx.errors import ModesError

# The templates of the families, without tools and system prompts.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% for part in m.content %}{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}"
    "{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAVA = (
    "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}"
    "{% for part in m.content %}{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{{ ' ' if m.role == 'user' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Answers after a thought, which may be switched off; no token ends the turn (GLM-4.5).
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ '</think>\n' if m.role == 'assistant' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think>' if enable_thinking is not defined else '</think>\n' }}{% endif %}"
)


def byte_tokenizer(template: str, *special: str, **named: Any) -> PreTrainedTokenizerFast:
    """A token for each byte, and the special ones."""
    tokenizer = Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)


def text_tokenizer(template: str = CHATML, **named: Any) -> PreTrainedTokenizerFast:
    special = ("<pad>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    return byte_tokenizer(template, *special, **{"pad_token": "<pad>", "eos_token": "<|im_end|>", **named})


def gemma() -> Any:
    names = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    special = ("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", *names.values())
    ends = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = byte_tokenizer(GEMMA, *special, extra_special_tokens=names, **ends)
    pictures = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return Gemma3Processor(pictures, tokenizer, chat_template=GEMMA, image_seq_length=4)


def llava() -> Any:
    ends = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    names = {"image_token": "<image>"}
    special = ("<pad>", "<s>", "</s>", "<image>")
    tokenizer = byte_tokenizer(LLAVA, *special, extra_special_tokens=names, **ends)
    size = {"height": 16, "width": 16}
    pictures = CLIPImageProcessorPil(size=size, crop_size=size)
    return LlavaProcessor(
        pictures, tokenizer, chat_template=LLAVA, patch_size=4, num_additional_image_tokens=1
    )


def noise(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 255, (32, 48, 3), dtype=np.uint8)


ROWS = [
    {"image": noise(i), "question": f"what is number {10**i}", "answer": answer, "kind": "animal"}
    for i, answer in enumerate(("a dog", "bird", "two cats", "none", "a very old horse"))
]
NO_IMAGE = Columns(image=None)


def answers(batch: dict[str, Any], processor: Any) -> list[str]:
    return [processor.decode(row[row != -100]) for row in batch["labels"]]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)

    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder of the demo's pictures with `questions.jsonl`, and the demo's own batch of them."""
    from modes_fx.demo.samples import draw_sample

    folder = tmp_path_factory.mktemp("shipped")
    lines = []
    for index, task in enumerate(demo.TASKS[:4]):
        sample = draw_sample("calibration", task, 0)
        Image.fromarray(sample.picture).save(folder / f"{index}.png")
        lines.append(
            {"image": f"{index}.png", "question": sample.question, "answer": sample.answer, "task": task}
        )
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, demo.batches("calibration", 4)[0]


TASK = Columns(task="task")


def test_a_file_of_the_demos_questions_gives_the_demos_own_batch(shipped):
    folder, batch = shipped
    _, processor = demo.load()
    (made,) = ChatBatches(load_rows(folder / "questions.jsonl"), processor, columns=TASK, batch_size=4)
    assert same(made, batch)


def test_a_json_list_is_the_same_as_lines(shipped):
    folder, _ = shipped
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    (folder / "list.json").write_text(json.dumps(lines))
    assert load_rows(folder / "list.json") == load_rows(folder / "questions.jsonl")


@pytest.mark.parametrize("kind", ["parquet", "pictures", "saved", "hidden list"])
def test_data_sets_give_what_the_file_gives(shipped, tmp_path, kind):
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    folder, batch = shipped
    _, processor = demo.load()
    rows = load_rows(folder / "questions.jsonl")
    pictures = [str(folder / row["image"]) for row in rows]
    table = datasets.Dataset.from_list(
        [{**row, "image": path} for row, path in zip(rows, pictures, strict=True)]
    )
    table = table.cast_column("image", datasets.Image())
    if kind == "parquet":
        source = tmp_path / "rows.parquet"
        table.to_parquet(source)
    elif kind == "pictures":
        # A folder of pictures with what is asked about them beside.
        source = tmp_path / "folder"
        source.mkdir()
        for row in rows:
            (source / row["image"]).write_bytes((folder / row["image"]).read_bytes())
        lines = ({"file_name": row["image"], **{n: row[n] for n in row if n != "image"}} for row in rows)
        (source / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif kind == "saved":
        source = tmp_path / "saved"
        datasets.DatasetDict({"val": table}).save_to_disk(source)
    else:
        source = tmp_path / "lists"
        lists = [{**row, "image": [path]} for row, path in zip(rows, pictures, strict=True)]
        listed = datasets.Dataset.from_list(lists)
        listed.cast_column("image", datasets.List(datasets.Image())).save_to_disk(source)
    (made,) = ChatBatches(load_rows(source), processor, columns=TASK, batch_size=4)
    assert same(made, batch)


@pytest.mark.parametrize(("build", "end"), [(gemma, "<end_of_turn>"), (llava, "</s>")])
def test_labels_are_the_answer_and_its_end_with_processors_of_transformers(build, end):
    processor = build()
    batches = ChatBatches(ROWS, processor, batch_size=2)
    assert [len(batch["labels"]) for batch in batches] == [2, 2, 1]
    told = [answer.strip() for batch in batches for answer in answers(batch, processor)]
    assert told == [f"{row['answer']}{end}" for row in ROWS]
    for index, row in enumerate(ROWS):
        # The same as transformers' own way from a conversation to inputs.
        content = [
            {"type": "image", "image": Image.fromarray(row["image"])},
            {"type": "text", "text": row["question"]},
        ]
        chat = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
        ]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        wanted = processor.apply_chat_template(chat, **options)
        prompt = processor.apply_chat_template(chat[:1], add_generation_prompt=True, **options)["input_ids"]
        batch, place = batches[index // 2], index % 2
        ids = batch["input_ids"][place][batch["attention_mask"][place].bool()]
        assert torch.equal(ids, wanted["input_ids"][0, : len(ids)])
        assert (
            processor.decode(wanted["input_ids"][0, len(ids) :]).isspace()
            or len(ids) == wanted["input_ids"].shape[1]
        )
        assert torch.equal(batch["pixel_values"][place], wanted["pixel_values"][0])
        assert bool((batch["labels"][place][: prompt.shape[1]] == -100).all())
        assert batch["labels"][place][prompt.shape[1]] == ids[prompt.shape[1]]


def test_a_tokenizer_serves_questions_without_pictures():
    tokenizer = text_tokenizer()
    (batch,) = ChatBatches(ROWS, tokenizer, columns=NO_IMAGE, batch_size=5)
    assert set(batch) >= {"input_ids", "attention_mask", "labels"} and "pixel_values" not in batch
    assert answers(batch, tokenizer) == [f"{row['answer']}<|im_end|>" for row in ROWS]
    prompt = "<|im_start|>user\nwhat is number 1<|im_end|>\n<|im_start|>assistant\n"
    first = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    assert tokenizer.decode(first) == prompt + "a dog<|im_end|>"


def test_rows_of_a_padded_batch_are_the_rows_alone():
    tokenizer = text_tokenizer(padding_side="left")
    alone = list(ChatBatches(ROWS, tokenizer, columns=NO_IMAGE))
    (together,) = ChatBatches(ROWS, tokenizer, columns=NO_IMAGE, batch_size=5)
    for index, batch in enumerate(alone):
        length = batch["input_ids"].shape[1]
        for name in ("input_ids", "labels"):
            assert torch.equal(together[name][index, :length], batch[name][0])
        assert not together["attention_mask"][index, length:].any()
        assert bool((together["labels"][index, length:] == -100).all())
    assert tokenizer.padding_side == "left"


def test_batches_are_made_anew_and_alike():
    batches = ChatBatches(ROWS, gemma(), columns=Columns(task="kind"), batch_size=2)
    assert len(batches) == 3 and batches.num_samples == 5
    first, again = list(batches), list(batches)
    assert all(same(*pair) for pair in zip(first, again, strict=True))
    assert first[0] is not again[0] and same(batches[-1], first[2]) and same(batches[1:][0], first[1])
    assert [batch["task"] for batch in batches] == [["animal"] * 2, ["animal"] * 2, ["animal"]]
    with pytest.raises(IndexError):
        batches[3]


def test_a_seed_shuffles_and_samples_limit():
    def asked(**given: Any) -> list[str]:
        tokenizer = text_tokenizer()
        return [
            a for b in ChatBatches(ROWS, tokenizer, columns=NO_IMAGE, **given) for a in answers(b, tokenizer)
        ]

    plain, shuffled = asked(), asked(seed=3)
    assert sorted(plain) == sorted(shuffled) and plain != shuffled
    assert asked(seed=3) == shuffled != asked(seed=4)
    assert asked(samples=2) == plain[:2] and asked(samples=2, seed=3) == shuffled[:2]
    assert asked(samples=99) == plain


def test_columns_have_names_and_prompts_have_columns():
    tokenizer = text_tokenizer()
    rows = [{"q": "where", "captions": ["a dog runs", "other"], "hint": 3}]
    named = Columns(image=None, question="q", answer="captions", prompt="{question}? {hint} words.")
    (batch,) = ChatBatches(rows, tokenizer, columns=named)
    assert "where? 3 words." in tokenizer.decode(batch["input_ids"][0])
    assert answers(batch, tokenizer) == ["a dog runs<|im_end|>"]
    fixed = Columns(image=None, answer="captions", prompt="Describe it.")
    (batch,) = ChatBatches(rows, tokenizer, columns=fixed)
    assert "Describe it." in tokenizer.decode(batch["input_ids"][0])


def test_pictures_may_stand_in_rows_of_their_own():
    table = PictureTable([{"id": f"n{i}", "image": row["image"]} for i, row in enumerate(ROWS)])
    asked = [{**row, "image": f"n{i}"} for i, row in enumerate(ROWS)] + [{**ROWS[0], "image": "n9"}]
    with pytest.warns(UserWarning, match=r"row 5 has no picture under the key in image\."):
        joined = ChatBatches(asked, gemma(), pictures=table)
    assert len(table) == 5 and next(iter(table)) == "n0"
    assert all(same(*pair) for pair in zip(joined, ChatBatches(ROWS, gemma()), strict=True))


def test_rows_that_lack_something_are_left_out_and_counted():
    rows = [
        {**ROWS[0], "answer": ""},
        ROWS[1],
        {**ROWS[2], "image": None},
        {**ROWS[3], "question": float("nan")},
        {**ROWS[4], "image": {"bytes": None, "path": None}},
    ]
    wanted = (
        r"4 of 5 rows were left out: row 0 has no text in answer; row 2 has no picture in image; "
        r"row 3 has no text in question; \.\.\."
    )
    with pytest.warns(UserWarning, match=wanted):
        batches = ChatBatches(rows, gemma())
    assert batches.num_samples == 1
    with pytest.raises(ModesError, match="None of the 1 rows can be used; row 0 has no text in answer"):
        ChatBatches(rows[:1], gemma())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ChatBatches(rows[1:2], gemma())


def bad_picture() -> list[dict[str, Any]]:
    return [{**ROWS[0], "image": b"no picture"}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChatBatches([], gemma()), "no column question, answer, image; there are none"),
        (
            lambda: ChatBatches(ROWS, gemma(), columns=Columns(answer="a", image="i")),
            r"no column a, i; there are image, quest",
        ),
        (lambda: ChatBatches(ROWS, gemma(), columns=Columns(prompt="{who}")), "no column who"),
        (lambda: ChatBatches(ROWS, gemma(), columns=Columns(prompt="{")), "no format string"),
        (lambda: ChatBatches(ROWS, gemma(), batch_size=0), "batch_size must be 1 or more"),
        (lambda: ChatBatches(ROWS, text_tokenizer()), "is a tokenizer and takes no pictures"),
        (
            lambda: ChatBatches(bad_picture(), gemma()),
            "picture of row 0 cannot be read: UnidentifiedImageError",
        ),
    ],
)
def test_unusable_rows_are_refused_with_a_reason(make, message):
    with pytest.raises(ModesError, match=message):
        make()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('only one turn') }}", "chat template fails: TemplateError: only one turn"),
        (THINKING, r"does not follow its own generation prompt.*try the template's own switch"),
        (
            "{% for m in messages if m.role == 'user' %}Q: {{ m.content }}{% endfor %}",
            "does not follow its own",
        ),
    ],
)
def test_templates_that_do_not_show_where_the_answer_starts_are_refused(template, message):
    with pytest.raises(ModesError, match=message):
        ChatBatches(ROWS, text_tokenizer(template), columns=NO_IMAGE)


def test_the_switch_of_a_template_is_passed_on():
    tokenizer = text_tokenizer(THINKING)
    batches = ChatBatches(ROWS, tokenizer, columns=NO_IMAGE, template={"enable_thinking": False})
    assert answers(batches[0], tokenizer) == ["a dog"]


def test_a_batch_needs_a_pad_token_and_one_row_does_not():
    tokenizer = text_tokenizer(pad_token=None)
    with pytest.raises(ModesError, match=r"no pad token; set tokenizer\.pad_token, or use batch_size=1"):
        ChatBatches(ROWS, tokenizer, columns=NO_IMAGE, batch_size=2)
    assert len(ChatBatches(ROWS, tokenizer, columns=NO_IMAGE)) == 5


def test_an_answer_that_shares_a_token_with_the_prompt_is_refused():
    words = {"<unk>": 0, "Q": 1, "A": 2, ":": 3, ":dog": 4, "<s>": 5}
    tokenizer = Tokenizer(
        models.BPE(
            {**{c: 9 + i for i, c in enumerate("dogx")}, **words, "do": 6, ":do": 7},
            [("d", "o"), (":", "do"), (":do", "g")],
        )
    )
    joined = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<s>")
    joined.chat_template = (
        "{% for m in messages %}{{ 'Q' if m.role == 'user' else 'A:' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    with pytest.raises(
        ModesError, match=r"joins the end of the prompt, .*A:', with the start of the answer, 'dog'"
    ):
        ChatBatches([{"question": "x", "answer": "dog"}], joined, columns=NO_IMAGE)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"question": "q"}\n\n{', r"a\.jsonl line 3 is not JSON"),
        ("a.jsonl", "3", "row 0 must be an object"),
        ("a.json", '[{"a": 1},\n 2 3]', r"a\.json line 2 is not JSON"),
        ("a.json", "[1]", "row 0 must be an object"),
    ],
)
def test_json_that_cannot_be_used_is_refused_with_its_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ModesError, match=message):
        load_rows(tmp_path / name)


def test_what_is_not_there_and_what_leaves_a_choice_is_refused(tmp_path):
    with pytest.raises(ModesError, match="there is no such data set"):
        load_rows(tmp_path / "a.parquet")
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    table = datasets.Dataset.from_list([{"question": "q", "answer": "a"}])
    datasets.DatasetDict({"train": table, "val": table}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ModesError, match=r"Choose a split: .*saved has train, val"):
        load_rows(tmp_path / "saved")
    with pytest.raises(ModesError, match=r"There is no split test: .*saved has train, val"):
        load_rows(tmp_path / "saved", split="test")
    assert list(load_rows(tmp_path / "saved", split="val")) == list(table)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ModesError, match=r"b\.parquet cannot be read: "):
        load_rows(tmp_path / "b.parquet")
