"""What a pass measures: KL, flips and right answers per sample, skip per phase, intervals, and refusals."""

import math
from typing import Any

import pytest
import torch

from modes_fx.batches import survey, token_phase
from modes_fx.errors import ModesError
from modes_fx.measure import Meter, Pass, answer_logits, bootstrap, kl_per_token
from modes_fx.modality import TEXT
from modes_fx.skipping import DECODE, PREFILL, Tokens, keep_all, skip, thresholds
from modes_fx.testing import IMAGE, PAD, SPECIAL, VIDEO, VOCABULARY, tiny_inputs, tiny_qwen3_vl_moe

IDS = ((IMAGE, VIDEO), SPECIAL)


def labelled(answer: int = 3, **given: Any) -> dict[str, Any]:
    inputs = tiny_inputs(**given)
    labels = inputs["input_ids"].clone()
    labels[:, :-answer] = -100
    return {**inputs, "labels": labels}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_qwen3_vl_moe(num_layers=2)


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Any]]:
    two = labelled(batch=2, seed=1)
    two["labels"][1, -3] = -100
    return [{**two, "task": ["read", "count"]}, {**labelled(answer=4, seed=2), "task": "read"}]


HALF = thresholds([(1.0, 1.0)] * 2, 0.25, 0.25)


def test_sums_per_sample_are_those_of_each_row_alone(model, batches):
    meter = Meter(model, batches, *IDS)
    measured = meter.measure(HALF)
    assert measured.tasks == ("read", "count", "read")
    assert measured.answer_tokens == (3, 2, 4)
    rows = []
    for batch in batches:
        with torch.no_grad():
            original = answer_logits(model, batch)
            with skip(model, meter.blocks, HALF, *IDS):
                skipped = answer_logits(model, batch)
        row = (batch["labels"][:, 1:] != -100).nonzero()[:, 0]
        kl = kl_per_token(original, skipped, "here")
        flips = original.argmax(-1) != skipped.argmax(-1)
        rows += [(float(kl[row == i].sum()), int(flips[row == i].sum())) for i in range(len(batch["labels"]))]
    assert measured.kl_sums == pytest.approx([kl for kl, _ in rows])
    assert measured.flips == tuple(flips for _, flips in rows)
    assert measured.kl == pytest.approx(sum(measured.kl_sums) / 9)
    assert measured.flip_rate == sum(measured.flips) / 9
    assert measured.accuracy == {
        "read": (measured.right[0] + measured.right[2]) / 2,
        "count": float(measured.right[1]),
    }
    assert meter.unskipped.kl == 0.0 and meter.unskipped.flip_rate == 0.0 and meter.unskipped.skip == 0.0


def test_phases_are_the_prompt_and_what_is_generated_token_by_token():
    ignored = -100
    labels = torch.tensor(
        [
            [ignored, ignored, 5, 6, 7, ignored],
            [ignored, 5, 6, ignored, 7, 8],
            [ignored, ignored, ignored, ignored, ignored, 9],
            [ignored] * 6,
        ]
    )
    assert token_phase(labels).tolist() == [
        [0, 0, 1, 1, 2, 2],
        [0, 1, 0, 0, 1, 2],
        [0, 0, 0, 0, 0, 2],
        [0] * 6,
    ]


def test_a_phase_counts_the_pairs_that_generation_would_compute_in_it(model):
    batch = labelled(text=6, batch=2)
    measured = Meter(model, [batch], *IDS).measure(HALF)
    assert measured.phases is not None
    prefill, decode = measured.phases
    tokens = batch["input_ids"].shape[1]
    # Blocks, rows, tokens of the phase, slots.
    assert int(prefill.pairs.sum()) == 2 * 2 * (tokens - 3) * 4
    assert int(decode.pairs[:, TEXT].sum()) == int(decode.pairs.sum()) == 2 * 2 * 2 * 4

    def drop_decoded(block: int, weights: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        assert tokens.phase is not None
        return (tokens.phase == DECODE)[:, None].expand_as(weights)

    measured = Meter(model, [batch], *IDS).measure(drop_decoded)
    assert (measured.skip_prefill, measured.skip_decode) == (0.0, 1.0)
    assert measured.skip == 2 / tokens
    assert PREFILL == 0


def test_a_pass_goes_on_from_where_it_was_kept_and_gives_the_same_bits(model, batches):
    meter = Meter(model, batches, *IDS)
    whole = meter.measure(HALF)
    kept: list[dict[str, Any]] = []

    def keep(done: Pass) -> None:
        kept.append(
            {key: value if isinstance(value, int) else list(value) for key, value in vars(done).items()}
        )

    meter.measure(HALF, after_batch=keep)
    calls = 0
    original = answer_logits

    def counted(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modes_fx.measure.answer_logits", counted)
        again = meter.measure(HALF, done=Pass(**kept[0]))
    assert calls == 1
    assert again.kl == whole.kl and again.kl_sums == whole.kl_sums and again.right == whole.right
    assert torch.equal(again.counts.dropped, whole.counts.dropped)
    assert torch.equal(again.counts.pairs, whole.counts.pairs)


def test_the_bootstrap_is_the_known_one_of_a_mean_and_widens_with_the_level():
    values = torch.randn(400, generator=torch.Generator().manual_seed(3)).double()
    mean, error = float(values.mean()), float(values.std()) / 20
    low, high = bootstrap(values.tolist(), [1] * 400)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.25 * error)
    assert bootstrap(values.tolist(), [1] * 400) == (low, high)
    narrow = bootstrap(values.tolist(), [1] * 400, level=0.5)
    assert low < narrow[0] < mean < narrow[1] < high
    # A ratio of sums: what no sample varies in has no width.
    assert bootstrap([2.0, 4.0, 6.0], [1, 2, 3]) == (2.0, 2.0)
    assert bootstrap([0.0] * 5, [0, 0, 1, 1, 1]) == (0.0, 0.0)
    with pytest.raises(ValueError, match="at least one sample"):
        bootstrap([], [])


def test_the_studentised_bootstrap_covers_the_mean_of_skewed_samples_more_often():
    generator = torch.Generator().manual_seed(0)
    covered = {False: 0, True: 0}
    for trial in range(100):
        # Lognormal: mean exp(1 / 2 * 1.2^2), skewness about 11.
        values = torch.randn(40, generator=generator).double().mul(1.2).exp().tolist()
        for studentised in covered:
            low, high = bootstrap(values, [1] * 40, resamples=300, seed=trial, studentised=studentised)
            covered[studentised] += low <= math.exp(0.72) <= high
    assert covered[True] >= 86 and covered[True] > covered[False]
    assert bootstrap([2.0, 4.0], [1, 2], studentised=True) == (2.0, 2.0)


def test_the_interval_of_a_pass_holds_its_kl(model):
    batches = [labelled(batch=4, seed=seed) for seed in range(5)]
    measured = Meter(model, batches, *IDS).measure(HALF)
    low, high = measured.kl_interval()
    assert 0 < low < measured.kl < high < math.inf


def test_batches_are_surveyed_before_any_model_runs(model):
    found = survey([labelled(batch=2), labelled(answer=1, grid=None)], *IDS, VOCABULARY)
    assert found.answer_tokens == (3, 3, 1) and found.tasks == ("", "", "")
    assert found.tokens[1] == 2 * 4 and found.decode_tokens == 2 * 2
    padded = labelled()
    padded["attention_mask"][:, -1] = 0
    assert (
        sum(survey([padded], *IDS, VOCABULARY).tokens)
        == sum(survey([labelled()], *IDS, VOCABULARY).tokens) - 1
    )
    assert PAD in SPECIAL


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        ([[1]], "Each batch must be a dict"),
        ([tiny_inputs()], "A batch has no labels"),
        (
            [{**labelled(), "labels": torch.zeros(1, 3)}],
            r"labels must have the shape of input_ids, got \(1, 3\)",
        ),
        ([{**labelled(), "labels": torch.full((1, 16), -100)}], "No answer token in any batch"),
        ([{**labelled(), "task": ["a", "b"]}], "a list of one name for each of the 1 rows"),
        ([{**labelled(), "task": [7]}], "a list of one name for each of the 1 rows"),
    ],
)
def test_unusable_batches_are_refused_before_the_model_runs(model, batches, message):
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ModesError, match=message):
        Meter(model, batches, *IDS)
    handle.remove()
    assert not calls


def test_a_model_without_values_is_refused(batches):
    with pytest.raises(ModesError, match="is on the meta device and has no values; load the model first"):
        Meter(tiny_qwen3_vl_moe(num_layers=1).to("meta"), batches, *IDS)


def test_logits_that_are_not_finite_name_the_batch(batches):
    broken = tiny_qwen3_vl_moe(num_layers=1)
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    with pytest.raises(ModesError, match="original model, batch 0 contain NaN or infinity"):
        Meter(broken, batches, *IDS)


def test_batches_that_change_between_passes_are_refused(model):
    class Changing:
        def __init__(self) -> None:
            self.times = 0

        def __iter__(self) -> Any:
            self.times += 1
            return iter([labelled(seed=0 if self.times < 3 else 1)])

    meter = Meter(model, Changing(), *IDS)
    with pytest.raises(ModesError, match="batches differ between two passes"):
        meter.measure(keep_all)
