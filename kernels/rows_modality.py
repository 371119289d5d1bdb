"""`modes_fx::rows_modality`: the modality of tokens that arrive embedded, read back from the rows themselves.

    key(row)    = sum over h of bits(row[h]) * odd[h]        in wrapping 64-bit integers
    modality[t] = that of the table row with the same key; vision where there is none

A row of embedded text is an exact copy of a row of the embedding table, so it can be told by its bits. One
opaque op and not traced arithmetic: the keys of the table and of the rows must come from the same code, bit
for bit.
"""

import torch
from torch import Tensor

from modes_fx.modality import VISION

_library = torch.library.Library("modes_fx", "FRAGMENT")
_library.define(
    "rows_modality(Tensor rows, Tensor keys, Tensor modality) -> Tensor", tags=[torch.Tag.pt2_compliant_tag]
)


def row_keys(rows: Tensor) -> Tensor:
    """A 64-bit key for each row of floats, `[..., H] -> [...]`, int64: equal rows have equal keys.

    Added as integers, so that, unlike a sum of floats, a key does not depend on how many rows are computed
    together.
    """
    bits = rows.detach().contiguous().view(torch.int32 if rows.element_size() == 4 else torch.int16)
    step = torch.arange(1, rows.shape[-1] + 1, device=rows.device, dtype=torch.int64)
    # Odd multipliers from the golden ratio; wrapping is wanted.
    odd = step * 0x13C6EF372FE94F82 + 1
    return (bits.to(torch.int64) * odd).sum(dim=-1)


def _rows_modality(rows: Tensor, keys: Tensor, modality: Tensor) -> Tensor:
    key = row_keys(rows).reshape(-1)
    position = torch.searchsorted(keys, key).clamp(max=keys.shape[0] - 1)
    return torch.where(keys[position] == key, modality[position], VISION).to(torch.uint8)


def _fake(rows: Tensor, keys: Tensor, modality: Tensor) -> Tensor:
    return modality.new_empty((rows[..., 0].numel(),))


torch.library.register_fake("modes_fx::rows_modality", _fake, lib=_library)
_library.impl("rows_modality", _rows_modality, "CompositeExplicitAutograd")

rows_modality = torch.ops.modes_fx.rows_modality.default
"""`(rows [B, S, H], keys [V] int64 sorted, modality [V] uint8) -> [T] uint8`."""
