"""A zoo: every mixture-of-experts family of transformers as a tiny model with random weights, and its inputs.

A family is data: a configuration, and what stands for a picture. What all have in common is in `_SIZES`, of
which each configuration takes the keys that it knows.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modes_fx.blocks import is_experts
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
    # Tokens.
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    **dict.fromkeys(("image_token_id", "image_token_index"), IMAGE),
    **dict.fromkeys(("video_token_id", "video_token_index"), VIDEO),
    **dict.fromkeys(("audio_token_id", "audio_token_index"), AUDIO),
    **dict.fromkeys(("vision_start_token_id", "image_start_token_id", "image_bos_token_id"), VISION_START),
    **dict.fromkeys(("boi_token_id", "boi_token_index"), VISION_START),
    **dict.fromkeys(("vision_end_token_id", "image_end_token_id"), VISION_END),
    **dict.fromkeys(("eoi_token_id", "eoi_token_index"), VISION_END),
    # Of every model.
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    # Experts.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), NUM_EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), TOP_K),
    **dict.fromkeys(("moe_topk", "moe_k", "top_k_experts"), TOP_K),
    "moe_intermediate_size": 16,
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 16),
    "share_expert_dim": 16,
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts"), 1),
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    # Mixers of tokens.
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "o_lora_rank": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    "mamba_head_dim": 16,
    **dict.fromkeys(("mamba_d_state", "ssm_state_size"), 8),
    "n_groups": 2,
    # Towers for pictures.
    "depth": 2,
    "num_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "projection_dim"), HIDDEN),
    **dict.fromkeys(("projection_hidden_size", "projector_hidden_size"), HIDDEN),
    "num_position_embeddings": 16,
    **dict.fromkeys(("pos_emb_height", "pos_emb_width"), 8),
}


@dataclass(frozen=True)
class Visual:
    """What stands for one picture (or video).

    Attributes:
        tokens: Its ids in `input_ids`.
        tensors: Makes the tensors that go with `n` of them; random, all of 4 x 4 patches of 4 x 4 pixels
            unless its name says otherwise.
    """

    tokens: tuple[int, ...]
    tensors: Callable[[int, torch.Generator], dict[str, Tensor]]


def _placeholders(number: int, token: int = IMAGE) -> tuple[int, ...]:
    return (VISION_START, *[token] * number, VISION_END)


def _patches(*patch: int, video: bool = False) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """Patches of shape `patch`, and how many there are in time, height and width."""
    pixels, grid = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    return lambda n, generator: {
        pixels: torch.randn(n * 16, *patch, generator=generator),
        grid: torch.tensor([[1, 4, 4]] * n),
    }


def _timed_patches(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {**_patches(96, video=True)(n, generator), "video_second_per_grid": torch.ones(n)}


def _merged_patches(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A square of 2 x 2 patches for each token, channels last; the grid counts tokens."""
    pixels = torch.randn(n * 4, 8, 8, 3, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2, 2]] * n)}


def _flat_patches(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(n * 16, 48, generator=generator)
    return {"pixel_values": pixels, "image_grid_hw": torch.tensor([[4, 4]] * n)}


def _shaped_patches(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(n, 16, 48, generator=generator),
        "spatial_shapes": torch.tensor([[4, 4]] * n),
        "pixel_attention_mask": torch.ones(n, 16, dtype=torch.int64),
    }


def _positioned_patches(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """6 x 6 patches with their coordinates."""
    x, y = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy")
    positions = torch.stack([x.flatten(), y.flatten()], -1).expand(n, -1, -1)
    return {"pixel_values": torch.rand(n, 36, 48, generator=generator), "image_position_ids": positions}


def _image(side: int) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """A square picture of so many pixels."""
    return lambda n, generator: {"pixel_values": torch.randn(n, 3, side, side, generator=generator)}


def _sized_image(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {**_image(16)(n, generator), "image_sizes": torch.tensor([[16, 16]] * n)}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        model_type: What transformers calls its configuration.
        config: What that has besides `_SIZES`. A mapping is a sub-configuration, with its `model_type` where
            the family takes any.
        picture, video: What stands for one; None where the family takes none.
        token_types: Whether the model wants to be told the kind of each token (`mm_token_type_ids`).
        expert_types: Whether it wants to be told which experts a token is for (`moe_mm_token_type_ids`); the
            marks around a picture are for the experts of pictures.
        canvas: Tokens that the model refines beside the ones it reads (`decoder_input_ids`); its logits are
            theirs.
        decorated: Whether the experts' implementation can be chosen by name, see `set_experts`.
        weight_scale: The factor that the family folds into its routing weights.
        architecture: The class in transformers, where no auto class knows it.
    """

    model_type: str
    config: Mapping[str, Any]
    picture: Visual | None = None
    video: Visual | None = None
    token_types: bool = False
    expert_types: bool = False
    canvas: int = 0
    decorated: bool = True
    weight_scale: float = 1.0
    architecture: str = ""

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

        text = self.config.get("text_config")
        config = {**self.config, **(changes if text is None else {"text_config": {**text, **changes}})}
        auto = "AutoModelForImageTextToText" if self.picture else "AutoModelForCausalLM"
        known = getattr(transformers, self.architecture or auto)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            tiny = _tiny(transformers.CONFIG_MAPPING[self.model_type], config)
            model = known(tiny) if self.architecture else known.from_config(tiny)
            _enlarge(model)
        if model.can_generate():
            model.generation_config.pad_token_id = PAD
            model.generation_config.eos_token_id = None
        return _cast(model, dtype).eval()

    def inputs(self, kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The model's keyword inputs.

        Args:
            kind: One of `kinds`: "text", one row of words; "picture" and "video", one row with one and then
                words; "pictures", one row with two; "batch", three rows of unequal lengths, padded on the
                left, two of them with a picture where the family takes pictures.
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
        length = max(map(len, rows))
        ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.token_types:
            inputs["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
        if self.canvas:
            inputs["decoder_input_ids"] = torch.tensor([words(self.canvas) for _ in rows])
        if self.expert_types:
            marks = torch.tensor([IMAGE, VISION_START, VISION_END])
            inputs["moe_mm_token_type_ids"] = torch.isin(ids, marks).long()
        number = {"picture": 1, "video": 1, "pictures": 2, "batch": 2}.get(kind, 0)
        if visual and number:
            for key, value in visual.tensors(number, generator).items():
                inputs[key] = value.to(dtype) if value.is_floating_point() else value
        return inputs


def set_experts(model: Any, implementation: str) -> None:
    """Choose how a decorated family's experts run: "eager", "grouped_mm", "batched_mm", or one registered.

    Raises:
        ValueError: The implementation is unknown, or the family has code of its own.
    """
    if not any(is_experts(module) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} runs its experts with code of its own; it has no other.")
    try:
        model.set_experts_implementation(implementation)
    except ValueError:
        # A host whose own file has no experts refuses, and does not hand on to its text model.
        model.set_experts_implementation({"text_config": implementation})


def _tiny(known: Any, changes: Mapping[str, Any]) -> Any:
    """A configuration of a class at tiny sizes."""
    from transformers import CONFIG_MAPPING, AutoConfig

    names = {f.name for f in dataclasses.fields(known)}
    values = {key: value for key, value in _SIZES.items() if key in names} | dict(changes)
    for key, part in known.sub_configs.items():
        if isinstance(values.get(key), Mapping):
            own = dict(values[key])
            model_type = own.pop("model_type", None)
            values[key] = _tiny(CONFIG_MAPPING[model_type] if part is AutoConfig else part, own)
    return known(**values)


def _enlarge(model: torch.nn.Module) -> None:
    """Draw experts, routers and embeddings anew, larger.

    The default initialisation is so small that every expert gives nearly nothing and each router a flat
    choice; a skipped pair has to show.
    """
    parts = re.compile(r"(^|\.)(experts|gate|router)\.")
    for name, value in model.state_dict(keep_vars=True).items():
        if not value.is_floating_point():
            if value.ndim == 2 and parts.search(name):
                # A table from token to experts, which must differ.
                value.copy_(torch.stack([torch.randperm(NUM_EXPERTS)[: value.shape[1]] for _ in value]))
        elif "bias" in name and "correction" in name:
            torch.nn.init.normal_(value, std=0.1)
        elif parts.search(name) and value.ndim > 1:
            torch.nn.init.normal_(value, std=0.3)
        elif "sam_encoder" in name and value.ndim > 1:
            torch.nn.init.normal_(value, std=0.1)
        elif "per_expert_scale" in name:
            torch.nn.init.uniform_(value, 0.5, 1.5)
        elif "lm_head" in name:
            torch.nn.init.normal_(value, std=0.1)
        elif "embed_tokens" in name:
            torch.nn.init.normal_(value, std=1.0)


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """As a checkpoint is loaded: what is stored is cast, but for what the family keeps in float32."""
    kept = [
        re.compile(rf"(^|\.){key}($|\.)") for key in getattr(model, "_keep_in_fp32_modules_strict", ()) or ()
    ]
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_floating_point() and not any(key.search(name) for key in kept):
            value.data = value.data.to(dtype)
    return model


_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
_WHOLE_MROPE = {**_MROPE, "partial_rotary_factor": 1.0}
_MLA = {"num_key_value_heads": 4}
_ONE_DENSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_ONE_LINEAR = {"layer_types": ["linear_attention", "full_attention", "full_attention"]}
_TWO_SLIDING = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
_LFM2 = {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "full_attention"]}
_NEMOTRON_H = {"layers_block_type": ["mamba", "moe", "attention", "moe"]}
_GEMMA_VISION = {"model_type": "gemma4_vision", "num_key_value_heads": 4, "position_embedding_size": 16}
_SAM = {
    "output_channels": 16,
    "mlp_dim": 32,
    "global_attn_indexes": [1],
    "window_size": 2,
    "downsample_channels": [16, 32],
}

_IMAGE = Visual(_placeholders(4), _image(16))
_QWEN: dict[str, Any] = {
    "picture": Visual(_placeholders(4), _patches(96)),
    "video": Visual(_placeholders(4, VIDEO), _patches(96, video=True)),
    "token_types": True,
}
_GLM: dict[str, Any] = {"picture": _QWEN["picture"], "token_types": True}


def _internvl(text: str, **changes: Any) -> Family:
    vision = {"image_size": [16, 16], "patch_size": [4, 4]}
    config = {"text_config": {"model_type": text, **changes}, "vision_config": vision}
    return Family("internvl", config, picture=_IMAGE)


def _llava(text: str, **changes: Any) -> Family:
    vision = {"model_type": "clip_vision_model", "image_size": 8}
    config = {"text_config": {"model_type": text, **changes}, "vision_config": vision}
    return Family("llava", config, picture=Visual(_placeholders(4), _image(8)))


def _text(model_type: str, weight_scale: float = 1.0, /, **config: Any) -> Family:
    return Family(model_type, config, weight_scale=weight_scale)


FAMILIES: dict[str, Family] = {
    "qwen3_vl_moe": Family(
        "qwen3_vl_moe",
        {"text_config": {"rope_parameters": _MROPE}, "vision_config": {"deepstack_visual_indexes": [0]}},
        **_QWEN,
    ),
    "qwen3_5_moe": Family(
        "qwen3_5_moe",
        {"text_config": {"rope_parameters": _WHOLE_MROPE, **_ONE_LINEAR}, "vision_config": {}},
        **_QWEN,
    ),
    "qwen3_omni_moe": Family(
        "qwen3_omni_moe_thinker",
        {
            "text_config": {"rope_parameters": _MROPE},
            "vision_config": {"deepstack_visual_indexes": [0]},
            "audio_config": {
                "d_model": HIDDEN,
                "encoder_layers": 1,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 32,
                "output_dim": HIDDEN,
                "downsample_hidden_size": 8,
            },
            "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END,
        },
        **_QWEN | {"video": Visual(_placeholders(4, VIDEO), _timed_patches)},
        architecture="Qwen3OmniMoeThinkerForConditionalGeneration",
    ),
    "qwen4_exp": Family(
        "qwen4_exp",
        {
            "text_config": {
                "rope_parameters": _WHOLE_MROPE,
                **_ONE_LINEAR,
                "hc_lowrank": 8,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 8,
                "indexer_budget": 8,
                "indexer_compress_ratio": 2,
            },
            "vision_config": {},
        },
        **_QWEN,
    ),
    "internvl+qwen3_moe": _internvl("qwen3_moe", norm_topk_prob=True),
    "internvl+gpt_oss": _internvl("gpt_oss", intermediate_size=16),
    "internvl+mixtral": _internvl("mixtral", intermediate_size=16),
    "internvl+olmoe": _internvl("olmoe", intermediate_size=16),
    "internvl+deepseek_v2": _internvl("deepseek_v2", **_MLA),
    "kimi_k25+deepseek_v3": Family(
        "kimi_k25",
        {
            "text_config": {"model_type": "deepseek_v3", "routed_scaling_factor": 2.5, **_MLA},
            "vision_config": {},
        },
        picture=Visual(_placeholders(4), _patches(3, 4, 4)),
        video=Visual(_placeholders(4, VIDEO), _patches(3, 4, 4, video=True)),
        weight_scale=2.5,
    ),
    "glm4v_moe": Family(
        "glm4v_moe",
        {"text_config": {"rope_parameters": _WHOLE_MROPE, "routed_scaling_factor": 2.5}, "vision_config": {}},
        **_GLM,
        weight_scale=2.5,
    ),
    "glm46v": Family(
        "glm46v",
        {
            "text_config": {"model_type": "glm4v_moe_text", "rope_parameters": _WHOLE_MROPE},
            "vision_config": {"model_type": "glm4v_moe_vision"},
        },
        **_GLM,
    ),
    "glm5_next": Family(
        "glm5_next",
        {
            "text_config": {"qk_rope_head_dim": 0, "head_dim": 0, **_ONE_DENSE, **_MLA},
            "vision_config": {"projection_intermediate_size": 32},
        },
        **_GLM,
        weight_scale=2.5,
    ),
    "ernie4_5_vl_moe": Family(
        "ernie4_5_vl_moe",
        {
            "text_config": {
                "moe_intermediate_size": [16, 24],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {},
        },
        picture=Visual(_placeholders(4), _patches(48)),
        token_types=True,
        expert_types=True,
    ),
    "aria": Family(
        "aria",
        {
            "text_config": {"intermediate_size": 16},
            "vision_config": {"model_type": "idefics3_vision"},
            "projector_patch_to_query_dict": {16: 4},
        },
        picture=_IMAGE,
    ),
    "llama4": Family(
        "llama4",
        {
            "text_config": {"intermediate_size": 16, "intermediate_size_mlp": 32, "num_experts_per_tok": 2},
            "vision_config": {
                "intermediate_size": 128,
                "vision_output_dim": HIDDEN,
                "projector_input_dim": HIDDEN,
                "projector_output_dim": HIDDEN,
            },
        },
        picture=_IMAGE,
        decorated=False,
    ),
    "gemma4": Family(
        "gemma4",
        {
            "text_config": {
                "enable_moe_block": True,
                "hidden_size_per_layer_input": 0,
                "global_head_dim": 8,
                **_TWO_SLIDING,
            },
            "vision_config": _GEMMA_VISION,
        },
        picture=Visual(_placeholders(4), _positioned_patches),
        token_types=True,
    ),
    "diffusion_gemma": Family(
        "diffusion_gemma",
        {
            "text_config": {"global_head_dim": 8, "tie_word_embeddings": True, **_TWO_SLIDING},
            "vision_config": _GEMMA_VISION,
            "canvas_length": 8,
            "tie_word_embeddings": True,
        },
        picture=Visual(_placeholders(4), _positioned_patches),
        token_types=True,
        canvas=8,
        architecture="DiffusionGemmaForBlockDiffusion",
    ),
    "minimax_m3_vl": Family(
        "minimax_m3_vl",
        {
            "text_config": {"intermediate_size": 16, "dense_intermediate_size": 48, "rotary_dim": 8},
            "vision_config": {},
        },
        **_QWEN | {"token_types": False},
    ),
    "step3p7": Family(
        "step3p7",
        {
            "text_config": {"sliding_window": 8, **_ONE_DENSE},
            "vision_config": {"image_size": 32, "mlp_ratio": 1.0},
        },
        picture=Visual(_placeholders(4), _image(32)),
        decorated=False,
    ),
    "mistral3+mistral4": Family(
        "mistral3",
        {"text_config": {"model_type": "mistral4", **_MLA}, "vision_config": {"model_type": "pixtral"}},
        picture=Visual(_placeholders(4), _sized_image),
    ),
    "mistral_large4": Family(
        "mistral_large4",
        {"text_config": _MLA, "vision_config": {"model_type": "pixtral"}},
        picture=Visual(_placeholders(4), _sized_image),
    ),
    "muse_spark": Family(
        "muse_spark",
        {
            "text_config": {"moe_hidden_size": 24, **_ONE_DENSE},
            "vision_config": {},
            "out_hidden_size": 4 * HIDDEN,
            "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
        },
        picture=_QWEN["picture"],
    ),
    "dots3_note": Family(
        "dots3_note",
        {
            "text_config": {
                "swa_q_lora_rank": 16,
                "swa_kv_lora_rank": 16,
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 4,
                **_ONE_DENSE,
                **_MLA,
            },
            "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN, **_ONE_DENSE},
            "audio_config": {
                "adapter_input_size": HIDDEN,
                "adapter_out_dim": HIDDEN,
                "downsample_hidden_size": 8,
            },
        },
        picture=Visual(_placeholders(4), _patches(48)),
    ),
    "inkling2": Family(
        "inkling2",
        {"text_config": {}, "vision_config": {"projection_hidden_dim": HIDDEN}},
        picture=Visual(_placeholders(4), _merged_patches),
        weight_scale=8.0,
    ),
    "deepseek_ocr2": Family(
        "deepseek_ocr2",
        {
            "text_config": _ONE_DENSE,
            "vision_config": {"sam_config": {**_SAM, "image_size": 32}, "encoder_config": {}},
        },
        picture=Visual(_placeholders(145), _image(32)),
    ),
    "unlimited_ocr": Family(
        "unlimited_ocr",
        {
            "text_config": _ONE_DENSE,
            "vision_config": {"sam_config": {**_SAM, "image_size": 32}, "encoder_config": {}},
        },
        picture=Visual(_placeholders(7), _image(32)),
    ),
    "nemotron_h_omni": Family(
        "nemotron_h_omni",
        {
            "text_config": {"model_type": "nemotron_h", **_NEMOTRON_H},
            "vision_config": {
                "model_type": "radio",
                "max_img_size": 16,
                "mlp_ratio": 1.0,
                "video_temporal_patch_size": 2,
            },
            "vision_hidden_size": HIDDEN,
        },
        picture=Visual(_placeholders(4), _flat_patches),
        architecture="NemotronH_Omni_Reasoning_V3",
    ),
    "lfm2_vl+lfm2_moe": Family(
        "lfm2_vl",
        {
            "text_config": {"model_type": "lfm2_moe", **_LFM2},
            "vision_config": {"model_type": "siglip2_vision_model", "num_patches": 16},
        },
        picture=Visual(_placeholders(4), _shaped_patches),
    ),
    "llava+granitemoe": _llava("granitemoe", intermediate_size=16),
    "llava+qwen2_moe": _llava("qwen2_moe"),
    "llava+phimoe": _llava("phimoe", intermediate_size=16, num_experts_per_tok=2),
    "afmoe": _text("afmoe"),
    "axk1": _text("axk1", 2.5, **_MLA),
    "axk2": _text("axk2", 2.5, **_MLA),
    "bailing_hybrid": _text("bailing_hybrid", 2.5),
    "beam": _text("beam", **_ONE_DENSE),
    "cohere2_moe": _text("cohere2_moe", intermediate_size=16, logit_scale=1.0),
    "deepseek_v2": _text("deepseek_v2", **_MLA),
    "deepseek_v3": _text("deepseek_v3", 2.5, routed_scaling_factor=2.5, **_MLA),
    "deepseek_v32": _text("deepseek_v32", 2.5, **_MLA),
    "deepseek_v4": _text("deepseek_v4", 1.5, mlp_layer_types=["hash_moe", "moe", "moe"]),
    "dots1": _text("dots1"),
    "ernie4_5_moe": _text("ernie4_5_moe"),
    "exaone_moe": _text("exaone_moe", 2.5),
    "flex_olmo": _text("flex_olmo", intermediate_size=16),
    "flint": _text("flint"),
    "glm4_moe": _text("glm4_moe"),
    "glm4_moe_lite": _text("glm4_moe_lite", 1.8, **_MLA),
    "glm_moe_dsa": _text("glm_moe_dsa", 2.5, **_MLA),
    "gpt_oss": _text("gpt_oss", intermediate_size=16),
    "granitemoe": _text("granitemoe", intermediate_size=16),
    "granitemoe_swa": _text("granitemoe_swa", intermediate_size=16),
    "granitemoehybrid": _text(
        "granitemoehybrid", intermediate_size=16, layer_types=["mamba", "attention", "mamba"]
    ),
    "granitemoeshared": _text("granitemoeshared", intermediate_size=16),
    "hunyuan_v1_moe": _text("hunyuan_v1_moe", intermediate_size=16),
    "hy_v3": _text("hy_v3", 2.826),
    "hy_v4": _text("hy_v4", 2.827),
    "inkling": _text("inkling_text", rel_extent=32, logits_mup_width_multiplier=1.0),
    "jamba": _text(
        "jamba",
        intermediate_size=16,
        expert_layer_period=1,
        expert_layer_offset=0,
        attn_layer_period=2,
        attn_layer_offset=1,
    ),
    "kimi_linear": _text("kimi_linear", 2.446),
    "kolibri1": _text("kolibri1"),
    "laguna": _text("laguna"),
    "lfm2_moe": _text("lfm2_moe", **_LFM2),
    "mellum": _text("mellum"),
    "mimo_v2_flash": _text("mimo_v2_flash"),
    "minimax": _text("minimax", intermediate_size=16),
    "minimax_m2": _text("minimax_m2", intermediate_size=16),
    "mixtral": _text("mixtral", intermediate_size=16),
    "nemotron_h": _text("nemotron_h", **_NEMOTRON_H),
    "olmoe": _text("olmoe", intermediate_size=16),
    "phimoe": _text("phimoe", intermediate_size=16, num_experts_per_tok=2),
    "qwen2_moe": _text("qwen2_moe"),
    "qwen3_moe": _text("qwen3_moe", norm_topk_prob=True),
    "qwen3_next": _text("qwen3_next"),
    "solar_open": _text("solar_open"),
    "zaya": _text("zaya", router_hidden_size=16, num_experts_per_tok=1),
}

# Families whose experts are not stacked; their blocks are not found.
UNSTACKED: dict[str, Family] = {
    "dbrx": _text(
        "dbrx",
        d_model=HIDDEN,
        n_heads=4,
        n_layers=2,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": NUM_EXPERTS, "moe_top_k": TOP_K},
    ),
    "doge": _text("doge"),
    "jetmoe": _text("jetmoe"),
    "longcat_flash": _text(
        "longcat_flash", num_layers=2, ffn_hidden_size=32, expert_ffn_hidden_size=16, **_MLA
    ),
}

# Why what is left is not here.
UNBUILDABLE: dict[str, str] = {
    "inkling with pictures": "its vision tower plans its scales with scipy, which is not a dependency",
    "openai_privacy_filter": "it classifies tokens, and generates none",
    "qwen3_omni_moe talker": "it reads codec tokens that only a whole Qwen3-Omni makes",
    "nllb_moe": "it translates with an encoder and a decoder; no language model",
    "switch_transformers": "it has an encoder and a decoder; no language model",
}
