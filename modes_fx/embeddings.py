"""Tokens that arrive embedded: their modality is read back from the rows themselves.

A row of embedded text is, bit for bit, what the embedding module makes of its token; a row that is no token's
comes from the vision encoder.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.calls import running_modules
from modes_fx.kernels.rows_modality import row_keys
from modes_fx.modality import OTHER, VISION, token_modality
from modes_fx.passes.unit import is_token_embedding
from modes_fx.profile import Profile

# Rows whose keys are computed at once; a key takes 64-bit integers, one for each element of its row.
_CHUNK = 4096


class EmbeddingTable:
    """Keys of what an embedding makes of each token; follows the live weight.

    Args:
        embedding: The model's token embedding, or the weight of a plain one. What a module *makes* counts:
            some scale the rows of their weight.
        profile: Says which tokens are visual and special.
    """

    def __init__(self, embedding: nn.Embedding | Tensor, profile: Profile) -> None:
        self.embedding = embedding
        self.profile = profile
        self._version: tuple[int, int] | None = None
        self._sum: Tensor
        self._keys: Tensor
        self._modality: Tensor

    @property
    def weight(self) -> Tensor:
        return self.embedding if isinstance(self.embedding, Tensor) else self.embedding.weight

    def may_hold(self, value: Any) -> bool:
        """Whether `value` has the shape of embedded tokens, `[..., H]`."""
        return (
            isinstance(value, Tensor)
            and not isinstance(value, nn.Parameter)
            and value.dim() >= 2
            and value.shape[-1] == self.weight.shape[-1]
            and value.is_floating_point()
        )

    @torch.no_grad()
    def read(self, rows: Tensor) -> Tensor | None:
        """The modality of embedded tokens, or None where not one row is a token's. Waits for the device.

        Args:
            rows: `[..., H]`, floating point.
        Returns:
            `[T]`, uint8, T the number of rows; a row that is no token's is vision.
        """
        if not self.may_hold(rows) or rows.element_size() not in (2, 4):
            return None
        keys = row_keys(rows).reshape(-1).to(self.weight.device)
        self._refresh()
        found, modality = self._look_up(keys)
        # An edit through weight.data has no version. Who was found is as it was; for the others, look again.
        if not bool(found.all()) and not torch.equal(self._sum, _checksum(self.weight)):
            self._version = None
            self._refresh()
            found, modality = self._look_up(keys)
        # Rows of zeros are no evidence: buffers have them, and untrained tokens.
        if not bool((found & (keys != 0)).any()):
            return None
        return torch.where(found, modality, VISION).to(torch.uint8)

    def read_first(self, values: Iterable[Any], num_tokens: int | None = None) -> Tensor | None:
        """`read` of the first of `values` that holds embedded tokens, `num_tokens` of them where given."""
        for value in values:
            if self.may_hold(value) and num_tokens in (None, value.numel() // value.shape[-1]):
                modality = self.read(value)
                if modality is not None:
                    return modality
        return None

    def holds(self, rows: Tensor) -> bool:
        """Whether `rows` look like embedded tokens: some are what the embedding makes of a token."""
        return self.read(rows) is not None

    def keys(self) -> Tensor:
        """Sorted keys, `[V]`, int64."""
        self._refresh()
        return self._keys

    def modality(self) -> Tensor:
        """Modality of the token behind each key, `[V]`, uint8."""
        self._refresh()
        return self._modality

    def _look_up(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        position = torch.searchsorted(self._keys, keys).clamp(max=self._keys.shape[0] - 1)
        return self._keys[position] == keys, self._modality[position]

    @torch.no_grad()
    def _refresh(self) -> None:
        weight = self.weight
        # Weights that were made under inference mode have no version to look at.
        version = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if version == self._version:
            return
        ids = torch.arange(weight.shape[0], device=weight.device)
        # forward, so that neither hooks nor a compilation of the module see these ids.
        embed = weight.__getitem__ if isinstance(self.embedding, Tensor) else self.embedding.forward
        keys = torch.cat([row_keys(embed(chunk)) for chunk in ids.split(_CHUNK)])
        modality = token_modality(ids, self.profile.visual_token_ids, self.profile.special_token_ids)
        keys, order = keys.sort(stable=True)
        modality = modality[order]
        # Tokens that share one row (untrained ones) cannot be told apart: a special one among them protects
        # all.
        if keys.shape[0] > 1:
            group = torch.cat([keys.new_zeros(1), (keys[1:] != keys[:-1]).cumsum(0)])
            special = torch.zeros_like(keys).index_add_(0, group, (modality == OTHER).long())
            modality = torch.where(special[group] > 0, OTHER, modality).to(torch.uint8)
        self._keys, self._modality = keys, modality
        self._sum, self._version = _checksum(weight), version


def _checksum(weight: Tensor) -> Tensor:
    """The sum of a weight's bits: one pass over it, nothing allocated."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.detach().view(whole).sum(dtype=torch.int64)


def find_embedding(profile: Profile) -> nn.Embedding | None:
    """The token embedding of the model that Dynamo is compiling, found among the modules on the stack."""
    seen: set[int] = set()
    for module in _modules_in_scope():
        if id(module) not in seen:
            seen.add(id(module))
            for each in module.modules():
                if isinstance(each, nn.Embedding) and is_token_embedding(profile, each.weight):
                    return each
    return None


def _modules_in_scope() -> Iterator[nn.Module]:
    from torch._dynamo.symbolic_convert import tls

    # What Dynamo is compiling is not on the stack yet.
    translator: Any = getattr(tls, "current_tx", None)
    if translator is not None:
        scope = translator.output.local_scope
        used = {name: translator.f_globals.get(name) for name in translator.f_code.co_names}
        yield from (value for value in (*scope.values(), *used.values()) if isinstance(value, nn.Module))
    yield from (module for _, module in running_modules())
