"""The demo's processor: transformers' Qwen3VLProcessor without its video half, which needs torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from modes_fx.demo.pictures import ASSETS
from modes_fx.demo.text import MERGE, PATCH


class PictureProcessor(Qwen3VLProcessor):
    """Text and pictures in, model inputs out. `ProcessorMixin` asks for the parts this signature names."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


def build_processor(tokenizer: PreTrainedTokenizerFast) -> PictureProcessor:
    """Patches of 8 pixels, two by two of them make one picture token; -1..1 is black to white."""
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        min_pixels=64,
    )
    return PictureProcessor(image_processor, tokenizer, tokenizer.chat_template)


def load_processor(directory: Path = ASSETS) -> PictureProcessor:
    """The shipped processor; reads `directory` only."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    return build_processor(tokenizer)
