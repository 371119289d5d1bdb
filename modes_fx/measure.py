"""Run a model on batches and compare answers: KL(original || skipped) in nats, and the skip rate.

Shared by calibration, search and the comparison policies, so that all numbers come from one place.
"""

import hashlib
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modes_fx.batches import (
    IGNORED,
    NOT_INPUTS,
    Batch,
    Survey,
    batch_digest,
    changed,
    check_batches,
    checked_labels,
    survey,
    token_phase,
)
from modes_fx.blocks import embedding_shape, find_blocks, unwrap
from modes_fx.encoder_memory import EncoderMemory
from modes_fx.errors import ModesError
from modes_fx.modality import MODALITY_NAMES, TEXT, VISION
from modes_fx.progress import Bar
from modes_fx.skipping import DECODE, NO_PHASE, PREFILL, Counts, Rule, Tokens, keep_all, skip

# Random numbers that the bootstrap holds at a time.
_DRAWS = 1 << 22
_MODALITIES = len(MODALITY_NAMES)


@dataclass(frozen=True)
class Measured:
    """What one pass over the batches with a rule gave. A sample is a row of a batch.

    Attributes:
        kl: KL(original || skipped), mean over answer tokens, nats.
        counts: Pairs and dropped pairs, per block and modality.
        right: Per sample, whether every answer token is the likeliest one given the answer before it; that
            is when greedy generation gives the answer.
        kl_sums: Per sample, the KL summed over its answer tokens, nats.
        flips: Per sample, answer tokens whose likeliest token is not the original model's.
        answer_tokens: Per sample, how many answer tokens it has.
        tasks: Per sample, the name of its task, "" where its batch names none.
        phases: `counts` of the tokens of the prefill and of the decode alone, see `token_phase`.
    """

    kl: float
    counts: Counts
    right: tuple[bool, ...] = ()
    kl_sums: tuple[float, ...] = ()
    flips: tuple[int, ...] = ()
    answer_tokens: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    phases: tuple[Counts, Counts] | None = None

    @property
    def skip(self) -> float:
        return self.counts.skip()

    @property
    def skip_text(self) -> float:
        return self.counts.skip(TEXT)

    @property
    def skip_vision(self) -> float:
        return self.counts.skip(VISION)

    @property
    def skip_prefill(self) -> float:
        return self.phases[PREFILL].skip() if self.phases else 0.0

    @property
    def skip_decode(self) -> float:
        return self.phases[DECODE].skip() if self.phases else 0.0

    @property
    def flip_rate(self) -> float:
        """Share of the answer tokens whose likeliest token is not the original model's, 0..1."""
        return sum(self.flips) / sum(self.answer_tokens) if self.flips else 0.0

    @property
    def accuracy(self) -> dict[str, float]:
        """Per task that the batches name, in order of appearance, the share of its samples that is right."""
        right: dict[str, list[bool]] = defaultdict(list)
        for task, verdict, tokens in zip(self.tasks, self.right, self.answer_tokens, strict=True):
            if task and tokens:
                right[task].append(verdict)
        return {task: sum(verdicts) / len(verdicts) for task, verdicts in right.items()}

    def kl_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of `kl` over other samples of the same kind, see `bootstrap`.

        Studentised, as a few samples make most of KL: on the demo model, with 65 to 260 of 650 samples, 92 to
        96 % of such intervals held the KL of all, and 84 to 92 % of those by plain percentiles.
        """
        low, high = bootstrap(self.kl_sums, self.answer_tokens, level=level, studentised=True)
        return max(0.0, low), high


def bootstrap(
    sums: Sequence[float],
    counts: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    studentised: bool = False,
) -> tuple[float, float]:
    """Confidence interval of sum(sums) / sum(counts) by drawing the samples anew, with replacement.

    Percentiles of the ratio over the draws. Whole samples are drawn, for tokens of one answer hang together.
    (Efron and Tibshirani, An Introduction to the Bootstrap, chapters 12 and 13.)

    Args:
        sums, counts: Per sample; e.g. KL and answer tokens, or right answers and ones.
        level: Share of the intervals that cover what is estimated, between 0 and 1.
        studentised: Percentiles of the ratio's distance in standard errors instead (bootstrap-t); better for
            skewed samples, and may leave the range of the ratio.
    Returns:
        (low, high); the same arguments give the same interval.
    """
    if not sums:
        raise ValueError("bootstrap needs at least one sample.")
    both = np.stack([np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)])
    generator = np.random.default_rng(seed)
    quantiles = [(1 - level) / 2, (1 + level) / 2]
    drawn: list[Any] = []
    at_once = max(1, _DRAWS // len(sums))
    for start in range(0, resamples, at_once):
        size = (min(at_once, resamples - start), len(sums))
        drawn.append(_ratios(both[:, generator.integers(len(sums), size=size)]))
    ratios, errors = np.concatenate(drawn, axis=1)
    (ratio,), (error,) = _ratios(both[:, None])
    if not studentised:
        low, high = np.quantile(ratios, quantiles)
    elif not (errors > 0).any():
        low = high = ratio
    else:
        # A draw of equal samples has no error to measure a distance in.
        certain = errors > 0
        far, near = np.quantile((ratios - ratio)[certain] / errors[certain], quantiles)[::-1]
        low, high = ratio - far * error, ratio - near * error
    return float(low), float(high)


def _ratios(samples: Any) -> Any:
    """Of each draw, the ratio of its sums and the standard error of that: `[2, draws, n]` to `[2, <= draws]`.

    Draws that count nothing are left out.
    """
    totals = samples.sum(-1)
    samples, totals = samples[:, totals[1] > 0], totals[:, totals[1] > 0]
    ratios = totals[0] / totals[1]
    misses = samples[0] - ratios[:, None] * samples[1]
    return np.stack([ratios, np.sqrt((misses**2).sum(-1)) / totals[1]])


@dataclass
class Pass:
    """What the first `batches` batches of a pass gave; a killed pass goes on from it.

    The counts are `[blocks][phases * modalities]`; the others are per sample, as in `Measured`.
    """

    batches: int = 0
    kl_sums: list[float] = field(default_factory=list)
    flips: list[int] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    pairs: list[list[int]] = field(default_factory=list)
    dropped: list[list[int]] = field(default_factory=list)


class Meter:
    """Measures rules on a model and batches. The original answers are computed once and kept on the CPU.

    Args:
        model: Eager model; a compiled one is unwrapped.
        batches: Re-iterable of dicts: the model's keyword inputs, `labels` (`[B, S]`, -100 is ignored) and,
            if the rows belong to tasks, `task`: the name of one task for all, or a list of one name a row.
        visual_token_ids, special_token_ids: See `token_modality`.
        surveyed: What `survey` said of the batches, if it was asked already.
        observe: A rule asked during the unskipped pass, e.g. to record scores; it drops nothing.
    Attributes:
        survey: What the batches hold.
        unskipped: What the original model measures: KL zero, nothing dropped, its right answers.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        visual_token_ids: Sequence[int],
        special_token_ids: Sequence[int],
        *,
        surveyed: Survey | None = None,
        observe: Rule | None = None,
        bar: Bar | None = None,
    ) -> None:
        self.model = unwrap(model)
        check_device(self.model)
        self.blocks = find_blocks(self.model)
        self.batches = check_batches(batches)
        self.ids = (visual_token_ids, special_token_ids)
        self.survey = surveyed or survey(self.batches, *self.ids, embedding_shape(self.model)[0])
        self.encoder = EncoderMemory(self.model)
        self.original: list[Tensor] = []
        self.unskipped = self._run(observe or keep_all, None, False, bar, Pass(), None)
        self.num_samples = self.survey.num_samples
        self.num_tokens = self.survey.num_answer_tokens
        self.counts = self.unskipped.counts

    def measure(
        self,
        rule: Rule,
        *,
        renormalise: bool = False,
        bar: Bar | None = None,
        done: Pass | None = None,
        after_batch: Callable[[Pass], None] | None = None,
    ) -> Measured:
        """One pass over all batches with `rule`.

        Args:
            done: Where a killed pass with the same rule had got to.
            after_batch: Called after each batch with the pass so far, to keep it.
        Raises:
            ModesError: The batches changed since the first pass, or logits are not finite.
        """
        return self._run(rule, self.original, renormalise, bar, done or Pass(), after_batch)

    def _run(
        self,
        rule: Rule,
        original: list[Tensor] | None,
        renormalise: bool,
        bar: Bar | None,
        done: Pass,
        after_batch: Callable[[Pass], None] | None,
    ) -> Measured:
        """A pass; without `original` it is the first one, and fills in what later ones compare with."""
        # Phases are counted beside modalities: a column for each of both.
        device = self.blocks[0].router_weight.device
        nothing = [[0] * 3 * _MODALITIES] * len(self.blocks)
        counts = Counts(
            torch.tensor(done.pairs or nothing, device=device),
            torch.tensor(done.dropped or nothing, device=device),
        )
        phase = torch.empty(0)

        def counted(block: int, weights: Tensor, tokens: Tokens) -> Tensor:
            dropped = rule(block, weights, tokens)
            assert tokens.phase is not None
            counts.add(block, dropped, Tokens(tokens.phase * _MODALITIES + tokens.modality, tokens.real))
            return dropped

        seen, digests = 0, self.survey.digests
        hooks = skip(
            self.model, self.blocks, counted, *self.ids, renormalise=renormalise, phase=lambda: phase
        )
        with evaluating(self.model), hooks:
            for index, batch in enumerate(self.batches):
                seen += 1
                if seen > len(digests) or batch_digest(batch) != digests[index]:
                    raise ModesError(changed(index, len(digests)))
                if bar is not None:
                    bar.step()
                if index < done.batches:
                    continue
                phase = token_phase(checked_labels(batch))
                with self.encoder.for_batch(index):
                    logits = answer_logits(self.model, batch)
                if original is None:
                    check_finite(logits, f"the original model, batch {index}")
                    self.original.append(logits.cpu())
                _add_answers(done, batch, self.original[index], logits, f"batch {index}")
                done.batches = index + 1
                if after_batch is not None:
                    done.pairs, done.dropped = counts.pairs.tolist(), counts.dropped.tolist()
                    after_batch(done)
        if seen != self.survey.num_batches or len(done.right) != self.survey.num_samples:
            raise ModesError(changed(seen, self.survey.num_batches))
        pairs, dropped = (
            each.cpu().unflatten(1, (3, _MODALITIES)) for each in (counts.pairs, counts.dropped)
        )
        return Measured(
            kl=max(0.0, math.fsum(done.kl_sums) / self.survey.num_answer_tokens),
            counts=Counts(pairs.sum(1), dropped.sum(1)),
            right=tuple(done.right),
            kl_sums=tuple(done.kl_sums),
            flips=tuple(done.flips),
            answer_tokens=self.survey.answer_tokens,
            tasks=self.survey.tasks,
            phases=(
                Counts(pairs[:, PREFILL], dropped[:, PREFILL]),
                Counts(pairs[:, DECODE], dropped[:, DECODE]),
            ),
        )


def _add_answers(done: Pass, batch: Batch, original: Tensor, logits: Tensor, where: str) -> None:
    """Add what each row of a batch answered to a pass."""
    rows = (checked_labels(batch)[:, 1:] != IGNORED).nonzero()[:, 0]
    kl = kl_per_token(original, logits, where).cpu()
    flipped = logits.argmax(-1).cpu() != original.argmax(-1).cpu()
    num_rows = len(batch["labels"])
    done.kl_sums += torch.zeros(num_rows, dtype=torch.float64).index_add_(0, rows, kl).tolist()
    done.flips += rows[flipped].bincount(minlength=num_rows).tolist()
    done.right += answered(batch, logits)


class WeightRecorder:
    """A rule for `Meter(observe=...)` that keeps the routing weight of every pair, of text and of vision."""

    def __init__(self) -> None:
        self._weights: dict[tuple[int, int, int], list[Tensor]] = {}

    def __call__(self, block: int, weights: Tensor, tokens: Tokens) -> Tensor:
        phase = torch.zeros_like(tokens.modality) if tokens.phase is None else tokens.phase
        for modality in (TEXT, VISION):
            for part in (PREFILL, DECODE, NO_PHASE):
                chosen = weights[(tokens.modality == modality) & (phase == part) & tokens.real]
                self._weights.setdefault((block, modality, part), []).append(chosen.flatten().cpu())
        return keep_all(block, weights, tokens)

    def scores(self, modality: int, alphas: Sequence[float], phase: int | None = None) -> Tensor:
        """alpha * weight of every pair of the modality, all blocks, ascending, `[pairs]` float32.

        Args:
            alphas: One per block, in layer order.
            phase: Only the pairs of this phase.
        """
        parts = (PREFILL, DECODE, NO_PHASE) if phase is None else (phase,)
        scaled = [
            torch.tensor(alpha, dtype=torch.float32) * torch.cat(self._weights[block, modality, part])
            for block, alpha in enumerate(alphas)
            for part in parts
        ]
        return torch.cat(scaled).sort().values


def check_device(model: nn.Module) -> None:
    """Refuse a model that has no values, unless accelerate brings them from where they are for each call."""
    empty = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if empty is not None and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ModesError(f"{empty} is on the meta device and has no values; load the model first.")


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Parameters without gradients, which would take the memory of another model."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the modes of all modules are put back as they were.

    A model that was compiled in place runs eagerly meanwhile: the hooks must see every layer, and what is
    measured must not skip already.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True


def answer_logits(model: nn.Module, batch: Batch, *, ahead: int = 1) -> Tensor:
    """The logits that predict each answer token, the first one included.

    Position p predicts token p + 1, so the logits at p are taken where `labels[:, p + 1]` is not -100.
    The model is called without labels (no loss is computed) and without a cache.

    Args:
        ahead: 0 takes the logits at the answer's own positions instead, as the code of MoDES does.
    Returns:
        `[answer tokens, vocabulary]`, row by row of the batch, in the model's dtype.
    """
    device = getattr(model, "device", torch.device("cpu"))
    if device.type == "meta":
        # Its weights are brought in for each call; accelerate moves the inputs to them.
        device = torch.device("cpu")
    labels = checked_labels(batch).to(device)
    given = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
    inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in given.items()}
    rows, columns = (labels[:, ahead:] != IGNORED).nonzero(as_tuple=True)
    known = inspect.signature(model.forward).parameters
    # Only the columns that answer are projected to the vocabulary, where the model can do so.
    keep = columns.unique()
    narrowed = "logits_to_keep" in known and len(keep) > 0
    if narrowed:
        inputs["logits_to_keep"] = keep
        columns = torch.searchsorted(keep, columns)
    output = model(**inputs, use_cache=False)
    logits = output.logits if hasattr(output, "logits") else output[0]
    expected = len(keep) if narrowed else labels.shape[1]
    if logits.shape[:2] != (len(labels), expected):
        raise ModesError(
            f"The model gave logits of shape {tuple(logits.shape)} for {len(labels)} x {expected} positions; "
            "models that change the length of the sequence are not supported."
        )
    return logits[rows, columns]


def answered(batch: Batch, logits: Tensor) -> list[bool]:
    """Per row of the batch, whether the argmax of its `answer_logits` is its label everywhere."""
    labels = torch.as_tensor(batch["labels"])[:, 1:]
    answer = labels != IGNORED
    wrong = torch.zeros_like(answer)
    wrong[answer] = logits.argmax(-1).cpu() != labels[answer].cpu()
    return (~wrong.any(1)).tolist()


def kl_per_token(original: Tensor, skipped: Tensor, where: str) -> Tensor:
    """KL(original || skipped) of each answer token, nats, `[answer tokens]` float64.

    The logits are what the model gave; the logarithms are taken in float64, because the KL of a block that
    hardly matters (1e-8 and below) drowns in the rounding of float32.
    """
    check_finite(skipped, f"the skipped model, {where}")
    log_p = original.to(skipped.device, torch.float64).log_softmax(-1)
    log_q = skipped.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_sum(original: Tensor, skipped: Tensor, where: str) -> float:
    """Sum over answer tokens of `kl_per_token`."""
    return float(kl_per_token(original, skipped, where).sum())


def check_finite(logits: Tensor, where: str) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise ModesError(
            f"The logits of {where} contain NaN or infinity at an answer token; "
            "check the inputs, or load the model in float32 or bfloat16."
        )


def model_digest(model: nn.Module) -> str:
    """sha256 over every parameter's name, shape, dtype and, if it is in memory, 64 of its values: cheap, and
    enough to tell two checkpoints of one architecture apart."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        some: list[float] = []
        # What is offloaded to a disk, or spread over processes, would have to be brought in whole.
        if not parameter.is_meta and not hasattr(parameter, "full_tensor"):
            flat = parameter.detach().flatten()
            some = flat[:: max(1, len(flat) // 64)][:64].double().tolist()
        values = [f"{value:.9g}" for value in some]
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {values}".encode())
    return digest.hexdigest()
