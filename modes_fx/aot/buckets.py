"""Calls brought to few sizes: tokens of a prefill, and tokens in the cache of a decode step.

A runtime that pays for every new shape then sees each of a few again and again. What is added is masked
out: to a prefill behind its tokens, where no token looks; to a cache before its tokens, so that distances
between tokens stay, and with them sliding windows.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn.functional import pad

from modes_fx.aot.manifest import Range
from modes_fx.errors import ExportError

_SMALLEST = 128


def buckets_of(size: Range) -> tuple[int, ...]:
    """Powers of two from 128, and the largest size: at most twice the tokens, of 128 and more."""
    powers = (_SMALLEST << i for i in range(size.max.bit_length()))
    return (*(power for power in powers if size.min <= power < size.max), size.max)


def check_buckets(name: str, buckets: Sequence[int], size: Range) -> tuple[int, ...]:
    """The buckets that were asked for, in order; they have to hold every size."""
    found = tuple(sorted(set(buckets)))
    if not found or found[0] < size.min or found[-1] != size.max:
        raise ExportError(
            f"buckets[{name!r}] must be sizes from {size.min} to {size.max}, the last of which holds every "
            f"call, got {tuple(buckets)}."
        )
    return found


def is_decode(inputs: Mapping[str, object]) -> bool:
    """Whether these are the inputs of a decode program."""
    return any(name.startswith("past_") for name in inputs)


def num_tokens(inputs: Mapping[str, Tensor]) -> int:
    """What is padded: the tokens of a prefill, the tokens that a decode step finds in the cache."""
    return inputs["past_key_0"].shape[2] if is_decode(inputs) else inputs["input_ids"].shape[1]


def pad_inputs(inputs: Mapping[str, Tensor], size: int, token: int) -> dict[str, Tensor]:
    """The inputs of a program as if there were `size` tokens.

    Args:
        inputs: By the names of the program, see `modes_fx.aot.programs`.
        token: What is added to `input_ids`; no placeholder of a picture.
    """
    added = size - num_tokens(inputs)
    padded = dict(inputs)
    if is_decode(inputs):
        padded["attention_mask"] = pad(inputs["attention_mask"], (added, 0))
        return padded | {
            name: pad(x, (0, 0, added, 0)) for name, x in inputs.items() if name.startswith("past_")
        }
    padded["input_ids"] = pad(inputs["input_ids"], (0, added), value=token)
    for name in ("attention_mask", "position_ids"):
        padded[name] = pad(inputs[name], (0, added))
    # As many as there could be, so that their number is no size of its own; those past the last are not read.
    rows = inputs["input_ids"].shape[0] * size
    features = {name: x for name, x in inputs.items() if name.startswith("feature_")}
    return padded | {name: pad(x, (0, 0, 0, rows - x.shape[0])) for name, x in features.items()}


def cut_outputs(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """The outputs of a padded call without what was added; `inputs` are those before."""
    tokens = num_tokens(inputs)
    if is_decode(inputs):
        return {name: x if name == "logits" else x[:, :, size - tokens :] for name, x in outputs.items()}
    return {name: x[:, :tokens] if name == "logits" else x[:, :, :tokens] for name, x in outputs.items()}
