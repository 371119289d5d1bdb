"""What one compiled graph is to the passes: the profile, the real tensors behind its inputs, its reports."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils.weak import WeakIdKeyDictionary

from modes_fx.profile import Layer, Profile, fingerprint
from modes_fx.thresholds import Thresholds

# Where the modality of a graph's tokens comes from, in the order in which they are tried.
FROM_TOKEN_IDS = "token ids"
FROM_OTHER_GRAPH = "another graph"
FROM_ARGUMENTS = "arguments of the call"
FROM_EMBEDDINGS = "embedded tokens"
UNKNOWN = "unknown"

NOT_IN_PROFILE = "its router is not in the profile"


@dataclass
class BlockReport:
    """What became of one block.

    Attributes:
        layer: Its name in the profile, or None where its router is not in the profile.
        rewritten: It is now `masked_moe`, with the layer's constants.
        reason: Why it is not, else empty.
        max_error: The largest relative difference that the proof of the rewrite saw.
        traits: What its router and experts are like, e.g. "grouped_mm, sigmoid router, silu(gate) * up".
        specialised: What its constants let the passes simplify, e.g. `("top 8 -> 3", "no mask")`.
    """

    layer: str | None
    rewritten: bool
    reason: str
    num_experts: int | None = None
    top_k: int | None = None
    max_error: float | None = None
    traits: str = ""
    specialised: tuple[str, ...] = ()


@dataclass
class Unit:
    """One graph on its way through the passes.

    Attributes:
        profile: The constants to bake in.
        inputs: The real tensors (and ints) that the graph's placeholders stand for, in order; what a pass
            reads of a parameter it reads here, since the graph itself holds fake tensors.
        modality_elsewhere: Where the wrapper has the modality from, if this graph has no token ids; one of
            the constants above.
        thresholds: Read when the graph runs, in place of constants; None to bake the profile's in.
        counting: The graph returns how many pairs it dropped, as of `count_pairs`, as its last output.
        embeds: Index of the input that holds embedded tokens, to be read in the graph itself; None to leave
            that to the wrapper.
        modality: The node of the tokens' modality, `[T]`, uint8, once a pass has provided it.
        modality_source: Where it comes from, likewise; None in a graph without blocks or tokens.
        extra_inputs: Names of inputs that the passes added at the end, in order.
        why_no_modality: The reason that blocks are given where `modality` is None.
        gives_modality: The graph returns the modality as one more output.
        gives_counts: It returns its counts as one more output, the last one.
        thresholds_input: The node of the thresholds, `[2]`, where they are an input.
        blocks: One report for each block seen.
        counts: Rewrites by pass name.
        routers: Index among the inputs of each router weight that the profile knows, and its layer.
        compile_id: Dynamo's name of the compile, `frame/number`; a number above 0 is a recompile.
        fingerprint: How to fingerprint a router weight; `Fingerprints` remembers.
    """

    profile: Profile
    inputs: list[Any]
    modality_elsewhere: str = UNKNOWN
    thresholds: Thresholds | None = None
    counting: bool = False
    embeds: int | None = None
    modality: Node | None = None
    modality_source: str | None = None
    extra_inputs: list[str] = field(default_factory=list)
    gives_modality: bool = False
    gives_counts: bool = False
    thresholds_input: Node | None = None
    why_no_modality: str = "no modality was provided (the pass provide_modality is switched off)"
    blocks: list[BlockReport] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    routers: dict[int, Layer] = field(default_factory=dict)
    compile_id: str = ""
    fingerprint: Callable[[Tensor], str] = fingerprint
    _positions: dict[Node, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # Here and not in a pass: while passes run, fake tensors are in force.
        for index, value in enumerate(self.inputs):
            if may_be_router(self.profile, value):
                layer = self.profile.layer_for(self.fingerprint(value))
                if layer is not None:
                    self.routers[index] = layer

    def real(self, placeholder: Node) -> Any:
        """The real tensor behind a placeholder."""
        return self.inputs[self._position(placeholder)]

    def layer_of(self, router: Node) -> Layer | None:
        """The profile's layer whose router weight this placeholder is, known by its numbers, not by name."""
        return self.routers.get(self._position(router))

    def layers(self) -> list[str]:
        """Names of the layers that this graph runs rewritten, in graph order."""
        return [block.layer for block in self.blocks if block.rewritten and block.layer is not None]

    def specialise(self, layer: str, how: str) -> None:
        """Note what a layer's constants let a pass simplify."""
        for block in self.blocks:
            if block.layer == layer and block.rewritten:
                block.specialised = (*block.specialised, how)

    def close(self) -> None:
        """Let go of what only compiling needs: it would keep activations and the graph alive."""
        self.inputs, self.modality, self.thresholds_input, self._positions = [], None, None, {}

    def _position(self, placeholder: Node) -> int:
        # Passes add placeholders at the end alone, so positions stay what they were.
        if placeholder not in self._positions:
            found = placeholder.graph.find_nodes(op="placeholder")
            self._positions = {node: index for index, node in enumerate(found)}
        return self._positions[placeholder]


class Fingerprints:
    """`fingerprint` that remembers: a recompile does not hash the same weights again."""

    def __init__(self) -> None:
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __call__(self, weight: Tensor) -> str:
        # Weights that were made under inference mode have no version to look at.
        state = None if weight.is_inference() else (weight.data_ptr(), weight._version)
        known, digest = self._known.get(weight, (None, ""))
        if state is None or known != state:
            digest = fingerprint(weight)
            self._known[weight] = (state, digest)
        return str(digest)


def is_token_embedding(profile: Profile, weight: Any) -> bool:
    """Whether `weight` has the shape of the model's token embedding, `[vocabulary, H]`."""
    shape = getattr(weight, "shape", None)
    return shape is not None and tuple(shape) == (profile.vocab_size, profile.hidden_size)


_SHARED = 8


def may_be_router(profile: Profile, value: Any) -> bool:
    """Whether a real input could be a router weight of the profile, by shape alone."""
    return (
        isinstance(value, torch.nn.Parameter | Tensor)
        and value.dim() == 2
        and value.is_floating_point()
        # Some routers also weigh the shared experts, a few rows more.
        and any(0 <= value.shape[0] - layer.num_experts <= _SHARED for layer in profile.layers)
    )
