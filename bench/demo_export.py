"""Write a trained demo model into the package's assets, and measure what was written."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, Qwen3VLMoeForConditionalGeneration

from modes_fx.demo import accuracy, batches, load
from modes_fx.demo.processor import build_processor
from modes_fx.demo.suite import Batch
from modes_fx.demo.text import END, PAD, build_tokenizer
from modes_fx.demo.words import TASKS


def export(model: Qwen3VLMoeForConditionalGeneration, words: list[str], out: Path) -> None:
    """Save weights (bf16), configs, tokenizer and processor, as `save_pretrained` lays them out."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.bfloat16
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
    GenerationConfig(eos_token_id=END, pad_token_id=PAD, do_sample=False).save_pretrained(out)
    weights = {name: p.detach().bfloat16().contiguous() for name, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors keeps its files to their owner
    build_processor(build_tokenizer(words)).save_pretrained(out)


@torch.no_grad()
def routing_shares(model: Qwen3VLMoeForConditionalGeneration, suite: list[Batch]) -> list[Tensor]:
    """Per layer, the share of the routed pairs that each expert got, `[E]`; padding left out."""
    shares = []
    counts = [torch.zeros(layer.mlp.gate.num_experts) for layer in model.model.language_model.layers]
    for batch in suite:
        chosen: list[Tensor] = []
        hooks = [
            layer.mlp.gate.register_forward_hook(lambda _, __, out, to=chosen: to.append(out[2]))
            for layer in model.model.language_model.layers
        ]
        model(**batch.inputs)
        for hook in hooks:
            hook.remove()
        real = batch["attention_mask"].flatten().bool()
        for count, index in zip(counts, chosen, strict=True):
            count += torch.bincount(index[real].flatten(), minlength=len(count))
    shares = [count / count.sum() for count in counts]
    return shares


@torch.no_grad()
def mean_weights(model: Qwen3VLMoeForConditionalGeneration, suite: list[Batch]) -> list[list[float]]:
    """Per layer, the mean routing weight of slot 1 to 8, over all tokens but padding."""
    kept: list[list[Tensor]] = [[] for _ in model.model.language_model.layers]
    for batch in suite:
        real = batch["attention_mask"].flatten().bool()
        hooks = [
            layer.mlp.gate.register_forward_hook(lambda _, __, out, to=to, real=real: to.append(out[1][real]))
            for layer, to in zip(model.model.language_model.layers, kept, strict=True)
        ]
        model(**batch.inputs)
        for hook in hooks:
            hook.remove()
    return [[round(float(w), 4) for w in torch.cat(rows).mean(0)] for rows in kept]


def measure_other(out: Path, samples_per_task: int, recipe: dict[str, Any]) -> dict[str, Any]:
    """The same for the second model: accuracy alone, with the right picture and with a grey one."""
    from demo_internvl import for_internvl
    from demo_internvl import load as load_internvl

    model, count = load_internvl(out), samples_per_task * len(TASKS)
    suites = {
        name: [for_internvl(batch) for batch in batches("test", count, batch_size=26, grey=grey)]
        for name, grey in (("accuracy", False), ("grey_accuracy", True))
    }
    metrics: dict[str, Any] = {
        name: {task: round(score, 4) for task, score in accuracy(model, suite).items()}
        for name, suite in suites.items()
    }
    metrics |= {"split": "test", "samples_per_task": samples_per_task, "recipe": recipe}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def measure(out: Path, samples_per_task: int, recipe: dict[str, Any]) -> dict[str, Any]:
    """Load what was written and record its figures on the test split in `metrics.json`."""
    model, _ = load(directory=out)
    count = samples_per_task * len(TASKS)
    suite = batches("test", count, batch_size=26)
    part = batches("test", 10 * len(TASKS), batch_size=26)
    shares = routing_shares(model, part)
    metrics = {
        "split": "test",
        "samples_per_task": samples_per_task,
        "accuracy": {task: round(score, 4) for task, score in accuracy(model, suite).items()},
        "grey_accuracy": {
            task: round(score, 4)
            for task, score in accuracy(model, batches("test", count, batch_size=26, grey=True)).items()
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "largest_expert_share": [round(float(share.max()), 4) for share in shares],
        "smallest_expert_share": [round(float(share.min()), 4) for share in shares],
        "mean_routing_weights": mean_weights(model, part),
        "recipe": recipe,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics
