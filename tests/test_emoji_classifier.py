"""The artwork classifier: its file, its measures, its robustness."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter

from diffpref.emoji_world import classifier
from diffpref.emoji_world.artwork import Artwork, caption, load_artwork
from diffpref.emoji_world.build import STYLES
from diffpref.emoji_world.classifier import CLASSIFIER, Classifier, ClassifierConfig


@pytest.fixture(scope="module")
def art() -> Artwork:
    return load_artwork()


def pictures(art: Artwork, indices: list[int]) -> list[Image.Image]:
    arrays = art.images[indices].add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a) for a in arrays]


def test_file_is_small_and_knows_the_artwork(art):
    assert CLASSIFIER.stat().st_size <= 1.5e6
    config = classifier.load_classifier().config
    assert config.concepts == art.concepts and config.styles == STYLES


def test_names_concepts_and_styles_of_disturbed_drawings(art):
    some = list(range(0, len(art.images), 7))
    blurred = [i.filter(ImageFilter.GaussianBlur(0.6)) for i in pictures(art, some)]
    images = [ImageEnhance.Brightness(i).enhance(0.9) for i in blurred]
    prompts = [art.caption(i, styled=True) for i in some]
    assert classifier.concept_recognition(images, prompts).mean() > 0.95
    assert classifier.style_recognition(images, prompts).mean() > 0.9


def test_probabilities_are_batched_and_normalised(art):
    images = pictures(art, list(range(130)))
    concept, style = classifier.classify(images)
    assert concept.shape == (130, len(art.concepts)) and style.shape == (130, len(STYLES))
    np.testing.assert_allclose(concept.sum(axis=1), 1)
    np.testing.assert_allclose(classifier.classify(images[-1:])[0], concept[-1:], atol=1e-5)


def test_size_of_the_pictures_does_not_matter(art):
    image = pictures(art, [3])[0]
    larger = image.resize((128, 128), Image.Resampling.BICUBIC)
    assert classifier.concept_recognition([image, larger], [art.caption(3, styled=False)] * 2).tolist() == [1, 1]


def test_style_share_counts_first_guesses(art):
    some = [*(art.style == 2).nonzero().squeeze(1)[:6].tolist(), *(art.style == 4).nonzero().squeeze(1)[:2].tolist()]
    np.testing.assert_allclose(classifier.style_share(pictures(art, some)), [0, 0, 0.75, 0, 0.25])


def test_prompts_split_into_name_and_style(art):
    assert all(classifier.split_prompt(caption(c, s)) == (c, s) for c in art.concepts for s in (*STYLES, None))


def test_unknown_prompts_are_refused(art):
    with pytest.raises(ValueError, match="purple cow"):
        classifier.concept_recognition(pictures(art, [0]), ["purple cow"])
    with pytest.raises(ValueError, match="names no style"):
        classifier.style_recognition(pictures(art, [0]), [art.concepts[0]])


def test_weights_survive_the_file(tmp_path):
    torch.manual_seed(0)
    model = Classifier(ClassifierConfig(("cat", "dog"), STYLES, 16, (4, 8))).eval()
    classifier.save_classifier(model, tmp_path / "c.safetensors")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    for saved, again in zip(model(images), classifier.load_classifier(tmp_path / "c.safetensors")(images), strict=True):
        torch.testing.assert_close(saved, again, atol=1e-2, rtol=1e-2)
    with pytest.raises(FileNotFoundError, match="makes it"):
        classifier.load_classifier(tmp_path / "absent.safetensors")


def test_augmentation_is_seeded_and_keeps_paper_white():
    white = torch.ones(2, 3, 32, 32)
    bent = classifier.bend(white, torch.Generator().manual_seed(0))
    torch.testing.assert_close(bent, white)
    first, second = (classifier.augment(torch.zeros(2, 3, 32, 32), torch.Generator().manual_seed(1)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first.abs().max() <= 1


def test_training_learns(art):
    few = torch.arange(10)
    config = ClassifierConfig(art.concepts, STYLES, art.size, (8, 16, 32))
    args = argparse.Namespace(seed=0, steps=60, batch_size=16, learning_rate=1e-2)
    model = classifier.train(art, few, config, args, "test")
    assert classifier.accuracy(model, art, few, copies=0, seed=0)[1] > 0.5
