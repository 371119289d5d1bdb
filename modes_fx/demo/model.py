"""Load the shipped model: transformers' own Qwen3VLMoe class, trained by bench/train_demo.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from modes_fx.demo.pictures import ASSETS

if TYPE_CHECKING:
    import torch
    from transformers import Qwen3VLMoeForConditionalGeneration

    from modes_fx.demo.processor import PictureProcessor


def load(
    dtype: torch.dtype | None = None, directory: Path = ASSETS
) -> tuple[Qwen3VLMoeForConditionalGeneration, PictureProcessor]:
    """The demo model in eval mode and its processor, from `directory` alone (no network).

    Args:
        dtype: Of the parameters; float32 unless told. The file holds bfloat16.

    Returns:
        The model, 6 layers of 32 experts with 8 active, on the `grouped_mm` experts; and the processor.
    """
    import torch
    from transformers import Qwen3VLMoeForConditionalGeneration

    from modes_fx.demo.processor import load_processor

    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(
        directory,
        dtype=dtype or torch.float32,
        experts_implementation="grouped_mm",
        local_files_only=True,
    )
    return model.eval(), load_processor(directory)
