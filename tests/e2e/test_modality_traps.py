"""The modality of a call is its own: not an earlier call's, not a failed call's, not another thread's.

The model runs in many graphs here, broken before each layer, so that the layers' graphs see no token ids and
take the modality that the first graph gave. Every prompt has the same length, so that a stale one would fit.
"""

import dataclasses
import threading
import warnings

import pytest
import torch
from torch import nn

import modes_fx
from modes_fx.testing import IMAGE, tiny_inputs, tiny_profile, tiny_qwen3_vl_moe

ATOL = 1e-4


def named_as_in(decoder, profile):
    """The profile of the whole model, with its layers' names as the decoder alone has them."""
    layers = (
        dataclasses.replace(layer, name=layer.name.removeprefix("model.language_model."))
        for layer in profile.layers
    )
    return profile if hasattr(decoder, "lm_head") else dataclasses.replace(profile, layers=tuple(layers))


class Interrupted(Exception):
    pass


class Broken(nn.Module):
    """A model whose graphs end before each layer, where a test may do something."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder
        self.before = {}
        for index, layer in enumerate(decoder.layers):
            layer.register_forward_pre_hook(lambda *_, index=index: self._pause(index))

    @torch.compiler.disable
    def _pause(self, index):
        self.before.get(index, lambda: None)()

    def forward(self, input_ids=None, inputs_embeds=None):
        if input_ids is not None:
            inputs_embeds = self.decoder.get_input_embeddings()(input_ids)
        self._pause(-1)
        return self.decoder(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state


@pytest.fixture
def setup(oracle, thresholds_at):
    with torch.no_grad():
        model = tiny_qwen3_vl_moe()
        decoder = model.get_decoder()
        picture = tiny_inputs()["input_ids"]
        text = tiny_inputs(text=picture.shape[1] - 1, grid=None, seed=1)["input_ids"]
        profile = thresholds_at(
            decoder, named_as_in(decoder, tiny_profile(model)), {"input_ids": picture}, 0.5
        )
        yield Setup(decoder, profile, oracle, {"picture": picture, "text": text})


class Setup:
    """One model, compiled; what each of its calls must give, from the oracle."""

    def __init__(self, decoder, profile, oracle, ids):
        self.ids = ids
        self.calls = {}
        self.want = {}
        truth = oracle(decoder, profile)
        plain = decoder.get_input_embeddings()
        noise = torch.randn(1, ids["text"].shape[1], 32, generator=torch.Generator().manual_seed(5))
        for kind, tokens in ids.items():
            # Where a picture is, the vision encoder's rows are no token's.
            embeds = torch.where((tokens == IMAGE)[..., None], noise, plain(tokens))
            self.calls[kind] = {"input_ids": tokens}
            self.calls[f"embedded {kind}"] = {"inputs_embeds": embeds}
            with truth():
                self.want[kind] = decoder(input_ids=tokens, use_cache=False).last_hidden_state
            truth._see_tokens = lambda *_, see=truth._see_tokens, ids=tokens: see(
                None, (), {"input_ids": ids}
            )
            with truth():
                embedded = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
            self.want[f"embedded {kind}"] = embedded
            truth = oracle(decoder, profile)
        # Of unknown modality: nothing may be skipped.
        self.calls["noise"] = {"inputs_embeds": noise}
        self.want["noise"] = decoder(inputs_embeds=noise, use_cache=False).last_hidden_state
        self.backend = modes_fx.backend(profile, lowering="eager")
        self.broken = Broken(decoder)
        self.broken.compile(backend=self.backend)

    def check(self, *names):
        for name in names:
            torch.testing.assert_close(self.broken(**self.calls[name]), self.want[name], atol=ATOL, rtol=0)

    def interrupt(self, name, layer):
        def fail():
            raise Interrupted

        self.broken.before[layer] = fail
        with pytest.raises(Interrupted):
            self.broken(**self.calls[name])
        del self.broken.before[layer]


def test_the_calls_differ_where_a_wrong_modality_would_show(setup):
    pairs = [("picture", "text"), ("embedded picture", "embedded text"), ("picture", "embedded picture")]
    assert all((setup.want[a] - setup.want[b]).abs().max() > 0.01 for a, b in pairs)
    assert len({tuple(ids.shape) for ids in setup.ids.values()}) == 1


def test_pictures_and_text_take_turns(setup):
    setup.check("picture", "text", "embedded picture", "picture", "embedded text", "text", "embedded picture")
    sources = [unit.modality_source for unit in setup.backend.graphs if unit.layers()]
    assert set(sources) == {"another graph"}


def test_a_call_of_unknown_modality_after_one_of_known_skips_nothing_and_says_so(setup):
    setup.check("picture")
    with pytest.warns(UserWarning, match="modality of the tokens is unknown, so nothing is skipped"):
        setup.check("noise")
    setup.check("text", "noise", "embedded picture", "noise")


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("after", ["noise", "embedded text", "embedded picture", "text"])
def test_a_call_that_raised_lends_its_modality_to_nobody(setup, layer, after):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        setup.check("picture", after)
        setup.interrupt("picture", layer)
        setup.check(after, "picture")


def test_not_even_while_its_exception_is_handled(setup):
    setup.check("picture", "embedded text")
    setup.broken.before[0] = lambda: (_ for _ in ()).throw(Interrupted)
    try:
        setup.broken(**setup.calls["picture"])
    except Interrupted as interrupted:
        setup.broken.before.clear()
        assert interrupted.__traceback__ is not None
        with pytest.warns(UserWarning, match="nothing is skipped"):
            setup.check("noise")
        setup.check("embedded text")


def test_nor_to_a_second_call_of_the_module_around_both(setup):
    class Retry(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, first, second):
            try:
                return self.model(**first)
            except Interrupted:
                self.model.before.clear()
                return self.model(**second)

    setup.check("picture", "embedded text")
    setup.broken.before[0] = lambda: (_ for _ in ()).throw(Interrupted)
    with pytest.warns(UserWarning, match="nothing is skipped"):
        got = Retry(setup.broken)(setup.calls["picture"], setup.calls["noise"])
    torch.testing.assert_close(got, setup.want["noise"], atol=ATOL, rtol=0)


def test_a_modality_of_another_length_is_not_used(setup):
    longer = tiny_inputs(text=12)["input_ids"]
    setup.broken(input_ids=longer)
    setup.interrupt("picture", 0)
    with pytest.warns(UserWarning, match="nothing is skipped"):
        setup.broken(inputs_embeds=torch.randn(1, longer.shape[1], 32))
    setup.check("picture", "text")


def test_two_threads_with_two_prompts_each(setup):
    names = [("picture", "embedded text"), ("text", "embedded picture")]
    setup.check(*names[0], *names[1])
    barrier = threading.Barrier(2, timeout=60)
    # Both calls are between the same two layers at the same time, each time.
    setup.broken.before = {layer: barrier.wait for layer in range(3)}
    results = {}

    def work(mine):
        # Whether gradients are on is a thread's own.
        with torch.no_grad():
            for name in mine:
                results[name] = setup.broken(**setup.calls[name])

    threads = [threading.Thread(target=work, args=(mine,)) for mine in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted([*names[0], *names[1]])
    for name, got in results.items():
        torch.testing.assert_close(got, setup.want[name], atol=ATOL, rtol=0)
