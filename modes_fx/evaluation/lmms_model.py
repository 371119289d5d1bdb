"""The model `modes_fx` of lmms-eval: any transformers model with a chat template, with a profile or not.

lmms-eval finds it by the entry point `lmms_eval.models`, hands over conversations with pictures, takes text.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages

from modes_fx.data.loading import load_model, load_processor
from modes_fx.evaluation.skipping import How, start_skipping
from modes_fx.progress import progress_bar
from modes_fx.skipping import Counts

# Where a task does not say how long an answer may be.
_NEW_TOKENS = 1024


def manifest() -> ModelManifest:
    """What the entry point gives lmms-eval."""
    path = f"{SkippingModel.__module__}.{SkippingModel.__name__}"
    return ModelManifest(model_id="modes_fx", chat_class_path=path)


class SkippingModel(lmms):
    """Generates answers with transformers' own `generate()`.

    Args:
        pretrained: A folder, a name on the Hub, `demo`, or a model; the latter needs its processor.
        profile: Path of a profile; without it nothing is skipped.
        how: See `start_skipping`.
        batch_size: Conversations in a batch, padded on the left.
        dtype, device_map, trust_remote_code: As of `load_model`.
        device: Where to move the model, e.g. `cpu`; by default `load_model` decides.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: Any,
        profile: Any = None,
        how: How = "attach",
        processor: Any = None,
        batch_size: int | str = 1,
        dtype: str = "auto",
        device_map: str | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, str):
            remote = {"trust_remote_code": bool(trust_remote_code)}
            processor = load_processor(pretrained, **remote)
            pretrained = load_model(pretrained, dtype=dtype, device_map=device_map, **remote)
            if device is not None:
                pretrained = pretrained.to(device)
        self.model, self.processor = pretrained, processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.batch_size = int(batch_size)
        self.counts: Callable[[], Counts] | None = None
        if profile is not None:
            self.counts = start_skipping(pretrained, profile, how)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        answers: dict[int, GenerationResult] = {}
        with progress_bar("answer", len(requests), enabled=self.rank == 0) as bar:
            for places in self._batches(requests):
                chats = [self._chat(requests[place]) for place in places]
                options = requests[places[0]].args[2]
                for place, answer in zip(places, self._answer(chats, options), strict=True):
                    answers[place] = answer
                    self.cache_hook.add_partial("generate_until", requests[place].args, answer.text)
                    bar.step()
        return [answers[place] for place in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> Any:
        raise NotImplementedError(
            "modes_fx answers by generation; choose tasks of output_type generate_until."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> Any:
        raise NotImplementedError("modes_fx answers one question at a time; choose tasks of one round.")

    def _batches(self, requests: list[Instance]) -> Iterator[list[int]]:
        """Places of requests that are generated together: those of the same options."""
        alike: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[2].items())), []).append(place)
        for places in alike.values():
            for start in range(0, len(places), self.batch_size):
                yield places[start : start + self.batch_size]

    def _chat(self, request: Instance) -> list[dict[str, Any]]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = ChatMessages(
            messages=doc_to_messages(self.task_dict[task][split][doc_id])
        ).to_hf_messages()
        if self.processor is self.tokenizer:
            for message in messages:
                message["content"] = "".join(part.get("text", "") for part in message["content"])
        found: list[dict[str, Any]] = messages
        return found

    def _answer(self, chats: list[list[dict[str, Any]]], options: dict[str, Any]) -> list[GenerationResult]:
        padding: dict[str, Any] = {"padding": len(chats) > 1}
        padding = padding if self.processor is self.tokenizer else {"processor_kwargs": padding}
        side, self.tokenizer.padding_side = self.tokenizer.padding_side, "left"
        try:
            inputs = self.processor.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **padding,
            ).to(self.model.device)
        finally:
            self.tokenizer.padding_side = side
        with torch.no_grad():
            output = self.model.generate(**inputs, **generation_options(options))
        generated = output[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        pad = self.tokenizer.pad_token_id
        counts = (
            (generated != pad).sum(1).tolist() if pad is not None else [generated.shape[1]] * len(generated)
        )
        return [
            GenerationResult(
                text=cut(text, options.get("until", ())), token_counts=TokenCounts(output_tokens=n)
            )
            for text, n in zip(texts, counts, strict=True)
        ]


def generation_options(options: dict[str, Any]) -> dict[str, Any]:
    """What `generate()` is told of a task's options: greedy unless they say a temperature above zero."""
    given: dict[str, Any] = {"max_new_tokens": options.get("max_new_tokens", _NEW_TOKENS), "do_sample": False}
    if options.get("num_beams"):
        given["num_beams"] = options["num_beams"]
    if options.get("temperature"):
        sampled = {name: options[name] for name in ("temperature", "top_p", "top_k") if options.get(name)}
        given |= {**sampled, "do_sample": True}
    return given


def cut(text: str, until: Any) -> str:
    """The text before the first of the strings that end an answer."""
    for end in (until,) if isinstance(until, str) else until:
        if end:
            text = text.split(end)[0]
    return text.strip()
