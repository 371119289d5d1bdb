"""What is wrong with batches or model is said before the first pass, which may be hours long."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from modes_fx.calibration.calibrate import calibrate
from modes_fx.errors import ModesError
from modes_fx.testing import FAMILIES, SPECIAL, VOCABULARY, tiny_inputs, tiny_qwen3_vl_moe

Batch = dict[str, Any]


def labelled(**given: Any) -> Batch:
    inputs = tiny_inputs(**given)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return {**inputs, "labels": labels}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_qwen3_vl_moe(num_layers=2)


@pytest.fixture
def never_runs(model) -> Iterator[None]:
    def fail(*args: Any) -> None:
        pytest.fail("the model was called")

    handle = model.register_forward_pre_hook(fail)
    yield
    handle.remove()


def run(model: Any, batches: Any, **given: Any) -> Any:
    return calibrate(model, batches, special_token_ids=SPECIAL, progress=False, **given)


def last(batch: Batch, key: str, value: int) -> Batch:
    """The batch with another last token or label."""
    changed = batch[key].clone()
    changed[:, -1] = value
    return {**batch, key: changed}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda b: {k: v[:, :0] for k, v in b.items() if k in ("input_ids", "labels")},
            r"Batch 1 is empty: its input_ids have shape \(1, 0\)",
        ),
        (
            lambda b: last(b, "labels", VOCABULARY),
            f"The labels of batch 1 hold {VOCABULARY}, which is no token id: the vocabulary has {VOCABULARY}",
        ),
        (lambda b: last(b, "labels", -1), "The labels of batch 1 hold -1, .* and -100 for labels to ignore"),
        (
            lambda b: last(b, "input_ids", 10**6),
            "The input_ids of batch 1 hold 1000000, which is no token id",
        ),
        (
            lambda b: {**b, "pixel_values": b["pixel_values"].index_fill(0, torch.tensor(3), torch.inf)},
            "The pixel_values of batch 1 contain NaN or infinity; leave the batch out",
        ),
    ],
)
@pytest.mark.usefixtures("never_runs")
def test_a_spoiled_batch_is_refused_before_the_first_pass(model, spoil: Callable[[Batch], Batch], message):
    with pytest.raises(ModesError, match=message):
        run(model, [labelled(), spoil(labelled(seed=1))])


@pytest.mark.usefixtures("never_runs")
def test_vision_cannot_be_calibrated_without_pictures(model):
    for variant in ("modality", "modes-code"):
        with pytest.raises(ModesError, match=r"No batch has a picture, .* or use variant=.paper."):
            run(model, [labelled(grid=None)], variant=variant)


def test_one_alpha_for_both_needs_no_pictures(model):
    profile = run(model, [labelled(grid=None)], variant="paper")
    assert all(layer.alpha_text == layer.alpha_vision > 0 for layer in profile.layers)


def test_a_model_without_eyes_needs_no_pictures():
    family = FAMILIES["mixtral"]
    inputs = family.inputs("text")
    profile = run(family.build(), [{**inputs, "labels": inputs["input_ids"]}])
    # Nothing is ever vision, so no block matters more than another.
    assert {layer.alpha_vision for layer in profile.layers} == {1 / len(profile.layers)}


@pytest.mark.usefixtures("never_runs")
def test_text_is_needed(model):
    with pytest.raises(ModesError, match="No batch has a text token"):
        calibrate(model, [labelled()], special_token_ids=range(VOCABULARY), progress=False)


def test_a_model_on_the_meta_device_is_refused(model):
    with pytest.raises(ModesError, match="is on the meta device and has no values; load the model first"):
        run(copy.deepcopy(model).to("meta"), [labelled()])


def test_a_model_whose_logits_are_not_finite_is_refused_at_its_first_pass(tmp_path):
    model = tiny_qwen3_vl_moe(num_layers=2)
    with torch.no_grad():
        model.model.language_model.norm.weight[0] = torch.nan
    calls = []
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    with pytest.raises(ModesError, match="logits of the original model, batch 0 contain NaN or infinity"):
        run(model, [labelled(), labelled(seed=1)])
    assert len(calls) == 1


def test_after_a_batch_that_gives_no_finite_logits_the_others_are_kept(tmp_path, model):
    """Some inputs overflow; who leaves them out goes on where the run was."""
    resume = tmp_path / "resume.json"
    batches = [labelled(seed=seed) for seed in range(3)]
    bad = batches[2]["pixel_values"] * 1e30
    with pytest.raises(ModesError, match="logits of the original model, batch 2 contain NaN or infinity"):
        run(model, [*batches[:2], {**batches[2], "pixel_values": bad * 1e8}], resume=resume)
    calls = []
    handle = model.register_forward_pre_hook(lambda *args: calls.append(1))
    assert run(model, batches[:2], resume=resume) == run(model, batches[:2], reuse=False)
    handle.remove()
    assert len(calls) == 2 * (1 + 2 * 2)  # those of the run that does not resume


def test_batches_that_come_in_another_order_each_time_are_refused(model):
    class Shuffled(list[Batch]):
        def __iter__(self) -> Iterator[Batch]:
            self.reverse()
            return super().__iter__()

    with pytest.raises(
        ModesError, match="The batches differ between two passes: the first gave 2, and batch 0"
    ):
        run(model, Shuffled([labelled(), labelled(seed=1)]))


def test_batches_that_become_fewer_are_refused(model):
    class Shrinking(list[Batch]):
        def __iter__(self) -> Iterator[Batch]:
            yield from super().__iter__()
            self.pop()

    with pytest.raises(
        ModesError, match="The batches differ between two passes: the first gave 2, and batch 1"
    ):
        run(model, Shrinking([labelled(), labelled(seed=1)]))
