"""Questions about pictures from a JSON Lines file, as batches for `calibrate` and `search`.

One object a line: `{"question": "what is this", "answer": "a dog", "image": "dog.png"}`; `text` may stand for
`question`, `image` may be left out, and a relative path starts at the folder of the file.
"""

import json
import os
from pathlib import Path
from typing import Any

from modes_fx.errors import ModesError


def read_batches(path: str | os.PathLike[str], processor: Any, *, limit: int | None = None) -> list[Any]:
    """Batches of one row each: the processor's outputs and `labels`, -100 up to the answer.

    The prompt is the model's own chat template with the picture before the question; the answer is the
    assistant's turn, up to and with the token that ends it.

    Args:
        path: A JSON Lines file, UTF-8.
        processor: The model's processor, with a chat template.
        limit: Read no more lines than this.
    Raises:
        ModesError: A line that cannot be used, with its number.
        OSError: The file or a picture cannot be read.
    """
    folder = Path(path).parent
    batches: list[Any] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if limit is not None and len(batches) == limit:
            break
        if line.strip():
            batches.append(_batch(_record(line, f"{os.fspath(path)} line {number}"), folder, processor))
    if not batches:
        raise ModesError(f"{os.fspath(path)} holds no line; write one JSON object a line.")
    return batches


def _record(line: str, where: str) -> dict[str, str]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ModesError(f"{where} is not JSON ({error.msg}).") from None
    if not isinstance(record, dict):
        raise ModesError(f"{where} must be an object with question, answer and image.")
    if "text" in record:
        record.setdefault("question", record.pop("text"))
    for key in ("question", "answer"):
        if not isinstance(record.get(key), str) or not record[key]:
            raise ModesError(f"{where} needs a string {key}.")
    return record


def _batch(record: dict[str, str], folder: Path, processor: Any) -> dict[str, Any]:
    images = None
    if record.get("image"):
        from PIL import Image

        with Image.open(folder / record["image"]) as image:
            images = [image.convert("RGB")]
    content: list[dict[str, str]] = [{"type": "image"}] if images else []
    asked = [{"role": "user", "content": [*content, {"type": "text", "text": record["question"]}]}]
    told = {"role": "assistant", "content": [{"type": "text", "text": record["answer"]}]}
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    # What the template puts after the end of the turn (a line break) is not the answer's.
    whole = processor.apply_chat_template([*asked, told], tokenize=False).rstrip()
    if not whole.startswith(prompt):
        raise ModesError(
            "The chat template's answer does not follow its own generation prompt; not supported."
        )
    inputs = dict(processor(text=[whole], images=images, return_tensors="pt"))
    answer_from = processor(text=[prompt], images=images, return_tensors="pt")["input_ids"].shape[1]
    labels = inputs["input_ids"].clone()
    labels[:, :answer_from] = -100
    return {**inputs, "labels": labels}
