"""Serve an exported demo model: a picture and a question in, an answer out, without transformers.

    python bench/export_serve.py FOLDER PICTURE.png "what color is the square ?"

The same three steps for every target: inputs as the model takes them, a prefill, and a decode loop that
passes the cache on. A model of your own has its own tokenizer and picture processor; these are the demo's.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from modes_fx.aot.loaded import ExportedModel, load
from modes_fx.demo.pictures import ASSETS
from modes_fx.demo.text import IMAGE, MERGE, PATCH, SPECIAL, prompt_text
from modes_fx.errors import ExportError

MAX_NEW_TOKENS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="What modes_fx.export wrote.")
    parser.add_argument("picture", type=Path, help="A picture of a size that was exported.")
    parser.add_argument("question")
    options = parser.parse_args()
    try:
        program = load(options.folder)
    except ExportError as error:
        sys.exit(str(error))
    picture = np.asarray(Image.open(options.picture).convert("RGB"))
    print(answer(program, picture, options.question))


def answer(program: ExportedModel, picture: Any, question: str) -> str:
    """The words that the model answers with; `picture` is uint8, `[height, width, 3]`."""
    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    inputs = encode(tokenizer, picture, question)
    output = program(**inputs)
    found: list[int] = []
    for _ in range(MAX_NEW_TOKENS):
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        if int(token) in program.manifest.eos_token_ids:
            break
        found.append(int(token))
        output = program(input_ids=token, past_key_values=output.past_key_values)
    return str(tokenizer.decode(found))


def encode(tokenizer: Tokenizer, picture: Any, question: str) -> dict[str, Any]:
    """Inputs of the model: token ids, and the picture as patches, two by two of them side by side."""
    height, width = (size // PATCH for size in picture.shape[:2])
    placeholders = " ".join([SPECIAL[IMAGE]] * (height * width // MERGE**2))
    text = prompt_text(question).replace(SPECIAL[IMAGE], placeholders)
    pixels = picture.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
    frames = np.stack([pixels, pixels])
    sides = [side for size in (height, width) for side in (size // MERGE, MERGE, PATCH)]
    patches = frames.reshape(2, 3, *sides).transpose(2, 5, 3, 6, 1, 0, 4, 7)
    return {
        "input_ids": torch.tensor([tokenizer.encode(text).ids]),
        "pixel_values": torch.from_numpy(np.ascontiguousarray(patches.reshape(height * width, -1))),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


if __name__ == "__main__":
    main()
