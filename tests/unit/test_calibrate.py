"""Calibration: alpha by hand, skipping by hooks, resuming, and every refusal."""

import importlib
import json
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modes_fx.blocks import find_blocks
from modes_fx.calibration.calibrate import calibrate, token_ids
from modes_fx.calibration.weight_scale import weight_scale
from modes_fx.encoder_memory import EncoderMemory
from modes_fx.errors import ModesError, ProfileError
from modes_fx.measure import Meter, answer_logits
from modes_fx.modality import OTHER, TEXT, VISION, token_modality
from modes_fx.profile import Profile, fingerprint
from modes_fx.skipping import drop_block, keep_all, skip, thresholds
from modes_fx.testing import IMAGE, PAD, SPECIAL, VIDEO, tiny_inputs, tiny_qwen3_vl_moe

IDS = ((IMAGE, VIDEO), SPECIAL)


def labelled(answer: int = 3, **given: Any) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs(**given)
    labels = inputs["input_ids"].clone()
    labels[:, :-answer] = -100
    return {**inputs, "labels": labels}


def padded() -> dict[str, torch.Tensor]:
    """Two rows, the first padded on the left by two tokens."""
    batch = labelled(batch=2, seed=3)
    for key, fill in (("input_ids", PAD), ("attention_mask", 0), ("mm_token_type_ids", 0), ("labels", -100)):
        row = torch.cat([torch.full((2,), fill), batch[key][0]])
        other = torch.cat(
            [batch[key][1], torch.tensor([50, 51]) if key == "input_ids" else batch[key][1][-2:]]
        )
        batch[key] = torch.stack([row, other])
    return batch


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_qwen3_vl_moe()


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    return [labelled(seed=0), labelled(batch=2, answer=2, seed=1), padded(), labelled(grid=None, seed=2)]


@pytest.fixture(scope="module")
def calibrated(model, batches) -> Profile:
    return calibrate(model, batches, special_token_ids=SPECIAL, progress=False)


def by_hand(model: Any, batches: list[Any], block: int, modality: int) -> float:
    """KL when `experts.forward` itself is replaced, over all label positions of the full logits."""
    total, tokens = 0.0, 0
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        kind = token_modality(inputs["input_ids"], *IDS).flatten()
        experts = model.model.language_model.layers[block].mlp.experts
        forward = experts.forward

        def partly(
            hidden: Any, index: Any, weights: Any, forward: Any = forward, kind: Any = kind
        ) -> torch.Tensor:
            return forward(hidden, index, weights) * (kind != modality)[:, None]

        with torch.no_grad():
            original = model(**inputs).logits
            experts.forward = partly
            skipped = model(**inputs).logits
            del experts.forward
        log_p, log_q = original.double().log_softmax(-1), skipped.double().log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)[:, :-1]
        answers = batch["labels"][:, 1:] != -100
        total += float(kl[answers].sum())
        tokens += int(answers.sum())
    return total / tokens


def test_alpha_is_the_kl_by_hand_normalised_per_modality(model, batches, calibrated):
    for key, modality in (("alpha_text", TEXT), ("alpha_vision", VISION)):
        kls = [by_hand(model, batches, block, modality) for block in range(3)]
        wanted = [kl / sum(kls) for kl in kls]
        assert [getattr(layer, key) for layer in calibrated.layers] == pytest.approx(wanted, rel=1e-3)
    assert sum(layer.alpha_text for layer in calibrated.layers) == pytest.approx(1)


def test_the_last_block_has_no_use_for_vision_tokens(calibrated):
    assert calibrated.layers[-1].alpha_vision == 0.0
    assert all(layer.alpha_vision > 0 for layer in calibrated.layers[:-1])


def test_a_calibrated_profile_describes_the_model_and_skips_nothing(model, batches, calibrated):
    assert [layer.name for layer in calibrated.layers] == [
        f"model.language_model.layers.{i}.mlp" for i in range(3)
    ]
    assert {(layer.num_experts, layer.top_k) for layer in calibrated.layers} == {(8, 4)}
    gates = [layer.mlp.gate.weight for layer in model.model.language_model.layers]
    assert [layer.fingerprint for layer in calibrated.layers] == [fingerprint(gate) for gate in gates]
    assert (calibrated.tau_text, calibrated.tau_vision) == (0.0, 0.0)
    assert calibrated.visual_token_ids == (IMAGE, VIDEO)
    assert calibrated.special_token_ids == tuple(sorted(SPECIAL))
    assert calibrated.num_samples == sum(len(batch["labels"]) for batch in batches)
    assert calibrated.versions["torch"] == torch.__version__ or "torch" in calibrated.versions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 2.5, 0.25, 16.0])
def test_the_factor_of_a_renormalising_router_is_told_from_its_weights(dtype, factor):
    chosen = torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) + 1e-3
    weights = (chosen / (chosen.sum(-1, keepdim=True) + 1e-6)).to(dtype) * factor
    assert weight_scale(weights) == weight_scale(weights.float()) == factor
    assert weight_scale((chosen * factor).to(dtype)) == 1.0
    assert weight_scale(torch.zeros(4, 6, dtype=dtype)) == 1.0
    assert weight_scale(torch.full((4, 6), factor, dtype=dtype)) == 1.0


def test_a_long_factor_keeps_its_digits_and_a_blurred_one_does_not():
    chosen = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
    weights = chosen / chosen.sum(-1, keepdim=True) * 2.446
    assert weight_scale(weights) == 2.446
    assert weight_scale(weights.to(torch.bfloat16)) == pytest.approx(2.446, rel=2**-7)


def test_calibration_measures_the_factor_over_real_tokens_of_each_block(model, batches, calibrated):
    assert [layer.weight_scale for layer in calibrated.layers] == [1.0] * 3
    gate = model.model.language_model.layers[1].mlp.gate

    def scale(module: Any, args: Any, output: Any) -> Any:
        logits, weights, index = output
        # Padding may get any weights.
        weights = torch.where(batch["attention_mask"].flatten()[:, None] > 0, weights * 2.5, 77.0)
        return logits, weights, index

    batch = padded()
    handle = gate.register_forward_hook(scale)
    scaled = calibrate(model, [batch], special_token_ids=SPECIAL, progress=False)
    handle.remove()
    assert [layer.weight_scale for layer in scaled.layers] == [1.0, 2.5, 1.0]


def test_the_paper_variant_shares_alpha_between_the_modalities(model, batches):
    shared = calibrate(model, batches, special_token_ids=SPECIAL, variant="paper", progress=False)
    assert all(layer.alpha_text == layer.alpha_vision for layer in shared.layers)
    assert shared.method == "paper"
    assert sum(layer.alpha_text for layer in shared.layers) == pytest.approx(1)


def test_calibration_leaves_the_model_as_it_was(batches):
    model = tiny_qwen3_vl_moe(num_layers=2)
    model.train()
    model.model.visual.eval()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, batches[:1], special_token_ids=SPECIAL, progress=False)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert model.training and not model.model.visual.training
    assert "forward" not in vars(model.model.visual)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_compiled_model_is_calibrated_uncompiled(model, batches, calibrated):
    compiled = torch.compile(model, backend=lambda gm, inputs: pytest.fail("the compiled model ran"))
    assert calibrate(compiled, batches, special_token_ids=SPECIAL, progress=False) == calibrated


def test_logits_kept_at_answers_are_those_of_the_full_call(model, batches):
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            full = model(**inputs).logits[:, :-1][batch["labels"][:, 1:] != -100]
            kept = answer_logits(model, batch)
        torch.testing.assert_close(kept, full)


def test_padding_is_not_counted_and_special_tokens_are_never_dropped(model):
    batch = padded()
    blocks = find_blocks(model)
    everything = thresholds([(1.0, 1.0)] * 3, float("inf"), float("inf"))
    with torch.no_grad(), skip(model, blocks, everything, *IDS) as counts:
        answer_logits(model, batch)
    real = batch["attention_mask"].bool()
    kinds = token_modality(batch["input_ids"], *IDS)[real]
    wanted = [4 * int((kinds == kind).sum()) for kind in (TEXT, VISION, OTHER)]
    assert counts.pairs.tolist() == [wanted] * 3
    assert counts.dropped.tolist() == [[*wanted[:2], 0]] * 3
    assert counts.skip(TEXT) == counts.skip(VISION) == 1.0


def test_counts_follow_generation_with_a_cache(model):
    inputs = tiny_inputs(text=5)
    with skip(model, find_blocks(model), keep_all, *IDS) as counts:
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert counts.pairs.sum(-1).tolist() == [4 * (inputs["input_ids"].shape[1] + 3)] * 3


def test_renormalising_keeps_the_mass_of_the_kept_weights(model, batches):
    blocks = find_blocks(model)
    seen: list[torch.Tensor] = []

    def note(module: Any, args: Any) -> None:
        seen.append(args[2])

    everything_small = thresholds([(1.0, 1.0)] * 3, 0.25, 0.25)
    with torch.no_grad(), skip(model, blocks, everything_small, *IDS, renormalise=True):
        handle = blocks[0].experts.register_forward_pre_hook(note)
        answer_logits(model, batches[0])
        handle.remove()
    mass = seen[0].sum(-1)
    assert bool((seen[0] == 0).any())
    torch.testing.assert_close(mass[mass > 0], torch.ones_like(mass[mass > 0]))


def test_visual_wins_over_special():
    ids = torch.tensor([[1, 5, 9, 6]])
    kinds = token_modality(ids, (5, 6), (1, 5))
    assert kinds.tolist() == [[OTHER, VISION, TEXT, VISION]]
    assert kinds.dtype == torch.uint8
    assert token_modality(ids, (), ()).tolist() == [[TEXT] * 4]


def test_the_vision_tower_runs_once_per_batch_and_gives_the_same(model, batches):
    meter = Meter(model, batches, *IDS)
    calls = 0

    def count(*args: Any) -> None:
        nonlocal calls
        calls += 1

    handle = model.model.visual.blocks[0].register_forward_hook(count)
    remembered = meter.measure(drop_block(0, TEXT))
    handle.remove()
    assert calls == 0
    meter.encoder = EncoderMemory(model, limit_bytes=0)
    assert meter.measure(drop_block(0, TEXT)).kl == remembered.kl > 0


class Killed(Exception):
    """What stops a calibration half way."""


class KilledAt(list[Any]):
    """Batches that can be looked through once; the second time, iteration dies before the given one."""

    def __init__(self, batches: list[Any], at: int) -> None:
        super().__init__(batches)
        self.at, self.times = at, 0

    def __iter__(self) -> Iterator[Any]:
        self.times += 1
        for i, batch in enumerate(super().__iter__()):
            if i == self.at and self.times == 2:
                raise Killed
            yield batch


@pytest.mark.parametrize("at", [1, 3])
def test_a_killed_run_resumes_and_gives_the_same_bytes(tmp_path, model, batches, calibrated, at, monkeypatch):
    resume = tmp_path / "resume.json"
    with pytest.raises(Killed):
        calibrate(model, KilledAt(batches, at), special_token_ids=SPECIAL, progress=False, resume=resume)
    assert len(json.loads(resume.read_text())["batches"]) == at
    measured: list[str] = []
    exact = importlib.import_module("modes_fx.calibration.alpha_exact")
    kl_sum = exact.kl_sum
    monkeypatch.setattr(exact, "kl_sum", lambda *args: measured.append(args[-1]) or kl_sum(*args))
    again = calibrate(model, batches, special_token_ids=SPECIAL, progress=False, resume=resume)
    assert {where.split(",")[0] for where in measured} == {f"batch {i}" for i in range(at, len(batches))}
    again.save(tmp_path / "again.json")
    calibrated.save(tmp_path / "whole.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_run_killed_within_a_batch_resumes_within_it(tmp_path, model, batches, calibrated, monkeypatch):
    resume = tmp_path / "resume.json"
    calls = 0
    module = importlib.import_module("modes_fx.calibration.alpha_exact")
    kl_sum = module.kl_sum

    def dies(*args: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return kl_sum(*args)

    monkeypatch.setattr(module, "kl_sum", dies)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, batches, special_token_ids=SPECIAL, progress=False, resume=resume)
    saved = json.loads(resume.read_text())
    assert len(saved["batches"]) == 1
    assert [kl is not None for row in saved["partial"] for kl in row] == [True] * 2 + [False] * 4
    assert calibrate(model, batches, special_token_ids=SPECIAL, progress=False, resume=resume) == calibrated


def test_a_resume_file_of_something_else_is_refused(tmp_path, model, batches):
    resume = tmp_path / "resume.json"
    calibrate(model, batches[:2], special_token_ids=SPECIAL, progress=False, resume=resume)

    def run(model: Any, batches: Any, **given: Any) -> None:
        calibrate(model, batches, special_token_ids=SPECIAL, progress=False, resume=resume, **given)

    with pytest.raises(ProfileError, match="another calibration: batch 0 is not the one"):
        run(model, [batches[1], batches[0]])
    with pytest.raises(ProfileError, match="it has 2 batches, and there are only 1 now"):
        run(model, batches[:1])
    with pytest.raises(ProfileError, match="another calibration: model differs"):
        run(tiny_qwen3_vl_moe(seed=7), batches[:2])
    with pytest.raises(ProfileError, match="another calibration: variant differs"):
        run(model, batches[:2], variant="paper")
    resume.write_text("{}")
    with pytest.raises(ProfileError, match=r"resume\.json is not a file that calibrate"):
        run(model, batches[:2])


def without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "labels"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda b: [], "batches is empty"),
        (lambda b: iter(b), "exhausted after the first; pass a list"),
        (lambda b: (x for x in b), "a generator is exhausted"),
        (lambda b: b[0], "got one dict; wrap it in a list"),
        (lambda b: [b[0]["input_ids"]], "Each batch must be a dict .* got Tensor"),
        (lambda b: [without_labels(b[0])], "A batch has no labels"),
        (lambda b: [{**b[0], "labels": b[0]["labels"] * 0 - 100}], "all labels are -100"),
        (lambda b: [{**b[0], "labels": b[0]["labels"][:, 1:]}], "labels must have the shape of input_ids"),
        (lambda b: [{**b[0], "pixel_values": b[0]["pixel_values"] * torch.nan}], "contain NaN or infinity"),
    ],
)
def test_unusable_batches_are_refused(model, batches, make, message):
    with pytest.raises(ModesError, match=message):
        calibrate(model, make(batches), special_token_ids=SPECIAL, progress=False)
    with pytest.raises(ModesError, match=message):
        Meter(model, make(batches), *IDS)


def test_batches_that_change_between_passes_are_refused(model, batches):
    class Fickle(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            for batch in super().__iter__():
                yield {**batch, "input_ids": batch["input_ids"].clone()}
            self.pop()

    with pytest.raises(ModesError, match="differ between two passes: the first gave 4, and batch 3"):
        Meter(model, Fickle(batches), *IDS).measure(keep_all)


def test_a_model_without_experts_is_refused(batches):
    with pytest.raises(ModesError, match="Linear has no MoE block"):
        calibrate(torch.nn.Linear(2, 2), batches, progress=False)


def test_an_unknown_variant_is_refused(model, batches):
    with pytest.raises(ModesError, match="variant must be one of modality, paper, modes-code, got 'both'"):
        calibrate(model, batches, special_token_ids=SPECIAL, variant="both", progress=False)


def test_a_call_without_input_ids_is_refused(model):
    embedded = model.get_input_embeddings()(torch.tensor([[9, 10]]))
    with (
        pytest.raises(ModesError, match="without input_ids"),
        skip(model, find_blocks(model), keep_all, *IDS),
    ):
        model(inputs_embeds=embedded)


def test_special_ids_come_from_the_processor_or_what_is_given(model):
    processor = SimpleNamespace(tokenizer=SimpleNamespace(all_special_ids=[9, 1, IMAGE]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert token_ids(model, processor) == ((IMAGE, VIDEO), (1, 9))
        assert token_ids(model, processor.tokenizer) == ((IMAGE, VIDEO), (1, 9))
        assert token_ids(model, processor, [7]) == ((IMAGE, VIDEO), (7,))
        assert token_ids(model, special_token_ids=[]) == ((IMAGE, VIDEO), ())
    with pytest.raises(ModesError, match="no tokenizer with all_special_ids"):
        token_ids(model, SimpleNamespace())


def test_without_a_processor_the_configuration_is_asked_with_a_warning(model):
    with pytest.warns(UserWarning, match="count as special"):
        assert token_ids(model) == ((IMAGE, VIDEO), tuple(sorted(SPECIAL)))


def test_a_model_that_sees_but_names_no_placeholder_is_refused():
    model = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace(vision_config=SimpleNamespace())
    with pytest.raises(ModesError, match=r"Linear sees pictures, but .* set config\.image_token_id"):
        token_ids(model, special_token_ids=[])


def test_the_progress_bar_shows_block_and_kl(model, batches, capsys, monkeypatch):
    notes: list[str] = []
    monkeypatch.setattr("modes_fx.progress.Bar.note", lambda self, text: notes.append(text))
    calibrate(model, batches[:1], special_token_ids=SPECIAL, progress=True)
    assert notes[0].startswith("model.language_model.layers.0.mlp KL ")
    assert len(notes) == 6
    assert capsys.readouterr().out == ""
