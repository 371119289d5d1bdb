"""What is exported of a model: prefill, decode, and the vision encoder for one picture.

    prefill   input_ids [B, S], attention_mask [B, S], positions, feature_0.. [V, H]
              -> logits [B, S, vocabulary], key_0, value_0, key_1, ...  each [B, heads, S, D]
    decode    input_ids [B, 1], attention_mask [B, P + 1], positions, past_key_0, past_value_0, ...
              -> logits [B, 1, vocabulary], key_0, value_0, ...  each [B, heads, P + 1, D]
    picture   pixel_values of one picture -> feature_0.. [N, H]

Positions are `[B, S]`, or `[3, B, S]` where the model tells time, height and width apart (M-RoPE). Batch,
tokens, cache and visual tokens are dynamic; a picture's size is not. Only tensors go in and out, so that
all targets take the same programs. This module needs transformers; what it makes does not.
"""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from modes_fx.aot.manifest import Range
from modes_fx.aot.positions import picture_positions, token_positions
from modes_fx.errors import ExportError

# Of transformers; other layers that hold keys and values hold more beside them.
_CACHE_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer"}


@dataclass(frozen=True)
class Traced:
    """A program, and the names of what goes in and comes out."""

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class TracedPicture:
    """The vision program of one picture size; see `manifest.Picture`."""

    traced: Traced
    shape: tuple[int, ...]
    grid: tuple[int, ...] | None
    rows: int


@dataclass(frozen=True)
class Sizes:
    """What is dynamic, and how far."""

    batch: Range
    tokens: Range
    cache: Range


@dataclass(frozen=True)
class TracedModel:
    """All programs of a model, not yet rewritten."""

    prefill: Traced
    decode: Traced
    pictures: tuple[TracedPicture, ...]
    sizes: Sizes
    merge_size: int | None
    picture_token_id: int | None
    feature_size: int | None


class _Step(nn.Module):
    """The model with tensors alone in its signature; called with what `names` says, in that order.

    `is_split`: the model wants the rows of its pictures as a tuple, not in one tensor.
    """

    def __init__(self, model: Any, names: Iterable[str], is_split: bool) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.is_split = is_split

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        given = dict(zip(self.names, tensors, strict=True))
        past = [given[name] for name in self.names if name.startswith("past_")]
        features = [given[name] for name in self.names if name.startswith("feature_")]
        output = self.model(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            position_ids=given["position_ids"],
            past_key_values=DynamicCache(list(zip(past[::2], past[1::2], strict=True))) if past else None,
            use_cache=True,
            return_dict=True,
            **self._pictures(features),
        )
        return (output.logits, *_cache_tensors(output))

    def _pictures(self, features: list[Tensor]) -> dict[str, Any]:
        """What the model would have got from its vision encoder; the inverse of `_rows`."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        if not features:
            return {}
        rows: list[Any] = [(each,) if self.is_split else each for each in features]
        output = BaseModelOutputWithPooling(pooler_output=rows[0])
        if len(rows) > 1:
            output.deepstack_features = rows[1:]
        return {"mm_encoder_outputs": {"image": output}}


class _Picture(nn.Module):
    """The vision encoder on one picture; what it reads off the picture's grid is constant."""

    def __init__(self, model: Any, grid: tuple[int, ...] | None) -> None:
        super().__init__()
        self.model = model
        self.grid = None if grid is None else torch.tensor([grid])
        self.read_off: dict[str, Any] = {}
        if grid is not None:
            from transformers.exporters.utils import precompute_export_inputs

            self.read_off = {"grid_thw": self.grid}
            precompute_export_inputs(model.get_encoder(modality="image"), self.read_off)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        if self.grid is None:
            output = self.model.get_image_features(pixel_values)
        else:
            output = self.model.get_encoder(modality="image")(pixel_values, **self.read_off)
        return tuple(_rows(output))


def trace(model: Any, batches: Sequence[Mapping[str, Tensor]], sizes: Sizes) -> TracedModel:
    """Trace a model's programs with `torch.export`.

    Args:
        model: An eager causal language model of transformers, text alone or with pictures.
        batches: Inputs of prefills. The first is traced; where it has pictures, the vision encoder is traced
            for each size of picture in any of them.
        sizes: Ranges of the dynamic dimensions.
    Raises:
        ExportError: The model, or what the inputs hold, cannot be exported; says what and what to do.
    """
    if not batches:
        raise ExportError("inputs must hold one batch at least, to trace with.")
    example = _Example(model, batches[0], sizes)
    with torch.no_grad(), _exportable(model):
        # Runs the model, which says best what its cache holds.
        decode_inputs = example.decode()
        prefill = _trace(
            _Step(model, example.prefill, example.is_split),
            example.prefill,
            _prefill_shapes(example.prefill, sizes),
        )
        step = _Step(model, decode_inputs, example.is_split)
        decode = _trace(step, decode_inputs, _decode_shapes(decode_inputs, sizes))
        sizes_of_pictures = _distinct_pictures(batches) if example.picture_token_id is not None else {}
        pictures = [_trace_picture(model, pixels, grid) for grid, pixels in sizes_of_pictures.items()]
    feature = example.prefill.get("feature_0")
    return TracedModel(
        prefill,
        decode,
        tuple(pictures),
        sizes,
        example.merge_size,
        example.picture_token_id,
        None if feature is None else feature.shape[-1],
    )


class _Example:
    """Inputs to trace with: two rows at least, for a size of one would be taken for a constant."""

    def __init__(self, model: Any, inputs: Mapping[str, Tensor], sizes: Sizes) -> None:
        if "input_ids" not in inputs:
            raise ExportError("inputs must hold input_ids: the modality of the tokens is read off them.")
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        repeats = 2 if ids.shape[0] == 1 and sizes.batch.max > 1 else 1
        if ids.shape[1] < 2:
            raise ExportError(f"inputs must hold at least two tokens, got {ids.shape[1]}.")
        ids, mask = ids.repeat(repeats, 1), mask.repeat(repeats, 1)
        for name, size, value in (
            ("batch", sizes.batch, ids.shape[0]),
            ("tokens", sizes.tokens, ids.shape[1]),
        ):
            if not size.min <= value <= size.max:
                raise ExportError(
                    f"inputs have {name} {value}, outside of dynamic[{name!r}] = ({size.min}, {size.max})."
                )
        self.model = model
        self.merge_size: int | None = None
        self.picture_token_id: int | None = None
        self.is_split = False
        features: list[Tensor] = []
        positions = token_positions(mask)
        if "pixel_values" in inputs:
            pixels, grids = inputs["pixel_values"], inputs.get("image_grid_thw")
            pixels = pixels.repeat(repeats, *[1] * (pixels.dim() - 1)).to(model.dtype)
            grids = None if grids is None else grids.repeat(repeats, 1)
            with torch.no_grad():
                output = _encode(model, pixels, grids)
            features, self.is_split = _rows(output), not isinstance(output.pooler_output, Tensor)
            self.picture_token_id = _picture_token_id(model)
            if hasattr(_inner(model), "get_rope_index"):
                positions = self._with_pictures(ids, mask, grids, inputs, repeats)
        self.prefill: dict[str, Tensor] = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            **{f"feature_{i}": rows for i, rows in enumerate(features)},
        }

    def _with_pictures(
        self, ids: Tensor, mask: Tensor, grids: Tensor | None, inputs: Mapping[str, Tensor], repeats: int
    ) -> Tensor:
        """Positions by our own count, which must be the model's."""
        assert grids is not None and self.picture_token_id is not None
        inner = _inner(self.model)
        self.merge_size = int(inner.config.vision_config.spatial_merge_size)
        kinds = inputs.get("mm_token_type_ids", inputs["input_ids"].eq(self.picture_token_id).long())
        wanted = dict(
            input_ids=ids,
            image_grid_thw=grids,
            attention_mask=mask,
            mm_token_type_ids=kinds.repeat(repeats, 1),
        )
        takes = inspect.signature(inner.get_rope_index).parameters
        theirs, _ = inner.get_rope_index(**{name: v for name, v in wanted.items() if name in takes})
        ours = picture_positions(ids, mask, grids.tolist(), self.merge_size, self.picture_token_id)
        real = mask.bool()
        if not torch.equal(ours[:, real], theirs[:, real]):
            raise ExportError(
                f"{type(self.model).__name__} counts positions of pictures in a way that an exported program "
                "cannot follow; serve it with torch.compile."
            )
        return ours

    def decode(self) -> dict[str, Tensor]:
        """One more token for each row, after the prefill."""
        _, *cache = _Step(self.model, self.prefill, self.is_split)(*self.prefill.values())
        mask, positions = self.prefill["attention_mask"], self.prefill["position_ids"]
        return {
            "input_ids": self.prefill["input_ids"][:, -1:],
            "attention_mask": torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1),
            "position_ids": positions[..., -1:] + 1,
            **{f"past_{name}": each for name, each in zip(_cache_names(len(cache)), cache, strict=True)},
        }


def _trace(module: nn.Module, inputs: Mapping[str, Tensor], shapes: Any) -> Traced:
    program = torch.export.export(
        module,
        # Strides are constants of a compiled program, and every call passes contiguous tensors.
        tuple(tensor.contiguous() for tensor in inputs.values()),
        dynamic_shapes=None if shapes is None else (tuple(shapes),),
        strict=False,
        # Guards on strides that hold for every size, and that torch cannot show to.
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    drop_asserts(program)
    num_outputs = len(program.graph_signature.user_outputs)
    if isinstance(module, _Picture):
        outputs = tuple(f"feature_{i}" for i in range(num_outputs))
    else:
        outputs = ("logits", *_cache_names(num_outputs - 1))
    return Traced(program, tuple(inputs), outputs)


def _trace_picture(model: Any, pixels: Tensor, grid: tuple[int, ...] | None) -> TracedPicture:
    from transformers.exporters.utils import apply_patches

    pixels = pixels.to(model.dtype)
    wanted = _rows(_encode(model, pixels, None if grid is None else torch.tensor([grid])))
    module = _Picture(model, grid)
    # Attention within each picture loops over the pictures; transformers has its exporters' way around that.
    with apply_patches("dynamo"):
        traced = _trace(module, {"pixel_values": pixels}, None)
    found = traced.program.module()(pixels)
    if not all(torch.allclose(f, w, atol=1e-2, rtol=1e-2) for f, w in zip(found, wanted, strict=True)):
        raise ExportError(
            f"{type(model).__name__}'s vision encoder, exported, does not give what the model gives; leave "
            "pixel_values out for a program that sees text alone."
        )
    return TracedPicture(traced, tuple(pixels.shape), grid, wanted[0].shape[0])


def _prefill_shapes(inputs: Mapping[str, Tensor], sizes: Sizes) -> Iterator[dict[int, Any]]:
    batch, tokens = _dim("batch", sizes.batch), _dim("tokens", sizes.tokens)
    visual = Dim("visual_tokens", min=1, max=sizes.batch.max * sizes.tokens.max)
    for name, value in inputs.items():
        if name.startswith("feature_"):
            yield {0: visual}
        else:
            yield {value.dim() - 2: batch, value.dim() - 1: tokens}


def _decode_shapes(inputs: Mapping[str, Tensor], sizes: Sizes) -> Iterator[dict[int, Any]]:
    batch, past = _dim("batch", sizes.batch), Dim("past", min=sizes.cache.min, max=sizes.cache.max)
    for name, value in inputs.items():
        if name.startswith("past_"):
            yield {0: batch, 2: past}
        elif name == "attention_mask":
            yield {0: batch, 1: past + 1}
        else:
            yield {value.dim() - 2: batch}


def _dim(name: str, size: Range) -> Any:
    return Dim.STATIC if size.min == size.max else Dim(name, min=size.min, max=size.max)


def _encode(model: Any, pixels: Tensor, grids: Tensor | None) -> Any:
    """What the model's vision encoder gives its language model."""
    if not hasattr(model, "get_image_features"):
        raise ExportError(
            f"{type(model).__name__} has no get_image_features, so its pictures cannot be exported; leave "
            "pixel_values out for a program that sees text alone."
        )
    return model.get_image_features(pixels, **({} if grids is None else {"image_grid_thw": grids}))


def _rows(output: Any) -> list[Tensor]:
    """Rows of all pictures, `[V, H]`, and as many for each layer that is to get more of them (deep-stack)."""
    rows = getattr(output, "pooler_output", None)
    if rows is None:
        raise ExportError(
            "The model's vision encoder gives no pooler_output; its pictures cannot be exported."
        )
    found = [rows, *(getattr(output, "deepstack_features", None) or [])]
    whole = [each if isinstance(each, Tensor) else torch.cat(list(each)) for each in found]
    return [each.reshape(-1, each.shape[-1]) for each in whole]


def _cache_tensors(output: Any) -> list[Tensor]:
    """Key and value of each layer, as `_cache_names` has them."""
    layers = getattr(output.get("past_key_values"), "layers", [])
    foreign = {type(layer).__name__ for layer in layers} - _CACHE_LAYERS
    if foreign or not layers:
        raise ExportError(
            f"The model's cache holds {', '.join(sorted(foreign)) or 'no layers'}, and only layers of keys "
            "and values alone can be exported; serve the model with torch.compile."
        )
    return [getattr(layer, name) for layer in layers for name in ("keys", "values")]


def _cache_names(number: int) -> list[str]:
    return [f"{kind}_{i}" for i in range(number // 2) for kind in ("key", "value")]


def _distinct_pictures(batches: Sequence[Mapping[str, Tensor]]) -> dict[tuple[int, ...] | None, Tensor]:
    """One picture of each size, by its grid; one in all where the model has no grids."""
    found: dict[tuple[int, ...] | None, Tensor] = {}
    for batch in batches:
        pixels, grids = batch.get("pixel_values"), batch.get("image_grid_thw")
        if pixels is None:
            continue
        pieces = pixels.split(1 if grids is None else grids.prod(-1).tolist())
        keys = [None] * len(pieces) if grids is None else [tuple(grid) for grid in grids.tolist()]
        for key, piece in zip(keys, pieces, strict=True):
            found.setdefault(key, piece.contiguous())
    return found


def _picture_token_id(model: Any) -> int:
    for key in ("image_token_id", "image_token_index", "media_placeholder_token_id"):
        token = getattr(model.config, key, None)
        if token is not None:
            return int(token)
    raise ExportError(f"{type(model).__name__}'s configuration does not name the placeholder of a picture.")


def _inner(model: Any) -> Any:
    return getattr(model, "model", model)


def drop_asserts(program: ExportedProgram) -> None:
    """Remove checks of what `loaded.py` checks itself, and says in words; no target has use for them."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and "_assert" in str(node.target):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


@contextlib.contextmanager
def _exportable(model: Any) -> Iterator[None]:
    """While open, what no exporter can follow is written differently, with the same result."""
    from transformers import cache_utils

    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(Tensor, "masked_scatter", _masked_scatter))
        # The window is cut by the mask; layers that cut their keys too count tokens in Python.
        for name in ("update", "get_mask_sizes", "get_seq_length"):
            whole = getattr(cache_utils.DynamicLayer, name)
            stack.enter_context(patch(cache_utils.DynamicSlidingWindowLayer, name, whole))
        for module in model.modules():
            if hasattr(module, "_deepstack_process"):
                stack.enter_context(patch(module, "_deepstack_process", _add_features, create=True))
        yield


def _masked_scatter(self: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """`Tensor.masked_scatter` for whole rows, as a gather: its size depends on no value.

    Rows that the source lacks are zero.
    """
    width = self.shape[-1]
    rows = mask.expand_as(self)[..., 0]
    place = (rows.reshape(-1).long().cumsum(0) - 1).clamp(min=0)
    padded = torch.cat([source.reshape(-1, width), source.new_zeros(1, width)]).to(self.dtype)
    return torch.where(rows.unsqueeze(-1), padded[place].reshape(self.shape), self)


def _add_features(hidden: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
    return hidden + _masked_scatter(torch.zeros_like(hidden), visual_pos_masks.unsqueeze(-1), visual_embeds)
