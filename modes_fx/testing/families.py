"""A zoo: every mixture-of-experts family of transformers as a tiny model with random weights, and its inputs.

A family is data: which class, which configuration, what stands for a picture. What all have in common is in
`_SIZES`, of which each configuration takes the keys that it knows.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modes_fx.testing.tokens import (
    AUDIO,
    BOS,
    EOS,
    IMAGE,
    PAD,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCABULARY,
)

NUM_EXPERTS, TOP_K, HIDDEN = 8, 3, 32
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), NUM_EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts"), TOP_K),
    **dict.fromkeys(("moe_k",), TOP_K),
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # Of vision towers.
    "depth": 2,
    "num_heads": 4,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 16,
}


def _config(model_type: str, **changes: Any) -> Any:
    """The configuration of a model type at tiny sizes."""
    from transformers import CONFIG_MAPPING

    known = CONFIG_MAPPING[model_type]
    names = {f.name for f in dataclasses.fields(known)}
    return known(**{key: value for key, value in _SIZES.items() if key in names} | changes)


@dataclass(frozen=True)
class Visual:
    """What stands for one picture (or video).

    Attributes:
        tokens: Its ids in `input_ids`.
        tensors: The tensors that go with `n` of them.
    """

    tokens: tuple[int, ...]
    tensors: Callable[[int, torch.Generator], dict[str, Tensor]]


def _placeholders(number: int, token: int = IMAGE) -> tuple[int, ...]:
    return (VISION_START, *[token] * number, VISION_END)


def _patches(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Pictures of 4 x 4 patches of 4 x 4 pixels, two frames each, flat; merged 2 x 2 they are 4 tokens."""
    pixels = torch.randn(n * 16, 3 * 2 * 4 * 4, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * n)}


def _video_patches(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(n * 16, 3 * 2 * 4 * 4, generator=generator)
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[1, 4, 4]] * n)}


def _square_patches(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(n * 16, 3, 4, 4, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * n)}


def _square_video_patches(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(n * 16, 3, 4, 4, generator=generator)
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[1, 4, 4]] * n)}


def _image(side: int) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    return lambda n, generator: {"pixel_values": torch.randn(n, 3, side, side, generator=generator)}


def _positioned_patches(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Pictures of 6 x 6 patches of 4 x 4 pixels with their coordinates; pooled 3 x 3 they are 4 tokens."""
    x, y = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy")
    positions = torch.stack([x.flatten(), y.flatten()], -1).expand(n, -1, -1)
    return {"pixel_values": torch.rand(n, 36, 48, generator=generator), "image_position_ids": positions}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        config: Makes the configuration; called with changes to its text model.
        picture, video: What stands for one; None where the family takes none.
        token_types: Whether the model wants to be told the kind of each token (`mm_token_type_ids`).
        decorated: Whether the experts' implementation can be chosen by name, see `set_experts`.
        weight_scale: The factor that the family folds into its routing weights.
        padding_side: Where the family's processor pads.
    """

    config: Callable[..., Any]
    picture: Visual | None = None
    video: Visual | None = None
    token_types: bool = False
    decorated: bool = True
    weight_scale: float = 1.0
    padding_side: str = "left"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of inputs there are."""
        pictures = ("picture", "pictures") if self.picture else ()
        return ("text", "batch", *pictures, *(("video",) if self.video else ()))

    def build(self, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        """The model with random weights, in eval mode; the same seed gives the same weights in any dtype.

        Args:
            seed: Of the weights; torch's global generator is left as it was.
            dtype: Of all weights but those that the family keeps in float32.
            changes: To the configuration of the text model.
        """
        import transformers

        config = self.config(**changes)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            auto = "AutoModelForImageTextToText" if self.picture else "AutoModelForCausalLM"
            model = getattr(transformers, auto).from_config(config)
            _enlarge(model)
        if model.can_generate():
            model.generation_config.pad_token_id = PAD
            model.generation_config.eos_token_id = None
        return _cast(model, dtype).eval()

    def inputs(self, kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The model's keyword inputs.

        Args:
            kind: One of `kinds`: "text", one row of words; "picture", "video", one row with one and then
                words; "pictures", one row with two; "batch", three rows of unequal lengths, padded.
            dtype: Of pixels.
        """
        if kind not in self.kinds:
            raise ValueError(f"kind must be one of {', '.join(self.kinds)}, got {kind!r}.")
        generator = torch.Generator().manual_seed(seed)

        def words(number: int) -> list[int]:
            return torch.randint(8, VOCABULARY, (number,), generator=generator).tolist()

        visual = self.video if kind == "video" else self.picture
        sign = list(visual.tokens) if visual else []
        rows = {
            "text": [[BOS, *words(9)]],
            "picture": [[BOS, *sign, *words(9)]],
            "video": [[BOS, *sign, *words(9)]],
            "pictures": [[BOS, *sign, *words(3), *sign, *words(5)]],
            "batch": [[BOS, *sign, *words(9)], [BOS, *words(2), *sign, *words(3)], [BOS, *words(6)]],
        }[kind]
        inputs = _padded(rows, self.padding_side)
        number = {"picture": 1, "video": 1, "pictures": 2, "batch": 2}.get(kind, 0)
        if self.token_types:
            ids = inputs["input_ids"]
            inputs["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
        if visual and number:
            for key, value in visual.tensors(number, generator).items():
                inputs[key] = value.to(dtype) if value.is_floating_point() else value
        return inputs


def set_experts(model: Any, implementation: str) -> None:
    """Choose how a decorated family's experts run: "eager", "grouped_mm", "batched_mm", or one registered."""
    try:
        model.set_experts_implementation(implementation)
    except ValueError:
        # A host whose own file has no experts refuses, and does not hand on to its text model.
        model.set_experts_implementation({"text_config": implementation})


def _padded(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    length = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill = [PAD] * (length - len(row))
        real = [1] * len(row)
        blank = [0] * len(fill)
        ids.append([*fill, *row] if side == "left" else [*row, *fill])
        mask.append([*blank, *real] if side == "left" else [*real, *blank])
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _enlarge(model: torch.nn.Module) -> None:
    """Draw experts, routers and embeddings anew, larger.

    The default initialisation is so small that every expert gives nearly nothing and each router a flat
    choice; a skipped pair has to show.
    """
    parts = re.compile(r"(^|\.)(experts|gate|router|proj_router)\.")
    for name, value in model.state_dict(keep_vars=True).items():
        if "bias" in name and "correction" in name:
            torch.nn.init.normal_(value, std=0.1)
        elif parts.search(name) and value.ndim > 1:
            torch.nn.init.normal_(value, std=0.3)
        elif "per_expert_scale" in name:
            torch.nn.init.uniform_(value, 0.5, 1.5)
        elif "lm_head" in name:
            torch.nn.init.normal_(value, std=0.1)
        elif "embed_tokens" in name:
            torch.nn.init.normal_(value, std=1.0)


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """As a checkpoint is loaded: what is stored is cast, but for what the family keeps in float32."""
    strict = [
        re.compile(rf"(^|\.){key}($|\.)") for key in getattr(model, "_keep_in_fp32_modules_strict", ()) or ()
    ]
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_floating_point() and not any(key.search(name) for key in strict):
            value.data = value.data.to(dtype)
    return model


def _host(
    model_type: str, text: str, text_changes: Mapping[str, Any] | None = None, **own: Any
) -> Callable[..., Any]:
    """Configuration of a model that takes any text model.

    Args:
        own: Of the host; a function is called to make its value (sub-configurations load transformers).
    """

    def make(**changes: Any) -> Any:
        values = {key: value() if callable(value) else value for key, value in own.items()}
        return _config(model_type, text_config=_config(text, **{**(text_changes or {}), **changes}), **values)

    return make


def _text(model_type: str, *, weight_scale: float = 1.0, **text: Any) -> Family:
    return Family(lambda **changes: _config(model_type, **{**text, **changes}), weight_scale=weight_scale)


def _part(model_type: str, **changes: Any) -> Callable[[], Any]:
    return lambda: _config(model_type, **changes)


_IDS = {"image_token_id": IMAGE}
_VIDEO_IDS = {**_IDS, "video_token_id": VIDEO}
_MARKED = {**_VIDEO_IDS, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}

_PATCHES = Visual(_placeholders(4), _patches)
_VIDEO_PATCHES = Visual(_placeholders(4, VIDEO), _video_patches)
_INTERNVL = {
    "vision_config": _part("internvl_vision", num_hidden_layers=2, image_size=[16, 16], patch_size=[4, 4]),
    **_IDS,
}
_DEEPSEEK_V3 = {"routed_scaling_factor": 2.5, "num_key_value_heads": 4}


def _internvl(text: str, **changes: Any) -> Family:
    return Family(_host("internvl", text, changes, **_INTERNVL), picture=Visual(_placeholders(4), _image(16)))


FAMILIES: dict[str, Family] = {
    "qwen3_vl_moe": Family(
        _host(
            "qwen3_vl_moe",
            "qwen3_vl_moe_text",
            {"rope_parameters": _MROPE},
            vision_config=_part("qwen3_vl_moe_vision", deepstack_visual_indexes=[0]),
            **_MARKED,
        ),
        picture=_PATCHES,
        video=_VIDEO_PATCHES,
        token_types=True,
    ),
    "qwen3_5_moe": Family(
        _host(
            "qwen3_5_moe",
            "qwen3_5_moe_text",
            {
                "rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0},
                "layer_types": ["linear_attention", "full_attention", "full_attention"],
            },
            vision_config=_part("qwen3_5_moe_vision"),
            **_MARKED,
        ),
        picture=_PATCHES,
        video=_VIDEO_PATCHES,
        token_types=True,
    ),
    "internvl+qwen3_moe": _internvl("qwen3_moe", norm_topk_prob=True),
    "internvl+gpt_oss": _internvl("gpt_oss", intermediate_size=16),
    "kimi_k25+deepseek_v3": Family(
        _host(
            "kimi_k25",
            "deepseek_v3",
            _DEEPSEEK_V3,
            vision_config=_part("kimi_k25_vision", num_hidden_layers=2, pos_emb_height=8, pos_emb_width=8),
            projection_hidden_size=HIDDEN,
            **_MARKED,
        ),
        picture=Visual(_placeholders(4), _square_patches),
        video=Visual(_placeholders(4, VIDEO), _square_video_patches),
        weight_scale=2.5,
    ),
    "glm4v_moe": Family(
        _host(
            "glm4v_moe",
            "glm4v_moe_text",
            {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}, "routed_scaling_factor": 2.5},
            vision_config=_part("glm4v_moe_vision", image_size=16),
            **_VIDEO_IDS,
            image_start_token_id=VISION_START,
            image_end_token_id=VISION_END,
        ),
        picture=_PATCHES,
        token_types=True,
        weight_scale=2.5,
    ),
    "aria": Family(
        _host(
            "aria",
            "aria_text",
            {"intermediate_size": 16},
            vision_config=_part("idefics3_vision", num_hidden_layers=2, image_size=16),
            projector_patch_to_query_dict={16: 4},
            image_token_index=IMAGE,
        ),
        picture=Visual(_placeholders(4), _image(16)),
    ),
    "llama4": Family(
        _host(
            "llama4",
            "llama4_text",
            {"intermediate_size": 16, "intermediate_size_mlp": 32, "num_experts_per_tok": 2},
            vision_config=_part(
                "llama4_vision_model",
                num_hidden_layers=2,
                image_size=16,
                intermediate_size=128,
                vision_output_dim=32,
                projector_input_dim=32,
                projector_output_dim=32,
            ),
            image_token_index=IMAGE,
            boi_token_index=VISION_START,
            eoi_token_index=VISION_END,
        ),
        picture=Visual(_placeholders(4), _image(16)),
        decorated=False,
    ),
    "gemma4": Family(
        _host(
            "gemma4",
            "gemma4_text",
            {
                "enable_moe_block": True,
                "hidden_size_per_layer_input": 0,
                "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
                "global_head_dim": 8,
            },
            vision_config=_part(
                "gemma4_vision", num_hidden_layers=2, num_key_value_heads=4, position_embedding_size=16
            ),
            audio_config=None,
            **_VIDEO_IDS,
            audio_token_id=AUDIO,
            boi_token_id=VISION_START,
            eoi_token_id=VISION_END,
        ),
        picture=Visual(_placeholders(4), _positioned_patches),
        token_types=True,
    ),
    "mixtral": _text("mixtral", intermediate_size=16),
    "olmoe": _text("olmoe", intermediate_size=16),
    "qwen3_moe": _text("qwen3_moe", norm_topk_prob=True),
    "gpt_oss": _text("gpt_oss", intermediate_size=16),
    "deepseek_v3": _text("deepseek_v3", weight_scale=2.5, **_DEEPSEEK_V3),
}
