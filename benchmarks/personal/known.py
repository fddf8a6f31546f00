"""What the trained encoder makes of the new users' pairs: their embeddings, and what it predicts of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from diffpref.emoji_world.users import User, choice_probability, utility
from diffpref.users import UserEmbedding, UserEncoder
from personal.people import COUNTS, MOST, Pictures, Said, opened, shipped, support_sets

ORACLE_SETS = 32  # of 16 pairs, for the embedding of one who is well known: 512 pairs


@dataclass(frozen=True)
class Known:
    """A user's embeddings by number of pairs, of the first support set and of the second, and of very many pairs."""

    user: User
    pairs: list[Said]
    first: dict[int, UserEmbedding]
    second: dict[int, UserEmbedding]
    oracle: UserEmbedding

    def after(self, pairs: int | str) -> UserEmbedding:
        """After so many pairs of the first set, or the oracle's."""
        return self.oracle if pairs == "oracle" else self.first[int(pairs)]


class Reader:
    """An encoder that has looked at every picture that new users are asked about."""

    def __init__(self, encoder: UserEncoder) -> None:
        self.encoder, self.scorer = encoder.eval(), encoder.scorer()

    @cached_property
    def features(self) -> tuple[dict[bytes, Tensor], dict[str, Tensor]]:
        """Of pictures and of prompts, unit vectors [D]."""
        pool = shipped()[0]
        names = sorted(set(pool.concepts))
        seen = self.scorer.embed(images=[opened(png) for png in pool.png], progress=False).images
        said = self.scorer.embed(prompts=names, progress=False).prompts
        return dict(zip(pool.png, seen, strict=True)), dict(zip(names, said, strict=True))

    def support(self, pairs: Sequence[Said]) -> Tensor:
        """[n,3,D]: prompt, chosen, rejected."""
        images, texts = self.features
        return torch.stack([torch.stack([texts[p.prompt], images[p.chosen], images[p.rejected]]) for p in pairs])

    @torch.inference_mode()
    def vectors(self, sets: Sequence[Sequence[Said]]) -> Tensor:
        """Unit vectors [G,U] of sets of equal size."""
        support = torch.stack([self.support(one) for one in sets])
        return self.encoder(support, torch.ones(support.shape[:2], dtype=torch.bool))

    def embedding(self, vector: Tensor, pairs: int, user: User) -> UserEmbedding:
        return UserEmbedding(vector.clone(), self.encoder.id, pairs, f"user {user.user_id}")

    def known(self, user: User) -> Known:
        """All embeddings of a user. The oracle's is the mean direction of many sets: the encoder was not made for sets
        of hundreds."""
        first, second, *more = support_sets(user, 2 + ORACLE_SETS)
        by_number = [
            {n: self.embedding(self.vectors([pairs[:n]])[0], n, user) for n in COUNTS} for pairs in (first, second)
        ]
        mean = F.normalize(self.vectors(more).mean(0), dim=-1)
        return Known(user, first, *by_number, self.embedding(mean, ORACLE_SETS * MOST, user))

    def everyone(self, users: Sequence[User]) -> list[Known]:
        return [self.known(user) for user in tqdm(users, "embeddings", unit="user")]

    @torch.inference_mode()
    def scores(self, vectors: Tensor, images: Tensor, texts: Tensor) -> np.ndarray:
        """What users [U,W] think of pictures [M,D] under their prompts [M,D] -> [U,M]."""
        return torch.stack([self.encoder.scores(v.expand(len(images), -1), images, texts) for v in vectors]).numpy()

    def population(self) -> Tensor:
        """The vector [1,W] of the empty set."""
        width = next(iter(self.features[0].values())).numel()
        with torch.inference_mode():
            return self.encoder(torch.zeros(1, 1, 3, width), torch.zeros(1, 1, dtype=torch.bool))


def predictions(reader: Reader, people: Sequence[Known], of: Pictures) -> dict[str, np.ndarray]:
    """Expected share of right predictions [U,P] of comparisons of held-out concepts, by number of pairs."""
    seen = reader.scorer.embed(images=[opened(png) for png in of.files], progress=False).images
    texts = reader.scorer.embed(prompts=of.prompts.tolist(), progress=False).prompts
    users = {str(n): torch.cat([one.after(n).states for one in people]) for n in (*COUNTS, "oracle")}
    users = {"0": reader.population().expand(len(people), -1)} | users
    sides = of.seen[of.pairs]
    truth = np.stack([choice_probability(k.user, *utility(k.user, sides).T) for k in people])
    found = {}
    for n, vectors in users.items():
        scores = reader.scores(vectors, seen, texts)[:, of.pairs]
        found[n] = np.where(scores[..., 0] > scores[..., 1], truth, 1 - truth)
    return found
