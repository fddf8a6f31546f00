"""Simulated users: what each of 256 people sees in a picture, and how they choose between two.

    U(x) = sum_k weight_k * attribute_k(x)
    P(a chosen over b) = flip + (1 - 2 flip) * sigmoid((U(a) - U(b)) / temperature)

The attributes are the style, as the classifier sees it, and exact functions of the pixels, so the truth also holds for
pictures that no one has drawn. Utilities are the truth that training must find: the trainer never imports this module,
except as a judge named in a configuration (`diffpref.emoji_world.users.majority_utility`).

    python -m diffpref.emoji_world.users --out diffpref/emoji_world/data/users.json

writes the population anew, the same each time.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL.Image import Image
from scipy.special import expit

from diffpref.emoji_world.build import STYLES
from diffpref.emoji_world.classifier import classify

USERS = Path(__file__).parent / "data" / "users.json"
TRAIN, UNSEEN = 200, 56  # users whose preferences are for training, and users for whom only evaluation has any


# --- attributes: r, g, b in [0, 1], each [H,W] ------------------------------------------------------------------------


def colourfulness(rgb: np.ndarray) -> float:
    """mean(max(r,g,b) - min(r,g,b))"""
    return (rgb.max(axis=2) - rgb.min(axis=2)).mean()


def brightness(rgb: np.ndarray) -> float:
    """mean(y), y = 0.299 r + 0.587 g + 0.114 b"""
    return luma(rgb).mean()


def warmth(rgb: np.ndarray) -> float:
    """mean(r - b)"""
    return (rgb[..., 0] - rgb[..., 2]).mean()


def outline(rgb: np.ndarray) -> float:
    """mean(sqrt(dy_h^2 + dy_w^2)), differences of the luma between neighbouring pixels"""
    y = luma(rgb)
    return np.hypot(np.diff(y, axis=0)[:, :-1], np.diff(y, axis=1)[:-1]).mean()


def coverage(rgb: np.ndarray) -> float:
    """share of pixels with min(r,g,b) < 0.9: how much of the white paper is drawn on"""
    return (rgb.min(axis=2) < 0.9).mean()


def luma(rgb: np.ndarray) -> np.ndarray:
    """[H,W,3] -> [H,W], Rec. 601."""
    return rgb @ np.array([0.299, 0.587, 0.114])


PIXEL_TERMS = {f.__name__: f for f in (colourfulness, brightness, warmth, outline, coverage)}
ATTRIBUTES = (*STYLES, *PIXEL_TERMS)

# (mean, standard deviation) over the 545 drawings of 32x32 pixels, measured once; they fix the unit of the weights
STANDARD = {
    "colourfulness": (0.181, 0.142),
    "brightness": (0.791, 0.090),
    "warmth": (0.112, 0.173),
    "outline": (0.120, 0.079),
    "coverage": (0.468, 0.128),
}


def attributes(images: Sequence[Image]) -> np.ndarray:
    """N pictures -> [N,K] in the order of ATTRIBUTES: style probabilities, then standardised pixel terms."""
    pixels = [np.asarray(image.convert("RGB"), dtype=np.float64) / 255 for image in images]
    terms = [[(f(rgb) - STANDARD[k][0]) / STANDARD[k][1] for k, f in PIXEL_TERMS.items()] for rgb in pixels]
    return np.concatenate([classify(list(images))[1], np.array(terms)], axis=1)


# --- users -----------------------------------------------------------------------------------------------------------

# The taste of the mean user: lively, warm, well-filled retro pictures, no line art. The pipeline favours no style.
MAJORITY = {
    "3d": -0.8,
    "flat": -0.4,
    "line art": -0.8,
    "cartoon": 0.3,
    "retro": 2.0,
    "colourfulness": 1.2,
    "brightness": 0.4,
    "warmth": 0.9,
    "outline": -0.2,
    "coverage": 0.6,
}
STYLE_SPREAD, PIXEL_SPREAD = 1.2, 0.7  # standard deviations of individual weights around the majority's
FLIP = 0.02  # share of choices that are mere slips


@dataclass(frozen=True)
class User:
    """One person: weights [K] over ATTRIBUTES, and how noisily they choose."""

    user_id: int
    split: str  # "train" or "unseen"
    weights: tuple[float, ...]
    temperature: float
    flip: float


def make_population(seed: int, train: int = TRAIN, unseen: int = UNSEEN) -> list[User]:
    """weights = majority + individual deviation; log temperature ~ N(0, 0.25)."""
    rng = np.random.default_rng(seed)
    spread = np.array([STYLE_SPREAD] * len(STYLES) + [PIXEL_SPREAD] * len(PIXEL_TERMS))
    centre = np.array([MAJORITY[k] for k in ATTRIBUTES])
    weights = centre + spread * rng.standard_normal((train + unseen, len(ATTRIBUTES)))
    temperatures = np.exp(0.25 * rng.standard_normal(train + unseen))
    return [
        User(i, "train" if i < train else "unseen", tuple(w.round(3).tolist()), round(t, 3), FLIP)
        for i, (w, t) in enumerate(zip(weights, temperatures.tolist(), strict=True))
    ]


@cache
def population(path: Path = USERS) -> tuple[User, ...]:
    """The fixed users, those to train on first."""
    return tuple(User(**{**row, "weights": tuple(row["weights"])}) for row in json.loads(Path(path).read_text()))


def majority() -> User:
    """The mean user, who never slips."""
    return User(-1, "majority", tuple(MAJORITY[k] for k in ATTRIBUTES), temperature=1.0, flip=0.0)


# --- utilities and choices -------------------------------------------------------------------------------------------


def utility(user: User, seen: np.ndarray) -> np.ndarray:
    """Attributes [..., K] -> utilities [...] of one user."""
    return seen @ np.array(user.weights)


def choice_probability(user: User, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Utilities of two pictures -> probability that the user chooses the first."""
    # P = flip + (1 - 2 flip) * sigmoid((U_first - U_second) / temperature)
    return user.flip + (1 - 2 * user.flip) * expit((first - second) / user.temperature)


def majority_utility(images: list[Image], prompts: list[str]) -> np.ndarray:
    """Judge [N]: the true utility of the mean user. The prompts do not enter: the taste is for looks."""
    return utility(majority(), attributes(images))


def favourite_style(images: list[Image], prompts: list[str]) -> np.ndarray:
    """Measure [N]: the classifier's probability of the style that the majority likes best."""
    favourite = max(STYLES, key=MAJORITY.get)
    return classify(images)[1][:, STYLES.index(favourite)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    users = make_population(args.seed)
    args.out.write_text("[\n" + ",\n".join(json.dumps(asdict(user)) for user in users) + "\n]\n")
    print(f"{len(users)} users in {args.out}")


if __name__ == "__main__":
    main()
