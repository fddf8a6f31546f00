"""Whom the benchmark of tastes asks, about what: pictures of the emoji world as a scorer embeds them, and the simulated
users' choices between them. The users' noise is as it is; where shares are wanted, their exact expectation is taken."""

import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffpref.batch import Structure
from diffpref.emoji_world.users import ATTRIBUTES, User, attributes, choice_probability, utility
from diffpref.scorer.heads import Head
from diffpref.scorer.losses import LossConfig, total
from diffpref.scorer.towers import Towers

SIDES = ("chosen", "rejected")
PREFERENCES = Path(__file__).resolve().parent.parent / "diffpref" / "emoji_world" / "data" / "preferences"


@dataclass(frozen=True)
class Pictures:
    """M pictures: prepared pixels [M,3,S,S]; unit vectors image, text [M,D]; what users see in them, seen [M,K];
    prompts; P comparisons [P,2]. Users' tastes here are for looks, whatever the prompt, so all have one text."""

    pixels: Tensor
    image: Tensor
    text: Tensor
    seen: np.ndarray
    prompts: np.ndarray
    pairs: np.ndarray

    def looks(self) -> np.ndarray:
        """[M]: 0 line art, 1 warm, 2 cold, −1 none of them clearly."""
        line, warmth = (self.seen[:, ATTRIBUTES.index(name)] for name in ("line art", "warmth"))
        return np.select([line > 0.9, (line < 0.1) & (warmth > 0.7), (line < 0.1) & (warmth < -0.6)], [0, 1, 2], -1)


def pictures(scorer, file: str) -> Pictures:
    """The different pictures of a preference file and the comparisons made among them, each once."""
    rows = pq.read_table(PREFERENCES / file, columns=["prompt", "chosen", "rejected"]).to_pylist()
    place: dict[tuple[bytes, str], int] = {}
    pairs = [[place.setdefault((r[side]["bytes"], r["prompt"]), len(place)) for side in SIDES] for r in rows]
    images = [Image.open(io.BytesIO(png)).convert("RGB") for png, _ in place]
    names = np.array([prompt for _, prompt in place])
    pixels = torch.stack([scorer.towers.preprocess(image) for image in images])
    text = scorer.embed(prompts=["picture"]).prompts.expand(len(images), -1)
    seen = np.concatenate([attributes(images[i : i + 256]) for i in range(0, len(images), 256)])
    asked = np.unique(np.sort(pairs, axis=1), axis=0)
    return Pictures(pixels, embedded(scorer.towers, pixels), text, seen, names, asked)


@torch.no_grad()
def embedded(towers: Towers, pixels: Tensor) -> Tensor:
    """Unit vectors [M,D]."""
    return torch.cat([towers.images(part) for part in pixels.split(256)])


def chances(users: Sequence[User], of: Pictures) -> np.ndarray:
    """[U,P]: probability that a user chooses the first of a comparison."""
    first, second = of.seen[of.pairs[:, 0]], of.seen[of.pairs[:, 1]]
    return np.stack([choice_probability(user, utility(user, first), utility(user, second)) for user in users])


@dataclass(frozen=True)
class Choices:
    """n choices: pairs [n,2] of pictures (chosen, rejected), who [n], and of which comparison [n]."""

    pairs: Tensor
    who: Tensor
    which: Tensor

    def of(self, index: Tensor) -> "Choices":
        """Some of them."""
        return Choices(self.pairs[index], self.who[index], self.which[index])


def choices(chance: np.ndarray, pairs: np.ndarray, who: np.ndarray, which: np.ndarray, rng) -> Choices:
    """What users `who` [n] say of the comparisons `which` [n]; chance [U,P]."""
    said = ordered(pairs[which], rng.random(len(who)) < chance[who, which])
    return Choices(said, torch.from_numpy(who), torch.from_numpy(which))


def ordered(pairs: np.ndarray, first: np.ndarray) -> Tensor:
    """Comparisons [n,2] and whether the first was chosen -> (chosen, rejected) [n,2]."""
    return torch.from_numpy(np.where(first[:, None], pairs, pairs[:, ::-1]).copy())


def ask(chance: np.ndarray, pairs: np.ndarray, each: int, rng) -> Choices:
    """`each` choices of every user."""
    who = np.repeat(np.arange(len(chance)), each)
    return choices(chance, pairs, who, rng.integers(len(pairs), size=len(who)), rng)


def log_odds(head: Head, of: Pictures, pairs: Tensor, user: int | None = None) -> Tensor:
    """Log-odds [n] of the first of pairs [n,2], of one user or of the population."""
    judged = head(of.image, of.text, None if user is None else torch.full((len(of.image),), user))
    return head.logit(judged, pairs[:, 0], pairs[:, 1])


# --- training ---------------------------------------------------------------------------------------------------------

BATCH = 512  # choices in a batch on frozen embeddings
COMPARISONS = 96  # in a batch with towers, with all choices that were made between their pictures
RATE, TOWERS_RATE = 1e-2, 5e-4
USERS_PRIOR, ALIKE = 1.0, 100.0  # precisions of normal priors: of a user's parameters, of a taste's own part
SHIFT = 2  # pixels by which pictures are moved


def loss_of(head: Head, image: Tensor, text: Tensor, said: Choices, loss: LossConfig) -> Tensor:
    """Mean loss of a batch of choices between pictures with these embeddings."""
    n, items, users = len(said.who), said.pairs.T.reshape(-1), said.who.repeat(2)
    pairs = torch.arange(2 * n).reshape(2, n).T
    structure = Structure(torch.zeros(2 * n, dtype=torch.long), pairs, torch.ones(1), user=users)
    return total(head, head(image[items], text[items], users), structure, loss)[0]


def stepped(groups: list[dict], steps: int, loss_at) -> None:
    """AdamW with one warm cycle of the learning rates."""
    optimizer = torch.optim.AdamW(groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), "training", unit="step", leave=False):
        optimizer.zero_grad()
        loss_at().backward()
        optimizer.step()
        schedule.step()


def train(head: Head, of: Pictures, said: Choices, loss: LossConfig, steps: int) -> Head:
    """A head on embeddings as they are."""
    generator = torch.Generator().manual_seed(0)

    def loss_at() -> Tensor:
        head.clamp()
        picked = said.of(torch.randint(len(said.who), (BATCH,), generator=generator))
        return loss_of(head, of.image, of.text, picked, loss)

    stepped([{"params": list(head.parameters()), "lr": RATE, "weight_decay": 0.1}], steps, loss_at)
    return head.eval()


def tune(towers: Towers, head: Head, of: Pictures, said: Choices, loss: LossConfig, steps: int) -> tuple[Towers, Head]:
    """A head together with a copy of the image tower, for frozen embeddings do not hold all that users look at."""
    towers, generator = copy.deepcopy(towers), torch.Generator().manual_seed(0)
    visual = towers.model.visual.train().requires_grad_(True)
    by_comparison = said.which.argsort(stable=True)
    starts = torch.searchsorted(said.which[by_comparison], torch.arange(len(of.pairs) + 1))
    groups, penalty = parameters(head, len(said.who))
    groups.append({"params": list(visual.parameters()), "lr": TOWERS_RATE, "weight_decay": 0.05})

    def loss_at() -> Tensor:
        head.clamp()
        chosen = torch.randperm(len(of.pairs), generator=generator)[:COMPARISONS]
        picked = said.of(torch.cat([by_comparison[starts[c] : starts[c + 1]] for c in chosen]))
        shown, place = picked.pairs.unique(return_inverse=True)
        image = towers.images(moved(of.pixels[shown], generator))
        return loss_of(head, image, of.text[shown], replace(picked, pairs=place), loss) + penalty()

    stepped(groups, steps, loss_at)
    visual.eval()
    return towers, head.eval()


def parameters(head: Head, choices: int):
    """Groups of the head's parameters, users' learning three times as fast, and the priors' part of the mean loss."""
    named = dict(head.named_parameters())
    users = [p for name, p in named.items() if name.startswith("users.")]
    alike = [p for name, p in named.items() if name.endswith("queries.bias")] if head_has_many(named) else []
    rest = [p for name, p in named.items() if not name.startswith("users.")]
    groups = [{"params": rest, "lr": RATE, "weight_decay": 0.0}, {"params": users, "lr": 3 * RATE, "weight_decay": 0.0}]

    def penalty() -> Tensor:
        return (USERS_PRIOR * norms(users) + ALIKE * norms(alike)) / choices

    return groups if users else groups[:1], penalty


def head_has_many(named: dict[str, torch.nn.Parameter]) -> bool:
    """Whether tastes have a common part, from which their own are told apart."""
    return any(name.endswith("queries.common") for name in named)


def norms(parameters: list[torch.nn.Parameter]) -> Tensor:
    """½·Σ‖p‖²"""
    return 0.5 * sum((p.square().sum() for p in parameters), torch.zeros(()))


def moved(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [n,3,S,S], half of them mirrored, all shifted alike on white."""
    mirrored = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5
    padded = F.pad(torch.where(mirrored, pixels.flip(-1), pixels), [SHIFT] * 4, value=float(pixels.max()))
    y, x = torch.randint(2 * SHIFT + 1, (2,), generator=generator).tolist()
    return padded[:, :, y : y + pixels.shape[2], x : x + pixels.shape[3]]


# --- measuring --------------------------------------------------------------------------------------------------------


def population_log_odds(head: Head, of: Pictures) -> np.ndarray:
    """[P], of all comparisons there are."""
    with torch.no_grad():
        return log_odds(head, of, torch.from_numpy(of.pairs)).numpy()


def hits(logits: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Expected accuracy of predictions by sign, over the users' noise; logits [P] or [U,P], chance [U,P] -> [U,P]."""
    right = np.where(logits > 0, chance, 1 - chance)
    return np.where(logits == 0, 0.5, right)


def entropy(p: np.ndarray) -> np.ndarray:
    """Of a coin, in nats."""
    return -(p * np.log(p) + (1 - p) * np.log1p(-p))


def weights_after(prior: np.ndarray, log_likelihood: np.ndarray) -> np.ndarray:
    """Bayes' rule over hypotheses [H]: prior weights, and log-probabilities [H] of what was seen."""
    found = np.log(prior) + log_likelihood
    found = np.exp(found - found.max())
    return found / found.sum()
