"""A whole Qwen3-VL-MoE with random weights and prescribed routing, and everything that can run it.

A deep random model routes all tokens alike, layer by layer more so. So part of the residual stream is set
aside: its first dimensions hold a random code for each token, no layer writes to them, and routers look at
nothing else. The model, its graph and its code are transformers' own; only weights are chosen. The features
of the picture are given, as if a vision tower had made them: towers are the same whatever the experts do.
"""

import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from block_peers import sweep
from cases import NO_EXPERTS, OURS, Case
from interleave import Run, interleave
from kt_peer import KT_BEST_OF, Absent, KtExperts, Pool
from memory import Regions
from torch import Tensor, nn

import modes_fx
from modes_fx.modality import OTHER, TEXT, VISION, token_modality
from modes_fx.profile import Profile
from modes_fx.skipping import simulate
from modes_fx.testing import IMAGE, SPECIAL, VOCABULARY, tiny_inputs, tiny_profile, tiny_qwen3_vl_moe

_CODE = 64  # dimensions of the residual stream that hold a token's code
_TOLERANCE = 1e-3  # of the norm of the logits; a weight right at a threshold may fall on either side
_STEPS = 16  # tokens that take turns in decode


class Subject:
    """The model, its inputs and its routing."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(0)
        self.model = build(case, generator)
        length = case.prompt or case.tokens
        visual = round(case.vision * length)
        inputs = tiny_inputs(text=length - visual - 3, grid=(2, 2 * visual))
        del inputs["pixel_values"]
        self.prompt: dict[str, Any] = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        features = torch.randn(visual, case.hidden, generator=generator)
        extra = torch.randn(visual, case.hidden, generator=generator)
        extra[:, :_CODE] = 0
        self.prompt["mm_encoder_outputs"] = {"image": encoder_outputs(features, extra)}
        self.prompt["position_ids"] = self.model.model.compute_3d_position_ids(
            inputs_embeds=self.model.get_input_embeddings()(inputs["input_ids"]),
            past_key_values=None,
            **inputs,
        )
        self.words = [torch.tensor([[8 + n]]) for n in range(_STEPS)]
        assert max(int(word) for word in self.words) < VOCABULARY
        self.cache = self._filled_cache() if case.prompt else None
        calls = range(_STEPS) if case.prompt else range(1)
        self.routed = [self._routing(number) for number in calls]

    def call(self, model: Any, number: int) -> Tensor:
        """Logits of the last token."""
        if self.cache is None:
            out = model(**self.prompt, use_cache=False, logits_to_keep=1)
        else:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.case.prompt)
            out = model(
                input_ids=self.words[number % _STEPS],
                past_key_values=self.cache,
                position_ids=self.prompt["position_ids"][..., -1:] + 1,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = out.logits
        return logits

    def modality(self, number: int) -> Tensor:
        ids = self.prompt["input_ids"] if self.cache is None else self.words[number % _STEPS]
        return token_modality(ids, [IMAGE], SPECIAL).flatten()

    def _filled_cache(self) -> Any:
        from transformers import StaticCache

        cache = StaticCache(config=self.model.config.get_text_config(), max_cache_len=self.case.prompt + 8)
        self.model(**self.prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def _routing(self, number: int) -> list[tuple[Tensor, Tensor]]:
        """(weights, experts) of each layer in one call of the unmodified model."""
        seen: list[tuple[Tensor, Tensor]] = []
        handles = [
            layer.mlp.gate.register_forward_hook(lambda module, args, output: seen.append(output[1:]))
            for layer in self.model.get_decoder().layers
        ]
        self.call(self.model, number)
        for handle in handles:
            handle.remove()
        return seen

    def quantiles(self, skip: float) -> list[dict[int, float]]:
        """For each layer, below which weight lies that share of a modality's pairs; halfway between two."""
        found: list[dict[int, float]] = [{} for _ in range(self.case.layers)]
        for layer, quantile in enumerate(found):
            for modality in (TEXT, VISION):
                weights = torch.cat(
                    [
                        routing[layer][0][self.modality(number) == modality].flatten()
                        for number, routing in enumerate(self.routed)
                    ]
                ).sort()[0]
                dropped = round(skip * len(weights))
                quantile[modality] = weights[dropped - 1 : dropped + 1].mean().item() if dropped else 0.0
        return found

    def kept(self, number: int, quantiles: Sequence[dict[int, float]]) -> list[Tensor]:
        """Of each layer, `[T, K]`."""
        return [
            ~(weights < self.thresholds(number, quantile)[:, None])
            for (weights, _), quantile in zip(self.routed[number], quantiles, strict=True)
        ]

    def thresholds(self, number: int, quantile: dict[int, float]) -> Tensor:
        """`[T]`, of the routing weights themselves."""
        table = torch.tensor([quantile.get(modality, 0.0) for modality in (TEXT, VISION, OTHER)])
        return table[self.modality(number).long()]

    def profile(self, quantiles: Sequence[dict[int, float]]) -> Profile:
        """That drops what is below these weights."""

        def alpha(quantile: float) -> float:
            return 1 / quantile if quantile else 1.0

        profile = tiny_profile(self.model)
        tau = 1.0 if any(any(quantile.values()) for quantile in quantiles) else 0.0
        layers = tuple(
            replace(layer, alpha_text=alpha(quantile[TEXT]), alpha_vision=alpha(quantile[VISION]))
            for layer, quantile in zip(profile.layers, quantiles, strict=True)
        )
        return replace(profile, layers=layers, tau_text=tau, tau_vision=tau)

    def weights_of(self, number: int) -> Regions:
        """All weights that a call of the unmodified model reads."""
        tensors = [
            parameter
            for name, parameter in self.model.get_decoder().named_parameters()
            if ".experts." not in name
        ]
        for layer, (_, experts) in zip(self.model.get_decoder().layers, self.routed[number], strict=True):
            for e in experts.unique().tolist():
                tensors += [layer.mlp.experts.gate_up_proj[e], layer.mlp.experts.down_proj[e]]
        return Regions(tensor.detach() for tensor in tensors)


def build(case: Case, generator: torch.Generator) -> Any:
    """The model, its experts as `grouped_mm`, with the codes and the routers described above."""
    model = tiny_qwen3_vl_moe(
        num_layers=case.layers,
        num_experts=case.num_experts,
        top_k=case.top_k,
        hidden=case.hidden,
        intermediate=case.intermediate,
    )
    for layer in model.get_decoder().layers:
        experts, router = layer.mlp.experts, layer.mlp.gate
        experts.gate_up_proj.normal_(0, case.hidden**-0.5, generator=generator)
        experts.down_proj.normal_(0, case.intermediate**-0.5, generator=generator)
        experts.down_proj[:, :_CODE] = 0
        layer.self_attn.o_proj.weight[:_CODE] = 0
        router.weight.zero_()
        router.weight[:, :_CODE].normal_(0, _CODE**-0.5, generator=generator)
    return model.requires_grad_(False)


def encoder_outputs(features: Tensor, extra: Tensor) -> Any:
    """What a vision tower gives for one picture; `extra` is added after the first layer."""
    from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as modeling

    # Pictures are lists here, whatever the annotations say.
    make: Any = modeling.BaseModelOutputWithDeepstackFeatures
    return make(pooler_output=[features], deepstack_features=[[extra]])


def copy_of(model: Any, experts: str, backend: Any = None, *, decode: bool = False) -> Any:
    """The same model with the same weights, not copied, and another implementation of the experts.

    Args:
        backend: Of torch.compile; None for the model as it is.
        decode: Compile the whole model; else its decoder alone, for transformers' code around it breaks the
            graph where there is a picture.
    """
    tensors = [*model.parameters(), *model.buffers()]
    made = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    made.set_experts_implementation(experts)
    compile_in_place(made, backend, decode)
    return made


def compile_in_place(model: Any, backend: Any, decode: bool) -> None:
    if backend is not None:
        (model if decode else model.get_decoder()).compile(backend=backend)


class Skipping(nn.Module):
    """A router that skips, the way a user of transformers can: weights at zero, or ids past the last expert.

    `threshold` is a buffer, `[T]`, so that other thresholds need no other compilation.
    """

    def __init__(self, router: Any, tokens: int, dropped_to: int | None) -> None:
        super().__init__()
        self.router, self.dropped_to = router, dropped_to
        self.threshold: Tensor
        self.register_buffer("threshold", torch.zeros(tokens))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, experts = self.router(hidden)
        dropped = weights < self.threshold[:, None]
        if self.dropped_to is not None:
            experts = experts.masked_fill(dropped, self.dropped_to)
        return logits, weights.masked_fill(dropped, 0), experts


def skipping_copy(subject: Subject, experts: str, dropped_to: int | None, backend: Any = None) -> Any:
    """`copy_of` with `Skipping` routers."""
    model = copy_of(subject.model, experts)
    for layer in model.get_decoder().layers:
        layer.mlp.gate = Skipping(layer.mlp.gate, subject.case.tokens, dropped_to)
        # How transformers says that ids past the last expert mean "not here".
        layer.mlp.experts._is_expert_parallel = dropped_to is not None and experts == "grouped_mm"
    compile_in_place(model, backend, bool(subject.case.prompt))
    return model


def set_thresholds(model: Any, subject: Subject, quantiles: Sequence[dict[int, float]]) -> None:
    for layer, quantile in zip(model.get_decoder().layers, quantiles, strict=True):
        if isinstance(layer.mlp.gate, Skipping):
            layer.mlp.gate.threshold.copy_(subject.thresholds(0, quantile))


def _without_experts(module: nn.Module, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """What is left when experts cost nothing: the router still runs, for its weights are used."""
    return hidden * (0.5 * weights.sum(-1, keepdim=True))


class KtModel:
    """Experts of every layer in kt-kernel, and a clock that counts its worker only while it works."""

    def __init__(self, subject: Subject, pool: Pool) -> None:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        case = subject.case
        self._pool, self._worked = pool, 0.0
        self._experts = {
            layer.mlp.experts.gate_up_proj: KtExperts(
                pool, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, case.top_k, case.tokens
            )
            for layer in subject.model.get_decoder().layers
        }
        ALL_EXPERTS_FUNCTIONS.register("kt_kernel", self._run)

    def _run(self, module: Any, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        start = self._pool.worker_time()
        out = self._experts[module.gate_up_proj](hidden.contiguous(), experts, weights.float())
        self._worked += self._pool.worker_time() - start
        return out

    def clock(self) -> float:
        return time.thread_time() + self._worked


def make_peers(subject: Subject, pool: Callable[[], Pool]) -> tuple[dict[str, Any], dict[str, str], Any]:
    """(name: model) that serve every skip rate; why others are absent; and kt-kernel's clock or None."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("no_experts", _without_experts)
    decode = bool(subject.case.prompt)
    num_experts = subject.case.num_experts
    made: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for experts in ("eager", "grouped_mm", "batched_mm"):
        ways: dict[str, Any] = {experts: None, f"{experts}, compiled": "inductor"}
        for way, backend in ways.items():
            if experts == "batched_mm" and not decode:
                absent[way] = "gathers 6 GiB of weights in each layer"
                continue
            if way == "eager, compiled":
                absent[way] = "breaks the graph at every expert; see the tables of one block"
                continue
            made[way] = copy_of(subject.model, experts, backend, decode=decode)
            made[f"{way}, zeroed"] = skipping_copy(subject, experts, None, backend)
            if experts != "batched_mm":
                made[f"{way}, dropped"] = skipping_copy(subject, experts, num_experts, backend)
    clock = None
    try:
        kt = KtModel(subject, pool())
        made["kt-kernel"], clock = skipping_copy(subject, "kt_kernel", -1), kt.clock
    except Absent as reason:
        absent["kt-kernel"] = str(reason)
    made[NO_EXPERTS] = copy_of(subject.model, "no_experts", "inductor", decode=decode)
    return made, absent, clock


def run_model_cases(
    cases: Sequence[Case], kt_folder: str | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Time the cases of one group, which differ in the skip rate alone."""
    torch._dynamo.config.recompile_limit = 64
    start = time.perf_counter()
    subject = Subject(cases[0])
    pool = functools.cache(lambda: Pool(kt_folder))
    peers, absent, kt_clock = make_peers(subject, pool)
    entries = []
    for case in cases:
        entry = _entry(case, subject, peers, absent, kt_clock)
        entries.append(entry)
        say(f"{case.id}: {time.perf_counter() - start:.0f} s, {entry['passes']} passes")
        start = time.perf_counter()
    return entries


def _entry(
    case: Case, subject: Subject, peers: dict[str, Any], absent: dict[str, str], kt_clock: Any
) -> dict[str, Any]:
    from report import timings

    quantiles = subject.quantiles(case.skip)
    profile = subject.profile(quantiles)
    backend = modes_fx.backend(profile)
    models = {OURS: copy_of(subject.model, "grouped_mm", backend, decode=bool(case.prompt)), **peers}
    plain = subject.call(subject.model, 0)
    with simulate(subject.model, profile) as counts:
        skipped = subject.call(subject.model, 0)
    absent, errors, runs = dict(absent), {}, {}
    samples = range(len(subject.routed))
    regions = [subject.weights_of(number) for number in samples]
    for name, model in models.items():
        if (name.endswith("dropped") and not case.skip) or (name.endswith("zeroed") and case.skip < 7 / 8):
            continue
        set_thresholds(model, subject, quantiles)
        out = subject.call(model, 0)
        if name != NO_EXPERTS:
            drops = name in (OURS, "kt-kernel") or name.endswith(("dropped", "zeroed"))
            want = skipped if drops else plain
            error = ((out - want).norm() / want.norm()).item()
            if not error <= _TOLERANCE:
                if name == OURS:
                    raise SystemExit(f"{case.id}: {OURS} is wrong, by {error:.1e} of the norm.")
                absent[name] = f"wrong, by {error:.1e} of the norm"
                continue
            errors[name] = error
        subject.call(model, 1)

        def prepare(number: int, model: Any = model) -> None:
            if model is peers.get("kt-kernel"):
                sweep()
            if subject.cache is not None:
                subject.call(model, number + 1)
            regions[number % len(regions)].evict()

        call = functools.partial(subject.call, model)
        is_kt = name == "kt-kernel"
        runs[name] = Run(call, prepare, kt_clock, KT_BEST_OF) if is_kt else Run(call, prepare)
    spent = interleave(runs, budget_s=case.budget_s, least=case.least)
    keeps = [subject.kept(number, quantiles) for number in samples]
    chosen, kept = (
        [
            sum(len(_experts(subject.routed[n][layer][1], keeps[n][layer], only)) for n in samples)
            / len(samples)
            for layer in range(case.layers)
        ]
        for only in (False, True)
    )
    return {
        "id": case.id,
        "case": asdict(case),
        "skip": 1
        - sum(keep.float().mean().item() for each in keeps for keep in each) / (len(keeps) * case.layers),
        "skip_of_the_call_checked": counts.skip(),
        "kept_pairs": round(sum(int(keep.sum()) for each in keeps for keep in each) / len(keeps)),
        "distinct": [sum(chosen) / len(chosen), sum(kept) / len(kept)],
        "distinct_per_layer": [chosen, kept],
        **timings(spent, OURS),
        "errors": errors,
        "absent": absent,
    }


def _experts(experts: Tensor, keep: Tensor, only_kept: bool) -> Tensor:
    return (experts[keep] if only_kept else experts).unique()
