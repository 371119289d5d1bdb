"""A tiny Qwen3-VL-MoE whose sizes can be chosen, and inputs for it."""

from typing import Any

import torch

from modes_fx.testing.tokens import BOS, EOS, IMAGE, PAD, VIDEO, VISION_END, VISION_START, VOCABULARY


def tiny_qwen3_vl_moe(
    *,
    num_layers: int = 3,
    num_experts: int = 8,
    top_k: int = 4,
    hidden: int = 32,
    intermediate: int = 16,
    heads: tuple[int, int] = (4, 2),
    head_dim: int | None = None,
    deepstack: tuple[int, ...] = (0,),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A `Qwen3VLMoeForConditionalGeneration` with random weights, in eval mode, experts as `grouped_mm`.

    Args:
        num_layers: Decoder layers, all with experts.
        heads: Of queries, and of keys and values.
        head_dim: By default a quarter of `hidden`.
        deepstack: Layers of the vision encoder whose features are added after the first decoder layers.
        seed: Of the weights; torch's global generator is left as it was.
    """
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": intermediate,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_dim or hidden // 4,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": hidden,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": list(deepstack),
    }
    config = Qwen3VLMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3VLMoeForConditionalGeneration(config)
        # The default initialisation is so small that every expert gives nearly nothing and each router a
        # flat choice; a skipped pair has to show.
        for name, parameter in model.named_parameters():
            if "experts" in name or "mlp.gate" in name:
                torch.nn.init.normal_(parameter, std=0.3)
            elif "embed_tokens" in name:
                torch.nn.init.normal_(parameter, std=1.0)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()  # type: ignore[arg-type]


def tiny_inputs(
    *, text: int = 9, grid: tuple[int, int] | None = (4, 4), patch: int = 4, batch: int = 1, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Inputs for `tiny_qwen3_vl_moe`: special tokens, a picture, text.

    Args:
        text: Text tokens after the picture.
        grid: Patches of the picture (height, width), multiples of 2, giving height * width / 4 visual tokens;
            None for no picture.
        patch: Side of a patch in pixels.
    Returns:
        `input_ids`, `attention_mask`, `mm_token_type_ids`, each `[batch, S]`, int64; with a picture also
        `pixel_values` `[batch * patches, 6 * patch * patch]`, float32, and `image_grid_thw` `[batch, 3]`.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    visual = 0 if grid is None else grid[0] * grid[1] // 4
    for _ in range(batch):
        words = torch.randint(8, VOCABULARY, (text,), generator=generator).tolist()
        picture = [] if grid is None else [VISION_START] + [IMAGE] * visual + [VISION_END]
        rows.append([BOS, *picture, *words])
    input_ids = torch.tensor(rows)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE).long(),
    }
    if grid is not None:
        patches = batch * grid[0] * grid[1]
        inputs["pixel_values"] = torch.randn(patches, 3 * 2 * patch * patch, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, *grid]] * batch)
    return inputs
