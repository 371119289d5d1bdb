"""Passes that start in the middle: the same bits for half the work, or whole passes and a reason why."""

import functools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from modes_fx.blocks import find_blocks
from modes_fx.calibration import prefix as prefix_module
from modes_fx.calibration.calibrate import calibrate
from modes_fx.profile import Profile
from modes_fx.testing import FAMILIES, SPECIAL, tiny_inputs, tiny_qwen3_vl_moe

# One for each thing that a layer may be or hand on: a stack of pictures beside it, a dense first layer and
# shared experts, experts split by modality, experts that see every token, mixers and routers with a state.
SHAPES = [
    *("qwen3_vl_moe", "kimi_k25+deepseek_v3", "ernie4_5_vl_moe", "llama4", "gemma4", "granitemoehybrid"),
    *("nemotron_h_omni", "qwen3_next", "deepseek_v4", "zaya"),
]


def labelled(inputs: dict[str, Any], answer: int = 3) -> dict[str, Any]:
    labels = inputs["input_ids"].clone()
    labels[:, :-answer] = -100
    return {**inputs, "labels": labels}


def run(model: Any, batches: list[Any], **given: Any) -> Profile:
    return calibrate(model, batches, special_token_ids=SPECIAL, progress=False, **given)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings of the module."""
    ours = [record for record in caplog.records if record.name == prefix_module.__name__]
    return [record.message for record in ours if record.levelno == logging.WARNING]


@pytest.fixture
def two_batches() -> list[Any]:
    return [labelled(tiny_inputs(batch=2, seed=0)), labelled(tiny_inputs(seed=1))]


@pytest.mark.parametrize("name", SHAPES)
def test_reuse_gives_the_bits_of_whole_passes(name, caplog):
    family = FAMILIES[name]
    model = family.build()
    batches = [labelled(family.inputs("batch")), labelled(family.inputs("text"))]
    assert run(model, batches) == run(model, batches, reuse=False)
    assert not lines(caplog)


def test_reuse_gives_the_bits_of_whole_passes_in_bfloat16(two_batches):
    model = tiny_qwen3_vl_moe(dtype=torch.bfloat16)
    assert run(model, two_batches) == run(model, two_batches, reuse=False)


@pytest.fixture
def runs(monkeypatch) -> Callable[[Any], Counter[str]]:
    """Counts the calls of attention and experts that are run and not replayed."""

    def watch(model: Any) -> Counter[str]:
        count: Counter[str] = Counter()
        layer = model.model.language_model.layers[0]
        for key, kind in (("attention", type(layer.self_attn)), ("experts", type(layer.mlp.experts))):
            monkeypatch.setattr(kind, "forward", counted(kind.forward, count, key))
        return count

    def counted(forward: Any, count: Counter[str], key: str) -> Any:
        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            count[key] += 1
            return forward(*args, **kwargs)

        return call

    return watch


@pytest.mark.parametrize(("variant", "columns"), [("modality", 2), ("paper", 1)])
def test_a_layer_runs_only_after_the_block_that_is_dropped(runs, variant, columns):
    layers = 6
    model = tiny_qwen3_vl_moe(num_layers=layers)
    one, two = labelled(tiny_inputs(seed=0)), labelled(tiny_inputs(seed=1))
    count = runs(model)
    first = run(model, [one], variant=variant)
    of_first = count.copy()
    count.clear()
    both = run(model, [one, two], variant=variant)
    of_second = count - of_first
    ours = layers + columns * layers * (layers - 1) // 2
    assert of_second == {"attention": ours, "experts": ours}
    count.clear()
    assert run(model, [one, two], variant=variant, reuse=False) == both != first
    plain = layers * (1 + columns * layers)
    assert count == {"attention": 2 * plain, "experts": 2 * plain}
    assert ours <= 0.5 * plain
    # The check of the first batch: each layer but the first once more, and one pass less the reused part.
    assert of_first["attention"] - ours <= 2 * layers


@pytest.mark.parametrize("layers_held", [0, 1, 2.5])
def test_without_the_memory_each_layer_runs_once_more(monkeypatch, runs, two_batches, layers_held):
    model = tiny_qwen3_vl_moe(num_layers=4)
    whole = run(model, two_batches)
    size = 3 * 4 * two_batches[0]["input_ids"].numel() * 32
    monkeypatch.setattr(prefix_module, "PREFIX_MEMORY_BYTES", int(layers_held * size))
    held: list[int] = []
    record = prefix_module.Prefix._fits

    def fits(self: Any, output: Any) -> bool:
        held.append(sum(t.nbytes for t in prefix_module._tensors([self._outputs, *self._inside.values()])))
        return record(self, output)

    monkeypatch.setattr(prefix_module.Prefix, "_fits", fits)
    count = runs(model)
    assert run(model, two_batches) == whole
    assert max(held) <= max(layers_held, 2 / 3) * size
    # What takes it with all the memory, a pass more for each batch, and the check.
    assert count["attention"] <= 2 * (4 + 2 * 6 + 4 * 2) + 2 * 4 + 8


def test_a_model_with_hooks_and_forwards_of_its_own_keeps_them(two_batches):
    model = tiny_qwen3_vl_moe(num_layers=2)
    layer = model.model.language_model.layers[0]
    forward = layer.forward
    calls = 0

    def own(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    expected = run(model, two_batches)
    layer.forward = own
    assert run(model, two_batches) == expected
    assert layer.forward is own and calls
    others = [module for module in model.modules() if module is not layer]
    assert not any("forward" in vars(module) for module in others)


class Leaves:
    """Makes the first layer leave something behind that a later one takes, past the layers' outputs."""

    def __init__(self, model: Any, taker: int, *, strict: bool) -> None:
        layers = model.model.language_model.layers
        self.left: torch.Tensor | None = None
        leave, take = layers[0].forward, layers[taker].forward

        def leaving(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            output = leave(hidden, **kwargs)
            self.left = output * 0.5
            return output

        def taking(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            left, self.left = self.left, None
            if left is None and strict:
                raise RuntimeError("nothing was left")
            return take(hidden if left is None else hidden + left, **kwargs)

        layers[0].forward, layers[taker].forward = leaving, taking


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("taker", [1, 3])
def test_a_layer_that_takes_more_than_the_output_before_it_is_found_out(two_batches, caplog, taker, strict):
    model = tiny_qwen3_vl_moe(num_layers=4)
    Leaves(model, taker, strict=strict)
    found = run(model, two_batches)
    (line,) = lines(caplog)
    said = "fails without" if strict else "gives something else without"
    assert f"each block takes a whole one: layer {taker} {said} what earlier layers leave" in line
    assert found == run(model, two_batches, reuse=False)


def test_what_the_loop_over_the_layers_keeps_is_found_out(two_batches, caplog):
    """The model itself may use every layer's output, which a pass that starts in the middle does not have."""
    model = tiny_qwen3_vl_moe(num_layers=4)
    decoder = model.model.language_model
    outputs: list[torch.Tensor] = []
    decoder.register_forward_pre_hook(lambda *args: outputs.clear())
    for layer in decoder.layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    decoder.norm.register_forward_pre_hook(lambda module, args: (args[0] + 0.1 * sum(outputs),))
    found = run(model, two_batches)
    assert "a pass that starts in the middle gives other logits" in lines(caplog)[0]
    assert found == run(model, two_batches, reuse=False)


def test_layers_that_run_twice_are_not_replayed(two_batches, caplog):
    model = tiny_qwen3_vl_moe(num_layers=2)
    decoder = model.model.language_model
    decoder.layers[1].register_forward_hook(
        lambda module, args, kwargs, output: module.forward(output, **kwargs), with_kwargs=True
    )
    found = run(model, two_batches)
    assert "its layers are not run once each, in order" in lines(caplog)[0]
    assert found == run(model, two_batches, reuse=False)


def test_blocks_outside_a_list_of_layers_are_not_replayed(two_batches, caplog):
    model = tiny_qwen3_vl_moe(num_layers=2)
    decoder = model.model.language_model
    plain = torch.nn.Module()
    for name, layer in decoder.layers.named_children():
        plain.add_module(name, layer)

    class Iterable(type(plain)):  # type: ignore[misc]
        def __iter__(self) -> Any:
            return self.children()

        def __getitem__(self, part: slice) -> Any:
            return list(self.children())[part]

        def __len__(self) -> int:
            return len(list(self.children()))

    plain.__class__ = Iterable
    expected = run(model, two_batches)
    decoder.layers = plain
    found = run(model, two_batches)
    assert "its blocks are not in one list of layers" in lines(caplog)[0]
    assert [layer.alpha_text for layer in found.layers] == [layer.alpha_text for layer in expected.layers]


def test_experts_that_are_called_in_parts_run_again(two_batches):
    model = tiny_qwen3_vl_moe(num_layers=2)
    for block in find_blocks(model):
        mlp = model.get_submodule(block.name)
        experts = mlp.experts

        def halves(hidden: Any, index: Any, weights: Any, experts: Any = experts) -> torch.Tensor:
            half = len(hidden) // 2
            return torch.cat(
                [
                    type(experts).forward(experts, hidden[:half], index[:half], weights[:half]),
                    type(experts).forward(experts, hidden[half:], index[half:], weights[half:]),
                ]
            )

        experts.forward = halves
    assert run(model, two_batches) == run(model, two_batches, reuse=False)
