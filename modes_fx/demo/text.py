"""The demo's tokenizer and prompt format.

A prompt is `<|im_start|> user <|vision_start|> <|image_pad|>xN <|vision_end|> QUESTION <|im_end|>
<|im_start|> assistant`; the answer follows and ends with `<|im_end|>`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<unk>",
)
PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO, UNKNOWN = range(8)
PATCH = 8
MERGE = 2

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }} "
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' or 'image' in part %}<|vision_start|> <|image_pad|> <|vision_end|> "
    "{% elif 'text' in part %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


def prompt_text(question: str, picture: bool = True) -> str:
    """The prompt of one question, one `<|image_pad|>` standing for the whole picture."""
    image = "<|vision_start|> <|image_pad|> <|vision_end|> " if picture else ""
    return f"<|im_start|> user {image}{question} <|im_end|> <|im_start|> assistant"


def build_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: the eight special tokens, then `words`, one id each."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL[UNKNOWN]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL[UNKNOWN],
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[END],
        additional_special_tokens=[SPECIAL[i] for i in (START, VISION_START, VISION_END, IMAGE, VIDEO)],
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
    )
