"""The vision-language model: pairs of one person -> its hidden states, and what it says."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature

from diffpref.cache.fingerprint import fingerprint, module_facts
from diffpref.scorer.weights import checked_device, listed, said
from diffpref.users.vlm.pairs import Shown
from diffpref.users.vlm.prompt import VERSION, chat

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# One answer for one prompt: no sampling, whatever the checkpoint's own settings are.
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1} | dict.fromkeys(("temperature", "top_p", "top_k"))


@dataclass(frozen=True)
class Answer:
    """states: [L,U] in the model's dtype, U wide, of the embeddings and each layer.  text: what the model wrote."""

    states: Tensor
    text: str


class Describer:
    """A vision-language model that is shown pairs of one person.

    Args:
        model: Of a class that AutoModelForImageTextToText knows.
        processor: Of the model; it has a tokenizer and a chat template.
        tokens: Most tokens of an answer. With 0 none is written: the states are those of the prompt's last token.

    Attributes:
        id: Stands for all that decides what a state means: weights, their dtype, chat template, prompt and `tokens`.

    Raises:
        ValueError: The processor takes no pictures, or has no chat template.
    """

    def __init__(self, model: Any, processor: Any, tokens: int = 512):
        if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
            raise ValueError(f"its processor is a {type(processor).__name__}, which takes no pictures with their words")
        self.model, self.processor, self.tokens = model.eval(), processor, tokens
        facts = module_facts(model), chat(processor, ["caption"]), VERSION, tokens
        self.id = f"vlm-{fingerprint(*facts)[:16]}"

    @property
    def facts(self) -> dict[str, Any]:
        """What made the states, for people; `id` stands for it."""
        commit = getattr(self.model.config, "_commit_hash", None)
        about = {"model": self.model.name_or_path, "revision": commit or "", "dtype": str(self.model.dtype)}
        return {"id": self.id, **about, "prompt": VERSION, "tokens": self.tokens}

    def __call__(self, inputs: BatchFeature) -> Answer:
        """What `inputs` gave -> states and text. The states are those that the last token of the answer was chosen by,
        PPD's hidden_states[-1]; the last layer's are behind the final norm, as transformers gives them.

        Raises ValueError where the model overflows.
        """
        with torch.inference_mode():
            out = self.model.generate(
                **inputs.to(self.model.device, self.model.dtype),
                **GREEDY,
                max_new_tokens=max(self.tokens, 1),
                return_dict_in_generate=True,
                output_hidden_states=True,
            )
        states = torch.cat([layer[0, -1:] for layer in out.hidden_states[-1]]).cpu()
        if not states.isfinite().all():
            raise ValueError(f"its states are not finite in {states.dtype}; --dtype float32 or bfloat16 holds more")
        written = out.sequences[0, inputs["input_ids"].shape[1] :] if self.tokens else []
        return Answer(states, self.processor.tokenizer.decode(written, skip_special_tokens=True).strip())

    def inputs(self, pairs: Sequence[Shown]) -> BatchFeature:
        """Pairs -> what the model takes. Raises ValueError for more than it can read."""
        prompt = chat(self.processor, [pair.caption for pair in pairs])
        pictures = [picture for pair in pairs for picture in (pair.preferred, pair.dispreferred)]
        start = self.processor.tokenizer.bos_token
        inputs = self.processor(
            text=[prompt],
            images=[pictures],
            return_tensors="pt",
            add_special_tokens=not (start and prompt.startswith(start)),  # templates often write the first token
        )
        self.refuse_too_long(inputs["input_ids"].shape[1])
        return inputs

    def refuse_too_long(self, length: int) -> None:
        """Raise ValueError for a prompt that leaves no room for the answer."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and length + self.tokens > most:
            raise ValueError(
                f"too long: {length} tokens of words and pictures and {self.tokens} of an answer, and the model reads "
                f"{most}; --pairs or --tokens should be fewer, or the pictures smaller"
            )


def load_describer(
    name: str, revision: str | None = None, *, tokens: int = 512, dtype: str = "auto", device: str | None = None
) -> Describer:
    """The model of a folder or of the hub.

    Raises FileNotFoundError where it is not to be had, ValueError where it is no such model, not whole, or not to be
    run on `device`.
    """
    where = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with model_named(name):
        processor = AutoProcessor.from_pretrained(name, revision=revision)
        found: Any = AutoModelForImageTextToText.from_pretrained(
            name, revision=revision, dtype=DTYPES[dtype], output_loading_info=True
        )
        model, info = found
        if info["missing_keys"]:  # transformers draws them at random
            raise ValueError(f"its files lack weights: {listed(sorted(info['missing_keys']))}")
        return Describer(model.to(where), processor, tokens)


@contextmanager
def model_named(name: str) -> Iterator[None]:
    """What transformers raises for what it cannot load, in a line that says which model it is about."""
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(f"--model {name}: no folder of a model, nor to be had: {said(error)}") from error
    except (ValueError, TypeError, KeyError, ImportError, AttributeError, RuntimeError) as error:
        raise ValueError(f"--model {name}: {said(error)}") from error
