"""Profile: everything the compiler backend has to know about a model's experts, frozen, as JSON on disk.

Imports torch and the standard library only, for it is loaded inside the compiler backend.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from modes_fx.errors import ProfileError

FORMAT = "modes_fx.profile"
VERSION = 1
# Fields that files of this version have only if they were written since; without them they are None.
_ADDED = ("kl_low", "kl_high")


@dataclass(frozen=True)
class Layer:
    """One MoE block of the model that was calibrated.

    Attributes:
        name: Path of the block's module, e.g. `model.language_model.layers.0.mlp`; for people to read.
        alpha_text: Importance of the block for text tokens, dimensionless, finite, >= 0.
        alpha_vision: The same for vision tokens. Zero is legal: nothing of it reaches an answer (the last
            block's vision tokens in any decoder), so its pairs go as soon as the threshold is above zero.
        num_experts: Routed experts of the block.
        top_k: Routed experts that each token chooses, before any skipping.
        fingerprint: `fingerprint(router weight)`; this, not the name, is how a block is recognised.
        weight_scale: The routed scaling factor that the model has folded into its routing weights, finite and
            > 0. The score that alpha multiplies is weight / weight_scale, as in the paper, whose score is
            taken before the factor.
    """

    name: str
    alpha_text: float
    alpha_vision: float
    num_experts: int
    top_k: int
    fingerprint: str
    weight_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.name:
            _refuse("name", "an empty string", "the module path of the block")
        for key in ("alpha_text", "alpha_vision"):
            value = getattr(self, key)
            if not math.isfinite(value) or value < 0:
                _refuse(key, value, "a finite number >= 0")
        if self.num_experts < 1:
            _refuse("num_experts", self.num_experts, "at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            _refuse("top_k", self.top_k, f"from 1 to num_experts = {self.num_experts}")
        if len(self.fingerprint) != 64 or set(self.fingerprint) - set("0123456789abcdef"):
            _refuse("fingerprint", repr(self.fingerprint), "64 hexadecimal digits")
        if not math.isfinite(self.weight_scale) or self.weight_scale <= 0:
            _refuse("weight_scale", self.weight_scale, "a finite number > 0")

    @property
    def weight_alpha_text(self) -> float:
        """What multiplies a text token's routing weight as it enters the experts: alpha / weight_scale."""
        return self.alpha_text / self.weight_scale

    @property
    def weight_alpha_vision(self) -> float:
        """The same for vision tokens."""
        return self.alpha_vision / self.weight_scale


@dataclass(frozen=True)
class Profile:
    """alpha of every MoE block, the two thresholds, and how they were found.

    A pair (token, slot) is dropped when `weight_alpha[modality] * routing_weight < tau[modality]`, in
    float32, `weight_alpha` being alpha / weight_scale.
    A profile that was calibrated and not yet searched has both thresholds at 0.0 and drops nothing.

    Attributes:
        layers: The MoE blocks in layer order.
        tau_text, tau_vision: Thresholds, dimensionless; `inf` drops every pair of the modality.
        visual_token_ids: Ids of image and video placeholders; they win over `special_token_ids`.
        special_token_ids: Ids that are neither text nor vision and are never skipped.
        vocab_size, hidden_size: Shape of the token embedding; how a graph that looks ids up is known.
        target_skip: Skip rate that was asked for, 0..1, or None before a search.
        measured_skip: Dropped pairs / all pairs over the non-padding tokens of the search, measured.
        measured_skip_text, measured_skip_vision: The same over the tokens of one modality.
        kl: KL(original || skipped) per answer token on the batches of the search, in nats.
        kl_low, kl_high: 95 % confidence interval of `kl` over other samples, by bootstrap.
        num_samples: Sequences that alpha was measured on.
        method: How alpha was measured, e.g. `modality`.
        versions: Versions of the libraries that made the profile.
    """

    layers: tuple[Layer, ...]
    tau_text: float
    tau_vision: float
    visual_token_ids: tuple[int, ...]
    special_token_ids: tuple[int, ...]
    vocab_size: int
    hidden_size: int
    target_skip: float | None = None
    measured_skip: float | None = None
    measured_skip_text: float | None = None
    measured_skip_vision: float | None = None
    kl: float | None = None
    kl_low: float | None = None
    kl_high: float | None = None
    num_samples: int = 0
    method: str = "modality"
    versions: dict[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.layers:
            _refuse("layers", "none", "at least one MoE block")
        known: dict[str, Layer] = {}
        for i, layer in enumerate(self.layers):
            first = known.setdefault(layer.fingerprint, layer)
            if _constants(first) != _constants(layer):
                raise ProfileError(
                    f"layers[{i}].fingerprint: {layer.name} has the same router weight as {first.name} but "
                    "another alpha or weight_scale, so the two cannot be told apart; calibrate a model whose "
                    "routers differ."
                )
        for key in ("tau_text", "tau_vision"):
            if math.isnan(getattr(self, key)):
                _refuse(key, "NaN", 'a number, or "inf" to drop everything')
        for key in ("target_skip", "measured_skip", "measured_skip_text", "measured_skip_vision"):
            value = getattr(self, key)
            if value is not None and not 0 <= value <= 1:
                _refuse(key, value, "from 0 to 1, or null")
        for key in ("kl", "kl_low", "kl_high"):
            value = getattr(self, key)
            if value is not None and (not math.isfinite(value) or value < 0):
                _refuse(key, value, "a finite number of nats >= 0, or null")
        for key in ("vocab_size", "hidden_size"):
            if getattr(self, key) < 1:
                _refuse(key, getattr(self, key), "at least 1")
        if self.num_samples < 0:
            _refuse("num_samples", self.num_samples, ">= 0")
        for key in ("visual_token_ids", "special_token_ids"):
            for i, value in enumerate(getattr(self, key)):
                if value < 0:
                    _refuse(f"{key}[{i}]", value, "a token id >= 0")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Profile":
        """Read and check a profile.

        Raises:
            ProfileError: Truncated, not JSON, not a profile, of another version, or an invalid field.
            OSError: The file cannot be read.
        """
        raw = Path(path).read_bytes()
        try:
            return cls.from_dict(_parse(raw))
        except ProfileError as error:
            raise ProfileError(f"{os.fspath(path)}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as JSON; another process sees the old file or the whole new one, never a part."""
        write_atomically(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON types; infinite thresholds become the strings "inf" and "-inf"."""
        plain = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        for key in ("tau_text", "tau_vision"):
            if math.isinf(plain[key]):
                plain[key] = str(plain[key])
        return plain

    @classmethod
    def from_dict(cls, data: object) -> "Profile":
        """The inverse of `to_dict`; checks every field and raises `ProfileError` that names it."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ProfileError(
                f'valid JSON, but not a modes_fx profile ("format": "{FORMAT}" is missing); '
                "pass a file written by Profile.save."
            )
        if data.get("version") != VERSION:
            raise ProfileError(
                f"version: this modes_fx reads version {VERSION} of the format, the file has "
                f"{data.get('version')!r}; use the modes_fx that wrote it, or calibrate again."
            )
        body = {key: value for key, value in data.items() if key not in ("format", "version")}
        _check_fields(cls, body, "")
        fields = {key: _CONVERT[key](value, key) for key, value in body.items() if key != "layers"}
        if not isinstance(body["layers"], list):
            _refuse_type("layers", body["layers"], "a list of objects")
        layers = tuple(_layer(entry, f"layers[{i}]") for i, entry in enumerate(body["layers"]))
        return cls(layers=layers, **fields)

    def digest(self) -> str:
        """sha256 of the profile's canonical JSON; equal profiles have equal digests. For compile caches."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def with_thresholds(self, *, tau_text: float | None = None, tau_vision: float | None = None) -> "Profile":
        """A copy with other thresholds; what was measured at the old ones is forgotten."""
        return dataclasses.replace(
            self,
            tau_text=self.tau_text if tau_text is None else float(tau_text),
            tau_vision=self.tau_vision if tau_vision is None else float(tau_vision),
            target_skip=None,
            measured_skip=None,
            measured_skip_text=None,
            measured_skip_vision=None,
            kl=None,
            kl_low=None,
            kl_high=None,
        )

    def tempered(self, exponent: float) -> "Profile":
        """A copy with alpha**exponent, summing to one again, thresholds at zero: 1 is the paper's alpha,
        0 switches alpha off and leaves the two thresholds on the routing weights (its "DMT" ablation).
        An alpha of zero stays zero."""
        if not math.isfinite(exponent) or exponent < 0:
            raise ProfileError(f"exponent: needed a finite number >= 0, got {exponent}.")
        # What reaches no answer stays free to drop at every power, 0 included.
        text = normalise([a**exponent if (a := layer.alpha_text) else 0.0 for layer in self.layers])
        vision = normalise([a**exponent if (a := layer.alpha_vision) else 0.0 for layer in self.layers])
        layers = tuple(
            dataclasses.replace(layer, alpha_text=t, alpha_vision=v)
            for layer, t, v in zip(self.layers, text, vision, strict=True)
        )
        method = self.method if exponent == 1 else f"{self.method}^{exponent:g}"
        cleared = self.with_thresholds(tau_text=0.0, tau_vision=0.0)
        return dataclasses.replace(cleared, layers=layers, method=method)

    def layer_for(self, fingerprint: str) -> Layer | None:
        """The layer whose router weight has this fingerprint, or None."""
        return next((layer for layer in self.layers if layer.fingerprint == fingerprint), None)

    def check_model(self, model: nn.Module) -> None:
        """Raise `ProfileError` unless the profile knows every MoE block of `model`, and no other."""
        from modes_fx.blocks import find_blocks

        blocks = find_blocks(model)
        found = [fingerprint(block.router_weight) for block in blocks]
        unknown = [b.name for b, f in zip(blocks, found, strict=True) if self.layer_for(f) is None]
        missing = [layer.name for layer in self.layers if layer.fingerprint not in found]
        if unknown or missing or len(blocks) != len(self.layers):
            which = f"; {unknown[0]} is not in it" if unknown else ""
            raise ProfileError(
                f"The profile was made for another model: it knows {len(self.layers)} MoE blocks, of the "
                f"model's {len(blocks)} it has the router weights of {len(blocks) - len(unknown)}{which}. "
                "Calibrate this model, or pass the profile made for it."
            )


def fingerprint(weight: Tensor) -> str:
    """sha256 of a router weight's shape and of its values in bfloat16.

    In bfloat16, so that one checkpoint has one fingerprint whether it was loaded in float32 or in bfloat16.

    Args:
        weight: `[num_experts, H]`, any floating dtype, any device that holds data.
    """
    if weight.is_meta:
        raise ProfileError("A router weight is on the meta device and has no values; load the model first.")
    values = weight.detach().to(torch.bfloat16).cpu().contiguous()
    digest = hashlib.sha256(repr(tuple(values.shape)).encode())
    digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def normalise(alpha: list[float]) -> list[float]:
    """alpha / sum(alpha) (paper, appendix B); all equal when every one is zero, as none matters more."""
    total = math.fsum(alpha)
    return [a / total for a in alpha] if total > 0 else [1 / len(alpha)] * len(alpha)


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file at `path` by `text` (UTF-8), or leave it as it was; a crash leaves no half file."""
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{os.getpid()}.{target.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _parse(raw: bytes) -> object:
    """JSON from bytes, or a `ProfileError` that tells a truncated file from one that never was JSON."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ProfileError("not text, so not a profile; pass a file written by Profile.save.") from None
    if not text.strip():
        raise ProfileError("the file is empty; write the profile again.")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # A prefix of an object fails at its end, or in the string, number or word that the end cuts off.
        rest = text[error.pos :].strip()
        cut = error.msg.startswith("Unterminated") or re.fullmatch(r"[\w.+-]*", rest) is not None
        if text.lstrip().startswith("{") and cut:
            raise ProfileError(
                f"truncated: the JSON ends in the middle, at line {error.lineno}; write the profile again."
            ) from None
        raise ProfileError(
            f"not JSON ({error.msg} at line {error.lineno} column {error.colno}); "
            "pass a file written by Profile.save."
        ) from None


def _check_fields(cls: type, entry: dict[str, Any], where: str) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    for key in entry:
        if key not in known:
            raise ProfileError(
                f"{where}{key}: unknown field; remove it, or use the modes_fx that wrote the file."
            )
    for key in known:
        if key not in entry and key not in _ADDED:
            raise ProfileError(f"{where}{key}: the field is missing; calibrate again.")


def _constants(layer: Layer) -> tuple[float, float, float]:
    return layer.alpha_text, layer.alpha_vision, layer.weight_scale


def _layer(entry: object, where: str) -> Layer:
    if not isinstance(entry, dict):
        _refuse_type(where, entry, "an object")
    _check_fields(Layer, entry, f"{where}.")
    fields = {key: _CONVERT[key](value, f"{where}.{key}") for key, value in entry.items()}
    try:
        return Layer(**fields)
    except ProfileError as error:
        raise ProfileError(f"{where}.{error}") from None


def _int(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse_type(where, value, "an integer")
    return value


def _float(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse_type(where, value, "a number")
    try:
        return float(value)
    except OverflowError:
        _refuse(where, "an integer too large for a float", "a number")


def _tau(value: object, where: str) -> float:
    return float(value) if value in ("inf", "-inf") else _float(value, where)  # type: ignore[arg-type]


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        _refuse_type(where, value, "a string")
    return value


def _ids(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        _refuse_type(where, value, "a list of integers")
    return tuple(_int(v, f"{where}[{i}]") for i, v in enumerate(value))


def _strings(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        _refuse_type(where, value, "an object of strings")
    return {key: _string(v, f"{where}.{key}") for key, v in value.items()}


def _or_null(value: object, where: str) -> float | None:
    return None if value is None else _float(value, where)


_CONVERT: dict[str, Callable[[object, str], Any]] = {
    **dict.fromkeys(("name", "fingerprint", "method"), _string),
    **dict.fromkeys(("alpha_text", "alpha_vision", "weight_scale"), _float),
    **dict.fromkeys(("num_experts", "top_k", "num_samples", "vocab_size", "hidden_size"), _int),
    **dict.fromkeys(("tau_text", "tau_vision"), _tau),
    **dict.fromkeys(("visual_token_ids", "special_token_ids"), _ids),
    **dict.fromkeys(("target_skip", "measured_skip", "measured_skip_text", "measured_skip_vision"), _or_null),
    **dict.fromkeys(("kl", "kl_low", "kl_high"), _or_null),
    "versions": _strings,
}


def _refuse(where: str, got: object, needed: str) -> NoReturn:
    raise ProfileError(f"{where}: needed {needed}, got {got}; correct it, or calibrate again.")


def _refuse_type(where: str, got: object, needed: str) -> NoReturn:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    name = names.get(type(got), "a number")
    raise ProfileError(f"{where}: wrong type, needed {needed}, got {name}; correct it, or calibrate again.")
