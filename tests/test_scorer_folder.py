"""A scorer's folder keeps all of it, is open_clip's too, and says what is wrong with it."""

import json
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import clip_tokenizer
from tiny_scorers import TINY, WIDTH, pictures, tiny_scorer, tiny_towers

from diffpref.scorer import HEADS, PreferenceScorer
from diffpref.scorer.heads.cosine import Cosine

PROMPTS = ["a red cat", "a dog", "snow"]
load = PreferenceScorer.from_pretrained


@pytest.mark.parametrize("head", sorted(HEADS))
def test_a_folder_keeps_everything(head, tmp_path):
    settings = {"aspects": {"names": ["a", "b"]}}.get(head, {})
    facts = {"temperature": 0.3, "description": "é", "trained_on": "x", "measured": {"accuracy": 0.7}}
    scorer = tiny_scorer(tmp_path / "s", head=head, settings=settings, name="mine", **facts)
    again = load(tmp_path / "s")
    for key, value in (facts | {"name": "mine", "needs_prompt": True}).items():
        assert getattr(again, key) == value
    assert type(again.head) is HEADS[head] and not any(p.requires_grad for p in again.towers.parameters())
    ask = {"images": pictures(3, size=(50, 30)), "prompts": PROMPTS[:3]}
    assert torch.equal(again.score(**ask), scorer.score(**ask))
    again.save_pretrained(tmp_path / "t")
    for file in (tmp_path / "s").iterdir():
        assert file.read_bytes() == (tmp_path / "t" / file.name).read_bytes()
    assert {file.suffix for file in (tmp_path / "s").iterdir()} == {".json", ".safetensors"}


def test_preprocessing_is_part_of_the_folder(tmp_path):
    cfg = {"mean": (0.1, 0.2, 0.3), "std": (1, 2, 3), "resize_mode": "longest", "interpolation": "bilinear"}
    towers = tiny_towers(preprocess_cfg=cfg | {"fill_color": 9}, pixels="open_clip")
    PreferenceScorer(towers, Cosine(WIDTH), name="x").save_pretrained(tmp_path)
    picture = pictures(1, size=(60, 20))[0]
    pixels = load(tmp_path).prepare(picture)
    assert torch.equal(pixels, towers.preprocess(picture))
    torch.testing.assert_close(
        pixels[:, 0, 0], (torch.tensor(9 / 255) - torch.tensor(cfg["mean"])) / torch.tensor([1, 2, 3])
    )
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}", load_weights=False)
    assert [str(step) for step in theirs.transforms[:2]] == [str(step) for step in towers.preprocess.transforms[:2]]


@torch.no_grad()
def test_open_clip_reads_the_folder(tmp_path):
    scorer, images = tiny_scorer(tmp_path), pictures(2)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    image, text, _ = model.eval()(
        torch.stack([preprocess(i) for i in images]), open_clip.get_tokenizer(f"local-dir:{tmp_path}")(PROMPTS[:2])
    )
    product = 100 * (image * text).sum(1)
    torch.testing.assert_close(scorer.score(images=images, prompts=PROMPTS[:2]), product, rtol=0, atol=3e-5)


def test_towers_are_stored_in_half_if_asked(tmp_path):
    scorer = tiny_scorer()
    scorer.save_pretrained(tmp_path, dtype=torch.float16)
    assert {value.dtype for value in load_file(tmp_path / "open_clip_model.safetensors").values()} == {torch.float16}
    again = load(tmp_path)
    assert {parameter.dtype for parameter in again.towers.parameters()} == {torch.float32}
    ask = {"images": pictures(3), "prompts": "a cat"}
    torch.testing.assert_close(again.score(**ask), scorer.score(**ask), rtol=0, atol=0.2)


def test_a_tokenizer_of_transformers_lies_in_the_folder(tmp_path):
    """With a vocabulary of its own; special tokens written out are text there, too."""
    made = clip_tokenizer()
    made.save_pretrained(tmp_path)
    text = TINY["text_cfg"] | {"hf_tokenizer_name": "none", "vocab_size": len(made), "pool_type": "eos"}
    text |= {"context_length": 32}
    config = TINY | {"text_cfg": text | {"eos_id": made.eos_token_id}}
    towers = tiny_towers(model_cfg=config, folder=tmp_path)
    scorer = PreferenceScorer(towers, Cosine(WIDTH), name="x")
    scorer.save_pretrained(tmp_path / "s")
    again = load(tmp_path / "s")
    ask = {"images": pictures(3), "prompts": ["abc", "b", f"a {made.eos_token} b"]}
    assert torch.equal(again.score(**ask), scorer.score(**ask))
    tokens = towers.tokenize(["a", f"a {made.eos_token} b"])
    assert (tokens[1] == made.eos_token_id).int().argmax() > (tokens[0] == made.eos_token_id).int().argmax()


def test_a_tokenizer_that_is_not_there(tmp_path):
    config = TINY | {"text_cfg": TINY["text_cfg"] | {"hf_tokenizer_name": "somebody/words"}}
    with pytest.raises(FileNotFoundError, match="no tokenizer somebody/words in the hub"):
        tiny_towers(model_cfg=config)
    with pytest.raises(FileNotFoundError, match=f"no tokenizer somebody/words in {tmp_path}"):
        tiny_towers(model_cfg=config, folder=tmp_path)


def test_nan_weights_are_not_written(tmp_path):
    scorer = tiny_scorer()
    scorer.towers.model.ln_final.bias[3] = torch.nan
    with pytest.raises(ValueError, match=r"open_clip_model.safetensors: weights are NaN or infinite: ln_final\.bias$"):
        scorer.save_pretrained(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def change_json(path: Path, changes: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(path: Path, changes: dict) -> None:
    save_file({name: value for name, value in (load_file(path) | changes).items() if value is not None}, path)


TOWERS, HEAD, FACTS, CONFIG = "open_clip_model.safetensors", "head.safetensors", "scorer.json", "open_clip_config.json"
CHANGE = {FACTS: change_json, CONFIG: change_json, TOWERS: change_tensors, HEAD: change_tensors}
SMALLER = TINY | {"vision_cfg": TINY["vision_cfg"] | {"layers": 1}}
ODD = TINY["text_cfg"] | {"heads": 3}
DAMAGE = {
    "newer": (FACTS, {"format": 2}, "scorer.json has format 2; this version reads 1"),
    "head": (FACTS, {"head": "oracle"}, "head 'oracle' not known, .*; known: .*cosine"),
    "settings": (FACTS, {"settings": {"width": WIDTH, "depth": 3}}, "settings of the head cosine not known"),
    "width": (FACTS, {"settings": {"width": 9}}, "the head is 9 wide, the towers' embeddings 24"),
    "pixels": (FACTS, {"pixels": "best"}, "has no or an unknown 'best'"),
    "temperature": (FACTS, {"temperature": 0}, "scorer.json: temperature is 0; it must be a number above 0"),
    "a text as temperature": (FACTS, {"temperature": "x"}, "scorer.json: temperature is 'x'; it must be a number"),
    "no temperature": (FACTS, {"temperature": None}, "scorer.json: temperature is None; it must be a number above 0"),
    "needs_prompt": (FACTS, {"needs_prompt": "no"}, "scorer.json: needs_prompt is 'no'; it must be true or false"),
    "users": (FACTS, {"users": 3}, "scorer.json: users is 3; it must be a list of names, or null"),
    "name": (FACTS, {"name": None}, "scorer.json: name is None; it must be a text"),
    "no JSON": (FACTS, b"{", "scorer.json is damaged"),
    "a list": (CONFIG, b"[]", r"open_clip_config.json is damaged \(it holds no JSON object\)"),
    "no model_cfg": (CONFIG, b"{}", "has no or an unknown 'model_cfg'"),
    "no architecture": (CONFIG, {"model_cfg": TINY | {"depth": 1}}, "no open_clip architecture: .*'depth'"),
    "no vision_cfg": (CONFIG, {"model_cfg": TINY | {"vision_cfg": "x"}}, "config.json cannot .* vision_cfg is 'x', no"),
    "no object": (CONFIG, {"model_cfg": "x"}, "open_clip_config.json cannot be used: "),
    "width below 0": (CONFIG, {"model_cfg": TINY | {"embed_dim": -1}}, "config.json cannot be used: no open_clip arch"),
    "heads": (CONFIG, {"model_cfg": TINY | {"text_cfg": ODD}}, "config.json cannot be used: no open_clip arch.*divis"),
    "size": (CONFIG, {"preprocess_cfg": {"mean": "x", "mode": 3}}, "open_clip_config.json cannot be used: "),
    "preprocess_cfg": (CONFIG, {"preprocess_cfg": "x"}, "open_clip_config.json cannot be used: "),
    "pixels of no name": (FACTS, {"pixels": []}, "cannot be used: "),
    "head of no name": (FACTS, {"head": []}, r"scorer.json: head \[\] not known"),
    "scale": (FACTS, {"settings": {"width": WIDTH, "logit_scale": "x"}}, "scorer.json: settings of the head cosine"),
    "captions": (CONFIG, {"model_cfg": TINY | {"multimodal_cfg": {}}}, "CoCa models are not supported"),
    "smaller": (CONFIG, {"model_cfg": SMALLER}, r"another architecture \(unexpected: visual.* and 8 more\)"),
    "missing": (TOWERS, {"visual.proj": None}, r"another architecture \(missing: visual\.proj\)"),
    "NaN": (TOWERS, {"text_projection": torch.full((32, WIDTH), torch.nan)}, "are NaN or infinite: text_projection"),
    "NaN head": (HEAD, {"logit_scale": torch.tensor(torch.nan)}, "head.safetensors: weights are NaN or infinite"),
    "cut": (TOWERS, b"\x08\0\0\0", "open_clip_model.safetensors is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_says_what_is_wrong(damage, tmp_path):
    tiny_scorer(tmp_path)
    name, change, message = DAMAGE[damage]
    write = (tmp_path / name).write_bytes if isinstance(change, bytes) else partial(CHANGE[name], tmp_path / name)
    write(change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_folder_without_its_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no scorer's folder: it has no open_clip_config.json"):
        load(tmp_path)
    tiny_scorer(tmp_path)
    facts = (tmp_path / FACTS).read_bytes()
    (tmp_path / FACTS).unlink()
    with pytest.raises(FileNotFoundError, match="is no scorer's folder: it has no scorer.json"):
        load(tmp_path)  # the head would be dropped
    (tmp_path / FACTS).write_bytes(facts)
    (tmp_path / HEAD).unlink()
    with pytest.raises(FileNotFoundError, match="no file .*head.safetensors"):
        load(tmp_path)
    with pytest.raises(ValueError, match="/nowhere' is no checkpoint's name .*, no folder here and no hub id"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="head.safetensors is a file: give its folder"):
        (tmp_path / HEAD).touch()
        load(tmp_path / HEAD)
