"""The preference scorer: two towers, a head, and a temperature."""

import copy
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffpref.scorer.contract import Scorer
from diffpref.scorer.folder import Parts, save_folder
from diffpref.scorer.heads.contract import Head, Judged
from diffpref.scorer.heads.pal import Pal, fit_user
from diffpref.scorer.inputs import check_prompt, known_length, one_by_one
from diffpref.scorer.published import load_parts
from diffpref.scorer.score import batches, refuse, shown
from diffpref.scorer.towers import Towers
from diffpref.scorer.weights import checked_device

REMEMBERED = 4096  # prompts whose embeddings are kept: 16 MB at width 1024
NARROWEST = 100  # sides' ratio from which a picture, resized by its shortest side, would fill the memory


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors of pictures [N,D] and of prompts [M,D], fp32 on the CPU; None for what was not asked for."""

    images: Tensor | None
    prompts: Tensor | None


class PreferenceScorer(Scorer):
    """Judges by a CLIP: `PreferenceScorer.from_pretrained("bundled").score(images=…, prompts=…)`.

    Args:
        towers: The two towers.
        head: What reads scores out of their embeddings.
        name: What it is called in tables.
        description: What it is, in a sentence.
        temperature: P(a preferred to b) = σ(logit / temperature).
        needs_prompt: False for a scorer of the picture alone.
        users: Names of the users that the head knows, in the order of its table.
        trained_on: What it was trained on.
        measured: Numbers about it, as JSON values.
    """

    any_mode = True

    def __init__(
        self,
        towers: Towers,
        head: Head,
        *,
        name: str,
        description: str = "",
        temperature: float = 1.0,
        needs_prompt: bool = True,
        users: list[Any] | None = None,
        trained_on: str = "",
        measured: dict[str, Any] | None = None,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        self.towers, self.head, self.name, self.description = towers, head, name, description
        self.temperature, self.needs_prompt, self.users = temperature, needs_prompt, users
        self.trained_on, self.measured = trained_on, measured or {}
        self.user = -1  # its number in the head's table; -1 is the population
        self.remembered: OrderedDict[str, Tensor] = OrderedDict()

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        *,
        file: str | PathLike[str] | None = None,
        architecture: str | dict[str, Any] | None = None,
        towers: str | PathLike[str] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "PreferenceScorer":
        """A scorer ready to judge: frozen, in evaluation mode.

        Args:
            name: A name in CHECKPOINTS, "clip:ARCHITECTURE/TAG" of open_clip, a scorer's folder, the file of a
                published checkpoint, or the hub id of a folder.
            file: For published checkpoints, the file where it lies here; else it comes from the hub.
            architecture: For published checkpoints of other sizes, open_clip's name or description of the towers.
            towers: For heads published without towers, where these come from: "clip:ARCHITECTURE/TAG" or a folder.
            device: Where it computes; by default a GPU if there is one.
            dtype: In what the towers compute.

        Raises:
            ValueError: For an unknown name, another architecture, damaged or NaN weights.
            FileNotFoundError: For files that are neither here nor to be had.
        """
        parts = load_parts(str(name), file=file, architecture=architecture, towers=towers, dtype=dtype)
        scorer = cls(parts.towers, parts.head, **parts.facts)
        for module in (scorer.towers, scorer.head):
            module.eval().requires_grad_(False)
        return scorer.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def save_pretrained(self, folder: str | PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write the folder that `from_pretrained` reads, the towers in `dtype`. Raises ValueError for NaN weights."""
        facts = {"name": self.name, "description": self.description, "temperature": self.temperature}
        facts |= {"needs_prompt": self.needs_prompt, "users": self.users}
        facts |= {"trained_on": self.trained_on, "measured": self.measured}
        save_folder(Path(folder), Parts(self.towers, self.head, facts), dtype)

    def to(self, device: str | torch.device) -> "PreferenceScorer":
        """Move it."""
        device = checked_device(device)
        self.towers.to(device)
        self.head.to(device)
        self.remembered.clear()
        return self

    def for_user(self, user: Any) -> "PreferenceScorer":
        """The same scorer with one user's taste; weights are shared. Raises ValueError for an unknown user."""
        if user not in (self.users or ()):
            known = f"{len(self.users)} users, among them {self.users[0]!r}" if self.users else "no users"
            raise ValueError(f"the scorer {self.name} knows {known}, not {user!r}; leave it out for the population")
        one = copy.copy(self)
        one.user = self.users.index(user)
        return one

    def add_user(
        self, user: Any, *, chosen: Any, rejected: Any, prompts: str | list[str], strength: float = 1.0
    ) -> "PreferenceScorer":
        """The same scorer, which knows one user more: of their P choices only their shares of the tastes are fitted,
        with the users it knows as the prior (`fit_user`).

        Args:
            user: Their name.
            chosen: P pictures they liked better, of any form that `score` takes.
            rejected: P pictures they liked less.
            prompts: One for each pair, or one for all.
            strength: Of the prior.

        Raises ValueError for a head that knows no users, a name that it knows, or unequal numbers of pictures.
        """
        if not isinstance(self.head, Pal):
            raise ValueError(f"the scorer {self.name} knows no users; train one with head.name pal")
        if user in (self.users or ()):
            raise ValueError(f"the scorer {self.name} knows a user {user!r} already; give another name")
        sides = [self.embed(images=side, progress=False).images for side in (chosen, rejected)]
        count = len(sides[0])
        texts = self.embed(prompts=[prompts] * count if isinstance(prompts, str) else prompts).prompts
        if not len(sides[1]) == len(texts) == count:
            raise ValueError(
                f"{count} chosen pictures, {len(sides[1])} rejected ones and {len(texts)} prompts are no pairs"
            )
        pairs = torch.stack([torch.arange(count), torch.arange(count) + count], dim=1)
        one = copy.copy(self)
        one.head, one.users = copy.deepcopy(self.head), [*(self.users or []), user]
        shares = fit_user(self.head.cpu(), torch.cat(sides), torch.cat([texts, texts]), pairs, strength=strength)
        one.head.add_user(shares)
        return one.to(self.towers.device)

    def prepare(self, picture: Image.Image) -> Tensor:
        """An upright picture of any mode -> [3,S,S]. Raises ValueError for one that is far too long and thin."""
        if max(picture.size) > NARROWEST * min(picture.size):
            raise ValueError(f"too narrow: {picture.width} x {picture.height}, more than {NARROWEST} times")
        return self.towers.preprocess(picture)

    def judge(self, prepared: list[Tensor], prompts: list[str]) -> Tensor:
        """Scores [N] of prepared pictures [3,S,S] with their prompts."""
        with torch.inference_mode():
            return self.judged(prepared, prompts).scores.float().cpu()

    def logits(self, first: list[Tensor], second: list[Tensor], prompts: list[str]) -> Tensor:
        """Log-odds [N] at temperature 1, as the head has them: those of a cyclic taste are no difference of scores."""
        with torch.inference_mode():
            judged = self.judged([*first, *second], [*prompts, *prompts])
            left = torch.arange(len(first), device=self.towers.device)
            return self.head.logit(judged, left, left + len(first)).float().cpu()

    def judged(self, prepared: list[Tensor], prompts: list[str]) -> Judged:
        """All that the head says of N pictures."""
        image = self.towers.images(torch.stack(prepared))
        text = self.prompt_vectors(prompts) if self.needs_prompt else torch.zeros_like(image)
        user = None if self.users is None else torch.full((len(image),), self.user, device=image.device)
        with torch.autocast(image.device.type, enabled=False):  # rounded to bf16, near scores would be equal
            return self.head(image, text, user)

    def prompt_vectors(self, prompts: list[str]) -> Tensor:
        """Embeddings [N,D] of prompts; those of late are remembered, unless the towers train."""
        training = any(parameter.requires_grad for parameter in self.towers.parameters())
        if training:
            self.remembered.clear()
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.remembered]
        found = dict(zip(new, self.towers.texts(self.towers.tokenize(new)), strict=True)) if new else {}
        vectors = torch.stack([found[p] if p in found else self.remembered[p] for p in prompts])
        if not training:
            self.remember(prompts, found)
        return vectors

    def remember(self, prompts: list[str], found: dict[str, Tensor]) -> None:
        """Keep the embeddings of the prompts that were asked for last."""
        self.remembered.update(found)
        for prompt in dict.fromkeys(prompts):
            self.remembered.move_to_end(prompt)
        while len(self.remembered) > REMEMBERED:
            self.remembered.popitem(last=False)

    def embed(
        self,
        *,
        images: Any = None,
        prompts: str | Iterable[str] | None = None,
        batch_size: int = 32,
        workers: int | None = None,
        progress: bool | None = None,
    ) -> Embeddings:
        """Embeddings of pictures and of prompts, whose numbers need not agree. Raises as `score`."""
        texts = [prompts] if isinstance(prompts, str) else prompts
        return Embeddings(
            None if images is None else self.embed_images(images, batch_size, workers, progress),
            None if texts is None else self.embed_prompts(list(texts), batch_size),
        )

    def embed_images(self, images: Any, batch_size: int, workers: int | None, progress: bool | None) -> Tensor:
        """Embeddings [N,D] of pictures."""
        items, found = (((image,), None) for image in one_by_one(images)), [torch.empty(0, self.towers.width)]
        chunks = batches(self, items, batch_size, workers, prompted=False)
        for number, chunk in enumerate(shown(chunks, known_length(images), progress)):
            refuse(chunk, number * batch_size)
            with torch.inference_mode():
                found.append(self.towers.images(torch.stack([ready.prepared[0] for ready in chunk])).cpu())
        return torch.cat(found)

    def embed_prompts(self, prompts: list[str], batch_size: int) -> Tensor:
        """Embeddings [M,D] of prompts."""
        prompts, found = [check_prompt(prompt, True) for prompt in prompts], [torch.empty(0, self.towers.width)]
        for start in range(0, len(prompts), batch_size):
            with torch.inference_mode():
                found.append(self.prompt_vectors(prompts[start : start + batch_size]).cpu())
        return torch.cat(found)
