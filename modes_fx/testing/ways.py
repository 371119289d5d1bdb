"""The ways to compile a model, as data, and one cell of the matrix: a family compiled in one way.

`bench/coverage.py` draws the table; `tests/e2e/test_families.py` checks part of its cells, against an oracle
of its own.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.attach import attach
from modes_fx.backend import Backend
from modes_fx.blocks import find_blocks
from modes_fx.errors import ModesError
from modes_fx.exported import rewrite
from modes_fx.profile import Profile
from modes_fx.testing.families import Family, set_experts
from modes_fx.testing.profiles import tiny_profile

Inputs = Mapping[str, Any]
# The families that bench/coverage.py puts through every way; the others share their code, and go through one.
NAMED = (
    *("qwen3_vl_moe", "qwen3_5_moe", "qwen3_omni_moe", "internvl+qwen3_moe", "internvl+gpt_oss"),
    *("kimi_k25+deepseek_v3", "glm4v_moe", "ernie4_5_vl_moe", "llama4", "aria", "gemma4", "minimax_m3_vl"),
)
# family -> another one whose MoE block runs the same code; between blocks they differ.
SAME_BLOCK = {
    **dict.fromkeys(("qwen3_moe", "mellum"), "qwen3_omni_moe"),
    **dict.fromkeys(("qwen4_exp", "llava+qwen2_moe", "qwen3_next"), "qwen2_moe"),
    "gpt_oss": "internvl+gpt_oss",
    **dict.fromkeys(("internvl+mixtral", "minimax"), "mixtral"),
    **dict.fromkeys(("internvl+olmoe", "flex_olmo"), "olmoe"),
    **dict.fromkeys(("internvl+deepseek_v2", "deepseek_ocr2", "unlimited_ocr"), "deepseek_v2"),
    **dict.fromkeys(
        (
            *("glm46v", "dots3_note", "bailing_hybrid", "deepseek_v3", "deepseek_v32", "dots1", "exaone_moe"),
            *("glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "solar_open"),
        ),
        "glm4v_moe",
    ),
    "nemotron_h": "nemotron_h_omni",
    "lfm2_moe": "lfm2_vl+lfm2_moe",
    **dict.fromkeys(
        ("llava+granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"), "granitemoe"
    ),
    "llava+phimoe": "phimoe",
}
STEPS = 4  # tokens that "generate" makes


@dataclass(frozen=True)
class Way:
    """One way to compile.

    Attributes:
        prepare: (model, profile, make_backend) -> (what to call in its place, layers it runs rewritten in the
            calls so far).
        logits: (model or what `prepare` gave, inputs) -> logits; the same function serves the oracle.
        calls: How often a call of `logits` runs each layer.
        kinds: Kinds of inputs it is for.
    """

    prepare: Callable[[nn.Module, Profile, Callable[[Profile], Backend]], tuple[Any, Callable[[], list[int]]]]
    logits: Callable[[Any, Inputs], Tensor]
    calls: int = 1
    kinds: tuple[str, ...] = ("picture", "text")


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the decoder: the list of modules that holds the first MoE block."""
    modules = dict(model.named_modules())
    path = find_blocks(model)[0].name.split(".")
    for end in range(1, len(path)):
        module = modules[".".join(path[:end])]
        if isinstance(module, nn.ModuleList):
            return list(module)
    raise ValueError(f"{type(model).__name__} has no list of layers around {'.'.join(path)}.")


def _forward(model: Any, inputs: Inputs) -> Tensor:
    return model(**{"use_cache": False, **inputs}).logits


def _generate(model: Any, inputs: Inputs, **options: Any) -> Tensor:
    # generate() refuses what forward() would ignore.
    known = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    given = {key: value for key, value in inputs.items() if key in known}
    given |= {"max_new_tokens": STEPS, "do_sample": False, **options}
    made = model.generate(**given, output_logits=True, return_dict_in_generate=True)
    return torch.stack(made.logits)


def _generate_static(model: Any, inputs: Inputs) -> Tensor:
    # disable_compile is about what transformers would compile on its own.
    return _generate(model, inputs, cache_implementation="static", disable_compile=True)


def _compiled(how: Callable[[nn.Module, Backend], Any]) -> Any:
    def prepare(model: nn.Module, profile: Profile, make_backend: Callable[[Profile], Backend]) -> Any:
        backend = make_backend(profile)
        return how(model, backend), lambda: backend.run.executed

    return prepare


def _whole(model: nn.Module, backend: Backend) -> Any:
    return torch.compile(model, backend=backend)


def _in_place(model: nn.Module, backend: Backend) -> Any:
    model.compile(backend=backend)
    return model


def _decoder(model: Any, backend: Backend, **options: Any) -> Any:
    model.get_decoder().compile(backend=backend, **options)
    return model


def _layers(model: nn.Module, backend: Backend) -> Any:
    for layer in decoder_layers(model):
        layer.compile(backend=backend)
    return model


class _Exported:
    """Exports the model anew for each call, since a program is for one set of shapes."""

    def __init__(self, model: nn.Module, profile: Profile) -> None:
        self.model, self.profile = model, profile
        self.executed = [0] * len(profile.layers)

    def __call__(self, **inputs: Any) -> Any:
        program = rewrite(torch.export.export(self.model, (), inputs, strict=False), self.profile)
        done = [node.kwargs["layer"] for node in program.graph.nodes if "masked_moe" in str(node.target)]
        self.executed = [
            count + (layer.name in done)
            for count, layer in zip(self.executed, self.profile.layers, strict=True)
        ]
        return program.module()(**inputs)


def _export(model: nn.Module, profile: Profile, _: Any) -> Any:
    exported = _Exported(model, profile)
    return exported, lambda: exported.executed


def _attach(model: nn.Module, profile: Profile, _: Any) -> Any:
    attached = attach(model, profile)
    return model, lambda: [1 if layer.name in attached.layers else 0 for layer in profile.layers]


WAYS: dict[str, Way] = {
    "torch.compile(model)": Way(_compiled(_whole), _forward),
    "decoder": Way(_compiled(_decoder), _forward),
    "decoder, fullgraph": Way(
        _compiled(lambda model, backend: _decoder(model, backend, fullgraph=True)), _forward, kinds=("text",)
    ),
    "decoder, dynamic": Way(
        _compiled(lambda model, backend: _decoder(model, backend, dynamic=True)), _forward
    ),
    "layer by layer": Way(_compiled(_layers), _forward),
    "generate": Way(_compiled(_in_place), _generate, calls=STEPS),
    "generate, static cache": Way(_compiled(_in_place), _generate_static, calls=STEPS),
    "torch.export": Way(_export, _forward, kinds=("text",)),
    "attach": Way(_attach, _generate, calls=0),
}


_UNTRACEABLE = (
    torch._dynamo.exc.Unsupported,
    torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode,
)


@dataclass(frozen=True)
class Cell:
    """What became of one family compiled in one way.

    Attributes:
        layers: Layers of the profile.
        reason: Why it was declined, by an error or by a warning that nothing is skipped; empty where every
            layer ran rewritten in every call.
        error: Largest difference of a logit to the oracle's, over the calls that ran.
        skip: Skip rate of the oracle.
    """

    layers: int
    reason: str
    error: float
    skip: float


def cover(
    family: Family,
    way: Way,
    oracle: Callable[[nn.Module, Profile], AbstractContextManager[Any]],
    thresholds_at: Callable[[nn.Module, Profile, Inputs], Profile],
    *,
    experts: str | None = None,
    dtype: torch.dtype = torch.float32,
    lowering: Any = "eager",
    may_turn: int = 0,
    kinds: Iterable[str] | None = None,
) -> Cell:
    """Compile a tiny model of `family` in one way, and compare its answers with the oracle's.

    Args:
        oracle: While open, the eager model answers as the profile says; gives something with `.skip`.
        thresholds_at: The profile with thresholds that drop a good part of the pairs of a call.
        experts: The experts' implementation of a decorated family, for `set_experts`.
        may_turn: So many tokens of a call, the worst, do not count: in 16 bits, a sum that is rounded
            otherwise can turn a choice of the router, or put a score on the other side of a threshold.
        kinds: Kinds of inputs, fewer than the way is for.
    Raises:
        AssertionError: A layer did not run rewritten, and neither an error nor a warning said so.
    """
    model = family.build(dtype=dtype)
    if experts is not None and family.decorated:
        set_experts(model, experts)
    calls = [
        family.inputs(kind, dtype=dtype)
        for kind in way.kinds
        if kind in family.kinds and (kinds is None or kind in kinds)
    ]
    profile = tiny_profile(model, weight_scale=family.weight_scale)
    wanted, skips = [], []
    with torch.no_grad():
        profile = thresholds_at(model, profile, calls[0])
        for inputs in calls:
            with oracle(model, profile) as truth:
                wanted.append(way.logits(model, inputs))
            skips.append(truth.skip() if callable(truth.skip) else truth.skip)
    error, layers = 0.0, len(profile.layers)

    def make_backend(profile: Profile) -> Backend:
        return Backend(profile, lowering=lowering)

    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            compiled, executed = way.prepare(model, profile, make_backend)
            for number, (inputs, want) in enumerate(zip(calls, wanted, strict=True), start=1):
                differences = (way.logits(compiled, inputs).float() - want.float()).abs()
                by_token = differences.amax(-1).flatten().sort(descending=True).values
                error = max(error, by_token[may_turn].item())
                expected = number * way.calls or 1
                assert executed() == [expected] * layers, f"{executed()} runs, and {expected} each expected"
        except Exception as failure:
            # Dynamo wraps what the backend raises.
            reason = getattr(failure, "inner_exception", failure)
            if isinstance(reason, ModesError):
                return Cell(layers, str(reason), error, min(skips))
            if isinstance(reason, _UNTRACEABLE):
                first = str(reason).splitlines()[0]
                return Cell(layers, f"torch cannot trace the model: {first}", error, min(skips))
            raise
    said = [str(w.message) for w in caught if "skipped" in str(w.message) or "unskipped" in str(w.message)]
    return Cell(layers, said[0] if said else "", error, min(skips))
