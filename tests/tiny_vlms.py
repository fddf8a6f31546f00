"""Tiny random vision-language models out of transformers' real classes, with their real processors; no download."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

SIDE, PATCH, WIDTH, LAYERS, LENGTH = 16, 8, 32, 3, 4096  # of pictures, and of the language model
LANGUAGE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}
VISION: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

# As the published checkpoints' templates do it, but for the system's message: LLaVA-OneVision's puts pictures first.
IMAGES_FIRST = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def letters(*special: str, **roles: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes and these special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    roles = {"pad_token": "<|pad|>", "eos_token": "<|im_end|>", **roles}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=list(special), model_max_length=LENGTH, **roles
    )


def language(words: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    """Settings of a language model for a tokenizer."""
    tokens = {"vocab_size": len(words), "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
    return LANGUAGE | tokens | {"bos_token_id": words.bos_token_id} | more


def llava_onevision() -> tuple[Any, Any]:
    """SigLIP and Qwen2; of several pictures each is one crop."""
    words = letters("<|im_start|>", "<image>", "<video>")
    image, video = map(words.convert_tokens_to_ids, ("<image>", "<video>"))
    grid = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": PATCH} | VISION,
        text_config={"model_type": "qwen2"} | language(words),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=grid,
        tie_word_embeddings=False,
    )
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grid),
        words,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=IMAGES_FIRST,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def qwen2_vl() -> tuple[Any, Any]:
    """Pictures of any size, rotary positions in three dimensions."""
    names = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    words = letters(*names)
    _, start, end, image, video = map(words.convert_tokens_to_ids, names)
    config = Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "patch_size": PATCH},
        text_config=language(words) | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
    )
    size = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": (4 * PATCH) ** 2}  # in pixels, of the whole picture
    shape = {"patch_size": PATCH, "size": size}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**shape), words, Qwen2VLVideoProcessor(**shape), chat_template=QWEN
    )
    return Qwen2VLForConditionalGeneration(config), processor


def idefics3() -> tuple[Any, Any]:
    """SigLIP and Llama; each picture in crops and as a whole, and a first token that the template writes itself."""
    names = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    crops = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    words = letters(*names, *crops, bos_token="<|im_start|>", eos_token="<end_of_utterance>")
    first = (words.bos_token, words.bos_token_id)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{first[0]} $A", special_tokens=[first])
    config = Idefics3Config(
        vision_config={"image_size": SIDE, "patch_size": PATCH} | VISION,
        text_config={"model_type": "llama"} | language(words),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
        scale_factor=2,
    )
    pictures = Idefics3ImageProcessor(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    processor = Idefics3Processor(pictures, words, image_seq_len=1, chat_template=IDEFICS)
    return Idefics3ForConditionalGeneration(config), processor


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "idefics3": idefics3,
}


def tiny_vlm(name: str, folder: Path, seed: int = 1) -> str:
    """A random model and its processor, saved to a folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, processor = MODELS[name]()
        for parameter in model.parameters():
            if parameter.ndim > 1:  # as they are drawn, pictures hardly change what it says
                parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
