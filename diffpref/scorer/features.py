"""Embeddings of pictures and prompts on disk, for towers that do not train: a head then trains in seconds."""

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import ImageOps
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from diffpref.cache.digests import in_workers, picture_digests
from diffpref.cache.disk import DiskCache, fill, find_room, settle
from diffpref.cache.fingerprint import fingerprint, prompt_key, raw
from diffpref.cache.make import Report
from diffpref.cache.room import Lock, folder_of
from diffpref.cache.store import Entry, Store
from diffpref.cache.team import Team
from diffpref.config import RunConfig
from diffpref.data.kinds import PROMPTS, Kind, Picture, kind_of
from diffpref.data.views import View
from diffpref.scorer.inputs import open_any
from diffpref.scorer.towers import Towers


def prepare(name: str, picture: Picture, view: View, towers: Towers) -> dict[str, Any]:
    """One picture as the towers take it, mirrored if the view is. Raises ValueError that names it."""
    try:
        image = open_any(picture, rgb=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}") from error
    size = (image.height, image.width)
    shown = ImageOps.mirror(image) if view.mirrored else image
    return {"images": towers.preprocess(shown), "original": size, "corner": (0, 0)}


def view_of(towers: Towers, mirrored: bool = False) -> View:
    """The one way in which the towers look at a picture."""
    side = towers.preprocess_cfg["size"]
    size = (side, side) if isinstance(side, int) else (side[0], side[1])
    return View(size, (0.5, 0.5), mirrored)


def towers_fingerprint(towers: Towers) -> str:
    """Stands for how the towers make embeddings: architecture, preprocessing, cleaning of prompts, every weight."""
    digest = hashlib.sha256()
    for name, tensor in sorted(towers.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(raw(tensor))
    facts = map(partial(json.dumps, sort_keys=True, default=str), towers.facts())
    return fingerprint(*facts, digest.hexdigest())


def feature_key(digest: bytes, mirrored: bool) -> str:
    """Key of a picture, by the digest of its bytes."""
    return hashlib.sha256(f"{digest.hex()} {mirrored:d}".encode()).hexdigest()[:32]


class Preparing(TorchDataset):
    """Part of a row's pictures -> (row, [(key, pixels)], the reasons why some are missing)."""

    def __init__(self, rows: Dataset, kind: Kind, towers: Towers, parts: list):
        self.rows, self.kind, self.parts = rows, kind, parts
        self.prepare = partial(prepare, towers=towers)
        self.towers = towers

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, item: int) -> tuple[int, list[tuple[str, Tensor]], str]:
        row, wanted = self.parts[item]
        pictures, made, faults = list(self.kind.named_pictures(self.rows[row]).items()), [], []
        for number, key, mirrored in wanted:
            try:
                made.append((key, self.prepare(*pictures[number], view_of(self.towers, mirrored))["images"]))
            except (OSError, ValueError) as error:  # the other pictures may be those of another row, too
                faults.append(str(error))
        return row, made, "; ".join(faults)


class PictureFeatures:
    """What the image tower makes of every picture. An entry: moments [D], its vector, where the trainer of diffusion
    models has what its VAE makes of one."""

    what = "pictures"

    def __init__(self, rows: Dataset, kind: Kind, config: RunConfig, towers: Towers, digests: np.ndarray):
        self.rows, self.kind, self.config, self.towers = rows, kind, config, towers
        self.wanted: dict[str, tuple[int, int, bool]] = {}
        for row in np.flatnonzero(digests.any(axis=(1, 2))).tolist():
            for number, digest in enumerate(d for d in digests[row] if d.any()):
                for mirrored in (False, True)[: 1 + config.data.random_flip]:
                    self.wanted.setdefault(feature_key(digest.tobytes(), mirrored), (row, number, mirrored))
        self.keys = list(self.wanted)

    def parts(self, missing: list[str]) -> list[tuple[int, list[tuple[int, str, bool]]]]:
        """By row."""
        rows: dict[int, list] = {}
        for key in missing:
            row, number, mirrored = self.wanted[key]
            rows.setdefault(row, []).append((number, key, mirrored))
        return list(rows.items())

    def bytes_needed(self, missing: list[str]) -> int:
        """4 D and what a shard's header says of it."""
        return len(missing) * (4 * self.towers.width + 512)

    @torch.inference_mode()
    def make(self, parts: list, report: Report) -> Iterator[tuple[str, Entry]]:
        """Decoded by the loader's processes, embedded here one by one: in a batch, the last digits would depend on the
        neighbours."""
        work = Preparing(self.rows, self.kind, self.towers, parts)
        for row, made, fault in in_workers(work, self.config.data.num_workers):
            if fault:
                report(row, fault)
            for key, pixels in made:
                yield key, {"moments": self.towers.images(pixels[None])[0].cpu()}


class PromptFeatures:
    """What the text tower makes of every prompt. An entry: text [D], its unit vector."""

    what = "prompts"

    def __init__(self, rows: Dataset, towers: Towers):
        self.towers = towers
        prompts = [prompt for name in PROMPTS if name in rows.column_names for prompt in rows[name][:] if prompt]
        self.wanted = {prompt_key(prompt): prompt for prompt in prompts}
        self.keys = list(self.wanted)

    def parts(self, missing: list[str]) -> list[str]:
        """One by one."""
        return missing

    def bytes_needed(self, missing: list[str]) -> int:
        """As of a picture."""
        return len(missing) * (4 * self.towers.width + 512)

    @torch.inference_mode()
    def make(self, parts: list[str], report: Report) -> Iterator[tuple[str, Entry]]:
        """One by one."""
        for key in parts:
            yield key, {"text": self.towers.texts(self.towers.tokenize([self.wanted[key]]))[0].cpu()}


class Features(DiskCache):
    """The embeddings of a set's rows; a loader's cache, readable from any process that it is handed to."""

    def latents(self, row: int, view: View) -> list[dict[str, Any]]:
        """For each picture of a row moments [D]. Raises KeyError, with the reason, for a row that could not be
        embedded."""
        if row in self.faults:
            raise KeyError(self.faults[row])
        keys = [feature_key(digest.tobytes(), view.mirrored) for digest in self.digests[row] if digest.any()]
        return [{**self.pictures.read(key), "original": (0, 0), "corner": (0, 0)} for key in keys]

    def conditioning(self, prompt: str) -> dict[str, Tensor]:
        """text [D] of one prompt."""
        return self.prompts.read(prompt_key(prompt))


def open_features(rows: Dataset, config: RunConfig, towers: Towers, team: Team) -> Features:
    """Embed what is not on disk yet, all processes together, and open what is. Every process must call this.

    Raises ValueError when it would not fit, or for a picture that is none (data.faults raise), OSError when it cannot
    be written. What was embedded before stays.
    """
    kind, towers = kind_of(rows.column_names, config.data), towers.eval()
    folder = folder_of(config)
    lock = Lock(folder) if team.main else None
    team.wait()
    digests, faults = picture_digests(rows, kind, folder, config.data.num_workers, team)
    settle(faults, rows, config, team)
    features, of = Features(1, lock, digests), towers_fingerprint(towers)
    features.pictures, features.prompts = Store(folder / f"image-features-{of}"), Store(folder / f"text-features-{of}")
    work = [
        (features.pictures, PictureFeatures(rows, kind, config, towers, digests)),
        (features.prompts, PromptFeatures(rows, towers)),
    ]
    if lock:
        find_room(folder, lock, work, config.cache)
    team.wait()
    for store, maker in work:
        faults |= fill(store, maker, rows, config, team)
    features.faults = faults
    return features
