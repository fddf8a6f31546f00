"""From a few choices to the embedding of a taste, and the pictures that its neighbourhood agrees on."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from tiny_pipelines import tiny_sd
from tiny_scorers import pictures, tiny_scorer
from tiny_users import (
    ME,
    PROMPTS,
    QUICK,
    SIZE,
    embedding,
    same,
    seeded,
    some_pairs,
    tiny_encoder,
    trained,
    write_folder,
)

import diffpref
from diffpref.noise.keys import generator as keyed
from diffpref.sample import sample
from diffpref.scorer.features import towers_fingerprint
from diffpref.users import Pair, PersonalizedPipeline, UserEmbedding, best_of_neighbours, encode_user
from diffpref.users.consensus import Neighbourhood, own_taste


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def encoder(world):
    return tiny_encoder(world)


@pytest.fixture(scope="module")
def personal(encoder) -> PersonalizedPipeline:
    pipe = tiny_sd()
    trained(pipe)
    return PersonalizedPipeline(pipe, {"width": 8, "sequence": False, "encoder": encoder.id})


# --- embeddings -------------------------------------------------------------------------------------------------------


def test_an_embedding_is_what_the_encoder_says_of_the_features(encoder):
    pairs, scorer = some_pairs(), encoder.scorer()
    user = encode_user(pairs, encoder, name="Ann")
    seen = [scorer.embed(images=[getattr(pair, side) for pair in pairs]).images for side in ("chosen", "rejected")]
    words = scorer.embed(prompts=[pair.prompt for pair in pairs]).prompts
    support = torch.stack([words, *seen], dim=1)[None]
    expected = encoder(support, torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(user.states, expected, atol=1e-6, rtol=1e-5)
    assert (user.encoder, user.pairs, user.name, user.width) == (encoder.id, 4, "Ann", 8)


def test_order_is_of_no_influence_and_who_won_is(encoder):
    pairs = some_pairs()
    user = encode_user(pairs, encoder)
    torch.testing.assert_close(encode_user(pairs[::-1], encoder).states, user.states, atol=1e-5, rtol=1e-4)
    turned = [Pair(pair.prompt, pair.rejected, pair.chosen) for pair in pairs]
    assert abs(encode_user(turned, encoder).states - user.states).max() > 1e-2
    assert abs(encode_user(pairs[:3], encoder).states - user.states).max() > 1e-3


def test_an_encoder_in_training_mode_is_left_so(encoder):
    encoder.train()
    encode_user(some_pairs(1), encoder)
    assert encoder.training
    encoder.eval()


def test_folders_files_and_lists_say_the_same(world, encoder, tmp_path):
    """And the encoder is found in its folder, and in that of a run."""
    pairs = some_pairs()
    user = encode_user(pairs, encoder)
    folder = write_folder(tmp_path / "mine", pairs)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    features = Features({"prompt": Value("string"), "chosen": ImageFeature(), "rejected": ImageFeature()})
    columns = {name: [getattr(pair, name) for pair in pairs] for name in features}
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "pairs.parquet")
    lines = [
        {"prompt": r["prompt"], "chosen": r["chosen_file_name"], "rejected": r["rejected_file_name"]} for r in rows
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = [Pair(r["prompt"], folder / r["chosen"], str(folder / r["rejected"])) for r in lines]
    for given in (folder, tmp_path / "pairs.parquet", str(folder / "pairs.jsonl"), files):
        for place in (encoder, world, world / "user_encoder"):
            torch.testing.assert_close(diffpref.encode_user(given, place).states, user.states, atol=1e-5, rtol=1e-4)


def test_a_list_is_all_its_pairs(encoder, tmp_path):
    best, middle, worst = pictures(3)
    features = Features({"prompt": Value("string"), "images": [ImageFeature()], "scores": [Value("float64")]})
    columns = {"prompt": ["a cat"], "images": [[middle, best, worst]], "scores": [[2.0, 3.0, 1.0]]}
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "lists.parquet")
    user = encode_user(tmp_path / "lists.parquet", encoder)
    expected = [Pair("a cat", *two) for two in ((best, middle), (best, worst), (middle, worst))]
    torch.testing.assert_close(user.states, encode_user(expected, encoder).states, atol=1e-5, rtol=1e-4)
    assert user.pairs == 3


def test_one_of_several_users(encoder, tmp_path):
    pairs = some_pairs(5)
    folder = write_folder(tmp_path / "all", pairs, user_id=[7, 8, 7, 8, 7])
    user = encode_user(folder, encoder, whose=8)
    torch.testing.assert_close(user.states, encode_user([pairs[1], pairs[3]], encoder).states, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"holds choices of 2 users \(7, 8, …\): say whose"):
        encode_user(folder, encoder)
    with pytest.raises(ValueError, match="no choices of the user 9; it has those of 7, 8"):
        encode_user(folder, encoder, whose=9)
    alone = write_folder(tmp_path / "alone", pairs)
    with pytest.raises(ValueError, match="no column user_id, so that 7 cannot be told"):
        encode_user(alone, encoder, whose=7)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_no_pairs(encoder, tmp_path):
    with pytest.raises(ValueError, match="no pairs: a taste is read from one at least, and better from four"):
        encode_user([], encoder)
    (tmp_path / "pairs.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="pairs.jsonl cannot be read: it is empty"):
        encode_user(tmp_path / "pairs.jsonl", encoder)
    with pytest.raises(FileNotFoundError, match="no data set at .*nothing"):
        encode_user(str(tmp_path / "nothing"), encoder)
    with pytest.raises(FileNotFoundError, match="holds no encoder of users"):
        encode_user(some_pairs(1), tmp_path)


def cut(path) -> None:
    """Leave half a picture file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_broken_picture_is_named(encoder, tmp_path):
    """In the middle of a file, where its header is sound."""
    folder = write_folder(tmp_path / "mine", some_pairs())
    cut(folder / "2-other.png")
    with pytest.raises(
        ValueError, match=r"pair 3 \(row 2 of .*mine, chosen and rejected\): the rejected picture.*2-other"
    ):
        encode_user(folder, encoder)
    pairs = [Pair("a cat", *pictures(2)), Pair("a cat", folder / "0-liked.png", folder / "2-other.png")]
    with pytest.raises(ValueError, match=r"pair 2: the rejected picture .*2-other.png cannot be .*damaged"):
        encode_user(pairs, encoder)
    pairs = [Pair("a cat", folder / "none.png", folder / "0-liked.png")]
    with pytest.raises(FileNotFoundError, match=r"pair 1: the chosen picture .*none.png cannot be .*missing"):
        encode_user(pairs, encoder)
    with pytest.raises(ValueError, match=r"pair 1: the chosen picture cannot be used \(too narrow"):
        encode_user([Pair("a cat", Image.new("RGB", (500, 2)), pictures(1)[0])], encoder)


def test_a_file_that_is_no_picture_is_named(encoder, tmp_path):
    folder = write_folder(tmp_path / "mine", some_pairs())
    (folder / "1-liked.png").write_text("no picture")
    with pytest.raises(ValueError, match="row 1 of .*mine: not a picture"):
        encode_user(folder, encoder)


@pytest.mark.parametrize("prompt", ["", "  ", None, 3])
def test_pairs_without_a_prompt(encoder, prompt):
    with pytest.raises(ValueError, match="pair 2 has no prompt"):
        encode_user([*some_pairs(1), Pair(prompt, *pictures(2))], encoder)


def test_rows_that_are_no_choices(encoder, tmp_path):
    features = Features({"prompt": Value("string"), "image": ImageFeature(), "label": Value("bool")})
    columns = {"prompt": ["a cat"], "image": pictures(1), "label": [True]}
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "likes.parquet")
    with pytest.raises(ValueError, match="likes.parquet holds likes; a taste is read from choices between pictures"):
        encode_user(tmp_path / "likes.parquet", encoder)


def test_other_towers_under_the_same_name_are_refused(tmp_path):
    encoder = tiny_encoder(tmp_path)
    tiny_scorer(tmp_path / "scorer", seed=1)
    with pytest.raises(ValueError, match="holds other towers than this encoder of users was trained with"):
        encode_user(some_pairs(1), encoder)


# --- the neighbourhood ------------------------------------------------------------------------------------------------


def brightness(images, prompts) -> torch.Tensor:
    """Cats are to be bright, all else dark."""
    signs = [1 if prompt == "a cat" else -1 for prompt in prompts]
    return torch.tensor([s * np.asarray(x, dtype=np.float64).mean() for s, x in zip(signs, images, strict=True)])


OPTIONS = {"num_inference_steps": 2, "guidance_scale": 2.0, **SIZE}


def me(encoder) -> UserEmbedding:
    return UserEmbedding(ME.states, encoder.id, 4)


def test_the_best_of_k_directions_each_with_noise_of_its_own(personal, encoder):
    """All k drawn by hand; the first of them is the user's own picture with the plain seed."""
    user, prompts, seeds = me(encoder), PROMPTS[:3], [5, 6, 5]
    drawn = [sample(personal.bound(user, 0.9), prompts, seeds, **OPTIONS)]
    for number, near in enumerate(user.neighbours(4, 25)[1:], 1):
        noise = [keyed(seed, number) for seed in seeds]
        pixels = personal(prompts, user=near, scale=0.9, generator=noise, output_type="np", **OPTIONS).images
        drawn.append(personal.pipe.numpy_to_pil(pixels))
    scores = torch.stack([brightness(images, prompts) for images in drawn])
    best = scores.argmax(0).tolist()
    kept = best_of_neighbours(personal, user, brightness, prompts, seeds, k=4, max_angle=25, scale=0.9, **OPTIONS)
    assert len(set(best)) > 1, "this test would not see a picture of the wrong direction"
    for i, (number, image) in enumerate(zip(best, kept, strict=True)):
        assert np.array_equal(image, drawn[number][i])
    few = best_of_neighbours(personal, user, brightness, prompts, seeds, k=1, scale=0.9, **OPTIONS)
    assert all(np.array_equal(a, b) for a, b in zip(few, drawn[0], strict=True))


def test_batches_are_of_no_influence(personal, encoder):
    whole, parts = (
        best_of_neighbours(personal, me(encoder), brightness, PROMPTS, [1, 2, 3, 4], k=3, batch_size=size, **OPTIONS)
        for size in (4, 3)
    )
    assert all(abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1 for a, b in zip(whole, parts, strict=True))


def test_the_users_own_scorer_is_the_encoders(encoder):
    user, images = encode_user(some_pairs(), encoder), pictures(3, seed=9)
    seen = encoder.scorer().embed(images=images, prompts=PROMPTS[:3])
    expected = encoder.scores(user.states.expand(3, -1), seen.images, seen.prompts)
    torch.testing.assert_close(own_taste(encoder, user)(images, PROMPTS[:3]), expected)
    assert expected.std() > 1e-3
    pairs = some_pairs()
    likes = own_taste(encoder, user)
    gaps = likes([p.chosen for p in pairs], PROMPTS) - likes([p.rejected for p in pairs], PROMPTS)
    assert gaps.mean() > 0  # what they chose, they like better
    for other in (embedding(0, encoder="x"), UserEmbedding(torch.eye(3, 8), encoder.id)):
        with pytest.raises(ValueError, match="has no scorer in the encoder .*; give one, as a function"):
            own_taste(encoder, other)


def test_pictures_without_numbers_never_win(personal, encoder):
    """The first direction's are good; a model that only makes NaN is refused as by `sample`."""
    user = me(encoder)
    near = Neighbourhood(personal, user, brightness, k=3)
    for one in near.around[1:]:
        one.states.mul_(torch.nan)
    own = personal("a cat", user=user, generator=seeded(1), **QUICK)
    assert same(near("a cat", generator=seeded(1), **QUICK), own)
    near.around[0] = near.around[1]
    with pytest.raises(FloatingPointError, match="NaN or infinite pixels"):
        sample(near, ["a cat"], [1], **OPTIONS)


def test_what_a_neighbourhood_refuses(personal, encoder):
    near = Neighbourhood(personal, me(encoder), brightness, k=2)
    for wrong in ({"output_type": "latent"}, {"num_images_per_prompt": 2}, {"generator": seeded(1, 2)}):
        with pytest.raises(ValueError, match="one for each prompt, each with its generator, as pil or np"):
            near("a cat", **({"generator": seeded(1)} | wrong))
    with pytest.raises(ValueError, match="k is 0 and max_angle 30"):
        Neighbourhood(personal, me(encoder), brightness, k=0)
    with pytest.raises(ValueError, match="was tuned with the encoder"):
        Neighbourhood(personal, ME, brightness)
    silent = Neighbourhood(personal, me(encoder), lambda images, prompts: torch.full((len(images),), math.nan))
    with pytest.raises(ValueError, match="the user's scorer gave NaN or infinite scores"):
        silent("a cat", generator=seeded(1), **QUICK)
    (image,) = near("a cat", generator=torch.Generator().manual_seed(1), num_inference_steps=1, **SIZE).images
    assert isinstance(image, Image.Image)


def test_tiny_eyes_see_more_than_the_towers(encoder):
    """The fixture is what it says: an encoder over other features than a scorer's own."""
    assert encoder.scorer().towers.width > tiny_scorer().towers.width
    assert towers_fingerprint(encoder.scorer().towers) == encoder.settings["fingerprint"]
