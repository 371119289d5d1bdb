"""A second small model, of InternVL's family, trained on the demo's rows: `train_demo.py --family internvl`.

It is not shipped: bench/policies.py shows with it what holds beyond the demo model. Its vision tower is a
plain ViT with learned positions (InternVL's), its decoder Qwen3-MoE's with one-dimensional positions; data,
optimiser and loss are those of the demo model.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from demo_model import sorted_experts, watch_routers
from demo_rows import Rows
from demo_trainer import Phase, Recipe, Trainer
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, InternVLConfig, InternVLForConditionalGeneration
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from modes_fx.demo.suite import Batch
from modes_fx.demo.text import END, IMAGE, MERGE, PAD, PATCH


def build_config(vocab_size: int) -> InternVLConfig:
    """5 MoE layers of 32 experts (8 active) behind a ViT of depth 3, 3 M parameters."""
    text = dict(
        model_type="qwen3_moe",
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=32,
        num_experts=32,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        router_aux_loss_coef=0.01,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    vision = dict(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=256,
        attention_bias=True,
        image_size=[96, 96],
        patch_size=[PATCH, PATCH],
        layer_scale_init_value=1.0,
        initializer_range=0.05,
    )
    return InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        image_seq_length=36,
        downsample_ratio=1 / MERGE,
        tie_word_embeddings=True,
    )


def new_model(vocab_size: int) -> InternVLForConditionalGeneration:
    """A freshly initialised fp32 model on the sorted experts; seed torch first."""
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
    model = InternVLForConditionalGeneration(build_config(vocab_size))
    model.set_experts_implementation("sorted")
    for layer in model.model.language_model.layers:
        experts = layer.mlp.experts
        nn.init.normal_(experts.gate_up_proj, std=experts.hidden_dim**-0.5)
        nn.init.normal_(experts.down_proj, std=experts.intermediate_dim**-0.5 / 2)
    nn.init.normal_(model.model.vision_tower.embeddings.position_embeddings, std=0.05)
    return model.train()


def pictures(patches: Tensor, blocks: int) -> Tensor:
    """Patches `[..., 3 * 8 * 8]` in Qwen-VL's merge-block order to pictures `[B, 3, S, S]`."""
    x = patches.reshape(-1, blocks, blocks, MERGE, MERGE, 3, PATCH, PATCH).permute(0, 5, 1, 3, 6, 2, 4, 7)
    side = blocks * MERGE * PATCH
    return x.reshape(-1, 3, side, side)


def for_internvl(batch: Batch) -> Batch:
    """A batch of `demo.batches` as InternVL's inputs: the same tokens, pictures whole."""
    patches = batch["pixel_values"].reshape(-1, 3, 2, PATCH * PATCH)[:, :, 0]  # both time frames are equal
    blocks = int(batch["image_grid_thw"][0, 1]) // MERGE
    converted = copy.copy(batch)
    for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids"):
        del converted[name]
    converted["pixel_values"] = pictures(patches, blocks)
    return converted


def load(directory: Path) -> InternVLForConditionalGeneration:
    """The trained model in eval mode, float32."""
    model: Any = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True
    )
    model.model.language_model.set_experts_implementation("grouped_mm")
    return model.eval()


def short(recipe: Recipe) -> Recipe:
    """The demo's recipe cut to ten minutes of one core: perception, a little of relations, no numbers."""

    def cut(phase: Phase, steps: int) -> Phase:
        return replace(phase, steps=steps, scenes=10, easy=3)

    first, relations, *_ = recipe.phases
    return replace(recipe, phases=(cut(first, 1100), cut(relations, 200)), decay=200)


class InternVLTrainer(Trainer):
    """The demo's loop around the second model."""

    def build(self, vocab_size: int) -> None:
        self.model = new_model(vocab_size)
        self.routing = watch_routers(self.model)

    def logits(self, rows: Rows) -> Tensor:
        self.routing.layers.clear()
        sizes = ((rows.scenes, 6), (rows.easy, 4))
        images = [pictures(pixels, blocks) for pixels, blocks in sizes if len(pixels)]
        features = [self.model.get_image_features(image).pooler_output.flatten(0, 1) for image in images]
        visual = (rows.ids == IMAGE).unsqueeze(-1)
        embeds = self.model.get_input_embeddings()(rows.ids).masked_scatter(visual, torch.cat(features))
        hidden = self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=rows.mask,
            position_ids=flat_positions(rows.segment),
            use_cache=False,
        ).last_hidden_state
        return self.model.lm_head(hidden[rows.labels >= 0])


def flat_positions(segment: Tensor) -> Tensor:
    """Positions `[B, T]` of packed rows: every question (segment 1, 2, ...) starts where the picture's
    segment 0 ends; pads (-1) get what they get."""
    place = torch.arange(segment.shape[1]).expand_as(segment)
    first = torch.ones_like(segment, dtype=torch.bool)
    first[:, 1:] = segment[:, 1:] != segment[:, :-1]
    start = torch.where(first, place, 0).cummax(1).values
    prefix = (segment == 0).sum(1, keepdim=True)
    return place - start + torch.where(segment > 0, prefix, 0)
