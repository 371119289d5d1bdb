"""alpha: how much each MoE block matters, as KL(original || block's routed experts off) on answers, in nats.

MoDES section 5.1 (Eq. 4) and appendix B; where the paper's code differs, the choice is named below.
"""

import importlib.metadata
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modes_fx.blocks import Block, find_blocks, unwrap
from modes_fx.errors import ModesError, ProfileError
from modes_fx.measure import (
    Batch,
    EncoderMemory,
    answer_logits,
    batch_digest,
    check_batches,
    check_finite,
    evaluating,
    kl_sum,
    model_digest,
    no_answers,
)
from modes_fx.modality import TEXT, VISION
from modes_fx.profile import Layer, Profile, fingerprint, normalise, write_atomically
from modes_fx.progress import Bar, progress_bar
from modes_fx.skipping import Rule, Tokens, drop_block, keep_all, skip

Variant = Literal["modality", "paper"]
# What is dropped, one forward each: "modality" is what the paper's code does, "paper" what its text says.
_DROPPED: dict[str, tuple[int | None, ...]] = {"modality": (TEXT, VISION), "paper": (None,)}
_RESUME_FORMAT = "modes_fx.calibration"
_VISUAL_KEYS = (
    *("image_token_id", "video_token_id", "image_token_index", "video_token_index"),
    *("media_placeholder_token_id", "visual_indicator_token_ids"),
)
_SPECIAL_ENDINGS = ("start_token_id", "end_token_id", "start_token_index", "end_token_index")
_SPECIAL_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "im_start_id", "im_end_id")


@dataclass
class _State:
    """What has been measured so far; all that a killed run needs to go on.

    `kl_sums[block][i]` is the sum over answer tokens, in nats, of what `_DROPPED[variant][i]` drops.
    `weight_scales[block]` is `weight_scale` of the first batch that gave the block tokens; None before.
    """

    key: dict[str, Any]
    batches: list[str]
    num_samples: int
    num_tokens: int
    kl_sums: list[list[float]]
    weight_scales: list[float | None]


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    processor: Any = None,
    special_token_ids: Sequence[int] | None = None,
    variant: Variant = "modality",
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
) -> Profile:
    """Measure alpha of every MoE block.

    For each block the model runs again with that block's routed output at zero (shared experts stay), and
    the answers are compared with the original ones: KL(original || skipped) at every answer token, the
    first one included, averaged over answer tokens, then divided by the sum over blocks.

    Args:
        model: A transformers mixture-of-experts model; a compiled one is unwrapped. Left as it was.
        batches: Can be iterated over again; dicts of the model's keyword inputs and `labels` (`[B, S]`,
            -100 is ignored). The model is called without the labels.
        processor: Where special token ids come from, when they are not given: `processor.tokenizer`.
        special_token_ids: Ids that are neither text nor vision; the visual ids are taken out of them.
        variant: `modality`: one alpha for text and one for vision, each summing to 1 over the blocks, from
            passes that drop a block for tokens of one modality only. `paper`: one alpha for both.
        progress: Show a bar.
        resume: File to keep what is measured in. A killed run that is started again with it goes on where
            it was, and gives the same profile to the byte.
    Returns:
        A profile with both thresholds at 0.0: it skips nothing before `search` sets them.
    Raises:
        ModesError: No MoE block, unusable batches, or logits that are not finite.
    """
    if variant not in _DROPPED:
        raise ModesError(f"variant must be one of {', '.join(_DROPPED)}, got {variant!r}.")
    model = unwrap(model)
    blocks = find_blocks(model)
    batches = check_batches(batches)
    visual, special = token_ids(model, processor, special_token_ids)
    state = _load_state(resume, model, variant, visual, special, blocks)
    passes = len(blocks) * len(_DROPPED[variant])
    total = len(batches) * passes if isinstance(batches, Sized) else None
    with progress_bar("calibrate", total, enabled=progress) as bar, evaluating(model):
        for _ in _measured(model, blocks, batches, variant, (visual, special), state, bar):
            if resume is not None:
                write_atomically(resume, json.dumps({"format": _RESUME_FORMAT, **vars(state)}) + "\n")
    if not state.num_tokens:
        raise ModesError(no_answers(len(state.batches)))
    return _profile(state, model, blocks, variant, visual, special)


def _measured(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Iterable[Batch],
    variant: Variant,
    ids: tuple[tuple[int, ...], tuple[int, ...]],
    state: _State,
    bar: Bar,
) -> Iterator[None]:
    """Add one batch after the other to `state`; yields after each.

    Batch by batch, not block by block, so that only one batch's original logits are held at a time.
    """
    done = list(state.batches)
    dropped = _DROPPED[variant]
    seen = 0
    for index, batch in enumerate(batches):
        seen += 1
        digest = batch_digest(batch) if isinstance(batch, Mapping) else ""
        if index < len(done):
            if digest != done[index]:
                raise _stale(f"batch {index} is not the one it was started with")
            bar.step(len(blocks) * len(dropped))
            continue
        encoder = EncoderMemory(model)
        scales = list(state.weight_scales)
        with encoder.for_batch(index), skip(model, blocks, _measure_scales(scales), *ids):
            original = answer_logits(model, batch)
        check_finite(original, f"the original model, batch {index}")
        sums = [list(row) for row in state.kl_sums]
        for i, block in enumerate(blocks if len(original) else ()):
            for j, modality in enumerate(dropped):
                with encoder.for_batch(index), skip(model, blocks, drop_block(i, modality), *ids):
                    logits = answer_logits(model, batch)
                sums[i][j] += kl_sum(original, logits, f"batch {index}, {block.name} dropped")
                bar.note(f"{block.name} KL {sums[i][j] / (state.num_tokens + len(original)):.5f}")
                bar.step()
        # All of a batch or nothing of it: what is written is always a whole number of batches.
        state.kl_sums, state.weight_scales = sums, scales
        state.batches.append(digest)
        state.num_samples += len(batch["labels"])
        state.num_tokens += len(original)
        yield
    if seen < len(done):
        raise _stale(f"it has {len(done)} batches, and there are only {seen} now")


def weight_scale(weights: Tensor) -> float:
    """The factor that a router has folded into its weights, told from the weights themselves.

    A router that renormalises gives every token weights of one sum, 1 or the factor; any other gives sums
    that differ from token to token, and its weights are then taken as they are.

    Args:
        weights: Routing weights of two tokens or more, `[T, K]`, floating point; also widened from a
            narrower dtype.
    Returns:
        What the weights of each token sum to, with no more digits than their dtype vouches for; 1.0 where the
        sums differ by more than rounding, or all weights are alike, which says nothing.
    """
    narrow = [d for d in (torch.bfloat16, torch.float16) if torch.equal(weights.to(d).to(weights), weights)]
    # Routers add up to 1e-6 to the sum that they divide by.
    rounding = torch.finfo(narrow[0]).eps if narrow else 1e-5
    sums = weights.double().sum(-1)
    mean = float(sums.mean())
    differ = float((sums - mean).abs().max()) > 2 * rounding * mean
    alike = float(weights.max() - weights.min()) <= 2 * rounding * float(weights.max())
    if not mean > 0 or differ or alike:
        return 1.0
    shortest = (float(f"{mean:.{digits}g}") for digits in range(1, 17))
    return next((scale for scale in shortest if abs(scale - mean) <= rounding * mean), mean)


def _measure_scales(scales: list[float | None]) -> Rule:
    """A rule that drops nothing and fills in `weight_scale` of each block that has none yet."""

    def rule(block: int, weights: Tensor, tokens: Tokens) -> Tensor:
        real = weights[tokens.real]
        if scales[block] is None and len(real) > 1:
            scales[block] = weight_scale(real)
        return keep_all(block, weights, tokens)

    return rule


def _profile(
    state: _State,
    model: nn.Module,
    blocks: Sequence[Block],
    variant: Variant,
    visual: tuple[int, ...],
    special: tuple[int, ...],
) -> Profile:
    # Rounding may leave a sum a hair below zero, which KL never is.
    columns = [[max(0.0, total) for total in column] for column in zip(*state.kl_sums, strict=True)]
    alphas = [normalise([total / state.num_tokens for total in column]) for column in columns]
    layers = tuple(
        Layer(
            name=block.name,
            alpha_text=alphas[0][i],
            alpha_vision=alphas[-1][i],
            num_experts=block.num_experts,
            top_k=block.top_k,
            fingerprint=fingerprint(block.router_weight),
            weight_scale=state.weight_scales[i] or 1.0,
        )
        for i, block in enumerate(blocks)
    )
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    return Profile(
        layers=layers,
        tau_text=0.0,
        tau_vision=0.0,
        visual_token_ids=visual,
        special_token_ids=special,
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        num_samples=state.num_samples,
        method=variant,
        versions=library_versions(),
    )


def _load_state(
    resume: str | os.PathLike[str] | None,
    model: nn.Module,
    variant: str,
    visual: tuple[int, ...],
    special: tuple[int, ...],
    blocks: Sequence[Block],
) -> _State:
    key = {
        "model": model_digest(model) if resume is not None else "",
        "variant": variant,
        "visual_token_ids": list(visual),
        "special_token_ids": list(special),
    }
    fresh = _State(key, [], 0, 0, [[0.0] * len(_DROPPED[variant]) for _ in blocks], [None] * len(blocks))
    if resume is None or not Path(resume).exists():
        return fresh
    try:
        saved = json.loads(Path(resume).read_text())
        if saved.pop("format") != _RESUME_FORMAT:
            raise ValueError
        state = _State(**saved)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ProfileError(
            f"{os.fspath(resume)} is not a file that calibrate(resume=...) wrote; delete it, or name another."
        ) from None
    for name, value in key.items():
        if state.key.get(name) != value:
            raise _stale(f"{name} differs from what it was started with")
    return state


def _stale(why: str) -> ProfileError:
    return ProfileError(f"The resume file belongs to another calibration: {why}; delete it, or name another.")


def token_ids(
    model: nn.Module, processor: Any = None, special_token_ids: Sequence[int] | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(visual, special) token ids of a model, both sorted and without an id in common.

    Visual ids come from the configuration. Special ids are the ones given, else the tokenizer's
    `all_special_ids`, else, with a warning, those that the configuration happens to name.
    """
    configs = [config for config in (getattr(model, "config", None),) if config is not None]
    configs += [c for c in (getattr(configs[0], "text_config", None),) if c is not None] if configs else []
    visual = _ids(configs, _VISUAL_KEYS)
    if not visual and any(getattr(config, "vision_config", None) is not None for config in configs):
        raise ModesError(
            f"{type(model).__name__} sees pictures, but its configuration names no visual token id "
            f"({', '.join(_VISUAL_KEYS[:2])}, ...); set config.image_token_id to the picture placeholder."
        )
    if special_token_ids is None and processor is not None:
        tokenizer = getattr(processor, "tokenizer", processor)
        special_token_ids = getattr(tokenizer, "all_special_ids", None)
        if special_token_ids is None:
            raise ModesError(
                f"{type(processor).__name__} has no tokenizer with all_special_ids; pass special_token_ids."
            )
    if special_token_ids is None:
        generation = getattr(model, "generation_config", None)
        places = [*configs, *([generation] if generation is not None else [])]
        named = {key for place in places for key in vars(place) if key.endswith(_SPECIAL_ENDINGS)}
        special_token_ids = sorted(_ids(places, (*_SPECIAL_KEYS, *named)))
        warnings.warn(
            "No processor and no special_token_ids were given: only the ids that its configuration names, "
            f"{list(special_token_ids)}, count as special, and other chat markers may be skipped as text.",
            stacklevel=3,
        )
    return tuple(sorted(visual)), tuple(sorted({int(i) for i in special_token_ids} - visual))


def _ids(places: Sequence[Any], keys: Iterable[str]) -> set[int]:
    found: set[int] = set()
    for place in places:
        for key in keys:
            value = getattr(place, key, None)
            entries = value if isinstance(value, list | tuple) else [value]
            found.update(int(i) for i in entries if isinstance(i, int) and i >= 0)
    return found


def library_versions() -> dict[str, str]:
    """Versions of what a profile depends on; a library that is not installed is left out."""
    versions = {}
    for name in ("modes-fx", "torch", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
