"""Lists, likes and captions from the cache: what the encoders give, each picture once, nothing stale."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from preference_files import EXAMPLES, captions, encoded, lists, picture, rows, truncated, value, write
from tiny_pipelines import tiny_sd, tiny_sdxl

from diffpref.cache import DiskCache, make, open_cache
from diffpref.cache.digests import files, picture_counts, picture_digests
from diffpref.cache.team import Team
from diffpref.config import CacheConfig, Config, DataConfig, ModelConfig, TrainConfig
from diffpref.data import KINDS, check, load_preferences, training_loader
from diffpref.data.views import View
from diffpref.encode import Encoder, encode_moments, release_encoders

SIZE = (32, 32)
PLACE = {"start": 0, "rank": 0, "world": 1, "seed": 0}
AUGMENTED = {"center_crop": False, "random_flip": True, "caption_dropout": 0.4}


def settings(path: str | Path, **changes) -> Config:
    """A run of nine groups, with a cache beside the data."""
    data = DataConfig(path=str(path), **{"num_workers": 0} | changes)
    train = TrainConfig(max_train_steps=3, train_batch_size=3)
    cache = CacheConfig(latents=True, text=True, folder=Path(path).parent / "cache", crops=2)
    return Config(name="a", model=ModelConfig(""), data=data, cache=cache, train=train)


def opened(config: Config, pipe) -> tuple[Dataset, DiskCache]:
    """The rows that can be used, and what the encoders made of them."""
    found = check(load_preferences(config.data), config.data).rows
    return found, open_cache(found, SIZE, config, pipe)


@pytest.fixture
def counted(monkeypatch):
    """How many pictures were encoded."""
    counts = []
    monkeypatch.setattr(make, "encode_moments", lambda pipe, images: counts.append(1) or encode_moments(pipe, images))
    monkeypatch.setattr(make.Pictures, "bytes_needed", lambda self, missing: 1)  # the probe does not count
    return counts


@pytest.mark.parametrize(
    ("kind", "family", "workers"),
    [*[(kind, tiny_sd, 0) for kind in KINDS], ("lists", tiny_sdxl, 2), ("captions", tiny_sdxl, 0)],
)
def test_what_is_cached_is_what_the_encoders_give(kind, family, workers, tmp_path):
    """Batch by batch, from encoders that have left: latents to the rounding, all else to the bit."""
    pipe, config = (
        family(),
        settings(write(tmp_path / "a.parquet", EXAMPLES[kind](7)), **AUGMENTED | {"num_workers": 2}),
    )
    found, cache = opened(config, pipe)
    encoder = Encoder(pipe, seed=0, features=True)
    read = list(training_loader(found, SIZE, config, cache=cache, **PLACE))
    decoded = list(training_loader(found, SIZE, config, cache=Uncached(cache.crops), **PLACE))
    theirs = [encoder(batch) for batch in decoded]
    release_encoders(pipe)
    for batch, other, expected in zip(read, decoded, theirs, strict=True):
        ours = encoder(batch)
        assert batch.images is None and batch.prompts == other.prompts and batch.keys == other.keys
        torch.testing.assert_close(ours.latents, expected.latents, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(ours.conditioning[name], value) for name, value in expected.conditioning.items())
        for name, one in vars(ours.structure).items():
            assert one is None or torch.equal(one, getattr(expected.structure, name)), name


class Uncached:
    """Draws views as a cache does and holds nothing."""

    def __init__(self, crops: int):
        self.crops = crops

    def latents(self, row, view):
        return None

    def conditioning(self, prompt):
        return None


def test_a_row_has_its_pictures_and_no_more(tmp_path):
    found, cache = opened(settings(write(tmp_path / "a.parquet", lists([3, 2, 5]))), tiny_sd())
    assert cache.digests.shape == (3, 5, 32) and cache.digests.any(axis=2).sum(axis=1).tolist() == [3, 2, 5]
    view = View(SIZE, (0.5, 0.5), False)
    assert [len(cache.latents(row, view) or ()) for row in range(3)] == [3, 2, 5]


def test_a_picture_of_several_lists_is_encoded_once(tmp_path, counted):
    """And a start with the same pictures as pairs, likes or captions encodes nothing."""
    examples, pipe = lists([3, 2]), tiny_sd()
    examples[1]["images"][0] = examples[0]["images"][2]
    opened(settings(write(tmp_path / "a.parquet", examples)), pipe)
    assert len(counted) == 4
    one, two = examples[0]["images"][:2]
    opened(settings(write(tmp_path / "b.parquet", [{"prompt": "p", "chosen": one, "rejected": two}])), pipe)
    opened(settings(write(tmp_path / "c.parquet", [{"prompt": "p", "image": two, "label": 1.0}])), pipe)
    opened(settings(write(tmp_path / "d.parquet", [captions(1)[0] | {"image": two}])), pipe)
    assert len(counted) == 4


def test_captions_taken_from_pairs_encode_the_chosen_pictures_alone(tmp_path, counted):
    path = write(tmp_path / "a.parquet", [row | {"rejected_prompt": "no"} for row in rows(3)])
    _, cache = opened(settings(path, kind="captions"), tiny_sd())
    assert len(counted) == 3 and cache.digests.shape == (3, 1, 32) and cache.conditioning("no") is not None
    _, cache = opened(settings(path), tiny_sd())
    assert len(counted) == 6 and cache.digests.shape == (3, 2, 32)


def test_a_list_with_a_broken_picture_is_left_out_and_the_picture_named(tmp_path, capsys):
    examples = lists([3, 2, 5])
    examples[1]["images"][1] = truncated()
    path = write(tmp_path / "a.parquet", examples)
    found, cache = opened(settings(path), tiny_sd())
    assert f"row 1 of {path}: images[1]: picture damaged: " in capsys.readouterr().out
    batches = list(training_loader(found, SIZE, settings(path), cache=cache, **PLACE))
    assert {prompt for batch in batches for prompt in batch.prompts} == {"prompt 0", "prompt 2"}
    with pytest.raises(ValueError, match=r"^data.path: row 1 of .*a.parquet: images\[1\]: picture damaged"):
        opened(settings(path, faults="raise"), tiny_sd())


@pytest.fixture
def beside(tmp_path) -> list[dict]:
    """Lists of 3, 2, no and 4 pictures, of which some are files."""
    examples = lists([3, 2, 2, 4])
    for row, number in ((0, 1), (1, 0), (1, 1), (3, 3)):
        file = tmp_path / f"{row}-{number}.png"
        file.write_bytes(examples[row]["images"][number]["bytes"])
        examples[row]["images"][number] = value(None, str(file))
    examples[2]["images"] = None
    return examples


@pytest.mark.parametrize("order", [None, [3, 0, 1]])
def test_files_are_told_from_pictures_within_the_set(beside, order, tmp_path):
    whole = load_preferences(DataConfig(path=write(tmp_path / "a.parquet", beside)))
    rows = whole if order is None else whole.select(order)
    order = order or [0, 1, 2, 3]
    expected = [(order.index(row), number) for row in order for number in range(4)
                if (row, number) in ((0, 1), (1, 0), (1, 1), (3, 3))]  # fmt: skip
    found = [(row, number) for row, number, path in files(rows, "images")]
    assert found == expected
    named = [f"{order[row]}-{number}.png" for row, number in found]
    assert [Path(path).name for _, _, path in files(rows, "images")] == named
    assert picture_counts(rows, KINDS["lists"]).tolist() == [[3, 2, 0, 4][row] for row in order]


def test_a_file_of_a_list_that_changes_is_read_again(beside, tmp_path):
    path = write(tmp_path / "a.parquet", beside)

    def digests() -> np.ndarray:
        rows = load_preferences(DataConfig(path=path)).select([3, 0, 1])
        return picture_digests(rows, KINDS["lists"], tmp_path, 0, Team())[0]

    first = digests()
    assert (digests() == first).all()
    (tmp_path / "0-1.png").write_bytes(encoded(picture(seed=999)))
    changed = (digests() != first).any(axis=2)
    assert np.argwhere(changed).tolist() == [[1, 1]]
