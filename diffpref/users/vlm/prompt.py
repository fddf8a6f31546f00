"""The words around a user's pairs, and where the pictures go."""

from collections.abc import Sequence
from typing import Any

from diffpref.scorer.weights import said

VERSION = 1  # raise it when a word below changes: states of different prompts do not compare

INTRODUCTION = (
    "One person compared pairs of pictures. The two pictures of a pair were made for the same caption. "
    "Of each pair the picture that the person preferred comes first, then the one that they did not prefer."
)
PAIR = "\n\nPair {number}. Caption: {caption}\nPreferred picture: "
OTHER = "\nDispreferred picture: "
REQUEST = (
    "\n\nDescribe the pictures of each pair in a few words and compare their style, their composition, their colours "
    "and their quality. Say what the preferred pictures have in common that the dispreferred ones lack. Then end with "
    'one short paragraph that begins with "User profile:" and describes the taste of this person, so that somebody '
    "could choose for them between two new pictures."
)
PICTURE = None  # in the parts of a prompt: here a picture is shown


def parts(captions: Sequence[str]) -> list[str | None]:
    """What the user of a chat says about so many pairs: words, and PICTURE two times for each pair."""
    shown: list[str | None] = [INTRODUCTION]
    for number, caption in enumerate(captions, 1):
        shown += [PAIR.format(number=number, caption=caption), PICTURE, OTHER, PICTURE]
    return [*shown, REQUEST]


def chat(processor: Any, captions: Sequence[str]) -> str:
    """The prompt about these pairs in the form of the model's chat, with marks where the pictures belong.

    Some templates put all pictures before all words, LLaVA-OneVision's among them, and a model could not tell which
    one is preferred. So the marks are written into the words, each as the template itself would write it.
    """
    mark, special = picture_mark(processor), special_tokens(processor)
    words = [mark if part is PICTURE else part for part in parts([plain(caption, special) for caption in captions])]
    return rendered(processor, [text("".join(words))])


def picture_mark(processor: Any) -> str:
    """What the chat template writes for one picture. Raises ValueError where it writes nothing."""
    before, after = text("before"), text("after")
    without = rendered(processor, [before, after])
    with_one = rendered(processor, [before, {"type": "image"}, after])
    start = next((i for i, pair in enumerate(zip(without, with_one, strict=False)) if len(set(pair)) > 1), len(without))
    mark = with_one[start : start + len(with_one) - len(without)]
    if not mark.strip():
        raise ValueError("its chat template has no place for pictures")
    return mark


def text(words: str) -> dict[str, str]:
    """A part of a message."""
    return {"type": "text", "text": words}


def rendered(processor: Any, content: list[dict[str, str]]) -> str:
    """A user's message, up to where the answer begins. Raises ValueError where there is no chat template."""
    try:
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    except (ValueError, TypeError, AttributeError) as error:  # no template, or one that takes no lists of parts
        raise ValueError(f"its chat template cannot be used ({said(error)})") from error


def special_tokens(processor: Any) -> list[str]:
    """What the tokenizer takes for more than its letters, the longest first."""
    tokenizer = processor.tokenizer
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens, picture_mark(processor).strip()}, key=len, reverse=True)


def plain(caption: str, special: Sequence[str]) -> str:
    """A caption without special tokens: a written <image> would stand for a picture that is not there."""
    for token in special:
        caption = caption.replace(token, " ")
    return caption.strip()
