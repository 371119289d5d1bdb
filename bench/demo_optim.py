"""Muon for the matrices, AdamW for the rest, on one flat gradient that all processes share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Newton-Schulz coefficients of Muon (Jordan 2024): five steps bring all singular values near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix of each `[..., m, n]`, roughly, computed in bf16."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


def is_matrix(name: str) -> bool:
    """Muon's share: attention and experts of the text model, blocks of the vision tower."""
    text = ".self_attn." in name and name.endswith("proj.weight")
    experts = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    tower = "visual.blocks" in name or "vision_tower.encoder.layer" in name
    vision = tower and name.endswith("weight") and "norm" not in name
    return text or experts or vision


class Optimizer:
    """One step: clip, then Muon (momentum 0.95, Nesterov) or AdamW (0.9, 0.98) with weight decay 0.05.

    Experts' matrices are orthogonalised one by one. Muon's update is scaled by `0.2 * sqrt(max(m, n))`, so
    its root mean square is AdamW's and both share one learning rate.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], decay: float = 0.05) -> None:
        self.decay = decay
        self.named = [(name, p) for name, p in named if p.requires_grad]
        self.flat = torch.zeros(sum(p.numel() for _, p in self.named))
        at = 0
        for _, p in self.named:
            p.grad = self.flat[at : at + p.numel()].view_as(p)
            at += p.numel()
        self.state = {f"{name}.first": torch.zeros_like(p) for name, p in self.named}
        self.state |= {f"{n}.second": torch.zeros_like(p) for n, p in self.named if not is_matrix(n)}

    @torch.no_grad()
    def step(self, step: int, rate: float) -> float:
        """Average the gradient over processes, update, zero the gradient; returns the gradient's norm."""
        if dist.is_initialized():
            dist.all_reduce(self.flat)
            self.flat /= dist.get_world_size()
        norm = float(self.flat.norm())
        self.flat *= min(1.0, 1.0 / (norm + 1e-6))
        for name, p in self.named:
            grad, first = p.grad, self.state[f"{name}.first"]
            assert grad is not None
            if is_matrix(name):
                first.mul_(0.95).add_(grad, alpha=0.05)
                update = orthogonalize(grad.lerp(first, 0.95))
                update *= 0.2 * max(p.shape[-2:]) ** 0.5
            else:
                second = self.state[f"{name}.second"]
                first.lerp_(grad, 0.1)
                second.lerp_(grad.square(), 0.02)
                scale = (second / (1 - 0.98 ** (step + 1))).sqrt_().add_(1e-8)
                update = first / (1 - 0.9 ** (step + 1)) / scale
            if p.ndim > 1:
                p.mul_(1 - rate * self.decay)
            p.add_(update, alpha=-rate)
        self.flat.zero_()
        return norm
