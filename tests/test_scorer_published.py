"""Public checkpoints, in their own file formats at tiny size, give the numbers of their original code."""

import math
from functools import cache
from pathlib import Path

import open_clip
import pytest
import torch
import torchvision.transforms.functional as F
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import save_file
from tiny_scorers import CONTEXT, SIZE, TINY, WIDTH, pictures, tiny_hf_clip, tiny_towers, write_open_clip
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from diffpref.scorer import CHECKPOINTS, PreferenceScorer
from diffpref.scorer.published import collapse
from diffpref.scorer.tokens import make_tokenizer

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
PROMPTS = [
    "a red cat",
    "“a dog”, two of them",
    "a house in the snow",
    "ink",
    "night",
    "a boat &amp; its sail",
    "it's he",
]
load = PreferenceScorer.from_pretrained


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Pictures of many shapes and modes. The sizes are such that roundings of crops and of scales differ."""
    folder = tmp_path_factory.mktemp("pictures")
    portrait, landscape, square, tiny, wide, grey, drawn = (
        pictures(1, seed, size)[0]
        for seed, size in enumerate(((37, 61), (70, 41), (SIZE, SIZE), (9, 13), (SIZE, 20), (45, 66), (50, 39)))
    )
    clear = landscape.copy()
    clear.putalpha(Image.linear_gradient("L").resize(landscape.size))
    made = {
        "portrait.png": portrait,
        "landscape.jpg": landscape,
        "square.webp": square,
        "tiny.png": tiny,
        "wide.png": wide,
        "grey.png": grey.convert("L"),
        "ink.jpg": drawn.convert("CMYK"),
        "clear.png": clear,
        "grey-clear.png": clear.convert("LA"),
        "palette.gif": portrait.quantize(16),
        "black.png": grey.convert("1"),
    }
    for name, picture in made.items():
        picture.save(folder / name)
    return [folder / name for name in made]


def read(file: Path) -> Image.Image:
    """A picture as the original code opens it."""
    with Image.open(file) as image:
        return image.copy()


def prompts_of(files: list[Path]) -> list[str]:
    return [PROMPTS[i % len(PROMPTS)] for i in range(len(files))]


def assert_same(scorer: PreferenceScorer, files: list[Path], original: list[float], prompts: list[str]) -> None:
    scores = scorer.score(images=[str(file) for file in files], prompts=prompts, batch_size=4, workers=2)
    assert torch.tensor(original).std() > 1e-3, "the scores differ, so agreement says something"
    torch.testing.assert_close(scores, torch.tensor(original), rtol=0, atol=1e-5)


# --- HPS: https://github.com/tgxs002/HPSv2, hpsv2/img_score.py and hpsv2/src/open_clip/transform.py -------------------


def hps_pixels(image: Image.Image) -> Tensor:
    """The original's preprocessing. It fails for RGBA and, at the very size, for pictures that are not square; those
    are prepared as its users do."""
    pixels = F.to_tensor(image.convert("RGB"))
    height, width = pixels.shape[1:]
    scale = SIZE / float(max(height, width))
    if scale != 1.0:
        new_size = tuple(round(side * scale) for side in (height, width))
        pixels = F.resize(pixels, new_size, InterpolationMode.BICUBIC)
    high, wide = SIZE - pixels.shape[1], SIZE - pixels.shape[2]
    pixels = F.pad(pixels, [wide // 2, high // 2, wide - wide // 2, high - high // 2], fill=0)
    return Normalize(MEAN, STD)(pixels)


@torch.no_grad()
def hps_score(model: open_clip.CLIP, file: Path, prompt: str) -> float:
    tokens = open_clip.tokenize([prompt], context_length=CONTEXT)
    image, text, _ = model(hps_pixels(read(file)).unsqueeze(0), tokens)
    return torch.diagonal(image @ text.T).item()


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1"])
def test_hps_is_its_original(name, files, tmp_path):
    model = tiny_towers(seed=3).model
    torch.save({"epoch": 1, "name": "x", "state_dict": model.state_dict()}, tmp_path / CHECKPOINTS[name].file)
    scorer = load(name, file=tmp_path / CHECKPOINTS[name].file, architecture=TINY)
    prompts = prompts_of(files)
    assert_same(scorer, files, [hps_score(model, *pair) for pair in zip(files, prompts, strict=True)], prompts)
    assert scorer.name == name and scorer.temperature == 0.01 and scorer.needs_prompt
    known = load(tmp_path / CHECKPOINTS[name].file, architecture=TINY)
    assert known.name == name, "the file's own name says what it is"


def test_hps_compares_with_the_temperature_it_was_trained_with(files, tmp_path):
    model = tiny_towers(seed=3).model
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.pt")
    scorer = load("hpsv2", file=tmp_path / "x.pt", architecture=TINY)
    first, second = (hps_score(model, file, "ink") for file in files[:2])
    found = scorer.compare(first=files[0], second=files[1], prompts="ink").item()
    assert found == pytest.approx(1 / (1 + math.exp(-100 * (first - second))), abs=1e-4)


# --- PickScore: https://github.com/yuvalkirstain/PickScore, README.md -------------------------------------------------


@cache
def hf_tokenizer() -> CLIPTokenizer:
    """The tokenizer of the CLIPs of transformers, from open_clip's merges."""
    made, names = SimpleTokenizer(), {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return CLIPTokenizer(vocab={names.get(k, k): v for k, v in made.encoder.items()}, merges=list(made.bpe_ranks))


@torch.no_grad()
def pickscore(model: CLIPModel, file: Path, prompt: str) -> float:
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    pixels = processor(images=read(file).convert("RGB"), return_tensors="pt")  # as transformers 4 did; 5 adds white
    tokens = hf_tokenizer()(prompt, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt")
    image, text = model.get_image_features(**pixels), model.get_text_features(**tokens)
    image, text = (getattr(out, "pooler_output", out) for out in (image, text))
    image, text = (out / torch.norm(out, dim=-1, keepdim=True) for out in (image, text))
    return (model.logit_scale.exp() * (text @ image.T))[0, 0].item()


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
def test_pickscore_is_its_original(hidden_act, files, tmp_path):
    model, prompts = tiny_hf_clip(tmp_path, hidden_act), prompts_of(files)
    scorer = load("pickscore", file=tmp_path)
    assert_same(scorer, files, [pickscore(model, *pair) for pair in zip(files, prompts, strict=True)], prompts)
    assert scorer.temperature == 1


def test_a_pickscore_file_without_its_configuration_needs_the_architecture(files, tmp_path):
    model = tiny_hf_clip(tmp_path)
    (tmp_path / "config.json").unlink()
    like = load("pickscore", file=tmp_path / "model.safetensors", architecture=tiny_pickscore_cfg())
    assert like.score(images=files[0], prompts="ink").item() == pytest.approx(
        pickscore(model, files[0], "ink"), abs=1e-5
    )


def tiny_pickscore_cfg() -> dict:
    tower = {"width": 32, "layers": 2, "mlp_ratio": 3}
    vision = TINY["vision_cfg"] | tower | {"head_width": 8}
    return {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": TINY["text_cfg"] | tower}


def test_prompts_of_pickscore_are_read_as_transformers_reads_them():
    ours = make_tokenizer({"context_length": CONTEXT}, "processor")
    prompts = [
        *PROMPTS,
        "&amp;amp; &lt;b&gt;",
        "ＦＵＬＬ width",
        "İstanbul naïve CAFÉ",
        "emoji 😀👍🏽",
        "e\u0301",
        "a\u00a0b\t\nc",
    ]
    for prompt in [*prompts, "word " * 40, "don’t!! ?"]:
        theirs = hf_tokenizer()(prompt, truncation=True, max_length=CONTEXT).input_ids
        assert ours([prompt])[0, : len(theirs)].tolist() == theirs, prompt


def test_a_clip_that_open_clip_cannot_be_is_refused(tmp_path):
    tiny_hf_clip(tmp_path, hidden_act="relu")
    with pytest.raises(ValueError, match=r"the CLIPModel has the activations \['relu'\]"):
        load("pickscore", file=tmp_path)


# --- LAION: christophschuhmann/improved-aesthetic-predictor, simple_inference.py; LAION-AI/aesthetic-predictor --------


def clip_pixels(image: Image.Image) -> Tensor:
    """OpenAI's preprocessing: resized and cropped as it is, then RGB. https://github.com/openai/CLIP, clip/clip.py"""
    cut = Compose([Resize(SIZE, interpolation=InterpolationMode.BICUBIC), CenterCrop(SIZE)])(image)
    return Normalize(MEAN, STD)(ToTensor()(cut.convert("RGB")))


def predictor(seed: int = 0) -> nn.Sequential:
    """The head of v2."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(WIDTH, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    ).eval()


@torch.no_grad()
def laion_score(model: open_clip.CLIP, head: nn.Module, file: Path) -> float:
    embedding = model.encode_image(clip_pixels(read(file)).unsqueeze(0))
    return head(embedding / embedding.norm(dim=-1, keepdim=True)).item()


def openai_folder(folder: Path) -> open_clip.CLIP:
    """A tiny CLIP with OpenAI's activation, in the layout of open_clip."""
    return write_open_clip(folder, TINY | {"quick_gelu": True})


def test_laion_v2_is_its_original(files, tmp_path):
    model, head = openai_folder(tmp_path / "clip"), predictor()
    torch.save({f"layers.{name}": value for name, value in head.state_dict().items()}, tmp_path / "aesthetic-model.pth")
    scorer = load(tmp_path / "aesthetic-model.pth", towers=tmp_path / "clip")
    original = torch.tensor([laion_score(model, head, file) for file in files])
    scores = scorer.score(images=files)  # no prompts
    torch.testing.assert_close(scores, original, rtol=0, atol=1e-5)
    assert original.std() > 1e-3 and scorer.name == "laion-aesthetic" and not scorer.needs_prompt


def test_laion_v1_is_its_original(files, tmp_path):
    model, head = openai_folder(tmp_path / "clip"), nn.Linear(WIDTH, 1)
    torch.save(head.state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth")
    scorer = load("laion-aesthetic-v1", file=tmp_path / "sa_0_4_vit_l_14_linear.pth", towers=tmp_path / "clip")
    original = [laion_score(model, head, file) for file in files]
    assert_same(scorer, files, original, None)
    assert scorer.rank(images=files) == sorted(range(len(files)), key=lambda i: -original[i])


def test_layers_without_activations_are_one():
    layers = {f"layers.{name}": value for name, value in predictor(1).double().state_dict().items()}
    one = collapse(layers, Path("x"))
    x = torch.randn(50, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = predictor(1).double()(x)[:, 0]
    torch.testing.assert_close(x @ one["weight"][0].double() + one["bias"].double(), exact, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layers: {"linear.weight": torch.zeros(1, WIDTH)}, "is no aesthetic predictor: it has other names"),
        (lambda layers: layers | {"layers.7.bias": torch.full((1,), math.nan)}, "weights are NaN or infinite: bias"),
        (lambda layers: layers | {"layers.2.weight": torch.zeros(128, 1000)}, "is damaged, or of another kind"),
        (
            lambda layers: layers | {"layers.0.weight": torch.zeros(1024, 5)},
            "architecture .of another shape: w",
        ),
        (lambda layers: [1, 2], "holds something else than tensors by name"),
    ],
)
def test_a_broken_aesthetic_predictor_is_refused(change, message, tmp_path):
    openai_folder(tmp_path / "clip")
    torch.save(change({f"layers.{k}": v for k, v in predictor().state_dict().items()}), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        load("laion-aesthetic", file=tmp_path / "x.pth", towers=tmp_path / "clip")


# --- CLIP -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_clip_folder_is_what_open_clip_makes_of_it(files, tmp_path):
    openai_folder(tmp_path)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(prompts_of(files))
    image, text, scale = model.eval()(torch.stack([preprocess(read(file)) for file in files]), tokens)
    assert_same(load(tmp_path), files, (scale * (image * text).sum(-1)).tolist(), prompts_of(files))


@torch.no_grad()
def test_a_clip_by_its_architecture_and_a_file(files, tmp_path):
    model = tiny_towers(seed=5).model
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    scorer = load("clip:ViT-B-32", file=tmp_path / "x.safetensors", architecture=TINY)
    pixels = torch.stack([clip_pixels(read(file)) for file in files])
    image, text, scale = model(pixels, open_clip.tokenize(prompts_of(files), context_length=CONTEXT))
    assert_same(scorer, files, (scale * (image * text).sum(-1)).tolist(), prompts_of(files))
    assert scorer.name == "clip:ViT-B-32"


def test_an_exif_turned_picture_scores_as_it_is_seen(tmp_path):
    model = tiny_towers(seed=3).model
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.pt")
    scorer, (picture,) = load("hpsv2", file=tmp_path / "x.pt", architecture=TINY), pictures(1, size=(60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    seen, turned = scorer.score(images=[picture, tmp_path / "turned.png"], prompts="ink").tolist()
    assert turned == seen
