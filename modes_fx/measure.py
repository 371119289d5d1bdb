"""Run a model on batches and compare answers: KL(original || skipped) in nats, and the skip rate.

Shared by calibration, search and the comparison policies, so that all numbers come from one place.
"""

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.blocks import find_blocks, is_experts, unwrap
from modes_fx.errors import ModesError
from modes_fx.modality import TEXT, VISION
from modes_fx.progress import Bar
from modes_fx.skipping import Counts, Rule, Tokens, keep_all, skip

Batch = Mapping[str, Any]
IGNORED = -100
# Vision towers are run once per batch and remembered up to this much; beyond it they are run again.
ENCODER_MEMORY_BYTES = 4 << 30


@dataclass(frozen=True)
class Measured:
    """What one pass over the batches with a rule gave.

    Attributes:
        kl: KL(original || skipped), mean over answer tokens, nats.
        counts: Pairs and dropped pairs, per block and modality.
        right: Per sample, whether every answer token is the likeliest one given the answer before it; that
            is when greedy generation gives the answer.
    """

    kl: float
    counts: Counts
    right: tuple[bool, ...] = ()

    @property
    def skip(self) -> float:
        return self.counts.skip()

    @property
    def skip_text(self) -> float:
        return self.counts.skip(TEXT)

    @property
    def skip_vision(self) -> float:
        return self.counts.skip(VISION)


class Meter:
    """Measures rules on a model and batches. The original answers are computed once and kept on the CPU.

    Args:
        model: Eager model; a compiled one is unwrapped.
        batches: Re-iterable of dicts: the model's keyword inputs and `labels` (`[B, S]`, -100 is ignored).
        visual_token_ids, special_token_ids: See `token_modality`.
        observe: A rule asked during the unskipped pass, e.g. to record scores; it drops nothing.
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
        self.blocks = find_blocks(self.model)
        self.batches = check_batches(batches)
        self.ids = (visual_token_ids, special_token_ids)
        self.encoder = EncoderMemory(self.model)
        self.original: list[Tensor] = []
        self._digests: list[str] = []
        self.num_samples = 0
        with evaluating(self.model), skip(self.model, self.blocks, observe or keep_all, *self.ids) as counts:
            for index, batch in enumerate(self.batches):
                logits = self._answer(index, batch)
                check_finite(logits, f"the original model, batch {index}")
                self.original.append(logits.cpu())
                self._digests.append(batch_digest(batch))
                self.num_samples += len(batch["labels"])
                if bar is not None:
                    bar.step()
        self.num_tokens = sum(map(len, self.original))
        if not self.num_tokens:
            raise ModesError(no_answers(len(self.original)))
        self.counts = counts

    def measure(self, rule: Rule, *, renormalise: bool = False, bar: Bar | None = None) -> Measured:
        """One pass over all batches with `rule`.

        Raises:
            ModesError: The batches changed since the first pass, or logits are not finite.
        """
        total = 0.0
        seen = 0
        right: list[bool] = []
        hooks = skip(self.model, self.blocks, rule, *self.ids, renormalise=renormalise)
        with evaluating(self.model), hooks as counts:
            for index, batch in enumerate(self.batches):
                seen += 1
                if index >= len(self.original) or batch_digest(batch) != self._digests[index]:
                    raise ModesError(changed(index, len(self.original)))
                logits = self._answer(index, batch)
                total += kl_sum(self.original[index], logits, f"batch {index}")
                right += answered(batch, logits)
                if bar is not None:
                    bar.step()
        if seen != len(self.original):
            raise ModesError(changed(seen, len(self.original)))
        cpu_counts = Counts(counts.pairs.cpu(), counts.dropped.cpu())
        return Measured(max(0.0, total / self.num_tokens), cpu_counts, tuple(right))

    def _answer(self, index: int, batch: Batch) -> Tensor:
        with self.encoder.for_batch(index):
            return answer_logits(self.model, batch)


class WeightRecorder:
    """A rule for `Meter(observe=...)` that keeps the routing weight of every pair, of text and of vision."""

    def __init__(self) -> None:
        self._weights: dict[tuple[int, int], list[Tensor]] = {}

    def __call__(self, block: int, weights: Tensor, tokens: Tokens) -> Tensor:
        for modality in (TEXT, VISION):
            chosen = weights[(tokens.modality == modality) & tokens.real].flatten().cpu()
            self._weights.setdefault((block, modality), []).append(chosen)
        return keep_all(block, weights, tokens)

    def scores(self, modality: int, alphas: Sequence[float]) -> Tensor:
        """alpha * weight of every pair of the modality, all blocks, ascending, `[pairs]` float32.

        Args:
            alphas: One per block, in layer order.
        """
        scaled = [
            torch.tensor(alpha, dtype=torch.float32) * torch.cat(self._weights[block, modality])
            for block, alpha in enumerate(alphas)
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


def answer_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits that predict each answer token, the first one included.

    Position p predicts token p + 1, so the logits at p are taken where `labels[:, p + 1]` is not -100.
    The model is called without labels (no loss is computed) and without a cache.

    Returns:
        `[answer tokens, vocabulary]`, row by row of the batch, in the model's dtype.
    """
    if not isinstance(batch, Mapping):
        raise ModesError(f"Each batch must be a dict of model inputs and labels, got {type(batch).__name__}.")
    if batch.get("labels") is None:
        raise ModesError("A batch has no labels; add labels [B, S], -100 everywhere but at the answer.")
    device = getattr(model, "device", torch.device("cpu"))
    given = {name: value for name, value in batch.items() if name not in ("labels", "task")}
    inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in given.items()}
    labels = torch.as_tensor(batch["labels"]).to(device)
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or labels.shape != ids.shape:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else None
        raise ModesError(f"labels must have the shape of input_ids, got {tuple(labels.shape)} and {shape}.")
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
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


def kl_sum(original: Tensor, skipped: Tensor, where: str) -> float:
    """Sum over answer tokens of KL(original || skipped), nats.

    The logits are what the model gave; the logarithms are taken in float64, because the KL of a block that
    hardly matters (1e-8 and below) drowns in the rounding of float32.
    """
    check_finite(skipped, f"the skipped model, {where}")
    log_p = original.to(skipped.device, torch.float64).log_softmax(-1)
    log_q = skipped.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum())


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
