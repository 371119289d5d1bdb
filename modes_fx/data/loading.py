"""Models and their processors, from a folder or the Hub, as calibration needs them."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from modes_fx.blocks import find_blocks
from modes_fx.data.rows import first_line
from modes_fx.errors import ModesError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_processor(model: str, *, trust_remote_code: bool = False) -> Any:
    """The processor that was saved with a model; its tokenizer where it has none.

    Args:
        model: A folder, a name on the Hub, or `demo`.
        trust_remote_code: Run the code that the model brings along.
    Raises:
        ModesError: There is none, or a library that it needs is missing.
    """
    if model == "demo" or _class_name(model) == "PictureProcessor":
        from modes_fx.demo.pictures import ASSETS
        from modes_fx.demo.processor import load_processor as load_demo

        return load_demo(ASSETS if model == "demo" else Path(model))
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(_checked(model), trust_remote_code=trust_remote_code)
    except (ValueError, OSError, ImportError) as error:
        raise ModesError(f"The processor of {model} cannot be loaded: {first_line(error)}") from error


def load_model(
    model: str,
    *,
    dtype: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A transformers model in evaluation mode, with experts that calibration can look into.

    Args:
        model: A folder, a name on the Hub, or `demo`.
        dtype: One of `DTYPES`; `auto` is what the weights are stored in.
        device_map: As of `from_pretrained`, e.g. `auto` to spread the layers over several devices. Without it
            the model goes to the GPU of this process (torchrun's LOCAL_RANK), or stays on the CPU.
        trust_remote_code: Run the code that the model brings along.
    Raises:
        ModesError: It cannot be loaded, or has no MoE block.
    """
    if dtype not in DTYPES:
        raise ModesError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    wanted: torch.dtype | None = None if dtype == "auto" else getattr(torch, dtype)
    if model == "demo":
        from modes_fx import demo

        return _placed(demo.load(wanted)[0], device_map)
    import transformers

    remote: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    given = {"dtype": wanted or "auto", "device_map": device_map}
    try:
        config = transformers.AutoConfig.from_pretrained(_checked(model), **remote)
        # Models that look at pictures are in both lists, or bring classes for either.
        known = getattr(config, "auto_map", {})
        sees = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        name = "AutoModelForImageTextToText"
        name = name if sees or name in known else "AutoModelForCausalLM"
        loaded: Any = getattr(transformers, name).from_pretrained(model, **given, **remote)
    except (ValueError, OSError, ImportError) as error:
        raise ModesError(f"{model} cannot be loaded: {first_line(error)}") from error
    find_blocks(loaded)
    # Experts in a loop of Python break compiled graphs; where there is no choice, ValueError says so.
    with contextlib.suppress(ValueError):
        loaded.set_experts_implementation("grouped_mm")
    return _placed(loaded.eval(), device_map)


def _placed(model: Any, device_map: str | None) -> Any:
    if device_map is None and torch.cuda.is_available():
        return model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    return model


def _checked(model: str) -> str:
    """`model` itself; what looks like a folder must be one of a model."""
    path = Path(model)
    if (path.exists() or path.is_absolute()) and not (path / "config.json").is_file():
        raise ModesError(f"{model} is not a model folder (it has no config.json); pass a folder or `demo`.")
    return model


def _class_name(model: str) -> str | None:
    """Of the processor in a folder, as its configuration has it; transformers cannot find the demo's."""
    path = Path(model) / "processor_config.json"
    if not path.is_file():
        return None
    try:
        name: str | None = json.loads(path.read_text(encoding="utf-8")).get("processor_class")
    except (ValueError, AttributeError):
        return None
    return name
