"""What one compiled graph is to the passes: the profile, the real tensors behind its inputs, its reports."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from modes_fx.profile import Layer, Profile, fingerprint

# Where the modality of a graph's tokens comes from, in the order in which they are tried.
FROM_TOKEN_IDS = "token ids in this graph"
FROM_OTHER_GRAPH = "token ids of another graph of the same call"
FROM_EMBEDDINGS = "rows of the embedding table"
UNKNOWN = "unknown"


@dataclass
class BlockReport:
    """What became of one block: `layer` is None where its router is not in the profile."""

    layer: str | None
    rewritten: bool
    reason: str
    num_experts: int | None = None
    top_k: int | None = None
    max_error: float | None = None


@dataclass
class Unit:
    """One graph on its way through the passes.

    Attributes:
        profile: The constants to bake in.
        inputs: The real tensors (and ints) that the graph's placeholders stand for, in order; what a pass
            reads of a parameter it reads here, since the graph itself holds fake tensors.
        modality_is_known: Another graph of this call has seen the token ids.
        embeds: Index of the input that holds embedded tokens, or None.
        modality: The node of the tokens' modality, `[T]`, uint8, once a pass has provided it.
        modality_source: One of the constants above; None in a graph without blocks or tokens.
        extra_inputs: Names of inputs that the passes added at the end, in order.
        gives_modality: The graph returns the modality as one more, last output.
        blocks: One report for each block seen.
        counts: Rewrites by pass name.
        routers: Index among the inputs of each router weight that the profile knows, and its layer.
    """

    profile: Profile
    inputs: list[Any]
    modality_is_known: bool = False
    embeds: int | None = None
    modality: Node | None = None
    modality_source: str | None = None
    extra_inputs: list[str] = field(default_factory=list)
    gives_modality: bool = False
    blocks: list[BlockReport] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    routers: dict[int, Layer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Here and not in a pass: while passes run, fake tensors are in force.
        for index, value in enumerate(self.inputs):
            if may_be_router(self.profile, value):
                layer = self.profile.layer_for(fingerprint(value))
                if layer is not None:
                    self.routers[index] = layer

    def real(self, placeholder: Node) -> Any:
        """The real tensor behind a placeholder."""
        return self.inputs[_index(placeholder)]

    def layer_of(self, router: Node) -> Layer | None:
        """The profile's layer whose router weight this placeholder is, known by its numbers, not by name."""
        return self.routers.get(_index(router))

    def layers(self) -> list[str]:
        """Names of the layers that this graph runs rewritten, in graph order."""
        return [block.layer for block in self.blocks if block.rewritten and block.layer is not None]


def _index(placeholder: Node) -> int:
    return [node for node in placeholder.graph.nodes if node.op == "placeholder"].index(placeholder)


def is_token_embedding(profile: Profile, weight: Any) -> bool:
    """Whether `weight` has the shape of the model's token embedding, `[vocabulary, H]`."""
    shape = getattr(weight, "shape", None)
    return shape is not None and tuple(shape) == (profile.vocab_size, profile.hidden_size)


def may_be_router(profile: Profile, value: Any) -> bool:
    """Whether a real input could be a router weight of the profile, by shape alone."""
    return (
        isinstance(value, torch.nn.Parameter | Tensor)
        and value.dim() == 2
        and value.is_floating_point()
        and any(value.shape[0] == layer.num_experts for layer in profile.layers)
    )
