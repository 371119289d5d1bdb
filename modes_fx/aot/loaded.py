"""`modes_fx.load`: an exported folder as a callable, with torch and the target's own runtime alone."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modes_fx.aot.manifest import Manifest, Picture
from modes_fx.aot.positions import next_position_offset, picture_positions, token_positions
from modes_fx.aot.targets import Run, open_program
from modes_fx.errors import ExportError

# Inputs of a model that a program has no use for: they ask for what it always does, or repeat input_ids.
_IGNORED = {"mm_token_type_ids", "token_type_ids", "use_cache", "return_dict", "cache_position"}


@dataclass(frozen=True)
class Cache:
    """What decode needs of the tokens so far; belongs to the rows of one call.

    Attributes:
        layers: (key, value) of each layer, `[B, heads, P, D]`.
        offset: Position of the next token less the tokens of its row so far, `[B, 1]`, int64.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    offset: Tensor

    @property
    def num_tokens(self) -> int:
        """P, padding included."""
        return self.layers[0][0].shape[2]


@dataclass(frozen=True)
class Output:
    """What a call gives.

    Attributes:
        logits: `[B, S, vocabulary]`.
        past_key_values: To pass to the next call.
    """

    logits: Tensor
    past_key_values: Cache


class ExportedModel:
    """A model that `modes_fx.export` wrote; called as the model is, with keyword inputs.

        program = modes_fx.load(folder)
        output = program(input_ids=..., pixel_values=..., image_grid_thw=...)          # prefill
        output = program(input_ids=token, past_key_values=output.past_key_values)      # decode, one token

    It keeps nothing of a call, so that calls may come from several threads.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._programs = {
            name: open_program(folder, manifest, program) for name, program in manifest.programs.items()
        }
        self._pictures: dict[Picture, Run] = {
            picture: open_program(folder, manifest, picture.program) for picture in manifest.pictures
        }
        self._dtype: torch.dtype = getattr(torch, manifest.dtype)

    def __call__(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        **others: Any,
    ) -> Output:
        """Run prefill, or decode where a cache is given.

        Args:
            input_ids: `[B, S]`; with a cache `[B, 1]`.
            attention_mask: `[B, P + S]`, 1 for a token and 0 for padding; all ones when left out.
            position_ids: `[B, S]` or `[3, B, S]`; counted from the mask and the pictures when left out.
            past_key_values: Of the call before.
            pixel_values, image_grid_thw: Pictures, as the model's processor makes them.
            others: Inputs of the model that change nothing here are accepted.
        Raises:
            ValueError: Sizes that were not exported, or inputs that do not fit one another.
        """
        if past_key_values is None:
            tensors = self.prefill_tensors(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                pixel_values=pixel_values,
                image_grid_thw=image_grid_thw,
                **others,
            )
            offset = next_position_offset(tensors["position_ids"], tensors["attention_mask"])
            return self._output("prefill", tensors, offset)
        _check_known(others)
        if input_ids.shape[1] != 1:
            raise ValueError(
                f"decode takes one token a row, got {input_ids.shape[1]}; call it once for each of them."
            )
        if pixel_values is not None:
            raise ValueError("pixel_values belong to the prefill; a decode step takes none.")
        self.manifest.cache.check("cache", past_key_values.num_tokens)
        mask = self._mask(input_ids, attention_mask, past_key_values.num_tokens)
        if position_ids is None:
            position_ids = token_positions(mask)[:, -1:] + past_key_values.offset
            if self.manifest.merge_size is not None:
                position_ids = position_ids.expand(3, -1, -1)
        tensors = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
        for i, (key, value) in enumerate(past_key_values.layers):
            tensors |= {f"past_key_{i}": key, f"past_value_{i}": value}
        return self._output("decode", tensors, past_key_values.offset)

    def prefill_tensors(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        **others: Any,
    ) -> dict[str, Tensor]:
        """What the prefill program takes, by name, for a call with these inputs; pictures are encoded."""
        _check_known(others)
        self.manifest.tokens.check("tokens", input_ids.shape[1])
        mask = self._mask(input_ids, attention_mask, 0)
        grids = [] if image_grid_thw is None else image_grid_thw.tolist()
        features = self._features(input_ids, pixel_values, grids)
        positions = self._positions(input_ids, mask, grids, position_ids)
        return {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions, **features}

    def run(self, name: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Run `prefill` or `decode` on its own tensors, by the names in the manifest; gives its outputs."""
        program = self.manifest.programs[name]
        return self._programs[name]([tensors[key].contiguous() for key in program.inputs])

    def generate(self, *, max_new_tokens: int, **inputs: Any) -> Tensor:
        """Greedy answers to a prefill's inputs.

        Returns:
            `[B, n]`, int64, the new tokens alone, n at most `max_new_tokens`; after its end a row repeats it.
        """
        mask = inputs.pop("attention_mask", None)
        mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        # The answer to a row that is padded on its right follows its last token.
        device = mask.device
        last = (mask.long() * torch.arange(1, mask.shape[1] + 1, device=device)).argmax(dim=1).cpu()
        output = self(attention_mask=mask, **inputs)
        # Engines give logits where they ran, wherever the tokens are.
        token = output.logits[torch.arange(len(last)), last].argmax(-1, keepdim=True).to(device)
        ends = torch.tensor(self.manifest.eos_token_ids, dtype=token.dtype, device=device)
        found = [token]
        while len(found) < max_new_tokens and not bool(torch.isin(token, ends).all()):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            output = self(input_ids=token, attention_mask=mask, past_key_values=output.past_key_values)
            chosen = output.logits[:, -1].argmax(-1, keepdim=True).to(device)
            token = torch.where(torch.isin(token, ends), token, chosen)
            found.append(token)
        return torch.cat(found, dim=1)

    def _mask(self, input_ids: Tensor, given: Tensor | None, past: int) -> Tensor:
        rows, tokens = input_ids.shape
        self.manifest.batch.check("batch", rows)
        if given is None:
            return torch.ones(rows, past + tokens, dtype=torch.int64)
        if given.shape != (rows, past + tokens):
            raise ValueError(
                f"attention_mask must be {(rows, past + tokens)}, with the {past} tokens in the cache, got "
                f"{tuple(given.shape)}."
            )
        return given.long()

    def _positions(
        self, input_ids: Tensor, mask: Tensor, grids: Sequence[Sequence[int]], given: Tensor | None
    ) -> Tensor:
        if given is not None:
            return given
        merge_size, picture = self.manifest.merge_size, self.manifest.picture_token_id
        if merge_size is None or picture is None:
            return token_positions(mask)
        merged = [time * height * width // merge_size**2 for time, height, width in grids]
        num_placeholders = _count(input_ids, picture)
        if num_placeholders != sum(merged):
            raise ValueError(
                f"input_ids holds {num_placeholders} visual tokens, image_grid_thw says {sum(merged)}; pass "
                "the output of one call of the processor."
            )
        return picture_positions(input_ids, mask, grids, merge_size, picture)

    def _features(
        self, input_ids: Tensor, pixels: Tensor | None, grids: Sequence[Sequence[int]]
    ) -> dict[str, Tensor]:
        """The rows of all pictures, in the order of the placeholders; one row of zeros without a picture."""
        names = [name for name in self.manifest.programs["prefill"].inputs if name.startswith("feature_")]
        if not names:
            if pixels is not None:
                raise ValueError("This program was exported without a picture, and sees text alone.")
            return {}
        wanted = _count(input_ids, self.manifest.picture_token_id)
        if pixels is None:
            if wanted:
                raise ValueError(f"input_ids holds {wanted} visual tokens, and there are no pixel_values.")
            width = self.manifest.feature_size
            return {name: torch.zeros(1, width or 0, dtype=self._dtype) for name in names}
        found = [self._run_picture(piece, grid) for piece, grid in _pictures(pixels, grids)]
        features = [torch.cat(rows) for rows in zip(*found, strict=True)]
        if features[0].shape[0] != wanted:
            raise ValueError(
                f"input_ids holds {wanted} visual tokens, the pictures give {features[0].shape[0]}; pass the "
                "output of one call of the processor."
            )
        return dict(zip(names, features, strict=True))

    def _run_picture(self, pixels: Tensor, grid: tuple[int, ...] | None) -> list[Tensor]:
        for picture, run in self._pictures.items():
            if picture.grid == grid and picture.shape == tuple(pixels.shape):
                return run([pixels.to(self._dtype).contiguous()])
        sizes = ", ".join(str(picture.grid or picture.shape) for picture in self._pictures)
        raise ValueError(
            f"A picture is {grid or tuple(pixels.shape)}, and this program was exported for {sizes}; resize "
            "it, or export with a picture of that size among the inputs."
        )

    def _output(self, name: str, tensors: dict[str, Tensor], offset: Tensor) -> Output:
        logits, *cache = self.run(name, tensors)
        return Output(logits, Cache(tuple(zip(cache[::2], cache[1::2], strict=True)), offset))


def _check_known(others: Mapping[str, Any]) -> None:
    unknown = sorted(name for name, value in others.items() if name not in _IGNORED and value is not None)
    if unknown:
        raise TypeError(f"An exported program takes no {', '.join(unknown)}.")


def _count(input_ids: Tensor, token: int | None) -> int:
    return 0 if token is None else int(input_ids.eq(token).sum())


def load(path: str | os.PathLike[str]) -> ExportedModel:
    """Open a folder that `modes_fx.export` wrote, after checking every file of it.

    Needs torch and the target's runtime, not transformers. The files hold native code or graphs: load only
    what you trust; the sha256 sums tell accidents, not attackers.

    Raises:
        ExportError: Not such a folder, a file missing or changed, or a target that cannot run here.
    """
    folder = Path(path)
    if folder.is_file():
        raise ExportError(f"{folder} is a file; pass the folder that modes_fx.export wrote.")
    return ExportedModel(folder, Manifest.read(folder))


def _pictures(pixels: Tensor, grids: Sequence[Sequence[int]]) -> list[tuple[Tensor, tuple[int, ...] | None]]:
    if not grids:
        return [(pixels[i : i + 1], None) for i in range(pixels.shape[0])]
    sizes = [time * height * width for time, height, width in grids]
    if sum(sizes) != pixels.shape[0]:
        raise ValueError(
            f"pixel_values has {pixels.shape[0]} rows, image_grid_thw says {sum(sizes)}; pass the output of "
            "one call of the processor."
        )
    return list(zip(pixels.split(sizes), [tuple(grid) for grid in grids], strict=True))
