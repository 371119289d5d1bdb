"""The oracle of the end-to-end tests, written without modes_fx: hooks on the unedited eager model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Oracle:
    """What the rule means: the weights of dropped pairs become zero, in transformers' own eager model.

    Counts pairs and dropped pairs over all tokens, so that a test can say that something was skipped.
    """

    def __init__(self, model: nn.Module, profile: Any) -> None:
        self.model = model
        self.profile = profile
        self.pairs = self.dropped = 0
        self.scores: dict[str, list[Tensor]] = {"text": [], "vision": []}
        self.kind: Tensor

    @contextmanager
    def __call__(self) -> Iterator["Oracle"]:
        self.pairs = self.dropped = 0
        experts = [m for m in self.model.modules() if type(m).__name__ == "Qwen3VLMoeTextExperts"]
        assert len(experts) == len(self.profile.layers)
        handles = [self.model.register_forward_pre_hook(self._see_tokens, with_kwargs=True)]
        for module, layer in zip(experts, self.profile.layers, strict=True):
            handles.append(module.register_forward_pre_hook(self._zero(layer)))
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

    def _zero(self, layer: Any) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, index, weights = args
            text, vision = self.kind == 0, self.kind == 1
            self.scores["text"].append(layer.alpha_text * weights[text].float())
            self.scores["vision"].append(layer.alpha_vision * weights[vision].float())
            drop = torch.zeros_like(weights, dtype=torch.bool)
            drop[text] = layer.alpha_text * weights[text].float() < self.profile.tau_text
            drop[vision] = layer.alpha_vision * weights[vision].float() < self.profile.tau_vision
            self.pairs += drop.numel()
            self.dropped += int(drop.sum())
            weights = weights.clone()
            weights[drop] = 0
            return hidden, index, weights

        return hook

    @property
    def skip(self) -> float:
        return self.dropped / self.pairs


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
            model(**inputs)
        taus = []
        for scores in plain.scores.values():
            ordered = torch.cat([s.flatten() for s in scores]).sort().values
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
