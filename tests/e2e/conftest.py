"""The oracle of the end-to-end tests, written without modes_fx: hooks on the unedited eager model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Oracle:
    """What the rule means: the weights of dropped pairs become zero, in transformers' own eager model, of any
    family whose experts are called as `experts(hidden, index, weights)`.

    Counts pairs and dropped pairs over all tokens, so that a test can say that something was skipped.
    """

    def __init__(self, model: nn.Module, profile: Any) -> None:
        self.model = model
        self.profile = profile
        self.pairs = self.dropped = 0
        self.scores: dict[str, list[Tensor]] = {"text": [], "vision": []}
        self.kind: Tensor
        # Of ERNIE-4.5-VL: which tokens its vision experts see, the others going to its text experts.
        self.to_vision_experts: Tensor | None

    @contextmanager
    def __call__(self) -> Iterator["Oracle"]:
        self.pairs = self.dropped = 0
        # By name, for the experts of a vision tower are no part of it.
        layers = {layer.name: layer for layer in self.profile.layers}
        handles = []
        for name, module in self.model.named_modules():
            layer = layers.get(name.rpartition(".")[0])
            if layer is not None and _is_experts(module):
                handles.append(module.register_forward_pre_hook(self._zero(name, layer)))
            if layer is not None and _is_dense_router(module):
                handles.append(module.register_forward_hook(self._zero_scores(layer)))
        assert len(handles) == len(layers)
        handles.append(self.model.register_forward_pre_hook(self._see_tokens, with_kwargs=True))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _see_tokens(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"].reshape(-1)
        kind = torch.tensor(
            [
                1 if i in self.profile.visual_token_ids else 2 if i in self.profile.special_token_ids else 0
                for i in ids.tolist()
            ]
        )
        self.kind = kind
        types = kwargs.get("moe_mm_token_type_ids")
        self.to_vision_experts = None if types is None else types.reshape(-1) > 0

    def _zero(self, name: str, layer: Any) -> Callable[..., Any]:
        alpha_text = layer.alpha_text / layer.weight_scale
        alpha_vision = layer.alpha_vision / layer.weight_scale

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, index, weights = args
            kind = self.kind
            if len(weights) != len(kind):
                assert self.to_vision_experts is not None
                kind = kind[self.to_vision_experts == ("vision" in name.split(".")[-2])]
            return hidden, index, self._kept(weights, kind, alpha_text, alpha_vision)

        return hook

    def _zero_scores(self, layer: Any) -> Callable[..., Any]:
        """Of Llama 4, whose router gives a score [T, E] of each expert, zero where not chosen."""

        def hook(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            scores, index = output[0].topk(layer.top_k, dim=-1)
            kept = self._kept(scores, self.kind, layer.alpha_text, layer.alpha_vision)
            return torch.zeros_like(output[0]).scatter(1, index, kept), *output[1:]

        return hook

    def _kept(self, weights: Tensor, kind: Tensor, alpha_text: float, alpha_vision: float) -> Tensor:
        text, vision = kind == 0, kind == 1
        self.scores["text"].append(alpha_text * weights[text].float())
        self.scores["vision"].append(alpha_vision * weights[vision].float())
        drop = torch.zeros_like(weights, dtype=torch.bool)
        drop[text] = alpha_text * weights[text].float() < self.profile.tau_text
        drop[vision] = alpha_vision * weights[vision].float() < self.profile.tau_vision
        self.pairs += drop.numel()
        self.dropped += int(drop.sum())
        return weights.masked_fill(drop, 0)

    @property
    def skip(self) -> float:
        return self.dropped / self.pairs


def _is_experts(module: nn.Module) -> bool:
    """Weights of all experts in one tensor, called with the chosen ones: those decorated, and one more."""
    stacked = [p for p in module.parameters(recurse=False) if p.ndim == 3]
    decorated = hasattr(type(module).forward, "__wrapped__")
    return len(stacked) >= 2 and (decorated or type(module).__name__ == "Step3p7Experts")


def _is_dense_router(module: nn.Module) -> bool:
    """A router that gives a score of every expert, which transformers has for Llama 4 alone."""
    return type(module).__name__ == "Llama4Router"


@pytest.fixture
def oracle() -> type[Oracle]:
    return Oracle


@pytest.fixture
def thresholds_at() -> Callable[..., Any]:
    """A profile whose thresholds drop about `skip` of the text and vision pairs of one call."""

    def at(model: nn.Module, profile: Any, inputs: dict[str, Any], skip: float) -> Any:
        if skip == 1.0:
            return profile.with_thresholds(tau_text=float("inf"), tau_vision=float("inf"))
        plain = Oracle(model, profile.with_thresholds(tau_text=0.0, tau_vision=0.0))
        with plain(), torch.no_grad():
            model(**{"use_cache": False, **inputs})
        taus = []
        for scores in plain.scores.values():
            ordered = torch.cat([s.flatten() for s in scores]).sort().values
            if not len(ordered):
                taus.append(0.0)
                continue
            # Half way between two scores: no pair lies on the threshold, where rounding would decide.
            at = min(int(skip * len(ordered)), len(ordered) - 1)
            below = ordered[at - 1] if at else ordered[0] * 0
            taus.append(float((below + ordered[at]) / 2) if at else 0.0)
        return profile.with_thresholds(tau_text=taus[0], tau_vision=taus[1])

    return at


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Compiled code of one test is not seen by the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
