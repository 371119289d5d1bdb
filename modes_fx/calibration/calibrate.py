"""alpha: how much each MoE block matters, as KL(original || block's routed experts off) on answers, in nats.

MoDES section 5.1 (Eq. 4) and appendix B; where the paper's code differs, the choice is named below.
"""

import dataclasses
import hashlib
import importlib.metadata
import math
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from modes_fx.batches import Batch, Survey, survey
from modes_fx.blocks import Block, embedding_shape, find_blocks, unwrap
from modes_fx.calibration.alpha_exact import VARIANTS, Task, check_resumed, measure_exact
from modes_fx.calibration.alpha_taylor import ESTIMATES, finished, measure_taylor, rank_correlation
from modes_fx.calibration.distributed import World, total, world_of
from modes_fx.calibration.state import Journal, State
from modes_fx.errors import ModesError
from modes_fx.measure import check_device, evaluating, model_digest
from modes_fx.modality import TEXT, VISION
from modes_fx.profile import Layer, Profile, fingerprint, normalise
from modes_fx.progress import progress_bar

VariantName = Literal["modality", "paper", "modes-code"]
Method = Literal["exact", "taylor", "taylor-gate", "taylor-loss"]
METHODS = ("exact", *ESTIMATES)
_VISUAL_KEYS = (
    *("image_token_id", "video_token_id", "image_token_index", "video_token_index"),
    *("media_placeholder_token_id", "visual_indicator_token_ids"),
)
_SPECIAL_ENDINGS = ("start_token_id", "end_token_id", "start_token_index", "end_token_index")
_SPECIAL_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "im_start_id", "im_end_id")


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    processor: Any = None,
    special_token_ids: Sequence[int] | None = None,
    variant: VariantName = "modality",
    method: Method = "exact",
    check: int = 0,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
    reuse: bool = True,
) -> Profile:
    """Measure alpha of every MoE block.

    For each block the model runs again with that block's routed output at zero (shared experts stay), and
    the answers are compared with the original ones: KL(original || skipped) at every answer token, the
    first one included, averaged over answer tokens, then divided by the sum over blocks.

    Under torchrun, or in processes that `torch.distributed` joins, each process measures a part of the
    batches (of the blocks, where there are too few batches), and all return the same profile.

    Args:
        model: A transformers mixture-of-experts model; a compiled one is unwrapped. Left as it was.
        batches: Can be iterated over again; dicts of the model's keyword inputs and `labels` (`[B, S]`,
            -100 is ignored). The model is called without the labels.
        processor: Where special token ids come from, when they are not given: `processor.tokenizer`.
        special_token_ids: Ids that are neither text nor vision; the visual ids are taken out of them.
        variant: `modality`: one alpha for text and one for vision, each summing to 1 over the blocks, from
            passes that drop a block for tokens of one modality only. `paper`: one alpha for both.
            `modes-code`, what the paper's code does: like `modality`, but dropped tokens get the experts'
            input in place of their output, and the answer's prediction of its first token is left out, while
            the logits at its last token count.
        method: `exact`, or an estimate for all blocks from one forward and one backward pass per batch, see
            `modes_fx.calibration.alpha_taylor`: `taylor`, or the two that follow the exact alpha less well,
            `taylor-gate` and `taylor-loss`.
        check: With an estimate, measure the exact alpha too, on the first batches with so many samples, and
            print on standard error how much alike the two rank the blocks.
        progress: Show a bar.
        resume: File to keep what is measured in. A killed run that is started again with it goes on where
            it was, and gives the same profile to the byte. It is written every 20 seconds, or after each
            forward pass where that takes longer. Of several processes each has a file of its own beside it.
        reuse: Run only what a dropped block can change again. The values are the same to the bit; a model
            where they would not be is found out on the first batch, and takes whole passes.
    Returns:
        A profile with both thresholds at 0.0: it skips nothing before `search` sets them.
    Raises:
        ModesError: No MoE block, unusable batches, or logits that are not finite.
    """
    if variant not in VARIANTS:
        raise ModesError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}.")
    if method not in METHODS:
        raise ModesError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if method != "exact" and variant == "modes-code":
        raise ModesError('variant="modes-code" is only measured, not estimated; use method="exact".')
    model = unwrap(model)
    check_device(model)
    blocks = find_blocks(model)
    ids = token_ids(model, processor, special_token_ids)
    meaning = VARIANTS[variant]
    with world_of(model) as world:
        with world.together():
            found = survey(batches, *ids, embedding_shape(model)[0], ahead=meaning.ahead)
            _check_modalities(found, meaning.dropped, bool(ids[0]))
            digests = list(found.digests)
            routers = [fingerprint(block.router_weight) for block in blocks]
            identity = hashlib.sha256(f"{model_digest(model)} {routers}".encode()).hexdigest()
        everything = repr((identity, variant, method, ids, digests))
        world.agree(hashlib.sha256(everything.encode()).hexdigest(), "model or batches")
        key = {
            "model": identity,
            "variant": variant,
            "method": method,
            "visual_token_ids": list(ids[0]),
            "special_token_ids": list(ids[1]),
        }
        if world.size > 1:
            key["num_batches"] = str(len(digests))  # which decides what each process measures

        def measured(
            how: Method, title: str, batches: Iterable[Batch], digests: Sequence[str], path: Any
        ) -> State:
            shares = world.shares(len(digests), len(blocks))
            task = Task(model, blocks, ids, meaning, shares, digests, reuse)
            fresh = State.fresh(key, len(blocks), len(meaning.dropped))
            steps = len(meaning.dropped) * sum(len(share.blocks) for share in shares)
            with (
                world.together(),
                Journal(path, fresh) as journal,
                progress_bar(title, steps, enabled=progress and world.first) as bar,
                evaluating(model),
            ):
                check_resumed(journal.state, task, bar)
                if how == "exact":
                    measure_exact(task, batches, journal, bar)
                else:
                    measure_taylor(task, batches, journal, bar, how)
            state = _combine(world, journal.state)
            if how == "exact":
                return state
            return dataclasses.replace(state, kl_sums=finished(state.kl_sums, how))

        state = measured(method, "calibrate", batches, digests, world.file(resume))
        if method != "exact" and check:
            some = _first(batches, check)
            exact = measured("exact", "check", some, digests[: len(some)], None)
            if world.first:
                sys.stderr.write(_comparison(state, exact))
    return _profile(state, model, blocks, variant if method == "exact" else f"{variant}, {method}", *ids)


def _check_modalities(found: Survey, dropped: Iterable[int | None], sees_pictures: bool) -> None:
    """Refuse batches that show nothing of what alpha is measured for."""
    for modality in dropped:
        if modality == TEXT and not found.tokens[TEXT]:
            raise ModesError("No batch has a text token, so alpha for text cannot be measured.")
        if modality == VISION and sees_pictures and not found.tokens[VISION]:
            raise ModesError(
                "No batch has a picture, so alpha for vision cannot be measured; add batches with pictures, "
                'or use variant="paper", which measures one alpha for text and vision together.'
            )


def _first(batches: Iterable[Batch], num_samples: int) -> list[Batch]:
    """The first batches that hold `num_samples` rows, or all."""
    some: list[Batch] = []
    for batch in batches:
        if sum(len(taken["labels"]) for taken in some) >= num_samples:
            break
        some.append(batch)
    return some


def _comparison(estimated: State, exact: State) -> str:
    columns = zip(zip(*estimated.kl_sums, strict=True), zip(*exact.kl_sums, strict=True), strict=True)
    found = [rank_correlation(*pair) for pair in columns]
    names = ("both",) if len(found) == 1 else ("text", "vision")
    said = ", ".join(f"{name} {value:.3f}" for name, value in zip(names, found, strict=True))
    return f"Rank correlation with the exact alpha of {exact.num_samples} samples: {said}.\n"


def _combine(world: World, state: State) -> State:
    """The states of all processes as one."""
    counts = torch.tensor([state.num_samples, state.num_tokens], dtype=torch.float64)
    num_samples, num_tokens = map(int, total(world.gather(counts)))
    kl_sums = total(world.gather(torch.tensor(state.kl_sums, dtype=torch.float64)))
    none = [math.inf, 1.0]
    found = world.gather(torch.tensor([scale or none for scale in state.weight_scales], dtype=torch.float64))
    scales = [min(entries) for entries in found.transpose(0, 1).tolist()]
    return dataclasses.replace(
        state, num_samples=num_samples, num_tokens=num_tokens, kl_sums=kl_sums, weight_scales=scales
    )


def _profile(
    state: State,
    model: nn.Module,
    blocks: Sequence[Block],
    method: str,
    visual: tuple[int, ...],
    special: tuple[int, ...],
) -> Profile:
    scales = [1.0 if scale is None else scale[1] for scale in state.weight_scales]
    columns = zip(*state.kl_sums, strict=True)
    alphas = [normalise([kl_sum / state.num_tokens for kl_sum in column]) for column in columns]
    layers = tuple(
        Layer(
            name=block.name,
            alpha_text=alphas[0][i],
            alpha_vision=alphas[-1][i],
            num_experts=block.num_experts,
            top_k=block.top_k,
            fingerprint=fingerprint(block.router_weight),
            weight_scale=scales[i],
        )
        for i, block in enumerate(blocks)
    )
    vocab_size, hidden_size = embedding_shape(model)
    return Profile(
        layers=layers,
        tau_text=0.0,
        tau_vision=0.0,
        visual_token_ids=visual,
        special_token_ids=special,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_samples=state.num_samples,
        method=method,
        versions=library_versions(),
    )


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
