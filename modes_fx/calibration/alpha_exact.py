"""alpha by dropping: for each block, KL(original || block dropped) at the answer tokens, in nats.

MoDES section 5.1, Eq. 4. The paper runs the whole model once for each block; here only what the block can
change runs again (`prefix`), which gives the same bits for half the work. Passes are not joined into one of
more rows: larger batches do the same for the throughput, and leave the values as they are.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.batches import Batch, batch_digest, changed
from modes_fx.blocks import Block
from modes_fx.calibration.distributed import Share
from modes_fx.calibration.prefix import DroppedRows, Prefix
from modes_fx.calibration.state import Journal, State, stale
from modes_fx.calibration.weight_scale import measure_scales
from modes_fx.call_rows import argument, find_rows
from modes_fx.encoder_memory import EncoderMemory
from modes_fx.errors import ModesError
from modes_fx.measure import answer_logits, check_finite, kl_sum
from modes_fx.modality import TEXT, VISION
from modes_fx.progress import Bar
from modes_fx.skipping import call_tokens, drop_block, skip


@dataclass(frozen=True)
class Variant:
    """What alpha means.

    Attributes:
        dropped: The modalities whose tokens lose a block's experts, one pass each; None: both at once.
        passes_input: Whether a dropped token is given the experts' input in place of their output, not zero.
        ahead: See `answer_logits`.
    """

    dropped: tuple[int | None, ...]
    passes_input: bool = False
    ahead: int = 1


VARIANTS = {
    "modality": Variant((TEXT, VISION)),
    # The paper's text: one alpha, experts skipped. Where it compares is not said; here at every answer token.
    "paper": Variant((None,)),
    # Its code, which differs from its text: dropped tokens pass around the experts, from after the norm, and
    # logits are compared at the answer's own positions, so the first answer token's prediction is left out.
    "modes-code": Variant((TEXT, VISION), passes_input=True, ahead=0),
}


@dataclass(frozen=True)
class Task:
    """What to measure on which model.

    Attributes:
        ids: Visual and special token ids.
        shares: What this process measures, in the order of the batches.
        digests: `batch_digest` of every batch.
        reuse: Whether only what a dropped block can change is run again.
    """

    model: nn.Module
    blocks: Sequence[Block]
    ids: tuple[tuple[int, ...], tuple[int, ...]]
    variant: Variant
    shares: Sequence[Share]
    digests: Sequence[str]
    reuse: bool = True


def measure_exact(task: Task, batches: Iterable[Batch], journal: Journal, bar: Bar) -> None:
    """Add this process's share of the batches to the journal's state, one batch after the other.

    Batch by batch, not block by block, so that only one batch's original pass is held at a time.

    Raises:
        ModesError: Logits that are not finite, or batches that are not what they were.
    """
    prefix = Prefix(task.model, task.blocks)
    if prefix.reason:
        prefix.give_up(prefix.reason)
    elif not task.reuse:
        prefix.reason, prefix.checked = "not wanted", True
    for share, batch in shared(task, batches, len(journal.state.batches)):
        kl_sums, scales, num_tokens = _measure_batch(task, share, batch, prefix, journal, bar)
        journal.keep(
            journal.state.with_batch(
                task.digests[share.batch],
                kl_sums,
                scales,
                len(batch["labels"]) if share.counts else 0,
                num_tokens if share.counts else 0,
            )
        )


def check_resumed(state: State, task: Task, bar: Bar) -> None:
    """Refuse a state whose batches are not the first ones of this process, and step over those."""
    if len(state.batches) > len(task.shares):
        raise stale(f"it has {len(state.batches)} batches, and there are only {len(task.shares)} now")
    for digest, share in zip(state.batches, task.shares, strict=False):
        if digest != task.digests[share.batch]:
            raise stale(f"batch {share.batch} is not the one it was started with")
    done = task.shares[: len(state.batches)]
    # In one step, so that the rate that is shown is that of the work itself.
    bar.step(sum(len(share.blocks) for share in done) * len(task.variant.dropped))


def shared(task: Task, batches: Iterable[Batch], done: int) -> Iterator[tuple[Share, Batch]]:
    """This process's shares with their batches, without the first `done` of them.

    Raises:
        ModesError: A batch is not the one that it was when the batches were first looked through.
    """
    shares = {share.batch: share for share in task.shares[done:]}
    seen = 0
    for index, batch in enumerate(batches):
        seen += 1
        if index in shares:
            if not isinstance(batch, Mapping) or batch_digest(batch) != task.digests[index]:
                raise ModesError(changed(index, len(task.digests)))
            yield shares[index], batch
    if seen != len(task.digests):
        raise ModesError(changed(seen, len(task.digests)))


def _measure_batch(
    task: Task, share: Share, batch: Batch, prefix: Prefix, journal: Journal, bar: Bar
) -> tuple[list[list[float]], list[list[float] | None], int]:
    """(KL sums of the blocks in `share`, weight scales, answer tokens)."""
    digest, index = task.digests[share.batch], share.batch
    encoder = EncoderMemory(task.model)
    scales = list(journal.state.weight_scales)
    rule = measure_scales(scales, index)

    def answers() -> Tensor:
        return answer_logits(task.model, batch, ahead=task.variant.ahead)

    with encoder.for_batch(index), skip(task.model, task.blocks, rule, *task.ids), prefix.recording():
        original = answers()
    check_finite(original, f"the original model, batch {index}")
    kl_sums = [[0.0] * len(task.variant.dropped) for _ in task.blocks]
    if not len(original):
        bar.step(len(share.blocks) * len(task.variant.dropped))
        return kl_sums, scales, 0

    def dropping(block: int, modality: int | None) -> Tensor:
        rule = DroppedRows(drop_block(block, modality), block)
        around = passing_input(task.blocks[block], rule) if task.variant.passes_input else nullcontext()
        hooks = skip(task.model, task.blocks, rule, *task.ids)
        with encoder.for_batch(index), hooks, around, prefix.before(block, rule):
            return answers()

    if not prefix.checked:

        def keeping() -> Tensor:
            with encoder.for_batch(index):
                return answers()

        prefix.check(keeping, lambda: dropping(len(task.blocks) - 1, None))
    modality = call_tokens(batch, *task.ids).modality
    for block in share.blocks:
        name = task.blocks[block].name
        for column, dropped in enumerate(task.variant.dropped):
            kl = journal.state.measured(digest, block, column)
            # Where no token is dropped, nothing changes.
            if kl is None and dropped is not None and not bool((modality == dropped).any()):
                kl = 0.0
            if kl is None:
                logits = dropping(block, dropped)
                # Rounding may leave it a hair below zero, which KL never is.
                kl = max(0.0, kl_sum(original, logits, f"batch {index}, {name} dropped"))
                journal.keep(journal.state.with_partial(digest, block, column, kl))
            kl_sums[block][column] = kl
            tokens = journal.state.num_tokens + len(original)
            bar.note(f"{name} KL {(journal.state.kl_sums[block][column] + kl) / tokens:.5f}")
            bar.step()
    prefix.forget()
    return kl_sums, scales, len(original)


@contextmanager
def passing_input(block: Block, rule: DroppedRows) -> Iterator[None]:
    """While open, rows that lose all their pairs come out of the experts as they went in."""
    if block.dispatch == "dense":
        raise ModesError(
            f'variant="modes-code" passes dropped tokens around the experts, but {block.name} is given each '
            "token once for each expert; use another variant."
        )

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        place = find_rows(args, kwargs)
        assert place is not None and rule.rows is not None
        given = argument(place, args, kwargs)
        if given.shape != output.shape:
            raise ModesError(
                f'variant="modes-code" passes dropped tokens around the experts, but those of {block.name} '
                f"turn rows of {given.shape[-1]} into rows of {output.shape[-1]}; use another variant."
            )
        return torch.where(rule.rows.to(output.device)[:, None], given.to(output.dtype), output)

    handle = block.experts.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
