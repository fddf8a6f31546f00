"""A few choices of a person -> a unit vector that stands for their taste.

A person weighs r features of pictures, learned over many people, and is one of a population whose weights are N(m, I):

    s(x) = wᵀφ(f, t),   φ(f, t) = G z(f) + H (f ∘ t),   P(c preferred to r) = σ(wᵀd),   d = φ(f_c, t) - φ(f_r, t)

f, t: features of a picture and its prompt; z standardises. Their weights, given K choices, are those of greatest
posterior probability, by Newton's steps from m, damped so that none overshoots (Sun & Tran-Dinh, 1703.04599):

    w <- w + δ log(1 + t)/t,   δ = (I + Σ p(1-p) d dᵀ)⁻¹ (Σ (1-p) d - (w - m)),   p = σ(wᵀd),   t = max |δᵀd|
    u  = (1, w - m) / |(1, w - m)|

The order of the choices is of no influence, any number of them will do, and of none it is the population. G, H and m
are learned through these steps, by how well w tells other choices of the same person on other prompts (each person is a
task, as in FSPO, 2502.19312; a closed-form learner within, as in R2D2, 1805.08136). In the homogeneous coordinates u
nothing is lost: a user adapter normalises its tokens, and the first coordinate says how far a taste is known to be from
everybody's.
"""

import hashlib
import json
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffpref.cache.fingerprint import raw
from diffpref.scorer.features import towers_fingerprint
from diffpref.scorer.preference import PreferenceScorer
from diffpref.synpic.files import written_whole
from diffpref.users.eyes import Eyes

WEIGHTS, RECORD, FORMAT = "user_encoder.safetensors", "user_encoder.json", 1
NEWTON, NEAR = 40, 1e-7  # steps at most (six to ten are usual); the change of a log-odds that ends them
FARTHEST = 0.05  # least first coordinate that is believed: beyond, a taste would be without bounds


class UserEncoder(nn.Module):
    """Reads sets of choices, of any size and in any order.

    Args:
        features: D, of what is seen of pictures and prompts (`Eyes`).
        words: So many of them, the first, are the embedding, which pictures and prompts share.
        rank: r, of the weights; a user vector has width r + 1.
        towers: Name or folder of the scorer whose towers see.
        levels: Of its image tower that are looked at beside the embedding.
        fingerprint: Of those eyes, with all their weights.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, features: int, words: int, rank: int = 16, towers: str = "bundled", levels: int = 2, fingerprint: str = ""
    ) -> None:
        super().__init__()
        self.settings = {"features": features, "words": words, "rank": rank}
        self.settings |= {"towers": towers, "levels": levels, "fingerprint": fingerprint}
        self.words, self.width = words, rank + 1
        self.look = nn.Linear(features, rank, bias=False)
        self.match = nn.Linear(words, rank, bias=False)
        self.population = nn.Parameter(0.1 * torch.randn(rank))
        nn.init.normal_(self.look.weight, std=0.3 / features**0.5)
        nn.init.zeros_(self.match.weight)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))

    # --- a taste from choices -----------------------------------------------------------------------------------------

    def forward(self, support: Tensor, mask: Tensor) -> Tensor:
        """support [G,K,3,D], features of prompt, chosen and rejected picture; mask [G,K], which of the choices there
        are -> users u [G,r+1], unit vectors."""
        return homogeneous(self.weights(support, mask) - self.population)

    def weights(self, support: Tensor, mask: Tensor) -> Tensor:
        """w [G,r] of greatest posterior probability; arguments as of `forward`."""
        prompt, chosen, rejected = support.unbind(2)
        d = (self.looks(chosen, prompt) - self.looks(rejected, prompt)) * mask[..., None]
        d = F.pad(d.double(), (0, 0, 0, 1))  # a choice of nothing: there may be none
        m = w = self.population.double().expand(len(d), -1)
        identity = torch.eye(self.width - 1).to(d)
        for _ in range(NEWTON):
            p = (d @ w[..., None]).sigmoid()
            curvature = identity + (p * (1 - p) * d).mT @ d
            step = torch.linalg.solve(curvature, ((1 - p) * d).sum(1) - (w - m))
            t = (d @ step[..., None]).abs().amax(1).clamp(min=1e-9)
            w = w + step * t.log1p() / t
            if (t < NEAR).all():
                break
        return w.to(support.dtype)

    def looks(self, image: Tensor, text: Tensor) -> Tensor:
        """φ(f, t): features [...,D] of pictures and prompts -> [...,r]."""
        shared = image[..., : self.words] * text[..., : self.words] * self.words**0.5
        return self.look((image - self.mean) / self.deviation) + self.match(shared)

    def scores(self, user: Tensor, image: Tensor, text: Tensor) -> Tensor:
        """What users u [N,r+1] think of pictures [N,D] under prompts [N,D] -> [N]; differences are log-odds."""
        w = self.population + user[:, 1:] / user[:, :1].clamp(min=FARTHEST)
        return (w * self.looks(image, text)).sum(-1)

    # --- its eyes, and its files --------------------------------------------------------------------------------------

    @cached_property
    def id(self) -> str:
        """Stands for this encoder in embeddings and adapters: what it sees with, and every weight."""
        digest = hashlib.sha256(json.dumps(self.settings | {"towers": ""}, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(raw(tensor.cpu()))
        return digest.hexdigest()[:16]

    def scorer(self) -> PreferenceScorer:
        """A scorer whose towers are this encoder's eyes: it embeds pictures and prompts as `forward` takes them.

        Raises ValueError when the towers of that name are not those it was trained with.
        """
        found = PreferenceScorer.from_pretrained(self.settings["towers"])
        found.towers = Eyes(found.towers, self.settings["levels"]).eval()
        if towers_fingerprint(found.towers) != self.settings["fingerprint"]:
            raise ValueError(
                f"{self.settings['towers']} holds other towers than this encoder of users was trained with"
            )
        return found

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the folder that `from_pretrained` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / WEIGHTS) as beside:
            save_file({name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}, beside)
        record: dict[str, Any] = {"format": FORMAT, "id": self.id, "settings": self.settings}
        with written_whole(folder / RECORD) as beside:
            beside.write_text(json.dumps(record, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str]) -> "UserEncoder":
        """The encoder in a folder, frozen. Raises FileNotFoundError where there is none, ValueError where it is damaged
        or of another version."""
        folder = Path(folder)
        if not (folder / RECORD).is_file():
            raise FileNotFoundError(f"{folder} holds no encoder of users (no {RECORD}); diffpref user train makes one")
        try:
            record = json.loads((folder / RECORD).read_text())
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']}, of another version of diffpref")
            encoder = cls(**record["settings"])
            encoder.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"the encoder of users in {folder} cannot be read: {error}") from error
        if encoder.id != record.get("id"):
            raise ValueError(
                f"the encoder of users in {folder} is damaged: its weights are not those that were written"
            )
        return encoder.eval().requires_grad_(False)


def homogeneous(shift: Tensor) -> Tensor:
    """δ [...,r] -> (1, δ) as a unit vector [...,r+1]."""
    return F.normalize(F.pad(shift, (1, 0), value=1.0), dim=-1)
