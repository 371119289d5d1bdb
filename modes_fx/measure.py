"""Run a model on batches and compare answers: KL(original || skipped) in nats, and the skip rate.

Shared by calibration, search and the comparison policies, so that all numbers come from one place.
"""

import hashlib
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modes_fx.blocks import find_blocks, is_experts, unwrap
from modes_fx.errors import ModesError
from modes_fx.modality import MODALITY_NAMES, TEXT, VISION
from modes_fx.progress import Bar
from modes_fx.skipping import (
    DECODE,
    NO_PHASE,
    PREFILL,
    Counts,
    Rule,
    Tokens,
    call_tokens,
    keep_all,
    skip,
)

Batch = Mapping[str, Any]
IGNORED = -100
# What a batch says about its rows; the model is not called with it.
NOT_INPUTS = ("labels", "task")
# Vision towers are run once per batch and remembered up to this much; beyond it they are run again.
ENCODER_MEMORY_BYTES = 4 << 30
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
        """Confidence interval of `kl` over other samples of the same kind, see `bootstrap`."""
        return bootstrap(self.kl_sums, self.answer_tokens, level=level)


def bootstrap(
    sums: Sequence[float],
    counts: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Confidence interval of sum(sums) / sum(counts) by drawing the samples anew, with replacement.

    Percentiles of the ratio over the draws. Whole samples are drawn, for tokens of one answer hang together.

    Args:
        sums, counts: Per sample; e.g. KL and answer tokens, or right answers and ones.
        level: Share of the intervals that cover what is estimated, between 0 and 1.
    Returns:
        (low, high); the same arguments give the same interval.
    """
    if not sums:
        raise ValueError("bootstrap needs at least one sample.")
    both = np.stack([np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)])
    generator = np.random.default_rng(seed)
    ratios: list[Any] = []
    at_once = max(1, _DRAWS // len(sums))
    for start in range(0, resamples, at_once):
        drawn = generator.integers(len(sums), size=(min(at_once, resamples - start), len(sums)))
        total, count = both[:, drawn].sum(-1)
        ratios.append(total[count > 0] / count[count > 0])
    low, high = np.quantile(np.concatenate(ratios), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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
        observe: A rule asked during the unskipped pass, e.g. to record scores; it drops nothing.
    Attributes:
        survey: What the batches hold, see `Survey`.
        digests: `batch_digest` of each batch.
        unskipped: What the original model measures: KL zero, nothing dropped, its right answers.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        visual_token_ids: Sequence[int],
        special_token_ids: Sequence[int],
        *,
        observe: Rule | None = None,
        bar: Bar | None = None,
    ) -> None:
        self.model = unwrap(model)
        check_device(self.model)
        self.blocks = find_blocks(self.model)
        self.batches = check_batches(batches)
        self.ids = (visual_token_ids, special_token_ids)
        self.survey = survey(self.batches, *self.ids)
        self.encoder = EncoderMemory(self.model)
        self.original: list[Tensor] = []
        self.digests: list[str] = []
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

        seen = 0
        hooks = skip(
            self.model, self.blocks, counted, *self.ids, renormalise=renormalise, phase=lambda: phase
        )
        with evaluating(self.model), hooks:
            for index, batch in enumerate(self.batches):
                seen += 1
                if original is not None and (
                    index >= len(original) or batch_digest(batch) != self.digests[index]
                ):
                    raise ModesError(changed(index, len(original)))
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
                    self.digests.append(batch_digest(batch))
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


@dataclass(frozen=True)
class Survey:
    """What batches hold, known before any model runs on them.

    Attributes:
        num_batches: How many there are.
        answer_tokens: Per sample, labels that are not -100 and have a token before them.
        tasks: Per sample, the name of its task, or "".
        tokens: Real tokens of each modality.
        decode_tokens: Real tokens of the phase DECODE that can be skipped.
    """

    num_batches: int
    answer_tokens: tuple[int, ...]
    tasks: tuple[str, ...]
    tokens: tuple[int, int, int]
    decode_tokens: int

    @property
    def num_samples(self) -> int:
        return len(self.answer_tokens)

    @property
    def num_answer_tokens(self) -> int:
        return sum(self.answer_tokens)


def survey(
    batches: Iterable[Batch], visual_token_ids: Sequence[int], special_token_ids: Sequence[int]
) -> Survey:
    """Look through the batches for what would otherwise fail hours later, and count what is in them.

    Raises:
        ModesError: No batches, a batch that is not a dict with labels of the shape of its `input_ids`, no
            answer token in any, or task names that do not fit the rows.
    """
    answers: list[int] = []
    tasks: list[str] = []
    tokens = torch.zeros(_MODALITIES, dtype=torch.int64)
    decode = num_batches = 0
    for batch in batches:
        num_batches += 1
        labels = checked_labels(batch)
        answers += (labels[:, 1:] != IGNORED).sum(1).tolist()
        tasks += _task_names(batch, len(labels))
        called = call_tokens(batch, visual_token_ids, special_token_ids)
        tokens += called.modality[called.real].cpu().long().bincount(minlength=_MODALITIES)
        in_decode = (token_phase(labels).flatten() == DECODE) & called.real.cpu()
        decode += int((called.modality.cpu()[in_decode] <= VISION).sum())
    if not sum(answers):
        raise ModesError(no_answers(num_batches))
    text, vision, other = tokens.tolist()
    return Survey(num_batches, tuple(answers), tuple(tasks), (text, vision, other), decode)


def token_phase(labels: Tensor) -> Tensor:
    """Where generation would compute each token: `[B, S]` uint8, PREFILL, DECODE or NO_PHASE.

    The answer is generated token by token, so each of its tokens but the last is an input of its own
    (DECODE); the last one ends the answer, and nothing is computed from it or after it (NO_PHASE). All else
    is the prompt, also between two answers of a conversation, where it holds the end of the first.

    Args:
        labels: `[B, S]`, -100 everywhere but at the answer.
    """
    answer = labels != IGNORED
    following = torch.cat([answer[:, 1:], torch.zeros_like(answer[:, :1])], 1)
    phase = torch.where(answer & following, DECODE, PREFILL)
    # From the last answer token of the row on.
    later = following.flip(1).cumsum(1).flip(1) > 0
    phase = torch.where(~later & answer.any(1, keepdim=True), NO_PHASE, phase)
    return phase.to(torch.uint8)


def _task_names(batch: Batch, num_rows: int) -> list[str]:
    task = batch.get("task", "")
    names = [task] * num_rows if isinstance(task, str) else list(task)
    if len(names) != num_rows or not all(isinstance(name, str) for name in names):
        raise ModesError(
            f"task must be one name, or a list of one name for each of the {num_rows} rows, got {task!r}."
        )
    return names


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


def check_batches(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Refuse what cannot be run over again."""
    if isinstance(batches, Iterator):
        raise ModesError(
            f"batches must be run over several times, and a {type(batches).__name__} is exhausted after the "
            "first; pass a list of dicts, or an object whose __iter__ starts again."
        )
    if isinstance(batches, Mapping):
        raise ModesError("batches must be an iterable of dicts, got one dict; wrap it in a list.")
    return batches


def check_device(model: nn.Module) -> None:
    """Refuse a model that has no values, unless accelerate brings them from where they are for each call."""
    empty = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if empty is not None and not getattr(model, "hf_device_map", None):
        raise ModesError(f"{empty} is on the meta device and has no values; load the model first.")


def changed(index: int, expected: int) -> str:
    return (
        f"The batches differ between two passes: the first gave {expected}, and batch {index} is missing or "
        "not what it was; pass batches that give the same dicts each time they are iterated over."
    )


def no_answers(num_batches: int) -> str:
    if not num_batches:
        return "batches is empty; pass at least one dict of model inputs with labels."
    return "No answer token in any batch: all labels are -100; put the answer's token ids into labels."


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


def checked_labels(batch: Batch) -> Tensor:
    """The labels of a batch, `[B, S]`, on the CPU; refuses what is not a batch."""
    if not isinstance(batch, Mapping):
        raise ModesError(f"Each batch must be a dict of model inputs and labels, got {type(batch).__name__}.")
    if batch.get("labels") is None:
        raise ModesError("A batch has no labels; add labels [B, S], -100 everywhere but at the answer.")
    labels = torch.as_tensor(batch["labels"]).cpu()
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or labels.shape != ids.shape:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else None
        raise ModesError(f"labels must have the shape of input_ids, got {tuple(labels.shape)} and {shape}.")
    return labels


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


class EncoderMemory:
    """Remembers what the vision tower gave for each batch: it lies before every expert, so skipping cannot
    change it, and it costs more than a small decoder. Without a tower, or past the limit, does nothing."""

    def __init__(self, model: nn.Module, limit_bytes: int = ENCODER_MEMORY_BYTES) -> None:
        find = getattr(model, "get_encoder", None)
        tower = find("image") if find is not None else model
        alone = tower is not model and not any(is_experts(module) for module in tower.modules())
        self._tower = tower if alone else None
        self._outputs: dict[tuple[int, int], Any] = {}
        self._left_bytes = limit_bytes

    def forget(self) -> None:
        self._outputs.clear()

    @contextmanager
    def for_batch(self, index: int) -> Iterator[None]:
        """Inside, the tower's calls are answered from memory where batch `index` has made them before."""
        tower = self._tower
        if tower is None:
            yield
            return
        forward, own = tower.forward, tower.__dict__.get("forward")
        calls = 0

        def remembered(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            key = (index, calls)
            calls += 1
            if key not in self._outputs:
                output = forward(*args, **kwargs)
                size = _num_bytes(output)
                if size > self._left_bytes:
                    return output
                self._left_bytes -= size
                self._outputs[key] = output
            # Models write into the container they get (not into its tensors), so each call gets its own.
            output = self._outputs[key]
            return type(output)(**output) if isinstance(output, dict) else output

        tower.forward = remembered
        try:
            yield
        finally:
            if own is None:
                del tower.forward
            else:
                tower.forward = own


def _num_bytes(output: Any) -> int:
    if isinstance(output, Tensor):
        return output.nbytes
    if isinstance(output, Mapping):
        output = list(output.values())
    return sum(map(_num_bytes, output)) if isinstance(output, list | tuple) else 0


def batch_digest(batch: Batch) -> str:
    """sha256 of a batch's tensors, so that a resumed run can tell other data."""
    digest = hashlib.sha256()
    for key in sorted(batch):
        value = batch[key]
        digest.update(key.encode())
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous()
            digest.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
            digest.update(flat.view(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def model_digest(model: nn.Module) -> str:
    """sha256 over every parameter's name, shape, dtype and 64 of its values: cheap, and enough to tell two
    checkpoints of one architecture apart."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        stride = max(1, len(flat) // 64)
        values = [f"{value:.9g}" for value in flat[::stride][:64].double().tolist()]
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {values}".encode())
    return digest.hexdigest()
