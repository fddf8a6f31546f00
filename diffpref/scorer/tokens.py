"""Prompts -> tokens [N,L]. What a user writes is text: a special token written out in a prompt does not end it."""

import copy
import re
import unicodedata
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer, get_clean_fn

Clean = Callable[[str], str]

SPECIAL = re.compile(r"<(?=(?:start|end)_of_text>)", re.IGNORECASE)


def plain(text: str) -> str:
    """What the tokenizers of transformers do to a prompt: no mending of encodings, no HTML."""
    return " ".join(unicodedata.normalize("NFC", text).split()).lower()


CLEAN: dict[str, Clean] = {"open_clip": get_clean_fn("lower"), "processor": plain}


def spelled(text: str, clean: Clean) -> str:
    """A cleaned prompt in which "<end_of_text>" is seven pieces of text: a space after "<" changes no other token."""
    return SPECIAL.sub("< ", clean(text))


@cache
def common_tokenizer() -> SimpleTokenizer:
    """Made once: it reads 50,000 merges."""
    return SimpleTokenizer()


def make_tokenizer(text_cfg: dict[str, Any], clean: str = "open_clip", folder: Path | None = None) -> Any:
    """open_clip's tokenizer, prompts -> [N,L], or transformers' by its name in `text_cfg`, from `folder` if given.
    Raises FileNotFoundError where that is not to be had."""
    length = text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH)
    if name := text_cfg.get("hf_tokenizer_name"):
        settings = {"tokenizer_mode": text_cfg.get("tokenizer_mode")} | (text_cfg.get("tokenizer_kwargs") or {})
        try:
            return HFTokenizer(str(folder or name), context_length=length, split_special_tokens=True, **settings)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"no tokenizer {name} in {folder or 'the hub'} ({error})") from error
    settings = text_cfg.get("tokenizer_kwargs")
    tokenizer = SimpleTokenizer(**settings) if settings else copy.copy(common_tokenizer())
    tokenizer.context_length, tokenizer.clean_fn = length, partial(spelled, clean=CLEAN[clean])
    return tokenizer


def count(tokenizer: Any, prompt: str) -> int:
    """How many tokens a prompt has, with those at its ends, before it is cut."""
    if isinstance(tokenizer, SimpleTokenizer):
        return len(tokenizer.encode(prompt)) + 2
    return len(tokenizer.tokenizer(tokenizer.clean_fn(prompt), verbose=False).input_ids)  # else it warns, too
