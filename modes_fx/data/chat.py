"""Data sets as batches: columns of pictures, questions and answers, through the model's own chat template.

    rows = load_rows("lmms-lab/COCO-Caption2017", split="val")
    batches = ChatBatches(rows, processor, samples=1024, seed=0)
    profile = modes_fx.calibrate(model, batches, processor=processor)

JSON and JSON Lines files are read without further ado; all else needs `pip install datasets`.
"""

import string
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from modes_fx.batches import IGNORED
from modes_fx.data.rows import (
    Row,
    Rows,
    cell_list,
    cell_text,
    check_columns,
    first_line,
    has_picture,
    open_picture,
    undecoded,
)
from modes_fx.errors import ModesError


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set are what.

    Attributes:
        image: A picture (of PIL, as `datasets` keeps it, an array, bytes, or a path), or a list of them; None
            for questions without pictures. With `ChatBatches(pictures=...)`, the picture's key instead.
        question: Text.
        answer: Text, or a list of texts of which the first counts.
        task: What the row belongs to, for accuracies and floors per task.
        prompt: What is asked: `{question}` is the row's question, and any other `{column}` that column.
    """

    image: str | None = "image"
    question: str = "question"
    answer: str = "answer"
    task: str | None = None
    prompt: str = "{question}"

    @cached_property
    def texts(self) -> list[str]:
        """The columns that must hold text in every row."""
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(self.prompt) if field is not None]
        except ValueError as error:
            raise ModesError(f"The prompt {self.prompt!r} is no format string: {error}.") from None
        asked = [self.question if field == "question" else field for field in fields]
        return list(dict.fromkeys([*asked, self.answer, *([self.task] if self.task is not None else [])]))


class ChatBatches(Sequence[dict[str, Any]]):
    """Conversations of one question and one answer, as batches of what the processor makes of them.

    A batch is a dict of the model's inputs; `labels` `[B, S]` int64, -100 everywhere but at the answer and
    what ends it; and `task`, a list of B names, if there is a column for it. The answer is the assistant's
    turn as the template writes it, without white space at its end. Batches are made when they are asked for,
    each time alike, and none is kept.

    Args:
        rows: As of `load_rows`, or any sequence of mappings.
        processor: The model's processor, or its tokenizer where there are no pictures; with a chat template.
        columns: Which columns are what.
        pictures: Pictures by key; the image column then holds keys.
        batch_size: Largest number of rows.
        samples: Take no more rows than this.
        seed: Take rows in this random order; None takes them in theirs.
        template: Further arguments of the chat template, e.g. `{"enable_thinking": False}`.
    Raises:
        ModesError: A column is missing, no row can be used, there is no chat template, or the template's
            answer does not follow its own prompt. Rows that lack a text or a picture are left out; a warning
            says how many.
    """

    def __init__(
        self,
        rows: Rows,
        processor: Any,
        *,
        columns: Columns | None = None,
        pictures: Mapping[Any, Any] | None = None,
        batch_size: int = 1,
        samples: int | None = None,
        seed: int | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        self.columns = columns or Columns()
        self.batch_size = batch_size
        self._processor = processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._template = dict(template or {})
        self._pictures = pictures
        self._folder = getattr(rows, "folder", Path())
        self._check_processor()
        image = self.columns.image
        check_columns(rows, [*self.columns.texts, *([image] if image is not None else [])])
        self._rows = undecoded(rows, image)
        self._places = self._usable(samples, seed)
        # What is wrong with the template or the processor shows with the first row: now, not an hour later.
        self._encode(self._places[:1])

    @property
    def num_samples(self) -> int:
        """Rows that are used."""
        return len(self._places)

    def __len__(self) -> int:
        return -(-len(self._places) // self.batch_size)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = range(len(self))[index] * self.batch_size
        return self._encode(self._places[start : start + self.batch_size])

    def _check_processor(self) -> None:
        name = type(self._processor).__name__
        if self.batch_size < 1:
            raise ModesError(f"batch_size must be 1 or more, got {self.batch_size}.")
        if self.columns.image is not None and self._processor is self._tokenizer:
            raise ModesError(
                f"{name} is a tokenizer and takes no pictures; pass the model's processor (AutoProcessor "
                "gives a tokenizer where torchvision is missing), or columns without an image."
            )
        if not getattr(self._processor, "chat_template", None):
            raise ModesError(
                f"{name} has no chat template; set its chat_template to the one that the model was "
                "trained with."
            )
        if self.batch_size > 1 and self._tokenizer.pad_token is None:
            raise ModesError(f"{name} has no pad token; set tokenizer.pad_token, or use batch_size=1.")

    def _usable(self, samples: int | None, seed: int | None) -> list[int]:
        """Places of the rows to use, in order."""
        order: Sequence[int] = range(len(self._rows))
        if seed is not None:
            order = np.random.default_rng(seed).permutation(len(self._rows)).tolist()
        usable: list[int] = []
        left_out: list[str] = []
        for place in order:
            if len(usable) == samples:
                break
            if lacks := self._lacks(self._rows[place]):
                left_out.append(f"row {place} has no {lacks}")
            else:
                usable.append(place)
        if not usable:
            raise ModesError(
                "; ".join([f"None of the {len(self._rows)} rows can be used", *left_out[:3]]) + "."
            )
        if left_out:
            more = "; ..." if len(left_out) > 3 else "."
            warnings.warn(
                f"{len(left_out)} of {len(left_out) + len(usable)} rows were left out: "
                f"{'; '.join(left_out[:3])}{more}",
                stacklevel=3,
            )
        return usable

    def _lacks(self, row: Row) -> str:
        """What a row would need, or nothing."""
        for name in self.columns.texts:
            if not cell_text(row.get(name)):
                return f"text in {name}"
        if self.columns.image is not None:
            given = cell_list(row.get(self.columns.image))
            if not given or not all(map(has_picture, given)):
                return f"picture in {self.columns.image}"
            if self._pictures is not None and not all(key in self._pictures for key in given):
                return f"picture under the key in {self.columns.image}"
        return ""

    def _encode(self, places: Sequence[int]) -> dict[str, Any]:
        rows = [self._rows[place] for place in places]
        pictures = [self._pictures_of(row, place) for row, place in zip(rows, places, strict=True)]
        texts = [self._render(row, len(shown)) for row, shown in zip(rows, pictures, strict=True)]
        inputs = self._process([whole for _, whole in texts], pictures)
        ids = inputs["input_ids"]
        real = inputs.get("attention_mask", ids.new_ones(ids.shape)).bool()
        labels = ids.new_full(ids.shape, IGNORED)
        for index, (prompt, whole) in enumerate(texts):
            answer = self._answer_ids(prompt, whole)
            last = real[index].nonzero()[-len(answer) :, 0]
            if ids[index, last].tolist() != answer:
                raise ModesError(
                    f"{type(self._processor).__name__} ends row {places[index]} with other tokens than its "
                    "tokenizer gives for the answer; this processor is not supported."
                )
            labels[index, last] = ids[index, last]
        task = self.columns.task
        named = {} if task is None else {"task": [cell_text(row[task]) for row in rows]}
        return {**inputs, "labels": labels, **named}

    def _pictures_of(self, row: Row, place: int) -> list[Image.Image]:
        if self.columns.image is None:
            return []
        given = cell_list(row[self.columns.image])
        if self._pictures is not None:
            given = [self._pictures[key] for key in given]
        try:
            return [open_picture(one, self._folder) for one in given]
        except (OSError, ValueError, TypeError) as error:
            raise ModesError(f"The picture of row {place} cannot be read: {first_line(error)}") from error

    def _render(self, row: Row, num_pictures: int) -> tuple[str, str]:
        """The text of the prompt, up to where the answer starts, and that of the whole conversation."""
        values = {name: cell_text(row[name]) for name in self.columns.texts}
        question: Any = self.columns.prompt.format(
            **{**values, "question": values.get(self.columns.question, "")}
        )
        answer: Any = values[self.columns.answer]
        if self._processor is not self._tokenizer:
            question = [*({"type": "image"} for _ in range(num_pictures)), {"type": "text", "text": question}]
            answer = [{"type": "text", "text": answer}]
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        render = self._processor.apply_chat_template
        try:
            prompt: str = render(chat[:1], add_generation_prompt=True, tokenize=False, **self._template)
            # What the template puts after the end of the turn (a line break) is not the answer's.
            whole: str = render(chat, tokenize=False, **self._template).rstrip()
        except Exception as error:  # a template is a program of its own, and fails in ways of its own
            raise ModesError(f"The chat template fails: {first_line(error)}") from error
        if not whole.startswith(prompt) or len(whole) == len(prompt):
            raise ModesError(
                "The chat template's answer does not follow its own generation prompt: the prompt ends with "
                f"{prompt[-40:]!r}, the conversation with {whole[-60:]!r}. If the model thinks before it "
                "answers, try the template's own switch, as template={'enable_thinking': False}."
            )
        return prompt, whole

    def _answer_ids(self, prompt: str, whole: str) -> list[int]:
        """The tokens of the whole after those of the prompt.

        In neither are the placeholders of pictures expanded; they lie in the prompt.
        """
        before, ids = (
            self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole)
        )
        if ids[: len(before)] != before:
            raise ModesError(
                f"The tokenizer joins the end of the prompt, {prompt[-20:]!r}, with the start of the answer, "
                f"{whole[len(prompt) :][:20]!r}, so that no token starts the answer; end the template's "
                "generation prompt with a special token or a line break."
            )
        answer: list[int] = ids[len(before) :]
        return answer

    def _process(self, texts: list[str], pictures: list[list[Image.Image]]) -> dict[str, Any]:
        options: dict[str, Any] = {"return_tensors": "pt", "padding": len(texts) > 1}
        # As `apply_chat_template(tokenize=True)` has it: no second one before a template's own.
        start = self._tokenizer.bos_token
        if self._processor is self._tokenizer or (start is not None and texts[0].startswith(start)):
            options["add_special_tokens"] = False
        if self.columns.image is not None:
            options["images"] = pictures
        side, self._tokenizer.padding_side = self._tokenizer.padding_side, "right"
        try:
            return dict(self._processor(text=texts, **options))
        finally:
            self._tokenizer.padding_side = side
